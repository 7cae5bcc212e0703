"""CBC, the solver that PuLP (below 4) ships: an MPS file in, a solution file out.

PuLP's own expressions take minutes at 1e5 columns, so the file is written from the arrays. PuLP is
imported inside the call only, for the path of its binary.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

from autopar.errors import SolverError
from autopar.intraop.ilp import LinearProgram, infeasible, linearise, solution
from autopar.intraop.problem import FloatArray, IntraOpProblem, IntraOpSolution

_BOUND = re.compile(r"^Lower bound:\s+(\S+)", re.MULTILINE)
_GRACE_S = 30.0
"""CBC checks its limit between steps only; after this much more it is stopped."""


def solve_cbc(
    problem: IntraOpProblem, *, time_limit_s: float, target_gap: float
) -> IntraOpSolution:
    """Solve on one thread with a fixed seed. Raises NoFeasiblePlan, or SolverError without any
    incumbent.
    """
    binary = _binary()
    started = time.monotonic()
    program = linearise(problem)
    with tempfile.TemporaryDirectory(prefix="autopar-cbc-") as folder:
        model, answer = Path(folder, "model.mps"), Path(folder, "answer.txt")
        model.write_text(_mps(program))
        left_s = max(0.1, time_limit_s - (time.monotonic() - started))
        command = [binary, str(model), "-sec", f"{left_s:.3f}", "-timeMode", "elapsed"]
        command += [
            "-ratio",
            repr(target_gap),
            "-allow",
            "0",
            "-threads",
            "0",
            "-randomCbcSeed",
            "1",
        ]
        command += ["-printingOptions", "normal", "-solve", "-solution", str(answer)]
        try:
            run = subprocess.run(
                command, capture_output=True, text=True, timeout=left_s + _GRACE_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise SolverError(f"CBC ignored its time limit of {left_s:.1f} s") from error
        status, y = _read(answer, program.num_binary)
    if "infeasible" in status.lower():
        raise infeasible(problem)
    if y is None:
        raise SolverError(
            f"CBC found no assignment in {time_limit_s:.1f} s ({status or run.stdout[-200:]}): "
            "raise the time limit, or use the dual solver"
        )
    choice = program.choice(y)
    bound = _bound(run.stdout, status, problem.seconds(choice), program)
    stats = {"columns": len(program.objective), "termination": status}
    return solution(problem, choice, bound, solver="cbc", started=started, stats=stats)


def _binary() -> str:
    try:
        from pulp.apis.coin_api import pulp_cbc_path
    except ImportError as error:
        raise SolverError(f"CBC needs PuLP below 4: pip install 'pulp<4' ({error})") from error
    path = Path(pulp_cbc_path).resolve()
    if not path.exists():
        raise SolverError(f"PuLP has no CBC at {path}: pip install 'pulp<4'")
    if not os.access(path, os.X_OK):  # some installers drop the bit; PuLP restores it too
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def _mps(program: LinearProgram) -> str:
    """Free-format MPS. Rows r0.., columns c0.., objective row `z`."""
    order = np.lexsort((program.row, program.column))
    row, column, value = program.row[order], program.column[order], program.value[order]
    n = len(program.objective)
    equal = program.lower == program.upper
    lines = ["NAME autopar FREE", "ROWS", " N z"]
    lines += [f" {'E' if same else 'L'} r{i}" for i, same in enumerate(equal.tolist())]
    lines += ["COLUMNS", " MARKER 'MARKER' 'INTORG'"]
    starts = np.searchsorted(column, np.arange(n + 1)).tolist()
    rows, values, costs = row.tolist(), value.tolist(), program.objective.tolist()
    for c in range(n):
        if c == program.num_binary:
            lines.append(" MARKER 'MARKER' 'INTEND'")
        lines.append(f" c{c} z {costs[c]!r}")
        lines += [f" c{c} r{rows[k]} {values[k]!r}" for k in range(starts[c], starts[c + 1])]
    if program.num_binary == n:
        lines.append(" MARKER 'MARKER' 'INTEND'")
    lines.append("RHS")
    lines += [f" RHS r{i} {b!r}" for i, b in enumerate(program.upper.tolist()) if b != 0.0]
    lines.append("BOUNDS")
    lines += [f" UP BND c{c} 1" for c in range(n)]
    return "\n".join([*lines, "ENDATA", ""])


def _read(answer: Path, num_binary: int) -> tuple[str, FloatArray | None]:
    """(status line, x) of a CBC solution file; x is None where there is no incumbent."""
    if not answer.exists():
        return "", None
    status, *lines = answer.read_text().splitlines()
    if "infeasible" in status.lower() or "no integer" in status.lower():
        return status, None
    y = np.zeros(num_binary)
    for line in lines:
        fields = line.replace("**", " ").split()
        column = int(fields[1][1:])
        if column < num_binary:
            y[column] = float(fields[2])
    return status, y


def _bound(log: str, status: str, seconds: float, program: LinearProgram) -> float:
    """CBC prints a lower bound only when it stops early; without one the optimum is proven."""
    found = _BOUND.findall(log)
    if found:
        return float(found[-1]) * program.objective_unit_s
    return seconds if status.startswith("Optimal") else -np.inf
