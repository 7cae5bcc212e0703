"""Which blocks of a model are equal as modules, before anything is traced.

A block is a numbered child of a list (ModuleList, Sequential, any module whose children are
numbered from 0). Its signature is what its forward can depend on: classes, attributes, parameter
shapes and hooks, of the block and of all modules below it. An integer that counts up with the
block, such as transformers' `layer_idx`, is left out and reported: whoever takes two blocks for
equal has to make sure that nothing reads it.
"""

from __future__ import annotations

import enum
import functools
import types
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, enum.Enum)
_REGISTRIES = ("_parameters", "_buffers", "_modules")
_DEPTH = 4  # of objects in objects: further inside only the very same object is equal
Key = tuple[str, str]  # path of a module within the block; attribute
Features = dict[Key, Any]  # an int that its class does not have too, or a text


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks start .. stop - 1 of the list `module` at `path`, equal but for their counters."""

    path: str
    module: nn.Module
    start: int
    stop: int
    counters: frozenset[Key]

    def block(self, number: int) -> nn.Module:
        block = self.module._modules[str(number)]
        assert block is not None
        return block


def equal_runs(model: nn.Module, least: int) -> list[Run]:
    """Runs of at least so many equal blocks in the outermost lists of a model. A list is left out
    where a block shares a parameter or buffer with anything else. O(modules)."""
    shared = frozenset(part for part, count in Counter(_tensors(model)).items() if count > 1)
    runs: list[Run] = []
    for path, module in _lists(model):
        blocks = [block for block in module._modules.values() if block is not None]
        if len(blocks) < least or any(not shared.isdisjoint(_tensors(block)) for block in blocks):
            continue
        features = [_features(block) for block in blocks]
        counters = _counters(features)
        start = 0
        for _, group in groupby(_without(block, counters) for block in features):
            stop = start + sum(1 for _ in group)
            if stop - start >= least:
                runs.append(Run(path, module, start, stop, counters))
            start = stop
    return runs


def _lists(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules with numbered children that lie in no numbered module themselves."""
    names = list(model._modules)
    if names and names == [str(number) for number in range(len(names))]:
        yield path, model
        return
    for name, child in model._modules.items():
        if child is not None and not name.isdigit():
            yield from _lists(child, f"{path}.{name}" if path else name)


def _tensors(module: nn.Module) -> Iterator[int]:
    """ids of all parameters and buffers, once for each name."""
    yield from (id(p) for _, p in module.named_parameters(remove_duplicate=False))
    yield from (id(b) for _, b in module.named_buffers(remove_duplicate=False))


def _features(block: nn.Module) -> Features:
    features: Features = {}
    for path, module in block.named_modules():
        features[path, ""] = str(type(module)) + str(id(type(module)))
        for name, value in vars(module).items():
            if name in _REGISTRIES or "state_dict" in name:
                continue
            if "hooks" in name and isinstance(value, dict):
                value = list(value.values())  # their keys count up over all modules
            counts = type(value) is int and not hasattr(type(module), name)
            features[path, name] = value if counts else _text(value, module, _DEPTH)
        for kind, tensors in (("parameter", module._parameters), ("buffer", module._buffers)):
            for name, tensor in tensors.items():
                features[path, f"{kind} {name}"] = _tensor_text(tensor)
    return features


def _tensor_text(tensor: Tensor | None) -> str:
    if tensor is None:
        return "None"
    meta = f"{tensor.dtype} {tuple(tensor.shape)} {tensor.stride()} {tensor.requires_grad}"
    return f"{type(tensor).__name__} {meta} {tensor.device.type}"


def _text(value: Any, owner: nn.Module, depth: int) -> str:
    """Equal for values that a forward cannot tell apart. Of a plain tensor attribute that is the
    same tensor only, since its data becomes part of the graph."""
    if isinstance(value, (*_PLAIN, type)):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, types.MethodType) and value.__self__ is owner:
        return f"method {id(value.__func__)}"
    if depth and isinstance(value, functools.partial):
        parts = (value.func, value.args, value.keywords)
        return f"partial {_text(parts, owner, depth - 1)}"
    if depth and isinstance(value, Mapping):
        pairs = (f"{key!r}: {_text(item, owner, depth - 1)}" for key, item in value.items())
        return f"{type(value).__name__} {{{', '.join(pairs)}}}"
    if depth and isinstance(value, (list, tuple, set, frozenset)):
        items = [_text(item, owner, depth - 1) for item in value]
        if isinstance(value, (set, frozenset)):
            items.sort()
        return f"{type(value).__name__} [{', '.join(items)}]"
    return f"object {id(value)}"


def _counters(features: Sequence[Features]) -> frozenset[Key]:
    """Integers that grow by one with each block of the list that has them."""
    values: dict[Key, list[tuple[int, int]]] = {}
    for number, block in enumerate(features):
        for key, value in block.items():
            if type(value) is int:
                values.setdefault(key, []).append((number, value))
    return frozenset(
        key
        for key, pairs in values.items()
        if len(pairs) > 1 and len({value - number for number, value in pairs}) == 1
    )


def _without(features: Features, counters: frozenset[Key]) -> Features:
    return {key: value for key, value in features.items() if key not in counters}
