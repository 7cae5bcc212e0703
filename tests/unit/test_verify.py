"""Verification finds what it must find: the error measure, and programs made wrong on purpose."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from autopar.api import plan_model
from autopar.errors import OptionError, PlanError
from autopar.graph.numbering import OP_ID
from autopar.options import SearchOptions
from autopar.plan import Remat
from autopar.report.verify import verify_record
from autopar.runtime.interpreter import Shards
from autopar.runtime.simulated import VirtualRun
from autopar.runtime.virtual import VirtualCollectives
from autopar.verify import (
    FLOOR,
    Errors,
    VerifyReport,
    no_dropout,
    relative_errors,
    updated_buffers,
    verify_plan,
    without_dropout,
)
from cost_models import Cluster
from tests.zoo import ZOO

FAST = Cluster.from_toml("tests/clusters/fast_links.toml")


def test_errors_are_relative_to_the_tensor_and_floored_by_the_model() -> None:
    want = {"big": torch.tensor([100.0]), "noise": torch.tensor([1e-9])}
    got = {"big": torch.tensor([101.0]), "noise": torch.tensor([2e-9])}
    errors = relative_errors(got, want)
    assert errors["big"] == pytest.approx(0.01)
    assert errors["noise"] == pytest.approx(1e-9 / (FLOOR * 100.0))


@pytest.mark.parametrize(
    "got",
    [
        {},
        {"a": torch.zeros(3)},
        {"a": torch.tensor([float("nan"), 0.0])},
        {"a": torch.zeros(2), "b": torch.zeros(1)},
    ],
)
def test_missing_misshapen_nan_and_extra_tensors_are_infinitely_wrong(got: dict) -> None:
    assert max(relative_errors(got, {"a": torch.zeros(2)}).values()) == float("inf")


def test_a_wrong_collective_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is right, what runs is not: sums over devices lose a part in a thousand."""
    model, batch = ZOO["gpt2"]()
    options = SearchOptions(num_stages=1, num_microbatches=1, mesh_shape=(4,))
    plan, _ = plan_model(model, batch, FAST, options=options)
    assert verify_plan(model, batch, plan, eager=False).ok
    right = VirtualCollectives.run

    def wrong(self: VirtualCollectives, op: str, shards: Shards, axis: int, reduce: str) -> Shards:
        results = right(self, op, shards, axis, reduce)
        return [r * 0.999 if "reduce" in op and r.is_floating_point() else r for r in results]

    monkeypatch.setattr(VirtualCollectives, "run", wrong)
    report = verify_plan(model, batch, plan, eager=False)
    assert not report.ok
    assert report.errors.largest > 1e-4


def test_a_lost_or_stale_buffer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch statistics that a program forgets to update, or that nobody returns."""
    model, batch = ZOO["wide_resnet"]()
    plan, graph = plan_model(model, batch, FAST, options=SearchOptions(num_stages=1))
    path = sorted(updated_buffers(graph))[0]
    right = VirtualRun.buffers

    def stale(self: VirtualRun) -> dict[str, torch.Tensor]:
        return {**right(self), path: dict(model.named_buffers())[path] + 7}

    def lost(self: VirtualRun) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in right(self).items() if name != path}

    for wrong in (stale, lost):
        monkeypatch.setattr(VirtualRun, "buffers", wrong)
        report = verify_plan(model, batch, plan, eager=False)
        assert not report.ok and report.errors.worst["buffer"] == path


def test_dropout_is_compared_on_and_off() -> None:
    model, batch = ZOO["bert"]()
    plan, graph = plan_model(model, batch, FAST, options=SearchOptions(num_stages=1))
    report = verify_plan(model, batch, plan)
    assert report.dropout and report.ok and report.eager is not None
    drops = [op for op in without_dropout(graph).operators if "dropout" in op.op_name]
    assert {op.args[OP_ID[op.target] + 1] for op in drops} == {0.0}  # the probability comes next
    assert {op.op_name for op in drops} == {
        "autopar.dropout.default",
        "autopar.sdpa_dropout.default",
        "autopar.sdpa_dropout_backward.default",
    }
    assert model.training and any(m.p > 0 for m in model.modules() if isinstance(m, nn.Dropout))


def test_no_dropout_reaches_modules_and_functions() -> None:
    x, heads = torch.ones(64, 2, 8), torch.ones(2, 4, 16, 8)
    attention = nn.MultiheadAttention(8, 2, dropout=0.5)
    with no_dropout():
        assert torch.equal(nn.Dropout(0.5)(x), x)
        assert torch.equal(functional.dropout(x, 0.5), x)
        assert torch.equal(functional.dropout(x, training=True), x)
        want = functional.scaled_dot_product_attention(heads, heads, heads)
        got = functional.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.5)
        assert torch.equal(got, want)
        assert torch.equal(attention(x, x, x)[0], attention(x, x, x)[0])
    assert not torch.equal(functional.dropout(x, 0.5), x)


class Denoiser(nn.Module):
    """Noise of several kinds next to dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noisy = x + 0.1 * torch.randn_like(x)
        kept = torch.bernoulli(torch.full((16,), 0.5))
        hidden = functional.dropout(functional.rrelu(self.up(noisy), training=True), 0.1)
        return ((self.down(hidden) - x) * kept).square().mean()


def test_noise_is_alike_under_a_plan_and_on_one_device() -> None:
    torch.manual_seed(0)
    model, batch = Denoiser(), (torch.randn(16, 16),)
    options = SearchOptions(num_stages=2, num_microbatches=2, remat=Remat.FULL)
    plan, _ = plan_model(model, batch, FAST, options=options)
    report = verify_plan(model, batch, plan)
    assert report.ok and report.eager is None
    assert "other random numbers than dropout" in report.eager_skipped
    assert verify_record(report)["eager_skipped"] == report.eager_skipped


def test_every_kind_has_a_limit_of_its_own() -> None:
    """In bfloat16 a large rounding of the gradients excuses no wrong loss."""
    report = VerifyReport(
        errors=Errors(loss=0.5, gradient=1.0, update=0.0, buffer=0.0),
        eager=None,
        limits={"loss": 0.01, "gradient": 2.0, "update": 0.1, "buffer": 0.01},
        eager_tolerance=1e-5,
        dtype="float32",
        dropout=False,
        num_gradients=1,
        seconds=0.0,
        narrow=True,
    )
    assert not report.ok
    assert replace(report, errors=replace(report.errors, loss=0.001)).ok


def test_a_plan_of_another_model_is_refused() -> None:
    model, batch = ZOO["gpt2"]()
    plan, _ = plan_model(model, batch, FAST, options=SearchOptions(num_stages=1))
    with pytest.raises(PlanError, match="another model"):
        verify_plan(model, batch, replace(plan, graph="0" * 16))
    with pytest.raises(OptionError, match="float32, float64"):
        verify_plan(model, batch, plan, dtype="int8")
