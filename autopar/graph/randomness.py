"""Every random operator of a traced graph becomes a hash of the step's seed.

One `op_id` per operator, in trace order, so that the numbers depend on the model alone: on no plan,
no recomputation and no device. Dropout becomes `autopar::dropout`, or is inside of attention
(`autopar::sdpa_dropout`, which capture puts in place without a seed); other noise is drawn by
`autopar::uniform`, `normal` or `randint`, and ordinary pointwise operators make of it what was
asked for. The numbers are not those that torch's own generators draw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import autopar.ops  # noqa: F401  registers the operators that are put in place
from autopar.errors import CaptureError
from autopar.graph.numbering import OP_ID
from autopar.graph.program import Graph, GraphInput, InputKind, Operator, Ref, TensorMeta
from autopar.graph.rewrite import Rewrite, derived, rewrite_graph

aten, prims, own = torch.ops.aten, torch.ops.prims, torch.ops.autopar
SEED = GraphInput("seed", InputKind.SEED, TensorMeta((2,), torch.int32), target="")

_DRAWN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_WIDEST_RANGE = 1 << 31
_LSE = 5  # position among the arguments of `sdpa_dropout_backward`
_UNTAGGED = ("aten.random.", "aten.normal_functional.", "aten.rrelu_with_noise")
_INSTEAD = {
    "randperm": "torch.rand(n).argsort() is a random permutation",
    "multinomial": "(probabilities.log() - torch.empty_like(probabilities).exponential_().log())"
    ".argmax(-1) is one sample of each row",
}


def seeded_random(graph: Graph) -> Graph:
    """The pass. CaptureError, with the line of source, for an operator that has no recipe."""
    settings: dict[Ref, tuple[Any, ...]] = {}  # of each dropout, by mask
    attentions: dict[Ref, int] = {}  # op_id of each attention with dropout, by lse
    metas = graph.metas()
    count = 0

    def step(op: Operator) -> Rewrite | None:
        nonlocal count
        if op.target is aten.native_dropout.default:
            settings[Ref(op.name, 1)] = constants = _dropout_constants(op, op_id=count)
            count += 1
            return Rewrite((_dropout(op, op.args[0], constants),))
        if op.target is aten.native_dropout_backward.default and op.args[1] in settings:
            return Rewrite((_dropout(op, op.args[0], settings[op.args[1]]),))
        if op.target is own.sdpa_dropout.default:
            attentions[Ref(op.name, 1)] = count
            count += 1
            return Rewrite((_seeded(op, count - 1),))
        if op.target is own.sdpa_dropout_backward.default:
            return Rewrite((_seeded(op, attentions[op.args[_LSE]]),))
        mask = next((ref for ref in op.operands if ref in settings), None)
        if mask is not None:
            raise CaptureError(
                f"the mask of a dropout is read by {op.op_name}{_where(op)}. Masks are never"
                " stored: use the result of dropout only."
            )
        if op.target is aten.rrelu_with_noise_backward.default and op.args[5]:
            gradient = derived(op, op.name, aten.mul.Tensor, (op.args[0], op.args[2]), *op.results)
            return Rewrite((gradient,))
        if not _is_random(op):
            return None
        recipe = _RECIPES.get(op.target)
        if recipe is None:
            raise _refused(op, "cannot be drawn alike under every plan")
        mix = _Mix(op, metas, op_id=count)
        count += 1
        return recipe(mix)

    graph = rewrite_graph(graph, step)
    return replace(graph, inputs=(*graph.inputs, SEED)) if count else graph


def _dropout_constants(op: Operator, op_id: int) -> tuple[Any, ...]:
    """op_id, p, global sizes, local sizes, offsets and number of row atoms: every dim is one atom,
    and the columns are the last dim."""
    shape = op.results[0].shape if op.results[0] is not None else ()
    p = float(op.args[1]) if op.args[2] is not False else 0.0  # None and True mean training
    return op_id, p, [*shape], [*shape], [0] * len(shape), max(len(shape) - 1, 0)


def _dropout(op: Operator, x: Ref, constants: tuple[Any, ...]) -> Operator:
    args = (x, SEED.ref, *constants)
    return derived(op, op.name, own.dropout.default, args, op.results[0])


def _seeded(op: Operator, op_id: int) -> Operator:
    """Attention with dropout, given what it hashes; the seed comes before op_id."""
    at = OP_ID[op.target]
    return op.changed(args=(*op.args[: at - 1], SEED.ref, op_id, *op.args[at + 1 :]))


def _is_random(op: Operator) -> bool:
    if op.op_name.startswith(_UNTAGGED):
        return "rrelu" not in op.op_name or bool(_argument(op, "training"))
    return torch.Tag.nondeterministic_seeded in getattr(op.target, "tags", ())


def _argument(op: Operator, name: str, default: Any = None) -> Any:
    """An argument by its name in the schema; `default` where the schema has none of that name."""
    for position, argument in enumerate(getattr(op.target, "_schema").arguments):  # noqa: B009
        if argument.name == name:
            if position < len(op.args):
                return op.args[position]
            return op.kwargs.get(name, argument.default_value)
    return default


def _where(op: Operator) -> str:
    return f" at {op.source}" if op.source else f" in module {op.module!r}" if op.module else ""


def _refused(op: Operator, why: str) -> CaptureError:
    name = op.op_name.split(".")[1]
    instead = f": {_INSTEAD[name]}" if name in _INSTEAD else ""
    return CaptureError(
        f"{op.op_name}{_where(op)} draws random numbers that {why}. Way out: build it from rand,"
        f" randn, randint, bernoulli or exponential_{instead}; or draw it outside of the model and"
        " pass it in the batch."
    )


@dataclass(slots=True)
class _Mix:
    """The operators that stand in one random operator's place, as they are made."""

    op: Operator
    metas: Mapping[Ref, TensorMeta]
    op_id: int
    steps: list[Operator] = field(default_factory=list)

    def argument(self, name: str, default: Any = None) -> Any:
        return _argument(self.op, name, default)

    @property
    def meta(self) -> TensorMeta:
        meta = self.op.results[0]
        assert meta is not None
        return meta

    @property
    def drawn_dtype(self) -> torch.dtype:
        """CaptureError where the result's dtype has no uniform or normal numbers."""
        if self.meta.dtype not in _DRAWN:
            raise _refused(self.op, f"would be of dtype {self.meta.dtype}, of which there are none")
        return self.meta.dtype

    def draw(self, target: Any, *bounds: int, dtype: torch.dtype) -> Ref:
        """Numbers of the result's shape."""
        sizes = [*self.meta.shape]
        geometry = (self.op_id, sizes, list(sizes), [0] * len(sizes))
        return self.call(target, SEED.ref, *geometry, *bounds, dtype, dtype=dtype)

    def call(self, target: Any, *args: Any, dtype: torch.dtype) -> Ref:
        name = f"{self.op.name}_draw{len(self.steps)}"
        meta = TensorMeta(self.meta.shape, dtype)
        self.steps.append(derived(self.op, name, target, args, meta))
        return Ref(name)

    def cast(self, value: Ref, dtype: torch.dtype) -> Ref:
        wanted = self.meta.dtype
        if dtype == wanted:
            return value
        return self.call(prims.convert_element_type.default, value, wanted, dtype=wanted)

    def done(self, results: Mapping[int, Ref] | None = None) -> Rewrite:
        """The last step takes the name of the operator: it is result 0."""
        last = replace(self.steps[-1], name=self.op.name)
        return Rewrite((*self.steps[:-1], last), results)

    def scaled(self, value: Ref, scale: Any, shift: Any) -> Ref:
        """value * scale + shift; either is a number or a value."""
        dtype = self.drawn_dtype
        if scale != 1:
            value = self.call(aten.mul.Tensor, value, scale, dtype=dtype)
        if shift != 0:
            value = self.call(aten.add.Tensor, value, shift, dtype=dtype)
        return value


def _uniform(mix: _Mix) -> Rewrite:
    low, high = mix.argument("from", 0.0), mix.argument("to", 1.0)
    mix.scaled(mix.draw(own.uniform.default, dtype=mix.drawn_dtype), high - low, low)
    return mix.done()


def _normal(mix: _Mix) -> Rewrite:
    mean, deviation = mix.argument("mean", 0.0), mix.argument("std", 1.0)
    mix.scaled(mix.draw(own.normal.default, dtype=mix.drawn_dtype), deviation, mean)
    return mix.done()


def _bernoulli(mix: _Mix) -> Rewrite:
    """uniform < p."""
    p = mix.argument("p", None)
    p = mix.argument("self") if p is None else p
    wide = isinstance(p, Ref) and mix.metas[p].dtype == torch.float64
    dtype = torch.float64 if wide else torch.float32
    less = aten.lt.Tensor if isinstance(p, Ref) else aten.lt.Scalar
    kept = mix.call(less, mix.draw(own.uniform.default, dtype=dtype), p, dtype=torch.bool)
    mix.cast(kept, torch.bool)
    return mix.done()


def _exponential(mix: _Mix) -> Rewrite:
    """-log(1 - uniform) / lambda; never 0, of which users take the logarithm."""
    dtype = torch.float64 if mix.drawn_dtype == torch.float64 else torch.float32
    least = 2.0**-54 if dtype == torch.float64 else 2.0**-25
    value = mix.draw(own.uniform.default, dtype=dtype)
    value = mix.call(aten.clamp_min.default, value, least, dtype=dtype)
    value = mix.call(aten.neg.default, value, dtype=dtype)
    value = mix.call(aten.log1p.default, value, dtype=dtype)
    value = mix.call(aten.mul.Tensor, value, -1.0 / mix.argument("lambd", 1.0), dtype=dtype)
    mix.cast(value, dtype)
    return mix.done()


def _randint(mix: _Mix) -> Rewrite:
    low = mix.argument("low", mix.argument("from", 0))
    high = mix.argument("high", mix.argument("to"))
    if not isinstance(low, int) or not isinstance(high, int):
        raise _refused(mix.op, "need bounds that are known at capture")
    if not 0 < high - low <= _WIDEST_RANGE:
        raise _refused(mix.op, f"lie in [{low}, {high}), of which at most 2^31 are supported")
    mix.draw(own.randint.default, low, high, dtype=mix.meta.dtype)
    return mix.done()


def _rrelu(mix: _Mix) -> Rewrite:
    """x * noise, noise = 1 where x > 0, else uniform in [lower, upper)."""
    x, lower, upper = mix.argument("self"), mix.argument("lower"), mix.argument("upper")
    dtype = mix.drawn_dtype
    slope = mix.scaled(mix.draw(own.uniform.default, dtype=dtype), upper - lower, lower)
    positive = mix.call(aten.gt.Scalar, x, 0, dtype=torch.bool)
    noise = mix.call(aten.masked_fill.Scalar, slope, positive, 1.0, dtype=dtype)
    mix.call(aten.mul.Tensor, x, noise, dtype=dtype)
    return mix.done({1: noise})


_RECIPES: Mapping[object, Callable[[_Mix], Rewrite]] = {
    aten.rand.default: _uniform,
    aten.rand_like.default: _uniform,
    aten.uniform.default: _uniform,
    aten.randn.default: _normal,
    aten.randn_like.default: _normal,
    aten.normal.float_float: _normal,
    aten.normal.float_Tensor: _normal,
    aten.normal.Tensor_float: _normal,
    aten.normal.Tensor_Tensor: _normal,
    aten.normal_functional.default: _normal,
    aten.bernoulli.default: _bernoulli,
    aten.bernoulli.p: _bernoulli,
    aten.bernoulli.Tensor: _bernoulli,
    aten.exponential.default: _exponential,
    aten.randint.default: _randint,
    aten.randint.low: _randint,
    aten.randint_like.default: _randint,
    aten.randint_like.low_dtype: _randint,
    aten.random.to: _randint,
    getattr(aten.random, "from"): _randint,
    aten.rrelu_with_noise_functional.default: _rrelu,
}
