"""Run a model with other tensors in place of its own, and leave it exactly as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

Convert = Callable[[Tensor], Tensor]


@contextlib.contextmanager
def fake_tensors(
    model: nn.Module, mode: FakeTensorMode, dtype_of: Callable[[Tensor], torch.dtype] | None = None
) -> Iterator[None]:
    """Parameters and buffers are fake CPU tensors of the same shape, strides and ties, and of the
    same dtype, or of the one that `dtype_of` gives.

    Fake CPU, never meta: on meta autograd silently loses gradients. A plain tensor attribute keeps
    its data, since it becomes a constant of the graph.
    """

    def fake(tensor: Tensor) -> Tensor:
        with mode:
            copy = fake_like(tensor)
            return copy if dtype_of is None else copy.to(dtype_of(tensor))

    def constant(tensor: Tensor) -> Tensor:
        return (
            fake(tensor) if tensor.is_meta else _on_cpu(tensor)
        )  # capture reports it if it is used

    with _substituted(model, fake, constant):
        yield


@contextlib.contextmanager
def real_on_cpu(module: nn.Module) -> Iterator[None]:
    """Every tensor of the module is on the CPU, with its data."""
    with _substituted(module, _on_cpu, _on_cpu):
        yield


def fake_like(tensor: Tensor) -> Tensor:
    """To be called inside a fake mode: a CPU tensor with the meta of this one, without gradient."""
    return torch.empty_strided(
        tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device="cpu"
    )


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu()


@contextlib.contextmanager
def _substituted(model: nn.Module, state: Convert, attribute: Convert) -> Iterator[None]:
    """Convert each tensor once, so that tied weights stay one object. Restores all attributes, and
    what they hold where they are dicts: parameters, buffers, and hooks, which libraries install in
    a first forward."""
    modules = list(model.modules())
    saved = [
        (dict(vars(m)), {k: dict(v) for k, v in vars(m).items() if isinstance(v, dict)})
        for m in modules
    ]
    memo: dict[int, Tensor] = {}
    try:
        for module in modules:
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = _parameter(parameter, state, memo)
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = _converted(buffer, state, memo)
        for module in modules:
            for name, value in list(module.__dict__.items()):
                if not name.startswith(("_parameters", "_buffers", "_modules")):
                    module.__dict__[name] = _attribute(value, attribute, memo)
        yield
    finally:
        for module, (attributes, contents) in zip(modules, saved, strict=True):
            _refill(module.__dict__, attributes)
            for name, content in contents.items():
                _refill(attributes[name], content)


def _refill(target: dict[str, Any], content: dict[str, Any]) -> None:
    target.clear()
    target.update(content)


def _parameter(parameter: Tensor, convert: Convert, memo: dict[int, Tensor]) -> nn.Parameter:
    if id(parameter) not in memo:
        converted = convert(parameter)
        memo[id(parameter)] = nn.Parameter(converted, requires_grad=parameter.requires_grad)
    known = memo[id(parameter)]
    return known if isinstance(known, nn.Parameter) else nn.Parameter(known)


def _converted(tensor: Tensor, convert: Convert, memo: dict[int, Tensor]) -> Tensor:
    if id(tensor) not in memo:
        memo[id(tensor)] = convert(tensor)
    return memo[id(tensor)]


def _attribute(value: Any, convert: Convert, memo: dict[int, Tensor]) -> Any:
    """A tensor, or a flat list or tuple that holds some (recurrent modules list their weights)."""
    if isinstance(value, Tensor):
        return _converted(value, convert, memo)
    if type(value) in (list, tuple) and any(isinstance(item, Tensor) for item in value):
        return type(value)(
            _converted(item, convert, memo) if isinstance(item, Tensor) else item for item in value
        )
    return value
