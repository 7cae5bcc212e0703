"""A captured graph computes what the model computes, and capture leaves the model alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autopar.errors import BatchError, CaptureError
from autopar.graph import patches
from autopar.graph.capture import capture_graph
from autopar.graph.execute import graph_inputs, run_graph
from autopar.graph.numbering import OP_ID
from autopar.graph.program import Graph, InputKind, OutputKind, Phase
from benchmarks.models.gpt import GPT, GPTConfig, example_batch
from tests.unit.graph import zoo

torch.set_num_threads(1)


@pytest.mark.parametrize("name", zoo.TRANSFORMERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_transformers_equal_eager(name: str, dtype: torch.dtype, tolerance: float) -> None:
    model, batch = zoo.build(name, dtype)
    loss_is_float32 = name in ("gpt2", "llama")  # transformers casts their logits
    zoo.assert_equals_eager(model, batch, None, 1e-6 if loss_is_float32 else tolerance)


def test_unet_and_its_batch_norm_buffers_equal_eager() -> None:
    torch.manual_seed(0)
    model = zoo.UNet().double()
    graph = zoo.assert_equals_eager(model, torch.randn(2, 3, 8, 8).double(), None, 1e-12)
    assert len(graph.outputs_of(OutputKind.BUFFER)) == 6


@pytest.mark.parametrize("checkpointed", [False, True])
def test_tied_weights_sum_to_the_gradient_of_eager(checkpointed: bool) -> None:
    torch.manual_seed(0)
    model = zoo.TiedLoop(checkpointed=checkpointed).double()
    graph = zoo.assert_equals_eager(model, zoo.tokens(), zoo.next_token_loss, 1e-12)
    owners = [i.owner for i in graph.inputs_of(InputKind.PARAMETER)]
    assert owners.count("embedding.weight") == 2
    attentions = [op for op in graph.operators if op.op_name == "autopar.sdpa.default"]
    assert len(attentions) == 3  # checkpointing recomputes nothing: the plan decides that
    assert [op.module for op in attentions] == ["attention", "attention@1", "attention@2"]


def test_dropout_follows_the_seed_alone() -> None:
    model, batch = zoo.TiedLoop(p=0.2).double(), zoo.tokens()
    graph = capture_graph(model, batch, zoo.next_token_loss)
    again = capture_graph(model, batch, zoo.next_token_loss)
    assert graph.fingerprint() == again.fingerprint()
    first, same, other = (zoo.named_outputs(graph, model, batch, seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert first["loss"] != other["loss"]
    drops = [op for op in graph.operators if op.target in OP_ID]
    assert {op.op_name.split(".")[1] for op in drops} == {
        "dropout",
        "sdpa_dropout",
        "sdpa_dropout_backward",
    }
    ids = {
        phase: [op.args[OP_ID[op.target]] for op in drops if op.phase is phase] for phase in Phase
    }
    assert ids[Phase.FORWARD] == list(range(6)) and sorted(ids[Phase.BACKWARD]) == list(range(6))


def test_dropout_inside_attention_is_that_of_plain_operators(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same numbers of the same operator ids, so that the whole step is equal to rounding."""

    def plain_sdpa(q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float, is_causal: bool) -> Tensor:
        return patches._plain_sdpa(q, k, v, None, dropout_p, is_causal, q.shape[-1] ** -0.5)

    torch.manual_seed(0)
    config = GPTConfig(32, 2, 4, vocab_size=64, seq_len=12, dropout=0.3)
    model, batch = GPT(config).double(), example_batch(config, 3)
    graph = capture_graph(model, batch)
    got = zoo.named_outputs(graph, model, batch, seed=1)
    monkeypatch.setattr(patches, "traced_sdpa", plain_sdpa)
    plain = capture_graph(model, batch)
    want = zoo.named_outputs(plain, model, batch, seed=1)
    inside = [op.op_name for op in graph.operators].count("autopar.sdpa_dropout.default")
    assert inside == 2 and not any("sdpa" in op.op_name for op in plain.operators)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-11, atol=1e-13)


def test_gradient_with_dropout_matches_finite_differences() -> None:
    torch.manual_seed(0)
    model, x = zoo.Mlp(p=0.4).double(), torch.randn(8, 4).double()
    graph = capture_graph(model, x)
    inputs = graph_inputs(graph, model, x, seed=3)
    loss, *grads = run_graph(graph, inputs)
    for out, grad in zip(graph.outputs[1:], grads, strict=True):
        step = torch.randn_like(grad) * 1e-6
        moved = {**inputs, out.target: inputs[out.target] + step}
        difference = run_graph(graph, moved)[0] - loss
        torch.testing.assert_close(difference, (grad * step).sum(), rtol=1e-4, atol=1e-12)


def test_gpt2_trains_with_dropout() -> None:
    model, batch = zoo.build("gpt2", torch.float32)
    graph = capture_graph(model.train(), batch)
    assert len(graph.inputs_of(InputKind.SEED)) == 1
    outputs = zoo.named_outputs(graph, model, batch, seed=1)
    assert all(value.isfinite().all() for value in outputs.values())


def snapshot(model: nn.Module) -> list[Any]:
    modules = list(model.modules())
    return [
        [(n, id(t), t.requires_grad, t.grad) for n, t in model.named_parameters()],
        [(n, id(t)) for n, t in model.named_buffers()],
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules],
        [{k: id(v) for k, v in m.__dict__.items()} for m in modules],
    ]


@pytest.mark.parametrize("name", ["gpt2", "vit"])
def test_model_comes_back_untouched(name: str) -> None:
    model, batch = zoo.build(name)
    before = snapshot(model)
    attention = functional.scaled_dot_product_attention
    capture_graph(model, batch)
    with pytest.raises(CaptureError):
        capture_graph(model, {"wrong": torch.zeros(1)})
    assert snapshot(model) == before
    assert functional.scaled_dot_product_attention is attention
    assert not torch.compiler.is_compiling()


def test_meta_model_and_batch_give_the_same_graph() -> None:
    real = capture_graph(*zoo.build("llama"))
    with torch.device("meta"):
        model, _ = zoo.llama()
    _, batch = zoo.build("llama")
    meta = {name: tensor.to("meta") for name, tensor in batch.items()}
    assert capture_graph(model.double(), meta).fingerprint() == real.fingerprint()


def test_every_operator_has_provenance() -> None:
    graph = capture_graph(*zoo.build("gpt2"))
    names = {op.name for op in graph.operators if op.phase is Phase.FORWARD}
    for op in graph.operators:
        if op.phase is Phase.FORWARD:
            assert "gpt2" in op.source or "transformers/" in op.source, op
        elif op.forward:
            assert op.forward in names and op.source
        else:
            assert op.op_name == "aten.add.Tensor"  # sums of gradients
    linear = next(op for op in graph.operators if op.op_name == "aten.mm.default")
    assert linear.module == "transformer.h.0.attn.c_attn"


def test_inputs_name_what_they_stand_for() -> None:
    model, x = zoo.Mlp(p=0.5), torch.randn(8, 4)
    model.down.bias.requires_grad_(False)
    graph = capture_graph(model, (x,))
    kinds = [(i.kind.value, i.target, i.requires_grad) for i in graph.inputs]
    assert kinds == [
        ("parameter", "up.weight", True),
        ("parameter", "up.bias", True),
        ("parameter", "down.weight", True),
        ("parameter", "down.bias", False),
        ("batch", "0", False),
        ("tangent", "", False),
        ("seed", "", False),
    ]
    assert len(graph.outputs_of(OutputKind.GRADIENT)) == 3


class Probe(nn.Module):
    """One linear and whatever a test wants to do with it."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self.linear, x)


def item(linear: nn.Module, x: Tensor) -> Tensor:
    return linear(x).mean() * x.max().item()


def branch(linear: nn.Module, x: Tensor) -> Tensor:
    return linear(x).mean() if x.sum() > 0 else linear(-x).mean()


def nonzero(linear: nn.Module, x: Tensor) -> Tensor:
    return linear(x[x[:, 0].nonzero().squeeze(1)]).mean()


def own_mask(linear: nn.Module, x: Tensor) -> Tensor:
    y, mask = torch.ops.aten.native_dropout(linear(x), 0.5, True)
    return (y * mask).mean()


def writes_batch(linear: nn.Module, x: Tensor) -> Tensor:
    return linear(x.add_(1)).mean()


def vector(linear: nn.Module, x: Tensor) -> Tensor:
    return linear(x)


def detached(linear: nn.Module, x: Tensor) -> Tensor:
    return linear(x).detach().mean()


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (item, r"test_capture.py:\d+ .*x\.max\(\)\.item"),
        (branch, r"test_capture.py:\d+ .*x\.sum\(\) > 0"),
        (nonzero, r"test_capture.py:\d+ .*nonzero"),
        (own_mask, "mask of a dropout"),
        (writes_batch, "writes into its batch"),
        (vector, "no scalar loss.*loss_fn"),
        (detached, "depends on no parameter"),
    ],
)
def test_what_cannot_be_captured_is_named(body: Any, text: str) -> None:
    with pytest.raises(CaptureError, match=text):
        capture_graph(Probe(body), torch.randn(3, 4))


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        ({"y": torch.zeros(3, 4)}, "unexpected keyword argument"),
        ((torch.zeros(3, 4), torch.zeros(3, 4)), "positional arguments"),
        (torch.zeros(3, 5), "got .3, 5."),
        ((object(),), "may hold tensors"),
    ],
)
def test_wrong_example_batch(batch: Any, text: str) -> None:
    with pytest.raises(CaptureError, match=text):
        capture_graph(zoo.Mlp(), batch)


def scaled(linear: nn.Module, batch: Any) -> Tensor:
    return linear(batch["x"]["inner"]).mean() * batch["scale"]


def test_nested_batch_with_baked_numbers() -> None:
    batch = ({"x": {"inner": torch.randn(3, 4)}, "scale": 2.0, "label": None},)
    graph = capture_graph(Probe(scaled), batch)
    (inp,) = graph.inputs_of(InputKind.BATCH)
    assert inp.target == "0.x.inner"
    other = ({"x": {"inner": torch.randn(3, 4)}, "scale": 3.0, "label": None},)
    with pytest.raises(BatchError, match="scale"):
        graph_inputs(graph, Probe(scaled), other)
    with pytest.raises(BatchError, match="structure"):
        graph_inputs(graph, Probe(scaled), torch.zeros(3, 4))
    bad = ({"x": {"inner": torch.randn(2, 4)}, "scale": 2.0, "label": None},)
    with pytest.raises(BatchError, match="captured with"):
        graph_inputs(graph, Probe(scaled), bad)


class Constants(nn.Module):
    """A plain tensor attribute and a tensor made in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.weights = torch.arange(4.0)

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear(x) * self.weights + torch.tensor(3.0)).mean()


def test_constants_keep_their_data() -> None:
    graph = zoo.assert_equals_eager(Constants(), torch.randn(3, 4), None, 1e-6)
    values = sorted(data.numel() for data in graph.constants.values())
    assert values == [1, 4]
    with torch.device("meta"):
        meta = Constants()
    with pytest.raises(CaptureError, match="register_buffer"):
        capture_graph(meta, torch.randn(3, 4))


class Pooled(nn.Module):
    """Pooling to one value goes through strided views, backward too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        wide = self.linear(x).transpose(1, 2)
        return nn.functional.adaptive_avg_pool1d(wide, 1).flatten(1).square().mean()


def test_strided_views_of_whole_tensors_are_views() -> None:
    graph = zoo.assert_equals_eager(Pooled().double(), torch.randn(2, 6, 4).double(), None, 1e-12)
    assert not [op for op in graph.operators if "strided" in op.op_name]


def test_loss_module_with_a_weight() -> None:
    model = nn.Linear(4, 6).double()
    loss = nn.CrossEntropyLoss(weight=torch.rand(6).double(), label_smoothing=0.1)
    x = torch.randn(6, 4).double()
    zoo.assert_equals_eager(model, x, lambda out, b: loss(out, b.argmax(1)), 1e-12)


def autocast(linear: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cuda", dtype=torch.bfloat16):
        return linear(x).float().mean()


def test_autocast_for_cuda_becomes_casts() -> None:
    graph = capture_graph(Probe(autocast), torch.randn(3, 4))
    matmul = next(op for op in graph.operators if op.op_name == "aten.mm.default")
    assert matmul.results[0] is not None and matmul.results[0].dtype == torch.bfloat16


def test_tangent_carries_the_number_of_microbatches() -> None:
    torch.manual_seed(0)
    model, x = zoo.Mlp(), torch.randn(8, 4)
    graph: Graph = capture_graph(model, x)
    whole = run_graph(graph, graph_inputs(graph, model, x))
    half = run_graph(graph, graph_inputs(graph, model, x, num_microbatches=2))
    assert whole[0] == half[0]
    torch.testing.assert_close(half[1] * 2, whole[1])


class Routed(nn.Module):
    """Counts as routers do, and drops layers with probability `layerdrop`."""

    def __init__(self, layerdrop: float) -> None:
        super().__init__()
        self.linear, self.layerdrop = nn.Linear(4, 6), layerdrop

    def forward(self, x: Tensor) -> Tensor:
        logits = self.linear(x)
        counts = torch.bincount(logits.argmax(-1), minlength=6).float()
        if torch.rand([]) < self.layerdrop:
            return logits.sum()
        return (logits * counts).mean()


def test_counts_below_a_length_and_layers_that_never_drop() -> None:
    torch.manual_seed(0)
    model, x = Routed(0.0), torch.randn(8, 4)
    graph = capture_graph(model, x)
    loss, *_ = run_graph(graph, graph_inputs(graph, model, x))
    torch.testing.assert_close(loss, model(x).detach())


def test_a_layer_that_may_drop_is_refused() -> None:
    with pytest.raises(CaptureError, match="layerdrop"):
        capture_graph(Routed(0.5), torch.randn(8, 4))
