from __future__ import annotations

from dataclasses import replace

import torch

from autopar.graph.program import Graph, GraphInput, InputKind, TensorMeta
from autopar.report.names import layers_text, parameter_groups
from autopar.report.text import plan_text
from tests.unit.report.plans import hand_plan

GOLDEN = """\
Plan of 8 layers on h100:1x8: 2 stages, 8 devices
├── 12.5 ms per step, predicted · schedule 1f1b, 4 microbatches · bubble 20.0 % · remat
│   selective · budget 72.0 GiB per device
├── searched for 1.52 s · stage solutions within 1.0 % of the optimum (objective 10.0 ms, bound
│   9.90 ms)
│   exact stages 1.50 s, layers 20.0 ms
├── Stage 0: first, model.h.0 .. 2 on mesh 2x2 (devices 0-3)
│   ├── forward 1.00 ms, backward 2.00 ms per microbatch; 500 µs once per step
│   ├── peak 36.5 GiB per device ██████████░░░░░░░░░░ 50.7 % of the budget
│   │   parameters 4.00 GiB · gradients 4.00 GiB · optimizer 8.00 GiB · saved 2 x 10.0 GiB ·
│   │   transient 512 MiB
│   ├── parameters                    at rest  in the step  count
│   │   model_h_*_fc_weight           S0 S1    R S1             4
│   │   model_h_*_norm_{weight,bias}  R R      same             8
│   └── heavy operators  factor per mesh axis (how many)
│       addmm            b k (4)
├── Stage 1: model.h.3 .. 5, last on mesh 4 (devices 4-7)
│   ├── forward 1.00 ms, backward 2.00 ms per microbatch; 500 µs once per step
│   ├── peak 26.5 GiB per device ███████░░░░░░░░░░░░░ 36.8 % of the budget
│   │   parameters 4.00 GiB · gradients 4.00 GiB · optimizer 8.00 GiB · saved 1 x 10.0 GiB ·
│   │   transient 512 MiB
│   ├── parameters                    at rest  in the step  count
│   │   model_h_*_fc_weight           S0 S1    R S1             4
│   │   model_h_*_norm_{weight,bias}  R R      same             8
│   └── heavy operators  factor per mesh axis (how many)
│       mm               replicated (1), k (1)
│       bmm              h (1)
├── Candidates that lost
│   └── +20.0 % (15.0 ms): 1 stage(s): layers 0.. on 2x4
├── Note: remat none did not fit: needs 80 GiB
└── Warning: aten.cumsum.default (2) has no sharding rule and is replicated, as it crashes. Way
    out: write one with autopar.register_rule
"""


def test_a_hand_built_plan_reads_as_the_golden_text() -> None:
    assert plan_text(hand_plan(), width=96) == GOLDEN


def test_every_line_fits_the_width() -> None:
    assert max(map(len, plan_text(hand_plan(), width=72).splitlines())) <= 72


def test_the_same_plan_without_a_search_record_has_no_proof_and_no_candidates() -> None:
    plan = hand_plan()
    text = plan_text(replace(plan, search=type(plan.search)(), fallbacks={}, rules={}))
    assert "bound" not in text
    assert "lost" not in text
    assert "Warning" not in text


def test_a_full_stage_is_as_wide_as_its_bar() -> None:
    text = plan_text(replace(hand_plan(), budget_bytes=26.5 * 2**30))
    assert "█" * 20 in text
    assert "137.7 %" in text


def test_runs_of_blocks_are_compressed() -> None:
    names = ("first", "enc.0", "enc.1", "enc.2", "dec.0", "dec.2", "last")
    assert layers_text(names) == "first, enc.0 .. 2, dec.0, dec.2, last"


def test_with_the_graph_names_are_the_models_own_and_bytes_are_known() -> None:
    stage = hand_plan().stages[0]
    meta = TensorMeta((4, 8), torch.float32)
    inputs = tuple(
        GraphInput(name, InputKind.PARAMETER, meta, _dotted(name)) for name in stage.parameters
    )
    graph = Graph(inputs, (), ())
    groups = parameter_groups(stage, graph)
    assert [(g.pattern, g.count, g.nbytes) for g in groups] == [
        ("model.h.*.fc.weight", 4, 512),
        ("model.h.*.norm.{weight,bias}", 8, 1024),
    ]


def _dotted(name: str) -> str:
    return name.removeprefix("parameter_").replace("_", ".")
