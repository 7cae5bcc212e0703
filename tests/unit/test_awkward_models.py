"""What ordinary models do and planners trip over: each trains as on one device, and as in eager."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from autopar.api import plan_model
from autopar.graph.capture import LossFn
from autopar.options import SearchOptions
from autopar.verify import verify_plan
from cost_models import Cluster

FAST_LINKS = Path(__file__).parent.parent / "clusters" / "fast_links.toml"
ROWS, WIDTH = 8, 16


class Case(NamedTuple):
    model: nn.Module
    batch: Any
    loss_fn: LossFn | None = None
    num_layers: int | None = None


def _x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (ROWS, WIDTH)))


def _ids(high: int, *shape: int) -> Tensor:
    return torch.randint(1, high, shape)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down, self.drop = nn.Linear(2 * WIDTH, WIDTH), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.drop(self.down(functional.gelu(self.up(self.norm(x)))))
        return out


class Shared(nn.Module):
    """ALBERT: one block, four times; and a module with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.first = Block(), nn.Linear(WIDTH, WIDTH)
        self.last = self.first

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(4):
            x = self.block(x)
        return self.last(x).square().mean()


class Frozen(nn.Module):
    """A frozen layer under a low-rank adapter, a parameter that nothing reads, one that only a
    branch reads whose result is thrown away, and a parameter of no dims."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, WIDTH, bias=False)
        self.unused, self.ignored = nn.Parameter(_x(3)), nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        self.ignored(x)
        return (self.base(x) + self.scale * self.up(self.down(x))).square().mean()


class TwoHeads(nn.Module):
    """Several losses, made outside of the model, of which one has a detached part."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.classes, self.value = Block(), nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 1)

    def forward(self, features: Tensor, **_labels: Tensor) -> dict[str, Any]:
        x = self.trunk(features)
        return {"logits": self.classes(x), "values": [self.value(x.detach()), self.value(x)]}


def _two_losses(outputs: Mapping[str, Any], batch: Mapping[str, Tensor]) -> Tensor:
    classes = functional.cross_entropy(outputs["logits"], batch["label"], label_smoothing=0.1)
    errors = [functional.smooth_l1_loss(v.squeeze(-1), batch["target"]) for v in outputs["values"]]
    return classes + 0.3 * errors[0] + 0.7 * errors[1]


class Running(nn.Module):
    """Buffers that forward updates: batch norm, an exponential mean, a counter of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(WIDTH, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("table", torch.arange(8.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.up(x))
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        self.steps += 1
        return self.down(x - self.mean * 0.01 + self.table).square().mean()


class Checkpointed(nn.Module):
    """The user's own activation checkpointing, both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x = checkpoint(block, x, use_reentrant=number % 2 == 1)
        return x.square().mean()


class Keywords(nn.Module):
    """Keyword arguments with defaults, nested inputs, numbers, integers, a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(32, WIDTH), nn.Linear(WIDTH, 8)

    def forward(
        self, ids: Tensor, *, pair: tuple[Tensor, Tensor], scale: float = 1.0, skip: Any = None
    ) -> Tensor:
        keep, bias = pair
        x = self.table(ids) * scale + bias
        x = x.masked_fill(~keep.unsqueeze(-1), 0.0).sum(1) / keep.sum(1, keepdim=True).clamp(min=1)
        return self.out(x).logsumexp(-1).mean()


class Fourier(nn.Module):
    """Mixing by a Fourier transform: complex values inside, and a complex input."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.gain = Block(), nn.Parameter(_x(WIDTH))

    def forward(self, x: Tensor, phase: Tensor) -> Tensor:
        mixed = torch.fft.fft(self.block(x), dim=-1) * phase * self.gain
        return (mixed.real.square() + mixed.imag.square()).mean()


def _packed() -> Case:
    """Two sequences in each row; position ids say where they start."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=32, num_attention_heads=4, use_cache=False, **sizes)
    ids = _ids(32, ROWS, 8)
    positions = torch.cat([torch.arange(5), torch.arange(3)]).expand(ROWS, 8).contiguous()
    batch = {"input_ids": ids, "labels": ids, "position_ids": positions}
    return Case(LlamaForCausalLM(config), batch)


def _padded() -> Case:
    """A padding mask, and labels that are ignored."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = BertConfig(vocab_size=32, num_attention_heads=4, **sizes)
    ids, mask = _ids(32, ROWS, 8), torch.ones(ROWS, 8, dtype=torch.int64)
    mask[::2, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return Case(BertForMaskedLM(config), batch)


CASES: dict[str, Callable[[], Case]] = {
    "shared layers": lambda: Case(Shared(), (_x(),)),
    "frozen and unused": lambda: Case(Frozen(), (_x(),)),
    "several losses": lambda: Case(
        TwoHeads(), {"features": _x(), "label": _ids(8, ROWS), "target": _x(ROWS)}, _two_losses
    ),
    "updated buffers": lambda: Case(Running(), (_x(),)),
    "checkpointing": lambda: Case(Checkpointed(), (_x(),)),
    "keyword arguments": lambda: Case(
        Keywords(),
        {
            "ids": _ids(32, ROWS, 4),
            "pair": (_ids(3, ROWS, 4) > 1, _x(ROWS, 4, WIDTH)),
            "scale": 0.5,
        },
        num_layers=2,
    ),
    "complex numbers": lambda: Case(
        Fourier(), (_x(), torch.complex(_x(ROWS, WIDTH), _x(ROWS, WIDTH)))
    ),
    "packed sequences": _packed,
    "padding": _padded,
}
PLANS = {
    "one stage of 4": SearchOptions(num_stages=1, mesh_shape=(4,), num_microbatches=1),
    "two stages of 2": SearchOptions(num_stages=2, mesh_shape=(2,), num_microbatches=1),
}


@pytest.mark.parametrize("plan_name", PLANS)
@pytest.mark.parametrize("name", CASES)
def test_trains_as_on_one_device(name: str, plan_name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        case = CASES[name]()
    model = case.model.train()
    cluster = Cluster.from_toml(FAST_LINKS)
    options = replace(PLANS[plan_name], num_layers=case.num_layers)
    plan, _ = plan_model(model, case.batch, cluster, loss_fn=case.loss_fn, options=options)
    report = verify_plan(model, case.batch, plan, loss_fn=case.loss_fn, dtype="float64")
    assert report.ok, report
