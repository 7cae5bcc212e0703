"""The same graph in another floating-point precision, for verification.

A float64 graph computes what the float32 one means without its rounding: two programs that agree to
1e-10 in it are the same program. Casts inside the model to float32 become casts to float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from autopar.graph.program import Graph, TensorMeta, check_graph


def in_float64(graph: Graph) -> Graph:
    """Every float32 (also bfloat16 and float16) value, cast and constant as float64."""

    def meta(old: TensorMeta | None) -> TensorMeta | None:
        return None if old is None else TensorMeta(old.shape, _widen(old.dtype))

    operators = tuple(
        replace(
            op,
            args=_map_dtypes(op.args),
            kwargs=_map_dtypes(dict(op.kwargs)),
            results=tuple(meta(m) for m in op.results),
        )
        for op in graph.operators
    )
    inputs = tuple(replace(i, meta=meta(i.meta) or i.meta) for i in graph.inputs)
    constants = {k: v.to(_widen(v.dtype)) for k, v in graph.constants.items()}
    return check_graph(replace(graph, inputs=inputs, operators=operators, constants=constants))


def _widen(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else dtype


def _map_dtypes(tree: Any) -> Any:
    if isinstance(tree, torch.dtype):
        return _widen(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return tree
    if isinstance(tree, (tuple, list)):
        return type(tree)(_map_dtypes(item) for item in tree)
    if isinstance(tree, Mapping):
        return {key: _map_dtypes(item) for key, item in tree.items()}
    return tree
