"""The exchange of rows: mixed precision, static shapes at its ends, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from autopar.errors import VerificationError
from autopar.mesh import LogicalMesh
from autopar.runtime.virtual import VirtualCollectives
from tests.oracles import disagreements, make_sample


@pytest.mark.parametrize("backward", [False, True])
def test_bfloat16_rows_and_float32_weights(backward: bool) -> None:
    """Dtypes of results are the whole operator's, errors those of bfloat16."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    index = torch.randint(8, (16, 2), generator=generator)
    weight = torch.rand(16, 2, generator=generator)
    args = (draw(16, 8), index, weight, draw(8, 2, 4, 8), draw(8, 8, 4), "silu", 0, 8)
    experts = torch.ops.autopar.experts
    target = torch.ops.autopar.experts_backward.default if backward else experts.default
    sample = make_sample(target, (draw(16, 8), *args) if backward else args)
    dtypes = [result.dtype for result in sample.results if result is not None]
    assert dtypes == ([args[i].dtype for i in (0, 2, 3, 4)] if backward else [torch.bfloat16])
    for mesh in (LogicalMesh((4,)), LogicalMesh((2, 2))):
        _, wrong = disagreements(sample, mesh, tolerance=2e-2, generator=generator)
        # summands of a pending sum are larger than the sum, and so is their rounding
        wrong = [w for w in wrong if "+" not in w.strategy.text]
        assert not wrong, str(wrong[0])


def test_rows_go_to_their_coordinate_in_order() -> None:
    """Rank 0 keeps a row, sends two and leaves one behind; rank 1 sends one and keeps none."""
    rows = [torch.arange(4.0).unsqueeze(1), torch.tensor([[9.0]])]
    sends, receives = (
        [torch.tensor([1, 2]), torch.tensor([1, 0])],
        [torch.tensor([1, 1]), torch.tensor([2, 0])],
    )
    collectives = VirtualCollectives(LogicalMesh((2,)))
    got = collectives.exchange(rows, sends, receives, 0)
    assert [t.flatten().tolist() for t in got] == [[0.0, 9.0], [1.0, 2.0]]
    back = collectives.exchange(got, receives, sends, 0)
    assert [t.flatten().tolist() for t in back] == [[0.0, 1.0, 2.0], [9.0]]
    with pytest.raises(VerificationError, match="rank 1 gets runs of"):
        collectives.exchange(rows, sends, [receives[0], torch.tensor([1, 1])], 0)
