"""Plan files: what is written is read back; what is malformed names the field."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autopar.errors import PlanError
from autopar.plan import (
    ParallelPlan,
    ParameterPlacement,
    Remat,
    SearchRecord,
    StagePlan,
    StagePrediction,
)
from autopar.schedule import ScheduleKind
from cost_models import Cluster

PREDICTION = StagePrediction(0.1, 0.2, 0.05, 10.0, 20.0, 40.0, 3.0, 2, 5.0)


def stage(first: int, last: int, devices: tuple[int, ...]) -> StagePlan:
    return StagePlan(
        first_layer=first,
        last_layer=last,
        axis_sizes=(len(devices),),
        crosses_nodes=(False,),
        devices=devices,
        strategies={"mm": "i"},
        parameters={"w": ParameterPlacement("S0", "R")},
        inputs={"x": "S0"},
        outputs={"w": "P"},
        prediction=PREDICTION,
    )


def plan() -> ParallelPlan:
    return ParallelPlan(
        graph="0123456789abcdef",
        cluster_text="cpu:1x4",
        cluster=Cluster.parse("cpu:1x4").to_dict(),
        num_microbatches=2,
        schedule=ScheduleKind.GPIPE,
        remat=(Remat.SELECTIVE,) * 2,
        layer_names=("first", "last"),
        stages=(stage(0, 0, (0, 1)), stage(1, 1, (2, 3))),
        step_s=1.5,
        bubble=0.25,
        budget_bytes=1e9,
        search=SearchRecord({"layers": 0.5}, 2.0, 1.0, ("a note",), ("a candidate",)),
        fallbacks={"aten.foo.default": 3},
    )


def test_a_saved_plan_is_read_back(tmp_path: Path) -> None:
    path, again = tmp_path / "plan.json", tmp_path / "again.json"
    plan().save(path)
    loaded = ParallelPlan.load(path)
    untimed = replace(plan(), search=replace(plan().search, seconds={}))  # times are not saved
    assert loaded == untimed
    loaded.save(again)
    assert path.read_bytes() == again.read_bytes()


def test_plans_of_earlier_versions_have_nothing_on_hosts() -> None:
    placed = replace(plan().stages[0], parameters={"w": ParameterPlacement("S0", "R", True)})
    record = replace(plan(), stages=(placed, plan().stages[1])).to_json()
    assert ParallelPlan.from_json(record).stages[0].parameters["w"].host
    record["version"] = 2
    for old in record["stages"]:
        del old["parameters"]["w"]["host"], old["prediction"]["host_bytes"]
    loaded = ParallelPlan.from_json(record)
    assert not loaded.stages[0].parameters["w"].host
    assert loaded.stages[0].prediction.host_bytes == 0


def test_derived_figures() -> None:
    assert PREDICTION.peak_bytes == 10 + 20 + 40 + 2 * 3 + 5
    assert plan().num_devices == 4 and plan().stages_of(2) == (1,)
    assert plan().search.gap == 0.5 and SearchRecord().gap == 0.0
    with pytest.raises(PlanError, match="rank 4"):
        plan().stages_of(4)


def interleaved(*devices: tuple[int, ...], kind: str = "interleaved") -> ParallelPlan:
    """One layer per stage."""
    stages = tuple(stage(i, i, ranks) for i, ranks in enumerate(devices))
    names = tuple(map(str, range(len(devices))))
    remat = (Remat.FULL,) * len(names)
    return replace(
        plan(), schedule=ScheduleKind(kind), stages=stages, layer_names=names, remat=remat
    )


def test_interleaved_stages_take_turns_on_groups_of_devices() -> None:
    made = interleaved((2, 3), (0, 1), (2, 3), (0, 1))
    assert (made.num_devices, made.num_workers) == (4, 2)
    assert made.stages_of(3) == (0, 2) and made.stages_of(0) == (1, 3)
    assert ParallelPlan.from_json(made.to_json()).stages == made.stages
    with pytest.raises(PlanError, match="belongs to one stage"):
        interleaved((2, 3), (0, 1), (2, 3), (0, 1), kind="1f1b")
    for wrong in (
        ((0, 1), (2, 3), (2, 3), (0, 1)),  # not in turns
        ((0, 1), (2, 3), (0, 1)),  # one group plays more than the other
        ((0, 1), (2, 3), (1, 0), (2, 3)),  # the same devices in another order
    ):
        with pytest.raises(PlanError, match="take turns, stage s on group s mod"):
            interleaved(*wrong)
    with pytest.raises(PlanError, match="ranks"):
        interleaved((0, 1), (1, 2), (0, 1), (1, 2))  # groups overlap


def test_a_plan_of_version_2_is_read() -> None:
    record = plan().to_json()
    record["version"] = 2
    for old in record["stages"]:
        for name in ("weight_s", "weight_bytes", "gather_s", "reduce_s"):
            del old["prediction"][name]
    assert ParallelPlan.from_json(record) == ParallelPlan.from_json(plan().to_json())
    record["version"] = 3
    with pytest.raises(PlanError, match=r"missing fields.*weight_s"):
        ParallelPlan.from_json(record)


def change(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Sets plan.a.0.b to a value; a value of `...` deletes it."""

    def apply(record: dict[str, Any]) -> None:
        *folders, last = path.split(".")
        at: Any = record
        for part in folders:
            at = at[int(part) if isinstance(at, list) else part]
        key: Any = int(last) if isinstance(at, list) else last
        if value is ...:
            del at[key]
        else:
            at[key] = value

    return apply


MALFORMED = {
    "other format": (change("format", "something"), "not a plan"),
    "older version": (change("version", 0), "version 0"),
    "version as text": (change("version", "1"), "version '1'"),
    "version true": (change("version", True), "version True"),
    "no version": (change("version", ...), "version None"),
    "missing field": (change("step_s", ...), "step_s"),
    "unknown field": (change("extra", 1), "extra"),
    "unknown inner field": (change("stages.0.colour", "red"), r"stages\[0\].*colour"),
    "missing inner field": (change("stages.1.devices", ...), r"stages\[1\].*devices"),
    "text for number": (change("num_microbatches", "2"), "plan.num_microbatches"),
    "fraction for count": (change("num_microbatches", 2.5), "plan.num_microbatches"),
    "true for count": (change("num_microbatches", True), "plan.num_microbatches"),
    "null": (change("bubble", None), "plan.bubble"),
    "unknown schedule": (change("schedule", "zigzag"), "plan.schedule.*1f1b"),
    "schedule as list": (change("schedule", ["1f1b"]), "plan.schedule"),
    "object for list": (change("stages", {}), "plan.stages is a list"),
    "list for object": (change("stages.0.strategies", []), r"stages\[0\].strategies"),
    "number for text": (change("stages.0.strategies.mm", 3), r"strategies.mm"),
    "number for object": (change("stages.0", 3), r"plan.stages\[0\] is an object"),
    "text in devices": (change("stages.0.devices.1", "1"), r"devices\[1\]"),
    "placement": (change("stages.0.parameters.w.rest", None), r"parameters.w.rest"),
    "prediction": (change("stages.0.prediction.in_flight", 1.5), r"prediction.in_flight"),
    "no stages": (change("stages", []), "at least one stage"),
    "no microbatches": (change("num_microbatches", 0), "at least one microbatch"),
    "gap in layers": (change("stages.1.first_layer", 2), "stage 1 has layers"),
    "too few layers": (change("layer_names", ["a"]), "hold 2 layers"),
    "wrong mesh": (change("stages.0.axis_sizes", [4]), r"mesh \(4,\)"),
    "empty axis": (change("stages.0.axis_sizes", [-2]), r"mesh \(-2,\)"),
    "links": (change("stages.0.crosses_nodes", [True, False]), "stage 0"),
    "rank twice": (change("stages.1.devices", [1, 2]), "ranks"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_plan_names_the_field(name: str) -> None:
    damage, message = MALFORMED[name]
    record = copy.deepcopy(plan().to_json())
    damage(record)
    with pytest.raises(PlanError, match=message):
        ParallelPlan.from_json(record)


@pytest.mark.parametrize("record", [None, 3, "plan", [], {}])
def test_what_is_no_plan_at_all(record: Any) -> None:
    with pytest.raises(PlanError, match="not a plan"):
        ParallelPlan.from_json(record)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot read"):
        ParallelPlan.load(tmp_path / "missing.json")
    with pytest.raises(PlanError, match="cannot read"):
        ParallelPlan.load(tmp_path)
    text = json.dumps(plan().to_json())
    for name, content in {"cut.json": text[:-20], "empty.json": "", "prose.json": "hello"}.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(PlanError, match=f"{name} is not JSON"):
            ParallelPlan.load(tmp_path / name)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="is not JSON"):
        ParallelPlan.load(tmp_path / "binary.json")
