"""A small plan made by hand: eight layers, two stages of 2x2 and 1x4 H100s."""

from __future__ import annotations

from autopar.plan import (
    ParallelPlan,
    ParameterPlacement,
    Remat,
    SearchRecord,
    StagePlan,
    StagePrediction,
)
from autopar.schedule import ScheduleKind
from cost_models import Cluster

GIB = 2.0**30
_SPLIT = ParameterPlacement("S0 S1", "R S1")
_WHOLE = ParameterPlacement("R R", "R R")


def hand_plan() -> ParallelPlan:
    """Two stages; everything that the text shows is there once."""
    return ParallelPlan(
        graph="0123456789abcdef",
        cluster_text="h100:1x8",
        cluster=Cluster.parse("h100:1x8").to_dict(),
        num_microbatches=4,
        schedule=ScheduleKind.ONE_F_ONE_B,
        remat=(Remat.SELECTIVE,) * 8,
        layer_names=("first", *(f"model.h.{i}" for i in range(6)), "last"),
        stages=(
            _stage(0, 3, (2, 2), (0, 1, 2, 3), {f"addmm_{i}": "b k" for i in range(4)}),
            _stage(4, 7, (4,), (4, 5, 6, 7), {"mm": "-", "mm_1": "k", "bmm_2": "h"}),
        ),
        step_s=0.0125,
        bubble=0.2,
        budget_bytes=72 * GIB,
        search=SearchRecord(
            seconds={"layers": 0.02, "exact stages": 1.5},
            objective_s=0.010,
            bound_s=0.0099,
            notes=("remat none did not fit: needs 80 GiB",),
            candidates=(
                "12.50 ms: 2 stage(s): layers 0.. on 2x2, layers 4.. on 4",
                "15.00 ms: 1 stage(s): layers 0.. on 2x4",
            ),
        ),
        fallbacks={"aten.cumsum.default": 2},
        rules={"aten.cumsum.default": "replicated: it crashes"},
    )


def _stage(
    first: int,
    last: int,
    mesh: tuple[int, ...],
    devices: tuple[int, ...],
    strategies: dict[str, str],
) -> StagePlan:
    parameters = {}
    for block in range(first, last + 1):
        parameters[f"parameter_model_h_{block}_fc_weight"] = _SPLIT
        parameters[f"parameter_model_h_{block}_norm_weight"] = _WHOLE
        parameters[f"parameter_model_h_{block}_norm_bias"] = _WHOLE
    return StagePlan(
        first_layer=first,
        last_layer=last,
        axis_sizes=mesh,
        crosses_nodes=(False,) * len(mesh),
        devices=devices,
        strategies={**strategies, "view": "-", "relu_1": "b -"},
        parameters=parameters,
        inputs={},
        outputs={},
        prediction=StagePrediction(
            forward_s=0.001,
            backward_s=0.002,
            step_s=0.0005,
            parameter_bytes=4 * GIB,
            gradient_bytes=4 * GIB,
            optimizer_bytes=8 * GIB,
            saved_bytes=10 * GIB,
            in_flight=2 if first == 0 else 1,
            transient_bytes=0.5 * GIB,
        ),
    )
