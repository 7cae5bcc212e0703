"""Hand-written stacks of equal blocks, most of them with a catch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 8


class Block(nn.Module):
    def __init__(self, index: int = 0, p: float = 0.1, act: Callable[..., Tensor] = torch.relu):
        super().__init__()
        self.index, self.act = index, act
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.drop = nn.Dropout(p)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(self.act(self.up(x))))


class ByNumber(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2.0 if self.index == 4 else 1.0)


class OfNumber(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / (self.index + 1)


class Constant(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.tensor(0.5)


class Stack(nn.Module):
    """A mean of squares behind blocks in a row."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.pow(2).mean()


class Embedded(Stack):
    """The first block gets a gradient too."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(blocks)
        self.enter = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.enter(x))


class Counted(Embedded):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / len(self.blocks)


class SomewhereElse(Embedded):
    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number == 3:
                x = x * 3.0
        return x.pow(2).mean()


class AllStates(Embedded):
    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        loss = x.new_zeros(())
        for block in self.blocks:
            x = block(x)
            loss = loss + x.mean()
        return loss


class LongSkips(Embedded):
    def forward(self, x: Tensor) -> Tensor:
        before = x = self.enter(x)
        for block in self.blocks:
            before, x = x, block(x + before)
        return x.pow(2).mean()


class Twice(Embedded):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x + 1.0)


class Skipping(Embedded):
    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for number, block in enumerate(self.blocks):
            x = x if number == 3 else block(x)
        return x.pow(2).mean()


class Backwards(Embedded):
    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in reversed(self.blocks):
            x = block(x)
        return x.pow(2).mean()


class Decayed(Embedded):
    def forward(self, x: Tensor) -> Tensor:
        weights = [p.pow(2).sum() for p in self.parameters()]
        return super().forward(x) + torch.stack(weights).sum()


class Scaled(Embedded):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(blocks)
        self.scales = nn.Parameter(torch.ones(len(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for number, block in enumerate(self.blocks):
            x = block(x) * self.scales[number]
        return x.pow(2).mean()


class Gated(Embedded):
    """All blocks read, and give their part of the gradient of, a value made before them."""

    def forward(self, x: Tensor) -> Tensor:
        gate = x = self.enter(x)
        for block in self.blocks:
            x = block(x, gate)
        return x.pow(2).mean()


class GatedBlock(Block):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * gate


def blocks(count: int = 7, kind: type[Block] = Block, **options: Any) -> list[nn.Module]:
    return [kind(index, **options) for index in range(count)]


def tied() -> nn.Module:
    stack = Embedded(blocks())
    stack.blocks[5].up.weight = stack.blocks[4].up.weight
    return stack


def frozen() -> nn.Module:
    stack = Embedded(blocks(9))
    stack.enter.requires_grad_(False)
    for block in stack.blocks[:2]:
        block.requires_grad_(False)
    return stack


def mixed_modes() -> nn.Module:
    stack = Embedded(blocks()).train()
    stack.blocks[4].eval()
    return stack


# Copies of each layer, the last block included in "last".
FOLDED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: Embedded(blocks()), (1, 1, 5, 1, 1)),
    "no gradient before the first": (lambda: Stack(blocks()), (1, 1, 4, 1, 1)),
    "divided by their number": (lambda: Counted(blocks()), (1, 1, 5, 1, 1)),
    "constants of their own": (lambda: Embedded(blocks(kind=Constant)), (1, 1, 5, 1, 1)),
    "a shared value": (lambda: Gated(blocks(kind=GatedBlock)), (1, 1, 1, 4, 1, 1)),
    "one activation for all": (lambda: Embedded(blocks(act=nn.ReLU())), (1, 1, 5, 1, 1)),
    "equal partial functions": (
        lambda: Embedded([Block(i, act=partial(torch.softmax, dim=-1)) for i in range(7)]),
        (1, 1, 5, 1, 1),
    ),
    "another last one": (
        lambda: Embedded([*blocks(), Block(7, act=torch.tanh)]),
        (1, 1, 5, 1, 1, 1),
    ),
    "another in the middle": (
        lambda: Embedded([Block(i, act=torch.tanh if i == 5 else torch.relu) for i in range(11)]),
        (1, 1, 3, 1, 1, 1, 3, 1, 1),
    ),
    "one in eval mode": (mixed_modes, (1, 1, 2, 1, 1, 1, 1, 1)),
    "the first two frozen": (frozen, (1, 1, 1, 1, 1, 4, 1, 1)),
}
WHOLE: dict[str, Callable[[], nn.Module]] = {
    "one module listed often": lambda: Embedded([Block()] * 6),
    "one module without weights listed often": lambda: Embedded([nn.Dropout(0.1)] * 6),
    "two share a weight": tied,
    "rates that grow": lambda: Embedded([Block(i, p=0.1 * i) for i in range(6)]),
    "in turn": lambda: Embedded([Block(i, act=(torch.relu, torch.tanh)[i % 2]) for i in range(8)]),
    "a block looks at its number": lambda: Embedded(blocks(kind=ByNumber)),
    "a block computes with its number": lambda: Embedded(blocks(kind=OfNumber)),
    "something between two": lambda: SomewhereElse(blocks()),
    "loss of all states": lambda: AllStates(blocks()),
    "skips of two": lambda: LongSkips(blocks()),
    "called twice": lambda: Twice(blocks()),
    "one left out": lambda: Skipping(blocks()),
    "last block first": lambda: Backwards(blocks()),
    "a decay of all weights": lambda: Decayed(blocks()),
    "a scale for each": lambda: Scaled(blocks()),
}
