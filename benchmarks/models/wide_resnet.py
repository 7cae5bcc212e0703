"""Wide-ResNet of bottleneck blocks with BatchNorm (Zagoruyko & Komodakis, 2016), sized as in Alpa.

``WideResNet(config)(image_BCHW, label_B)`` is the mean cross-entropy.
B batch, C channels, H and W height and width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EXPANSION = 4  # a bottleneck's output channels over its first ones


@dataclass(frozen=True, slots=True)
class WideResNetConfig:
    """``width`` multiplies the channels of 3x3 convolutions; stage i has base * 2^i channels."""

    base_channels: int
    width: int
    blocks_per_stage: tuple[int, ...] = (3, 4, 6, 3)
    num_classes: int = 1000
    image_size: int = 224

    def __post_init__(self) -> None:
        smallest = 2 ** (len(self.blocks_per_stage) + 1)
        if self.image_size % smallest:
            raise ValueError(f"image_size {self.image_size} is not a multiple of {smallest}")


# Alpa (OSDI'22), table 7 and its benchmark suite: 50 layers, 224 x 224 images.
CONFIGS: Mapping[str, WideResNetConfig] = MappingProxyType(
    {
        "wresnet-tiny": WideResNetConfig(8, 2, (1, 1, 1, 1), num_classes=16, image_size=64),
        "wresnet-250m": WideResNetConfig(160, 2),
        "wresnet-1b": WideResNetConfig(320, 2),
    }
)


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)


class Bottleneck(nn.Module):
    """1x1 down, 3x3 (wide, strided), 1x1 up; a projected shortcut where shapes differ."""

    def __init__(self, in_channels: int, channels: int, width: int, stride: int) -> None:
        super().__init__()
        wide, out_channels = channels * width, channels * EXPANSION
        self.conv_in = _conv(in_channels, channels, 1)
        self.norm_in = nn.BatchNorm2d(channels)
        self.conv_mid = _conv(channels, wide, 3, stride)
        self.norm_mid = nn.BatchNorm2d(wide)
        self.conv_out = _conv(wide, out_channels, 1)
        self.norm_out = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                _conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = F.relu(self.norm_in(self.conv_in(x_BCHW)))
        y_BCHW = F.relu(self.norm_mid(self.conv_mid(y_BCHW)))
        y_BCHW = self.norm_out(self.conv_out(y_BCHW))
        return F.relu(y_BCHW + self.shortcut(x_BCHW))


def _block_shapes(config: WideResNetConfig) -> Iterator[tuple[int, int, int]]:
    """(input channels, channels, stride) of each bottleneck, in order."""
    in_channels = config.base_channels
    for stage, num_blocks in enumerate(config.blocks_per_stage):
        channels = config.base_channels * 2**stage
        for block in range(num_blocks):
            yield in_channels, channels, 2 if stage > 0 and block == 0 else 1
            in_channels = channels * EXPANSION


class WideResNet(nn.Module):
    """Image classifier with its loss."""

    def __init__(self, config: WideResNetConfig) -> None:
        super().__init__()
        self.conv_stem = nn.Conv2d(3, config.base_channels, 7, stride=2, padding=3, bias=False)
        self.norm_stem = nn.BatchNorm2d(config.base_channels)
        self.blocks = nn.ModuleList(
            Bottleneck(in_channels, channels, config.width, stride)
            for in_channels, channels, stride in _block_shapes(config)
        )
        features = config.base_channels * 2 ** (len(config.blocks_per_stage) - 1) * EXPANSION
        self.head = nn.Linear(features, config.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image_BCHW: Tensor, label_B: Tensor) -> Tensor:
        x_BCHW = F.relu(self.norm_stem(self.conv_stem(image_BCHW)))
        x_BCHW = F.max_pool2d(x_BCHW, kernel_size=3, stride=2, padding=1)
        for block in self.blocks:
            x_BCHW = block(x_BCHW)
        return F.cross_entropy(self.head(x_BCHW.mean(dim=(2, 3))), label_B)


def example_batch(
    config: WideResNetConfig, batch_size: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Random (image_BCHW, label_B): float32 and int64."""
    size = config.image_size
    image_BCHW = torch.randn(batch_size, 3, size, size, device=device)
    return image_BCHW, torch.randint(config.num_classes, (batch_size,), device=device)


def flops_per_sample(config: WideResNetConfig) -> float:
    """Model FLOPs of one image, forward and backward: 6 k^2 C_in C_out H W of each convolution."""
    size = config.image_size // 2
    macs = 7 * 7 * 3 * config.base_channels * size**2
    size //= 2  # max pooling
    for in_channels, channels, stride in _block_shapes(config):
        wide, out_channels = channels * config.width, channels * EXPANSION
        macs += in_channels * channels * size**2
        size //= stride
        macs += (9 * channels * wide + wide * out_channels) * size**2
        if stride != 1 or in_channels != out_channels:
            macs += in_channels * out_channels * size**2
        features = out_channels
    return float(6 * (macs + features * config.num_classes))
