"""The program of one stage, what its solutions mean, and what its costs depend on.

Nodes are the stage graph's inputs, operators and outputs (`intraop.build`); equal layers may be
folded into one (`intraop.fold`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from autopar.errors import OptionError
from autopar.graph.program import Phase, Ref, TensorMeta
from autopar.intraop.problem import IntraOpProblem
from autopar.layout import Dims, Layout
from autopar.sharding.strategy import Strategy


class Part(StrEnum):
    """Which part of a step a cost belongs to."""

    FORWARD = "forward"
    BACKWARD = "backward"
    STEP = "step"  # once per step, counted 1/B
    TRANSFER = "transfer"


class ParameterChoice(NamedTuple):
    """host: at rest, with its gradient and the optimizer's states, in the memory of the device's
    host; then the device holds a copy in the layout of the step, made anew in each."""

    rest: Layout
    step: Layout
    host: bool = False


Choice = Strategy | ParameterChoice | Layout


@dataclass(frozen=True, slots=True)
class Node:
    """One decision. kind: "input", "operator" or "output"; name: of what the graph calls so."""

    kind: str
    name: str
    choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class Fold:
    """Equal layers of which a stage graph has two copies: `period` layers from `layer` on, and as
    many after them. They stand for `count` copies in a row."""

    layer: int
    count: int
    period: int = 1

    def __post_init__(self) -> None:
        if self.count < 2 or self.period < 1 or self.layer < 0:
            raise OptionError(f"a fold has two copies of one layer or more: got {self}")


class Copy(NamedTuple):
    """Where a value of a folded stage is: in which written copy (0 or 1) of which fold, by number;
    times: the fold's count."""

    fold: int
    which: int
    times: int


def weight(copies: Mapping[str, Copy], name: str) -> float:
    """How many of the stage written out one written value stands for."""
    copy = copies.get(name)
    return 1.0 if copy is None else copy.times / 2


@dataclass(frozen=True, slots=True, eq=False)
class StageProblem:
    """The program and what its solution means. Parts are per node and per edge.

    received, sent: boundary values of the stage by name, with their meta and phase. dims: of
    values. Of a folded stage, copies: values in folded layers; twins: nodes of second copies, each
    with the number of the node that stands for it.
    """

    problem: IntraOpProblem
    nodes: tuple[Node, ...]
    node_parts: tuple[Part, ...]
    edge_parts: tuple[Part, ...]
    byte_kinds: tuple[str, ...]  # per node: "parameter", "gradient", "saved" or ""
    received: Mapping[str, tuple[TensorMeta, Phase]]
    sent: Mapping[str, tuple[TensorMeta, Phase]]
    dims: Mapping[Ref, Dims]
    copies: Mapping[str, Copy] = field(default_factory=dict)
    twins: tuple[tuple[Node, int], ...] = ()

    def read(self, choice: Sequence[int]) -> Chosen:
        """What an assignment means, for the graph as it is written."""
        chosen = Chosen({}, {}, {}, {})
        picks = [*zip(self.nodes, choice, strict=True)]
        picks += [(node, choice[first]) for node, first in self.twins]
        for node, pick in picks:
            found = node.choices[pick]
            if isinstance(found, Strategy):
                chosen.strategies[node.name] = found
            elif isinstance(found, ParameterChoice):
                chosen.parameters[node.name] = found
                chosen.inputs[node.name] = found.step
            elif node.kind == "input":
                chosen.inputs[node.name] = found
            else:
                chosen.outputs[node.name] = found
        return chosen

    def part_seconds(self, choice: Sequence[int]) -> dict[Part, float]:
        """The objective of an assignment split by part of the step."""
        seconds = dict.fromkeys(Part, 0.0)
        problem = self.problem
        for part, costs, pick in zip(self.node_parts, problem.node_seconds, choice, strict=True):
            seconds[part] += float(costs[pick])
        pairs = zip(problem.edges, problem.edge_seconds, self.edge_parts, strict=True)
        for (u, v), matrix, part in pairs:
            seconds[part] += float(matrix[choice[u], choice[v]])
        return seconds

    def kind_bytes(self, choice: Sequence[int]) -> dict[str, float]:
        """Bytes of an assignment by kind; saved ones are times the microbatches in flight."""
        nbytes = dict.fromkeys(("parameter", "gradient", "saved", ""), 0.0)
        pairs = zip(self.byte_kinds, self.problem.node_bytes, choice, strict=True)
        for kind, sizes, pick in pairs:
            nbytes[kind] += float(sizes[pick])
        return nbytes


class Chosen(NamedTuple):
    """An assignment by the names of the graph. inputs: layouts in which they stand in a step."""

    strategies: dict[str, Strategy]
    parameters: dict[str, ParameterChoice]
    inputs: dict[str, Layout]
    outputs: dict[str, Layout]


@dataclass(frozen=True, slots=True)
class StageContext:
    """What the costs of a stage depend on beside the graph and the mesh.

    owned: canonical names of the parameters that this stage keeps between steps (None: all). pins:
    canonical parameter name -> layout at rest as text. folds: layers written twice that count more
    often (`intraop.fold`). offload: parameters may rest on the host. compiled: programs will be.
    """

    num_microbatches: int = 1
    in_flight: int = 1
    owned: frozenset[str] | None = None
    pins: Mapping[str, str] | None = None
    folds: tuple[Fold, ...] = ()
    offload: bool = False
    compiled: bool = False
