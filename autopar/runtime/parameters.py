"""Parameters and buffers of one rank: which it keeps, under which names, and their first values.

A parameter lives on the ranks of the stage that owns it, sharded as its placement at rest says,
under the model's own names (tied ones too). What no operator reads lives replicated on stage 0, so
that no name of the model is lost. Values come one whole tensor at a time and are cut at once: a
model on meta is never whole anywhere.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autopar.errors import OptionError, PlanError
from autopar.layout import Dims, Layout, raw_dims, replicated
from autopar.lowering.lower import LoweredPlan, LoweredStage
from autopar.mesh import LogicalMesh
from autopar.runtime.host import HOST, to_host
from autopar.runtime.inputs import local_part

# name, whole shape -> the whole value. Called for one parameter or buffer at a time.
Initialiser = Callable[[str, tuple[int, ...]], Tensor]


@dataclass(frozen=True, slots=True)
class KeptParameter:
    """A parameter that the ranks of a stage keep.

    stage: its index. names: its own first, then tied ones. key: the stage's input that it feeds, ""
    if none does. host: it rests in the memory of the device's host.
    """

    stage: int
    names: tuple[str, ...]
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    dims: Dims
    rest: Layout
    host: bool = False


@dataclass(frozen=True, slots=True)
class KeptBuffer:
    """keys: the inputs that it feeds, with the stages that have them."""

    name: str
    keys: tuple[tuple[int, str], ...]
    persistent: bool


def tied_names(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Canonical name of each parameter -> all its names, the canonical one first."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {group[0]: tuple(group) for group in names.values()}


def kept_parameters(
    model: nn.Module, lowered: LoweredPlan, stages: Sequence[LoweredStage]
) -> tuple[KeptParameter, ...]:
    """Those of the stages of one worker, in the model's order. PlanError where the plan owns what
    the model does not have."""
    owned = {
        p.owner: (stage.index, p)
        for stage in stages
        for p in stage.parameters
        if p.owned and p.source == p.name
    }
    read = {p.owner for s in lowered.stages for p in s.parameters}
    values = dict(model.named_parameters(remove_duplicate=False))
    kept = []
    for owner, names in tied_names(model).items():
        value = values[owner]
        shape, grad = tuple(value.shape), value.requires_grad
        if owner in owned:
            stage, p = owned.pop(owner)
            placed = (p.name, shape, p.rest_meta.dtype, grad, p.dims, p.rest, p.host)
            kept.append(KeptParameter(stage, names, *placed))
        elif owner not in read and stages[0].index == 0:
            rest = replicated(stages[0].mesh.num_axes)
            dims = raw_dims(shape)
            kept.append(KeptParameter(0, names, "", shape, value.dtype, grad, dims, rest))
    if owned:
        raise PlanError(f"the plan places {sorted(owned)}, which the model does not have")
    return tuple(kept)


def kept_buffers(
    model: nn.Module, lowered: LoweredPlan, stages: Sequence[LoweredStage]
) -> tuple[KeptBuffer, ...]:
    """Those that the programs of a worker's stages read; stage 0 also has those that nothing
    reads."""
    keys: dict[str, list[tuple[int, str]]] = {}
    for stage in stages:
        for key, path in stage.buffers.items():
            keys.setdefault(path, []).append((stage.index, key))
    read = {path for s in lowered.stages for path in s.buffers.values()}
    kept = []
    for name, _ in model.named_buffers(remove_duplicate=False):
        if name in keys or (name not in read and stages[0].index == 0):
            path, _, leaf = name.rpartition(".")
            persistent = leaf not in model.get_submodule(path)._non_persistent_buffers_set
            kept.append(KeptBuffer(name, tuple(keys.get(name, ())), persistent))
    return tuple(kept)


def shard_of(
    kept: KeptParameter, mesh: LogicalMesh, rank: int, whole: Tensor, device: torch.device
) -> Tensor:
    """The part of a rank of the stage's mesh, in memory of its own: on the device, or on its host
    if it rests there. PlanError on a value of another shape."""
    if tuple(whole.shape) != kept.shape:
        raise PlanError(
            f"parameter {kept.names[0]!r} has shape {kept.shape}, its value {tuple(whole.shape)}"
        )
    coords = mesh.coordinates(rank)
    part = local_part(whole.detach(), kept.dims, kept.rest, mesh, coords)
    home = HOST if kept.host else device
    shard = part.to(device=home, dtype=kept.dtype, copy=True).contiguous()
    return to_host(shard, device) if kept.host else shard


def model_values(model: nn.Module, initialiser: Initialiser | None, seed: int) -> Initialiser:
    """Where first values come from: the model, or for what it has on meta the initialiser; without
    one, the model's own initialisation, module by module under a fixed seed."""
    state: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    state.update(model.named_buffers(remove_duplicate=False))
    fallback = initialiser or _module_initialiser(model, seed)

    def value(name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = state[name]
        return fallback(name, shape) if tensor.is_meta else tensor.detach()

    return value


def _module_initialiser(model: nn.Module, seed: int) -> Initialiser:
    """Each module on the CPU alone, filled by its own `reset_parameters`, or by the `_init_weights`
    of the whole model where it has one (Hugging Face). The last module is kept for its next
    tensor."""
    last: dict[str, Mapping[str, Tensor]] = {}

    def value(name: str, shape: tuple[int, ...]) -> Tensor:
        path, _, leaf = name.rpartition(".")
        if path not in last:
            last.clear()
            last[path] = _initialised(model, path, seed)
        tensor = last[path][leaf]
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise OptionError(
                f"{name!r} is on meta and {type(model.get_submodule(path)).__name__} has no"
                " reset_parameters that fills it: pass initialiser=lambda name, shape: ..., or"
                " build the model on the CPU"
            )
        return tensor

    return value


def _initialised(model: nn.Module, path: str, seed: int) -> dict[str, Tensor]:
    """The tensors of one module, without its children."""
    module = copy.copy(model.get_submodule(path))
    module._modules = {}
    module._parameters = {
        k: None if p is None else nn.Parameter(_unset(p), requires_grad=p.requires_grad)
        for k, p in module._parameters.items()
    }
    module._buffers = {k: None if b is None else _unset(b) for k, b in module._buffers.items()}
    reset = getattr(module, "reset_parameters", None)
    whole_model_reset = getattr(model, "_init_weights", None)
    digest = hashlib.sha256(f"{seed} {path}".encode()).digest()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(int.from_bytes(digest[:6], "big"))
        if whole_model_reset is not None:
            whole_model_reset(module)
        elif reset is not None:
            reset()
    tensors = {k: p.detach() for k, p in module._parameters.items() if p is not None}
    tensors.update((k, b) for k, b in module._buffers.items() if b is not None)
    return tensors


def _unset(tensor: Tensor) -> Tensor:
    """Room for a value on the CPU; NaN where nobody has written."""
    if not tensor.is_meta:
        return tensor.detach().clone()
    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return empty.fill_(float("nan")) if tensor.is_floating_point() else empty.zero_()
