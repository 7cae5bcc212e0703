"""The rule oracle on every distinct signature of the zoo: whole against shards, with real values.

    python -m benchmarks.signatures                   # all 31 models
    python -m benchmarks.signatures --models mamba

A signature is an operator with its constants, shapes, atoms and dtypes; one that several models
have is checked once. Every strategy on three meshes counts, pending sums split at random, in
float64. The exit code is 1 where one is wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from autopar.graph.capture import capture_graph
from autopar.graph.execute import graph_inputs
from autopar.graph.precision import in_float64
from autopar.graph.program import Graph
from autopar.sharding.rule import Call
from tests.oracles import MESHES, Disagreement, disagreements, samples, widened
from tests.zoo import ZOO


@dataclass(frozen=True, slots=True)
class Outcome:
    """signatures: those that were new; strategies: of these, on all meshes."""

    signatures: int
    strategies: int
    wrong: tuple[Disagreement, ...]


def check_signatures(
    graph: Graph, module: nn.Module, batch: Any, seen: set[Call], generator: torch.Generator
) -> Outcome:
    """Checks the signatures of a model that are not in `seen`, and adds them. The module becomes
    float64."""
    graph = in_float64(graph)
    inputs = graph_inputs(graph, module.double(), widened(batch), seed=3)
    signatures = checked = 0
    wrong: list[Disagreement] = []
    for sample in samples(graph, inputs):
        if sample.call in seen:
            continue
        seen.add(sample.call)
        signatures += 1
        for mesh in MESHES:
            tried, found = disagreements(sample, mesh, generator=generator)
            checked += tried
            wrong += found
    return Outcome(signatures, checked, tuple(wrong))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(ZOO), choices=list(ZOO), metavar="NAME")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    seen: set[Call] = set()
    strategies, wrong = 0, 0
    started = time.perf_counter()
    for name in arguments.models:
        module, batch = ZOO[name]()
        outcome = check_signatures(capture_graph(module, batch), module, batch, seen, generator)
        strategies, wrong = strategies + outcome.strategies, wrong + len(outcome.wrong)
        print(f"{name}: {outcome.signatures} new, {outcome.strategies} strategies", flush=True)
        for disagreement in outcome.wrong:
            print(f"  WRONG {disagreement}", flush=True)
    seconds = time.perf_counter() - started
    print(
        f"{len(arguments.models)} models: {len(seen)} signatures, {strategies} strategies,"
        f" {wrong} wrong, {seconds:.0f} s"
    )
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
