"""A step of AdamW over many tensors as one kernel in Triton, for `ops.adamw`.

Tensors are cut into chunks, one for each program. A table on the device says where each tensor
lies, another one which tensor a chunk is of. Both are cached by their contents: a step that finds
all tensors where an earlier one did copies nothing to the device.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Hashable, Sequence
from itertools import accumulate, chain

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]
from torch import Tensor

# The fastest of 17 choices on an H100, for tensors shaped like shards of GPT 1.3B on two: 2.95 TB/s
# of reads and writes. Persistent programs, other blocks and hints for caches were 1 to 3 % slower.
CHUNK = 8192  # elements, a multiple of BLOCK
BLOCK = 2048  # elements that a program reads at once
WARPS = 8
STAGES = 2  # blocks that are on their way

_MOST_TABLES = 256
_COLUMNS = 10
_WIDE = (0, 0)  # in place of a turn: the gradient is in float32

_tables: dict[Hashable, Tensor] = {}  # where tensors lie
_owners: dict[Hashable, Tensor] = {}  # the tensor of each chunk


def step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    averages: Sequence[Tensor],
    squares: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    turns: Sequence[tuple[int, int] | None],
    addends: Sequence[Tensor | None],
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
) -> None:
    """In place, on the current stream of the current device, which the tensors are on. turns: for
    gradients in bfloat16 where their elements lie (`ops.adamw`), None for those in float32.
    addends: what is to be added to gradients in bfloat16, if anything, and lies as they do."""
    device = parameters[0].device
    numels = tuple(map(Tensor.numel, parameters))
    counts = [-(-numel // CHUNK) for numel in numels]
    chunks = sum(counts)
    if not chunks:
        return
    lists = (parameters, gradients, averages, squares, steps)
    addresses = tuple(tuple(map(Tensor.data_ptr, tensors)) for tensors in lists)
    turned = tuple(turn or _WIDE for turn in turns)
    added = tuple(0 if addend is None else addend.data_ptr() for addend in addends)
    # A table is written and read on one stream: none has to wait for another.
    place = (CHUNK, device, torch.cuda.current_stream(device).cuda_stream, numels)
    found = (place, addresses, turned, added)
    table = _tables.get(found)
    if table is None:
        firsts = accumulate(counts[:-1], initial=0)
        values = chain(*addresses, numels, firsts, *zip(*turned, strict=True), added)
        columns = struct.pack(f"{_COLUMNS * len(counts)}q", *values)
        rows = torch.frombuffer(bytearray(columns), dtype=torch.int64).view(_COLUMNS, -1)
        table = _on_device(rows.T.contiguous(), device)
        _keep(_tables, found, table)
    owners = _owners.get(place)
    if owners is None:
        numbers = torch.arange(len(counts), dtype=torch.int32)
        owners = _on_device(numbers.repeat_interleave(torch.tensor(counts)), device)
        _keep(_owners, place, owners)
    _step_kernel[(chunks,)](
        table,
        owners,
        float(lr),
        float(lr * weight_decay),
        float(eps),
        *_shares(beta1),
        *_shares(beta2),
        CHUNK=CHUNK,
        COLUMNS=_COLUMNS,
        BLOCK=BLOCK,
        STAGES=STAGES,
        num_warps=WARPS,
    )


def _on_device(values: Tensor, device: torch.device) -> Tensor:
    """Pinned memory is free for others only once its copy is done."""
    return values.pin_memory().to(device, non_blocking=True)


def _keep(kept: dict[Hashable, Tensor], key: Hashable, table: Tensor) -> None:
    while len(kept) >= _MOST_TABLES:
        del kept[next(iter(kept))]
    kept[key] = table


def _shares(beta: float) -> tuple[float, float, float, float]:
    """What a running average keeps, as a number of 24 bits below beta and the rest, which is not 0:
    an infinite average stays infinite; what it takes; logarithm of beta."""
    kept = max(math.ceil(beta * 2**24) - 1, 0) / 2**24
    return kept, beta - kept, 1.0 - beta, math.log(beta) if beta else float("-inf")


@triton.jit
def _mixed(old, new, kept, kept_too, taken):  # type: ignore[no-untyped-def]
    """A running average: shares of float32 that do not add up to 1 would bias it by their error
    over `taken`."""
    return tl.fma(old, kept, tl.fma(new, taken, old * kept_too))


@triton.jit
def _turned(place, outer, inner):  # type: ignore[no-untyped-def]
    """Where an element of a tensor over [O, outer, inner] lies in one over [O, inner, outer]."""
    first = place // (outer * inner) * (outer * inner)
    a = (place - first) // inner
    b = place - first - a * inner
    return first + b * outer + a


@triton.jit
def _block(kept, gradients, lanes, gradient_lanes, mask, rates):  # type: ignore[no-untyped-def]
    """kept: pointers to parameter, average and square; gradients: to one, or two to be added;
    rates: of `_step_kernel`. A parameter is rounded once."""
    parameter_ptr, average_ptr, square_ptr = kept
    rate, decay, eps, scale, kept1, kept1_too, taken1, kept2, kept2_too, taken2 = rates
    gradient = tl.load(gradients[0] + gradient_lanes, mask=mask).to(tl.float32)
    if len(gradients) == 2:
        gradient += tl.load(gradients[1] + gradient_lanes, mask=mask).to(tl.float32)
    average = tl.load(average_ptr + lanes, mask=mask)
    square = tl.load(square_ptr + lanes, mask=mask)
    parameter = tl.load(parameter_ptr + lanes, mask=mask)
    average = _mixed(average, gradient, kept1, kept1_too, taken1)
    square = _mixed(square, gradient * gradient, kept2, kept2_too, taken2)
    change = tl.div_rn(rate * average, tl.sqrt_rn(square) * scale + eps)
    parameter -= tl.fma(parameter, decay, change)
    tl.store(average_ptr + lanes, average, mask=mask)
    tl.store(square_ptr + lanes, square, mask=mask)
    tl.store(parameter_ptr + lanes, parameter, mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _chunk(  # type: ignore[no-untyped-def]
    kept,
    gradients,
    first,
    count,
    turn,
    rates,
    TURNED: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Elements [first, first + count). Pointers: to the first one, but for a TURNED gradient: to
    the tensor's own."""
    outer, inner = turn
    columns = tl.arange(0, BLOCK)
    whole = count // BLOCK * BLOCK
    for start in tl.range(0, whole, BLOCK, num_stages=STAGES):
        lanes = start + columns
        places = _turned(first + lanes, outer, inner) if TURNED else lanes
        _block(kept, gradients, lanes, places, None, rates)
    if whole < count:
        # A mask that ends at an odd element makes loads and stores of single ones.
        lanes = whole + columns
        places = _turned(first + lanes, outer, inner) if TURNED else lanes
        _block(kept, gradients, lanes, places, lanes < count, rates)


@triton.jit  # type: ignore[untyped-decorator]
def _step_kernel(  # type: ignore[no-untyped-def]
    table_ptr,
    owners_ptr,
    lr,
    decay,
    eps,
    kept1,
    kept1_too,
    taken1,
    log_beta1,
    kept2,
    kept2_too,
    taken2,
    log_beta2,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Rows of the table: addresses of parameter, gradient, average, square and step, number of
    elements, first chunk, the gradient's turn or zeros, address of its addend or 0."""
    FLOAT: tl.constexpr = tl.pointer_type(tl.float32)
    BFLOAT: tl.constexpr = tl.pointer_type(tl.bfloat16)
    chunk = tl.program_id(0)
    row = table_ptr + tl.load(owners_ptr + chunk) * COLUMNS
    first = (chunk - tl.load(row + 6)) * CHUNK
    count = tl.minimum(tl.load(row + 5) - first, CHUNK).to(tl.int32)
    parameter_ptr = tl.multiple_of(tl.load(row).to(FLOAT), 16) + first
    gradient = tl.load(row + 1)
    average_ptr = tl.multiple_of(tl.load(row + 2).to(FLOAT), 16) + first
    square_ptr = tl.multiple_of(tl.load(row + 3).to(FLOAT), 16) + first
    kept = (parameter_ptr, average_ptr, square_ptr)
    done = tl.load(tl.load(row + 4).to(FLOAT)).to(tl.float64)
    outer = tl.load(row + 7).to(tl.int32)
    inner = tl.load(row + 8).to(tl.int32)
    addend = tl.load(row + 9)
    # 1 - beta^t is near 0 for early t.
    rate = tl.div_rn(lr, (1.0 - tl.exp(done * log_beta1)).to(tl.float32))
    scale = tl.div_rn(1.0, tl.sqrt_rn((1.0 - tl.exp(done * log_beta2)).to(tl.float32)))
    rates = (rate, decay, eps, scale, kept1, kept1_too, taken1, kept2, kept2_too, taken2)
    turn = (outer, inner)
    if outer == 0:
        gradients = (tl.multiple_of(gradient.to(FLOAT), 16) + first,)
        _chunk(kept, gradients, 0, count, turn, rates, False, BLOCK, STAGES)
    elif addend != 0:
        one = tl.multiple_of(gradient.to(BFLOAT), 16) + first
        other = tl.multiple_of(addend.to(BFLOAT), 16) + first
        _chunk(kept, (one, other), 0, count, turn, rates, False, BLOCK, STAGES)
    else:
        gradients = (gradient.to(BFLOAT),)
        _chunk(kept, gradients, first.to(tl.int32), count, turn, rates, True, BLOCK, STAGES)
