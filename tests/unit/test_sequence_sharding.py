"""Attention over a sharded sequence: what the search does where rows and heads do not suffice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from autopar.api import plan_model
from autopar.options import SearchOptions
from autopar.verify import verify_plan
from cost_models import Cluster

FAST_LINKS = Path(__file__).parent.parent / "clusters" / "fast_links.toml"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_row_and_one_key_head_on_four_devices(dtype: str) -> None:
    """Four devices share the queries, causal mask and rotary positions included."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, use_cache=False, **sizes, **heads))
    tokens = torch.randint(1, 64, (1, 64), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "labels": tokens}
    options = SearchOptions(num_stages=1, mesh_shape=(4,), num_microbatches=1)
    plan, _ = plan_model(model, batch, Cluster.from_toml(FAST_LINKS), options=options)
    strategies = plan.stages[0].strategies
    assert (strategies["sdpa"], strategies["sdpa_backward"]) == ("s", "s")
    report = verify_plan(model, batch, plan, dtype=dtype)
    assert report.ok, report
