"""The search options of the command line, and what they lead to: a cluster, options, a plan."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from autopar.plan import ParallelPlan, Remat
from autopar.schedule import ScheduleKind

if TYPE_CHECKING:
    from autopar.graph.program import Graph
    from autopar.models import LoadedModel
    from autopar.options import SearchOptions

T = TypeVar("T")


class SolverName(StrEnum):
    """Those of intraop.solver, which is slow to import."""

    dual = "dual"
    cbc = "cbc"
    highs = "highs"
    cp_sat = "cp_sat"


CLUSTER_HELP = "Such as h100:1x8, v100:8x8, cpu:1x4, or a .toml file."
MODEL_HELP = "file.py:factory, package.module:factory, or a name of `autopar models`."

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
PlanOption = Annotated[
    Path | None, typer.Option("--plan", help="A saved plan; no search is made then.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON value on stdout.")]


def _option(text: str, *names: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=text, metavar=metavar, rich_help_panel="Search")


@dataclass(frozen=True, slots=True)
class Search:
    """The search options of `plan`, `verify` and `run`: one field per command line option."""

    cluster: Annotated[str | None, _option(CLUSTER_HELP, metavar="CLUSTER")] = None
    memory: Annotated[str | None, _option("Budget per device, such as 70GiB.")] = None
    precision: Annotated[
        str | None,
        _option("model (as built), fp32, bf16, or bf16/bf16: compute / gradient reduction."),
    ] = None
    microbatches: Annotated[int | None, _option("Of a batch; must divide its rows.")] = None
    microbatch_limit: Annotated[int | None, _option("The most that the search may choose.")] = None
    stages: Annotated[int | None, _option("Number of pipeline stages.")] = None
    mesh: Annotated[str | None, _option("Mesh of every stage, such as 2x4.")] = None
    schedule: Annotated[ScheduleKind | None, _option("Pipeline schedule.")] = None
    remat: Annotated[Remat | None, _option("What backward may recompute.")] = None
    place: Annotated[
        list[str] | None,
        _option(
            "Layout at rest of the parameters that a pattern names, such as lm_head.weight=S0 or"
            " 'layers.*.mlp.*=S1'; repeatable."
        ),
    ] = None
    solver: Annotated[SolverName | None, _option("Of the integer programs.")] = None
    time_limit: Annotated[
        float | None, _option("Seconds of the search; then it gives the best plan so far.")
    ] = None
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Search anew.", rich_help_panel="Search")
    ] = False


def with_search(command: Callable[..., None]) -> Callable[..., None]:
    """`command(..., search)` as a command that has the options of Search."""
    own = inspect.signature(command, eval_str=True)
    options = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=h)
        for f, h in zip(
            fields(Search), inspect.get_annotations(Search, eval_str=True).values(), strict=True
        )
    ]
    names = [f.name for f in fields(Search)]

    @functools.wraps(command)
    def wrapper(**arguments: Any) -> None:
        search = Search(**{name: arguments.pop(name) for name in names})
        command(**arguments, search=search)

    rest = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for p in own.parameters.values()
        if p.name != "search"
    ]
    parameters = [*rest, *options]
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


def plan_for(
    model: str, plan_file: Path | None, search: Search, *, quiet: bool
) -> tuple[ParallelPlan, LoadedModel]:
    """The saved plan, or one from the search options, and the model with its data."""
    from autopar.models import load_model

    if plan_file is not None:
        return _saved_plan(plan_file, search), load_model(model)
    found, _ = search_plan(model, search, default_cluster="cpu:1x4", quiet=quiet)
    return found, load_model(model)


def graph_for(
    model: str, plan_file: Path | None, search: Search, *, quiet: bool
) -> tuple[ParallelPlan, Graph]:
    """The saved plan, or one from the search options, and the graph that it is for, without
    data."""
    if plan_file is None:
        return search_plan(model, search, default_cluster="cpu:1x4", quiet=quiet)
    from autopar.api import graph_of_plan
    from autopar.report.console import SearchLine

    plan = _saved_plan(plan_file, search)
    with SearchLine(f"capturing {model}", quiet=quiet):
        return plan, on_meta_first(model, lambda m: graph_of_plan(m.module, m.example_batch, plan))


def _saved_plan(plan_file: Path, search: Search) -> ParallelPlan:
    given = [f.name for f in fields(Search) if getattr(search, f.name)]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise typer.BadParameter(f"--plan leaves nothing to search: drop {options}")
    return ParallelPlan.load(plan_file)


def search_plan(
    model: str, search: Search, *, default_cluster: str | None, quiet: bool
) -> tuple[ParallelPlan, Graph]:
    """Plans without data where the model can be built on meta, else with it."""
    cluster = cluster_of(search.cluster or default_cluster)
    if cluster is None:
        raise typer.BadParameter("name the cluster, such as --cluster h100:1x8")
    options = search_options(search)
    from autopar.api import plan_model
    from autopar.graph.precision import Precision
    from autopar.report.console import SearchLine, show_note

    with SearchLine(f"planning {model}", quiet=quiet) as line:

        def plan(loaded: LoadedModel) -> tuple[ParallelPlan, Graph]:
            return plan_model(
                loaded.module,
                loaded.example_batch,
                cluster,
                memory_budget=search.memory,
                precision=Precision.parse(search.precision or "model"),
                options=options,
                progress=line,
            )

        line("building the model")
        try:
            return on_meta_first(model, plan)
        except KeyboardInterrupt:
            show_note("Interrupted before there was any plan.")
            raise


def on_meta_first(model: str, work: Callable[[LoadedModel], T]) -> T:
    """`work` on the model without data, where it can be built and captured on meta, else with
    it."""
    from autopar.errors import CaptureError
    from autopar.models import load_model

    loaded = load_model(model, meta=True)
    try:
        return work(loaded)
    except CaptureError:
        if not loaded.on_meta:
            raise
    return work(load_model(model))


def search_options(search: Search) -> SearchOptions:
    from autopar.options import SearchOptions

    options = SearchOptions()
    values: dict[str, Any] = {
        "num_stages": search.stages,
        "num_microbatches": search.microbatches,
        "mesh_shape": None if search.mesh is None else _mesh(search.mesh),
        "microbatch_limit": search.microbatch_limit,
        "placements": _placements(search.place or []),
        "cache": not search.no_cache,
        "time_limit_s": search.time_limit or options.time_limit_s,
    }
    if search.schedule is not None:
        values["schedule"] = search.schedule
    if search.remat is not None:
        values["remat"] = search.remat
    if search.solver is not None:
        values["solver"] = type(options.solver)(search.solver.value)
    return SearchOptions(**values)


def _mesh(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(x\d+)*", text):
        raise typer.BadParameter(f"a mesh reads like 2x4: got {text!r}", param_hint="--mesh")
    return tuple(map(int, text.split("x")))


def _placements(items: Sequence[str]) -> Mapping[str, str]:
    placements = {}
    for item in items:
        name, equals, layout = item.rpartition("=")
        if not equals or not name or not layout:
            raise typer.BadParameter(
                f"a placement reads like lm_head.weight=S0: got {item!r}", param_hint="--place"
            )
        placements[name] = layout
    return placements


def cluster_of(text: str | None) -> Any:
    from cost_models import Cluster

    if text is None:
        return None
    if not text.endswith(".toml"):
        return Cluster.parse(text)
    if not Path(text).is_file():
        raise typer.BadParameter(f"no such file: {text}", param_hint="--cluster")
    return Cluster.from_toml(text)
