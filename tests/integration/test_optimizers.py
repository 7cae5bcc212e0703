"""A fused step of AdamW on gradients of a mesh: our kernel takes what it fits, torch's the rest."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from autopar.ops import adamw
from autopar.runtime.comm import World
from autopar.runtime.gradients import Gradient, as_gradient
from autopar.runtime.launch import run_processes

SHAPES = [(4, 3), (5,), (2, 6)]
STEPS = 3


def _kernel(*lists: Sequence[Tensor], **rates: float) -> None:
    """What it does on a GPU."""
    *four, steps, addends = map(list, lists)
    assert addends == [None] * len(steps)
    torch._fused_adamw_(*four, [], steps, amsgrad=False, maximize=False, **rates)


def train(
    on_mesh: Callable[[Tensor], Tensor], fits: Callable[..., bool], **options: Any
) -> tuple[list[Tensor], list[int]]:
    """Parameters after some steps; of how many parameters the steps of the kernel were."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(on_mesh(torch.randn(shape))) for shape in SHAPES]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True, **options)
    sizes: list[int] = []

    def kernel(*lists: Sequence[Tensor], **rates: float) -> None:
        sizes.append(len(lists[0]))
        _kernel(*lists, **rates)

    with patch.object(adamw, "fits", fits), patch.object(adamw, "adamw", kernel):
        for _ in range(STEPS):
            for p in parameters:
                local = p.to_local() if isinstance(p, DTensor) else p
                p.grad = as_gradient(torch.randn(p.shape)[: len(local)].clone(), p)
            optimizer.step()
    return [getattr(p, "to_local", lambda p=p: p)().detach() for p in parameters], sizes


def of_two_dims(*lists: Sequence[Tensor]) -> bool:
    return all(p.ndim == 2 for p in lists[0])


def on_a_mesh(world: World) -> None:
    mesh = init_device_mesh("cpu", (1,))
    for placement in (Replicate(), Shard(0)):

        def place(x: Tensor, placement: Replicate | Shard = placement) -> Tensor:
            return DTensor.from_local(x, mesh, [placement], run_check=False)

        want, _ = train(lambda x: x, lambda *_: False)
        for fits, expected in (
            (lambda *_: True, [3] * STEPS),
            (of_two_dims, [2] * STEPS),
            (lambda *_: False, []),
        ):
            got, sizes = train(place, fits)
            assert sizes == expected
            torch.testing.assert_close(got, want, rtol=0, atol=0)
        want, _ = train(lambda x: x, lambda *_: False, amsgrad=True)
        got, sizes = train(place, lambda *_: True, amsgrad=True)
        assert not sizes
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        found = place(torch.ones(2))
        check_scaled(found)
        parameter = nn.Parameter(found)
        gradient = as_gradient(torch.ones(2), parameter)
        with pytest.raises(RuntimeError, match="leaf"):
            torch._foreach_add_([parameter], [gradient])
        with torch.no_grad():
            torch._foreach_add_([parameter], [gradient])
        total = parameter.to_local().sum()
        assert float(total) == pytest.approx(2 * (1 - 0.1) + 2)


def check_scaled(parameter: Tensor) -> None:
    """Steps of a gradient scaler are torch's."""
    gradient = as_gradient(torch.ones(2), parameter)
    averages = [torch.zeros_like(parameter) for _ in range(2)]
    rates = {"lr": 0.1, "beta1": 0.9, "beta2": 0.9, "weight_decay": 0.0, "eps": 1e-8}
    with torch.no_grad(), patch.object(adamw, "fits", lambda *_: True):
        torch._fused_adamw_(
            [parameter],
            [gradient],
            averages[:1],
            averages[1:],
            [],
            [torch.ones(())],
            **rates,
            amsgrad=False,
            maximize=False,
            found_inf=torch.zeros(()),
        )  # the kernel would fail on a CPU


def test_of_each_parameter() -> None:
    run_processes(on_a_mesh, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_takes_shards() -> None:
    run_processes(on_a_gpu, 1, device_type="cuda")


def on_a_gpu(world: World) -> None:
    mesh = init_device_mesh("cuda", (1,))
    parameter = nn.Parameter(
        DTensor.from_local(torch.ones(64, device="cuda"), mesh, [Shard(0)], run_check=False)
    )
    optimizer = torch.optim.AdamW([parameter], fused=True)
    parameter.grad = as_gradient(torch.ones(64, device="cuda"), parameter)
    with patch.object(adamw, "adamw", wraps=adamw.adamw) as kernel:
        optimizer.step()
    assert kernel.call_count == 1


class Reading:
    """What users and torch do with a gradient, as values that compare."""

    @staticmethod
    def local(g: DTensor) -> Tensor:
        return g.to_local()

    @staticmethod
    def whole(g: DTensor) -> Tensor:
        return g.full_tensor()

    @staticmethod
    def sum(g: DTensor) -> Tensor:
        return (g + g).full_tensor()

    @staticmethod
    def detached(g: DTensor) -> Tensor:
        return g.detach().clone().to_local()

    @staticmethod
    def copied(g: DTensor) -> Tensor:
        """One copy of what is mentioned twice; the original stays as it is."""
        twice = copy.deepcopy([g, g])
        twice[0].mul_(2)
        return torch.cat([twice[1].to_local(), g.to_local()])

    @staticmethod
    def scaled_in_place(g: DTensor) -> Tensor:
        g.mul_(2)
        return g.to_local()

    @staticmethod
    def scaled_as_a_list(g: DTensor) -> Tensor:
        torch._foreach_mul_([g], 2.0)
        return g.to_local()

    @staticmethod
    def moved(g: DTensor) -> Tensor:
        return g.redistribute(g.device_mesh, [Replicate()]).to_local()

    @staticmethod
    def saved(g: DTensor) -> Tensor:
        file = io.BytesIO()
        torch.save(g, file)
        file.seek(0)
        with torch.serialization.safe_globals([Gradient]):
            return torch.load(file, weights_only=False).to_local()

    @staticmethod
    def added_to_after_inference(g: DTensor) -> Tensor:
        with torch.inference_mode():
            g.to_local().sum()
        g.to_local().add_(1)
        return g.to_local()

    @staticmethod
    def norm(g: DTensor) -> Tensor:
        return torch.nn.utils.get_total_norm([g]).full_tensor()

    @staticmethod
    def text(g: DTensor) -> Tensor:
        return torch.tensor(bytearray(str(g), "utf-8"))

    @staticmethod
    def flattened(g: DTensor) -> Tensor:
        names, _ = g.__tensor_flatten__()
        return getattr(g, names[0])


READINGS = [name for name in vars(Reading) if not name.startswith("_")]
IMAGES = (6, 4, 3, 3)


def read_narrow_gradients(world: World) -> None:
    """A gradient in bfloat16 with channels last is what it would be in its parameter's form."""
    mesh = init_device_mesh("cpu", (world.size,))
    narrow = torch.randn(IMAGES).bfloat16().to(memory_format=torch.channels_last)
    for placement in (Replicate(), Shard(0)):
        for name in READINGS:
            found = []
            for made in (narrow, narrow.float().contiguous()):
                local = torch.zeros(IMAGES)
                on_mesh = DTensor.from_local(local, mesh, [placement], run_check=False)
                parameter = nn.Parameter(on_mesh)
                parameter.grad = as_gradient(made.clone(), parameter)
                assert parameter.grad.dtype is torch.float32
                with torch.no_grad():
                    found.append(getattr(Reading, name)(parameter.grad))
                assert torch.equal(local, torch.zeros(IMAGES))
            got, want = found
            assert torch.equal(got, want) and got.stride() == want.stride(), name


def test_narrow_gradients_look_like_others() -> None:
    run_processes(read_narrow_gradients, 1)
