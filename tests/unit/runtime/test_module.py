"""ParallelModel in one process: names, gradients, state, meta models, refusals."""

from __future__ import annotations

import math
import random
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from autopar.errors import BatchError, OptionError, PlanError
from autopar.graph.capture import capture_graph
from autopar.graph.layers import cluster_layers
from autopar.plan import ParallelPlan
from autopar.runtime.module import ParallelModel
from autopar.schedule import ScheduleKind
from tests.plans import random_plan
from tests.unit.runtime.reference import Case, expected_step, worst_error, zoo_case

SEED = 3


@cache
def _planned(name: str) -> tuple[Case, ParallelPlan]:
    case = zoo_case(name)
    return case, random_plan(case.graph, [(1,)], random.Random(0))


def _parallel(name: str) -> tuple[Case, ParallelModel]:
    case, plan = _planned(name)
    return case, ParallelModel(case.model, case.graph, plan)


@pytest.mark.parametrize("name", ["gpt2", "wide_resnet"])
def test_step_and_clipping_equal_one_device(name: str) -> None:
    case, model = _parallel(name)
    want = expected_step(case, seed=SEED)
    loss = model.train_step(case.batch, seed=SEED)
    assert torch.allclose(loss, want.loss, rtol=1e-12)
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert worst_error(got, want.gradients)[0] <= 1e-10  # type: ignore[arg-type]
    buffers = dict(model.named_buffers())
    assert worst_error(buffers, want.buffers)[0] <= 1e-10
    plain = [nn.Parameter(p) for p in case.parameters.values()]
    for parameter, gradient in zip(plain, want.gradients.values(), strict=True):
        parameter.grad = gradient.clone()
    for norm_type in (2.0, float("inf"), 1.0):
        wanted = torch.nn.utils.clip_grad_norm_(plain, 0.01, norm_type)
        assert torch.allclose(model.clip_grad_norm_(0.01, norm_type), wanted, rtol=1e-10)
    again = model.train_step(case.batch, seed=SEED)
    torch.optim.SGD(model.parameters()).zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert again.ndim == 0


def test_names_are_those_of_the_model_tied_ones_too() -> None:
    case, model = _parallel("gpt2")
    assert model.state_dict().keys() == case.model.state_dict().keys()
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in case.model.named_parameters()]


def test_a_state_dict_of_the_whole_model_loads() -> None:
    case, model = _parallel("wide_resnet")
    state = {name: torch.full_like(t, 2) for name, t in case.model.state_dict().items()}
    model.load_state_dict(state)
    assert all(bool((t == 2).all()) for t in model.state_dict().values())
    state["no.such.name"] = torch.ones(())
    with pytest.raises(OptionError, match=r"no\.such\.name"):
        model.load_state_dict(state)
    assert model.load_state_dict(state, strict=False).unexpected_keys == ["no.such.name"]


def test_a_step_reads_a_parameter_whose_data_were_replaced() -> None:
    case, model = _parallel("gpt2")
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter)
    assert float(model.eval_step(case.batch)) == pytest.approx(
        math.log(case.model.config.vocab_size)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda b: {**b, "labels": b["labels"][:4]},
            r"'labels'.*int64\[4, 16\], expected int64\[8",
        ),
        (lambda b: {**b, "input_ids": b["input_ids"].float()}, r"'input_ids'.*float32\[8, 16\]"),
        (lambda b: {"input_ids": b["input_ids"]}, "another structure"),
    ],
)
def test_wrong_batches_are_refused_and_change_nothing(change: Any, message: str) -> None:
    case, model = _parallel("gpt2")
    with pytest.raises(BatchError, match=message):
        model.train_step(change(case.batch))
    assert all(p.grad is None for p in model.parameters())


def test_calling_it_says_what_to_call() -> None:
    _, model = _parallel("gpt2")
    with pytest.raises(OptionError, match="train_step"):
        model(1)


def test_a_plan_for_more_devices_needs_processes() -> None:
    case, _ = _planned("gpt2")
    plan = random_plan(case.graph, [(2,)], random.Random(0))
    with pytest.raises(PlanError, match="torchrun"):
        ParallelModel(case.model, case.graph, plan)


def test_stages_that_share_one_device_need_no_processes() -> None:
    case, _ = _planned("gpt2")
    interleaved = ScheduleKind.INTERLEAVED
    plan = random_plan(
        case.graph, [(1,)] * 3, random.Random(0), schedule=interleaved, num_workers=1
    )
    model = ParallelModel(case.model, case.graph, plan)
    loss = model.train_step(case.batch, seed=SEED)
    want = expected_step(case, seed=SEED)
    assert torch.allclose(loss, want.loss, rtol=1e-12)
    named = dict(model.named_parameters())
    assert list(named) == [n for n, _ in case.model.named_parameters()]
    got = {n: p.grad for n, p in named.items() if p.grad is not None}
    assert worst_error(got, want.gradients)[0] <= 1e-10
    assert float(model.eval_step(case.batch)) > 0


class _Nets(nn.Module):
    """Submodules that are called like methods of ParallelModel; a parameter that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.plan = nn.Linear(4, 8)
        self.train_step = nn.BatchNorm1d(8)
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.train_step(self.plan(x)).square().mean()
        return loss


def _small(device: str, model_type: type[nn.Module] = _Nets) -> ParallelModel:
    with torch.device(device):
        model = model_type()
    graph = cluster_layers(capture_graph(model, torch.randn(8, 4)), 1)
    plan = random_plan(graph, [(1,)], random.Random(0), num_microbatches=1)
    return ParallelModel(model, graph, plan, seed=5)


def test_names_of_the_model_may_be_names_of_methods() -> None:
    model = _small("cpu")
    model.train_step(torch.randn(8, 4))
    gradients = {n: p.grad for n, p in model.named_parameters()}
    assert gradients["plan.weight"] is not None
    assert gradients["unused"] is None
    assert int(dict(model.named_buffers())["train_step.num_batches_tracked"]) == 1


def test_a_model_on_meta_initialises_itself_module_by_module() -> None:
    class Net(_Nets):
        def __init__(self) -> None:
            super().__init__()
            del self.unused

    one, two = _small("meta", Net).state_dict(), _small("meta", Net).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert 0 < float(one["plan.weight"].std()) < 1
    assert bool((one["train_step.running_var"] == 1).all())
    with pytest.raises(OptionError, match="'unused' is on meta"):
        _small("meta")
