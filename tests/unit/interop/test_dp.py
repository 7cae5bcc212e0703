"""The inter-op solver against brute force, and what it says when nothing fits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest

from autopar.errors import NoFeasiblePlan, OptionError
from autopar.interop.dp import feasible_counts, solve, solve_each_count
from autopar.interop.problem import InterOpProblem, InterOpSolution
from autopar.interop.tables import CostTables
from autopar.schedule import ScheduleKind, in_flight_count


def random_problem(seed: int) -> InterOpProblem:
    """K <= 6, D <= 8, dyadic seconds (sums are exact in any order), some inf, any in-flight."""
    rng = np.random.default_rng(seed)
    layers, devices = int(rng.integers(1, 7)), int(rng.integers(1, 9))
    pool = [n for n in (1, 2, 3, 4, 6, 8) if n <= devices]
    sizes = tuple(int(n) for n in rng.choice(pool, size=int(rng.integers(1, 5))))
    microbatches, rows = int(rng.integers(1, 9)), int(rng.integers(1, 5))
    length = np.subtract.outer(np.arange(layers), np.arange(layers)).T[..., None] + 1
    noise = rng.integers(1, 64, size=(rows, layers, layers, len(sizes)))
    seconds = (np.maximum(length, 1) * 32 // np.array(sizes) + noise) / 64
    seconds[rng.random(seconds.shape) < rng.choice([0.0, 0.2, 0.6])] = math.inf
    transfer = rng.integers(0, 32, size=(layers, len(sizes))) / 64
    transfer[0] = 0
    low = int(rng.choice([1, 1, 1, 2, 3]))
    high = None if rng.random() < 0.6 else low + int(rng.integers(0, 3))
    return InterOpProblem(
        num_layers=layers,
        num_devices=(devices,),
        submesh_devices=sizes,
        num_microbatches=microbatches,
        stage_seconds=seconds,
        transfer_seconds=transfer,
        in_flight=tuple(int(f) for f in rng.integers(1, rows + 1, size=8)),
        min_stages=low,
        max_stages=high,
        bubble=(1.0, 0.5, 0.25)[seed % 3],
    )


def stage_costs(problem: InterOpProblem, cuts: list[int], chosen: tuple[int, ...]) -> list[float]:
    """t_i by the definition: stage i holds layers cuts[i]..cuts[i+1]-1."""
    costs = []
    for i, submesh in enumerate(chosen):
        first, last, f = cuts[i], cuts[i + 1] - 1, problem.in_flight[len(chosen) - i - 1]
        seconds = problem.stage_seconds[f - 1, first, last, submesh]
        costs.append(float(seconds + problem.transfer_seconds[first, submesh]))
    return costs


def step_seconds(problem: InterOpProblem, t: list[float]) -> float:
    return problem.bubble * sum(t) + (problem.num_microbatches - problem.bubble) * max(t)


def devices_used(problem: InterOpProblem, chosen: tuple[int, ...]) -> tuple[int, ...]:
    """Of each group."""
    used = [0] * len(problem.num_devices)
    for m in chosen:
        used[problem.submesh_groups[m]] += problem.submesh_devices[m]
    return tuple(used)


def brute_force_each(problem: InterOpProblem) -> dict[int, float]:
    """The least step over all cuts and all submesh assignments, for each feasible number of
    stages."""
    found: dict[int, float] = {}
    layers, choices = problem.num_layers, range(len(problem.submesh_devices))
    for num_stages in range(problem.min_stages, min(layers, problem.max_stages or layers) + 1):
        assignments = [
            chosen
            for chosen in product(choices, repeat=num_stages)
            if devices_used(problem, chosen) == problem.num_devices
        ]
        best = math.inf
        for inner in combinations(range(1, layers), num_stages - 1):
            for chosen in assignments:
                t = stage_costs(problem, [0, *inner, layers], chosen)
                best = min(best, step_seconds(problem, t))
        if math.isfinite(best):
            found[num_stages] = best
    return found


def brute_force(problem: InterOpProblem) -> float:
    return min(brute_force_each(problem).values(), default=math.inf)


def check_solution(problem: InterOpProblem, solution: InterOpSolution) -> None:
    stages = solution.stages
    cuts = [stage.first_layer for stage in stages] + [problem.num_layers]
    assert cuts[0] == 0
    assert [stage.last_layer + 1 for stage in stages] == cuts[1:]
    chosen = tuple(stage.submesh for stage in stages)
    assert devices_used(problem, chosen) == problem.num_devices
    assert problem.min_stages <= len(stages) <= (problem.max_stages or problem.num_layers)
    t = stage_costs(problem, cuts, chosen)
    assert [stage.seconds for stage in stages] == t
    assert solution.t_max == max(t)
    assert solution.seconds == pytest.approx(step_seconds(problem, t), rel=1e-12)


@pytest.mark.parametrize("seed", range(200))
def test_solver_matches_brute_force(seed: int) -> None:
    problem = random_problem(seed)
    expected = brute_force(problem)
    if math.isinf(expected):
        with pytest.raises(NoFeasiblePlan):
            solve(problem)
        return
    solution = solve(problem)
    assert solution.seconds == expected
    assert solution.stats.lower_bound_s == expected
    check_solution(problem, solution)
    assert solve(problem) == solution
    loose = solve(problem, relative_gap=0.1)
    assert expected <= loose.seconds <= expected * 1.1 + 1e-12
    assert loose.stats.lower_bound_s <= expected


def two_groups(seed: int) -> InterOpProblem:
    """A random problem and half of its devices again in a second group, 1.5 times as slow."""
    rng = np.random.default_rng(seed)
    one = random_problem(seed)
    sizes, first = one.submesh_devices, np.asarray(one.stage_seconds)
    low = min(one.min_stages, 2)
    return replace(
        one,
        num_devices=(int(rng.choice(sizes, 2).sum()), int(rng.choice(sizes, 1 + seed % 2).sum())),
        submesh_devices=sizes + sizes,
        submesh_groups=(0,) * len(sizes) + (1,) * len(sizes),
        stage_seconds=np.concatenate([first, 1.5 * first], axis=3),
        transfer_seconds=np.concatenate([one.transfer_seconds] * 2, axis=1),
        min_stages=low,
        max_stages=low + 2,
    )


@pytest.mark.parametrize("seed", range(150))
def test_two_groups_match_brute_force(seed: int) -> None:
    problem = two_groups(seed)
    expected = brute_force_each(problem)
    if not expected:
        with pytest.raises(NoFeasiblePlan):
            solve(problem)
        return
    solution = solve(problem)
    assert solution.seconds == min(expected.values())
    check_solution(problem, solution)


def test_two_groups_cover_both_outcomes() -> None:
    feasible = sum(bool(brute_force_each(two_groups(seed))) for seed in range(150))
    assert 40 <= feasible <= 120


@pytest.mark.parametrize("make", [random_problem, two_groups])
def test_each_number_of_stages_matches_brute_force(make: Callable[[int], InterOpProblem]) -> None:
    for seed in range(60):
        problem = make(seed)
        expected = brute_force_each(problem)
        assert feasible_counts(problem) == sorted(expected)
        if not expected:
            continue
        found = solve_each_count(problem)
        assert {count: solution.seconds for count, solution in found.items()} == expected
        for count, solution in found.items():
            assert len(solution.stages) == count
            check_solution(problem, solution)
        limit = 1.2 * min(expected.values())
        near = solve_each_count(problem, within=1.2)
        assert {c: s.seconds for c, s in near.items()} == {
            c: seconds for c, seconds in expected.items() if seconds <= limit
        }


def test_slower_devices_get_fewer_layers() -> None:
    """Three kinds of speed 4, 2 and 1 with four devices each share 28 layers as 16, 8 and 4."""
    layers, speeds = 28, np.array([4.0, 2.0, 1.0])
    first, last = np.indices((layers, layers))
    seconds = np.maximum(last - first + 1, 1)[None, :, :, None] / speeds
    problem = InterOpProblem(
        num_layers=layers,
        num_devices=(4, 4, 4),
        submesh_devices=(4, 4, 4),
        submesh_groups=(0, 1, 2),
        num_microbatches=16,
        stage_seconds=seconds,
        transfer_seconds=np.zeros((layers, 3)),
        in_flight=(1, 1, 1),
    )
    solution = solve(problem)
    held = {s.submesh: s.last_layer - s.first_layer + 1 for s in solution.stages}
    assert held == {0: 16, 1: 8, 2: 4}
    assert solution.t_max == 4.0


@pytest.mark.parametrize("seed", range(200, 230))
def test_solver_matches_brute_force_on_rounded_sums(seed: int) -> None:
    whole = random_problem(seed)
    problem = replace(
        whole,
        stage_seconds=whole.stage_seconds * math.pi,
        transfer_seconds=whole.transfer_seconds * math.e,
    )
    expected = brute_force(problem)
    if math.isfinite(expected):
        assert solve(problem).seconds == pytest.approx(expected, rel=1e-12)


def test_random_problems_cover_both_outcomes() -> None:
    infeasible = sum(math.isinf(brute_force(random_problem(seed))) for seed in range(60))
    assert 5 <= infeasible <= 40


def shaped_problem(
    num_layers: int, num_devices: int, num_microbatches: int, bytes_scale: float = 1.0
) -> InterOpProblem:
    """Layers of slightly different weight; devices help less and less; in-flight costs memory."""
    rng = np.random.default_rng(0)
    sizes = tuple(2**p for p in range(num_devices.bit_length()))
    ends = np.concatenate([[0.0], np.cumsum(1 + 0.1 * rng.random(num_layers))])
    first, last = np.indices((num_layers, num_layers))
    work = (ends[last + 1] - ends[first])[None, :, :, None]
    devices = np.array(sizes, dtype=float)
    flights = np.arange(1, num_layers + 1)[:, None, None, None]
    seconds = work / devices * (1 + 0.05 * np.log2(devices) ** 1.5)
    size = bytes_scale * work * (16 + 0.5 * flights) / devices
    budget = 20 * num_layers / num_devices
    seconds = np.where(size > budget, 1.3 * seconds, seconds)
    seconds[(size > 2 * budget) | (work <= 0)] = math.inf
    transfer = np.full((num_layers, len(sizes)), 0.01)
    transfer[0] = 0
    counts = [
        in_flight_count(ScheduleKind.ONE_F_ONE_B, s, num_microbatches)
        for s in range(1, num_layers + 1)
    ]
    return InterOpProblem(
        num_layers=num_layers,
        num_devices=(num_devices,),
        submesh_devices=sizes,
        num_microbatches=num_microbatches,
        stage_seconds=seconds,
        transfer_seconds=transfer,
        in_flight=tuple(counts),
    )


def test_pins_never_help_and_some_pin_is_free() -> None:
    problem = shaped_problem(10, 8, 8)
    free = solve(problem)
    pinned = {}
    for num_stages in range(1, 9):
        try:
            pinned[num_stages] = solve(problem.with_stages(num_stages)).seconds
        except NoFeasiblePlan:
            continue
        assert pinned[num_stages] >= free.seconds
    assert min(pinned.values()) == pinned[len(free.stages)] == free.seconds
    upper = [solve(replace(problem, max_stages=s)).seconds for s in range(min(pinned), 9)]
    assert upper == sorted(upper, reverse=True)


def test_one_microbatch_minimises_the_sum() -> None:
    solution = solve(shaped_problem(8, 4, 1))
    assert solution.seconds == pytest.approx(sum(s.seconds for s in solution.stages))


def test_a_layer_that_fits_nowhere_is_named() -> None:
    problem = shaped_problem(6, 4, 4)
    seconds = problem.stage_seconds.copy()
    seconds[:, :4, 3:] = math.inf
    with pytest.raises(NoFeasiblePlan, match=r"layer 3 fits in no stage .*1, 2, 4 devices"):
        solve(replace(problem, stage_seconds=seconds))


def test_devices_that_no_submeshes_sum_to() -> None:
    problem = shaped_problem(6, 4, 4)
    with pytest.raises(NoFeasiblePlan, match="use exactly 5 devices"):
        solve(replace(problem, num_devices=(5,), submesh_devices=(2, 2, 4)))
    with pytest.raises(NoFeasiblePlan, match=r"no 1 stage .* use exactly 3 devices"):
        solve(replace(problem.with_stages(1), num_devices=(3,)))


def test_a_binding_pin_is_named() -> None:
    problem = shaped_problem(6, 4, 4)
    seconds = problem.stage_seconds.copy()
    seconds[:, 0, 5] = math.inf
    pinned = replace(problem, stage_seconds=seconds).with_stages(1)
    with pytest.raises(NoFeasiblePlan, match=r"1 stage cannot fit, but 2, 3, 4 can"):
        solve(pinned)
    with pytest.raises(NoFeasiblePlan, match=r"1 stage cannot fit, but 2 can"):
        solve(replace(pinned, stage_seconds=seconds[:2]))  # rows for more in flight are not known


def test_binding_microbatches_in_flight_are_named() -> None:
    problem = shaped_problem(6, 4, 4)
    seconds = problem.stage_seconds.copy()
    seconds[1:] = math.inf
    seconds[0, 0, 5] = math.inf
    with pytest.raises(NoFeasiblePlan, match=r"not with 1\.\.4 microbatches in flight"):
        solve(replace(problem, stage_seconds=seconds))


def test_gap_is_checked() -> None:
    with pytest.raises(OptionError, match="relative_gap"):
        solve(shaped_problem(2, 2, 2), relative_gap=-0.1)


def test_forty_eight_layers_on_sixty_four_devices_are_quick() -> None:
    problem = shaped_problem(48, 64, 64)
    start = time.perf_counter()
    solution = solve(problem)
    elapsed_s = time.perf_counter() - start
    print(f"K=48 D=64: {elapsed_s:.2f} s, {solution.stats}")
    check_solution(problem, solution)
    assert elapsed_s < 30  # shared machines; about 0.2 s on one quiet core


def test_all_stage_counts_of_a_hundred_layers_on_a_thousand_devices() -> None:
    """In nodes of eight: 128 units. All in-flight rows are kept for the layers there are, once."""
    problem = replace(shaped_problem(126, 128, 64), max_stages=64)
    start = time.perf_counter()
    tables = CostTables.of(problem)
    found = solve_each_count(problem, relative_gap=1e-2, within=1.1)
    elapsed_s = time.perf_counter() - start
    print(f"K=126 D=128: {elapsed_s:.2f} s, counts {sorted(found)}")
    for solution in found.values():
        check_solution(problem, solution)
    assert tables.cost.nbytes + tables.choice.nbytes < 100 * 2**20
    assert elapsed_s < 30
