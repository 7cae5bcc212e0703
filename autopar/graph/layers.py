"""Layers: runs of forward operators with their backward ones, the atoms of the inter-op pass.

Cut points come from module paths where the model repeats a block (`<list>.<i>`): one layer per
block, one for what precedes the first, one for what follows the last. Asked for a number of layers,
or without blocks, a dynamic program in the manner of Alpa (Zheng et al., OSDI'22, section 5.2)
chooses the cuts:

    F(k, i) = min over j < i of F(k-1, j) + (w(j, i) / (W / K) - 1)^2 + a c(i) / max c
              w(j, i) work of forward operators j..i, W of all, K layers, c(i) bytes crossing cut i

Backward operators join the layer of their forward partner. A sum of gradients has none: it joins
the earliest layer among its operands, the last of them to run backward, so that one tensor crosses
each cut. Verifier: :func:`check_layers`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from autopar.errors import InternalError, OptionError
from autopar.graph.numbering import without_op_id
from autopar.graph.program import Graph, Operator, Phase, Ref, TensorMeta, map_refs
from autopar.graph.work import is_contraction, operator_bytes, operator_flops

# FLOPs that take as long as moving one byte: about 750 TFLOP/s over 3 TB/s on an H100. Only the
# balance of layers hangs on it.
_FLOPS_PER_BYTE = 250.0
# Of crossing bytes against imbalance. Alpa bounds the imbalance and minimises the bytes.
_CUT_WEIGHT = 0.1
_MAX_SEGMENTS = 2000  # the dynamic program is quadratic: it cuts between at most so many runs

Block = tuple[str, str]  # path of the list, and the number of the block in it


@dataclass(frozen=True, slots=True)
class _Cuts:
    """Layer k holds forward operators starts[k] .. starts[k + 1] - 1."""

    starts: tuple[int, ...]
    names: tuple[str, ...]


def cluster_layers(
    graph: Graph, num_layers: int | None = None, standing_for: Mapping[Block, int] | None = None
) -> Graph:
    """The graph with `layer` on every operator, and `layer_names`.

    num_layers: None for one per repeated block, plus what precedes and follows them; a model
    without blocks gets one per contraction, at most 8. Fewer layers than that are unions of blocks.
    standing_for: blocks that stand for several, and for how many: lists of blocks are chosen by
    their share of the operators of the whole model.
    """
    forward = [op for op in graph.operators if op.phase is Phase.FORWARD]
    if num_layers is not None and not 1 <= num_layers <= len(forward):
        raise OptionError(
            f"num_layers must lie between 1 and {len(forward)}, the number of forward operators:"
            f" got {num_layers}"
        )
    cuts = _block_cuts(forward, standing_for or {})
    if cuts is None or (num_layers is not None and num_layers != len(cuts.starts)):
        cuts = _balanced_cuts(graph, forward, num_layers, cuts)
    layers: dict[str, int] = {}
    for layer, (start, stop) in enumerate(_ranges(cuts.starts, len(forward))):
        layers.update((op.name, layer) for op in forward[start:stop])
    _place_backward(graph, layers)
    operators = tuple(op.changed(layer=layers[op.name]) for op in graph.operators)
    return check_layers(replace(graph, operators=operators, layer_names=cuts.names))


def block_of(module: str) -> Block | None:
    """The outermost numbered module of a path: "transformer.h.3.attn" lies in ("transformer.h",
    "3"). A second call of a block is another block, "3@1"."""
    parts = module.split(".")
    for position, part in enumerate(parts):
        if part.partition("@")[0].isdigit():
            return ".".join(parts[:position]), part
    return None


def _block_cuts(forward: Sequence[Operator], standing_for: Mapping[Block, int]) -> _Cuts | None:
    """A cut where each new block begins. None if no list has two blocks.

    A block has a contraction (a numbered activation is none). A list of blocks holds at least a
    tenth of the operators (the two linears of a classifier do not).
    """
    blocks = [block_of(op.module) for op in forward]
    real = {block for block, op in zip(blocks, forward, strict=True) if is_contraction(op)}
    sizes: Counter[str] = Counter()
    total = 0
    for block in blocks:
        weight = 1 if block is None else standing_for.get(block, 1)
        total += weight
        if block is not None and block in real:
            sizes[block[0]] += weight
    members = Counter(block[0] for block in real if block is not None)
    lists = {n for n, size in sizes.items() if members[n] > 1 and size * 10 >= total}
    if not lists:
        return None
    return _runs([b if b is not None and b in real and b[0] in lists else None for b in blocks])


def _runs(marks: Sequence[Block | None]) -> _Cuts:
    """A layer from each first operator of a block on; what lies between two blocks of a list joins
    the first of them; what lies before, between and after the lists is a layer of its own."""
    ends = {mark[0]: position for position, mark in enumerate(marks) if mark is not None}
    starts, names = [0], ["first"]
    seen: set[Block] = set()
    current: Block | None = None
    for position, mark in enumerate(marks):
        if mark is None and current is not None and position > ends[current[0]]:
            current, name = None, "last" if position > max(ends.values()) else "between"
        elif mark is not None and mark not in seen:
            seen.add(mark)
            current, name = mark, f"{mark[0]}.{mark[1]}".lstrip(".")
        else:
            continue
        if starts[-1] == position:
            names[-1] = name
        else:
            starts.append(position)
            names.append(name)
    return _Cuts(tuple(starts), tuple(names))


def _balanced_cuts(
    graph: Graph, forward: Sequence[Operator], num_layers: int | None, blocks: _Cuts | None
) -> _Cuts:
    """The dynamic program of the module docstring; it cuts between blocks where they are enough.
    O(K n^2) for n possible cuts, vectorised over j."""
    metas = graph.metas()
    work = np.array([_work(op, metas) for op in forward])
    if num_layers is None:
        contractions = sum(operator_flops(op, metas) > 0 for op in forward)
        num_layers = max(1, min(8, contractions))
    crossing = _crossing_bytes(graph, forward, metas)
    ends = _possible_ends(len(forward), num_layers)
    if blocks is not None and len(blocks.starts) > num_layers:
        ends = np.array([*blocks.starts[1:], len(forward)])
    total = np.concatenate([[0.0], np.cumsum(work)])
    at = np.concatenate([[0], ends])  # possible cut positions, the last one is the end
    share = max(total[-1] / num_layers, 1e-30)
    toll = _CUT_WEIGHT * crossing[ends - 1] / max(float(crossing.max()), 1.0)
    best = np.full(len(at), np.inf)
    best[0] = 0.0
    origins = []
    for _ in range(num_layers):
        best, origin = _one_more_layer(best, total[at], share, toll)
        origins.append(origin)
    starts = []
    position = len(at) - 1
    for origin in reversed(origins):
        position = int(origin[position])
        starts.append(int(at[position]))
    starts.reverse()
    names = tuple(_range_name(forward, a, b) for a, b in _ranges(starts, len(forward)))
    return _Cuts(tuple(starts), names)


def _one_more_layer(
    best: npt.NDArray[np.float64],
    total: npt.NDArray[np.float64],
    share: float,
    toll: npt.NDArray[np.float64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.intp]]:
    """F(k, .) and the chosen j from F(k - 1, .)."""
    after = np.full(len(best), np.inf)
    origin = np.zeros(len(best), dtype=np.intp)
    for i in range(1, len(best)):
        costs = best[:i] + ((total[i] - total[:i]) / share - 1.0) ** 2
        origin[i] = np.argmin(costs)
        after[i] = costs[origin[i]] + (toll[i - 1] if i < len(best) - 1 else 0.0)
    return after, origin


def _possible_ends(count: int, num_layers: int) -> npt.NDArray[np.intp]:
    """Positions after which a layer may end; thinned where there are very many operators."""
    stride = max(1, count // max(_MAX_SEGMENTS, num_layers))
    ends = np.arange(stride, count + 1, stride)
    return ends if ends[-1] == count else np.append(ends, count)


def _work(op: Operator, metas: Mapping[Ref, TensorMeta]) -> float:
    """In bytes: a byte for every so many FLOPs, and those that the operator moves."""
    return operator_flops(op, metas) / _FLOPS_PER_BYTE + operator_bytes(op, metas)


def _crossing_bytes(
    graph: Graph, forward: Sequence[Operator], metas: Mapping[Ref, TensorMeta]
) -> npt.NDArray[np.float64]:
    """Entry i: bytes of forward values made at or before operator i and read by a later one."""
    position = {op.name: i for i, op in enumerate(forward)}
    change = np.zeros(len(forward) + 1)
    for ref, readers in graph.readers().items():
        if ref.name not in position:
            continue
        last = max((position[r.name] for r in readers if r.name in position), default=-1)
        if last > position[ref.name]:
            change[position[ref.name]] += metas[ref].nbytes
            change[last] -= metas[ref].nbytes
    return np.cumsum(change)[:-1]


def _range_name(forward: Sequence[Operator], start: int, stop: int) -> str:
    return f"{forward[start].name}..{forward[stop - 1].name}"


def _ranges(starts: Sequence[int], count: int) -> list[tuple[int, int]]:
    return list(zip(starts, (*starts[1:], count), strict=True))


def _place_backward(graph: Graph, layers: dict[str, int]) -> None:
    """Give each backward operator its layer. Without a partner it joins the earliest layer among
    its operands, whose backward runs last: of the gradients that it sums one crosses each cut.
    Without backward operands either it joins the latest layer among its readers."""
    backward = [op for op in graph.operators if op.phase is Phase.BACKWARD]
    inner = {op.name for op in backward}
    for op in backward:
        made = [layers[ref.name] for ref in op.operands if ref.name in inner and ref.name in layers]
        if op.forward:
            layers[op.name] = layers[op.forward]
        elif made:
            layers[op.name] = min(made)
    readers = graph.readers()
    for op in reversed(backward):
        if op.name not in layers:
            read_in = (layers[r.name] for ref in op.refs for r in readers.get(ref, ()))
            layers[op.name] = max(read_in, default=0)


def check_layers(graph: Graph) -> Graph:
    """Verifier: forward operators are in layer order; backward edges lead to the same or an earlier
    layer; layers are numbered 0 .. len(layer_names) - 1 and none lacks forward operators."""
    layer_of = {op.name: op.layer for op in graph.operators}
    phase_of = {op.name: op.phase for op in graph.operators}
    forward = [op.layer for op in graph.operators if op.phase is Phase.FORWARD]
    if forward != sorted(forward) or sorted(set(forward)) != list(range(len(graph.layer_names))):
        raise InternalError(
            f"forward operators must lie in layers 0 to {len(graph.layer_names) - 1} in order:"
            f" got the sequence {list(dict.fromkeys(forward))}"
        )
    for op in graph.operators:
        if op.phase is Phase.FORWARD:
            continue
        for ref in op.operands:
            if phase_of.get(ref.name) is Phase.BACKWARD and layer_of[ref.name] < op.layer:
                raise InternalError(
                    f"backward operator {op.name} of layer {op.layer} reads {ref}, which the"
                    f" earlier layer {layer_of[ref.name]} makes"
                )
            if phase_of.get(ref.name) is Phase.FORWARD and layer_of[ref.name] > op.layer:
                raise InternalError(
                    f"backward operator {op.name} of layer {op.layer} reads {ref} of the later"
                    f" layer {layer_of[ref.name]}"
                )
    return graph


def layer_classes(graph: Graph) -> tuple[int, ...]:
    """For each layer the number of its class: layers of one class are structurally identical.

    Two layers are, if their forward and backward operators agree one by one in overload, constants
    and result metas, read the same inner values, read outer values of the same kinds and metas in
    the same order, and the same of their results are read outside. Which operator id a
    random operator hashes is no difference. O(edges).
    """
    first: dict[str, int] = {}
    texts = _layer_texts(graph)
    return tuple(first.setdefault(text, len(first)) for text in texts)


def _layer_texts(graph: Graph) -> list[str]:
    """Canonical text of every layer."""
    metas = graph.metas()
    layer_of = {op.name: op.layer for op in graph.operators}
    outside = {out.ref: str(out.kind) for out in graph.outputs}
    for op in graph.operators:
        for ref in op.operands:
            if layer_of.get(ref.name, op.layer) != op.layer:
                outside.setdefault(ref, "read")
    kinds = {i.name: f"{i.kind} {i.requires_grad}" for i in graph.inputs}
    kinds.update((op.name, str(op.phase)) for op in graph.operators)
    digests = [hashlib.sha256() for _ in graph.layer_names]
    numbers: list[dict[Ref, int]] = [{} for _ in graph.layer_names]
    for op in graph.operators:
        known = numbers[op.layer]

        def slot(ref: Ref, known: dict[Ref, int] = known) -> str:
            if ref in known:
                return f"%{known[ref]}"
            known[ref] = len(known)
            return f"%{known[ref]} new {kinds[ref.name]} {metas[ref]}"

        wiring = map_refs((without_op_id(op), sorted(op.kwargs.items())), slot)
        uses = [outside.get(Ref(op.name, i), "") for i in range(len(op.results))]
        known.update((ref, len(known) + i) for i, ref in enumerate(op.refs))
        metas_text = [str(meta) for meta in op.results]
        text = f"{op.phase} {op.op_name} {wiring} {metas_text} {uses}\n"
        digests[op.layer].update(text.encode())
    return [digest.hexdigest() for digest in digests]
