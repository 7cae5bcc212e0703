"""Transient bytes of a stage: what is alive beyond what its prediction counts as standing and
saved.

Values live from the operator that makes them to their last reader, in the order of the program;
views and hubs share the memory of what they alias, and a value that is read in another layout has a
copy in it, made once. So do the values that leave a phase:

    forward    what is saved or sent lives to the end
    backward   saved values die with their last reader; gradients live to the end, where they are
               added to the accumulated ones (those of a single microbatch are the sums: none stand
               before)

    transient = max over both phases and moments of  (alive - saved)

At the end of the step one gradient after the other goes to its layout at rest: `reduce_bytes`. At
its beginning parameters come from there: `fetch_bytes`.
Of layers that are folded (`intraop.fold`) two copies are written, and count - 2 run between them.
From one of these to the next only what stays changes: a layer's saved bytes in forward, in backward
those less its gradients. That is linear, so that each of them holds at any time at most what the
first or the last does, and they enter by what they leave behind:

    forward    from the second copy on    + (count - 2) saved bytes of a layer
    backward   until the first copy       + (count - 2) saved bytes of a layer
               from the first copy on     + (count - 2) gradients of a layer

Bytes per device; of workspaces inside a kernel only those of experts are counted. O(values log
values).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from math import fsum
from types import MappingProxyType
from typing import NamedTuple

from autopar.estimate import local_bytes
from autopar.graph.hubs import holds_nothing, is_hub, is_save
from autopar.graph.program import Graph, InputKind, Operator, OutputKind, Phase, Ref, TensorMeta
from autopar.intraop.execution import Execution, gradient_casts, is_aligned, overwritten
from autopar.intraop.stage_problem import Copy, ParameterChoice, weight
from autopar.intraop.workspace import has_workspace, workspace_bytes
from autopar.layout import PARTIAL, Dims, Layout, leaves_padding, local_shape, local_share
from autopar.sharding.reshard import StepKind, reshard_steps
from autopar.sharding.strategy import Strategy


class _Step(NamedTuple):
    """An operator, and what its memory depends on whatever the strategies."""

    op: Operator
    is_save: bool
    aliases: bool  # its first operand
    is_left: bool  # as its first operand, unless a sum is pending
    is_wide: bool  # as it is made: its cast alone is in memory
    overwrites: int | None  # the operand whose memory it takes
    works: bool  # in a workspace


@lru_cache(maxsize=16)  # graphs: a layer is asked about at several prices, a stage under limits
def _steps(graph: Graph, execution: Execution) -> tuple[_Step, ...]:
    casts = gradient_casts(graph, execution)
    return tuple(
        _Step(
            op,
            is_save(op),
            bool(op.operands) and holds_nothing(op),
            op.name in casts.left,
            op.name in casts.wide,
            overwritten(op, execution),
            has_workspace(op),
        )
        for op in graph.operators
    )


class _Copy(NamedTuple):
    """One allocation: a value in a layout."""

    ref: Ref
    layout: Layout


def transient_bytes(
    graph: Graph,
    dims: Mapping[Ref, Dims],
    strategies: Mapping[str, Strategy],
    inputs: Mapping[str, Layout],
    sizes: tuple[int, ...],
    *,
    outputs: Mapping[str, Layout] | None = None,
    copies: Mapping[str, Copy] = MappingProxyType({}),
    execution: Execution = Execution.OPERATORS,
) -> float:
    """The larger of forward's and backward's transient bytes, at least 0.

    inputs, outputs: layouts in which graph inputs stand and outputs leave, by name and target; an
    output that is missing leaves as it is made. dims: of values. sizes: of the mesh axes. copies:
    of values in folded layers. execution: of the stage.
    """
    found = _peaks(graph, dims, strategies, inputs, sizes, outputs or {}, copies, execution)
    return max(0.0, *(nbytes for nbytes, _ in found.values()))


def crowded_moment(
    graph: Graph,
    dims: Mapping[Ref, Dims],
    strategies: Mapping[str, Strategy],
    inputs: Mapping[str, Layout],
    sizes: tuple[int, ...],
    *,
    outputs: Mapping[str, Layout],
    copies: Mapping[str, Copy],
    execution: Execution = Execution.OPERATORS,
) -> tuple[Phase, int]:
    """When transient bytes are most: the number of an operator of a phase, from 1 on; 0 at its very
    beginning. Arguments as of `transient_bytes`."""
    found = _peaks(graph, dims, strategies, inputs, sizes, outputs, copies, execution)
    phase = max(found, key=lambda phase: found[phase][0])
    return phase, found[phase][1]


def _peaks(
    graph: Graph,
    dims: Mapping[Ref, Dims],
    strategies: Mapping[str, Strategy],
    inputs: Mapping[str, Layout],
    sizes: tuple[int, ...],
    outputs: Mapping[str, Layout],
    copies: Mapping[str, Copy],
    execution: Execution,
) -> dict[Phase, tuple[float, int]]:
    """Most transient bytes of each phase, and when."""
    metas = graph.metas()
    saved = fsum(
        weight(copies, step.op.name)
        * local_bytes(metas[ref], dims[ref], strategies[step.op.name].results[0], sizes)
        for step in _steps(graph, execution)
        if step.is_save
        for ref in step.op.refs
    )
    found = {}
    for phase in Phase:
        lives = _Lives(graph, metas, dims, strategies, inputs, sizes, phase, copies, execution)
        alive, when = lives.peak(outputs)
        found[phase] = alive - saved, when
    return found


class Alive(NamedTuple):
    """A value in memory at some moment. nbytes: per device."""

    value: str
    nbytes: float


def alive_at_peak(
    graph: Graph,
    dims: Mapping[Ref, Dims],
    strategies: Mapping[str, Strategy],
    inputs: Mapping[str, Layout],
    sizes: tuple[int, ...],
    *,
    phase: Phase,
    outputs: Mapping[str, Layout],
    execution: Execution = Execution.OPERATORS,
) -> tuple[Alive, ...]:
    """What one phase holds when it holds most, the largest first: values that are saved or leave
    included, parameters not. Arguments as of `transient_bytes`, without folds."""
    lives = _Lives(graph, graph.metas(), dims, strategies, inputs, sizes, phase, {}, execution)
    return tuple(sorted(lives.at_peak(outputs), key=lambda a: (-a.nbytes, a.value)))


def gradient_bytes(
    graph: Graph,
    dims: Mapping[Ref, Dims],
    outputs: Mapping[str, Layout],
    sizes: tuple[int, ...],
    *,
    copies: Mapping[str, Copy] = MappingProxyType({}),
) -> float:
    """Of all gradients as one microbatch leaves them. Arguments as of `transient_bytes`."""
    metas = graph.metas()
    return fsum(
        weight(copies, out.target)
        * local_bytes(metas[out.ref], dims[out.ref], outputs[out.target], sizes)
        for out in graph.outputs_of(OutputKind.GRADIENT)
        if out.target in outputs
    )


def reduce_bytes(
    gradients: Iterable[tuple[TensorMeta, Dims, Layout, Layout]], sizes: tuple[int, ...]
) -> float:
    """What reducing gradients needs beyond them, one after the other.

    gradients: meta, dims, layout in which it accumulates, layout at rest.
    """
    extra = peak = 0.0
    for meta, dims, source, target in gradients:
        if source == target:
            continue
        new = local_bytes(meta, dims, target, sizes)
        more = reshard_extra_bytes(meta.nbytes, dims, source, target, sizes)
        peak = max(peak, extra + new + more)
        extra += new - local_bytes(meta, dims, source, sizes)
    return max(peak, extra)


def fetch_bytes(
    parameters: Iterable[tuple[TensorMeta, TensorMeta, Dims, ParameterChoice]],
    sizes: tuple[int, ...],
) -> float:
    """At most what taking parameters to the step needs beyond those at rest and their copies in
    the step: a shard that is cast or gathered, and what comes from the host.

    parameters: meta at rest, meta in the step, dims, choice. All casts come first, then one gather
    after the other; what is cast is never larger than what is gathered from it.
    """
    peak = 0.0
    for wide, narrow, dims, (rest, step, host) in parameters:
        cast = wide.dtype != narrow.dtype
        if host and cast:
            peak = max(peak, local_bytes(wide, dims, rest, sizes))
        if rest != step:
            made = local_bytes(narrow, dims, rest, sizes) if host or cast else 0.0
            peak = max(peak, made + reshard_extra_bytes(narrow.nbytes, dims, rest, step, sizes))
    return peak


def reshard_extra_bytes(
    nbytes: float, dims: Dims, source: Layout, target: Layout, sizes: tuple[int, ...]
) -> float:
    """The most that the steps of a reshard hold beside its source and its result.

    Collectives work on dim 0: another dim is transposed, an uneven one padded, before a
    reduce-scatter or all-to-all, and after an all-gather or all-to-all another one is transposed.
    """
    current = list(source)
    first = before = nbytes * local_share(dims, source, sizes)
    peak = 0.0
    steps = reshard_steps(source, target)
    for number, step in enumerate(steps):
        current[step.axis] = target[step.axis] if step.kind is StepKind.TO_PARTIAL else step.target
        after = nbytes * local_share(dims, tuple(current), sizes)
        moments = [before + after]
        split = step.kind in (StepKind.REDUCE_SCATTER, StepKind.ALL_TO_ALL)
        if split and (step.target > 0 or leaves_padding(dims, step.target, sizes[step.axis])):
            moments.append(2 * before + after)
        if step.kind in (StepKind.ALL_GATHER, StepKind.ALL_TO_ALL) and step.source > 0:
            moments.append(before + 2 * after)
        held = 0.0 if number == 0 else first  # the source itself may have more readers
        peak = max(peak, held + max(moments))
        before = after
    return max(0.0, peak - first - before) if steps else 0.0


class _Lives:
    """When each allocation of one phase is alive (a builder, local to one call)."""

    def __init__(
        self,
        graph: Graph,
        metas: Mapping[Ref, TensorMeta],
        dims: Mapping[Ref, Dims],
        strategies: Mapping[str, Strategy],
        inputs: Mapping[str, Layout],
        sizes: tuple[int, ...],
        phase: Phase,
        copies: Mapping[str, Copy],
        execution: Execution,
    ) -> None:
        self._execution = execution
        self._graph, self._strategies, self._sizes, self._phase = graph, strategies, sizes, phase
        self._copies = copies
        self._metas, self._dims = metas, dims
        self._held: dict[
            Ref, tuple[_Copy, Layout]
        ] = {}  # value -> memory, and its own layout there
        self._born: dict[_Copy, int] = {}
        self._last: dict[_Copy, int] = {}
        self._moments: dict[int, float] = {}  # time -> bytes needed at that time only
        self._kept: dict[_Copy, str] = {}  # forward, for backward -> name of the save
        self._saved: dict[_Copy, str] = {}  # the same as backward finds them
        self._turn: dict[int, int] = {}  # fold -> when the later copy begins
        self._time = 0
        for inp in graph.inputs:
            self._define(inp.ref, inputs[inp.name])
            received = inp.kind is InputKind.RECEIVED and inp.phase is phase
            if received or inp.kind is InputKind.BATCH:
                self._live(_Copy(inp.ref, inputs[inp.name]))
        for step in _steps(graph, execution):
            if step.op.phase is phase:
                self._time += 1
                if copies:
                    self._note_turn(step.op)
                self._operator(step)
            else:
                self._other_phase(step)

    def peak(self, outputs: Mapping[str, Layout]) -> tuple[float, int]:
        """Largest sum of sizes alive at one time, outputs kept to the end in their layouts; and
        when."""
        leaves = self._end(outputs)
        return self._largest([*self._spans(), *self._unwritten(leaves)])

    def at_peak(self, outputs: Mapping[str, Layout]) -> Iterator[Alive]:
        """The allocations alive at that time; last, under no name, what one operator needs."""
        self._end(outputs)
        _, moment = self._largest([*self._spans()])
        for copy, (nbytes, start, last) in zip(self._born, self._spans(), strict=True):
            if start <= moment <= max(start, last):
                yield Alive(str(copy.ref), nbytes)
        yield Alive("", self._moments.get(moment, 0.0))

    def _end(self, outputs: Mapping[str, Layout]) -> dict[_Copy, str]:
        """Outputs stay to the end. Memory of gradients and buffers -> whose."""
        self._time += 1
        leaves: dict[_Copy, str] = {}
        for kept in self._kept.keys() & self._born.keys():
            self._last[kept] = self._time
        for out in self._graph.outputs:
            memory, layout = self._held[out.ref]
            if memory in self._born:
                copied = self._read(out.ref, outputs.get(out.target, layout))
                if out.kind in (OutputKind.GRADIENT, OutputKind.BUFFER):
                    leaves |= {memory: out.target, copied: out.target}
        return leaves

    def _spans(self) -> Iterator[tuple[float, int, int]]:
        """(bytes, first and last time) of each allocation."""
        for copy, start in self._born.items():
            yield self._bytes(copy.ref, copy.layout), start, self._last.get(copy, start)

    def _largest(self, spans: Iterable[tuple[float, int, int]]) -> tuple[float, int]:
        """Most bytes at one time, and when."""
        changes = dict.fromkeys(self._moments, 0.0)
        for nbytes, start, last in spans:
            stop = max(start, last) + 1
            changes[start] = changes.get(start, 0.0) + nbytes
            changes[stop] = changes.get(stop, 0.0) - nbytes
        alive = peak = 0.0
        when = 0
        for moment in sorted(changes):
            alive += changes[moment]
            most = alive + self._moments.get(moment, 0.0)
            if most > peak:
                peak, when = most, moment
        return peak, when

    def _unwritten(self, leaves: Mapping[_Copy, str]) -> Iterator[tuple[float, int, int]]:
        """(bytes, first and last time) of what copies that are not written hold beside the written
        ones. leaves: memory of a gradient or buffer -> whose."""
        for memory, name in self._saved.items():
            copy = self._copies.get(name)
            if copy is not None and copy.which == 1:
                yield self._times(copy, memory), 0, self._turn[copy.fold] - 1
        for memory, name in {**self._kept, **leaves}.items():
            copy = self._copies.get(name)
            if copy is not None and copy.which == 0 and memory in self._born:
                start = max(self._turn[copy.fold], self._born[memory])
                yield self._times(copy, memory), start, self._time

    def _times(self, copy: Copy, memory: _Copy) -> float:
        return (copy.times - 2) * self._bytes(memory.ref, memory.layout)

    def _note_turn(self, op: Operator) -> None:
        copy = self._copies.get(op.name)
        if copy is not None and not is_hub(op):
            later = 1 if self._phase is Phase.FORWARD else 0
            if copy.which == later:
                self._turn.setdefault(copy.fold, self._time)

    def _define(self, ref: Ref, layout: Layout) -> None:
        """A value in memory of its own."""
        self._held[ref] = (_Copy(ref, layout), layout)

    def _live(self, copy: _Copy) -> None:
        self._born.setdefault(copy, self._time)
        self._last[copy] = self._time

    def _other_phase(self, step: _Step) -> None:
        """What the other phase makes stands here if it is saved, or is not there at all."""
        op = step.op
        for ref in op.refs:
            self._define(ref, self._strategies[op.name].results[ref.index])
            if step.is_save and self._phase is Phase.BACKWARD:
                self._live(self._held[ref][0])
                self._saved[self._held[ref][0]] = op.name

    def _operator(self, step: _Step) -> None:
        op, strategy = step.op, self._strategies[step.op.name]
        read = [
            self._read(ref, layout)
            for ref, layout in zip(op.operands, strategy.operands, strict=True)
        ]
        memory = self._memory_of(step, read)
        for ref in op.refs:
            layout = strategy.results[ref.index]
            if memory is not None:
                self._held[ref] = (memory, layout)
            else:
                self._define(ref, layout)
                if not step.is_wide:
                    self._live(self._held[ref][0])
        decomposed = self._execution is Execution.OPERATORS
        if decomposed and (
            strategy.axes("vp") or strategy.axes("bn")
        ):  # one more value of its size
            sizes = [self._bytes(ref, strategy.results[ref.index]) for ref in op.refs]
            self._at_once(max(sizes, default=0.0))
        if step.works:
            self._at_once(workspace_bytes(op, strategy, self._metas, self._sizes))
        if strategy.fills:  # copies with their padding filled
            filled = {fill.operand for fill in strategy.fills}
            self._at_once(fsum(self._bytes(op.operands[i], strategy.operands[i]) for i in filled))
        if step.is_save:
            self._kept[read[0]] = op.name

    def _memory_of(self, step: _Step, read: Sequence[_Copy]) -> _Copy | None:
        """What it reads and makes no memory beside."""
        op, place = step.op, step.overwrites
        is_left = step.is_left and PARTIAL not in self._strategies[op.name].results[0]
        if step.aliases or is_left:
            return read[0]
        if place is None:
            return None
        ref, layout = op.operands[place], self._strategies[op.name].operands[place]
        meta, shape = self._metas[ref], local_shape(self._dims[ref], layout, self._sizes)
        fits = shape[-1] == meta.shape[-1] or is_aligned(shape[-1], meta.dtype)
        return read[place] if fits else None

    def _bytes(self, ref: Ref, layout: Layout) -> float:
        return local_bytes(self._metas[ref], self._dims[ref], layout, self._sizes)

    def _read(self, ref: Ref, layout: Layout) -> _Copy:
        """The memory that a reader of the value in this layout reads."""
        memory, own = self._held[ref]
        if memory in self._born:
            self._last[memory] = max(self._last[memory], self._time)
        if layout == own:
            return memory
        copy = _Copy(ref, layout)
        if copy not in self._born:
            nbytes, dims = self._metas[ref].nbytes, self._dims[ref]
            self._at_once(reshard_extra_bytes(nbytes, dims, own, layout, self._sizes))
            self._born[copy] = self._time
        self._last[copy] = max(self._last.get(copy, 0), self._time)
        return copy

    def _at_once(self, nbytes: float) -> None:
        self._moments[self._time] = max(self._moments.get(self._time, 0.0), nbytes)
