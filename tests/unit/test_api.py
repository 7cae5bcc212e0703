"""The public door: names, budgets, microbatches, one process without torchrun."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import autopar
from autopar.api import detect_cluster, microbatch_counts
from autopar.errors import BatchError, NoFeasiblePlan, OptionError, PlanError
from autopar.options import SearchOptions, parse_bytes
from cost_models import Cluster

PUBLIC_NAMES = [
    "AutoparError",
    "Cluster",
    "NoFeasiblePlan",
    "ParallelModel",
    "ParallelPlan",
    "Precision",
    "Remat",
    "ScheduleKind",
    "SearchOptions",
    "Solver",
    "capture_graph",
    "make_plan",
    "parallelize",
    "plan_model",
    "register_rule",
    "simulate",
    "verify_plan",
]


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def squared(outputs: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    return outputs.square().mean()


def test_public_names_are_these_and_resolve() -> None:
    assert sorted(autopar.__all__) == PUBLIC_NAMES
    for name in PUBLIC_NAMES:
        assert getattr(autopar, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = autopar.nonsense


@pytest.mark.parametrize(
    ("text", "size"), [("70GiB", 70 * 2**30), ("1.5 GB", 1.5e9), (1024, 1024.0), ("12", 12.0)]
)
def test_sizes(text: str | float, size: float) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "1.2.3GB", "10 parsecs", "0", -1])
def test_bad_sizes(text: str | float) -> None:
    with pytest.raises(OptionError, match="got"):
        parse_bytes(text)


def test_microbatch_counts_divide_the_rows() -> None:
    batch = torch.zeros(12, 3)
    assert microbatch_counts(batch, SearchOptions()) == (1, 2, 3, 4, 6, 12)
    assert microbatch_counts(batch, SearchOptions(num_microbatches=3)) == (3,)
    assert microbatch_counts(batch, SearchOptions(microbatch_limit=5)) == (1, 2, 3, 4)
    with pytest.raises(OptionError, match="above microbatch_limit 2"):
        SearchOptions(num_microbatches=3, microbatch_limit=2)


def test_rows_that_do_not_divide_are_an_error() -> None:
    with pytest.raises(BatchError, match="12 rows does not divide into 5"):
        autopar.plan_model(
            Tiny(),
            torch.zeros(12, 8),
            Cluster.parse("cpu:1x1"),
            loss_fn=squared,
            options=SearchOptions(num_microbatches=5),
        )


def test_one_process_trains_like_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    torch.manual_seed(0)
    model, batch = Tiny().double(), torch.randn(8, 8, dtype=torch.float64)
    parallel = autopar.parallelize(
        model, batch, loss_fn=squared, device="cpu", cluster="cpu:1x1", memory_budget="1GiB"
    )
    ours = torch.optim.SGD(parallel.parameters(), lr=0.1)
    theirs = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        loss = squared(model(batch), batch)
        loss.backward()
        theirs.step()
        theirs.zero_grad()
        assert torch.allclose(parallel.train_step(batch), loss, rtol=1e-12)
        ours.step()
        ours.zero_grad()
    own = dict(parallel.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.allclose(own[name], parameter, rtol=1e-12), name


def test_a_plan_for_more_devices_than_processes_says_how_to_start_it() -> None:
    model, batch = Tiny(), torch.randn(8, 8)
    plan, _ = autopar.plan_model(model, batch, Cluster.parse("cpu:1x2"), loss_fn=squared)
    with pytest.raises(PlanError, match="torchrun --nproc-per-node 2"):
        autopar.parallelize(model, batch, loss_fn=squared, plan=plan, device="cpu")


def test_a_budget_that_nothing_fits_names_what_binds() -> None:
    with pytest.raises(NoFeasiblePlan, match="GiB"):
        autopar.plan_model(
            Tiny(),
            torch.randn(8, 8),
            Cluster.parse("cpu:1x1"),
            loss_fn=squared,
            memory_budget=100,
        )


def test_detected_cluster_follows_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(detect_cluster(8, 4)) == "cpu:2x4"
