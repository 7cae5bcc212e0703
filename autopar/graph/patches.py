"""Everything that capture changes in torch and transformers while it runs, and puts back after.

This is the only file that knows about versions (torch 2.11 to 2.13, transformers 5.17 to 5.23).
Each context manager replaces one behaviour and says why; all of them restore what they found.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.nn import functional

import autopar.ops  # noqa: F401  (registers autopar::sdpa)
from autopar.graph.autocast import cuda_regions_on_cpu
from autopar.graph.experts import experts_as_operators

aten = torch.ops.aten


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner.name` is `value` inside the block."""
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old)


@contextlib.contextmanager
def capture_patches(model: nn.Module, *, packed_sequences: bool) -> Iterator[None]:
    """All patches below. packed_sequences: the batch itself says where sequences start."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_compiling())
        stack.enter_context(replaced(functional, "scaled_dot_product_attention", traced_sdpa))
        stack.enter_context(experts_as_operators())
        stack.enter_context(replaced(torch, "bincount", traced_bincount))
        stack.enter_context(replaced(torch, "rand", _no_layer_is_dropped(torch.rand)))
        stack.enter_context(_no_activation_checkpointing())
        # torch.distributions would look at the values of its parameters
        stack.enter_context(replaced(Distribution, "_validate_args", False))
        stack.enter_context(_no_key_value_cache(model))
        stack.enter_context(cuda_regions_on_cpu())
        stack.enter_context(_use_lazy_graph_module(True))  # nobody reads the module's Python code
        if not packed_sequences:
            stack.enter_context(_no_packed_sequence_detection())
        yield


def _compiling() -> contextlib.AbstractContextManager[None]:
    """`torch.compiler.is_compiling()` is true: libraries then avoid reading tensor values. The
    exporting flag stays off, since it makes transformers write causal masks out."""
    return replaced(torch.compiler, "_is_compiling_flag", True)


@contextlib.contextmanager
def _no_activation_checkpointing() -> Iterator[None]:
    """Checkpointed functions are called plainly: the plan decides what is recomputed.

    The two implementations are replaced rather than `checkpoint`, which libraries import by name.
    """

    def generator(*_args: Any, **_kwargs: Any) -> Iterator[None]:
        yield

    class Plain:
        @staticmethod
        def apply(function: Callable[..., Any], _preserve: bool, *args: Any) -> Any:
            return function(*args)

    module = torch.utils.checkpoint
    with (
        replaced(module, "CheckpointFunction", Plain),
        replaced(module, "_checkpoint_without_reentrant_generator", generator),
    ):
        yield


@contextlib.contextmanager
def _no_key_value_cache(model: nn.Module) -> Iterator[None]:
    """transformers models build a key-value cache unless told not to: a concatenation per layer
    that training never reads."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    with contextlib.ExitStack() as stack:
        for config in configs.values():
            if getattr(config, "use_cache", None) is True:
                stack.enter_context(replaced(config, "use_cache", False))
        yield


@contextlib.contextmanager
def _no_packed_sequence_detection() -> Iterator[None]:
    """Without position ids in the batch no sequences are packed. transformers cannot see that while
    tracing and would turn every causal mask into an explicit one."""
    masking = sys.modules.get("transformers.masking_utils")
    if masking is None or not hasattr(masking, "find_packed_sequence_indices"):
        yield
        return

    def no_packed_sequences(*_args: Any, **_kwargs: Any) -> None:
        return None

    with replaced(masking, "find_packed_sequence_indices", no_packed_sequences):
        yield


_bincount = torch.bincount


def traced_bincount(values: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
    """`torch.bincount` of values below minlength, which give a result of that size: what routers
    (transformers 5.17) count. The size of any other depends on the values."""
    if minlength == 0:
        return _bincount(values, weights, minlength)
    ones = torch.ones_like(values) if weights is None else weights
    return ones.new_zeros(minlength).scatter_add(0, values, ones)


def _no_layer_is_dropped(rand: Callable[..., Any]) -> Callable[..., Any]:
    """A module that drops layers with probability `layerdrop` draws one number for each and
    branches on it, which no trace can follow. At probability 0 (transformers 5.17 draws even so)
    the outcome is known: the draw is 1."""

    def drawn(*size: Any, **options: Any) -> Any:
        caller = sys._getframe(1).f_locals.get("self")
        one_number = size in ((), ([],), ((),)) and not options
        return (
            1.0
            if one_number and getattr(caller, "layerdrop", None) == 0
            else rand(*size, **options)
        )

    return drawn


def traced_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` as one `autopar::sdpa` or `autopar::sdpa_dropout`, or as
    plain operators where these cannot serve: a mask with gradient, dropout under any mask, or
    inputs that are not four-dimensional."""
    if torch.is_autocast_enabled("cpu"):  # attention runs in the region's type
        narrow = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(narrow), key.to(narrow), value.to(narrow)
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(narrow)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    fits = query.ndim == key.ndim == value.ndim == 4 and key.shape[:2] == value.shape[:2]
    fits = fits and query.shape[0] == key.shape[0] and query.shape[1] % key.shape[1] == 0
    if attn_mask is not None:
        fits = fits and not attn_mask.requires_grad and attn_mask.ndim <= 4
    if fits and attn_mask is None and 0.0 < dropout_p <= 1.0:
        settings = (None, 0, float(dropout_p), [*query.shape[:3]], [0, 0, 0])  # no seed so far
        dropped = torch.ops.autopar.sdpa_dropout(
            query, key, value, is_causal, float(scale), *settings
        )
        return cast(Tensor, dropped[0])
    if not fits or dropout_p > 0.0:
        return _plain_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale)
    bias = None if attn_mask is None else _bias(attn_mask, query)
    out: Tensor = torch.ops.autopar.sdpa(query, key, value, bias, is_causal, float(scale))[0]
    return out


def _plain_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float,
) -> Tensor:
    if query.ndim >= 4 and query.shape[-3] != key.shape[-3]:
        key, value = (_expand_heads(x, query.shape[-3]) for x in (key, value))
    scores = (query * scale) @ key.transpose(-2, -1)
    if mask is not None:
        scores = scores + (_as_bias(mask, query.dtype) if mask.dtype == torch.bool else mask)
    if is_causal:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(above, float("-inf"))
    # A causal row always sees its first key; only a mask can hide a whole row.
    probs = torch.softmax(scores, -1) if mask is None else aten._safe_softmax(scores, -1)
    if dropout_p > 0.0:
        probs = functional.dropout(probs, dropout_p)
    return probs @ value


def _expand_heads(x: Tensor, heads: int) -> Tensor:
    """[.., G, T, D] to [.., H, T, D]: each group's heads are neighbours."""
    groups = heads // x.shape[-3]
    wide = x.unsqueeze(-3).expand(*x.shape[:-2], groups, *x.shape[-2:])
    return wide.reshape(*x.shape[:-3], heads, *x.shape[-2:])


def _bias(mask: Tensor, query: Tensor) -> Tensor:
    """An additive four-dimensional mask; leading dims of size 1 broadcast."""
    bias = _as_bias(mask, query.dtype) if mask.dtype == torch.bool else mask
    return bias.reshape((1,) * (4 - bias.ndim) + tuple(bias.shape))


def _as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """True, "may attend", becomes 0 and False becomes -inf."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -math.inf)
