"""Capture of a model of many equal blocks in the time of few.

Of each run of equal blocks (`graph.blocks`) the first ones and the last are traced. Stand-ins take
the places between, so that every block keeps its number: they give out what the block before them
gave, after checking that they were called just as that one was. The last traced block before them,
r, then stands for them all (`graph.repeat`), if it continues its predecessor in the graph.

Nothing is taken on trust: a model that treats its blocks differently is captured whole, because
 - its modules differ: their signatures do;
 - its forward calls them with other arguments, not in order, or more than once: a stand-in notices;
 - it does something else between two of them: the next one gets another tensor;
 - a block looks at its own number: reads of such attributes are watched;
 - somebody else reads of one block, its router say, or its parameters: the graph shows it.
Only what a forward does at a block of a certain number without touching the tensors or arguments of
any block escapes.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autopar.errors import CaptureError
from autopar.graph.blocks import Run, equal_runs
from autopar.graph.capture import LossFn, capture_graph
from autopar.graph.congruence import Congruence, congruence
from autopar.graph.layers import Block, cluster_layers, layer_classes
from autopar.graph.patches import replaced
from autopar.graph.precision import Precision
from autopar.graph.program import Graph
from autopar.graph.repeat import Folded, whole_graph

_LOG = logging.getLogger(__name__)
# Blocks traced before the stand-ins: the second continues the first. Where the first is special
# (nothing before it needs a gradient, say) one more is traced.
_TRACED = 2


def capture_folded(
    model: nn.Module,
    example_batch: Any,
    loss_fn: LossFn | None = None,
    precision: Precision = Precision(),
    num_layers: int | None = None,
) -> Folded:
    """The graph of `capture_graph` with layers (`graph.layers`), equal blocks traced once.

    num_layers: as of `cluster_layers`; where it is given, the graph is whole. `whole_graph` of the
    result is the graph of a whole capture, name by name. Why a model, or a list of blocks, is
    captured whole is logged.
    """
    folded = _fold(model, example_batch, loss_fn, precision)
    if folded is None:
        graph = cluster_layers(capture_graph(model, example_batch, loss_fn, precision), num_layers)
        return Folded(graph, (1,) * len(graph.layer_names))
    if num_layers is None:
        return folded
    graph = cluster_layers(whole_graph(folded), num_layers)
    return Folded(graph, (1,) * len(graph.layer_names))


def _fold(
    model: nn.Module, example_batch: Any, loss_fn: LossFn | None, precision: Precision
) -> Folded | None:
    """None where nothing can be folded."""
    if not isinstance(model, nn.Module):
        return None  # capture_graph says what is wrong
    folds = [_Fold(run, _TRACED) for run in equal_runs(model, _TRACED + 2)]
    while folds:
        try:
            with _folded(folds):
                graph = capture_graph(model, example_batch, loss_fn, precision)
            for fold in folds:
                fold.finish()
        except CaptureError as error:
            _LOG.info("the model is captured whole: %s", error)
            return None
        graph = cluster_layers(graph, standing_for={fold.block: fold.copies for fold in folds})
        reasons = [_why_not(graph, fold) for fold in folds]
        if not any(reasons):
            copies = {graph.layer_names.index(fold.name): fold.copies for fold in folds}
            layers = range(len(graph.layer_names))
            return Folded(graph, tuple(copies.get(layer, 1) for layer in layers))
        folds = list(_next_try(graph, folds, reasons))
    return None


def _next_try(graph: Graph, folds: Sequence[_Fold], reasons: Sequence[str]) -> Iterator[_Fold]:
    """The folds that worked, and with one more block traced, once, those whose first is special."""
    classes = dict(zip(graph.layer_names, layer_classes(graph), strict=True))
    for fold, reason in zip(folds, reasons, strict=True):
        first = fold.repeated - fold.run.start + 1
        again = _Fold(fold.run, first + 1)
        special = classes.get(fold.name) != classes.get(fold.predecessor)
        if not reason:
            yield _Fold(fold.run, first)
        elif special and first == _TRACED and again.copies > 1:
            yield again
        else:
            _LOG.info("the blocks of %r are all captured: %s %s", fold.run.path, fold.name, reason)


def _why_not(graph: Graph, fold: _Fold) -> str:
    if fold.name not in graph.layer_names:
        return "is no layer of its own"
    found = congruence(graph, graph.layer_names.index(fold.name))
    return "" if isinstance(found, Congruence) else f"cannot be repeated: {found}"


class _Fold:
    """One run of blocks while it is traced: its stand-ins, and how its blocks were called.

    Blocks run.start .. repeated and run.stop - 1 are traced; `repeated` stands for `copies`.
    """

    def __init__(self, run: Run, traced: int) -> None:
        self.run = run
        self.repeated = run.start + traced - 1
        self.copies = run.stop - 1 - self.repeated
        self._last = -1  # the block that was called last
        self._leaves: list[Any] = []  # of its arguments and of what it gave
        self._tree: Any = None
        self._given: Any = None
        self._gives: list[Any] = []
        self._pattern: list[object] = []  # how `repeated` was called

    @property
    def block(self) -> Block:
        return self.run.path, str(self.repeated)

    @property
    def name(self) -> str:
        """Of the repeated layer."""
        return f"{self.run.path}.{self.repeated}".lstrip(".")

    @property
    def predecessor(self) -> str:
        return f"{self.run.path}.{self.repeated - 1}".lstrip(".")

    @property
    def traced(self) -> tuple[int, ...]:
        return (*range(self.run.start, self.repeated + 1), self.run.stop - 1)

    @property
    def stood_for(self) -> range:
        return range(self.repeated + 1, self.run.stop - 1)

    def called(self, number: int, args: Any, kwargs: Any) -> None:
        """Before a block runs: it must continue the one before it, from `repeated` on alike."""
        leaves, tree = pytree.tree_flatten((args, kwargs))
        if number != self.run.start:
            if self._last != number - 1:
                raise self._differs(number, f"is called after {self._last}")
            if number >= self.repeated:
                if tree != self._tree:
                    raise self._differs(number, "is called with other arguments")
                pattern = [self._origin(number, i, leaf) for i, leaf in enumerate(leaves)]
                if number == self.repeated:
                    self._pattern = pattern
                elif pattern != self._pattern:
                    raise self._differs(number, "gets other results of its predecessor")
        self._last, self._leaves, self._tree = number, leaves, tree

    def gave(self, given: Any) -> None:
        self._given, self._gives = given, pytree.tree_leaves(given)

    def passed_on(self) -> Any:
        """What a stand-in gives."""
        return self._given

    def finish(self) -> None:
        """CaptureError where a run of calls stopped short of the last block."""
        if self._last != self.run.stop - 1:
            raise self._differs(self._last + 1, "is never called")

    def _origin(self, number: int, position: int, leaf: Any) -> object:
        """Where an argument comes from: a result of the block before, or its own argument."""
        if isinstance(leaf, Tensor):
            for index, given in enumerate(self._gives):
                if given is leaf:
                    return index
        before = self._leaves[position]
        plain = isinstance(leaf, (bool, int, float, str)) and type(leaf) is type(before)
        if leaf is before or (plain and leaf == before):
            return "same"
        raise self._differs(number, "gets something that its predecessor neither got nor gave")

    def _differs(self, number: int, how: str) -> CaptureError:
        return CaptureError(f"block {number} of {self.run.path!r} {how}")


class _StandIn(nn.Module):
    """A block that was not traced: gives out what the one before it gave. It shows the block's
    plain attributes, such as the kind of its attention, but no modules and tensors."""

    def __init__(self, fold: _Fold, number: int) -> None:
        super().__init__()
        self.training = fold.run.block(number).training
        self._stands_in = (fold, number, fold.run.block(number))  # a tuple hides the module

    def __getattr__(self, name: str) -> Any:
        hidden = self.__dict__.get("_stands_in")
        value = self if hidden is None else vars(hidden[2]).get(name, self)
        if isinstance(value, (bool, int, float, str, type(None))):
            return value
        return super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        fold, number, _ = self._stands_in
        fold.called(number, args, kwargs)
        return fold.passed_on()


@contextlib.contextmanager
def _folded(folds: Sequence[_Fold]) -> Iterator[None]:
    """Inside, stand-ins take the places of the blocks that are not traced, and those that are do
    not show their numbers."""
    with contextlib.ExitStack() as stack:
        hidden: dict[tuple[int, str], str] = {}
        for fold in folds:
            modules = fold.run.module._modules
            stack.callback(modules.update, dict(modules))
            modules.update((str(n), _StandIn(fold, n)) for n in fold.stood_for)
            for number in fold.traced:
                block = fold.run.block(number)
                _watch(fold, number, block, stack)
                for path, name in fold.run.counters:
                    module = block.get_submodule(path)
                    if name in module.__dict__:
                        attributes = dict(module.__dict__)
                        stack.callback(_restore, module, attributes)
                        del module.__dict__[name]
                        hidden[id(module), name] = f"{fold.run.path}.{number}".lstrip(".")
        original = nn.Module.__getattr__

        def watched(self: nn.Module, name: str) -> Any:
            if (id(self), name) in hidden:
                raise CaptureError(f"{hidden[id(self), name]} reads its own number, {name}")
            return original(self, name)

        stack.enter_context(replaced(nn.Module, "__getattr__", watched))
        yield


def _watch(fold: _Fold, number: int, block: nn.Module, stack: contextlib.ExitStack) -> None:
    def before(_block: nn.Module, args: Any, kwargs: Any) -> None:
        fold.called(number, args, kwargs)

    def after(_block: nn.Module, _args: Any, given: Any) -> None:
        fold.gave(given)

    stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
    stack.callback(block.register_forward_hook(after).remove)


def _restore(module: nn.Module, attributes: dict[str, Any]) -> None:
    """In the old order too."""
    module.__dict__.clear()
    module.__dict__.update(attributes)
