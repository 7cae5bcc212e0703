"""Eight models of the zoo under four plans each on the virtual mesh, some more under one.

In float64, where a wrong program cannot hide behind rounding; the two-by-two plans in float32 too,
and against the user's own model. `python -m benchmarks.zoo` does all of the zoo in both.
"""

from __future__ import annotations

import pytest

from autopar.api import plan_model
from autopar.verify import verify_plan
from benchmarks.zoo import FAST_LINKS, PLANS, sharded_share
from cost_models import Cluster
from tests.zoo import CORE, ZOO


@pytest.mark.parametrize("label", PLANS)
@pytest.mark.parametrize("model", CORE)
def test_plan_agrees_with_one_device(model: str, label: str) -> None:
    module, batch = CORE[model]()
    plan, _ = plan_model(module, batch, Cluster.from_toml(str(FAST_LINKS)), options=PLANS[label])
    if "in one stage" in label or "of 2" in label:
        assert sharded_share(plan) > 0.5, "a plan that shards nothing proves nothing"
    for dtype in ("float64", "float32") if label == "2 stages of 2" else ("float64",):
        report = verify_plan(module, batch, plan, dtype=dtype, eager=dtype == "float32")
        assert report.ok, report


@pytest.mark.parametrize("model", ["dlrm", "mamba", "mixtral", "swin"])
def test_two_stages_of_other_kinds_of_models_agree(model: str) -> None:
    """Embedding tables, a scan, sparse experts, windows that shift."""
    module, batch = ZOO[model]()
    options = PLANS["2 stages of 2"]
    plan, _ = plan_model(module, batch, Cluster.from_toml(str(FAST_LINKS)), options=options)
    report = verify_plan(module, batch, plan, dtype="float64", eager=False)
    assert report.ok, report
