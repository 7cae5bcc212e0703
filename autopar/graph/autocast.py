"""Regions of `autocast("cuda")` in a model that is traced on fake CPU tensors.

On the CPU such a region would do nothing, and `autocast("cpu")` has other lists of operators: it
leaves softmax, norms, sums and exponentials narrow, which CUDA's widens. Here a CUDA region becomes
a CPU one with the same type, in which the rows below hold as well. They are CUDA's lists
(https://docs.pytorch.org/docs/stable/amp.html, "CUDA Op-Specific Behavior"), as kernels of the
dispatcher's autocast key, so that they see every call at any depth, as CUDA's own do. Matmuls,
convolutions and attention, which the CPU narrows too, need no row; nor do the rows act that it has
itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

aten = torch.ops.aten


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Run in float32.
_WIDE = _names(
    "acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan "
    "pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar softplus layer_norm native_layer_norm "
    "group_norm frobenius_norm.dim nuclear_norm nuclear_norm.dim cosine_similarity "
    "poisson_nll_loss cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss kl_div "
    "l1_loss smooth_l1_loss huber_loss mse_loss margin_ranking_loss multilabel_margin_loss "
    "soft_margin_loss triplet_margin_loss multi_margin_loss "
    "binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp norm.Scalar "
    "norm.ScalarOpt_dim upsample_nearest1d upsample_nearest2d upsample_nearest3d "
    "upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d"
)
# Run in float32 where the caller names no type.
_WIDE_BY_DEFAULT = _names(
    "prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm "
    "linalg_matrix_norm sum sum.dim_IntList"
)
# Run in the widest type of their operands.
_PROMOTED = _names(
    "addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add"
)
# Run in the region's type; the CPU's own list lacks them.
_NARROW = _names("addmv addr mv")

_BELOW = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)


@contextlib.contextmanager
def cuda_regions_on_cpu() -> Iterator[None]:
    """Inside, `autocast("cuda")` acts on CPU tensors as it does on CUDA's. A region that is open
    around the block counts too."""
    regions: list[bool] = []  # of the open ones: whether it is CUDA's
    with contextlib.ExitStack() as stack:
        library = torch.library.Library("aten", "IMPL")
        stack.callback(library._destroy)
        for name, cast in _rows():
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCPU"):
                library.impl(name, _kernel(name, cast, regions), "AutocastCPU")
        stack.enter_context(_redirected(regions))
        if torch.is_autocast_enabled("cuda"):
            stack.enter_context(torch.autocast("cuda"))
        yield


@contextlib.contextmanager
def _redirected(regions: list[bool]) -> Iterator[None]:
    """`torch.autocast` opens a CPU region where CUDA's is asked for, and notes which it is."""
    autocast = torch.autocast
    init: Any = autocast.__init__
    enter: Any = autocast.__enter__
    leave: Any = autocast.__exit__

    def new_init(self: Any, device_type: str, dtype: Any = None, *args: Any, **kwargs: Any) -> None:
        self.of_cuda = device_type == "cuda"
        if self.of_cuda:
            dtype = torch.get_autocast_dtype("cuda") if dtype is None else dtype
            device_type = "cpu"
        init(self, device_type, dtype, *args, **kwargs)

    def new_enter(self: Any) -> Any:
        regions.append(self.of_cuda)
        return enter(self)

    def new_exit(self: Any, *args: Any) -> Any:
        regions.pop()
        return leave(self, *args)

    autocast.__init__, autocast.__enter__ = new_init, new_enter  # type: ignore[method-assign]
    autocast.__exit__ = new_exit  # type: ignore[method-assign]
    try:
        yield
    finally:
        autocast.__init__, autocast.__enter__ = init, enter  # type: ignore[method-assign]
        autocast.__exit__ = leave  # type: ignore[method-assign]


Cast = Callable[[tuple[Any, ...], dict[str, Any]], torch.dtype | None]


def _rows() -> Iterator[tuple[str, Cast]]:
    """Operator name -> the type of its floating operands, None to leave them."""
    yield from ((name, lambda _args, _kwargs: torch.float32) for name in _WIDE)
    yield from ((name, _wide_by_default) for name in _WIDE_BY_DEFAULT)
    yield from ((name, _widest) for name in _PROMOTED)
    yield from ((name, lambda _args, _kwargs: torch.get_autocast_dtype("cpu")) for name in _NARROW)


def _wide_by_default(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype | None:
    named = any(isinstance(value, torch.dtype) for value in (*args, *kwargs.values()))
    return None if named else torch.float32


def _widest(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype | None:
    leaves = pytree.tree_leaves((args, kwargs))
    floating = {t.dtype for t in leaves if isinstance(t, Tensor) and t.is_floating_point()}
    return torch.float32 if torch.float32 in floating else None


def _kernel(name: str, cast: Cast, regions: list[bool]) -> Callable[..., Any]:
    """An autocast kernel: casts float32 and narrower operands in a CUDA region, then goes on below
    the autocast key."""
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(aten, packet), overload or "default")

    def kernel(*args: Any, **kwargs: Any) -> Any:
        dtype = cast(args, kwargs) if regions and regions[-1] else None
        with torch._C._ExcludeDispatchKeyGuard(_BELOW):
            if dtype is not None:
                args, kwargs = pytree.tree_map(lambda leaf: _to(leaf, dtype), (args, kwargs))
            return operator(*args, **kwargs)

    return kernel


def _to(leaf: Any, dtype: torch.dtype) -> Any:
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    return leaf if leaf.dtype == torch.float64 else leaf.to(dtype)
