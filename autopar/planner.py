"""The search: from a training step and a cluster to a plan.

    program   per number of microbatches: distinct layers, prepared under each recompute policy
    prices    per distinct layer and mesh view: solutions from fast to small (search.prices)
    cuts      inter-op dynamic program over layers x submeshes x microbatches, priced as far as its
              best path goes (search.cuts)
    exact     the best few cuts: every stage's whole integer program under the budget, equal layers
              folded (search.exact)
    simulate  the actual schedule; the plan is what simulates best
    unfold    the winner written out for every layer (search.unfold)

The result is deterministic: it depends on the graphs, the cluster and the options only, unless the
time limit or an interrupt ends the search: then it is the best so far.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Collection
from dataclasses import replace

from autopar.candidate import Cut, allowed_views, budgets, describe, place_stages
from autopar.errors import NoFeasiblePlan, OptionError
from autopar.estimate import MeshCosts
from autopar.graph.layers import cluster_layers
from autopar.graph.program import Graph
from autopar.graph.repeat import Folded, whole_graph
from autopar.intraop.stage import StageSolution
from autopar.mesh import LogicalMesh
from autopar.options import SearchOptions, runs_compiled
from autopar.plan import ParallelPlan, Remat, SearchRecord
from autopar.schedule import ScheduleKind
from autopar.search.clock import Clock
from autopar.search.cuts import WORTH_SOLVING, CutSearch
from autopar.search.exact import ExactSolver
from autopar.search.infeasible import explain
from autopar.search.interleave import interleaved_cuts
from autopar.search.pins import with_pins
from autopar.search.prices import Prices
from autopar.search.program import Program
from autopar.search.remembered import plan_key, remember_plan, remembered_plan
from autopar.search.solved import SlowerCut, SolvedCut
from autopar.search.space import Space
from autopar.search.tables import FEW_LAYERS
from autopar.search.thorough import TARGET_GAP, ThoroughSearch, is_small
from autopar.search.unfold import write_stages
from autopar.search.workload import Workload, one_graph
from cost_models import Cluster

_LOG = logging.getLogger(__name__)
_POLICIES = (Remat.NONE, Remat.SELECTIVE, Remat.FULL)
_SCHEDULES = (ScheduleKind.ONE_F_ONE_B, ScheduleKind.ZB_H1, ScheduleKind.INTERLEAVED)

# Of few layers the tables know less, and whole stages are cheap.
_WORTH_SOLVING_FEW, _CANDIDATES_FEW = 1.3, 8
# Of more stages than that fewer cuts are solved: they are dearer, and one stage more or less
# changes each of the others by its share only.
_FEW_STAGES = 8

Progress = Callable[[str], None]


def make_plan(
    graph: Graph,
    cluster: Cluster,
    *,
    num_microbatches: int = 1,
    budget_bytes: float | None = None,
    options: SearchOptions = SearchOptions(),
    progress: Progress = lambda _: None,
) -> ParallelPlan:
    """The plan of one captured graph, at the shape of one microbatch, that simulates best.

    budget_bytes: per device; by default options.budget_fraction of the device's memory.
    Raises NoFeasiblePlan where nothing fits, OptionError where pins cannot be honoured.
    """
    if not graph.layer_names:
        graph = cluster_layers(graph, options.num_layers)
    return find_plan(
        one_graph(graph, num_microbatches),
        cluster,
        budget_bytes=budget_bytes,
        options=options,
        progress=progress,
    )


def find_plan(
    workload: Workload,
    cluster: Cluster,
    *,
    budget_bytes: float | None = None,
    options: SearchOptions = SearchOptions(),
    progress: Progress = lambda _: None,
) -> ParallelPlan:
    """The plan that simulates best among all numbers of microbatches of the workload. Ctrl-C ends
    the search: it returns the best plan so far, if there is one. Errors as for `make_plan`."""
    if options.offload and not any(g.device.can_offload for g in cluster.groups):
        raise OptionError(
            f"offload=True: {cluster} has no device with host_bandwidth_bytes_per_s and "
            "host_optimizer_bytes_per_s: give them in a cluster TOML file"
        )
    if options.compiled is None:
        options = replace(options, compiled=runs_compiled(cluster))
    clock = Clock(options.time_limit_s, progress)
    with clock.passes("capture", f"{workload.counts[0]} microbatch(es)"):
        workload, options = with_pins(workload, options)
        num_layers = workload.at(workload.counts[0]).num_layers
    submeshes, views = allowed_views(cluster, options, num_layers)
    own = budgets(cluster, options.budget_fraction)
    space = Space(
        cluster=cluster,
        options=options,
        microbatch_counts=workload.counts,
        submeshes=submeshes,
        views=views,
        policies=_POLICIES if options.remat is None else (options.remat,),
        schedules=_SCHEDULES if options.schedule is None else (options.schedule,),
        budgets=own if budget_bytes is None else (budget_bytes,) * len(own),
    )
    return _Search(workload, space, clock).run()


class _Search:
    """One call of find_plan."""

    def __init__(self, workload: Workload, space: Space, clock: Clock) -> None:
        self.workload, self.space, self.clock = workload, space, clock
        self.programs: dict[int, Program] = {}
        self.costs: dict[LogicalMesh, MeshCosts] = {}
        self.solved: list[SolvedCut] = []
        self.failures: list[NoFeasiblePlan] = []
        self.notes: list[str] = []
        self.narrowed = ""  # what was left out of the search
        self.cut_short = False

    def program(self, count: int) -> Program:
        if count not in self.programs:
            with self.clock.passes("capture", f"{count} microbatch(es)"):
                folded = self.workload.at(count)
            self.programs[count] = self._program(folded, count)
        return self.programs[count]

    def _program(self, folded: Folded, count: int) -> Program:
        options = self.space.options
        return Program(folded, count, options.placements, compiled=bool(options.compiled))

    def mesh_costs(self, mesh: LogicalMesh) -> MeshCosts:
        if mesh not in self.costs:
            self.costs[mesh] = MeshCosts(self.space.cluster, mesh, self.space.options.optimizer)
        return self.costs[mesh]

    def run(self) -> ParallelPlan:
        reference = self.program(self.space.microbatch_counts[0])
        _check_pins(reference.folded, self.space.cluster, self.space.options)
        key = plan_key(reference.folded, self.space) if self.space.options.cache else ""
        known = remembered_plan(key) if key else None
        if known is not None:
            return known
        prices = self._prices()
        try:
            small = is_small(self.space, reference)
            exact = self._solver(prices, alike=not small)
            search = self._look(reference, prices, exact, narrow=True)
            if small and not self.cut_short:
                self._try_all(reference, exact)
            if not self.solved and prices.refused is None and not self.clock.expired:
                search = self._look(reference, prices, exact, narrow=False)
            if self.solved and not small:
                self._interleave(search, prices)
        except KeyboardInterrupt:
            if not self.solved:
                raise
            self._end_early("interrupted: the best plan so far")
        if not self.solved and not prices.refused and self._may_offload():
            plan = self._offloading().run()
        elif not self.solved:
            raise prices.refused or self._nothing(reference, prices)
        else:
            best = min(self.solved, key=lambda s: s.candidate.step_s)
            proved = self._proved(best, prices)
            self.solved[self.solved.index(best)] = proved
            plan = self._plan(proved, prices)
        if key and not (self.cut_short or self.clock.expired):
            remember_plan(key, plan)
        return plan

    def _prices(self, *, alone: bool = False) -> Prices:
        offload = bool(self.space.options.offload)
        policies = self.space.policies
        return Prices(
            self.program, self.mesh_costs, policies, self.clock, offload=offload, alone=alone
        )

    def _may_offload(self) -> bool:
        """Whether another search, with parameters on hosts, is allowed and would differ."""
        groups = self.space.cluster.groups
        return self.space.options.offload is None and any(g.device.can_offload for g in groups)

    def _offloading(self) -> _Search:
        options = replace(self.space.options, offload=True)
        again = _Search(self.workload, replace(self.space, options=options), self.clock)
        again.programs, again.costs = self.programs, self.costs
        again.notes.append("nothing fits without parameters on the hosts")
        return again

    def _look(
        self, reference: Program, prices: Prices, exact: ExactSolver, *, narrow: bool
    ) -> CutSearch:
        """Solves cuts exactly, the most promising first, until no other is worth it. narrow: among
        the fast ones only; near the budget tables and whole stages differ, and none may fit."""
        search = CutSearch(
            self.space, prices, reference, self.mesh_costs, self.clock, narrow=narrow
        )
        few = exact.alike and reference.num_layers <= FEW_LAYERS  # else all cuts are looked at
        worth = _WORTH_SOLVING_FEW if few else WORTH_SOLVING
        most = max(self.space.options.candidates, _CANDIDATES_FEW if few else 0)
        best_table, num_looked_at = None, len(self.solved)
        stages_tried: set[int] = set()
        for cut in search:
            best_table = best_table or cut.seconds
            margin = (worth - 1) * min(1.0, (_FEW_STAGES / cut.num_stages) ** 2)
            slow = cut.seconds > (1 + margin) * best_table
            if self.solved and slow and not self._may_surprise(cut, stages_tried):
                break
            if not self.solved:  # it seldom loses: its graph is captured while it is solved
                self.workload.expect(cut.num_microbatches)
            num_looked_at += self._solve(exact, cut)
            search.solved(self._best_s())
            stages_tried.add(cut.num_stages)
            if self.clock.expired and not self.solved and not narrow:
                break
            if self.clock.expired and self.solved:
                self._end_early(self._time_limit())
                break
            if num_looked_at >= most:
                break
        self.failures += search.failures
        if narrow and search.note:
            self.narrowed = search.note
        return search

    def _may_surprise(self, cut: Cut, stages_tried: Collection[int]) -> bool:
        """Whether the tables put it below what is solved and it has another number of stages: for
        cuts of as many they err alike."""
        return cut.seconds < self._best_s() and cut.num_stages not in stages_tried

    def _best_s(self) -> float:
        return min((s.candidate.step_s for s in self.solved), default=math.inf)

    def _solve(self, exact: ExactSolver, cut: Cut) -> bool:
        """Whether the cut is one of those that count: it fits, or is slower than one that does."""
        try:
            program = self.program(cut.num_microbatches)
            self.solved.append(exact.solve(program, cut, known_s=self._best_s()))
        except NoFeasiblePlan as error:
            self.failures.append(error)
            return False
        except SlowerCut as error:
            count = cut.num_microbatches
            _LOG.info("%s stages, %s microbatches: %s", cut.num_stages, count, error)
            return True
        best = min(self.solved, key=lambda s: s.candidate.step_s).candidate
        self.clock.incumbent = f"best so far {best.step_s * 1e3:.2f} ms"
        self.workload.expect(best.cut.num_microbatches)
        return True

    def _time_limit(self) -> str:
        return f"time limit of {self.clock.limit_s:g} s: the best plan so far"

    def _try_all(self, reference: Program, exact: ExactSolver) -> None:
        """Looks at every cut, where there are few stages to solve."""
        bounds = self._prices(alone=True)
        tables = CutSearch(self.space, bounds, reference, self.mesh_costs, self.clock, narrow=False)
        search = ThoroughSearch(tables, exact, self.program, self._best_s())
        try:
            search.run()
        finally:
            winner = search.winner()
            self.solved += [] if winner is None else [winner]
        if self.clock.expired and self.solved:
            self._end_early(self._time_limit())

    def _end_early(self, note: str) -> None:
        """The plan is not kept for other searches, and says why."""
        self.cut_short = True
        self.notes.append(note)

    def _nothing(self, reference: Program, prices: Prices) -> NoFeasiblePlan:
        if self.clock.expired and self.failures:
            return NoFeasiblePlan(
                f"no plan was found within the time limit of {self.clock.limit_s:g} s: raise it."
                f" The last cut that was tried: {self.failures[-1]}"
            )
        with self.clock.passes("what would fit"):
            search = CutSearch(self.space, prices, reference, self.mesh_costs, self.clock)
            error = explain(search, self.program(self.space.microbatch_counts[-1]))
        if error is None or (error.least_bytes or 0.0) <= min(self.space.budgets):
            return self.failures[-1]  # what binds is not memory
        return error

    def _interleave(self, search: CutSearch, prices: Prices) -> None:
        """Solves cuts with several stages per device, where they may be faster and fit."""
        options = self.space.options
        pinned = options.num_stages is not None and options.schedule is None
        if pinned or ScheduleKind.INTERLEAVED not in self.space.schedules or self.cut_short:
            return
        exact = self._solver(prices, alike=True)
        cuts = interleaved_cuts(search, self._best_s)
        for cut in itertools.islice(cuts, options.candidates):
            if self.clock.expired:
                break
            try:
                program = self.program(cut.num_microbatches)
                self.solved.append(exact.solve(program, cut))
            except NoFeasiblePlan as error:
                _LOG.info("interleaved, %s stages: %s", cut.num_stages, error)

    def _proved(self, best: SolvedCut, prices: Prices) -> SolvedCut:
        """The winner, its stages solved again where their gap is above the target."""
        target = self.space.options.target_gap
        ended = self.cut_short or self.clock.expired
        if ended or all(s.gap <= target for s in best.candidate.stages):
            return best
        program = self.program(best.candidate.cut.num_microbatches)
        try:
            return self._solver(prices, alike=best.alike).proved(program, best)
        except KeyboardInterrupt:
            self._end_early("interrupted: the best plan so far")
            return best

    def _solver(self, prices: Prices, *, alike: bool) -> ExactSolver:
        gap = (
            self.space.options.target_gap
            if alike
            else min(TARGET_GAP, self.space.options.target_gap)
        )
        return ExactSolver(
            self.space, prices, self.mesh_costs, self.clock, alike=alike, target_gap=gap
        )

    # ---- the answer

    def _as_captured(self, best: SolvedCut, prices: Prices) -> SolvedCut:
        """The winner on the graph that was really captured, should it differ from the one that was
        priced."""
        cut = best.candidate.cut
        with self.clock.passes("capture", f"{cut.num_microbatches} microbatch(es)"):
            folded = self.workload.exact(cut.num_microbatches)
        priced = self.program(cut.num_microbatches).folded
        if folded is priced or folded.graph.fingerprint() == priced.graph.fingerprint():
            return best
        _LOG.info("the graph of %s microbatches is not as derived", cut.num_microbatches)
        program = self._program(folded, cut.num_microbatches)
        self.programs[cut.num_microbatches] = program
        try:
            return self._solver(prices, alike=best.alike).told(program, cut, best.policies)
        except NoFeasiblePlan:
            return self._solver(prices, alike=best.alike).solve(program, cut)

    def _plan(self, best: SolvedCut, prices: Prices) -> ParallelPlan:
        """The winner in the names of the graph that was really captured."""
        best = self._as_captured(best, prices)
        candidate, cut = best.candidate, best.candidate.cut
        with self.clock.passes("unfold"):
            folded = self.workload.exact(cut.num_microbatches)
            graph = whole_graph(folded)
            devices = place_stages(cut.submeshes, self.space.cluster, cut.num_workers)
            window = best.window
            prepared = [best.prepared[window.stage_of[i]] for i in range(len(devices))]
            found = write_stages(
                graph,
                best.policies,
                cut.first_layers,
                list(zip(candidate.stages, prepared, strict=True)),
                window.written_layer,
                devices,
                compiled=bool(self.space.options.compiled),
            )
        ranked = sorted((s.candidate for s in self.solved), key=lambda c: c.step_s)
        record = SearchRecord(
            seconds={k: round(v, 4) for k, v in self.clock.seconds.items()},
            objective_s=_step(candidate.stages, cut.num_microbatches, bound=False),
            bound_s=_step(candidate.stages, cut.num_microbatches, bound=True),
            notes=(*self.notes, *([self.narrowed] if self.narrowed else [])),
            candidates=tuple(describe(c) for c in ranked),
        )
        return ParallelPlan(
            graph=graph.fingerprint(),
            cluster_text=str(self.space.cluster),
            cluster=self.space.cluster.to_dict(),
            num_microbatches=cut.num_microbatches,
            schedule=candidate.schedule,
            remat=best.policies,
            layer_names=graph.layer_names,
            stages=found.stages,
            step_s=candidate.step_s,
            bubble=candidate.bubble,
            budget_bytes=min(self.space.budgets),
            search=record,
            compiled=bool(self.space.options.compiled),
            fallbacks=found.fallbacks,
            rules=found.rules,
        )


def _step(stages: tuple[StageSolution, ...], num_microbatches: int, *, bound: bool) -> float:
    """sum t_i + (B - 1) max t_i, of what was found or of what was proved."""
    seconds = [s.bound if bound else s.seconds for s in stages]
    return math.fsum(seconds) + (num_microbatches - 1) * max(seconds)


def _check_pins(folded: Folded, cluster: Cluster, options: SearchOptions) -> None:
    """OptionError for a pin that no plan of this graph on this cluster can honour."""
    most = min(folded.num_layers, cluster.num_devices)
    if options.num_stages is not None and options.num_stages > most:
        raise OptionError(
            f"num_stages is at most {most}, as the model has {folded.num_layers} layers and the "
            f"cluster {cluster.num_devices} devices: got {options.num_stages}"
        )
