"""A parameter between steps: its shard, its gradient, and the tensors in which a user sees both."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autopar.errors import InternalError
from autopar.layout import REPLICATE, to_placements
from autopar.mesh import LogicalMesh
from autopar.ops.wide_sum import add_wide
from autopar.runtime.comm import RankComm
from autopar.runtime.gradients import as_gradient, as_made, is_open
from autopar.runtime.inputs import valid_part
from autopar.runtime.parameters import KeptParameter, shard_of
from autopar.runtime.strides import with_strides


class RestingParameter:
    """One parameter of one rank, registered under all of its names. What is the same in every step
    is found out once."""

    def __init__(
        self,
        kept: KeptParameter,
        whole: Tensor,
        root: nn.Module,
        *,
        mesh: LogicalMesh,
        rank: int,
        device: torch.device,
        comm: RankComm | None,
    ) -> None:
        """whole: its value. root: the module that has the model's names. mesh: of its stage. comm:
        None where there are no processes; parameters are plain tensors then."""
        self.kept = kept
        self._mesh, self._rank, self._device = mesh, rank, device
        self._coordinates = mesh.coordinates(rank)
        self._shard = shard_of(kept, mesh, rank, whole, device)
        self._local = self._valid(self._shard)
        visible = self._shard
        if comm is not None:
            visible = DTensor.from_local(
                self._local,
                (comm.host_meshes if kept.host else comm.meshes)[kept.stage],
                to_placements(kept.dims, kept.rest, mesh.axis_sizes),
                run_check=False,
                shape=torch.Size(kept.shape),
                stride=torch.empty(kept.shape, device="meta").stride(),
            )
        parameter = nn.Parameter(visible, requires_grad=kept.requires_grad)
        places = [scope_of(root, name) for name in kept.names]
        for scope, leaf in places:
            scope._parameters[leaf] = parameter
        self._scope, self._leaf = places[0]
        self._lent = False
        self._open: weakref.ref[Tensor] | None = None  # made by the last step, with an addend
        # of the last step, if it lent it: (what came, what `.grad` became)
        self._seen: tuple[Tensor, Tensor] | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """As it is now in the module."""
        found = self._scope._parameters[self._leaf]
        if found is None:
            raise InternalError(f"{self.kept.names[0]!r} is not a parameter of this rank")
        return found

    @property
    def gradient(self) -> Tensor | None:
        """This rank's part."""
        gradient = self.parameter.grad
        return None if gradient is None else local_tensor(gradient)

    @property
    def counts_here(self) -> bool:
        """Whether this rank's shard is the first of its replicas."""
        placed = zip(self._coordinates, self.kept.rest, strict=True)
        return all(place == 0 for place, placement in placed if placement == REPLICATE)

    def at_rest(self) -> Tensor:
        """The shard with its padding. A parameter whose memory was replaced, by `parameter.data =
        ..` say, is copied back. Pre: no autograd."""
        local = local_tensor(self.parameter)
        if local.data_ptr() != self._local.data_ptr():
            self._local.copy_(local)
        return self._shard

    def add_gradient(
        self, shard: Tensor, *, addend: Tensor | None = None, lent: bool = False
    ) -> None:
        """A gradient at rest, with its padding, to `.grad`, as autograd does. addend: what is to be
        added to it, in memory of the next step's; lent: that memory is its own. `keep_gradient` is
        called before that step. Pre: no autograd."""
        parameter = self.parameter
        gradient = parameter.grad
        value, other = self._valid(shard), None if addend is None else self._valid(addend)
        if gradient is not None:
            local = local_tensor(gradient)
            # the two first: ranks with the same parameter have each the other's part as addend
            local.add_(value if other is None else add_wide(value, other, torch.empty_like(local)))
        elif other is not None:
            parameter.grad = as_gradient(value, parameter, other)
            self._open = weakref.ref(parameter.grad)
        else:
            parameter.grad = self._as_gradient(shard, parameter, lent=lent)
            self._lent = lent

    def keep_gradient(self) -> None:
        """Copies what was lent, if the user still has it as `.grad`, and adds what is to be added,
        if anybody has the gradient. Pre: no autograd."""
        parameter = self.parameter
        if self._lent and parameter.grad is not None:
            made = as_made(parameter.grad)
            parameter.grad = as_gradient(made.value.clone(), parameter)
        self._lent = False
        for gradient in (parameter.grad, None if self._open is None else self._open()):
            if gradient is not None and is_open(gradient):
                local_tensor(gradient)
        self._open = None

    def load(self, whole: Tensor) -> None:
        """Takes this rank's part of a value."""
        shard = shard_of(self.kept, self._mesh, self._rank, whole, self._device)
        local_tensor(self.parameter).copy_(self._valid(shard))

    def _as_gradient(self, shard: Tensor, parameter: Tensor, *, lent: bool) -> Tensor:
        """In the form of the parameter, with strides that optimizers want."""
        if lent and self._seen is not None and self._seen[0] is shard:
            return self._seen[1]
        if shard.dtype is not self._shard.dtype:  # and in the strides in which it was made
            return as_gradient(self._valid(shard), parameter)
        laid_out = with_strides(shard, self._shard.stride())
        gradient = as_gradient(self._valid(laid_out), parameter)
        shares = laid_out.data_ptr() == shard.data_ptr()
        self._seen = (shard, gradient) if lent and shares else None
        return gradient

    def _valid(self, shard: Tensor) -> Tensor:
        return valid_part(shard, self.kept.dims, self.kept.rest, self._mesh, self._coordinates)


def scope_of(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a dotted name, made where it is missing, and the last part of the name.
    Written past `add_module`, so that a model may use the names of the root's methods."""
    *path, leaf = name.split(".")
    module = root
    for part in path:
        child = module._modules.get(part)
        if child is None:
            child = module._modules[part] = nn.Module()
        module = child
    return module, leaf


def local_tensor(tensor: Tensor) -> Tensor:
    """Without a copy. Pre: no autograd."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
