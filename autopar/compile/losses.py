"""The loss and its gradient by the scores x in one operator, where one program makes both.

    loss, rows, lse = cross_entropy(x, target)             rows = sum(target != ignore_index)
    g = f(rows)                                      ->    g = f(rows)
    dx = cross_entropy_backward(g, x, target, lse)         losses, dx = cross_entropy_rows(g, x, ..)
                                                           loss = sum(losses)

What g needs comes first then. A g that needs the loss, and a sharded vocabulary, whose devices meet
between the two, stay as they are.

Scores of a vocabulary such as 50257 are a slice of wider ones, of which each row is aligned
(`compile.alignment`), as is the gradient that takes their memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

import autopar.ops  # noqa: F401  (registers autopar::cross_entropy)
from autopar.compile.alignment import PAD
from autopar.compile.heads import RESHAPES
from autopar.compile.nodes import nbytes
from autopar.compile.tables import SAME_MEMORY, materialize
from autopar.graph.program import Ref
from autopar.lowering.program import (
    Compute,
    Instruction,
    LocalProgram,
    check_program,
    live_readers,
    reads_of,
    renamed,
)

aten, own = torch.ops.aten, torch.ops.autopar

_FORWARD, _BACKWARD = own.cross_entropy.default, own.cross_entropy_backward.default
_PRODUCT, _ALIGNED = aten.mm.default, own.aligned_product.default
_ROWS, _SUMS = own.cross_entropy_rows.default, own.softmax_sums.default
_IN_PLACE: Mapping[object, Any] = {
    _BACKWARD: own.cross_entropy_backward_.default,
    _ROWS: own.cross_entropy_rows_.default,
}
_SLICE = aten.slice.Tensor
_MUCH = 16  # the scores have more bytes, by this factor, than what may be kept of them


def join_losses(program: LocalProgram) -> LocalProgram:
    """The same outputs to rounding. Post: check_program. O(instructions) for each loss."""
    for backward in [i for i in program.body if isinstance(i, Compute) and i.target is _BACKWARD]:
        program = _joined(program, backward)
    return program


def align_scores(program: LocalProgram) -> LocalProgram:
    """The same values: what makes scores for a joined loss alone may give them room between their
    rows. O(instructions) for each loss."""
    made = {instruction.name: instruction for instruction in program.body}
    readers = live_readers(program)

    def product_for(ref: Ref) -> str | None:
        """The product that makes a value that nobody else reads, in any shape."""
        maker = made.get(ref.name)
        if readers[ref.name] != 1 or not isinstance(maker, Compute):
            return None
        if maker.target in RESHAPES:
            return product_for(maker.args[0])
        return maker.name if maker.target is _PRODUCT else None

    losses = [i for i in program.body if isinstance(i, Compute) and i.target is _ROWS]
    wide = {product_for(loss.args[1]) for loss in losses}
    body = tuple(
        replace(i, target=_ALIGNED) if isinstance(i, Compute) and i.name in wide else i
        for i in program.body
    )
    return replace(program, body=body)


def overwrite_scores(module: fx.GraphModule) -> fx.GraphModule:
    """The same values, in place: gradients take the memory of scores that nothing else reads, as
    a plan says. Nothing that looks at values alone may come after it. Pre: flat ATen graph with
    fake values. O(nodes)."""
    graph = module.graph
    for node in graph.find_nodes(op="call_function", target=_ROWS):
        losses, gradient = (next((u for u in node.users if u.args[1] == i), None) for i in range(2))
        if losses is not None and gradient is not None:
            _overwrite(node, gradient, losses)
    for node in graph.find_nodes(op="call_function", target=_BACKWARD):
        _overwrite(node, node, None)
    module.recompile()
    return module


def _overwrite(node: fx.Node, gradient: fx.Node, losses: fx.Node | None) -> None:
    """losses: the node's other result, if it has one."""
    scores, graph = node.args[1], node.graph
    if not isinstance(scores, fx.Node):
        return
    views = _views(scores)
    place = _place(views)
    others = _other_readers(views, node)
    if place is None or others is None:
        return
    for reader in others:  # Inductor would read the scores where it reads what is made of them
        materialize(graph, reader)
    with graph.inserting_before(node):
        args = (node.args[0], place, *node.args[2:])
        written = graph.call_function(_IN_PLACE[node.target], args)
    gradient.replace_all_uses_with(place)
    if place is not scores:
        _drop_padding(place, views[-1], written)
    if losses is not None:
        written.meta["val"] = losses.meta["val"]
        losses.replace_all_uses_with(written)
    for old in dict.fromkeys((losses, gradient, node)):
        if old is not None:
            graph.erase_node(old)


def _views(scores: fx.Node) -> list[fx.Node]:
    """The scores and what they are a view of, up to what made that."""
    views = [scores]
    while views[-1].target in SAME_MEMORY:
        views.append(views[-1].all_input_nodes[0])
    return views


def _place(views: Sequence[fx.Node]) -> fx.Node | None:
    """Where the gradient is written: where the scores are, or in the first columns of a wider
    product, if the scores are all of them."""
    scores = views[0]
    slices = [view for view in views if view.target is _SLICE]
    if not slices:
        return scores
    first = views[-2]
    value, columns = scores.meta["val"], first.meta["val"]
    whole = value.shape == columns.shape and value.stride() == columns.stride()
    return first if whole and slices == [first] else None


def _drop_padding(place: fx.Node, product: fx.Node, written: fx.Node) -> None:
    """Whoever pads the gradient reads all of the product, whose last columns are zeros: those of
    the padded operand that made them."""
    more = product.meta["val"].shape[1] - place.meta["val"].shape[1]
    more_rows, more_columns = ([0, 0, 0, more], 0.0), ([0, more, 0, 0], 0.0)
    weights, wanted, other = product.args[1], more_columns, more_rows
    while isinstance(weights, fx.Node) and weights.target is aten.permute.default:
        weights, wanted, other = weights.all_input_nodes[0], other, wanted
    if not isinstance(weights, fx.Node) or weights.target is not PAD:
        return
    if weights.args[1:] != wanted:
        return
    for value in _reshaped(place):
        for user in list(value.users):
            if user.target is PAD and written < user and user.args[1:] == more_columns:
                user.replace_all_uses_with(product)
                place.graph.erase_node(user)


def _reshaped(node: fx.Node) -> list[fx.Node]:
    """A value, and what has its shape after reshapes of it."""
    found = [node]
    for value in found:  # grows
        found += [user for user in value.users if user.target in RESHAPES]
    shape = node.meta["val"].shape
    return [value for value in found if value.meta["val"].shape == shape]


def _other_readers(views: Sequence[fx.Node], last: fx.Node) -> list[fx.Node] | None:
    """Small values that are made of the scores before `last`; None where a product did not make
    the scores, or their memory is read later or made much of. views: of the scores."""
    if views[-1].target is not _PRODUCT:
        return None
    views, scores = list(views), views[0]
    readers: list[fx.Node] = []
    for view in views:  # grows
        for user in view.users:
            if user.target in SAME_MEMORY:
                views += [user] if user not in views else []
            elif user is not last:
                readers.append(user)
    made = [reader for reader in readers if reader.target is not _SUMS]  # which is no pointwise one
    small = all(_MUCH * nbytes(reader) <= nbytes(scores) for reader in made)
    return made if small and all(reader < last for reader in readers) else None


def _joined(program: LocalProgram, backward: Compute) -> LocalProgram:
    made = {instruction.name: instruction for instruction in program.body}
    grad, x, target, lse, ignore_index, first = backward.args
    forward = made.get(lse.name)
    if not isinstance(forward, Compute) or forward.target is not _FORWARD or first != 0:
        return program
    scores, classes, ignored = forward.args
    is_same = _origin(made, x) == _origin(made, scores) and ignored == ignore_index
    is_same &= _origin(made, target) == _origin(made, classes)
    loss, rows, lse = (Ref(forward.name, index) for index in range(3))
    readers = [i.name for i in program.body if lse in reads_of(i)]
    readers += [key for key, port in program.outputs.items() if port.ref == lse]
    before = _ancestors(made, classes, forward)
    after = _ancestors(made, grad, forward) - before
    waits = any({loss, lse} & {*reads_of(made[name])} for name in after)
    if not is_same or waits or readers != [backward.name]:
        return program
    counted = _call(forward, "counted", aten.ne.Scalar, classes, ignored)
    number = _call(forward, "rows", aten.sum.default, Ref(counted.name))
    number = replace(number, kwargs={"dtype": torch.float32})
    joined = _call(forward, "joined", _ROWS, grad, scores, classes, ignored)
    total = _call(forward, "loss", aten.sum.default, Ref(joined.name))
    body = [i for i in program.body if i.name in before]
    body += [counted, number, *(i for i in program.body if i.name in after)]
    for instruction in program.body:
        if instruction is forward:
            body += [joined, total]
        elif instruction is not backward and instruction.name not in before | after:
            body.append(instruction)
    now = {loss: Ref(total.name), rows: Ref(number.name), Ref(backward.name): Ref(joined.name, 1)}

    def known(ref: Ref) -> Ref:
        return now.get(ref, ref)

    outputs = {key: replace(p, ref=known(p.ref)) for key, p in program.outputs.items()}
    body = [renamed(instruction, instruction.name, known) for instruction in body]
    return check_program(replace(program, body=tuple(body), outputs=outputs))


def _call(forward: Compute, name: str, target: Any, *args: Any) -> Compute:
    return Compute(f"{forward.name}_{name}", target, args, {}, forward.origin)


def _origin(made: Mapping[str, Instruction], ref: Ref) -> Ref:
    """What a value is in another shape."""
    maker = made.get(ref.name)
    while isinstance(maker, Compute) and maker.target in RESHAPES:
        ref = maker.args[0]
        maker = made.get(ref.name)
    return ref


def _ancestors(made: Mapping[str, Instruction], ref: Ref, end: Compute) -> set[str]:
    """Names of the instructions that a value needs; not `end`, nor what that needs."""
    found: set[str] = set()
    left = [ref]
    while left:
        name = left.pop().name
        if name in made and name != end.name and name not in found:
            found.add(name)
            left += reads_of(made[name])
    return found
