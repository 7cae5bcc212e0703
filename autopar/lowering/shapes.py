"""Verifier after the SPMD rewrite: local shapes and dtypes.

The program is played once on fake tensors, at the coordinates of the first rank; each result of a
graph operator must have the local shape that its layout says, and so must every output. A layout
that two neighbours read differently shows here, before any device sees it. Exchanges of rows are
played as if every device received as many rows as it sends. O(instructions).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.errors import InternalError
from autopar.graph.program import Ref
from autopar.layout import MeshSizes, Offset, local_shape
from autopar.lowering.program import CollectiveOp, Communicate, Exchange, LocalProgram

Shape = tuple[int, ...]


def check_shapes(program: LocalProgram, expected: Mapping[Ref, Shape], mesh: MeshSizes) -> None:
    """expected: local shape of local values that stand for results of graph operators."""
    origin = (0,) * len(mesh)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        values: dict[str, Any] = {}
        for port in program.inputs.values():
            shape = local_shape(port.dims, port.layout, mesh)
            values[port.ref.name] = torch.empty(shape, dtype=port.meta.dtype)
        for name, constant in program.constants.items():
            values[name] = mode.from_tensor(constant.cpu())
        for instruction in program.body:
            if isinstance(instruction, Communicate):
                operand = _value(values, instruction.operand)
                values[instruction.name] = _collective(instruction, operand, mesh)
                continue
            if isinstance(instruction, Exchange):
                values[instruction.name] = torch.empty_like(_value(values, instruction.rows))
                continue
            args = _bind(instruction.args, values, origin)
            kwargs = _bind(dict(instruction.kwargs), values, origin)
            try:
                values[instruction.name] = instruction.target(*args, **kwargs)
            except Exception as error:
                raise InternalError(
                    f"{instruction.name} ({instruction.target}), lowered from "
                    f"{instruction.origin}, does not run on local shapes: {error}"
                ) from error
        for ref, shape in expected.items():
            _check(str(ref), values, ref, shape)
        for key, port in program.outputs.items():
            shape = local_shape(port.dims, port.layout, mesh)
            _check(f"output {key!r}", values, port.ref, shape)
            dtype = _value(values, port.ref).dtype
            if dtype != port.meta.dtype:
                raise InternalError(f"output {key!r} is {dtype}, expected {port.meta.dtype}")


def _check(what: str, values: Mapping[str, Any], ref: Ref, shape: Shape) -> None:
    got = tuple(_value(values, ref).shape)
    if got != shape:
        raise InternalError(f"{what} has local shape {got}, its layout says {shape}")


def _collective(instruction: Communicate, operand: torch.Tensor, mesh: MeshSizes) -> torch.Tensor:
    n = mesh[instruction.axis]
    first, *rest = operand.shape or (1,)
    match instruction.op:
        case CollectiveOp.ALL_GATHER:
            return operand.new_empty((first * n, *rest))
        case CollectiveOp.REDUCE_SCATTER | CollectiveOp.ALL_TO_ALL if first % n:
            raise InternalError(f"{instruction.name} splits {first} rows among {n} ranks")
        case CollectiveOp.REDUCE_SCATTER:
            return operand.new_empty((first // n, *rest))
    return torch.empty_like(operand)


def _value(values: Mapping[str, Any], ref: Ref) -> torch.Tensor:
    value = values[ref.name]
    found: torch.Tensor = value[ref.index] if isinstance(value, (tuple, list)) else value
    return found


def _bind(tree: Any, values: Mapping[str, Any], origin: tuple[int, ...]) -> Any:
    if isinstance(tree, Ref):
        return _value(values, tree)
    if isinstance(tree, Offset):
        return tree.at(origin)
    if isinstance(tree, (tuple, list)):
        return type(tree)(_bind(item, values, origin) for item in tree)
    if isinstance(tree, dict):
        return {key: _bind(item, values, origin) for key, item in tree.items()}
    return tree
