"""`autopar::flash_dropout` and its backward in Triton: no score or mask is ever in memory.

Blocks of queries walk over the keys that they see, with a running maximum and sum (Dao,
"FlashAttention-2", 2023); backward has a kernel that walks so for dq, and writes delta =
sum(dout * out) for one that walks over queries for dk and dv. Products are of the operands' type,
sums in float32.

The mask is `ops.random`'s: bits(row, column) = mix(mix(row ^ key0) ^ mix(column + key1)), with one
`mix` per element: hashes of columns are a table, those of rows are made by each block of queries,
in backward by dq's for all. (In the layout of scores, every warp would hash all columns of a block,
a third of all its hashing.) Row of [b, h, i] of a shard:

    first_row + b * batch_rows + h * head_rows + i + microbatch * all_rows      modulo 2^32
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor

from autopar.ops.random import MULTIPLIERS, SHIFTS, salts_of, threshold, wrapped


class Tiles(NamedTuple):
    """Queries and keys of a block, warps that share one, loads that are on their way."""

    queries: int
    keys: int
    warps: int
    stages: int


# By kernel and largest head width. On an H100, 16 batches of 12 heads of 64, 1024 tokens, causal,
# bfloat16, those of 64 are the fastest of eight to ten each: 0.18 and 0.45 ms, cuDNN with its own
# dropout 0.19 and 0.35. Those of 128 were not measured.
TILES: Mapping[str, Mapping[int, Tiles]] = {
    "forward": {64: Tiles(64, 64, 4, 3), 128: Tiles(128, 64, 8, 2)},
    "dq": {64: Tiles(64, 32, 4, 3), 128: Tiles(128, 64, 8, 2)},
    "dkv": {64: Tiles(64, 64, 4, 2), 128: Tiles(32, 128, 8, 2)},
}

_LOG2_E = math.log2(math.e)
_M0 = tl.constexpr(wrapped(MULTIPLIERS[0]))
_M1 = tl.constexpr(wrapped(MULTIPLIERS[1]))
_S0, _S1, _S2 = (tl.constexpr(shift) for shift in SHIFTS)
_B0, _B1, _B2 = (tl.constexpr((1 << (32 - shift)) - 1) for shift in SHIFTS)
_LOG2E = tl.constexpr(_LOG2_E)
_LN2 = tl.constexpr(math.log(2.0))
# They differ between operators and ranks, which share their kernels.
_PLAIN = ("first_row", "batch_rows", "all_rows", "salt0", "salt1", "kept_below")


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    seed: Tensor,
    op_id: int,
    p: float,
    sizes: Sequence[int],
    offsets: Sequence[int],
    *,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """q [B, H, S, D], k and v [B, G, T, D], rows of stride 1 -> out [B, S, H, D], lse [B, H, S]."""
    batch, heads, queries, width = q.shape
    tiles = tiles or _tiles("forward", width)
    out = q.new_empty(batch, queries, heads, width)
    lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    columns = _column_hashes(seed, op_id, k.shape[2])
    _forward[(triton.cdiv(queries, tiles.queries) * batch * heads,)](
        q,
        k,
        v,
        out,
        lse,
        seed,
        columns,
        *_strides(q, k, v),
        *_sizes(q, k, scale, p, offsets),
        *_row_numbers(op_id, sizes, offsets),
        **_constants(q, k, causal, tiles),
    )
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    seed: Tensor,
    op_id: int,
    p: float,
    sizes: Sequence[int],
    offsets: Sequence[int],
    *,
    dq_tiles: Tiles | None = None,
    dkv_tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dout and out [B, H, S, D] with rows of stride 1, lse contiguous -> dq [B, S, H, D], dk and dv
    [B, T, G, D]."""
    batch, heads, queries, width = q.shape
    groups, keys = k.shape[1:3]
    dq_tiles, dkv_tiles = dq_tiles or _tiles("dq", width), dkv_tiles or _tiles("dkv", width)
    dq = q.new_empty(batch, queries, heads, width)
    dk, dv = (t.new_empty(batch, keys, groups, width) for t in (k, v))
    delta, row_hashes = torch.empty_like(lse), torch.empty_like(lse, dtype=torch.int32)
    columns = _column_hashes(seed, op_id, keys)
    counts = _sizes(q, k, scale, p, offsets)
    _dq[(triton.cdiv(queries, dq_tiles.queries) * batch * heads,)](
        dout,
        q,
        k,
        v,
        out,
        lse,
        delta,
        row_hashes,
        dq,
        seed,
        columns,
        *_strides(dout, q, k, v, out),
        *counts,
        *_row_numbers(op_id, sizes, offsets),
        **_constants(q, k, causal, dq_tiles),
    )
    _dkv[(triton.cdiv(keys, dkv_tiles.keys) * batch * groups,)](
        dout,
        q,
        k,
        v,
        lse,
        delta,
        row_hashes,
        dk,
        dv,
        columns,
        *_strides(dout, q, k, v),
        *counts,
        **_constants(q, k, causal, dkv_tiles),
    )
    return dq, dk, dv


def _column_hashes(seed: Tensor, op_id: int, keys: int) -> Tensor:
    """int32[keys]."""
    hashes = torch.empty(keys, dtype=torch.int32, device=seed.device)
    _hash_columns[(triton.cdiv(keys, 256),)](seed, hashes, keys, *salts_of(op_id), BLOCK=256)
    return hashes


def _tiles(kernel: str, width: int) -> Tiles:
    return TILES[kernel][64 if width <= 64 else 128]


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _sizes(
    q: Tensor, k: Tensor, scale: float, p: float, offsets: Sequence[int]
) -> tuple[int | float, ...]:
    """heads, queries, keys, scale, first_query, kept_below, gain."""
    kept = (threshold(p), 1.0 / (1.0 - p))
    return (q.shape[1], q.shape[2], k.shape[2], scale, offsets[2], *kept)


def _row_numbers(op_id: int, sizes: Sequence[int], offsets: Sequence[int]) -> tuple[int, ...]:
    """first_row, batch_rows, head_rows, all_rows, salt0, salt1."""
    _, heads, queries = sizes
    first_row = (offsets[0] * heads + offsets[1]) * queries + offsets[2]
    rows = (first_row, heads * queries, queries, math.prod(sizes))
    return (*map(wrapped, rows), *salts_of(op_id))


def _constants(q: Tensor, k: Tensor, causal: bool, tiles: Tiles) -> dict[str, Any]:
    width = q.shape[3]
    return {
        "CAUSAL": causal,
        "REPEAT": q.shape[1] // k.shape[1],
        "WIDTH": width,
        "DIMS": max(16, triton.next_power_of_2(width)),
        "QUERIES": tiles.queries,
        "KEYS": tiles.keys,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


# Triton would look for types that annotations name.


@triton.jit
def _mix(x):  # type: ignore[no-untyped-def]
    """`ops.random.mix` of int32."""
    x = x ^ ((x >> _S0) & _B0)
    x = x * _M0
    x = x ^ ((x >> _S1) & _B1)
    x = x * _M1
    return x ^ ((x >> _S2) & _B2)


@triton.jit
def _hash_keys(seed_ptr, salt0, salt1):  # type: ignore[no-untyped-def]
    """`ops.random.make_keys`."""
    word = tl.load(seed_ptr)
    return _mix(_mix(word) ^ salt0), _mix(_mix(word + salt1) ^ salt0)


@triton.jit(do_not_specialize=("salt0", "salt1"))  # type: ignore[untyped-decorator]
def _hash_columns(  # type: ignore[no-untyped-def]
    seed_ptr, hash_ptr, keys, salt0, salt1, BLOCK: tl.constexpr
):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    _, key1 = _hash_keys(seed_ptr, salt0, salt1)
    tl.store(hash_ptr + columns, _mix(columns + key1), mask=columns < keys)


@triton.jit  # type: ignore[untyped-decorator]
def _rows(  # type: ignore[no-untyped-def]
    ptr, first, count, stride, WIDTH: tl.constexpr, DIMS: tl.constexpr, ROWS: tl.constexpr
):
    """[ROWS, DIMS] from row `first` on; zeros from row `count` on, and beyond the width."""
    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIMS)
    there = (first + rows)[:, None] < count
    if WIDTH != DIMS:
        there = there & (dims < WIDTH)[None, :]
    start = ptr + tl.cast(first, tl.int64) * stride
    return tl.load(start + rows[:, None] * stride + dims[None, :], mask=there, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _store_rows(  # type: ignore[no-untyped-def]
    ptr,
    x,
    batch,
    head,
    heads,
    first,
    count,
    WIDTH: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rows of one head of a contiguous [B, count, heads, WIDTH]."""
    rows, dims = first + tl.arange(0, ROWS), tl.arange(0, DIMS)
    there = (rows < count)[:, None]
    if WIDTH != DIMS:
        there = there & (dims < WIDTH)[None, :]
    start = ptr + (tl.cast(batch, tl.int64) * count * heads + head) * WIDTH
    at = start + (tl.cast(rows, tl.int64) * heads * WIDTH)[:, None] + dims[None, :]
    tl.store(at, x.to(ptr.dtype.element_ty), mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    acc,
    total,
    top,
    q,
    k_ptr,
    v_ptr,
    k_row,
    v_row,
    start,
    stop,
    keys,
    seen_to,
    log2_scale,
    row_hash,
    columns_ptr,
    kept_below,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDTH: tl.constexpr,
    DIMS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The keys from start to stop. top: largest score so far, in powers of two; total: sum of
    exp2(score - top); acc: that of the kept ones times v. seen_to: last key of each query."""
    for first in range(start, stop, KEYS):
        k = _rows(k_ptr, first, keys, k_row, WIDTH, DIMS, KEYS)
        s = tl.dot(q, tl.trans(k)) * log2_scale
        columns = first + tl.arange(0, KEYS)
        column_hash = tl.load(columns_ptr + columns, mask=columns < keys, other=0)
        if MASKED:
            seen = (columns < keys)[None, :]
            if CAUSAL:
                seen = seen & (columns[None, :] <= seen_to[:, None])
            s = tl.where(seen, s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        kept = _mix(row_hash[:, None] ^ column_hash[None, :]) < kept_below
        v = _rows(v_ptr, first, keys, v_row, WIDTH, DIMS, KEYS)
        acc = tl.dot(tl.where(kept, p, 0.0).to(v.dtype), v, acc * shrink[:, None])
        top = higher
    return acc, total, top


@triton.jit(do_not_specialize=_PLAIN)  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    seed_ptr,
    columns_ptr,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    heads,
    queries,
    keys,
    scale,
    first_query,
    kept_below,
    gain,
    first_row,
    batch_rows,
    head_rows,
    all_rows,
    salt0,
    salt1,
    CAUSAL: tl.constexpr,
    REPEAT: tl.constexpr,
    WIDTH: tl.constexpr,
    DIMS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    blocks = tl.cdiv(queries, QUERIES)
    pair = tl.program_id(0) // blocks
    # under a causal mask the last queries, which see most, begin
    first = (blocks - 1 - tl.program_id(0) % blocks) * QUERIES
    batch, head = tl.cast(pair // heads, tl.int64), pair % heads
    k_ptr += batch * k_batch + tl.cast(head // REPEAT, tl.int64) * k_head
    v_ptr += batch * v_batch + tl.cast(head // REPEAT, tl.int64) * v_head
    q_ptr += batch * q_batch + tl.cast(head, tl.int64) * q_head
    q = _rows(q_ptr, first, queries, q_row, WIDTH, DIMS, QUERIES)
    rows = first + tl.arange(0, QUERIES)
    key0, _ = _hash_keys(seed_ptr, salt0, salt1)
    base = first_row + (pair // heads) * batch_rows + head * head_rows
    row_hash = _mix((base + tl.load(seed_ptr + 1) * all_rows + rows) ^ key0)
    seen_to = first_query + rows
    stop = keys
    whole = keys // KEYS * KEYS
    if CAUSAL:
        stop = tl.minimum(keys, first_query + first + QUERIES)
        whole = tl.minimum(keys, first_query + first + 1) // KEYS * KEYS
    acc = tl.zeros([QUERIES, DIMS], tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    top = tl.full([QUERIES], float("-inf"), tl.float32)
    log2_scale = scale * _LOG2E
    acc, total, top = _attend(
        acc, total, top, q, k_ptr, v_ptr, k_row, v_row, 0, whole, keys, seen_to, log2_scale,
        row_hash, columns_ptr, kept_below, False, CAUSAL, WIDTH, DIMS, KEYS,
    )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, q, k_ptr, v_ptr, k_row, v_row, whole, stop, keys, seen_to, log2_scale,
        row_hash, columns_ptr, kept_below, True, CAUSAL, WIDTH, DIMS, KEYS,
    )  # fmt: skip
    out = acc * (gain / total)[:, None]
    _store_rows(out_ptr, out, batch, head, heads, first, queries, WIDTH, DIMS, QUERIES)
    lse = top * _LN2 + tl.log(total)
    tl.store(lse_ptr + tl.cast(pair, tl.int64) * queries + rows, lse, mask=rows < queries)


@triton.jit  # type: ignore[untyped-decorator]
def _towards_queries(  # type: ignore[no-untyped-def]
    dq,
    q,
    dout,
    k_ptr,
    v_ptr,
    k_row,
    v_row,
    start,
    stop,
    keys,
    seen_to,
    log2_scale,
    log2_lse,
    delta,
    row_hash,
    columns_ptr,
    kept_below,
    gain,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WIDTH: tl.constexpr,
    DIMS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """dq / scale of the keys from start to stop is added."""
    for first in range(start, stop, KEYS):
        k = _rows(k_ptr, first, keys, k_row, WIDTH, DIMS, KEYS)
        v = _rows(v_ptr, first, keys, v_row, WIDTH, DIMS, KEYS)
        s = tl.dot(q, tl.trans(k)) * log2_scale
        columns = first + tl.arange(0, KEYS)
        column_hash = tl.load(columns_ptr + columns, mask=columns < keys, other=0)
        if MASKED:
            seen = (columns < keys)[None, :]
            if CAUSAL:
                seen = seen & (columns[None, :] <= seen_to[:, None])
            s = tl.where(seen, s, float("-inf"))
        p = tl.exp2(s - log2_lse[:, None])
        kept = _mix(row_hash[:, None] ^ column_hash[None, :]) < kept_below
        dp = tl.where(kept, tl.dot(dout, tl.trans(v)) * gain, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq)
    return dq


@triton.jit(do_not_specialize=_PLAIN)  # type: ignore[untyped-decorator]
def _dq(  # type: ignore[no-untyped-def]
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    hash_ptr,
    dq_ptr,
    seed_ptr,
    columns_ptr,
    dout_batch,
    dout_head,
    dout_row,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    out_batch,
    out_head,
    out_row,
    heads,
    queries,
    keys,
    scale,
    first_query,
    kept_below,
    gain,
    first_row,
    batch_rows,
    head_rows,
    all_rows,
    salt0,
    salt1,
    CAUSAL: tl.constexpr,
    REPEAT: tl.constexpr,
    WIDTH: tl.constexpr,
    DIMS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    blocks = tl.cdiv(queries, QUERIES)
    pair = tl.program_id(0) // blocks
    first = (blocks - 1 - tl.program_id(0) % blocks) * QUERIES  # as in _forward
    batch, head = tl.cast(pair // heads, tl.int64), pair % heads
    k_ptr += batch * k_batch + tl.cast(head // REPEAT, tl.int64) * k_head
    v_ptr += batch * v_batch + tl.cast(head // REPEAT, tl.int64) * v_head
    q_ptr += batch * q_batch + tl.cast(head, tl.int64) * q_head
    dout_ptr += batch * dout_batch + tl.cast(head, tl.int64) * dout_head
    out_ptr += batch * out_batch + tl.cast(head, tl.int64) * out_head
    q = _rows(q_ptr, first, queries, q_row, WIDTH, DIMS, QUERIES)
    dout = _rows(dout_ptr, first, queries, dout_row, WIDTH, DIMS, QUERIES)
    out = _rows(out_ptr, first, queries, out_row, WIDTH, DIMS, QUERIES)
    rows = first + tl.arange(0, QUERIES)
    row = tl.cast(pair, tl.int64) * queries + rows
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + row, delta, mask=rows < queries)
    log2_lse = tl.load(lse_ptr + row, mask=rows < queries, other=0.0) * _LOG2E
    key0, _ = _hash_keys(seed_ptr, salt0, salt1)
    base = first_row + (pair // heads) * batch_rows + head * head_rows
    row_hash = _mix((base + tl.load(seed_ptr + 1) * all_rows + rows) ^ key0)
    tl.store(hash_ptr + row, row_hash, mask=rows < queries)
    seen_to = first_query + rows
    stop = keys
    whole = keys // KEYS * KEYS
    if CAUSAL:
        stop = tl.minimum(keys, first_query + first + QUERIES)
        whole = tl.minimum(keys, first_query + first + 1) // KEYS * KEYS
    dq = tl.zeros([QUERIES, DIMS], tl.float32)
    log2_scale = scale * _LOG2E
    dq = _towards_queries(
        dq, q, dout, k_ptr, v_ptr, k_row, v_row, 0, whole, keys, seen_to, log2_scale, log2_lse,
        delta, row_hash, columns_ptr, kept_below, gain, False, CAUSAL, WIDTH, DIMS, KEYS,
    )  # fmt: skip
    dq = _towards_queries(
        dq, q, dout, k_ptr, v_ptr, k_row, v_row, whole, stop, keys, seen_to, log2_scale, log2_lse,
        delta, row_hash, columns_ptr, kept_below, gain, True, CAUSAL, WIDTH, DIMS, KEYS,
    )  # fmt: skip
    _store_rows(dq_ptr, dq * scale, batch, head, heads, first, queries, WIDTH, DIMS, QUERIES)


@triton.jit  # type: ignore[untyped-decorator]
def _towards_keys(  # type: ignore[no-untyped-def]
    dk,
    dv,
    k,
    v,
    q_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    hash_ptr,
    q_row,
    dout_row,
    start,
    stop,
    queries,
    first_query,
    columns,
    log2_scale,
    column_hash,
    kept_below,
    gain,
    MASKED: tl.constexpr,
    WIDTH: tl.constexpr,
    DIMS: tl.constexpr,
    QUERIES: tl.constexpr,
):
    """dk / scale and dv / gain of the queries from start to stop are added. What lies beyond the
    last query is zero, and what lies beyond the last key is not stored."""
    for first in range(start, stop, QUERIES):
        rows = first + tl.arange(0, QUERIES)
        q = _rows(q_ptr, first, queries, q_row, WIDTH, DIMS, QUERIES)
        dout = _rows(dout_ptr, first, queries, dout_row, WIDTH, DIMS, QUERIES)
        log2_lse = tl.load(lse_ptr + rows, mask=rows < queries, other=0.0) * _LOG2E
        delta = tl.load(delta_ptr + rows, mask=rows < queries, other=0.0)
        p = tl.exp2(tl.dot(k, tl.trans(q)) * log2_scale - log2_lse[None, :])  # [KEYS, QUERIES]
        if MASKED:
            p = tl.where(columns[:, None] <= (first_query + rows)[None, :], p, 0.0)
        row_hash = tl.load(hash_ptr + rows, mask=rows < queries, other=0)
        kept = _mix(column_hash[:, None] ^ row_hash[None, :]) < kept_below
        dv = tl.dot(tl.where(kept, p, 0.0).to(dout.dtype), dout, dv)
        dp = tl.where(kept, tl.dot(v, tl.trans(dout)) * gain, 0.0)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=("kept_below",))  # type: ignore[untyped-decorator]
def _dkv(  # type: ignore[no-untyped-def]
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,
    delta_ptr,
    hash_ptr,
    dk_ptr,
    dv_ptr,
    columns_ptr,
    dout_batch,
    dout_head,
    dout_row,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    heads,
    queries,
    keys,
    scale,
    first_query,
    kept_below,
    gain,
    CAUSAL: tl.constexpr,
    REPEAT: tl.constexpr,
    WIDTH: tl.constexpr,
    DIMS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    blocks = tl.cdiv(keys, KEYS)
    first = tl.program_id(0) % blocks * KEYS
    groups = heads // REPEAT
    batch, group = tl.program_id(0) // blocks // groups, tl.program_id(0) // blocks % groups
    wide_batch = tl.cast(batch, tl.int64)
    k_ptr += wide_batch * k_batch + tl.cast(group, tl.int64) * k_head
    v_ptr += wide_batch * v_batch + tl.cast(group, tl.int64) * v_head
    k = _rows(k_ptr, first, keys, k_row, WIDTH, DIMS, KEYS)
    v = _rows(v_ptr, first, keys, v_row, WIDTH, DIMS, KEYS)
    columns = first + tl.arange(0, KEYS)
    column_hash = tl.load(columns_ptr + columns, mask=columns < keys, other=0)
    start = 0
    whole = 0  # from here on queries see all keys of the block
    if CAUSAL:
        start = tl.maximum(first - first_query, 0) // QUERIES * QUERIES
        whole = tl.cdiv(tl.maximum(first + KEYS - 1 - first_query, 0), QUERIES) * QUERIES
        whole = tl.minimum(whole, queries)
    dk = tl.zeros([KEYS, DIMS], tl.float32)
    dv = tl.zeros([KEYS, DIMS], tl.float32)
    log2_scale = scale * _LOG2E
    for member in range(0, REPEAT):
        head = group * REPEAT + member
        wide_head = tl.cast(head, tl.int64)
        q_head_ptr = q_ptr + wide_batch * q_batch + wide_head * q_head
        dout_head_ptr = dout_ptr + wide_batch * dout_batch + wide_head * dout_head
        row = (wide_batch * heads + head) * queries
        if CAUSAL:
            dk, dv = _towards_keys(
                dk, dv, k, v, q_head_ptr, dout_head_ptr, lse_ptr + row, delta_ptr + row,
                hash_ptr + row, q_row, dout_row, start, whole, queries, first_query, columns,
                log2_scale, column_hash, kept_below, gain, True, WIDTH, DIMS, QUERIES,
            )  # fmt: skip
        dk, dv = _towards_keys(
            dk, dv, k, v, q_head_ptr, dout_head_ptr, lse_ptr + row, delta_ptr + row,
            hash_ptr + row, q_row, dout_row, whole, queries, queries, first_query, columns,
            log2_scale, column_hash, kept_below, gain, False, WIDTH, DIMS, QUERIES,
        )  # fmt: skip
    _store_rows(dk_ptr, dk * scale, batch, group, groups, first, keys, WIDTH, DIMS, KEYS)
    _store_rows(dv_ptr, dv * gain, batch, group, groups, first, keys, WIDTH, DIMS, KEYS)
