"""transformers' expert modules as one `autopar::experts`, whatever implementation a model asks for.

A module of `use_experts_implementation` looks its forward up by `config._experts_implementation`:
"eager" loops over the experts that were hit, which no trace can follow, "grouped_mm" sorts tokens
and slices a grouped matmul by a cumulative histogram, which no rule can shard. Inside
`experts_as_operators` the lookup gives one operator with strategies of its own, for modules whose
mathematics it has; the others keep what they asked for.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import autopar.ops  # noqa: F401  (registers autopar::experts)

# Classes of activations, torch's and transformers', as rows of autopar.ops.experts.ACTIVATIONS.
_ACTIVATIONS: Mapping[str, str] = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
}
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}  # by nn.GELU.approximate


Forward = Callable[..., Tensor]


@contextlib.contextmanager
def experts_as_operators() -> Iterator[None]:
    """Inside, expert modules are traced as `autopar::experts`."""

    def chosen(asked: Forward, _loop: Forward) -> Forward:
        def forward(module: nn.Module, *operands: Any, **named: Any) -> Tensor:
            if named or len(operands) != 3 or not _fits(module):
                return asked(module, *operands, **named)
            return _as_operator(module, *operands)

        return forward

    with _lookup(chosen):
        yield


@contextlib.contextmanager
def experts_in_loops() -> Iterator[None]:
    """Inside, expert modules run their own loop over experts, the only form of theirs that takes
    float64."""
    with _lookup(lambda _asked, loop: loop):
        yield


@contextlib.contextmanager
def _lookup(chosen: Callable[[Forward, Forward], Forward]) -> Iterator[None]:
    """The forward of an expert module is chosen(what it asks for, its own loop). Nothing changes
    where transformers, or its experts interface, is not there."""
    interface: Any = getattr(_interface_module(), "ExpertsInterface", None)
    if not hasattr(interface, "get_interface"):
        yield
        return
    lookup = interface.get_interface

    def get_interface(self: Any, name: str, default: Forward) -> Forward:
        return chosen(lookup(self, name, default), default)

    interface.get_interface = get_interface
    try:
        yield
    finally:
        interface.get_interface = lookup


def _interface_module() -> Any:
    return sys.modules.get("transformers.integrations.moe")


def _fits(module: nn.Module) -> bool:
    """Concatenated gate and up (or up alone), down, a known activation, and nothing else: no bias,
    no gate or norm of the module's own."""
    gated = getattr(module, "has_gate", True)
    own_gate = getattr(type(module), "_apply_gate", None)
    extras = ("has_bias", "has_post_expert_norm", "_is_expert_parallel")
    return (
        _activation(module) is not None
        and not any(getattr(module, name, False) for name in extras)
        and (not gated or own_gate is getattr(_interface_module(), "_default_apply_gate", None))
        and (not gated or getattr(module, "is_concatenated", True))
        and all(
            isinstance(getattr(module, name, None), Tensor) and getattr(module, name).ndim == 3
            for name in ("gate_up_proj" if gated else "up_proj", "down_proj")
        )
    )


def _activation(module: nn.Module) -> str | None:
    act = getattr(module, "act_fn", None)
    if isinstance(act, nn.GELU):
        return _GELUS.get(act.approximate)
    return _ACTIVATIONS.get(type(act).__name__)


def _as_operator(module: nn.Module, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Weights become [E, 1 or 2, F, H] and [E, H, F] by views; under autocast they and x are cast,
    as matmuls' operands are."""
    gated = getattr(module, "has_gate", True)
    up: Tensor = module.gate_up_proj if gated else module.up_proj  # type: ignore[assignment]
    down: Tensor = module.down_proj  # type: ignore[assignment]
    if getattr(module, "is_transposed", False):
        up, down = up.mT, down.mT
    parts = 2 if gated else 1
    up = up.unflatten(1, (parts, up.shape[1] // parts))
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else up.dtype
    rows, up, down = (t.to(dtype) for t in (x.reshape(-1, x.shape[-1]), up, down))
    flat = index.reshape(-1, index.shape[-1])
    out: Tensor = torch.ops.autopar.experts(
        rows, flat, weight.reshape(flat.shape), up, down, str(_activation(module)), 0, up.shape[0]
    )
    return out.reshape(x.shape).to(x.dtype)
