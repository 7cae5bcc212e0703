"""The structure of a batch: which leaves are tensors, and which Python values were baked in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from autopar.errors import BatchError, CaptureError

_BAKED_TYPES = (bool, int, float, complex, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True, slots=True)
class BatchSpec:
    """tree: TreeSpec over all leaves. paths: one per leaf, such as "input_ids" or "0.mask". baked:
    Python values by leaf position; every other leaf is a tensor, in the order of BATCH inputs."""

    tree: pytree.TreeSpec
    paths: tuple[str, ...]
    baked: tuple[tuple[int, Any], ...]

    @property
    def tensor_paths(self) -> tuple[str, ...]:
        baked = dict(self.baked)
        return tuple(path for i, path in enumerate(self.paths) if i not in baked)

    def tensors(self, batch: Any) -> tuple[Tensor, ...]:
        """The tensor leaves of a batch of this structure; BatchError if its structure differs."""
        leaves, tree = pytree.tree_flatten(plain_mapping(batch))
        if tree != self.tree:
            raise BatchError(
                f"the batch has another structure than the one captured: got {tree}, want"
                f" {self.tree}. Pass batches like the example, or capture again."
            )
        baked = dict(self.baked)
        for index, value in baked.items():
            if leaves[index] is not value and leaves[index] != value:
                raise BatchError(
                    f"batch[{self.paths[index]!r}] is {leaves[index]!r} but was {value!r} when the"
                    " model was captured, and its value is part of the graph. Capture again."
                )
        tensors = tuple(leaf for i, leaf in enumerate(leaves) if i not in baked)
        for path, leaf in zip(self.tensor_paths, tensors, strict=True):
            if not isinstance(leaf, Tensor):
                raise BatchError(f"batch[{path!r}] must be a tensor: got {type(leaf).__name__}")
        return tensors

    def rebuild(self, tensors: tuple[Tensor, ...]) -> Any:
        """The batch with these tensors as its tensor leaves."""
        baked = dict(self.baked)
        rest = iter(tensors)
        leaves = [baked[i] if i in baked else next(rest) for i in range(len(self.paths))]
        return pytree.tree_unflatten(leaves, self.tree)


def batch_spec(batch: Any) -> BatchSpec:
    """Structure of an example batch. A leaf that is neither tensor nor Python value is refused."""
    pairs, tree = pytree.tree_flatten_with_path(plain_mapping(batch))
    paths = tuple(_path_text(path) for path, _ in pairs)
    baked: list[tuple[int, Any]] = []
    for index, (_, leaf) in enumerate(pairs):
        if isinstance(leaf, Tensor):
            if leaf.layout != torch.strided:
                raise CaptureError(
                    f"batch[{paths[index]!r}] is a tensor of layout {leaf.layout}: only dense ones"
                    " can be sharded. Pass it as dense parts, such as values and indices."
                )
            continue
        if not isinstance(leaf, _BAKED_TYPES):
            raise CaptureError(
                f"batch[{paths[index]!r}] is a {type(leaf).__name__}: a batch may hold tensors,"
                " numbers, strings and None in tuples, lists and dicts. Convert it to a tensor,"
                " or register its class with torch.utils._pytree."
            )
        baked.append((index, leaf))
    if batch_rows(batch) == 0:
        raise CaptureError(
            "the example batch has no rows, and a plan is made for its size: pass a batch as large"
            " as those of training, on meta where the data is not at hand."
        )
    return BatchSpec(tree, paths, tuple(baked))


def plain_mapping(batch: Any) -> Any:
    """Tokenizer outputs and other mappings are read as dicts."""
    return dict(batch) if isinstance(batch, Mapping) and not isinstance(batch, dict) else batch


def _path_text(path: tuple[Any, ...]) -> str:
    parts = []
    for key in path:
        for name in ("key", "idx", "name"):
            if hasattr(key, name):
                parts.append(str(getattr(key, name)))
                break
    return ".".join(parts) or "0"


def common_rows(shapes: Sequence[tuple[int, ...]]) -> int | None:
    """The rows of a batch whose leaves have these shapes: the most common size of dim 0, and among
    equally common ones that of the leaf with most dims. None where no leaf has a dim. Every part
    of autopar that cuts a batch asks here."""
    shapes = [shape for shape in shapes if shape]
    if not shapes:
        return None
    counts = Counter(shape[0] for shape in shapes)
    return max(shapes, key=lambda shape: (counts[shape[0]], len(shape)))[0]


def batch_rows(batch: Any) -> int | None:
    """Rows of a global batch (see `common_rows`)."""
    leaves = pytree.tree_leaves(plain_mapping(batch))
    return common_rows([tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)])


def microbatch_of(batch: Any, num_microbatches: int, number: int = 0) -> Any:
    """Microbatch `number` of a global batch: every tensor whose dim 0 is the batch's rows is cut
    into equal parts, the others are shared. BatchError where the rows do not divide."""
    rows = batch_rows(batch)
    if num_microbatches == 1 or rows is None:
        return batch
    if rows % num_microbatches:
        raise BatchError(
            f"a batch of {rows} rows does not divide into {num_microbatches} microbatches: choose "
            "a divisor, or another batch size"
        )
    size = rows // num_microbatches

    def cut(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == rows:
            return leaf.narrow(0, number * size, size)
        return leaf

    return pytree.tree_map(cut, plain_mapping(batch))
