"""What can be sharded: by any number of devices and by those of a cluster, and why not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autopar.graph.capture import capture_graph
from autopar.report.coverage import (
    Coverage,
    Reason,
    coverage_of,
    coverage_record,
    coverage_report,
    replicated,
)
from autopar.report.text import rendered_text
from cost_models import Cluster

ROWS, WIDTH = 6, 6


class Exponential(nn.Module):
    """mean((x exp(w))^2): a matrix exponential has no dim to share, six rows none among five
    devices."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ torch.linalg.matrix_exp(self.w)).square().mean()


@pytest.fixture(scope="module")
def found() -> dict[int, Coverage]:
    graph = capture_graph(Exponential(), torch.ones(ROWS, WIDTH))
    return {
        n: coverage_of("exponential", graph, Cluster.parse(f"cpu:1x{n}") if n else None)
        for n in (0, 2, 4, 5)
    }


def reasons(coverage: Coverage) -> dict[str, Reason]:
    return {kind.op_name: kind.reason for kind in replicated(coverage)}


def test_without_a_cluster_any_factor_shards(found: dict[int, Coverage]) -> None:
    coverage = found[0]
    assert reasons(coverage)["aten.linalg_matrix_exp.default"] is Reason.NO_RULE
    assert "aten.mm.default" not in reasons(coverage)
    assert coverage.flops == 2 * 2 * ROWS * WIDTH**2  # forward, and the gradient of exp(w)
    assert coverage.sharded_flops == 1.0
    assert 0 < coverage.sharded_bytes < 1


def test_a_cluster_counts_its_devices(found: dict[int, Coverage]) -> None:
    assert found[2].sharded_flops == 1.0
    assert found[2].device_flops == pytest.approx(1 / 2)
    assert found[4].device_flops == pytest.approx(1 / 4)  # two by two: two dims of a matmul
    assert reasons(found[5])["aten.mm.default"] is Reason.NO_DIVISOR
    assert found[5].device_flops == 1.0


def test_sources_and_shares_are_shown(found: dict[int, Coverage]) -> None:
    text = rendered_text(coverage_report(found[4]), 160)
    assert "test_coverage.py:" in text and Reason.NO_RULE.value in text
    assert "exponential on cpu:1x4" in text and "each of 4 devices does 1/4.00" in text


def test_the_record_adds_up(found: dict[int, Coverage]) -> None:
    record = coverage_record(found[0])
    families = record["families"].values()  # type: ignore[attr-defined]
    assert sum(f["forward"] + f["backward"] for f in families) == record["num_operators"]
    assert sum(f["flops"] for f in families) == record["flops"]
    assert record["device_flops_share"] is None
