"""The graphs of one model at several sizes of the microbatch, traced at few of them.

Two captures that agree in everything but numbers, each of which grows with the rows of the
microbatch (or shrinks: a float may be their reciprocal), give every size between the two: each such
number is a multiple of the rows at both ends. Only between: what is rounded up to a multiple, or
kept above a minimum, is proportional on a part of its range. A microbatch of one row is always
traced, since broadcasting vanishes there.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from autopar.forks import Ahead
from autopar.graph.batch import batch_rows, microbatch_of
from autopar.graph.capture import LossFn
from autopar.graph.congruence import same_data
from autopar.graph.fold import capture_folded
from autopar.graph.precision import Precision
from autopar.graph.program import Graph, GraphInput, Operator, Ref, TensorMeta, check_graph
from autopar.graph.repeat import Folded

_LOG = logging.getLogger(__name__)


class GraphFamily:
    """The graph of a microbatch, by the number of microbatches into which the batch is cut.

    Arguments as of `capture_folded`; the batch is the whole one. Nothing is traced before it is
    asked for or expected; one size takes one trace, and any number of them at most three, and one
    for a single row. To be closed where sizes were expected.
    """

    def __init__(
        self,
        model: nn.Module,
        example_batch: Any,
        loss_fn: LossFn | None = None,
        precision: Precision = Precision(),
        num_layers: int | None = None,
    ) -> None:
        self._model, self._batch = model, example_batch
        self._how = (loss_fn, precision, num_layers)
        self._rows = batch_rows(example_batch)
        self._fewest = _most_microbatches(self._rows)
        self._exact: dict[int, Folded] = {}  # by number of microbatches
        self._between: dict[int, Folded] = {}
        self._proportional = True
        self._ahead: Ahead[int, Folded] = Ahead(self._captured)

    def exact(self, num_microbatches: int) -> Folded:
        """Really captured, once. BatchError where the rows do not divide."""
        if num_microbatches not in self._exact:
            found = self._ahead.taken(num_microbatches) or self._captured(num_microbatches)
            self._exact[num_microbatches] = found
        return self._exact[num_microbatches]

    def _captured(self, num_microbatches: int) -> Folded:
        part = microbatch_of(self._batch, num_microbatches)
        return capture_folded(self._model, part, *self._how)

    def expect(self, *counts: int) -> None:
        """`exact` will be asked for these: another process captures them, in this order, as soon as
        a processor is free."""
        self._ahead.expect(*(number for number in counts if number not in self._exact))

    def expect_all(self, counts: Sequence[int]) -> None:
        """`at` will be asked for all of these, in this order."""
        total, fewest = self._rows, self._fewest
        if total is None or fewest is None:
            return
        between = any(1 < number <= fewest for number in counts[1:])
        self.expect(*[fewest] * between, *[total] * (total in counts[1:]))

    def close(self) -> None:
        self._ahead.close()

    def at(self, num_microbatches: int) -> Folded:
        """The same graph as `exact` makes, without tracing where two others tell it."""
        known = self._exact.get(num_microbatches) or self._between.get(num_microbatches)
        if known is None:
            known = self._interpolated(num_microbatches)
        if known is None:
            return self.exact(num_microbatches)
        return known

    def _interpolated(self, number: int) -> Folded | None:
        """None where it has to be traced."""
        total, fewest = self._rows, self._fewest
        if total is None or fewest is None or not 1 < number < fewest or total % number:
            return None
        if not self._exact or not self._proportional:
            return None
        rows = total // number
        low = [n for n in self._exact if n > number and total // n > 1] or [fewest]
        high = [n for n in self._exact if n < number] or [1]
        below, above = (_Sample(total // n, self.exact(n)) for n in (min(low), max(high)))
        try:
            found = _at_rows(below, above, rows)
        except _Different as difference:
            _LOG.info("every size of the microbatch is traced: %s", difference)
            self._proportional = False
            return None
        if found is not None:
            self._between[number] = found
        return found


def _most_microbatches(rows: int | None) -> int | None:
    """Into which a batch may be cut with more than one row each."""
    rows = rows or 1
    return next((rows // d for d in range(2, rows + 1) if rows % d == 0), None)


@dataclass(frozen=True, slots=True)
class _Sample:
    rows: int
    folded: Folded


class _Different(Exception):
    """Two graphs differ in more than multiples of their rows."""


def _at_rows(low: _Sample, high: _Sample, rows: int) -> Folded | None:
    """None where a number would be no integer at so many rows."""
    if low.folded.copies != high.folded.copies:
        raise _Different(f"at {high.rows} rows other layers are equal than at {low.rows}")
    try:
        graph = _Line(low.rows, high.rows, rows).graph(low.folded.graph, high.folded.graph)
    except _NoInteger:
        return None
    return Folded(check_graph(graph), low.folded.copies)


class _NoInteger(Exception):
    """A multiple of the rows is an integer at both ends, but not between them."""


@dataclass(frozen=True, slots=True)
class _Line:
    """Graphs and their parts at `rows`, given them at `low` and `high` rows. Raises _Different, or
    _NoInteger."""

    low: int
    high: int
    rows: int

    def graph(self, a: Graph, b: Graph) -> Graph:
        _same("the batch", a.batch_spec, b.batch_spec)
        _same("layer_names", a.layer_names, b.layer_names)
        _same("outputs", a.outputs, b.outputs)
        _same("weights", dict(a.weights), dict(b.weights))
        _same("constants", list(a.constants), list(b.constants))
        for name, data in a.constants.items():
            _same(name, True, same_data(data, b.constants[name]))
        _same("the number of inputs", len(a.inputs), len(b.inputs))
        _same("the number of operators", len(a.operators), len(b.operators))
        return replace(
            a,
            inputs=tuple(map(self.input, a.inputs, b.inputs)),
            operators=tuple(map(self.operator, a.operators, b.operators)),
        )

    def input(self, a: GraphInput, b: GraphInput) -> GraphInput:
        found = replace(a, meta=self.meta(a.meta, b.meta))
        _same(a.name, a, replace(b, meta=a.meta))
        return found

    def operator(self, a: Operator, b: Operator) -> Operator:
        _same(a.name, a, b.changed(args=a.args, kwargs=a.kwargs, results=a.results))
        _same(a.name, len(a.results), len(b.results))
        return a.changed(
            args=self.tree(a.args, b.args),
            kwargs=self.tree(a.kwargs, b.kwargs),
            results=tuple(
                self.meta(x, y) if x is not None and y is not None else _same(a.name, x, y)
                for x, y in zip(a.results, b.results, strict=True)
            ),
        )

    def meta(self, a: TensorMeta, b: TensorMeta) -> TensorMeta:
        if a == b:
            return a
        _same("a type", a.dtype, b.dtype)
        return TensorMeta(self.tree(a.shape, b.shape), a.dtype)

    def tree(self, a: Any, b: Any) -> Any:
        """An argument tree or shape."""
        _same("an argument", type(a), type(b))
        if isinstance(a, Ref):
            return _same("an operand", a, b)
        if isinstance(a, (tuple, list)):
            _same("the length of an argument", len(a), len(b))
            return type(a)(self.tree(x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, Mapping):
            _same("named arguments", list(a), list(b))
            return {key: self.tree(a[key], b[key]) for key in a}
        if a == b or repr(a) == repr(b):
            return a
        if type(a) is int:
            return self.integer(a, b)
        if type(a) is float:
            return self.number(a, b)
        return _same("an argument", a, b)

    def integer(self, a: int, b: int) -> int:
        _same("a multiple of the rows", a * self.high, b * self.low)
        if a * self.rows % self.low:
            raise _NoInteger
        return a * self.rows // self.low

    def number(self, a: float, b: float) -> float:
        """k or 1 / k for a multiple k of the rows; another float only where powers of two keep
        every digit."""
        for inverse in (False, True):
            x, y = (1 / a, 1 / b) if inverse else (a, b)
            i, j = round(x), round(y)
            exact = (1 / i, 1 / j) if inverse and i and j else (float(i), float(j))
            if exact == (a, b) and i * self.high == j * self.low:
                k = self.integer(i, j)
                return 1 / k if inverse else float(k)
        scales = (self.high / self.low, self.rows / self.low)
        if all(math.frexp(scale)[0] == 0.5 for scale in scales):
            if a * scales[0] == b:
                return a * scales[1]
            if a / scales[0] == b:
                return a / scales[1]
        return float(_same("a number", a, b))


def _same(what: str, a: Any, b: Any) -> Any:
    if a != b:
        raise _Different(f"{what} is {_short(a)} and {_short(b)}")
    return a


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 80 else f"{text[:77]}..."
