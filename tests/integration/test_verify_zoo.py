"""The eight small models under four plans each, in float32 and float64, on the virtual mesh."""

from __future__ import annotations

import pytest

from autopar.api import plan_model
from autopar.verify import verify_plan
from benchmarks.verify_zoo import FAST_LINKS, PLANS, sharded_share
from cost_models import Cluster
from tests.zoo import ZOO


@pytest.mark.parametrize("label", PLANS)
@pytest.mark.parametrize("model", ZOO)
def test_plan_agrees_with_one_device(model: str, label: str) -> None:
    module, batch = ZOO[model]()
    plan, _ = plan_model(module, batch, Cluster.from_toml(str(FAST_LINKS)), options=PLANS[label])
    if "in one stage" in label or "of 2" in label:
        assert sharded_share(plan) > 0.5, "a plan that shards nothing proves nothing"
    for dtype in ("float32", "float64"):
        report = verify_plan(module, batch, plan, dtype=dtype, eager=dtype == "float32")
        assert report.ok, report
