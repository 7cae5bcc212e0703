"""Programs without operators of the model: values are cast and change their layout.

What runs once per step is of this kind: parameters are gathered, gradients reduced.
"""

from __future__ import annotations

import torch

from autopar.graph.program import Operator, Phase, Ref, TensorMeta
from autopar.layout import Dims, Layout
from autopar.lowering.program import LocalProgram, Port
from autopar.lowering.spmd import lower_program
from autopar.mesh import LogicalMesh
from autopar.sharding.registry import make_call, rule_for
from autopar.sharding.strategy import Strategy


class Relayout:
    """Builds a program that casts values and takes them from one layout to another."""

    def __init__(self, mesh: LogicalMesh) -> None:
        self._mesh = mesh
        self._inputs: dict[str, Port] = {}
        self._values: dict[Ref, Port] = {}
        self._copies: list[Operator] = []
        self._outputs: dict[str, tuple[Ref, TensorMeta, Layout]] = {}

    def take(
        self, name: str, meta: TensorMeta, dims: Dims, layout: Layout, *, host: bool = False
    ) -> Ref:
        """An input of the program. host: it is in the memory of the device's host."""
        ref = Ref(name)
        self._inputs[name] = self._values[ref] = Port(ref, meta, dims, layout, host)
        return ref

    def cast(self, ref: Ref, dtype: torch.dtype | None, layout: Layout) -> Ref:
        """The value, in this layout, in another type; the value itself where it has that type."""
        meta = self._values[ref].meta
        if dtype is None or dtype == meta.dtype:
            return ref
        name = f"{ref.name}_{str(dtype).removeprefix('torch.')}"
        return self._copy(name, ref, TensorMeta(meta.shape, dtype), layout, dtype=dtype)

    def load(self, ref: Ref, layout: Layout) -> Ref:
        """A copy of the value, which is in the host's memory, on the device. The device is that of
        whoever plays the program; the copy may still run when the next instruction starts."""
        meta, device = self._values[ref].meta, torch.device("cpu")
        name = f"{ref.name}_device"
        return self._copy(name, ref, meta, layout, device=device, non_blocking=True)

    def _copy(self, name: str, ref: Ref, meta: TensorMeta, layout: Layout, **kwargs: object) -> Ref:
        target, made = torch.ops.aten._to_copy.default, Ref(name)
        self._copies.append(Operator(name, target, (ref,), kwargs, (meta,), Phase.FORWARD))
        self._values[made] = Port(made, meta, self._values[ref].dims, layout)
        return made

    def give(self, name: str, ref: Ref, layout: Layout) -> None:
        """An output of the program."""
        self._outputs[name] = (ref, self._values[ref].meta, layout)

    def program(self) -> LocalProgram:
        dims = {ref: port.dims for ref, port in self._values.items()}
        metas = {ref: port.meta for ref, port in self._values.items()}
        calls = {op.name: make_call(op, dims, metas, set()) for op in self._copies}
        made_in = {op.name: (self._values[Ref(op.name)].layout,) for op in self._copies}
        nowhere = (None,) * self._mesh.num_axes
        return lower_program(
            self._copies,
            inputs=self._inputs,
            outputs=self._outputs,
            strategies={n: Strategy(nowhere, where, where, 1) for n, where in made_in.items()},
            calls=calls,
            rules={name: rule_for(call) for name, call in calls.items()},
            dims=dims,
            mesh=self._mesh.axis_sizes,
            verify=True,
        )
