"""The eight small models under four plans each on the virtual mesh.

In float64, where a wrong program cannot hide behind rounding; the two-by-two plans in float32 too,
and against the user's own model. `python -m benchmarks.zoo` does all in both.
"""

from __future__ import annotations

import pytest

from autopar.api import plan_model
from autopar.verify import verify_plan
from benchmarks.zoo import FAST_LINKS, PLANS, sharded_share
from cost_models import Cluster
from tests.zoo import CORE


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
