"""One stage: what is predicted for known choices, budgets kept, infeasible ones explained."""

from __future__ import annotations

import pytest

from autopar.errors import NoFeasiblePlan, SolverError
from autopar.intraop.solver import Solver
from autopar.intraop.stage import SolverOptions, StageSolution, solve_stage
from autopar.intraop.stage_problem import StageContext
from tests.unit.intraop.stages import costs_of, stage_of

W = 64 * 256 * 4  # bytes of one weight of the MLP

_CONTEXT = StageContext()
_OPTIONS = SolverOptions(time_limit_s=3.0, fallback=False)


def solved(
    name: str = "mlp",
    mesh: tuple[int, ...] = (2,),
    budget: float | None = None,
    context: StageContext = _CONTEXT,
    options: SolverOptions = _OPTIONS,
) -> StageSolution:
    stage = stage_of(name)
    return solve_stage(
        stage.graph, stage.table, costs_of(mesh), context, budget_bytes=budget, options=options
    )


def test_bytes_of_data_parallel_weights() -> None:
    pins = {"up.weight": "R", "down.weight": "R"}
    p = solved(context=StageContext(pins=pins)).prediction
    assert (p.parameter_bytes, p.optimizer_bytes) == (2 * W, 4 * W)


def test_bytes_of_tensor_parallel_weights() -> None:
    pins = {"up.weight": "S0", "down.weight": "S1"}
    found = solved(context=StageContext(pins=pins))
    held = sum(W // 2 if c.rest == c.step else W // 2 + W for c in found.parameters.values())
    assert found.prediction.parameter_bytes == held
    assert found.prediction.optimizer_bytes == 2 * W


def test_parameters_of_another_stage_have_no_optimizer_here() -> None:
    found = solved(context=StageContext(owned=frozenset({"up.weight"})))
    rest = found.parameters["parameter_up_weight"].rest
    assert found.prediction.optimizer_bytes == (
        W if rest == (0,) else 2 * W if rest == (-1,) else W
    )


def test_a_tied_weight_is_kept_once() -> None:
    found = solved("tied")
    first, second = (found.parameters[f"parameter_{n}_weight"] for n in ("one", "two"))
    assert second.rest == second.step
    numel = 64 * 64 / (1 if first.rest == (-1,) else 2)
    assert found.prediction.optimizer_bytes == 8 * numel


def test_once_per_step_work_is_divided() -> None:
    one, many = solved().prediction, solved(context=StageContext(num_microbatches=64)).prediction
    assert one.step_s > 0 and many.step_s > 0
    whole = one.forward_s + one.backward_s + one.step_s
    assert solved().seconds == pytest.approx(whole)


def test_microbatches_in_flight_are_saved() -> None:
    one, four = solved().prediction, solved(context=StageContext(in_flight=4)).prediction
    assert four.in_flight == 4
    assert four.peak_bytes >= one.peak_bytes + 2.9 * min(one.saved_bytes, four.saved_bytes)


@pytest.mark.parametrize("share", [0.9, 0.7, 0.6])
@pytest.mark.parametrize("name", ["mlp", "attention"])
def test_budgets_are_kept(name: str, share: float) -> None:
    context = StageContext(num_microbatches=8, in_flight=2)
    free = solved(name, (2, 2), None, context)
    budget = share * free.prediction.peak_bytes
    try:
        tight = solved(name, (2, 2), budget, context)
    except NoFeasiblePlan as error:
        assert share < 0.9 and "GiB" in str(error)
        return
    assert tight.prediction.peak_bytes <= budget
    assert tight.seconds >= free.seconds * (1 - 1e-9)
    assert tight.bound <= tight.seconds


def test_nothing_fits_a_thousand_bytes() -> None:
    with pytest.raises(NoFeasiblePlan, match=r"nothing fits the budget of 0.00 GiB.*closest") as e:
        solved(budget=1000.0)
    assert e.value.least_bytes is not None and e.value.least_bytes > 1000


@pytest.mark.parametrize("solver", [Solver.HIGHS, Solver.CBC])
def test_backends_find_the_same(solver: Solver) -> None:
    found = solved(options=SolverOptions(solver, 20.0, 0.0))
    assert found.seconds == pytest.approx(solved(options=SolverOptions(target_gap=0.0)).seconds)


def test_a_backend_that_fails_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise SolverError("OR-Tools is missing")

    monkeypatch.setattr("autopar.intraop.fallback.solve_mathopt", missing)
    monkeypatch.setattr("autopar.intraop.branch._MAX_PARTS", 0)  # else it closes the gap
    context = StageContext(num_microbatches=8, in_flight=2)
    free = solved("mlp", (2, 2), None, context)
    options = SolverOptions(time_limit_s=3.0, target_gap=0.0)
    budget = 0.9 * free.prediction.peak_bytes
    tight = solved("mlp", (2, 2), budget, context, options)
    assert tight.gap > 0 and free.notes == ()
    assert any("OR-Tools is missing" in note for note in tight.notes)
    assert tight.bound >= free.bound * (1 - 1e-9)


OFFLOAD = StageContext(offload=True)


def test_what_rests_on_the_host_leaves_its_copy_on_the_device() -> None:
    """Of one device's two weights W, with their gradients W and states 2 W: the copy and the
    gradient stay, 2 W each."""
    both = solved(mesh=(1,), context=OFFLOAD)
    assert not any(c.host for c in both.parameters.values())  # it costs, and there is room
    assert both.prediction.host_bytes == 0
    budget = both.prediction.peak_bytes - 2 * W
    with pytest.raises(NoFeasiblePlan):
        solved(mesh=(1,), budget=budget)
    one = solved(mesh=(1,), budget=budget, context=OFFLOAD)
    assert sum(c.host for c in one.parameters.values()) == 1
    p = one.prediction
    assert (p.parameter_bytes, p.gradient_bytes) == (2 * W, 0.0)  # one microbatch: none stand
    assert (p.optimizer_bytes, p.host_bytes) == (2 * W, 4 * W)
    assert p.peak_bytes <= budget
    way = 5e-6 + W / 53.6e9
    assert p.gather_s == pytest.approx(way) and p.reduce_s == pytest.approx(way)
    slower = 2 * way + 28 * (W / 4) / 38.4e9
    slower -= 28 * (W / 4) / (0.9 * 3.35e12)
    assert p.step_s - both.prediction.step_s == pytest.approx(slower)
    with pytest.raises(NoFeasiblePlan):
        solved(mesh=(1,), budget=budget - 2.1 * W, context=OFFLOAD)
