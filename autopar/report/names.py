"""Names of a model in few words: runs of equal blocks, block numbers as `*`, operators by family.

A plan names parameters and operators as the graph does ("parameter_h_0_weight", "addmm_3"). Where
the graph is at hand the model's own names and sizes are used.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from autopar.graph.program import Graph, InputKind
from autopar.plan import ParameterPlacement, Remat, StagePlan
from autopar.report.units import range_text

_INPUT_PREFIX = "parameter_"
_NUMBER = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")
_GRAPH_NUMBER = re.compile(r"(?<=_)\d+(?=_)")
_LAST_WORD = re.compile(r"(?<=[._])(weight|bias)$")
_SUFFIX = re.compile(r"_\d+$")
# Hubs, saves and recomputed copies are called after the value or operator that they stand for.
_DERIVED = re.compile(r"__(save|hubb?|re\d*)$")
# Contractions, attention, embeddings and losses: where the FLOPs and the large weights are.
_HEAVY = re.compile(
    r"(addmm|mm|bmm|baddbmm|convolution|convolution_backward|embedding|embedding_dense_backward"
    r"|nll_loss_forward|cross_entropy|_grouped_mm|.*attention.*)"
)


def layers_text(names: Iterable[str]) -> str:
    """ "first, transformer.h.0 .. 5, last"."""
    runs: list[tuple[str, str, str]] = []  # head, first number, last number
    for name in names:
        head, dot, number = name.rpartition(".")
        block = bool(dot) and number.isdigit()
        if block and runs and runs[-1][0] == head and runs[-1][2] == str(int(number) - 1):
            runs[-1] = (head, runs[-1][1], number)
        else:
            runs.append((head, number, number) if block else (name, "", ""))
    return ", ".join(
        head if not first else f"{head}.{first}" + (f" .. {last}" if last != first else "")
        for head, first, last in runs
    )


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters of one name pattern and one placement. nbytes: of all of them, whole; None where
    unknown."""

    pattern: str
    placement: ParameterPlacement
    count: int
    nbytes: int | None


def parameter_groups(stage: StagePlan, graph: Graph | None = None) -> tuple[ParameterGroup, ...]:
    """In the order of the model. Where equal parameters of different blocks are placed differently
    the pattern says which blocks, such as "h.0-3.up.weight". O(parameters)."""
    known = {} if graph is None else {i.name: i for i in graph.inputs_of(InputKind.PARAMETER)}
    counts: Counter[tuple[str, ParameterPlacement]] = Counter()
    sizes: Counter[tuple[str, ParameterPlacement]] = Counter()
    blocks: defaultdict[tuple[str, ParameterPlacement], list[int]] = defaultdict(list)
    for name, placement in stage.parameters.items():
        inp = known.get(name)
        pattern = parameter_pattern(name, None if inp is None else inp.target)
        if inp is not None:
            sizes[pattern, placement] += inp.meta.nbytes
        counts[pattern, placement] += 1
        blocks[pattern, placement] += _block_numbers(name if inp is None else inp.target)
    placements = Counter(pattern for pattern, _ in counts)
    groups = [
        ParameterGroup(
            _in_blocks(pattern, blocks[pattern, placement]) if placements[pattern] > 1 else pattern,
            placement,
            count,
            sizes.get((pattern, placement)),
        )
        for (pattern, placement), count in counts.items()
    ]
    return _merged(groups)


def parameter_pattern(name: str, path: str | None = None) -> str:
    """The name with `*` for numbers of blocks. path: in the model, where it is known."""
    if path is None:
        return _GRAPH_NUMBER.sub("*", name.removeprefix(_INPUT_PREFIX))
    return _NUMBER.sub("*", path)


def _block_numbers(name: str) -> list[int]:
    numbers = (_NUMBER if "." in name else _GRAPH_NUMBER).findall(name)
    return [int(number) for number in numbers[:1]]


def _in_blocks(pattern: str, blocks: Sequence[int]) -> str:
    """ "h.0-3.up" or "h.{0-3, 5}.up" for "h.*.up"; patterns with more numbers than one stay."""
    if pattern.count("*") != 1:
        return pattern
    runs = range_text(sorted(blocks))
    return pattern.replace("*", f"{{{runs}}}" if "," in runs else runs)


def _merged(groups: Sequence[ParameterGroup]) -> tuple[ParameterGroup, ...]:
    """Weight and bias of one module in one placement become one row, "h.*.ln_1.{weight,bias}"."""
    rows: dict[tuple[str, ParameterPlacement], list[ParameterGroup]] = {}
    for group in groups:
        stem = _LAST_WORD.sub("", group.pattern)
        rows.setdefault((stem, group.placement), []).append(group)
    return tuple(_sum(stem, row) for (stem, _), row in rows.items())


def _sum(stem: str, row: Sequence[ParameterGroup]) -> ParameterGroup:
    if len(row) == 1:
        return row[0]
    words = ",".join(group.pattern[len(stem) :] for group in row)
    sizes = [group.nbytes for group in row if group.nbytes is not None]
    return ParameterGroup(
        f"{stem}{{{words}}}",
        row[0].placement,
        sum(group.count for group in row),
        sum(sizes) if len(sizes) == len(row) else None,
    )


def operator_family(name: str) -> str:
    """ "addmm" of "addmm_12"."""
    return _SUFFIX.sub("", name)


def is_derived(name: str) -> bool:
    """Whether an operator is a hub, a save or a recomputed copy, by its name."""
    return _DERIVED.search(name) is not None


def heavy_strategies(stage: StagePlan) -> Mapping[str, Counter[str]]:
    """Strategy texts and their counts by family of heavy operators, the most frequent first."""
    found: dict[str, Counter[str]] = {}
    for name, text in stage.strategies.items():
        family = operator_family(name)
        if _HEAVY.fullmatch(family) and not is_derived(name):
            found.setdefault(family, Counter())[text] += 1
    return dict(sorted(found.items(), key=lambda item: (-item[1].total(), item[0])))


def remat_text(policies: Sequence[Remat]) -> str:
    """ "full", or "full in 24 of 34 layers, none in 10"."""
    counts = Counter(policies)
    if len(counts) == 1:
        return str(policies[0])
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    (policy, most), *others = ranked
    rest = "".join(f", {other} in {count}" for other, count in others)
    return f"{policy} in {most} of {len(policies)} layers{rest}"
