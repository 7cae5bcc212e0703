"""HiGHS and CP-SAT through OR-Tools' MathOpt. Imports OR-Tools inside the call only.

(Never import highspy in the same process: each brings its own HiGHS, and symbols clash.)
CP-SAT takes integers only: there the edge products are binaries too, and the memory row stays in
whole bytes (scaled, its rounding cut off plans at the budget, and the bound with them).
"""

from __future__ import annotations

import datetime
import time
from enum import StrEnum
from typing import Any

import numpy as np

from autopar.errors import SolverError
from autopar.intraop.ilp import LinearProgram, infeasible, linearise, solution
from autopar.intraop.problem import IntraOpProblem, IntraOpSolution


class Engine(StrEnum):
    """The MathOpt solvers that can take this program."""

    HIGHS = "highs"
    CP_SAT = "cp_sat"


def solve_mathopt(
    problem: IntraOpProblem,
    engine: Engine,
    *,
    time_limit_s: float,
    target_gap: float,
    start: tuple[int, ...] | None = None,
) -> IntraOpSolution:
    """Solve on one thread with a fixed seed. Raises NoFeasiblePlan, or SolverError without any
    incumbent.
    """
    try:
        from ortools.math_opt.python import mathopt
    except ImportError as error:
        raise SolverError(f"{engine} needs OR-Tools: pip install ortools ({error})") from error
    started = time.monotonic()
    exact = engine is Engine.CP_SAT
    program = linearise(problem, scale_memory=not exact)
    model = mathopt.Model.from_model_proto(_model_proto(program, integer_e=exact))
    left_s = max(0.1, time_limit_s - (time.monotonic() - started))
    kind = mathopt.SolverType.HIGHS if engine is Engine.HIGHS else mathopt.SolverType.CP_SAT
    columns = list(model.variables())
    hints = []
    if start is not None:
        y = program.vector(start)
        hints = [mathopt.SolutionHint(dict(zip(columns[: len(y)], y.tolist(), strict=True)))]
    try:
        result = mathopt.solve(
            model,
            kind,
            params=_parameters(mathopt, engine, left_s, target_gap),
            model_params=mathopt.ModelSolveParameters(solution_hints=hints),
        )
    except Exception as error:  # MathOpt raises errors of many classes, some of them from pybind
        raise SolverError(f"{engine} failed: {error!r}") from error
    reason = result.termination.reason
    if reason == mathopt.TerminationReason.INFEASIBLE:
        raise infeasible(problem)
    if not result.has_primal_feasible_solution():
        raise SolverError(
            f"{engine} found no assignment in {time_limit_s:.1f} s ({reason.name.lower()}): "
            "raise the time limit, or use the dual solver"
        )
    values = np.array(result.variable_values(columns[: program.num_binary]))
    return solution(
        problem,
        program.choice(values),
        result.dual_bound() * program.objective_unit_s,
        solver=str(engine),
        started=started,
        stats={"columns": len(program.objective), "termination": reason.name.lower()},
    )


def _model_proto(program: LinearProgram, *, integer_e: bool) -> Any:
    from ortools.math_opt import model_pb2

    n, rows = len(program.objective), len(program.lower)
    proto = model_pb2.ModelProto()
    proto.variables.ids.extend(range(n))
    proto.variables.lower_bounds.extend(np.zeros(n).tolist())
    proto.variables.upper_bounds.extend(np.ones(n).tolist())
    num_integer = n if integer_e else program.num_binary
    proto.variables.integers.extend([True] * num_integer + [False] * (n - num_integer))
    proto.linear_constraints.ids.extend(range(rows))
    proto.linear_constraints.lower_bounds.extend(program.lower.tolist())
    proto.linear_constraints.upper_bounds.extend(program.upper.tolist())
    order = np.lexsort((program.column, program.row))
    proto.linear_constraint_matrix.row_ids.extend(program.row[order].tolist())
    proto.linear_constraint_matrix.column_ids.extend(program.column[order].tolist())
    proto.linear_constraint_matrix.coefficients.extend(program.value[order].tolist())
    (used,) = np.nonzero(program.objective)
    proto.objective.linear_coefficients.ids.extend(used.tolist())
    proto.objective.linear_coefficients.values.extend(program.objective[used].tolist())
    return proto


def _parameters(mathopt: Any, engine: Engine, time_limit_s: float, target_gap: float) -> Any:
    from ortools.math_opt.solvers import highs_pb2

    parameters = mathopt.SolveParameters(
        time_limit=datetime.timedelta(seconds=time_limit_s),
        random_seed=0,
        relative_gap_tolerance=target_gap,
        absolute_gap_tolerance=0.0,
    )
    if engine is Engine.HIGHS:  # MathOpt refuses `threads` here
        parameters.highs = highs_pb2.HighsOptionsProto(string_options={"parallel": "off"})
    else:
        parameters.threads = 1
    return parameters
