"""The plan: everything that the search decided, as frozen, versioned data.

A plan names choices, not layouts: each operator's strategy is the text of its factors per mesh axis
("b k", "-" for none), each input's and output's layout is a text such as "S0 R". Together with the
model it determines the lowered program; it holds no code and loads on any machine.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any

from autopar.errors import PlanError
from autopar.schedule import ScheduleKind

PLAN_VERSION = 4
# Fields that plans of earlier versions lack, with the value that they imply: the last version
# without them -> path (a * stands for each entry of a list or an object) -> value.
_ADDED_SINCE: Mapping[int, Mapping[str, Any]] = {
    1: {"precision": "model", "rules": {}},
    2: {
        "stages.*.prediction.weight_s": 0.0,
        "stages.*.prediction.weight_bytes": 0.0,
        "stages.*.prediction.gather_s": 0.0,
        "stages.*.prediction.reduce_s": 0.0,
        "stages.*.prediction.host_bytes": 0.0,
        "stages.*.parameters.*.host": False,
    },
    3: {"compiled": False},
}

# By the origin that `sharding.rule.Origin` names; this module knows no torch.
_SENTENCES = {
    "registered": "{target} has a registered sharding rule: {detail}",
    "discovered": "{target} has no sharding rule; found by running it: {detail}",
    "replicated": "{target} has no sharding rule and is replicated, as {detail}. Way out: write one"
    " with autopar.register_rule",
}


class Remat(StrEnum):
    """What may be recomputed in backward."""

    NONE = "none"  # views and constants only: every other value that backward reads is kept
    SELECTIVE = "selective"  # also pointwise operators, dropout, small reductions
    FULL = "full"  # everything inside a layer: its inputs are kept


@dataclass(frozen=True, slots=True)
class ParameterPlacement:
    """rest: layout between steps (the optimizer's); step: layout held through a step. host: between
    steps it is in the memory of each device's host, with its gradient and the optimizer's states;
    only the stage that owns it says so."""

    rest: str
    step: str
    host: bool = False


@dataclass(frozen=True, slots=True)
class StagePrediction:
    """Seconds per microbatch or per step, bytes per device.

    weight_s, weight_bytes: where the schedule splits backward, the share of backward_s that W
    plays, and what a microbatch holds between its B and its W in place of saved_bytes. gather_s,
    reduce_s: shares of step_s, before the first forward and after the last backward.
    """

    forward_s: float
    backward_s: float
    step_s: float  # once per step: gathers, gradient reductions, optimizer
    parameter_bytes: float  # at rest, and gathered copies held through the step
    gradient_bytes: float  # accumulated over microbatches; one alone has none that stand
    optimizer_bytes: float
    saved_bytes: float  # per microbatch in flight
    in_flight: int
    transient_bytes: float
    weight_s: float = 0.0
    weight_bytes: float = 0.0
    gather_s: float = 0.0
    reduce_s: float = 0.0
    host_bytes: float = 0.0  # of its host's memory: not in the peak

    @property
    def standing_bytes(self) -> float:
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes

    @property
    def peak_bytes(self) -> float:
        return self.standing_bytes + self.saved_bytes * self.in_flight + self.transient_bytes


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One stage: consecutive layers on one logical mesh.

    devices: global ranks, row-major over the mesh. strategies: operator name -> factors per axis.
    inputs:  layouts of batch, received and other inputs; parameters have placements instead.
    outputs: layouts of sent values and of gradients as they accumulate, by value or input name.
    """

    first_layer: int
    last_layer: int
    axis_sizes: tuple[int, ...]
    crosses_nodes: tuple[bool, ...]
    devices: tuple[int, ...]
    strategies: Mapping[str, str]
    parameters: Mapping[str, ParameterPlacement]
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    prediction: StagePrediction


@dataclass(frozen=True, slots=True)
class SearchRecord:
    """How the plan was found, for people: seconds by pass, what the solvers proved, what lost."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    objective_s: float = 0.0
    bound_s: float = 0.0
    notes: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()

    @property
    def gap(self) -> float:
        return (self.objective_s - self.bound_s) / self.objective_s if self.objective_s else 0.0


@dataclass(frozen=True, slots=True)
class ParallelPlan:
    """The answer, as data.

    graph: fingerprint of the captured graph. cluster: complete description (Cluster.to_dict).
    remat: of each layer. bubble: share of device time idle in the schedule, predicted. precision:
    text of the Precision that the graph was captured in. compiled: whether it is for programs that
    run as compiled code; any plan runs either way. fallbacks: operators that no rule covers,
    replicated. rules: origin and text of each rule that is not a row of autopar's, by overload:
    strategies are in its letters.
    """

    graph: str
    cluster_text: str
    cluster: Mapping[str, Any]
    num_microbatches: int
    schedule: ScheduleKind
    remat: tuple[Remat, ...]
    layer_names: tuple[str, ...]
    stages: tuple[StagePlan, ...]
    step_s: float
    bubble: float
    budget_bytes: float
    precision: str = "model"
    compiled: bool = False
    search: SearchRecord = field(default_factory=SearchRecord)
    fallbacks: Mapping[str, int] = field(default_factory=dict)
    rules: Mapping[str, str] = field(default_factory=dict)
    version: int = PLAN_VERSION

    def __post_init__(self) -> None:
        _check_plan(self)

    @property
    def num_devices(self) -> int:
        return sum(map(len, {stage.devices for stage in self.stages}))

    @property
    def num_workers(self) -> int:
        """Groups of devices that play a row of the schedule each: as many as stages, unless the
        schedule is interleaved and several stages have the same devices."""
        return len({stage.devices for stage in self.stages})

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """Indices of the stages that a global rank belongs to."""
        found = tuple(i for i, stage in enumerate(self.stages) if rank in stage.devices)
        if not found:
            raise PlanError(
                f"rank {rank} is in no stage: the plan has ranks 0 to {self.num_devices - 1}"
            )
        return found

    def unwritten_rules(self) -> tuple[str, ...]:
        """For people: a sentence per operator that autopar has no rule of its own for."""
        sentences = []
        for target, texts in self.rules.items():
            for text in texts.split(" | "):
                origin, _, detail = text.partition(": ")
                count = f" ({self.fallbacks[target]})" if target in self.fallbacks else ""
                sentences.append(_SENTENCES[origin].format(target=target + count, detail=detail))
        return tuple(sentences)

    def to_json(self) -> dict[str, Any]:
        """Without the seconds that the search took: equal searches give equal bytes."""
        encoded: dict[str, Any] = _encode(self)
        encoded["search"]["seconds"] = {}
        return {"format": "autopar-plan", **encoded}

    @classmethod
    def from_json(cls, record: Any) -> ParallelPlan:
        """PlanError names the field that is wrong."""
        if not isinstance(record, Mapping) or record.get("format") != "autopar-plan":
            raise PlanError('not a plan: a plan is a JSON object with "format": "autopar-plan"')
        version = record.get("version")
        if type(version) is not int or version not in (*_ADDED_SINCE, PLAN_VERSION):
            raise PlanError(
                f"the plan has version {version!r}, this autopar reads versions up to "
                f"{PLAN_VERSION}: make the plan again with `autopar plan`"
            )
        fields = {key: value for key, value in record.items() if key != "format"}
        fields = {**_upgraded(fields, version), "version": PLAN_VERSION}
        plan: ParallelPlan = _decode(cls, fields, "plan")
        return plan

    def save(self, path: str | Path) -> None:
        """Writes JSON; equal plans give equal bytes."""
        text = json.dumps(self.to_json(), indent=1, sort_keys=True)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> ParallelPlan:
        """PlanError where the file is missing, not JSON, or not a plan of this version."""
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"cannot read the plan {path}: {error.strerror}") from error
        except ValueError as error:
            raise PlanError(f"{path} is not JSON: {error}") from error
        return cls.from_json(record)


def _check_plan(plan: ParallelPlan) -> None:
    """Stages cover the layers in order and the ranks once; those of an interleaved schedule may
    take turns on p groups of devices, stage s on group s mod p."""
    if not plan.stages:
        raise PlanError("a plan has at least one stage")
    if plan.num_microbatches < 1:
        raise PlanError(f"a plan has at least one microbatch: got {plan.num_microbatches}")
    expected = 0
    for index, stage in enumerate(plan.stages):
        if stage.first_layer != expected or stage.last_layer < stage.first_layer:
            raise PlanError(
                f"stage {index} has layers {stage.first_layer} to {stage.last_layer}, "
                f"expected to start "
                f"at {expected}: stages cover the layers in order"
            )
        expected = stage.last_layer + 1
        sizes = stage.axis_sizes
        devices = math.prod(sizes) if min(sizes, default=0) > 0 else 0
        if devices != len(stage.devices) or len(sizes) != len(stage.crosses_nodes):
            raise PlanError(
                f"stage {index}: mesh {stage.axis_sizes} does not have {len(stage.devices)} devices"
            )
    if expected != len(plan.layer_names):
        raise PlanError(f"the stages hold {expected} layers, the model has {len(plan.layer_names)}")
    if len(plan.remat) != len(plan.layer_names):
        raise PlanError(
            f"remat has one policy per layer: got {len(plan.remat)} for {len(plan.layer_names)}"
        )
    workers = plan.num_workers if plan.schedule.shares_devices else len(plan.stages)
    for index, stage in enumerate(plan.stages):
        if stage.devices != plan.stages[index % workers].devices or len(plan.stages) % workers:
            raise PlanError(
                f"stage {index} runs on devices {stage.devices}: {len(plan.stages)} interleaved "
                f"stages on {workers} groups of devices take turns, stage s on group s mod "
                f"{workers}"
            )
    ranks = sorted(rank for stage in plan.stages[:workers] for rank in stage.devices)
    if ranks != list(range(len(ranks))):
        raise PlanError(f"the stages use the ranks {ranks}: each of 0..n-1 belongs to one stage")


def _upgraded(record: Mapping[str, Any], version: int) -> dict[str, Any]:
    """The record of an earlier version with the fields that have been added since."""
    upgraded = copy.deepcopy(dict(record))
    for last, fields in _ADDED_SINCE.items():
        for path, value in fields.items() if version <= last else ():
            *folders, name = path.split(".")
            for owner in _found(upgraded, folders):
                owner.setdefault(name, copy.deepcopy(value))
    if version < 3 and isinstance(upgraded.get("remat"), str):  # one policy for all layers
        upgraded["remat"] = [upgraded["remat"]] * len(upgraded.get("layer_names", ()))
    return upgraded


def _found(record: Any, path: Sequence[str]) -> list[dict[str, Any]]:
    """The objects at a path; what is malformed on the way is left to the decoder."""
    at = [record]
    for part in path:
        if part == "*":
            lists = [list(x.values()) if isinstance(x, dict) else x for x in at]
            at = [entry for x in lists if isinstance(x, list) for entry in x]
        else:
            at = [x[part] for x in at if isinstance(x, dict) and part in x]
    return [x for x in at if isinstance(x, dict)]


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(k): _encode(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_encode(v) for v in value]
    return value


def _decode(kind: Any, value: Any, where: str) -> Any:
    """A JSON value as `kind`, a dataclass, enum, tuple, mapping or scalar type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    if kind is Any:
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise PlanError(f"{where} is a list: got {_short(value)}")
        return tuple(_decode(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin in (Mapping, dict) or origin is getattr(types, "MappingProxyType", None):
        if not isinstance(value, Mapping):
            raise PlanError(f"{where} is an object: got {_short(value)}")
        return {k: _decode(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(kind, type) and issubclass(kind, Enum):
        try:
            return kind(value)
        except ValueError:
            choices = ", ".join(str(m.value) for m in kind)
            raise PlanError(f"{where} is one of {choices}: got {_short(value)}") from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise PlanError(f"{where} is a {kind.__name__}: got {_short(value)}")
    return value


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise PlanError(f"{where} is an object: got {_short(value)}")
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)]
    unknown, missing = sorted(set(value) - set(names)), sorted(set(names) - set(value))
    if unknown or missing:
        raise PlanError(f"{where}: unknown fields {unknown}, missing fields {missing}")
    return kind(**{name: _decode(hints[name], value[name], f"{where}.{name}") for name in names})


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
