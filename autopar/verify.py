"""Verification: one training step of the parallel program against the same step on one device.

The single-device step is the captured graph run whole, microbatch after microbatch. With dropout
off the user's own eager model is compared as well. Errors are relative:

    error(t) = max |parallel - single| / max(max |single|, FLOOR * scale)

per tensor, where scale is the largest entry of all tensors of its kind in the model: gradients that
are zero in exact arithmetic (a key's bias under softmax, say) are rounding noise, and only their
size against the model's gradients means anything.

A step that computes in bfloat16 differs from another such step by its rounding, which no constant
bounds. Both are then compared with the step in float64: of each kind the parallel one may be
NARROW_SLACK times as far from it as the single-device one, or bfloat16's epsilon. In float64 itself
the two must agree as any others.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from torch.utils import _pytree as pytree

from autopar.api import graph_of_plan
from autopar.errors import OptionError
from autopar.graph.batch import microbatch_of
from autopar.graph.capture import LossFn
from autopar.graph.execute import run_graph
from autopar.graph.experts import experts_in_loops
from autopar.graph.patches import replaced
from autopar.graph.precision import in_float64, widened
from autopar.graph.program import Graph, InputKind, Operator, OutputKind
from autopar.lowering.lower import lower_plan
from autopar.ops.random import seed_tensor
from autopar.plan import ParallelPlan
from autopar.runtime.comm import World
from autopar.runtime.launch import run_processes
from autopar.runtime.module import ParallelModel
from autopar.runtime.simulated import StepResult, VirtualRun

Loader = Callable[[], tuple[nn.Module, Any]]

FLOOR = 1e-2
TOLERANCES = {"float32": 1e-5, "float64": 1e-10}
NARROW_SLACK = 4.0
KINDS = ("loss", "gradient", "update", "buffer")  # fields of Errors
# Operators that drop: position of the probability among their arguments.
_DROPOUT: Mapping[str, int] = {
    "autopar.dropout.default": 3,
    "autopar.sdpa_dropout.default": 7,
    "autopar.sdpa_dropout_backward.default": 10,
}
# torch.nn.functional's functions that drop: position and name of the probability.
_DROPOUT_FUNCTIONS: Mapping[str, tuple[int, str]] = {
    **{f"dropout{rank}": (1, "p") for rank in ("", "1d", "2d", "3d")},
    "alpha_dropout": (1, "p"),
    "feature_alpha_dropout": (1, "p"),
    "scaled_dot_product_attention": (4, "dropout_p"),
}
_NOISE = frozenset({"autopar.uniform.default", "autopar.normal.default", "autopar.randint.default"})


@dataclass(frozen=True, slots=True)
class Errors:
    """Largest relative error of each kind, and where it is."""

    loss: float
    gradient: float
    update: float
    buffer: float
    worst: Mapping[str, str] = field(default_factory=dict)

    @property
    def largest(self) -> float:
        return max(self.loss, self.gradient, self.update, self.buffer)


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """errors: against the captured graph on one device; eager: against the user's model, dropout
    off on both sides, None where it was not compared, eager_skipped: why it could not be.
    limits: of errors, by kind. eager_tolerance: float32's at least, as models cast to it inside.
    narrow: the step computes in less than float32, and errors are against the float64 step."""

    errors: Errors
    eager: Errors | None
    limits: Mapping[str, float]
    eager_tolerance: float
    dtype: str
    dropout: bool
    num_gradients: int
    seconds: float
    narrow: bool = False
    eager_skipped: str = ""

    @property
    def agrees(self) -> bool:
        """With the captured graph on one device."""
        return all(getattr(self.errors, kind) <= self.limits[kind] for kind in KINDS)

    @property
    def agrees_with_eager(self) -> bool:
        """Or was not compared."""
        return self.eager is None or self.eager.largest <= self.eager_tolerance

    @property
    def ok(self) -> bool:
        return self.agrees and self.agrees_with_eager


@dataclass(frozen=True, slots=True)
class State:
    """Whole tensors: parameters by canonical name, buffers by path, and the global batch."""

    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    batch: Any


def verify_plan(
    model: nn.Module,
    batch: Any,
    plan: ParallelPlan,
    *,
    loss_fn: LossFn | None = None,
    dtype: str = "float32",
    seed: int = 0,
    tolerance: float | None = None,
    eager: bool = True,
    processes: Loader | None = None,
) -> VerifyReport:
    """Plays one step of the plan on the virtual mesh. batch: the global batch.

    processes: plays it in real local processes (gloo) instead, each of which gets (model, batch) by
    this function; it must be importable. eager=False leaves the user's own model out; so does noise
    other than dropout, which torch draws otherwise and which cannot be turned off.
    PlanError where the plan belongs to another model or batch.
    """
    started = time.monotonic()
    if dtype not in TOLERANCES:
        raise OptionError(f"dtype is one of {', '.join(TOLERANCES)}: got {dtype!r}")
    graph = graph_of_plan(model, batch, plan, loss_fn)
    state = _at_rest(state_of(model, batch), graph)
    original = plan  # each process captures the model for itself
    if dtype == "float64":
        graph, state = in_float64(graph), _in_float64(state)
        plan = replace(plan, graph=graph.fingerprint())
    dropout = any(op.op_name in _DROPOUT for op in graph.operators)
    single = single_step(graph, state, plan.num_microbatches, seed)
    if processes is None:
        parallel = parallel_step(graph, state, plan, seed)
    else:
        scale = gradient_scale(single.gradients)
        parallel = process_step(processes, loss_fn, original, seed, dtype, scale)
    updated = updated_buffers(graph)
    limits = dict.fromkeys(KINDS, TOLERANCES[dtype] if tolerance is None else tolerance)
    narrow = dtype == "float32" and computes_narrow(graph)
    reference = single
    if narrow:
        wide = _in_float64(state)
        reference = single_step(in_float64(graph), wide, plan.num_microbatches, seed)
        if tolerance is None:
            rounding, eps = _compare(single, reference, updated), torch.finfo(torch.bfloat16).eps
            limits = {kind: max(eps, NARROW_SLACK * getattr(rounding, kind)) for kind in KINDS}
    errors = _compare(parallel, reference, updated)
    against_eager = None
    skipped = _why_not_eager(graph) if eager and not narrow else ""
    if eager and not narrow and not skipped:
        quiet = without_dropout(graph)
        quiet_plan = replace(plan, graph=quiet.fingerprint())
        own = eager_step(model, state, plan.num_microbatches, loss_fn, dtype)
        against_eager = _compare(parallel_step(quiet, state, quiet_plan, seed), own, updated)
    return VerifyReport(
        errors=errors,
        eager=against_eager,
        limits=limits,
        eager_tolerance=max(tolerance or TOLERANCES[dtype], TOLERANCES["float32"]),
        dtype=dtype,
        dropout=dropout,
        num_gradients=len(single.gradients),
        seconds=time.monotonic() - started,
        narrow=narrow,
        eager_skipped=skipped,
    )


def computes_narrow(graph: Graph) -> bool:
    """Whether some result has fewer bits than float32."""
    results = (meta for op in graph.operators for meta in op.results if meta is not None)
    return any(m.dtype.is_floating_point and m.dtype.itemsize < 4 for m in results)


def _why_not_eager(graph: Graph) -> str:
    """ "" where the user's model computes what the captured graph does, dropout off."""
    noisy = next((op for op in graph.operators if op.op_name in _NOISE), None)
    if noisy is None:
        return ""
    where = noisy.source or noisy.name
    return f"the model draws other random numbers than dropout ({where}), and torch's own differ"


@dataclass(frozen=True, slots=True)
class Step:
    """Outcome of one step: whole tensors."""

    loss: Tensor
    gradients: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor]
    parameters: Mapping[str, Tensor]


def updated_buffers(graph: Graph) -> frozenset[str]:
    """Paths in the model of the buffers that a step changes."""
    paths = {i.name: i.target for i in graph.inputs_of(InputKind.BUFFER)}
    return frozenset(paths[out.target] for out in graph.outputs_of(OutputKind.BUFFER))


def state_of(model: nn.Module, batch: Any) -> State:
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = {n: b.detach().clone() for n, b in model.named_buffers(remove_duplicate=False)}
    return State(parameters, buffers, batch)


def _at_rest(state: State, graph: Graph) -> State:
    """Parameters in the types that they are kept in."""
    rest = {i.owner: i.rest_meta.dtype for i in graph.inputs_of(InputKind.PARAMETER)}
    parameters = {n: p.to(rest.get(n, p.dtype)) for n, p in state.parameters.items()}
    return replace(state, parameters=parameters)


def _in_float64(state: State) -> State:
    def widen(value: Any) -> Any:
        return value.to(widened(value.dtype)) if isinstance(value, Tensor) else value

    return State(
        {k: widen(v) for k, v in state.parameters.items()},
        {k: widen(v) for k, v in state.buffers.items()},
        pytree.tree_map(widen, state.batch),
    )


def without_dropout(graph: Graph) -> Graph:
    """The same graph with every dropout probability 0; operators keep their names."""

    def quiet(op: Operator) -> Operator:
        at = _DROPOUT.get(op.op_name)
        return op if at is None else replace(op, args=(*op.args[:at], 0.0, *op.args[at + 1 :]))

    return graph.with_operators(tuple(map(quiet, graph.operators)))


def make_optimizer(parameters: Sequence[nn.Parameter], scale: float) -> torch.optim.Optimizer:
    """AdamW with an epsilon of the gradients' own size: with a tiny one the first step is lr times
    the sign of every gradient, and the sign of a gradient that is zero up to rounding means
    nothing."""
    return torch.optim.AdamW(parameters, lr=1e-2, eps=max(scale, 1e-12))


def gradient_scale(gradients: Mapping[str, Tensor]) -> float:
    """Root mean square of all gradient entries."""
    count = sum(g.numel() for g in gradients.values())
    total = sum(float(g.double().square().sum()) for g in gradients.values())
    return float((total / max(1, count)) ** 0.5)


def parallel_step(graph: Graph, state: State, plan: ParallelPlan, seed: int) -> Step:
    """One step of the plan on the virtual mesh, optimizer included."""
    lowered = lower_plan(graph, plan)
    run = VirtualRun(lowered, graph, state.parameters, state.buffers)
    result: StepResult = run.step(graph.batch_spec.tensors(state.batch), seed)
    scale = gradient_scale(result.gradients)
    run.attach(lambda parameters: make_optimizer(parameters, scale))
    run.update()
    read = {p.owner for stage in lowered.stages for p in stage.parameters}
    unread = {name: p for name, p in state.parameters.items() if name not in read}
    return Step(result.loss, result.gradients, result.buffers, {**unread, **run.parameters()})


def process_step(
    load: Loader,
    loss_fn: LossFn | None,
    plan: ParallelPlan,
    seed: int,
    dtype: str,
    scale: float,
) -> Step:
    """One step of the plan in as many local processes as it has devices."""
    arguments = (load, loss_fn, plan, seed, dtype, scale)
    parts: list[Step] = run_processes(_rank_step, plan.num_devices, *arguments)
    merged = Step(parts[0].loss, {}, {}, {})
    for part in parts:
        merged.gradients.update(part.gradients)  # type: ignore[attr-defined]
        merged.buffers.update(part.buffers)  # type: ignore[attr-defined]
        merged.parameters.update(part.parameters)  # type: ignore[attr-defined]
    return merged


def _rank_step(
    world: World,
    load: Loader,
    loss_fn: LossFn | None,
    plan: ParallelPlan,
    seed: int,
    dtype: str,
    scale: float,
) -> Step:
    """What one rank knows after the step: whole tensors of its stage."""
    model, batch = load()
    graph = graph_of_plan(model, batch, plan, loss_fn)
    if dtype == "float64":
        graph, model = in_float64(graph), model.double()
        batch = _in_float64(State({}, {}, batch)).batch
        plan = replace(plan, graph=graph.fingerprint())
    parallel = ParallelModel(model, graph, plan, world=world)
    loss = parallel.train_step(batch, seed)
    named = dict(parallel.named_parameters())
    gradients = {n: full_tensor(p.grad) for n, p in named.items() if p.grad is not None}
    make_optimizer(list(named.values()), scale).step()
    return Step(
        loss,
        gradients,
        {n: b.detach().clone() for n, b in parallel.named_buffers()},
        {n: full_tensor(p) for n, p in named.items()},
    )


def full_tensor(tensor: Tensor) -> Tensor:
    """A DTensor as a whole; a plain tensor is one already."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().clone()


def single_step(graph: Graph, state: State, num_microbatches: int, seed: int) -> Step:
    """The captured graph run whole on each microbatch in turn, then the optimizer."""
    return _updated(state, *single_gradients(graph, state, num_microbatches, seed))


def single_gradients(
    graph: Graph, state: State, num_microbatches: int, seed: int
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Loss, gradients by owner and buffers by path of the same, before the optimizer."""
    owners = {i.name: i.owner for i in graph.inputs_of(InputKind.PARAMETER)}
    paths = {i.name: i.target for i in graph.inputs_of(InputKind.BUFFER)}
    buffers = dict(state.buffers)
    gradients: dict[str, Tensor] = {}
    losses: list[Tensor] = []
    for number in range(num_microbatches):
        part = microbatch_of(state.batch, num_microbatches, number)
        inputs = _graph_inputs(graph, state, buffers, part, num_microbatches)
        for inp in graph.inputs_of(InputKind.SEED):
            inputs[inp.name] = seed_tensor(seed, number)
        for out, value in zip(graph.outputs, run_graph(graph, inputs), strict=True):
            if out.kind is OutputKind.LOSS:
                losses.append(value)
            elif out.kind is OutputKind.GRADIENT:
                owner = owners[out.target]
                old = gradients.get(owner)
                gradients[owner] = value.clone() if old is None else old + value
            elif out.kind is OutputKind.BUFFER:
                buffers[paths[out.target]] = value
    return torch.stack(losses).mean(), gradients, buffers


def _graph_inputs(
    graph: Graph, state: State, buffers: Mapping[str, Tensor], part: Any, num_microbatches: int
) -> dict[str, Tensor]:
    leaves = iter(graph.batch_spec.tensors(part))
    make: dict[InputKind, Callable[[Any], Tensor]] = {
        InputKind.PARAMETER: lambda i: state.parameters[i.owner].to(i.meta.dtype),
        InputKind.BUFFER: lambda i: buffers[i.target],
        InputKind.BATCH: lambda _: next(leaves),
        InputKind.CONSTANT: lambda i: graph.constants[i.name],
        InputKind.TANGENT: lambda i: torch.full(
            i.meta.shape, 1.0 / num_microbatches, dtype=i.meta.dtype
        ),
    }
    return {i.name: make[i.kind](i) for i in graph.inputs if i.kind in make}


def eager_step(
    model: nn.Module, state: State, num_microbatches: int, loss_fn: LossFn | None, dtype: str
) -> Step:
    """The user's model with dropout 0, by autograd, then the optimizer. The model is copied. In
    float64 transformers' experts run as loops."""
    own = copy.deepcopy(model)
    own = own.double() if dtype == "float64" else own
    own.load_state_dict({**own.state_dict(), **state.buffers}, strict=False)
    losses = []
    for number in range(num_microbatches):
        part = microbatch_of(state.batch, num_microbatches, number)
        loops = experts_in_loops() if dtype == "float64" else contextlib.nullcontext()
        with no_dropout(), loops:  # backward too: checkpointing runs forward again
            loss = _eager_loss(own, part, loss_fn)
            (loss / num_microbatches).backward()
        losses.append(loss.detach())
    gradients = {n: p.grad for n, p in own.named_parameters() if p.grad is not None}
    buffers = {n: b.detach() for n, b in own.named_buffers(remove_duplicate=False)}
    return _updated(state, torch.stack(losses).mean(), gradients, buffers)


def _eager_loss(model: nn.Module, part: Any, loss_fn: LossFn | None) -> Tensor:
    if isinstance(part, Mapping):
        outputs = model(**part)
    elif isinstance(part, (tuple, list)):
        outputs = model(*part)
    else:
        outputs = model(part)
    if loss_fn is not None:
        return loss_fn(outputs, part)
    if isinstance(outputs, Tensor):
        return outputs
    loss: Tensor = outputs["loss"] if isinstance(outputs, Mapping) else outputs.loss
    return loss


@contextlib.contextmanager
def no_dropout() -> Iterator[None]:
    """torch's dropout functions run with probability 0, whoever holds the probability: a module, a
    configuration, a number in the code."""
    with contextlib.ExitStack() as stack:
        for name, (position, keyword) in _DROPOUT_FUNCTIONS.items():
            quiet = _with_zero(getattr(functional, name), position, keyword)
            stack.enter_context(replaced(functional, name, quiet))
        yield


def _with_zero(function: Callable[..., Any], position: int, keyword: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def quiet(*args: Any, **kwargs: Any) -> Any:
        if len(args) > position:
            return function(*args[:position], 0.0, *args[position + 1 :], **kwargs)
        return function(*args, **{**kwargs, keyword: 0.0})

    return quiet


def _updated(
    state: State, loss: Tensor, gradients: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
) -> Step:
    """The optimizer's step on whole parameters."""
    parameters = {n: nn.Parameter(p.clone()) for n, p in state.parameters.items()}
    for name, gradient in gradients.items():
        parameters[name].grad = gradient.clone()
    optimizer = make_optimizer(list(parameters.values()), gradient_scale(gradients))
    optimizer.step()
    updated = {n: p.detach() for n, p in parameters.items()}
    return Step(loss, gradients, buffers, updated)


def _compare(got: Step, want: Step, updated: Collection[str]) -> Errors:
    """updated: paths of the buffers that the step changes; each must be on both sides."""
    worst: dict[str, str] = {}
    loss = relative_errors({"loss": got.loss}, {"loss": want.loss})
    kinds = {
        "gradient": relative_errors(got.gradients, want.gradients),
        "update": relative_errors(got.parameters, want.parameters),
        "buffer": relative_errors(_only(got.buffers, updated), _only(want.buffers, updated)),
    }
    largest = {"loss": loss["loss"]}
    for kind, errors in kinds.items():
        name = max(errors, key=errors.__getitem__, default="")
        worst[kind], largest[kind] = name, errors.get(name, 0.0)
    return Errors(largest["loss"], largest["gradient"], largest["update"], largest["buffer"], worst)


def _only(tensors: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name in names}


def relative_errors(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, float]:
    """error(t) of the module's docstring for each tensor. A missing tensor or NaN is infinite."""
    scale = max((_largest(t) for t in want.values()), default=0.0)
    errors = {}
    for name, tensor in want.items():
        other = got.get(name)
        if other is None or other.shape != tensor.shape:
            errors[name] = float("inf")
            continue
        difference = _largest(other.double() - tensor.double())
        reference = max(_largest(tensor), FLOOR * scale)
        if difference == 0.0:
            errors[name] = 0.0
        elif reference > 0.0 and difference < float("inf"):  # False for NaN
            errors[name] = difference / reference
        else:
            errors[name] = float("inf")
    for name in got.keys() - want.keys():
        errors[name] = float("inf")
    return errors


def _largest(tensor: Tensor) -> float:
    return float(tensor.double().abs().max()) if tensor.numel() else 0.0
