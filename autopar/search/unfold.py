"""The solutions of folded stages, written out for every layer of the model.

Layers that a written layer stands for have the same operators in the same order, after
recomputation and hubs too; so names translate by position, and inputs by who reads them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from autopar.candidate import stage_plan
from autopar.errors import InternalError
from autopar.graph.hubs import insert_hubs
from autopar.graph.program import Graph, Operator, Ref, map_refs
from autopar.intraop.stage import StageSolution
from autopar.layout import Dims
from autopar.lowering.lower import PreparedStage
from autopar.lowering.recompute import apply_recompute
from autopar.lowering.stages import cut_stages
from autopar.plan import Remat, StagePlan


@dataclass(frozen=True, slots=True, eq=False)
class Unfolded:
    """A stage with every layer: its solution, the dims of its values, and the overloads of its
    operators that are replicated for want of a rule."""

    solution: StageSolution
    dims: Mapping[Ref, Dims]
    fallbacks: tuple[str, ...]


def unfold(
    solution: StageSolution,
    stage: PreparedStage,
    whole: Graph,
    written_layer: Callable[[int], int],
) -> Unfolded:
    """The solution of `stage` as one of `whole`, the graph of the same stage with every layer and
    its hubs. written_layer: of a layer of the model. InternalError where they do not match."""
    names = translation(stage.graph, whole, written_layer)

    def old(name: str) -> str:
        return str(_ref(name, names))

    outputs = {}
    for out in whole.outputs:
        key = out.target or out.kind.value
        outputs[key] = solution.outputs[old(out.target) if out.target else key]
    unfolded = replace(
        solution,
        strategies={op.name: solution.strategies[names[op.name]] for op in whole.operators},
        parameters={
            i.name: solution.parameters[old(i.name)]
            for i in whole.inputs
            if old(i.name) in solution.parameters
        },
        inputs={i.name: solution.inputs[old(i.name)] for i in whole.inputs},
        outputs=outputs,
        receive_s={},
    )
    dims = {ref: stage.table.dims[Ref(old(ref.name), ref.index)] for ref in whole.metas()}
    replicated = stage.table.fallbacks
    fallbacks = (replicated.get(names[op.name]) for op in whole.operators)
    return Unfolded(unfolded, dims, tuple(f for f in fallbacks if f is not None))


class WrittenStages(NamedTuple):
    """As a plan has them: its stages, `fallbacks` and `rules`."""

    stages: tuple[StagePlan, ...]
    fallbacks: dict[str, int]
    rules: dict[str, str]


def write_stages(
    graph: Graph,
    policies: Sequence[Remat],
    first_layers: Sequence[int],
    solved: Sequence[tuple[StageSolution, PreparedStage]],
    written_layer: Callable[[int], int],
    devices: Sequence[tuple[int, ...]],
    *,
    compiled: bool = False,
) -> WrittenStages:
    """graph: of the whole model. solved: of each stage its solution and what was solved, in which
    layers may be folded. devices: of each stage. compiled: what the stages run will be."""
    bounds = [*first_layers[1:], len(graph.layer_names)]
    stages: list[StagePlan] = []
    fallbacks: Counter[str] = Counter()
    rules: dict[str, set[str]] = {}
    recomputed = apply_recompute(graph, policies, compiled=compiled)
    for i, stage in enumerate(cut_stages(recomputed, first_layers)):
        whole, (solution, prepared) = insert_hubs(stage), solved[i]
        found = unfold(solution, prepared, whole, written_layer)
        layers = (first_layers[i], bounds[i] - 1)
        stages.append(stage_plan(whole, found.dims, found.solution, layers, devices[i]))
        fallbacks.update(found.fallbacks)
        for target, text in prepared.table.unwritten().items():
            rules.setdefault(target, set()).update(text.split(" | "))
    texts = {target: " | ".join(sorted(rules[target])) for target in sorted(rules)}
    return WrittenStages(tuple(stages), dict(sorted(fallbacks.items())), texts)


def _ref(name: str, names: dict[str, str]) -> Ref:
    """The written value that a value or input of the whole graph corresponds to. Results of an
    operator read "name.index"; inputs that are received are called so too."""
    if name in names:
        return Ref(names[name])
    base, dot, index = name.rpartition(".")
    if dot and base in names:
        return Ref(names[base], int(index))
    raise InternalError(f"the folded stage has nothing that stands for {name}")


def translation(
    written: Graph, whole: Graph, written_layer: Callable[[int], int]
) -> dict[str, str]:
    """Name of each operator and input of `whole` -> its name in `written`."""
    by_layer: defaultdict[int, list[Operator]] = defaultdict(list)
    for op in written.operators:
        by_layer[op.layer].append(op)
    inputs = {i.name for i in whole.inputs}
    position: defaultdict[int, int] = defaultdict(int)
    names: dict[str, str] = {}
    for op in whole.operators:
        twins = by_layer[written_layer(op.layer)]
        place = position[op.layer]
        position[op.layer] += 1
        twin = twins[place] if place < len(twins) else None
        if twin is None or twin.target is not op.target or twin.results != op.results:
            raise InternalError(
                f"layer {op.layer} is not like the one written for it: {op}, {twin}"
            )
        names[op.name] = twin.name
        for mine, theirs in zip(op.operands, twin.operands, strict=True):
            if mine.name in inputs:
                names.setdefault(mine.name, theirs.name)
    unread = [i for i in whole.inputs if i.name not in names]
    for inp in unread:  # read by nothing: the same names in both, or a gradient's parameter
        if any(i.name == inp.name for i in written.inputs):
            names[inp.name] = inp.name
    return names


@lru_cache(maxsize=32)
def same_structure(graph: Graph) -> str:
    """A text that equal stage graphs share whatever their names: what one stage's solution must
    know of another's before it is taken over."""
    numbers: dict[str, int] = {}

    def number(name: str) -> int:
        return numbers.setdefault(name, len(numbers))

    lines = [
        f"{number(i.name)} {i.kind} {i.meta} {i.requires_grad} {i.phase} {i.rest} {i.reduce}"
        for i in graph.inputs
    ]
    first_layer = min((op.layer for op in graph.operators), default=0)
    for op in graph.operators:
        reads = [(number(ref.name), ref.index) for ref in op.operands]
        metas = ", ".join(map(str, op.results))
        lines.append(
            f"{number(op.name)} {op.op_name} {op.phase} {op.layer - first_layer} {reads} {metas}"
            f" {_plain_args(op)}"
        )
    own = {i.name for i in graph.inputs}
    for out in graph.outputs:
        target = number(out.target) if out.target in own else ""
        lines.append(f"{out.kind} {number(out.ref.name)} {out.ref.index} {target}")
    return "\n".join(lines)


def _plain_args(op: Operator) -> str:
    return str(map_refs((op.args, sorted(op.kwargs.items())), lambda _: "%"))


def renamed(solution: StageSolution, source: Graph, target: Graph) -> StageSolution:
    """The solution of one stage graph as that of another with the same structure."""
    operators = {a.name: b.name for a, b in zip(source.operators, target.operators, strict=True)}
    inputs = {a.name: b.name for a, b in zip(source.inputs, target.inputs, strict=True)}
    outputs = {}
    for a, b in zip(source.outputs, target.outputs, strict=True):
        outputs[a.target or a.kind.value] = b.target or b.kind.value
    return replace(
        solution,
        strategies={operators[k]: v for k, v in solution.strategies.items()},
        parameters={inputs[k]: v for k, v in solution.parameters.items()},
        inputs={inputs[k]: v for k, v in solution.inputs.items()},
        outputs={outputs[k]: v for k, v in solution.outputs.items()},
        receive_s={inputs[k]: v for k, v in solution.receive_s.items()},
    )
