"""One operator run on small inputs, whole and on shards: what a lettering is checked against.

A probe keeps the ranks, constants, dtypes' kinds and equalities between sizes of a real call and
shrinks its sizes to multiples of 6, so that two and three shards divide them. Its inputs are drawn
from four distributions (small integers, many magnitudes, inside (0, 1), normal), always the same
ones. Pending sums are split at random on a grid of binary fractions, where sums are exact: an
operator that is not linear is seen. Agreement on samples is evidence, not proof: a coupling that
none of the samples touches (a clamp at 1e9, say) is not seen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autopar.sharding.lettering import Lettering
from autopar.sharding.rule import Call, Slot

Shape = tuple[int, ...]
Results = tuple[Tensor | None, ...]

_STEP = 6  # two and three divide it
_KEPT = 16  # sizes up to this may be part of what the operator means: a box has 4 numbers
_WHOLE_LIMIT = 1 << 18  # elements of a call that is run at its own sizes
_GRID = 2.0**-8
_PART = 8  # summands of a pending sum go up to this
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
_COARSE = 0.05  # half precisions
SHARDS = (2, 3, 4)


class NotRunnable(Exception):
    """Why an operator cannot be examined."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One draw of operands and what the operator makes of them."""

    operands: tuple[Tensor, ...]
    results: Results


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """An operator with samples. Pre: it is functional and gives the same twice."""

    call: Call
    samples: tuple[Sample, ...]

    @property
    def shapes(self) -> tuple[Shape, ...]:
        return tuple(tuple(t.shape) for t in self.samples[0].operands)

    def run(self, operands: Sequence[Tensor]) -> Results:
        return run_call(self.call, operands)


def run_call(call: Call, operands: Sequence[Tensor]) -> Results:
    """The results of the call's operator on other operands."""

    def filled(tree: Any) -> Any:
        if isinstance(tree, Slot):
            return operands[tree.index]
        if isinstance(tree, tuple) and tree[:1] == ("slice",):
            return slice(*tree[1:])
        return [filled(item) for item in tree] if isinstance(tree, tuple) else tree

    args = [filled(arg) for arg in call.args]
    kwargs = {key: filled(value) for key, value in call.kwargs}
    if kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
    with torch.no_grad():
        results = call.target(*args, **kwargs)
    items = results if isinstance(results, (tuple, list)) else (results,)
    return tuple(item if isinstance(item, Tensor) else None for item in items)


def make_probe(call: Call) -> Probe:
    """NotRunnable, with the reason, where nothing can be learnt by running the operator."""
    schema = getattr(call.target, "_schema", None)
    if schema is not None and schema.is_mutable:
        raise NotRunnable("it writes into its operands")
    failure = "its operands are too large to run it as it is called"
    for shapes in candidate_shapes(call):
        for wide in (True, False):  # the algebra of an operator shows best in float64
            try:
                return _probe_at(call, shapes, wide)
            except _Unfit as error:
                failure = str(error)
    raise NotRunnable(failure)


class _Unfit(Exception):
    """These sizes or dtypes do not serve."""


def candidate_shapes(call: Call) -> Iterator[tuple[Shape, ...]]:
    """Sizes to try: all shrunk, only the large ones shrunk, the real ones. Where a constant equals
    a size, it may mean it: then only the real ones."""
    real = tuple(call.shape(i) for i in range(len(call.operands)))
    sizes = sorted({n for shape in real for n in shape if n > 1})
    if not set(_integers((call.args, call.kwargs))) & {*sizes}:
        for least in (1, _KEPT):
            large = [n for n in sizes if n > least]
            small = {n: _STEP * (i + 1) for i, n in enumerate(large)}
            if least == 1 or len(large) < len(sizes):
                yield tuple(tuple(small.get(n, n) for n in shape) for shape in real)
    if sum(map(math.prod, real)) <= _WHOLE_LIMIT:
        yield real


def _integers(tree: Any) -> Iterator[int]:
    if isinstance(tree, Slot):
        return
    if isinstance(tree, tuple):
        for item in tree:
            yield from _integers(item)
    elif isinstance(tree, int) and not isinstance(tree, bool):
        yield tree


def _probe_at(call: Call, shapes: tuple[Shape, ...], wide: bool) -> Probe:
    """_Unfit where the operator fails at these sizes or its results do not follow them;
    NotRunnable where no sizes would help."""
    dtypes = tuple(torch.float64 if wide and d.is_floating_point else d for d in call.dtypes)
    samples: list[Sample] = []
    failure = ""
    for high in (min((n for s in shapes for n in s if n > 1), default=4), 2):
        generator = torch.Generator().manual_seed(0)
        for draw in DRAWS:
            operands = tuple(
                _draw(draw, shape, dtype, high, generator)
                for shape, dtype in zip(shapes, dtypes, strict=True)
            )
            try:
                results = run_call(call, tuple(t.clone() for t in operands))
            except Exception as error:  # whatever the operator raises, it does not run
                failure = f"it fails: {type(error).__name__}: {_first_line(error)}"
                continue
            _check_results(call, shapes, results, wide)
            samples.append(Sample(operands, results))
        if samples:
            break
    if len(samples) < 2:
        raise _Unfit(failure or "it runs on too few inputs")
    _check_behaviour(call, samples)
    return Probe(call, tuple(samples))


def _check_results(call: Call, shapes: tuple[Shape, ...], results: Results, wide: bool) -> None:
    """Results have the ranks, kinds and, where the real ones are sizes of operands, the sizes."""
    if len(results) != len(call.results):
        raise _Unfit("it has another number of results on small inputs")
    small: dict[int, int] = {}
    for number, shape in enumerate(shapes):
        small.update(zip(call.shape(number), shape, strict=True))
    for got, want in zip(results, call.results, strict=True):
        if (got is None) != (want is None):
            raise _Unfit("it has other results on small inputs")
        if got is None or want is None:
            continue
        follows = len(got.shape) == len(want.shape) and all(
            n == small.get(real, n) for n, real in zip(got.shape, want.shape, strict=True)
        )
        dtype = torch.float64 if wide and want.dtype.is_floating_point else want.dtype
        if not follows or got.dtype != dtype:
            raise _Unfit("its results do not follow the sizes and dtypes of its operands")


def _check_behaviour(call: Call, samples: Sequence[Sample]) -> None:
    for sample in samples:
        operands = tuple(t.clone() for t in sample.operands)
        again = run_call(call, operands)
        if not all(_equal(a, b) for a, b in zip(again, sample.results, strict=True)):
            raise NotRunnable("it gives different results for the same operands")
        if not all(_equal(a, b) for a, b in zip(operands, sample.operands, strict=True)):
            raise NotRunnable("it writes into its operands")
    for index, first in enumerate(samples[0].results):
        if first is None or not first.numel():
            continue
        values = [s.results[index] for s in samples]
        telling = [v for v in values if v is not None and v.isfinite().any() and v.any()]
        if len(telling) < 2:
            raise NotRunnable(f"its result {index} is zero or not finite on all samples")


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and bool(((a == b) | (a != a) & (b != b)).all())


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


# ---- inputs


def _integral(shape: Shape, generator: torch.Generator) -> Tensor:
    return torch.randint(-4, 5, shape, generator=generator).double()


def _magnitudes(shape: Shape, generator: torch.Generator) -> Tensor:
    exponent = torch.rand(shape, generator=generator, dtype=torch.float64) * 20 - 8
    sign = torch.randint(2, shape, generator=generator) * 2 - 1
    return (exponent.exp2() * sign / _GRID).round() * _GRID


def _fractions(shape: Shape, generator: torch.Generator) -> Tensor:
    unit = torch.rand(shape, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    return (unit / _GRID).round() * _GRID


def _normals(shape: Shape, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (drawn / _GRID).round() * _GRID


DRAWS: tuple[Callable[[Shape, torch.Generator], Tensor], ...] = (
    _normals,
    _integral,
    _magnitudes,
    _fractions,
)


def _draw(
    draw: Callable[[Shape, torch.Generator], Tensor],
    shape: Shape,
    dtype: torch.dtype,
    high: int,
    generator: torch.Generator,
) -> Tensor:
    """Integers lie in [0, high): they may be indices."""
    if dtype == torch.bool:
        return torch.randint(2, shape, generator=generator).bool()
    if not dtype.is_floating_point and not dtype.is_complex:
        return torch.randint(high, shape, generator=generator).to(dtype)
    return draw(shape, generator).to(dtype)


# ---- whole against shards


def counterexample(
    probe: Probe, lettering: Lettering, counts: Mapping[str, int], group: Sequence[int] = ()
) -> str:
    """What the shards make of some sample that the whole does not; "" where they agree on all.

    counts: shards of each letter; group: operands that are a pending sum of two. Pre: the lettering
    fits the ranks; letters divide their sizes.
    """
    axes = [*counts, *(["+"] if group else [])]
    sizes = [*counts.values(), *([2] if group else [])]
    generator = torch.Generator().manual_seed(1)
    for number, sample in enumerate(probe.samples):
        parts = _summands(sample.operands, group, generator)
        total = [None if r is None else torch.zeros_like(r) for r in sample.results]
        for place in itertools.product(*map(range, sizes)):
            at = dict(zip(axes, place, strict=True))
            operands = tuple(
                _window(t, words, counts, at).clone()
                for t, words in zip(parts[at.get("+", 0)], lettering.operands, strict=True)
            )
            try:
                results = probe.run(operands)
            except Exception as error:  # shards that do not fit together
                return f"a shard fails: {type(error).__name__}: {_first_line(error)}"
            if len(results) != len(total):
                return f"a shard has {len(results)} results instead of {len(total)}"
            for index, local in enumerate(results):
                problem = _add(total[index], local, lettering, index, counts, at)
                if problem:
                    return problem
        for index, (got, want) in enumerate(zip(total, sample.results, strict=True)):
            if got is not None and want is not None:
                problem = _difference(got, want)
                if problem:
                    return f"result {index} of sample {number}: {problem}"
    return ""


def _summands(
    operands: tuple[Tensor, ...], group: Sequence[int], generator: torch.Generator
) -> tuple[tuple[Tensor, ...], ...]:
    """The operands, or two lists of them of which those of the group add up."""
    if not group:
        return (operands,)
    first = list(operands)
    second = list(operands)
    for number in group:
        whole = operands[number]
        noise = torch.randint(-_PART, _PART + 1, whole.shape, generator=generator) * 0.25
        second[number] = noise.to(whole.dtype)
        first[number] = whole - second[number]
    return tuple(first), tuple(second)


def _window(
    tensor: Tensor, words: Sequence[str], counts: Mapping[str, int], at: Mapping[str, int]
) -> Tensor:
    for dim, word in enumerate(words):
        if word in counts and tensor.shape[dim] != 1:
            length = tensor.shape[dim] // counts[word]
            tensor = tensor.narrow(dim, at[word] * length, length)
    return tensor


def _add(
    total: Tensor | None,
    local: Tensor | None,
    lettering: Lettering,
    index: int,
    counts: Mapping[str, int],
    at: Mapping[str, int],
) -> str:
    """Adds a local result where it belongs; what is wrong with its shape, or ""."""
    if total is None or local is None:
        return "" if total is None and local is None else f"result {index} appears or vanishes"
    window = _window(total, lettering.results[index], counts, at)
    if window.shape != local.shape:
        return f"result {index} of a shard is {list(local.shape)} instead of {list(window.shape)}"
    if total.dtype == torch.bool:
        window |= local
    else:
        window += local
    return ""


def _difference(got: Tensor, want: Tensor) -> str:
    if not want.numel():
        return ""
    if not want.dtype.is_floating_point:
        return "" if torch.equal(got, want) else "integers differ"
    tolerance = _TOLERANCES.get(want.dtype, _COARSE)
    got, want = got.double(), want.double()
    same = (got == want) | (got.isnan() & want.isnan())
    off = torch.where(same, 0.0, (got - want).abs())
    finite = want[want.isfinite()]
    scale = max(float(finite.abs().max()) if finite.numel() else 0.0, 1e-3)
    worst = int(off.nan_to_num(nan=math.inf).argmax())
    if float(off.flatten()[worst]) <= tolerance * scale:
        return ""
    return f"{float(want.flatten()[worst]):.6g} whole, {float(got.flatten()[worst]):.6g} on shards"


def divides(probe: Probe, lettering: Lettering, letter: str, count: int) -> bool:
    """The letter has something to shard, evenly by `count`."""
    sizes = {
        shape[dim]
        for words, shape in zip(lettering.operands, probe.shapes, strict=True)
        for dim, word in enumerate(words)
        if word == letter and shape[dim] != 1
    }
    return bool(sizes) and all(size % count == 0 for size in sizes)


def unsound(probe: Probe, lettering: Lettering, about: str | tuple[int, ...] | None = None) -> str:
    """Every factor alone on two to four shards, every two together, every linear group alone and
    with every letter: the first counterexample, or "". What makes no factor is not tried.

    about: only the trials of this letter or this linear group.
    """
    results = probe.samples[0].results
    ranks = [None if r is None else r.dim() for r in results]
    fitted = lettering.at_ranks([len(s) for s in probe.shapes], ranks)
    letters = [c for c in fitted.letters if makes_factor(fitted, c, results)]
    trials: list[tuple[dict[str, int], tuple[int, ...]]] = []
    for letter in letters:
        trials += [({letter: n}, ()) for n in SHARDS if divides(probe, fitted, letter, n)]
    halved = [c for c in letters if divides(probe, fitted, c, 2)]
    trials += [(dict.fromkeys(pair, 2), ()) for pair in itertools.combinations(halved, 2)]
    if all(r is None or r.dtype.is_floating_point for r in results):
        for group in fitted.linear:
            trials += [({}, group), *(({c: 2}, group) for c in halved)]
    for counts, group in trials:
        if about is not None and about not in counts and about != group:
            continue
        problem = counterexample(probe, fitted, counts, group)
        if problem:
            how = [f"{n} shards of {c}" for c, n in counts.items()]
            how += [f"operands {', '.join(map(str, group))} as a pending sum"] if group else []
            return f"with {' and '.join(how)}: {problem}"
    return ""


def makes_factor(lettering: Lettering, letter: str, results: Results) -> bool:
    """As `letter_rule` has it: each result names the letter, or sums floating-point numbers over
    it."""
    if any(words.count(letter) > 1 for words in lettering.operands):
        return False
    present = [(w, r) for w, r in zip(lettering.results, results, strict=True) if r is not None]
    summed = letter in lettering.sums
    return bool(present) and all(
        letter in words or (summed and result.dtype.is_floating_point) for words, result in present
    )
