"""Diffusion U-Net: residual blocks with GroupNorm and time embedding, transformers at some levels.

With ``context_size`` set it is the text-conditioned U-Net of Stable Diffusion 1 (Rombach et al.,
2022); without, attention is on the image alone. The loss of ``UNet(config)(noisy_BCHW, noise_BCHW,
timestep_B[, context_BKM])`` is the mean squared error of the predicted noise.
B batch, C channels, H and W height and width, S = H W image tokens, K attended tokens of size M,
T time embedding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True, slots=True)
class UNetConfig:
    """Level i works on size / 2^i with channels * multipliers[i] channels."""

    channels: int
    multipliers: tuple[int, ...]
    attention_levels: tuple[int, ...]
    num_res_blocks: int = 2
    num_heads: int = 8
    num_groups: int = 32
    image_channels: int = 4
    image_size: int = 64
    context_size: int = 0
    context_len: int = 77

    def __post_init__(self) -> None:
        smallest = 2 ** (len(self.multipliers) - 1)
        if self.image_size % smallest:
            raise ValueError(f"image_size {self.image_size} is not a multiple of {smallest}")
        if self.channels % self.num_groups or self.channels % self.num_heads:
            raise ValueError(
                f"{self.channels} channels do not divide into {self.num_groups} groups "
                f"and {self.num_heads} heads"
            )


# unet-860m: the U-Net of Stable Diffusion 1.x on 64 x 64 latents.
CONFIGS: Mapping[str, UNetConfig] = MappingProxyType(
    {
        "unet-tiny": UNetConfig(
            32, (1, 2), (1,), num_res_blocks=1, num_heads=4, num_groups=8, image_size=16
        ),
        "unet-860m": UNetConfig(320, (1, 2, 4, 4), (0, 1, 2), context_size=768),
    }
)


class ResBlock(nn.Module):
    """Two normalised convolutions; the time embedding is added between them."""

    def __init__(self, in_channels: int, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(config.num_groups, in_channels)
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.time = nn.Linear(4 * config.channels, channels)
        self.norm_out = nn.GroupNorm(config.num_groups, channels)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1)

    def forward(self, x_BCHW: Tensor, time_BT: Tensor) -> Tensor:
        y_BCHW = self.conv_in(F.silu(self.norm_in(x_BCHW)))
        y_BCHW = y_BCHW + self.time(F.silu(time_BT))[:, :, None, None]
        y_BCHW = self.conv_out(F.silu(self.norm_out(y_BCHW)))
        return self.shortcut(x_BCHW) + y_BCHW


class Attention(nn.Module):
    """Multi-head attention of image tokens on ``memory`` tokens."""

    def __init__(self, channels: int, memory_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(channels, channels, bias=False)
        self.key = nn.Linear(memory_size, channels, bias=False)
        self.value = nn.Linear(memory_size, channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, x_BSC: Tensor, memory_BKM: Tensor) -> Tensor:
        projected = self.query(x_BSC), self.key(memory_BKM), self.value(memory_BKM)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in projected)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ImageTransformer(nn.Module):
    """One transformer block (self-attention, attention on the context, GEGLU) on image tokens."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.num_groups, channels)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.norm_self = nn.LayerNorm(channels)
        self.self_attention = Attention(channels, channels, config.num_heads)
        if config.context_size:
            self.norm_cross = nn.LayerNorm(channels)
            self.cross_attention = Attention(channels, config.context_size, config.num_heads)
        self.norm_mlp = nn.LayerNorm(channels)
        self.up = nn.Linear(channels, 8 * channels)
        self.down = nn.Linear(4 * channels, channels)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor, context_BKM: Tensor | None) -> Tensor:
        size = x_BCHW.shape[2:]
        x_BSC = self.proj_in(self.norm(x_BCHW)).flatten(2).transpose(1, 2)
        h_BSC = self.norm_self(x_BSC)
        x_BSC = x_BSC + self.self_attention(h_BSC, h_BSC)
        if context_BKM is not None:
            x_BSC = x_BSC + self.cross_attention(self.norm_cross(x_BSC), context_BKM)
        value, gate = self.up(self.norm_mlp(x_BSC)).chunk(2, dim=-1)
        x_BSC = x_BSC + self.down(value * F.gelu(gate))
        return x_BCHW + self.proj_out(x_BSC.transpose(1, 2).unflatten(2, size))


class Stage(nn.Module):
    """A residual block, then attention where its level has it."""

    def __init__(self, in_channels: int, level: int, config: UNetConfig) -> None:
        super().__init__()
        channels = config.channels * config.multipliers[level]
        self.block = ResBlock(in_channels, channels, config)
        self.attention: ImageTransformer | None = None
        if level in config.attention_levels:
            self.attention = ImageTransformer(channels, config)

    def forward(self, x_BCHW: Tensor, time_BT: Tensor, context_BKM: Tensor | None) -> Tensor:
        x_BCHW = self.block(x_BCHW, time_BT)
        return x_BCHW if self.attention is None else self.attention(x_BCHW, context_BKM)


class UNet(nn.Module):
    """Noise predictor with its loss. Every encoder output is concatenated into the decoder."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        width, last = config.channels, len(config.multipliers) - 1
        self.time_in = nn.Linear(width, 4 * width)
        self.time_out = nn.Linear(4 * width, 4 * width)
        self.conv_in = nn.Conv2d(config.image_channels, width, 3, padding=1)
        self.encoder, self.shrink = nn.ModuleList(), nn.ModuleList()
        channels, skips = width, [width]
        for level, multiplier in enumerate(config.multipliers):
            for _ in range(config.num_res_blocks):
                self.encoder.append(Stage(channels, level, config))
                channels = width * multiplier
                skips.append(channels)
            if level < last:
                self.shrink.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1))
                skips.append(channels)
        self.middle_in = ResBlock(channels, channels, config)
        self.middle_attention = ImageTransformer(channels, config)
        self.middle_out = ResBlock(channels, channels, config)
        self.decoder, self.grow = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(last + 1)):
            for _ in range(config.num_res_blocks + 1):
                self.decoder.append(Stage(channels + skips.pop(), level, config))
                channels = width * config.multipliers[level]
            if level > 0:
                self.grow.append(nn.Conv2d(channels, channels, 3, padding=1))
        self.norm_out = nn.GroupNorm(config.num_groups, width)
        self.conv_out = nn.Conv2d(width, config.image_channels, 3, padding=1)

    def _time_embedding(self, timestep_B: Tensor, dtype: torch.dtype) -> Tensor:
        """Sinusoids of the timestep through two linear layers: [B, T]."""
        half = self.config.channels // 2
        wide = torch.promote_types(dtype, torch.float32)  # bfloat16 cannot hold all timesteps
        index = torch.arange(half, device=timestep_B.device, dtype=wide)
        angle_BI = timestep_B[:, None].to(wide) * torch.exp(-math.log(10000) / half * index)
        sinusoid_BC = torch.cat((angle_BI.cos(), angle_BI.sin()), dim=-1).to(dtype)
        return self.time_out(F.silu(self.time_in(sinusoid_BC)))

    def predict_noise(
        self, noisy_BCHW: Tensor, timestep_B: Tensor, context_BKM: Tensor | None
    ) -> Tensor:
        num_blocks = self.config.num_res_blocks
        time_BT = self._time_embedding(timestep_B, noisy_BCHW.dtype)
        x_BCHW = self.conv_in(noisy_BCHW)
        skips = [x_BCHW]
        for index, stage in enumerate(self.encoder):
            x_BCHW = stage(x_BCHW, time_BT, context_BKM)
            skips.append(x_BCHW)
            level, block = divmod(index, num_blocks)
            if block == num_blocks - 1 and level < len(self.shrink):
                x_BCHW = self.shrink[level](x_BCHW)
                skips.append(x_BCHW)
        x_BCHW = self.middle_attention(self.middle_in(x_BCHW, time_BT), context_BKM)
        x_BCHW = self.middle_out(x_BCHW, time_BT)
        for index, stage in enumerate(self.decoder):
            x_BCHW = stage(torch.cat((x_BCHW, skips.pop()), dim=1), time_BT, context_BKM)
            level, block = divmod(index, num_blocks + 1)
            if block == num_blocks and level < len(self.grow):
                x_BCHW = self.grow[level](F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x_BCHW)))

    def forward(
        self,
        noisy_BCHW: Tensor,
        noise_BCHW: Tensor,
        timestep_B: Tensor,
        context_BKM: Tensor | None = None,
    ) -> Tensor:
        return F.mse_loss(self.predict_noise(noisy_BCHW, timestep_B, context_BKM), noise_BCHW)


def example_batch(
    config: UNetConfig, batch_size: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, ...]:
    """Random (noisy_BCHW, noise_BCHW, timestep_B), and context_BKM where the model reads one."""
    shape = (batch_size, config.image_channels, config.image_size, config.image_size)
    noisy_BCHW, noise_BCHW = (torch.randn(shape, device=device) for _ in range(2))
    timestep_B = torch.randint(1000, (batch_size,), device=device)
    if not config.context_size:
        return noisy_BCHW, noise_BCHW, timestep_B
    context_shape = (batch_size, config.context_len, config.context_size)
    return noisy_BCHW, noise_BCHW, timestep_B, torch.randn(context_shape, device=device)


def flops_per_sample(config: UNetConfig) -> float:
    """Model FLOPs of one image, forward and backward: 3 x the forward's matmuls and convolutions.

    Counted on a meta module of this configuration, which allocates nothing.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        UNet(config)(*example_batch(config, 1, device="meta"))
    return 3.0 * float(counter.get_total_flops())
