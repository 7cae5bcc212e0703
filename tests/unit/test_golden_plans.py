"""Plans that are known by theory, and their text. After a change that is meant:
`python -m tests.golden.update`, then review the difference."""

from __future__ import annotations

import pytest

from autopar.plan import ParallelPlan, StagePlan
from tests.golden.update import CASES, FOLDER, plan_of, show


def planned(name: str) -> tuple[ParallelPlan, StagePlan]:
    plan = plan_of(CASES[name])
    return plan, plan.stages[0]


@pytest.mark.parametrize("name", CASES)
def test_text(name: str) -> None:
    golden = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    assert show(plan_of(CASES[name])) == golden


def test_no_text_without_a_case() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(CASES)


def test_huge_weights_and_few_rows_are_column_then_row_parallel() -> None:
    """Megatron's MLP: one all-reduce, of the small activations."""
    _, stage = planned("mlp_tensor_parallel")
    assert {n: p.rest for n, p in stage.parameters.items()} == {
        "parameter_up_weight": "S0",
        "parameter_down_weight": "S1",
    }
    assert (stage.strategies["mm"], stage.strategies["mm_1"]) == ("j", "k")
    assert all(p.rest == p.step for p in stage.parameters.values())


def test_small_weights_and_many_rows_are_data_parallel() -> None:
    _, stage = planned("mlp_data_parallel")
    assert all((p.rest, p.step) == ("R", "R") for p in stage.parameters.values())
    assert stage.inputs == {"batch_0": "S0"}
    assert (stage.strategies["mm"], stage.strategies["mm_1"]) == ("i", "i")


def test_gradients_of_many_microbatches_are_reduced_once() -> None:
    _, stage = planned("mlp_zero")
    assert all((p.rest, p.step) == ("S0", "R") for p in stage.parameters.values())
    assert {stage.outputs[name] for name in stage.parameters} == {"P"}


def test_a_tight_budget_shards_parameters_at_rest() -> None:
    free, tight = planned("mlp_zero")[0], planned("mlp_tight_budget")[0]
    assert free.stages[0].prediction.peak_bytes > tight.budget_bytes
    stage = tight.stages[0]
    assert stage.prediction.peak_bytes <= tight.budget_bytes
    assert all("S" in p.rest and "S" in p.step for p in stage.parameters.values())
    assert tight.step_s > free.step_s
