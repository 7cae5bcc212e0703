"""A model, an example batch and a loss become one joint forward and backward graph.

Tracing runs on fake tensors: no weights, no accelerator, no memory. AOTAutograd gives the joint
graph of `loss(model(batch))`; `graph.convert` types it and `graph.normalize` brings it to the
normal form that later passes read. The model comes back untouched.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from autopar.errors import AutoparError, CaptureError
from autopar.graph.batch import BatchSpec, batch_spec, plain_mapping
from autopar.graph.convert import Naming, convert
from autopar.graph.losses import wide_losses
from autopar.graph.normalize import normalize
from autopar.graph.numbering import renumbered
from autopar.graph.patches import capture_patches
from autopar.graph.precision import Precision, kept_as_built, with_master_parameters
from autopar.graph.program import Graph, check_graph
from autopar.graph.provenance import error_source, recorded_provenance
from autopar.graph.substitute import fake_like, fake_tensors, real_on_cpu

LossFn = Callable[[Any, Any], Tensor]

_DATA_DEPENDENT = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
)
_MODEL_PREFIX = "model."


def capture_graph(
    model: nn.Module,
    example_batch: Any,
    loss_fn: LossFn | None = None,
    precision: Precision = Precision(),
) -> Graph:
    """The joint graph of one microbatch, at the shapes of the example batch, in the model's own
    mode. Every block is traced; `graph.fold` makes the same graph from a few of them.

    model:         real or on meta; parameters, buffers, mode and hooks are as before afterwards.
    example_batch: a tensor -> model(t); a tuple or list -> model(*b); a dict -> model(**b). Tensors
                   may be nested and may be on meta; numbers, strings and None are baked in.
    loss_fn:       loss_fn(outputs, batch) -> scalar. Without one the model returns the scalar
    itself,
                   or an output with `.loss` or ["loss"].
    precision:     of parameters and activations; as the model is built by default.
    Raises CaptureError with the line of source where the model cannot be traced.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"the model is a {type(model).__name__}: pass an nn.Module. A function becomes one"
            " whose forward calls it and whose attributes are its parameters."
        )
    spec = batch_spec(example_batch)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        arguments = tuple(fake_like(t) for t in spec.tensors(plain_mapping(example_batch)))
    joint = _JointModule(model, spec, loss_fn, precision)
    named = dict(model.named_parameters(remove_duplicate=False))
    trainable = frozenset(name for name, parameter in named.items() if parameter.requires_grad)
    naming = Naming(_MODEL_PREFIX, _owners(model), trainable, spec)
    built = {name: parameter.dtype for name, parameter in named.items()}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_errors_with_source())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # of libraries that notice that they are being traced
        stack.enter_context(fake_tensors(model, mode, _dtypes(model, precision)))
        if isinstance(loss_fn, nn.Module):
            stack.enter_context(real_on_cpu(loss_fn))
        packed = any("position_ids" in path for path in spec.paths)
        stack.enter_context(capture_patches(model, packed_sequences=packed))
        if precision.compute is not None and precision.compute.itemsize < 4:
            stack.enter_context(wide_losses())
        stack.enter_context(torch.enable_grad())
        module = _trace(joint, arguments, mode)
        graph = convert(module, naming)
    return check_graph(renumbered(with_master_parameters(normalize(graph), built, precision)))


def _dtypes(model: nn.Module, precision: Precision) -> Callable[[Tensor], torch.dtype] | None:
    """The type in which each parameter and buffer is captured."""
    compute, kept = precision.compute, kept_as_built(model)
    if compute is None:
        return None

    def dtype_of(tensor: Tensor) -> torch.dtype:
        is_parameter = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        return compute if is_parameter and id(tensor) not in kept else tensor.dtype

    return dtype_of


class _JointModule(nn.Module):
    """loss(model(batch)) as a module of the batch's tensors. The loss function is kept out of its
    submodules: whatever tensors it holds become constants."""

    def __init__(
        self, model: nn.Module, spec: BatchSpec, loss_fn: LossFn | None, precision: Precision
    ) -> None:
        super().__init__()
        self.model = model
        self._call = (spec, loss_fn, precision.compute)

    def forward(self, *tensors: Tensor) -> Tensor:
        spec, loss_fn, compute = self._call
        batch = spec.rebuild(tensors)
        inputs = batch
        if compute is not None:
            cast = (t.to(compute) if t.is_floating_point() else t for t in tensors)
            inputs = spec.rebuild(tuple(cast))
        outputs = _call_model(self.model, inputs)
        loss = outputs if loss_fn is None else loss_fn(outputs, batch)
        return _scalar_loss(loss, given=loss_fn is not None)


def _trace(joint: nn.Module, arguments: tuple[Tensor, ...], mode: FakeTensorMode) -> fx.GraphModule:
    with contextlib.ExitStack() as stack:
        stack.enter_context(mode)
        stack.enter_context(recorded_provenance(joint.get_submodule("model")))
        exported = aot_export_joint_with_descriptors(stack, joint, arguments, decompositions={})
        module: fx.GraphModule = exported.graph_module
        return module


def _call_model(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    raise CaptureError(
        f"the example batch is a {type(batch).__name__}: pass a tensor, a tuple or list of the"
        " model's positional arguments, or a dict of its keyword arguments."
    )


def _scalar_loss(outputs: Any, *, given: bool) -> Tensor:
    """The loss among the outputs of the model, or of the loss function."""
    loss = outputs
    if not given and not isinstance(outputs, Tensor):
        loss = getattr(outputs, "loss", None)
        if loss is None and isinstance(outputs, Mapping):
            loss = outputs.get("loss")
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        got = _described(loss if isinstance(loss, Tensor) else outputs)
        who = "loss_fn returned" if given else "the model returned no scalar loss but"
        raise CaptureError(
            f"{who} {got}. Pass loss_fn=lambda outputs, batch: ... that returns a scalar floating"
            " tensor, or make the model return one (transformers: put 'labels' in the batch)."
        )
    if not loss.requires_grad:
        raise CaptureError(
            "the loss depends on no parameter that requires a gradient, so there is no backward"
            " pass to plan. Check requires_grad of the parameters, and calls of no_grad, detach()"
            " or torch.autograd.grad, whose own result has no gradient here."
        )
    return loss.reshape(()) if loss.ndim else loss


def _described(outputs: Any) -> str:
    """What a model returned in place of a loss."""
    if isinstance(outputs, Tensor):
        return f"{outputs.dtype} of shape {tuple(outputs.shape)}"
    keys = f" with the keys {', '.join(map(str, outputs))}" if isinstance(outputs, Mapping) else ""
    return f"a {type(outputs).__name__}{keys}"


def _owners(model: nn.Module) -> dict[str, str]:
    """Canonical name, the first one, of every name of every parameter and buffer."""
    owners: dict[str, str] = {}
    for pairs in (
        model.named_parameters(remove_duplicate=False),
        model.named_buffers(remove_duplicate=False),
    ):
        first: dict[int, str] = {}
        for name, tensor in pairs:
            owners[name] = first.setdefault(id(tensor), name)
    return owners


@contextlib.contextmanager
def _errors_with_source() -> Iterator[None]:
    try:
        yield
    except AutoparError:
        raise
    except _DATA_DEPENDENT as error:
        raise CaptureError(
            f"the model's computation depends on the value of a tensor{_at(error)}, and tracing has"
            " shapes but no values. Way out: keep it in tensors of fixed size (torch.where, masks,"
            " topk instead of nonzero), or compute the value outside of the model."
            f" torch says: {_first_line(error)}"
        ) from error
    except Exception as error:
        if "Unexpected fake buffer" in str(error):
            raise CaptureError(
                "the model uses a tensor attribute that lies on meta and is neither a parameter nor"
                " a buffer, so its value is unknown. Register it with register_buffer, or build the"
                " model on the CPU."
            ) from error
        raise CaptureError(
            f"the model failed while it was traced{_at(error)}: {type(error).__name__}:"
            f" {_first_line(error)}. Check that the model runs on this batch: a tuple is passed as"
            " model(*batch), a dict as model(**batch)."
        ) from error


def _at(error: BaseException) -> str:
    source = error_source(error)
    return f" at {source}" if source else ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0].rstrip(".")
