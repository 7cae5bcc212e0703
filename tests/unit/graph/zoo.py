"""Tiny models and the comparison with eager that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from autopar.graph.capture import capture_graph
from autopar.graph.execute import graph_inputs, run_graph
from autopar.graph.program import Graph, OutputKind

VOCABULARY = 64
Built = tuple[nn.Module, dict[str, Tensor]]


def tokens(rows: int = 2, length: int = 8) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(0))


def gpt2(layers: int = 2, **options: Any) -> Built:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 32, "n_layer": layers, "n_head": 4, "n_positions": 16}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(vocab_size=VOCABULARY, **sizes, **ends, **options)
    return GPT2LMHeadModel(config), {"input_ids": tokens(), "labels": tokens()}


def llama(layers: int = 2) -> Built:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes, **heads))
    return model, {"input_ids": tokens(), "labels": tokens()}


def bert(layers: int = 2) -> Built:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers}
    config = BertConfig(vocab_size=VOCABULARY, num_attention_heads=4, **sizes)
    seen = torch.ones(2, 8, dtype=torch.int64)
    seen[0, 6:] = 0
    batch = {"input_ids": tokens(), "attention_mask": seen, "labels": tokens()}
    return BertForMaskedLM(config), batch


def t5(layers: int = 2) -> Built:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": layers, "num_heads": 4}
    config = T5Config(vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes)
    return T5ForConditionalGeneration(config), {"input_ids": tokens(), "labels": tokens()}


def vit(layers: int = 2) -> Built:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers}
    image = {"image_size": 16, "patch_size": 8, "num_labels": 5}
    model = ViTForImageClassification(ViTConfig(num_attention_heads=4, **sizes, **image))
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return model, {"pixel_values": pixels, "labels": torch.tensor([1, 2])}


TRANSFORMERS: dict[str, Callable[..., Built]] = {
    "gpt2": gpt2,
    "llama": llama,
    "bert": bert,
    "t5": t5,
    "vit": vit,
}


def build(name: str, dtype: torch.dtype = torch.float64, layers: int = 2) -> Built:
    """A model in eval mode, that is without dropout, and its batch."""
    torch.manual_seed(0)
    model, batch = TRANSFORMERS[name](layers)
    floats = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    return model.to(dtype).eval(), floats


class Mlp(nn.Module):
    """Two linears with dropout between, and a mean squared loss of its own."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.up = nn.Linear(4, 8)
        self.drop = nn.Dropout(p)
        self.down = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(self.up(x).relu())).pow(2).mean()


class UNet(nn.Module):
    """Two levels with a skip edge, batch norm, and a strided and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.down = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.inner = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.leave = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.enter(x)
        wide = self.up(self.inner(self.down(skip)))
        return functional.mse_loss(self.leave(torch.cat([skip, wide], dim=1)), x)


class TiedLoop(nn.Module):
    """Tied embedding and head, one block called three times, plain attention through torch."""

    def __init__(self, p: float = 0.0, checkpointed: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.block = nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, dropout=p, batch_first=True)
        self.drop = nn.Dropout(p)
        self.head = nn.Linear(16, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.checkpointed = checkpointed

    def step(self, x: Tensor) -> Tensor:
        y = self.attention(x, x, x, need_weights=False)[0]
        return x + self.drop(self.block(y).tanh())

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for reentrant in (False, True, False):
            if self.checkpointed:
                x = checkpoint(self.step, x, use_reentrant=reentrant)
            else:
                x = self.step(x)
        return self.head(x)


def next_token_loss(logits: Tensor, batch: Any) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), batch.flatten())


def named_outputs(graph: Graph, model: nn.Module, batch: Any, seed: int = 0) -> dict[str, Tensor]:
    """ "loss", gradients by canonical parameter name (summed over tied uses), buffers by name."""
    inputs = {i.name: i for i in graph.inputs}
    values = run_graph(graph, graph_inputs(graph, model, batch, seed=seed))
    named: dict[str, Tensor] = {}
    for out, value in zip(graph.outputs, values, strict=True):
        if out.kind is OutputKind.LOSS:
            named["loss"] = value
            continue
        key = inputs[out.target].owner
        if out.kind is OutputKind.BUFFER:
            key = f"buffer {key}"
        named[key] = named[key] + value if key in named else value
    return named


def assert_equals_eager(
    model: nn.Module, batch: Any, loss_fn: Callable[[Any, Any], Tensor] | None, tolerance: float
) -> Graph:
    """Loss and every gradient of the captured graph, relative to the largest gradient."""
    graph = capture_graph(model, batch, loss_fn)
    got = named_outputs(graph, model, batch)
    model.zero_grad()
    outputs = model(**batch) if isinstance(batch, dict) else model(batch)
    if loss_fn is not None:
        outputs = loss_fn(outputs, batch)
    loss = outputs if isinstance(outputs, Tensor) else outputs.loss
    loss.backward()
    torch.testing.assert_close(got.pop("loss"), loss.detach(), rtol=tolerance, atol=0)
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    wanted |= {f"buffer {n}": b for n, b in model.named_buffers() if f"buffer {n}" in got}
    assert got.keys() == wanted.keys()
    scale = max(float(g.abs().max()) for g in wanted.values())
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance * scale)
    return graph
