"""DLRM: recommendation from dense features and looked-up embeddings (Naumov et al., 2019).

``DLRM(config)(dense_BF, sparse_BT, clicks_B)`` is the mean binary cross-entropy. B batch, F dense
features, T tables, D width of an embedding; every pair of the T + 1 vectors of a sample interacts
by its dot product.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class DLRMConfig:
    """table_rows: one embedding table each. bottom and top: widths of the layers of the two
    perceptrons; the bottom one ends with D, the top one is followed by one logit."""

    table_rows: tuple[int, ...]
    num_dense: int
    bottom: tuple[int, ...]
    top: tuple[int, ...]

    @property
    def dim(self) -> int:
        return self.bottom[-1]

    @property
    def num_vectors(self) -> int:
        return len(self.table_rows) + 1

    @property
    def num_pairs(self) -> int:
        return self.num_vectors * (self.num_vectors - 1) // 2


# Rows of the 26 categorical features of Criteo 1TB, capped at 40 million: MLPerf training 3.0.
_CRITEO_ROWS = (
    *(39884406, 39043, 17289, 7420, 20263, 3, 7120, 1543, 63, 38532951, 2953546, 403346, 10),
    *(2208, 11938, 155, 4, 976, 14, 39979771, 25641295, 39664984, 585935, 12972, 108, 36),
)

CONFIGS: Mapping[str, DLRMConfig] = MappingProxyType(
    {
        "dlrm-tiny": DLRMConfig((256, 128, 64, 16), 4, bottom=(32, 16), top=(32, 16)),
        "dlrm-criteo": DLRMConfig(
            _CRITEO_ROWS, 13, bottom=(512, 256, 128), top=(1024, 1024, 512, 256)
        ),
    }
)


def _perceptron(widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class DLRM(nn.Module):
    """Bottom perceptron, embedding tables, dot interaction, top perceptron."""

    def __init__(self, config: DLRMConfig) -> None:
        super().__init__()
        self.bottom = _perceptron((config.num_dense, *config.bottom))
        self.tables = nn.ModuleList(nn.Embedding(rows, config.dim) for rows in config.table_rows)
        self.top = _perceptron((config.dim + config.num_pairs, *config.top))
        self.head = nn.Linear(config.top[-1], 1)
        pairs = torch.tril_indices(config.num_vectors, config.num_vectors, offset=-1)
        flat = pairs[0] * config.num_vectors + pairs[1]
        self.register_buffer("pairs_P", flat)

    def forward(self, dense_BF: Tensor, sparse_BT: Tensor, clicks_B: Tensor) -> Tensor:
        dense_BD = self.bottom(dense_BF)
        looked_up = [table(sparse_BT[:, t]) for t, table in enumerate(self.tables)]
        vectors_BVD = torch.stack([dense_BD, *looked_up], dim=1)
        products_BVV = vectors_BVD @ vectors_BVD.transpose(1, 2)
        pairs_BP = products_BVV.flatten(1).index_select(1, self.pairs_P)
        hidden = self.top(torch.cat([dense_BD, pairs_BP], dim=1))
        logits_B = self.head(hidden).squeeze(1)
        return F.binary_cross_entropy_with_logits(logits_B, clicks_B)


def example_batch(config: DLRMConfig, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    sparse = [torch.randint(rows, (batch_size,)) for rows in config.table_rows]
    clicks = torch.randint(2, (batch_size,)).float()
    return torch.randn(batch_size, config.num_dense), torch.stack(sparse, dim=1), clicks


def flops_per_sample(config: DLRMConfig) -> float:
    """Model FLOPs of one sample, forward and backward: 6 per weight of a perceptron, and the dot
    products, of all V^2 pairs."""
    bottom = (config.num_dense, *config.bottom)
    top = (config.dim + config.num_pairs, *config.top, 1)
    weights = sum(a * b for layers in (bottom, top) for a, b in itertools.pairwise(layers))
    return 6.0 * (weights + config.num_vectors**2 * config.dim)
