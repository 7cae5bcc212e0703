"""Pooling, resampling and spatial padding: batch and channels are parallel, spatial dims stay
whole."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from autopar.sharding.registry import RuleFn
from autopar.sharding.rule import Call, Rule, letter_rule

aten, own = torch.ops.aten, torch.ops.autopar


def _spatial(num_spatial: int, *, backward: bool = False, is_linear: bool = True) -> RuleFn:
    """All dims but the last `num_spatial` are parallel; a batch dim may be missing.

    A backward is linear in its first operand, the incoming gradient.
    """

    def rule(call: Call) -> Rule:
        words = [_word(f"s{i}.", len(dims), num_spatial) for i, dims in enumerate(call.operands)]
        results = [
            _word(f"r{i}.", 0 if meta is None else len(meta.shape), num_spatial)
            for i, meta in enumerate(call.results)
        ]
        blocked = {c for word in (*words, *results) for c in word if not c.startswith("n")}
        linear = [(0,)] if backward or is_linear else []
        return letter_rule(call, words, results, blocked=blocked, linear=linear)

    return rule


def _word(prefix: str, rank: int, num_spatial: int) -> list[str]:
    lead = max(rank - num_spatial, 0)
    return [*(f"n{i}" for i in range(lead)), *(f"{prefix}{i}" for i in range(rank - lead))]


def _overloads(text: str, num_spatial: int, **kinds: bool) -> dict[object, RuleFn]:
    return {getattr(aten, name).default: _spatial(num_spatial, **kinds) for name in text.split()}


_MAXIMA = {2: "max_pool2d_with_indices adaptive_max_pool2d", 3: "max_pool3d_with_indices"}
_MAXIMA_BACKWARD = {
    2: "max_pool2d_with_indices_backward adaptive_max_pool2d_backward",
    3: "max_pool3d_with_indices_backward",
}
_AVERAGES = {
    1: "avg_pool1d upsample_nearest1d upsample_linear1d reflection_pad1d replication_pad1d",
    2: "avg_pool2d _adaptive_avg_pool2d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d"
    " _upsample_nearest_exact2d _upsample_bilinear2d_aa reflection_pad2d replication_pad2d",
    3: "avg_pool3d _adaptive_avg_pool3d upsample_nearest3d upsample_trilinear3d reflection_pad3d"
    " replication_pad3d",
}
_AVERAGES_BACKWARD = {
    1: "upsample_nearest1d_backward upsample_linear1d_backward reflection_pad1d_backward"
    " replication_pad1d_backward",
    2: "avg_pool2d_backward _adaptive_avg_pool2d_backward upsample_nearest2d_backward"
    " upsample_bilinear2d_backward upsample_bicubic2d_backward _upsample_nearest_exact2d_backward"
    " _upsample_bilinear2d_aa_backward reflection_pad2d_backward replication_pad2d_backward",
    3: "avg_pool3d_backward _adaptive_avg_pool3d_backward upsample_nearest3d_backward"
    " upsample_trilinear3d_backward reflection_pad3d_backward replication_pad3d_backward",
}
RESAMPLE_BACKWARD = tuple(
    getattr(aten, name).default
    for text in _AVERAGES_BACKWARD.values()
    for name in text.split()
    if "upsample" in name
)


def _columns(call: Call) -> Rule:
    """im2col, col2im: whole rows of the batch. [N, ..] only; without a batch all is replicated."""
    rank, result_rank = len(call.operands[0]), len(call.result().shape)
    batched = rank + result_rank == 7  # [N, C, H, W] and [N, C * window, L]
    word = ["n" if batched else ".", *(["."] * (rank - 1))]
    result = ["n" if batched else ".", *(["."] * (result_rank - 1))]
    return letter_rule(call, [word], [result], linear=[(0,)])


def _pixel_shuffle(call: Call) -> Rule:
    return _spatial(3)(call)


def _table() -> Mapping[object, RuleFn]:
    table: dict[object, RuleFn] = {}
    for spatial, names in _MAXIMA.items():
        table |= _overloads(names, spatial, is_linear=False)
    for spatial, names in _AVERAGES.items():
        table |= _overloads(names, spatial)
    for backward in (_MAXIMA_BACKWARD, _AVERAGES_BACKWARD):
        for spatial, names in backward.items():
            table |= _overloads(names, spatial, backward=True)
    table |= {
        own.max_pool.default: _spatial(2, is_linear=False),
        own.max_pool_backward.default: _spatial(2, backward=True),
        aten.im2col.default: _columns,
        aten.col2im.default: _columns,
        aten.pixel_shuffle.default: _pixel_shuffle,
        aten.pixel_unshuffle.default: _pixel_shuffle,
        aten.native_channel_shuffle.default: _pixel_shuffle,
    }
    return table


RULES: Mapping[object, RuleFn] = _table()
