"""CPU seconds and memory of the inter-op program at scale, on synthetic but shaped tables.

    python -m benchmarks.stage_cuts --cluster h100:128x8 --layers 126 --microbatches 64

The tables are those of a transformer of 405B parameters whose layers differ by 1 % and whose ends
weigh half a layer more: roofline compute, all-reduces of the minor axis, gathers over the major
one, three policies of recomputation and two of sharding the optimizer, each where its bytes fit.
Only their shape matters here. Every number of stages up to 64 is solved.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from autopar.interop.dp import solve_each_count
from autopar.interop.problem import FloatArray, InterOpProblem
from autopar.mesh import LogicalMesh, Submesh, logical_meshes, submeshes
from autopar.schedule import ScheduleKind, in_flight_count
from cost_models import Cluster, CollectiveKind, collective_s

_PARAMETERS, _HIDDEN, _TOKENS = 3.2e9, 16384, 8192 * 4  # of a layer; wide; of a microbatch
_POLICIES = ((1.0, 34.0), (1.1, 16.0), (4 / 3, 2.0))  # compute, bytes kept per token and unit


class ShapedRows:
    """[K, K, M] for each count in flight, made when asked for."""

    def __init__(self, cluster: Cluster, layers: int, microbatches: int, flights: list[int]):
        self.cluster, self.flights, self.microbatches = cluster, flights, microbatches
        self.choices = [(s, view) for s in submeshes(cluster, layers) for view in logical_meshes(s)]
        weight = 1 + 0.01 * np.random.default_rng(0).random(layers)
        weight[[0, -1]] += 0.5
        ends = np.concatenate([[0.0], np.cumsum(weight)])
        first, last = np.indices((layers, layers))
        self.work: FloatArray = ends[last + 1] - ends[first]
        self.made_s = 0.0  # seconds that making rows has taken

    def __len__(self) -> int:
        return len(self.flights)

    def __getitem__(self, row: int) -> FloatArray:
        start = time.process_time()
        columns = [self._column(s, view, self.flights[row]) for s, view in self.choices]
        table = np.stack(columns, axis=2)
        self.made_s += time.process_time() - start
        return table

    def _column(self, submesh: Submesh, view: LogicalMesh, flight: int) -> FloatArray:
        device = self.cluster.groups[submesh.group].device
        minor = view.axis_sizes[-1]
        major = view.num_devices // minor
        rate = 0.7 * device.peak("bfloat16") * view.num_devices
        compute = self.work * 6 * _PARAMETERS * _TOKENS / rate
        activation = 2.0 * _HIDDEN * _TOKENS / major
        minor_path = view.path(view.num_axes - 1, self.cluster)
        reduce = collective_s(CollectiveKind.ALL_REDUCE, activation, minor, minor_path)
        best = np.full(self.work.shape, np.inf)
        for slower, kept in _POLICIES:
            for sharded in (False, True):
                seconds = slower * compute + 4 * self.work * reduce
                share = 2 * _PARAMETERS / minor
                if sharded and view.num_axes == 2:
                    path = view.path(0, self.cluster)
                    once = collective_s(CollectiveKind.ALL_GATHER, share, major, path)
                    seconds = seconds + 2 * self.work * once / self.microbatches
                nbytes = self.work * _PARAMETERS / minor * (4 + 12 / (major if sharded else 1))
                nbytes = nbytes + flight * self.work * kept * activation / 2 / minor
                fits = (nbytes <= 0.9 * device.memory_bytes) & (self.work > 0)
                best = np.where(fits, np.minimum(best, seconds), best)
        return best


def shaped_problem(cluster: Cluster, layers: int, microbatches: int, most: int) -> InterOpProblem:
    counts = [in_flight_count(ScheduleKind.ONE_F_ONE_B, s + 1, microbatches) for s in range(most)]
    flights = sorted(set(counts))
    rows = ShapedRows(cluster, layers, microbatches, flights)
    sizes = np.array([s.num_devices for s, _ in rows.choices])
    transfers = np.full((layers, 1), 4.0 * _HIDDEN * _TOKENS) / sizes
    transfers = transfers / cluster.inter.achieved_bytes_per_s
    transfers[0] = 0
    return InterOpProblem(
        num_layers=layers,
        num_devices=tuple(group.num_devices for group in cluster.groups),
        submesh_devices=tuple(s.num_devices for s, _ in rows.choices),
        submesh_groups=tuple(s.group for s, _ in rows.choices),
        num_microbatches=microbatches,
        stage_seconds=rows,
        transfer_seconds=transfers,
        in_flight=tuple(flights.index(f) + 1 for f in counts),
        max_stages=most,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cluster", default="h100:128x8")
    parser.add_argument("--layers", type=int, default=126)
    parser.add_argument("--microbatches", type=int, default=64)
    parser.add_argument("--stages", type=int, default=64)
    parser.add_argument("--gap", type=float, default=1e-3)
    parser.add_argument("--within", type=float, default=1.2)
    args = parser.parse_args()
    problem = shaped_problem(
        Cluster.parse(args.cluster), args.layers, args.microbatches, args.stages
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    found = solve_each_count(problem, relative_gap=args.gap, within=args.within)
    elapsed_s = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    best = min(found.values(), key=lambda solution: solution.seconds)
    print(
        f"{args.cluster} K={args.layers} B={args.microbatches}: {elapsed_s:.2f} s, "
        f"{problem.stage_seconds.made_s:.2f} of them making rows, "
        f"{len(problem.submesh_devices)} choices, peak {peak / 1024:.0f} MiB "
        f"({before / 1024:.0f} before), {best.stats}\n"
        f"counts {sorted(found)}; best {len(best.stages)} stages, {best.seconds:.3f} s"
    )


if __name__ == "__main__":
    main()
