"""`autopar::experts` and `autopar::experts_backward`: a routed mixture of MLPs as one operator.

    z = up_e x_t;  h = act(z_0) * z_1 where G = 2, act(z_0) where G = 1;  y = down_e h
    out_t = sum_k weight_tk y(x_t) with e = index_tk, over the experts that are here
    dh = weight down_e^T dout;  dweight_tk = dout . y = (down_e^T dout) . h
    ddown_e = sum dout (weight h)^T;  dup_e = sum dz x^T;  dx_t = sum_k up_e^T dz

Shapes: x [T, H], index [T, K] global expert numbers, weight [T, K], up [E, G, F, H] (G = 2: gate,
then up), down [E, H, F]; out [T, H]. The experts that are here are first_expert to
first_expert + E - 1 of num_experts; the rows of all others contribute zero. Backward computes z
anew, so that nothing of the size of T K F is kept. No token is dropped and no slot is padded.

Rows are sorted by expert, so that each one is a matmul over its own run of rows: one grouped kernel
where torch has it (CUDA, bf16), a loop otherwise. The rest of the module is what the exchange of
rows between devices is made of (lowering/composites/experts.py). Legend: T tokens, K experts of a
token, E experts, H hidden, F feed-forward width, R rows (T K, or those that arrived).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from autopar.ops.attention import accumulation_dtype
from autopar.ops.library import LIBRARY, define

aten = torch.ops.aten

define(
    "experts(Tensor x, Tensor index, Tensor weight, Tensor up, Tensor down, str activation,"
    " int first_expert, int num_experts) -> Tensor"
)
define(
    "experts_backward(Tensor dout, Tensor x, Tensor index, Tensor weight, Tensor up, Tensor down,"
    " str activation, int first_expert, int num_experts)"
    " -> (Tensor dx, Tensor dweight, Tensor dup, Tensor ddown)"
)


class Activation(NamedTuple):
    """act(z), and the gradient of z from that of act(z)."""

    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]  # (d, z) -> dz


ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "silu": Activation(aten.silu.default, aten.silu_backward.default),
        "gelu": Activation(aten.gelu.default, aten.gelu_backward.default),
        "gelu_tanh": Activation(
            lambda z: aten.gelu.default(z, approximate="tanh"),
            lambda d, z: aten.gelu_backward.default(d, z, approximate="tanh"),
        ),
        "relu": Activation(
            aten.relu.default, lambda d, z: aten.threshold_backward.default(d, z, 0)
        ),
        "relu2": Activation(lambda z: z.relu().square(), lambda d, z: 2 * z.relu() * d),
    }
)


@dataclass(frozen=True, slots=True, eq=False)
class _Runs:
    """Rows sorted by expert. order: slot t K + k of each row; counts: rows of each expert here.

    lengths: counts on the host; None where the grouped kernel runs, which reads counts on the
    device and leaves rows of no expert undefined. `order` is cut to the rows of experts here, but
    where the grouped kernel has them all, which no host need wait for.
    """

    order: Tensor
    counts: Tensor
    lengths: list[int] | None

    @classmethod
    def of(cls, x: Tensor, index: Tensor, up: Tensor, first: int, num_experts: int) -> _Runs:
        order, counts = sort_rows(index - first, up.shape[0])
        if not _has_grouped_kernel(x, up):
            lengths = counts.tolist()
            return cls(order[: sum(lengths)], counts, lengths)
        if up.shape[0] < num_experts:
            order = order[: int(counts.sum())]
        return cls(order, counts, None)

    def times(self, rows: Tensor, weights: Tensor) -> Tensor:
        """[R, A] x [E, A, B] -> [R, B]: each row with its expert's matrix."""
        if self.lengths is None:
            return torch._grouped_mm(rows, weights, offs=self._ends())
        parts = rows.split(self.lengths)
        out = rows.new_empty(rows.shape[0], weights.shape[2])
        for part, weight, into in zip(parts, weights, out.split(self.lengths), strict=True):
            torch.mm(part, weight, out=into)
        return out

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """[R, B], [R, A] -> [E, B, A]: sums of outer products over each expert's rows."""
        if self.lengths is None:
            return torch._grouped_mm(left.t(), right, offs=self._ends())
        out = left.new_empty(len(self.lengths), left.shape[1], right.shape[1])
        pairs = zip(left.split(self.lengths), right.split(self.lengths), out, strict=True)
        for one, other, into in pairs:
            torch.mm(one.t(), other, out=into)
        return out

    def defined(self, rows: Tensor) -> Tensor:
        """Zero where the grouped kernel left a row undefined."""
        if self.lengths is not None:
            return rows
        here = torch.arange(rows.shape[0], device=rows.device) < self.counts.sum()
        return torch.where(here.unsqueeze(1), rows, 0)

    def _ends(self) -> Tensor:
        return self.counts.cumsum(0, dtype=torch.int32)


def _experts(
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str,
    first_expert: int,
    num_experts: int,
) -> Tensor:
    runs = _Runs.of(x, index, up, first_expert, num_experts)
    rows = take_rows(x, runs.order, index.shape[1])
    hidden = _hidden(_preactivation(runs, rows, up), ACTIVATIONS[activation])
    rows = runs.defined(runs.times(hidden, down.mT))
    return combine_rows(rows, runs.order, weight)


def _experts_backward(
    dout: Tensor,
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    up: Tensor,
    down: Tensor,
    activation: str,
    first_expert: int,
    num_experts: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    act = ACTIVATIONS[activation]
    runs = _Runs.of(x, index, up, first_expert, num_experts)
    slots = index.shape[1]
    rows, drows = take_rows(x, runs.order, slots), take_rows(dout, runs.order, slots)  # [R, H]
    scale = take_rows(weight.reshape(-1, 1), runs.order, 1)  # [R, 1]
    z = _preactivation(runs, rows, up)  # [R, G, F]
    hidden = _hidden(z, act)  # [R, F]
    unscaled = runs.times(drows, down)  # [R, F]: gradient of the hidden row at weight 1
    acc = accumulation_dtype(x.dtype)
    dscale = (unscaled.to(acc) * hidden.to(acc)).sum(1, keepdim=True).to(weight.dtype)
    dz = _hidden_backward((unscaled * scale).to(x.dtype), z, act).flatten(1)  # [R, G F]
    dup = runs.outer(dz, rows).reshape(up.shape)
    ddown = runs.outer(drows, (hidden * scale).to(x.dtype))
    drow = runs.defined(runs.times(dz, up.flatten(1, 2)))
    dx = combine_rows(drow, runs.order, torch.ones_like(weight))
    dweight = unsort_rows(runs.defined(dscale), runs.order, weight.numel())
    return dx, dweight.reshape(weight.shape), dup, ddown


def _preactivation(runs: _Runs, rows: Tensor, up: Tensor) -> Tensor:
    """[R, G, F]."""
    return runs.times(rows, up.flatten(1, 2).mT).reshape(-1, *up.shape[1:3])


def _hidden(z: Tensor, act: Activation) -> Tensor:
    value = act.value(z[:, 0])
    return value if z.shape[1] == 1 else value * z[:, 1]


def _hidden_backward(dhidden: Tensor, z: Tensor, act: Activation) -> Tensor:
    if z.shape[1] == 1:
        return act.gradient(dhidden, z[:, 0]).unsqueeze(1)
    dgate = act.gradient(dhidden * z[:, 1], z[:, 0])
    return torch.stack((dgate, dhidden * act.value(z[:, 0])), 1)


def _has_grouped_kernel(x: Tensor, up: Tensor) -> bool:
    """torch's grouped kernel wants bf16 and rows of a multiple of 16 bytes."""
    widths = (up.shape[3], up.shape[2])
    aligned = all(width * x.element_size() % 16 == 0 for width in widths)
    return x.is_cuda and x.dtype == up.dtype == torch.bfloat16 and aligned and x.shape[0] > 0


# ---- rows by expert, also between devices


def sort_rows(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(order [T K], counts [E]) of experts 0 to E - 1: slots by expert, in the order of tokens
    within one; the slots of any other number come last and are not counted."""
    flat = index.reshape(-1)
    flat = torch.where((flat >= 0) & (flat < num_experts), flat, num_experts)
    sorted_, order = torch.sort(flat, stable=True)
    edges = torch.arange(num_experts + 1, device=flat.device, dtype=flat.dtype)
    return order, torch.searchsorted(sorted_, edges).diff()


def rows_per_device(counts: Tensor, num_devices: int) -> Tensor:
    """[num_devices], on the host, which must know where to cut the rows. counts: by device, then
    expert."""
    return counts.reshape(num_devices, -1).sum(1).cpu()


def take_rows(rows: Tensor, order: Tensor, slots: int) -> Tensor:
    """[T, A] -> [R, A]: the token of each slot."""
    return rows.index_select(0, order // slots)


def unsort_rows(rows: Tensor, order: Tensor, num_slots: int | None = None) -> Tensor:
    """[R, A] -> [num_slots, A], as many as order has if None: adjoint of the sort; slots without a
    row are zero."""
    out = rows.new_zeros(order.shape[0] if num_slots is None else num_slots, rows.shape[1])
    return out.index_copy_(0, order[: rows.shape[0]], rows)


def combine_rows(rows: Tensor, order: Tensor, weight: Tensor) -> Tensor:
    """[R, H] -> [T, H]: a token's rows times their weights, summed in the accumulation dtype."""
    acc = accumulation_dtype(rows.dtype)
    slots = unsort_rows(rows, order, weight.numel()).reshape(*weight.shape, rows.shape[1])
    return (slots.to(acc) * weight.to(acc).unsqueeze(2)).sum(1).to(rows.dtype)


def arrived_experts(counts: Tensor, rows: Tensor, num_sources: int) -> Tensor:
    """[R, 1]: the expert of each row that arrived, which are those of source 0 by expert, then
    those of source 1, ... counts: [num_sources * E]."""
    experts = torch.arange(counts.shape[0] // num_sources, device=counts.device)
    return torch.repeat_interleave(
        experts.repeat(num_sources), counts, output_size=rows.shape[0]
    ).unsqueeze(1)


# ---- registration


def _experts_fake(
    x: Tensor, index: Tensor, weight: Tensor, up: Tensor, down: Tensor, activation: str, *_: int
) -> Tensor:
    _check(x, index, weight, up, down, activation)
    return x.new_empty(x.shape)


def _experts_backward_fake(
    dout: Tensor, x: Tensor, index: Tensor, weight: Tensor, up: Tensor, down: Tensor, *_args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(t.new_empty(t.shape) for t in (x, weight, up, down))  # type: ignore[return-value]


def _check(
    x: Tensor, index: Tensor, weight: Tensor, up: Tensor, down: Tensor, activation: str
) -> None:
    shapes = [tuple(t.shape) for t in (x, index, weight, up, down)]
    fits = [t.ndim for t in (x, index, weight, up, down)] == [2, 2, 2, 4, 3]
    if fits:
        (tokens, hidden), (experts, parts, width) = x.shape, up.shape[:3]
        fits = index.shape == weight.shape and index.shape[0] == tokens and parts in (1, 2)
        fits = fits and up.shape[3] == hidden and down.shape == (experts, hidden, width)
    if not fits or activation not in ACTIVATIONS:
        raise ValueError(
            "autopar::experts wants x [T, H], index and weight [T, K], up [E, 1 or 2, F, H], down"
            f" [E, H, F], one of {', '.join(ACTIVATIONS)}: got {shapes}, {activation!r}"
        )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation, ctx.first, ctx.total = inputs
    ctx.save_for_backward(*tensors)


def _experts_grad(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    dx, dweight, dup, ddown = torch.ops.autopar.experts_backward(
        dout, *ctx.saved_tensors, ctx.activation, ctx.first, ctx.total
    )
    return dx, None, dweight, dup, ddown, None, None, None


for _key in ("CPU", "CUDA"):
    LIBRARY.impl("experts", _experts, _key)
    LIBRARY.impl("experts_backward", _experts_backward, _key)
torch.library.register_fake("autopar::experts", _experts_fake, lib=LIBRARY)
torch.library.register_fake("autopar::experts_backward", _experts_backward_fake, lib=LIBRARY)
torch.library.register_autograd(
    "autopar::experts", _experts_grad, setup_context=_setup_context, lib=LIBRARY
)


@register_flop_formula(torch.ops.autopar.experts)
def experts_flops(
    x_shape: Any, index_shape: Any, weight_shape: Any, up_shape: Any, *_args: Any, **_kwargs: Any
) -> int:
    """Every token's K experts: the matmuls with up and down."""
    up, down = _row_macs(up_shape)
    return int(2 * math.prod(index_shape) * (up + down))


@register_flop_formula(torch.ops.autopar.experts_backward)
def experts_backward_flops(
    dout_shape: Any,
    x_shape: Any,
    index_shape: Any,
    weight_shape: Any,
    up_shape: Any,
    *_args: Any,
    **_kwargs: Any,
) -> int:
    """Three matmuls of up's size (one of them forward's, computed anew) and two of down's."""
    up, down = _row_macs(up_shape)
    return int(2 * math.prod(index_shape) * (3 * up + 2 * down))


def _row_macs(up_shape: Sequence[int]) -> tuple[int, int]:
    """Multiply-adds of a row with up and with down."""
    _, parts, width, hidden = up_shape
    return parts * width * hidden, width * hidden
