"""One call by hand, or more, of every operator that has a rule: the samples of the rule oracle.

Sizes are 2, 4 and 8, so that meshes of 2 and 4 divide them and one of 3 does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch._decomp import decomposition_table

from tests.unit.sharding.case import F64, Case, bools, ints, positive, x
from tests.unit.sharding.pointwise_cases import by_hand, from_schema

aten, own = torch.ops.aten, torch.ops.autopar
# the CPU has no kernel for it; a model captured for a GPU has it
_LIBRARY = torch.library.Library("aten", "IMPL")
_LIBRARY.impl(
    "_fused_rms_norm_backward",
    decomposition_table[aten._fused_rms_norm_backward.default],
    "CPU",
)


def _contraction() -> Iterator[Case]:
    a, b = x(4, 8), x(8, 4, seed=1)
    yield Case(aten.mm.default, (a, b))
    yield Case(aten.mm.default, (x(4, 4), x(4, 4)))
    square = x(4, 4)
    yield Case(aten.mm.default, (square, square))
    yield Case(aten.mm.default, (x(4, 1), x(1, 8)))
    yield Case(aten.bmm.default, (x(4, 2, 8), x(4, 8, 4, seed=1)))
    yield Case(aten.addmm.default, (x(4, seed=2), a, b))
    yield Case(aten.addmm.default, (x(4, 4, seed=2), a, b), {"alpha": 2, "beta": 0.5})
    yield Case(aten.baddbmm.default, (x(1, 4, seed=2), x(4, 2, 8), x(4, 8, 4, seed=1)))
    yield Case(aten.mv.default, (a, x(8, seed=1)))
    yield Case(aten.dot.default, (x(8), x(8, seed=1)))
    image, kernel = x(4, 4, 5, 5), x(8, 4, 3, 3, seed=1)
    pads = ([1, 1], [1, 1], [1, 1])
    yield Case(aten.convolution.default, (image, kernel, None, *pads, False, [0, 0], 1))
    yield Case(aten.convolution.default, (image, kernel, x(8, seed=2), *pads, False, [0, 0], 1))
    grouped = x(8, 2, 3, 3, seed=1)
    yield Case(aten.convolution.default, (image, grouped, None, *pads, False, [0, 0], 2))
    yield Case(aten.convolution.default, (image, grouped, x(8, seed=2), *pads, False, [0, 0], 2))
    depthwise, signals = x(8, 1, 3, seed=1), x(4, 8, 6)
    steps = ([1], [2], [1])
    yield Case(aten.convolution.default, (signals, depthwise, None, *steps, False, [0], 8))
    yield Case(aten.convolution.default, (signals, x(8, 2, 3), None, *steps, True, [0], 4))
    transposed = x(4, 8, 3, 3, seed=1)
    yield Case(aten.convolution.default, (image, transposed, None, *pads, True, [0, 0], 1))
    dy = x(4, 8, 5, 5, seed=3)
    tail = (*pads, False, [0, 0], 1)
    backward = aten.convolution_backward.default
    yield Case(backward, (dy, image, kernel, [8], *tail, [True, True, True]))
    yield Case(backward, (dy, image, kernel, None, *tail, [True, True, False]))
    yield Case(backward, (dy, image, kernel, [8], *tail, [False, True, True]))
    yield Case(backward, (dy, image, grouped, [8], *pads, False, [0, 0], 2, [True, True, True]))
    dx = (x(4, 8, 8, seed=3), signals, depthwise, [8], *steps, False, [0], 8, [True, True, True])
    yield Case(backward, dx)
    dx = (x(4, 8, 4, seed=3), signals, x(8, 2, 3), [8], *steps, True, [0], 4, [True, True, True])
    yield Case(backward, dx)
    signal = (x(4, 8, 6, seed=3), x(4, 4, 6), x(8, 4, 3, seed=1))
    yield Case(backward, (*signal, [8], [1], [1], [1], False, [0], 1, [True, True, True]))


def _views() -> Iterator[Case]:
    a = x(4, 2, 8)
    for target in (aten.view.default, aten._unsafe_view.default, aten.reshape.default):
        yield Case(target, (a, [8, 8]))
    yield Case(aten.view.default, (a, [4, -1]))
    yield Case(aten.view.default, (a, [16, 4]))
    yield Case(aten.view.default, (a, [4, 2, 2, 4]))
    yield Case(aten.view.default, (x(6, 4), [4, 6]))
    yield Case(aten.view.default, (x(1, 8), [8]))
    yield Case(aten.view.default, (x(1), []))
    yield Case(aten.unsqueeze.default, (a, -1))
    yield Case(aten.squeeze.default, (x(1, 4, 1, 2),))
    yield Case(aten.squeeze.dim, (x(4, 1, 2), 2))
    yield Case(aten.squeeze.dim, (x(4, 1, 2), 1))
    yield Case(aten.squeeze.dims, (x(4, 1, 2), [0, 1]))
    yield Case(aten.t.default, (x(4, 8),))
    yield Case(aten.t.default, (x(4),))
    yield Case(aten.transpose.int, (a, 0, -1))
    yield Case(aten.permute.default, (a, [2, 0, -2]))
    yield Case(aten.expand.default, (x(4, 1, 8), [4, 2, 8]))
    yield Case(aten.expand.default, (x(8), [4, -1]))
    yield Case(aten.expand.default, (x(), [4, 8]))


def _reductions() -> Iterator[Case]:
    a, p = x(4, 2, 8), positive(4, 2, 8)
    yield Case(aten.sum.dim_IntList, (a, [0, -1]))
    yield Case(aten.sum.dim_IntList, (a, [1], True))
    yield Case(aten.sum.dim_IntList, (a, []))
    yield Case(aten.sum.dim_IntList, (bools(4, 8), [0]))
    yield Case(aten.sum.default, (a,))
    yield Case(aten.sum.default, (ints(4, 4, 8),))
    yield Case(aten.sum.default, (x(),))
    yield Case(aten.mean.dim, (a, [0, 1], True))
    yield Case(aten.mean.dim, (a, [-1]))
    yield Case(aten.mean.dim, (a, None))
    yield Case(aten.mean.default, (a,))
    for target in (aten.amax.default, aten.amin.default, aten.logsumexp.default):
        yield Case(target, (a, [0, 2]))
        yield Case(target, (a, [-1], True))
    for target in (aten.max.dim, aten.min.dim, aten.median.dim):
        yield Case(target, (a, 0))
        yield Case(target, (a, -1, True))
    yield Case(aten.kthvalue.default, (a, 2))
    for target in (aten.argmax.default, aten.argmin.default):
        yield Case(target, (a, 2))
        yield Case(target, (a,))
    for target in (aten.any.dim, aten.all.dim):
        yield Case(target, (bools(4, 8), 1))
    for target in (aten.any.dims, aten.all.dims):
        yield Case(target, (bools(4, 2, 8), [0, 1]))
    yield Case(aten.prod.dim_int, (p, 1))
    for target in (aten.max.default, aten.min.default, aten.prod.default, aten.norm.Scalar):
        yield Case(target, (p,))
    for target in (aten.any.default, aten.all.default):
        yield Case(target, (bools(4, 8),))
    for target in (aten.var, aten.std, aten.var_mean, aten.std_mean):
        yield Case(target.correction, (a, [0, 2]), {"correction": 1, "keepdim": True})
        yield Case(target.correction, (a,))
    yield Case(aten.aminmax.default, (a,), {"dim": 0})
    yield Case(aten.aminmax.default, (a,))
    yield Case(aten.linalg_vector_norm.default, (a, 2, [1, 2], True))
    yield Case(aten.linalg_vector_norm.default, (a,))
    yield Case(aten.norm.ScalarOpt_dim, (a, 2, [-1]))
    yield Case(aten.count_nonzero.dim_IntList, (a, [0]))
    yield Case(aten.histc.default, (a, 4, -2, 2))
    yield Case(aten.histc.default, (a, 4))


def _normalisation() -> Iterator[Case]:
    a, dy = x(4, 2, 8), x(4, 2, 8, seed=1)
    yield Case(aten._softmax.default, (a, -1, False))
    yield Case(aten._safe_softmax.default, (a, 1))
    probabilities = a.softmax(-1)
    yield Case(aten._softmax_backward_data.default, (dy, probabilities, -1, F64))
    yield Case(aten._log_softmax.default, (a, 2, False))
    yield Case(aten._log_softmax.default, (a, 0, False))
    logs = a.log_softmax(0)
    yield Case(aten._log_softmax_backward_data.default, (dy, logs, 0, F64))
    weight, bias = x(8, seed=2), x(8, seed=3)
    for affine in ((weight, bias), (None, None)):
        yield Case(aten.native_layer_norm.default, (a, [8], *affine, 1e-5))
        _, mean, rstd = aten.native_layer_norm(a, [8], *affine, 1e-5)
        mask = [True, affine[0] is not None, affine[1] is not None]
        args = (dy, a, [8], mean, rstd, *affine, mask)
        yield Case(aten.native_layer_norm_backward.default, args)
    yield Case(aten._fused_rms_norm.default, (a, [8], weight, 1e-5))
    yield Case(aten._fused_rms_norm.default, (a, [2, 8], None, 1e-5))
    rstd = aten._fused_rms_norm(a, [8], weight, 1e-5)[1]
    args = (dy, a, [8], rstd, weight, [True, True])
    yield Case(aten._fused_rms_norm_backward.default, args)
    yield from _group_norms()
    yield from _batch_norms()


def _group_norms() -> Iterator[Case]:
    image, dy, weight, bias = x(4, 8, 3), x(4, 8, 3, seed=1), x(8, seed=2), x(8, seed=3)
    for groups in (4, 1):
        for affine in ((weight, bias), (None, None)):
            yield Case(aten.native_group_norm.default, (image, *affine, 4, 8, 3, groups, 1e-5))
            _, mean, rstd = aten.native_group_norm(image, *affine, 4, 8, 3, groups, 1e-5)
            mask = [True, affine[0] is not None, affine[1] is not None]
            args = (dy, image, mean, rstd, affine[0], 4, 8, 3, groups, mask)
            yield Case(aten.native_group_norm_backward.default, args)


def _batch_norms() -> Iterator[Case]:
    forward, backward = (
        aten._native_batch_norm_legit_functional.default,
        aten.native_batch_norm_backward.default,
    )
    image, dy, weight, bias = x(4, 8, 3), x(4, 8, 3, seed=1), x(8, seed=2), x(8, seed=3)
    running = (x(8, seed=4), positive(8))
    for training in (True, False):
        for affine in ((weight, bias), (None, None)):
            args = (image, *affine, *running, training, 0.1, 1e-5)
            yield Case(forward, args)
            _, mean, invstd, _, _ = forward(*args)
            mask = [True, affine[0] is not None, affine[0] is not None]
            stats = (dy, image, affine[0], *running, mean, invstd, training, 1e-5, mask)
            yield Case(backward, stats)


def _attention() -> Iterator[Case]:
    sdpa, backward = torch.ops.autopar.sdpa.default, torch.ops.autopar.sdpa_backward.default
    q, k, v = x(2, 8, 4, 4), x(2, 4, 4, 4, seed=1), x(2, 4, 4, 4, seed=2)
    for bias in (None, x(2, 8, 4, 4, seed=3), x(1, 1, 4, 4, seed=3)):
        yield Case(sdpa, (q, k, v, bias, False, 0.5))
        out, lse = sdpa(q, k, v, bias, False, 0.5)
        args = (x(2, 8, 4, 4, seed=4), q, k, v, bias, out, lse, False, 0.5)
        yield Case(backward, args)
        if bias is None or bias.shape[0] == 2:
            out, lse = sdpa(q, k, v, bias, True, 0.5)
            yield Case(sdpa, (q, k, v, bias, True, 0.5))
            args = (x(2, 8, 4, 4, seed=4), q, k, v, bias, out, lse, True, 0.5)
            yield Case(backward, args)
    yield Case(sdpa, (q, q, q, None, True, 0.5))
    dropped, backward = own.sdpa_dropout.default, own.sdpa_dropout_backward.default
    seed = torch.tensor([5, 1], dtype=torch.int32)
    for causal in (False, True):
        rest = (causal, 0.5, seed, 3, 0.4, [2, 8, 4], [0, 0, 0])
        yield Case(dropped, (q, k, v, *rest))
        yield Case(backward, (x(2, 8, 4, 4, seed=4), q, k, v, *dropped(q, k, v, *rest), *rest))


def _experts() -> Iterator[Case]:
    """Expert 3 is nobody's choice."""
    tokens, index = x(8, 4), positive(8, 7).argsort(1)[:, :2]
    weight = positive(8, 2)
    for parts in (2, 1):
        up, down = x(8, parts, 4, 4, seed=1), x(8, 4, 4, seed=2)
        args = (tokens, index + (index >= 3), weight, up, down, "silu", 0, 8)
        yield Case(torch.ops.autopar.experts.default, args)
        yield Case(torch.ops.autopar.experts_backward.default, (x(8, 4, seed=3), *args))


def _indexing() -> Iterator[Case]:
    weight, tokens = x(8, 4), ints(8, 4, 2)
    yield Case(aten.embedding.default, (weight, tokens))
    grad = x(4, 2, 8)
    dense = aten.embedding_dense_backward.default
    yield Case(dense, (grad, tokens, 8, -1, False))
    yield Case(dense, (grad, tokens, 8, 5, False))
    yield Case(dense, (grad, ints(2, 4, 2), 8, -1, True))
    yield Case(aten.index_select.default, (x(4, 2, 8), 0, ints(4, 8)))
    add = (x(4, 8), 0, ints(4, 8), x(8, 8, seed=1))
    yield Case(aten.index_add.default, add)
    yield Case(aten.index.Tensor, (x(4, 2, 8), [None, None, bools(8)]))
    for target in (aten.index.Tensor, aten._unsafe_index.Tensor):
        yield Case(target, (x(4, 2, 8), [ints(4, 8)]))
        yield Case(target, (x(4, 2, 8), [None, ints(2, 4, 2), ints(8, 4, 2)]))
        yield Case(target, (x(4, 2, 8), [ints(4, 4), None, ints(8, 4)]))
        yield Case(target, (x(4, 8), [ints(4, 4, 1), ints(8, 8)]))
    for target in (aten.index_put.default, aten._unsafe_index_put.default):
        for accumulate in (True, False):
            indices = [None, torch.arange(2).repeat(2)] if accumulate else [None, torch.arange(2)]
            rows = 4 if accumulate else 2
            yield Case(target, (x(4, 2, 8), indices, x(4, rows, 8, seed=1), accumulate))
            yield Case(target, (x(4, 2, 8), indices, x(rows, 1, seed=1), accumulate))
            yield Case(target, (x(4, 2, 8), indices, x(seed=1), accumulate))
        grid = [ints(4, 4, 1), ints(2, 8)]
        yield Case(target, (x(4, 2, 8), grid, x(4, 8, 8, seed=1), True))
        yield Case(target, (x(4, 2, 8), grid, x(8, 1, seed=1), True))
        both = [ints(4, 8), ints(2, 8)]
        yield Case(target, (x(4, 2, 8), both, x(8, 8, seed=1), True))


def _losses() -> Iterator[Case]:
    none, mean, total = 0, 1, 2
    scores, target = x(4, 8).log_softmax(1), ints(8, 4)
    target[1] = -100
    entropy = (x(4, 8), target, -100)
    yield Case(own.cross_entropy.default, entropy)
    lse = own.cross_entropy(*entropy)[2]
    yield Case(own.cross_entropy_backward.default, (x(seed=5), *entropy[:2], lse, -100, 0))
    images, pixels = x(4, 8, 2, 2).log_softmax(1), ints(8, 4, 2, 2)
    for how in (none, mean, total):
        grad = x(4, seed=5) if how == none else x(seed=5)
        pixel_grad = x(4, 2, 2, seed=5) if how == none else x(seed=5)
        for weight in (None, positive(8)):
            forward = aten.nll_loss_forward.default
            args = (scores, target, weight, how, -100)
            yield Case(forward, args)
            count = forward(*args)[1]
            yield Case(aten.nll_loss_backward.default, (grad, *args, count))
            args = (images, pixels, weight, how, -100)
            yield Case(aten.nll_loss2d_forward.default, args)
            count = aten.nll_loss2d_forward(*args)[1]
            yield Case(aten.nll_loss2d_backward.default, (pixel_grad, *args, count))
        p, q = positive(4, 8), positive(4, 8, seed=1)
        grad = x(4, 8, seed=5) if how == none else x(seed=5)
        for name in ("mse_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss"):
            extra = (1.0,) if name in ("smooth_l1_loss", "huber_loss") else ()
            yield Case(getattr(aten, name).default, (p, q, how, *extra))
            args = (grad, p, q, how, *extra)
            yield Case(getattr(aten, f"{name}_backward").default, args)
        for weight in (None, positive(4, 8, seed=2)):
            yield Case(aten.binary_cross_entropy.default, (p, q, weight, how))
            yield Case(aten.binary_cross_entropy_backward.default, (grad, p, q, weight, how))
            logits = aten.binary_cross_entropy_with_logits.default
            yield Case(logits, (p, q, weight, None, how))
            yield Case(logits, (p, q, None, positive(8), how))
    yield Case(aten.mse_loss.default, (x(4, 8), x(4, 8, seed=1)))
    yield Case(aten.mse_loss.default, (x(4, 8), x(8, seed=1)))


def _slicing() -> Iterator[Case]:
    a = x(4, 2, 8)
    big = 2**63 - 1
    yield Case(aten.slice.Tensor, (a, 2, 2, 6))
    yield Case(aten.slice.Tensor, (a, 2, 0, big))
    yield Case(aten.slice.Tensor, (a, -1, 0, big, 2))
    yield Case(aten.slice_backward.default, (x(4, 2, 4), [4, 2, 8], 2, 2, 6, 1))
    yield Case(aten.slice_backward.default, (a, [4, 2, 8], 2, 0, big, 1))
    yield Case(aten.slice_scatter.default, (a, x(4, 2, 3, seed=1), 2, 1, 4))
    yield Case(aten.select.int, (a, 1, -1))
    yield Case(aten.select_backward.default, (x(4, 8), [4, 2, 8], 1, 0))
    yield Case(aten.select_scatter.default, (a, x(4, 8, seed=1), 1, 1))
    yield Case(aten.cat.default, ([a, x(4, 4, 8, seed=1)], 1))
    yield Case(aten.cat.default, ([x(2, 4), x(3, 4, seed=1), x(4, 4, seed=2)],))
    yield Case(aten.cat.default, ([a, a], -1))
    yield Case(aten.cat.default, ([torch.empty(0, dtype=F64), a], 0))
    yield Case(aten.stack.default, ([a, x(4, 2, 8, seed=1)], -1))
    yield Case(aten.unbind.int, (a, 1))
    yield Case(aten.split.Tensor, (a, 4, 2))
    yield Case(aten.split.Tensor, (a, 3, 2))
    yield Case(aten.split_with_sizes.default, (a, [2, 6], -1))
    yield Case(aten.constant_pad_nd.default, (a, [1, 2]))
    yield Case(aten.constant_pad_nd.default, (a, [0, 0, 1, -1], 2.0))
    yield Case(aten.flip.default, (a, [0, -1]))
    yield Case(aten.roll.default, (a, [1], [2]))
    yield Case(aten.roll.default, (a, [1]))
    yield Case(aten.tril.default, (a,))
    yield Case(aten.triu.default, (a, 1))
    for target in (aten.cumsum, aten.cumprod, aten.cummax, aten.cummin, aten.logcumsumexp):
        yield Case(target.default, (a, 0))
        yield Case(target.default, (a, -1))
    yield Case(aten.sort.default, (a, 0))
    yield Case(aten.sort.stable, (a,), {"stable": True, "dim": 1})
    yield Case(aten.argsort.default, (a,))
    yield Case(aten.topk.default, (a, 2))
    yield Case(aten.topk.default, (a, 2, 0))
    yield Case(aten.gather.default, (a, 2, ints(8, 4, 2, 4)))
    yield Case(aten.gather.default, (x(4, 2), 0, ints(4, 8, 2)))
    yield Case(aten.gather.default, (a, 2, ints(8, 2, 2, 4)))
    unique = torch.stack(
        [torch.randperm(8, generator=torch.Generator().manual_seed(0))[:4] for _ in range(4)]
    )
    yield Case(aten.scatter.value, (x(4, 8), 1, unique, 2.0))
    yield Case(aten.scatter.src, (x(4, 8), 1, unique, x(4, 4, seed=1)))
    yield Case(aten.scatter_add.default, (x(4, 8), 1, ints(8, 4, 8), x(4, 8, seed=1)))
    yield Case(aten.repeat.default, (x(4, 8), [1, 2]))
    yield Case(aten.repeat.default, (x(4, 8), [2, 1, 1]))
    yield Case(aten.glu.default, (a, -1))
    yield Case(aten.glu_backward.default, (x(4, 2, 4), a, -1))
    yield Case(aten.unfold.default, (a, 2, 4, 2))
    yield Case(aten.unfold_backward.default, (x(4, 2, 3, 4), [4, 2, 8], 2, 4, 2))
    yield Case(aten.diagonal.default, (x(4, 2, 8), 0, 1, 2))
    yield Case(aten.diagonal_backward.default, (x(4, 2), [4, 2, 8], 0, 1, 2))
    yield Case(aten.diag_embed.default, (x(4, 2, 8),))


def _pooling() -> Iterator[Case]:
    signal, image, volume = x(4, 2, 8), x(4, 2, 8, 8), x(2, 4, 4, 4, 4)
    yield from _pools(image, volume)
    for target in (aten.upsample_nearest1d, aten.upsample_linear1d):
        align = (False,) if "linear" in str(target) else ()
        yield Case(target.default, (signal, [16], *align))
        back = getattr(aten, f"{target.__name__}_backward").default
        yield Case(back, (x(4, 2, 16), [16], [4, 2, 8], *align))
    flat = "nearest2d bilinear2d bicubic2d nearest_exact2d bilinear2d_aa"
    for name in flat.split():
        name = f"_upsample_{name}" if "exact" in name or "aa" in name else f"upsample_{name}"
        align = (False,) if "bi" in name else ()
        yield Case(getattr(aten, name).default, (image, [16, 16], *align))
        back = getattr(aten, f"{name}_backward").default
        yield Case(back, (x(4, 2, 16, 16), [16, 16], [4, 2, 8, 8], *align))
    for name in ("upsample_nearest3d", "upsample_trilinear3d"):
        align = (False,) if "linear" in name else ()
        yield Case(getattr(aten, name).default, (volume, [8, 8, 8], *align))
        back = getattr(aten, f"{name}_backward").default
        yield Case(back, (x(2, 4, 8, 8, 8), [8, 8, 8], [2, 4, 4, 4, 4], *align))
    for kind in ("reflection", "replication"):
        for dims, tensor in ((1, signal), (2, image), (3, volume)):
            pad = [1, 1] * dims
            target = getattr(aten, f"{kind}_pad{dims}d").default
            yield Case(target, (tensor, pad))
            grad = torch.randn_like(target(tensor, pad))
            yield Case(getattr(aten, f"{kind}_pad{dims}d_backward").default, (grad, tensor, pad))
    yield Case(aten.im2col.default, (image, [2, 2], [1, 1], [0, 0], [2, 2]))
    yield Case(aten.im2col.default, (image[0], [2, 2], [1, 1], [0, 0], [2, 2]))
    yield Case(aten.col2im.default, (x(4, 8, 16), [8, 8], [2, 2], [1, 1], [0, 0], [2, 2]))
    yield Case(aten.pixel_shuffle.default, (x(4, 8, 2, 2), 2))
    yield Case(aten.pixel_unshuffle.default, (image, 2))
    yield Case(aten.native_channel_shuffle.default, (x(4, 8, 2, 2), 2))


def _pools(image: Tensor, volume: Tensor) -> Iterator[Case]:
    for tensor in (image, image[0]):
        yield Case(aten.max_pool2d_with_indices.default, (tensor, [2, 2], [2, 2]))
        out, where = aten.max_pool2d_with_indices(tensor, [2, 2], [2, 2])
        args = (out * 2, tensor, [2, 2], [2, 2], [0, 0], [1, 1], False, where)
        yield Case(aten.max_pool2d_with_indices_backward.default, args)
        window = ([3, 3], [2, 2], [1, 1], [1, 1])
        yield Case(own.max_pool.default, (tensor, *window, False))
        pooled, offsets = own.max_pool(tensor, *window, False)
        yield Case(own.max_pool_backward.default, (pooled * 2, offsets, [8, 8], *window))
        yield Case(aten.avg_pool2d.default, (tensor, [2, 2]))
        args = (out, tensor, [2, 2], [2, 2], [0, 0], False, True, None)
        yield Case(aten.avg_pool2d_backward.default, args)
        yield Case(aten._adaptive_avg_pool2d.default, (tensor, [4, 4]))
        yield Case(aten._adaptive_avg_pool2d_backward.default, (out, tensor))
        yield Case(aten.adaptive_max_pool2d.default, (tensor, [4, 4]))
        yield Case(aten.adaptive_max_pool2d_backward.default, (out * 2, tensor, where))
    yield Case(aten.avg_pool1d.default, (x(4, 2, 8), [2]))
    yield Case(aten.max_pool3d_with_indices.default, (volume, [2, 2, 2], [2, 2, 2]))
    out, where = aten.max_pool3d_with_indices(volume, [2, 2, 2], [2, 2, 2])
    args = (out * 2, volume, [2] * 3, [2] * 3, [0] * 3, [1] * 3, False, where)
    yield Case(aten.max_pool3d_with_indices_backward.default, args)
    yield Case(aten.avg_pool3d.default, (volume, [2, 2, 2]))
    args = (out, volume, [2] * 3, [2] * 3, [0] * 3, False, True, None)
    yield Case(aten.avg_pool3d_backward.default, args)
    yield Case(aten._adaptive_avg_pool3d.default, (volume, [2, 2, 2]))
    yield Case(aten._adaptive_avg_pool3d_backward.default, (out, volume))


def _creation() -> Iterator[Case]:
    how = {"dtype": F64, "device": torch.device("cpu")}
    yield Case(aten.full.default, ([4, 8], 2.0), how)
    yield Case(aten.zeros.default, ([4, 8],), how)
    yield Case(aten.ones.default, ([4, 8],), how)
    yield Case(aten.new_zeros.default, (x(4), [4, 8]))
    yield Case(aten.new_ones.default, (x(4), [4, 8]))
    yield Case(aten.new_full.default, (x(4), [4, 8], 3.0))
    yield Case(aten.scalar_tensor.default, (2.0,), how)
    yield Case(aten.empty.memory_format, ([4, 8],), how)
    yield Case(aten.new_empty.default, (x(4), [4, 8]))
    yield Case(aten.arange.default, (8,))
    yield Case(aten.arange.default, (8,), how)
    yield Case(aten.arange.default, (7.5,), how)
    yield Case(aten.arange.start, (2, 10))
    yield Case(aten.arange.start_step, (1, 17, 2))
    yield Case(aten.arange.start_step, (8, 0, -1))
    seed = torch.tensor([5, 0], dtype=torch.int32)
    sizes = ([4, 8], [4, 8], [0, 0], 1)
    yield Case(torch.ops.autopar.dropout.default, (x(4, 8), seed, 3, 0.5, *sizes))
    yield Case(torch.ops.autopar.dropout.default, (x(8), seed, 3, 0.5, [8], [8], [0], 0))
    geometry = (seed, 3, [4, 8], [4, 8], [0, 0])
    yield Case(torch.ops.autopar.uniform.default, (*geometry, torch.float32))
    yield Case(torch.ops.autopar.normal.default, (*geometry, F64))
    yield Case(torch.ops.autopar.randint.default, (*geometry, 2, 9, torch.int64))


def all_cases() -> Sequence[Case]:
    """Deterministic."""
    families = (
        from_schema,
        by_hand,
        _contraction,
        _views,
        _reductions,
        _normalisation,
        _attention,
        _experts,
        _indexing,
        _losses,
        _slicing,
        _pooling,
        _creation,
    )
    return [case for family in families for case in family()]


# results hold whatever was in memory
UNINITIALISED = (
    aten.empty.memory_format,
    aten.new_empty.default,
    aten.empty_like.default,
)
