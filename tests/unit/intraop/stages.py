"""Small prepared stages for the tests of the intra-op passes."""

from __future__ import annotations

from functools import cache

import torch
import transformers
from torch import nn

from autopar.estimate import MeshCosts
from autopar.graph.capture import capture_graph
from autopar.graph.layers import cluster_layers
from autopar.graph.precision import Precision
from autopar.graph.program import Graph
from autopar.lowering.lower import PreparedStage, prepare_stages
from autopar.mesh import LogicalMesh
from autopar.plan import Remat
from cost_models import Cluster
from tests.golden.update import Block, Mlp

torch.set_num_threads(1)


class Tied(nn.Module):
    """One weight used twice."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x).relu()).square().mean()


def mlp() -> tuple[nn.Module, torch.Tensor]:
    return Mlp(64, 256), torch.empty(128, 64)


def attention() -> tuple[nn.Module, torch.Tensor]:
    return Block(32, 4), torch.empty(4, 16, 32)


def tied() -> tuple[nn.Module, torch.Tensor]:
    return Tied(64), torch.empty(128, 64)


class Images(nn.Module):
    """Two convolutions, one without a bias; images of 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 16, 3, bias=False), nn.Conv2d(16, 32, 3)
        self.head = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.two(self.one(x).relu()).relu().mean((2, 3))).square().mean()


@cache
def image_graph() -> Graph:
    """In bfloat16 around float32 parameters."""
    with torch.device("meta"):
        model, x = Images(), torch.empty(16, 4, 8, 8)
    return cluster_layers(capture_graph(model, (x,), precision=Precision.parse("bf16/bf16")), 1)


@cache
def graph_of(name: str) -> Graph:
    with torch.device("meta"):
        model, x = {"mlp": mlp, "attention": attention, "tied": tied}[name]()
    return cluster_layers(capture_graph(model, (x,)), 1)


@cache
def stage_of(name: str) -> PreparedStage:
    return prepare_stages(graph_of(name), Remat.NONE, [0])[0]


@cache
def gpt2_graph(batch: int = 8, length: int = 1024, layers: int = 2, **sizes: int) -> Graph:
    """GPT-2 at its real 124M sizes unless told otherwise, on meta."""
    config = transformers.GPT2Config(n_layer=layers, use_cache=False, **sizes)
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
        tokens = torch.zeros(batch, length, dtype=torch.long)
    return cluster_layers(capture_graph(model, {"input_ids": tokens, "labels": tokens}))


@cache
def llama_graph(batch: int = 4, length: int = 1024, layers: int = 2, **sizes: int) -> Graph:
    config = transformers.LlamaConfig(num_hidden_layers=layers, use_cache=False, **sizes)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
        tokens = torch.zeros(batch, length, dtype=torch.long)
    return cluster_layers(capture_graph(model, {"input_ids": tokens, "labels": tokens}))


def costs_of(mesh: tuple[int, ...]) -> MeshCosts:
    logical = LogicalMesh(mesh)
    return MeshCosts(Cluster.parse(f"h100:1x{logical.num_devices}"), logical)
