"""transformers' expert modules are captured as one operator, and compute what they computed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations import moe as interface
from transformers.integrations.moe import ExpertsInterface, use_experts_implementation

from autopar.errors import CaptureError
from autopar.graph.capture import capture_graph
from autopar.graph.experts import experts_as_operators, experts_in_loops
from autopar.graph.program import Graph
from tests.moe import MODELS, mixtral
from tests.unit.graph import zoo

NUM, WIDTH, HIDDEN = 4, 12, 8


def operators(graph: Graph) -> list[str]:
    names = [op.op_name for op in graph.operators]
    strangers = ("sort", "grouped_mm", "index.Tensor", "nonzero")
    assert not [name for name in names if any(word in name for word in strangers)]
    return [name.split(".")[1] for name in names if "autopar.experts" in name]


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_grouped_form(name: str) -> None:
    model, batch = MODELS[name](num_hidden_layers=1)
    graph = zoo.assert_equals_eager(model, batch, None, 2e-6)
    assert operators(graph) == ["experts", "experts_backward"]


def test_equals_the_modules_own_loop_in_float64() -> None:
    model, batch = mixtral(num_hidden_layers=1)
    with experts_in_loops():
        zoo.assert_equals_eager(model.double(), batch, None, 1e-6)  # logits are cast to float32


def test_whatever_is_asked_for_and_as_often() -> None:
    """transformers installs hooks that collect router logits in a model's first forward: they must
    not be there twice."""
    model, batch = mixtral(num_hidden_layers=1)
    lookup = ExpertsInterface.get_interface
    graphs = []
    for asked in ("eager", "grouped_mm"):
        model.config._experts_implementation = asked
        graphs.append(capture_graph(model.bfloat16(), batch))
        assert ExpertsInterface.get_interface is lookup
        assert not any(module._forward_hooks for module in model.modules())
    assert operators(graphs[0]) == ["experts", "experts_backward"]
    assert graphs[0].fingerprint() == graphs[1].fingerprint()


class _Experts(nn.Module):
    """The parts of an expert module. One of `use_experts_implementation` for each form."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        parts, self.num_experts = config.parts, NUM
        up, down = (NUM, parts * WIDTH, HIDDEN), (NUM, HIDDEN, WIDTH)
        if config.transposed:
            up, down = (up[0], up[2], up[1]), (down[0], down[2], down[1])
        generator = torch.Generator().manual_seed(0)
        name = "gate_up_proj" if parts == 2 else "up_proj"
        self.register_parameter(name, nn.Parameter(torch.randn(up, generator=generator)))
        self.down_proj = nn.Parameter(torch.randn(down, generator=generator))
        self.act_fn = ACT2FN[config.act]

    def forward(self, x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if bool((index == 0).any()):  # no trace can follow this
            return x
        return x * weight.sum()


def built(asked: str = "grouped_mm", **form: Any) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    form = {"parts": 2, "transposed": False, "act": "silu", **form}
    kind = use_experts_implementation(
        type("Experts", (_Experts,), {}),
        is_transposed=form["transposed"],
        has_gate=form["parts"] == 2,
        has_bias=form.get("has_bias", False),
    )
    config = SimpleNamespace(_experts_implementation=asked, **form)
    generator = torch.Generator().manual_seed(1)
    index = torch.rand(5, NUM, generator=generator).argsort(1)[:, :2]
    x = torch.randn(5, HIDDEN, generator=generator).requires_grad_()
    return kind(config), (x, index, torch.rand(5, 2, generator=generator))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2"])
def test_forms(parts: int, transposed: bool, act: str) -> None:
    module, batch = built(parts=parts, transposed=transposed, act=act)
    want = module(*batch)
    calls: list[Any] = []
    operator = torch.ops.autopar.experts
    with pytest.MonkeyPatch.context() as patch, experts_as_operators():
        patch.setattr(
            torch.ops.autopar, "experts", lambda *args: calls.append(1) or operator(*args)
        )
        got = module(*batch)
    assert calls
    scale = float(want.detach().abs().max())
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6 * scale)
    grads = [
        torch.autograd.grad(t.square().sum(), [batch[0], *module.parameters()]) for t in (got, want)
    ]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))


def test_under_autocast_operands_are_cast() -> None:
    module, batch = built()
    with torch.autocast("cpu", torch.bfloat16), experts_as_operators():
        got = module(*batch)
    assert got.dtype == torch.float32
    torch.testing.assert_close(
        got, module(*batch), rtol=0, atol=3e-2 * float(got.detach().abs().max())
    )


@pytest.mark.parametrize("why", ["gate", "activation", "bias"])
def test_what_does_not_fit_keeps_what_it_asked_for(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = {"activation": {"act": "quick_gelu"}, "bias": {"has_bias": True}}.get(why, {})
    module, batch = built("mine", **form)
    if why == "gate":
        type(module)._apply_gate = lambda self, z: z.chunk(2, -1)[0]
    asked: list[Any] = []
    monkeypatch.setitem(
        interface.ALL_EXPERTS_FUNCTIONS._global_mapping,
        "mine",
        lambda *args: asked.append(args) or args[1],
    )
    with experts_as_operators():
        module(*batch)
    assert asked
    module.config._experts_implementation = "eager"
    with pytest.raises(CaptureError, match="depends on the value"):
        capture_graph(module, batch, lambda out, _: out.sum())
