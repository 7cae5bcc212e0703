"""A parameter between steps: its shard, its gradient, and the tensors in which a user sees both."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autopar.errors import InternalError
from autopar.layout import REPLICATE, to_placements
from autopar.mesh import LogicalMesh
from autopar.runtime.comm import RankComm
from autopar.runtime.gradients import as_gradient, as_made
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

    def add_gradient(self, shard: Tensor, *, lent: bool = False) -> None:
        """A gradient at rest, with its padding, to `.grad`, as autograd does. lent: its memory is
        that of the next step's, before which `keep_gradient` is called. Pre: no autograd."""
        parameter = self.parameter
        gradient = parameter.grad
        if gradient is None:
            parameter.grad = self._as_gradient(shard, parameter, lent=lent)
            self._lent = lent
        else:
            local_tensor(gradient).add_(self._valid(shard))

    def keep_gradient(self) -> None:
        """Copies what was lent, if the user still has it as `.grad`. Pre: no autograd."""
        parameter = self.parameter
        if self._lent and parameter.grad is not None:
            parameter.grad = as_gradient(as_made(parameter.grad).clone(), parameter)
        self._lent = False

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
