from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch

from autopar.graph.program import Graph, GraphInput, InputKind, TensorMeta
from autopar.plan import ParameterPlacement
from autopar.report.names import heavy_strategies, layers_text, parameter_groups
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


def test_placements_that_differ_by_block_say_which_blocks() -> None:
    stage = hand_plan().stages[0]
    names = [name for name in stage.parameters if name.endswith("fc_weight")]
    other = ParameterPlacement("R R", "R R")
    changed = {**stage.parameters, names[1]: other, names[3]: other}
    patterns = [g.pattern for g in parameter_groups(replace(stage, parameters=changed))]
    assert patterns == [
        "model_h_{0, 2}_fc_weight",
        "model_h_*_norm_{weight,bias}",
        "model_h_{1, 3}_fc_weight",
    ]


def test_hubs_saves_and_recomputed_copies_are_not_heavy_operators() -> None:
    derived = {
        "parameter_h_0_attention_weight__hub": "-",
        "parameter_h_0_attention_weight__hubb": "-",
        "_scaled_dot_product_attention_1__save": "b",
        "_scaled_dot_product_attention_1__re": "b",
        "addmm_3__re2": "b",
    }
    stage = replace(hand_plan().stages[0], strategies={**derived, "addmm_3": "b k"})
    assert heavy_strategies(stage) == {"addmm": Counter({"b k": 1})}


def test_a_saved_plan_has_no_seconds_of_its_search() -> None:
    plan = type(hand_plan()).from_json(hand_plan().to_json())
    text = plan_text(plan)
    assert "searched" not in text and "within 1.0 % of the optimum" in text


def _dotted(name: str) -> str:
    return name.removeprefix("parameter_").replace("_", ".")
