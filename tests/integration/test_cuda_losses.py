"""The kernels of cross-entropy against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autopar.api import parallelize
from autopar.graph.precision import Precision
from autopar.ops.cross_entropy import cross_entropy_backward, cross_entropy_rows
from autopar.options import SearchOptions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

IGNORED = -100
own = torch.ops.autopar


SIZES = [(700, 51200), (300, 128256), (1, 32128), (2000, 40), (17, 16384), (9, 8)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "classes"), SIZES)
def test_it_is_exact_to_rounding(
    rows: int, classes: int, dtype: torch.dtype, in_place: bool
) -> None:
    generator = torch.Generator(device="cuda").manual_seed(rows)
    wide = torch.randn(rows, classes + 8, device="cuda", generator=generator) * 4
    x = wide.to(dtype)[:, :classes]  # rows that do not follow one another at once
    if rows > 2:
        x[1, : classes // 2] = float("-inf")  # a block of classes that are ruled out
    target = torch.randint(classes // 2, classes, (rows,), device="cuda", generator=generator)
    target[rows // 2 + 1 :: 3] = IGNORED
    grad = torch.tensor(0.37 / rows, device="cuda")
    want, want_dx = cross_entropy_rows(grad.double(), x.double(), target, IGNORED)
    beside = wide.to(dtype)[:, classes:].clone()
    if in_place:
        losses, dx = own.cross_entropy_rows_(grad, x, target, IGNORED), x
    else:
        losses, dx = own.cross_entropy_rows(grad, x, target, IGNORED)
        assert dx.is_contiguous()
    torch.testing.assert_close(losses.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dx, want_dx.to(dtype))
    assert x._base is None or torch.equal(x._base[:, classes:], beside)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "classes"), SIZES)
def test_its_parts_are_too(rows: int, classes: int, dtype: torch.dtype) -> None:
    """The classes are a shard, of which half of the targets are not."""
    generator = torch.Generator(device="cuda").manual_seed(rows)
    x = (torch.randn(rows, classes, device="cuda", generator=generator) * 4).to(dtype)
    first = 1000
    target = torch.randint(first - classes, first + classes, (rows,), device="cuda")
    target[::3] = IGNORED
    grad = torch.tensor(-0.37, device="cuda")
    top, total = own.softmax_sums(x)
    lse = (total.log() + top).squeeze(1)
    torch.testing.assert_close(lse.double(), x.double().logsumexp(1), rtol=1e-6, atol=1e-6)
    want = cross_entropy_backward(grad.double(), x.double(), target, lse.double(), IGNORED, first)
    dx = own.cross_entropy_backward(grad, x, target, lse, IGNORED, first)
    torch.testing.assert_close(dx, want.to(dtype))
    own.cross_entropy_backward_(grad, x, target, lse, IGNORED, first)
    assert torch.equal(x, dx)


class Head(nn.Module):
    """A last layer over a vocabulary of an odd size, and its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 256)
        self.head = nn.Linear(256, 5003, bias=False)

    def forward(self, x_RH: Tensor, target_R: Tensor) -> Tensor:
        scores_RV = self.head(self.inner(x_RH))
        return nn.functional.cross_entropy(scores_RV.float(), target_R)


def train(precision: str) -> list[Tensor]:
    torch.manual_seed(0)
    model = Head().to("cuda")
    batch = (torch.randn(1024, 64, device="cuda"), torch.randint(5003, (1024,), device="cuda"))
    parallel = parallelize(
        model,
        batch,
        precision=Precision.parse(precision),
        options=SearchOptions(cache=False),
    )
    optimizer = torch.optim.SGD(parallel.parameters(), lr=2.0)
    losses = []
    for _ in range(8):
        losses.append(parallel.train_step(batch).clone())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def test_odd_vocabularies_train_as_in_float32() -> None:
    want = train("fp32")
    assert want[-1] < 0.98 * want[0]
    torch.testing.assert_close(train("bf16"), want, rtol=2e-3, atol=0.0)
