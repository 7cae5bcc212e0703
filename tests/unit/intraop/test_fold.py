"""Equal layers folded: the optimum, its bytes and its transients are those of the layers written
out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
import transformers

from autopar.errors import OptionError
from autopar.graph.capture import capture_graph
from autopar.graph.layers import cluster_layers
from autopar.graph.program import Graph
from autopar.intraop.build import build_problem
from autopar.intraop.fold import NotFoldable, fold_problem, match_layers
from autopar.intraop.memory_use import transient_bytes
from autopar.intraop.split import Split
from autopar.intraop.stage import SolverOptions, StageSolution, solve_stage
from autopar.intraop.stage_problem import Copy, Fold, StageContext, StageProblem
from autopar.lowering.lower import PreparedStage, prepare_stage
from autopar.lowering.recompute import apply_recompute
from autopar.lowering.stages import stage_graph
from autopar.plan import Remat
from autopar.sharding.registry import RuleTable
from benchmarks.models.moe import MoE, MoEConfig
from tests.unit.intraop.stages import costs_of, gpt2_graph, llama_graph


def gpt2(layers: int) -> Graph:
    return gpt2_graph(8, 1024, layers, n_embd=4096, n_head=32, vocab_size=50304)


def llama(layers: int) -> Graph:
    return llama_graph(
        8, 2048, layers, hidden_size=4096, intermediate_size=14336, num_key_value_heads=8,
        vocab_size=128256,
    )  # fmt: skip


def t5(layers: int) -> Graph:
    config = transformers.T5Config(
        num_layers=1, num_decoder_layers=layers, d_model=1024, d_ff=4096, num_heads=16,
        use_cache=False, decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(config)
        tokens = torch.zeros(8, 512, dtype=torch.long)
    return cluster_layers(capture_graph(model, {"input_ids": tokens, "labels": tokens}))


def moe(layers: int) -> Graph:
    config = MoEConfig(2048, layers, 16, 8, feed_forward=8192, seq_len=512)
    with torch.device("meta"):
        tokens = torch.zeros(8, 512, dtype=torch.long)
        return cluster_layers(capture_graph(MoE(config), (tokens, tokens)))


@dataclass(frozen=True, slots=True)
class Case:
    """A model with `written` blocks, some of them folded, and the same with `whole` blocks."""

    name: str
    written: int
    whole: int
    folds: tuple[Fold, ...]

    def written_layers(self) -> list[int]:
        """Of each layer of the whole model, the one that stands for it."""
        found: list[int] = []
        layer = 0
        for fold in self.folds:
            found += range(layer, fold.layer)
            for copy in range(fold.count):
                first = fold.layer + min(copy, 1) * fold.period
                found += range(first, first + fold.period)
            layer = fold.layer + 2 * fold.period
        more = self.whole + 2 - len(found)  # with the first and the last layer
        return [*found, *range(layer, layer + more)]


# Layers of transformers are first, blocks, last; T5's encoder of one block is in its first.
GPT2 = Case("gpt2", 4, 6, (Fold(2, 4),))
LLAMA = Case("llama", 4, 6, (Fold(2, 4),))
T5 = Case("t5", 4, 6, (Fold(2, 4),))
MOE = Case("moe", 8, 10, (Fold(3, 3, period=2),))  # every other block has experts: pairs repeat
SPLIT = Case("gpt2", 6, 9, (Fold(2, 4), Fold(4, 3)))
UNSPLIT = Case("gpt2", 4, 9, (Fold(2, 7),))


@cache
def stage(name: str, layers: int, remat: Remat) -> PreparedStage:
    graph = {"gpt2": gpt2, "llama": llama, "t5": t5, "moe": moe}[name](layers)
    graph = apply_recompute(graph, remat)
    table = RuleTable(graph)
    return prepare_stage(stage_graph(graph, 0, len(graph.layer_names) - 1), table.dims)


def solved(
    case: Case,
    mesh: tuple[int, ...],
    context: StageContext,
    *,
    folded: bool,
    budget: float | None = None,
    remat: Remat = Remat.SELECTIVE,
) -> StageSolution:
    s = stage(case.name, case.written if folded else case.whole, remat)
    context = replace(context, folds=case.folds if folded else ())
    options = SolverOptions(time_limit_s=20.0, target_gap=1e-3, fallback=False)
    return solve_stage(
        s.graph, s.table, costs_of(mesh), context, budget_bytes=budget, options=options
    )


@pytest.mark.parametrize(
    ("case", "mesh", "num_microbatches"),
    [
        (GPT2, (8,), 1),
        (GPT2, (2, 4), 4),
        (T5, (8,), 1),
        pytest.param(LLAMA, (8,), 4, marks=pytest.mark.slow),
        pytest.param(LLAMA, (2, 4), 4, marks=pytest.mark.slow),
        pytest.param(T5, (2, 4), 4, marks=pytest.mark.slow),
        pytest.param(MOE, (8,), 1, marks=pytest.mark.slow),
        pytest.param(MOE, (2, 4), 4, marks=pytest.mark.slow),
    ],
)
def test_free_optimum_is_that_of_all_layers(
    case: Case, mesh: tuple[int, ...], num_microbatches: int
) -> None:
    context = StageContext(num_microbatches, min(2, num_microbatches))
    folded = solved(case, mesh, context, folded=True)
    whole = solved(case, mesh, context, folded=False)
    assert folded.seconds == pytest.approx(whole.seconds, rel=1e-3)
    assert folded.seconds >= whole.bound * (1 - 1e-9)  # layers alike: a restriction
    again = stage(case.name, case.written, Remat.SELECTIVE)
    assert folded.strategies.keys() == {op.name for op in again.graph.operators}


def twins_of(case: Case, remat: Remat) -> dict[str, str]:
    """Every name of the longer model -> the name in the written one that stands for it."""
    written, whole = (stage(case.name, n, remat).graph for n in (case.written, case.whole))

    def layers(graph: Graph) -> Mapping[int, list[str]]:
        found: dict[int, list[str]] = {}
        for op in graph.operators:
            found.setdefault(op.layer, []).append(op.name)
        return found

    short, long = layers(written), layers(whole)
    names: dict[str, str] = {}
    for layer, source in enumerate(case.written_layers()):
        names |= dict(zip(long[layer], short[source], strict=True))
    operands = {op.name: op.operands for op in written.operators}
    inputs = {i.name for i in whole.inputs}
    for op in whole.operators:
        for ref, other in zip(op.operands, operands[names[op.name]], strict=True):
            if ref.name in inputs:
                names[ref.name] = other.name
    return names


@pytest.mark.parametrize(
    ("case", "num_microbatches"),
    [
        (GPT2, 1),
        (GPT2, 3),
        (SPLIT, 3),
        *(
            pytest.param(case, n, marks=pytest.mark.slow)
            for case, n in ((SPLIT, 1), (LLAMA, 1), (LLAMA, 3))
        ),
    ],
    ids=str,
)
def test_any_choice_costs_and_holds_the_same(case: Case, num_microbatches: int) -> None:
    """Of the folded program and of the layers written out: seconds, bytes, transients."""
    remat, costs = Remat.SELECTIVE, costs_of((2, 4))
    context = StageContext(num_microbatches, in_flight=2, offload=True)
    short, long = stage(case.name, case.written, remat), stage(case.name, case.whole, remat)
    folded = fold_problem(
        build_problem(short.graph, short.table, costs, context), short.graph, case.folds
    )
    whole = build_problem(long.graph, long.table, costs, context)
    names = twins_of(case, remat)
    number = {(n.kind == "output", n.name): i for i, n in enumerate(folded.nodes)}
    number |= {(n.kind == "output", n.name): first for n, first in folded.twins}
    index = [number[n.kind == "output", names.get(n.name, n.name)] for n in whole.nodes]
    rng = np.random.default_rng(0)
    for _ in range(5):
        choice = tuple(int(rng.integers(len(c))) for c in folded.problem.node_seconds)
        unfolded = tuple(choice[i] for i in index)
        assert folded.problem.bytes(choice) == pytest.approx(whole.problem.bytes(unfolded))
        seconds = whole.problem.seconds(unfolded)
        assert folded.problem.seconds(choice) == pytest.approx(seconds)
        found = transients(short, folded, choice, folded.copies)
        want = transients(long, whole, unfolded, {})
        assert found == pytest.approx(want)


def transients(
    s: PreparedStage,
    built: StageProblem,
    choice: tuple[int, ...],
    copies: Mapping[str, Copy],
) -> float:
    chosen = built.read(choice)
    return transient_bytes(
        s.graph, built.dims, chosen.strategies, chosen.inputs, (2, 4),
        outputs=chosen.outputs, copies=copies,
    )  # fmt: skip


@pytest.mark.parametrize(
    "share", [0.4, *(pytest.param(s, marks=pytest.mark.slow) for s in (0.1, 0.8))]
)
def test_budgets_are_those_of_all_layers(share: float) -> None:
    context = StageContext(4, 2)
    free = solved(GPT2, (8,), context, folded=False).prediction.peak_bytes
    budget = (0.5 + 0.5 * share) * free
    folded = solved(GPT2, (8,), context, folded=True, budget=budget)
    whole = solved(GPT2, (8,), context, folded=False, budget=budget)
    assert folded.prediction.peak_bytes <= budget
    assert folded.seconds <= whole.seconds * 1.01
    assert folded.seconds >= whole.bound * (1 - 1e-9)


def test_a_split_is_between_alike_and_written_out() -> None:
    """The budget lets some layers be fast: more of them than are explicit, and not all."""
    context = StageContext(4, 2)
    free = solved(UNSPLIT, (8,), context, folded=True)
    budget = 0.8 * free.prediction.peak_bytes
    alike = solved(UNSPLIT, (8,), context, folded=True, budget=budget)
    assert alike.gap > 5e-3 and alike.split == Split(0, SPLIT.folds[0].count)
    split = solved(SPLIT, (8,), context, folded=True, budget=budget)
    whole = solved(SPLIT, (8,), context, folded=False, budget=budget)
    assert split.prediction.peak_bytes <= budget
    assert whole.bound * (1 - 1e-9) <= split.seconds < alike.seconds
    assert split.seconds <= whole.seconds * 1.01


def test_layers_that_do_not_repeat_are_refused() -> None:
    s = stage("gpt2", 4, Remat.SELECTIVE)
    with pytest.raises(NotFoldable, match="layers 4 and 5 do not repeat"):
        solve_stage(
            s.graph, s.table, costs_of((2,)), StageContext(folds=(Fold(4, 3),)), budget_bytes=None
        )
    with pytest.raises(NotFoldable, match="layers 0 and 1 do not repeat"):
        match_layers(s.graph, Fold(0, 3))
    with pytest.raises(OptionError, match="two copies"):
        Fold(2, 1)
