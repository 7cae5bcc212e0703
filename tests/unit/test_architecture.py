"""The house: which module may import which, and what no module does. Reads the sources, imports
nothing."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Bottom to top; a module imports from rows above its own in this list only. A package is one unit.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("cost_models",),
    ("autopar.errors", "autopar.cache", "autopar.forks", "autopar.garbage"),
    ("autopar.mesh", "autopar.ops", "autopar.layout", "autopar.actions"),
    ("autopar.graph",),
    ("autopar.sharding", "autopar.schedule"),
    ("autopar.plan",),
    ("autopar.estimate", "autopar.simulate"),
    ("autopar.intraop", "autopar.pace"),
    ("autopar.interop", "autopar.lowering", "autopar.options"),
    ("autopar.candidate", "autopar.explain"),
    ("autopar.search",),
    ("autopar.compile",),
    ("autopar.planner", "autopar.runtime"),
    ("autopar.api", "autopar.models"),
    ("autopar.verify",),
    ("autopar.report",),
    ("autopar",),  # autopar/__init__.py: the public names
    ("autopar.arguments",),
    ("autopar.questions",),
    ("autopar.cli",),
    ("autopar.__main__",),
)
FLOOR = {unit: number for number, units in enumerate(FLOORS) for unit in units}

# Solvers work on arrays.
NO_TORCH = (
    *(f"autopar.intraop.{name}" for name in ("problem", "solver", "dual", "reduce", "free")),
    *(f"autopar.intraop.{name}" for name in ("eliminate", "fallback", "ilp", "cbc", "mathopt")),
    *(f"autopar.intraop.{name}" for name in ("sweep", "compiled", "native")),
    *(f"autopar.intraop.{name}" for name in ("memory", "improve")),
    *(f"autopar.interop.{name}" for name in ("problem", "dp", "tables", "infeasible")),
    *("autopar.schedule", "autopar.simulate", "autopar.pace", "autopar.plan", "autopar.mesh"),
    *("autopar.actions", "autopar.errors"),
)
# Calls torch.distributed; the others may name its tensor and placement types.
DISTRIBUTED = tuple(f"autopar.runtime.{name}" for name in ("comm", "peers", "transport"))
TENSOR_TYPES = (
    "autopar.layout",
    *(f"autopar.runtime.{name}" for name in ("module", "resting", "gradients")),
    "autopar.verify",
)
MAY_PRINT = ("autopar.report", "autopar.cli")


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of both packages, parsed."""
    found = {}
    for package in ("autopar", "cost_models"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


@cache
def imports(name: str) -> tuple[str, ...]:
    """Modules that a module imports anywhere in its text, sub-modules by their full name."""
    found = []
    for node in ast.walk(modules()[name]):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{name}: imports are absolute"
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            inner = [member for member in members if member in modules()]
            found += inner or [node.module]
    return tuple(found)


def unit_of(name: str) -> str:
    """ "autopar.graph" of "autopar.graph.capture"; cost_models is one unit."""
    parts = name.split(".")
    return ".".join(parts[: 1 if parts[0] == "cost_models" else 2])


def is_ours(name: str) -> bool:
    return name.split(".")[0] in ("autopar", "cost_models")


def reached(name: str) -> Iterator[str]:
    """Everything that importing a module imports, packages of ours followed."""
    seen, todo = {name}, [name]
    while todo:
        for found in imports(todo.pop()):
            yield found
            if found in modules() and found not in seen:
                seen.add(found)
                todo.append(found)


@pytest.mark.parametrize("name", modules())
def test_imports_go_down(name: str) -> None:
    own = unit_of(name)
    assert own in FLOOR, f"{own} has no floor: give it one in FLOORS"
    for found in filter(is_ours, imports(name)):
        unit = unit_of(found)
        assert unit == own or FLOOR[unit] < FLOOR[own], (
            f"{name} imports {found}, which is not below"
        )


@pytest.mark.parametrize("name", [n for n in modules() if n.startswith("cost_models")])
def test_cost_models_know_no_programs(name: str) -> None:
    assert not [m for m in imports(name) if m.split(".")[0] in ("autopar", "torch")]


@pytest.mark.parametrize("name", NO_TORCH)
def test_solvers_are_free_of_torch(name: str) -> None:
    assert name in modules(), f"{name} is gone: take it off the list"
    assert not [m for m in reached(name) if m.split(".")[0] == "torch"]


def test_three_modules_call_torch_distributed() -> None:
    for name in modules():
        for found in imports(name):
            if found.startswith(("torch.distributed", "torch._C._distributed")):
                is_type = found.startswith("torch.distributed.tensor") and name in TENSOR_TYPES
                assert name in DISTRIBUTED or is_type, f"{name} imports {found}"
        dotted = [ast.unparse(n) for n in ast.walk(modules()[name]) if isinstance(n, ast.Attribute)]
        assert not [d for d in dotted if d.startswith("torch.distributed")], name


@pytest.mark.parametrize("name", modules())
def test_no_global_state_and_no_printing(name: str) -> None:
    for node in ast.walk(modules()[name]):
        assert not isinstance(node, ast.Global), f"{name}:{node.lineno} has a global statement"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            printing = node.func.id == "print" and not name.startswith(MAY_PRINT)
            assert not printing, f"{name}:{node.lineno} prints"


def test_the_checks_see_what_they_look_for() -> None:
    assert unit_of("cost_models.hardware") == "cost_models"
    assert unit_of("autopar.graph.capture") == "autopar.graph"
    assert "autopar.graph.program" in imports("autopar.estimate")
    assert "torch" in set(reached("autopar.estimate"))
