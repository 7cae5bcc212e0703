"""Plans that were found before, by the hash of everything that the search depends on.

    key  =  graph of the smallest number of microbatches, all numbers, cluster, budget, options,
            rules of operators that autopar has no row for, code of autopar, version of torch

A plan that the clock or an interrupt cut short is not kept.
"""

from __future__ import annotations

import hashlib
import logging
from functools import cache
from pathlib import Path
from typing import Any

import torch

import cost_models
from autopar.cache import read_record, write_record
from autopar.errors import PlanError
from autopar.graph.repeat import Folded
from autopar.plan import ParallelPlan
from autopar.search.space import Space
from autopar.sharding.registry import RuleTable

_LOG = logging.getLogger(__name__)
_KIND = "plans"


def plan_key(reference: Folded, space: Space) -> str:
    """reference: at the smallest number of microbatches."""
    options = space.options
    parts: tuple[Any, ...] = (
        reference.graph.fingerprint(),
        reference.copies,
        space.microbatch_counts,
        space.cluster.to_dict(),
        space.budgets,
        options,
        sorted(RuleTable(reference.graph).unwritten().items()),
        _code(),
        torch.__version__,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@cache
def _code() -> str:
    """Hash of the sources of autopar and its cost models."""
    digest = hashlib.sha256()
    for folder in (Path(__file__).parents[1], Path(str(cost_models.__file__)).parent):
        for file in sorted(folder.rglob("*.py")):
            digest.update(f"{file.relative_to(folder)}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def remembered_plan(key: str) -> ParallelPlan | None:
    """None where none is kept."""
    record = read_record(_KIND, key)
    if record is None:
        return None
    try:
        return ParallelPlan.from_json(record)
    except PlanError as error:
        _LOG.info("the kept plan %s cannot be read and is made anew: %s", key, error)
        return None


def remember_plan(key: str, plan: ParallelPlan) -> None:
    write_record(_KIND, key, plan.to_json())
