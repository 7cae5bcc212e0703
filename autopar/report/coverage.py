"""What of a model can be sharded, for `autopar coverage MODEL`: by family of operators, and what is
replicated, with the reason and the line of the model.

An operator is sharded where some factor of its rule splits its work; on a cluster, where some
strategy on a mesh of all devices (of the largest node group) does. Shares are of FLOPs
(contractions have any) and of bytes
read and written by unfused kernels. Views move nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from autopar.graph.program import Graph, Operator, Phase
from autopar.graph.work import operator_bytes, operator_flops
from autopar.mesh import logical_meshes, submeshes
from autopar.report.units import bytes_text, flops_text, number_text, percent_text
from autopar.sharding.registry import RuleTable
from autopar.sharding.rule import Origin
from autopar.sharding.rules import FAMILIES
from autopar.sharding.strategy import strategies
from cost_models import Cluster

_VALUE_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# Operators of no family, by where their rule comes from.
_UNWRITTEN = tuple(str(origin) for origin in Origin if origin is not Origin.WRITTEN)
_MAX_LINES = 3  # of source, shown for one kind of operator


class Reason(StrEnum):
    """Why an operator is replicated."""

    NO_RULE = "no rule"
    VALUES = "result depends on values"
    SCALAR = "single elements"
    NO_FACTOR = "no dim of these shapes can be shared"
    NO_DIVISOR = "no dim divides by the mesh"


@dataclass(frozen=True, slots=True)
class Covered:
    """One operator. splits: among how many devices its work can be shared at best; without a
    cluster 2 stands for any number."""

    op: Operator
    family: str
    flops: float
    nbytes: float
    splits: float
    reason: Reason | None


@dataclass(frozen=True, slots=True)
class Coverage:
    """All operators of a graph. cluster, num_devices: "" and 0 where none was given."""

    model: str
    operators: tuple[Covered, ...]
    cluster: str = ""
    num_devices: int = 0

    @property
    def flops(self) -> float:
        return sum(c.flops for c in self.operators)

    @property
    def nbytes(self) -> float:
        return sum(c.nbytes for c in self.operators)

    @property
    def sharded_flops(self) -> float:
        """Share; 1 where there are none."""
        return _share((c.flops for c in self.operators if c.splits > 1), self.flops)

    @property
    def sharded_bytes(self) -> float:
        return _share((c.nbytes for c in self.operators if c.splits > 1), self.nbytes)

    @property
    def device_flops(self) -> float:
        """Share of the FLOPs that one device of the cluster does at best."""
        return _share((c.flops / c.splits for c in self.operators), self.flops)


def coverage_of(model: str, graph: Graph, cluster: Cluster | None = None) -> Coverage:
    """Coverage of a captured graph. O(operators x strategies), each signature once."""
    table, metas = RuleTable(graph), graph.metas()
    family_of = {target: name for name, rows in FAMILIES.items() for target in rows}
    meshes: list[tuple[int, ...]] = []
    if cluster is not None:
        most = max(s.num_devices for s in submeshes(cluster))
        whole = [s for s in submeshes(cluster) if s.num_devices == most]
        meshes = [mesh.axis_sizes for s in whole for mesh in logical_meshes(s)]
    found = []
    for op in graph.operators:
        splits = _best_splits(table, op, meshes)
        found.append(
            Covered(
                op,
                family_of.get(op.target, str(table.rules[op.name].origin)),
                operator_flops(op, metas),
                operator_bytes(op, metas),
                splits,
                None if splits > 1 else _reason(table, op),
            )
        )
    devices = 0 if cluster is None else cluster.num_devices
    return Coverage(model, tuple(found), "" if cluster is None else str(cluster), devices)


def _best_splits(table: RuleTable, op: Operator, meshes: Sequence[tuple[int, ...]]) -> float:
    rule = table.rules[op.name]
    if not meshes:
        return 2 if any(f.splits for f in rule.factors) else 1
    operands = table.calls[op.name].operands
    return max(s.num_splits for mesh in meshes for s in strategies(rule, operands, mesh))


def _reason(table: RuleTable, op: Operator) -> Reason:
    rule, call = table.rules[op.name], table.calls[op.name]
    if rule.origin is Origin.REPLICATED:
        return Reason.NO_RULE
    if any(f.splits for f in rule.factors):
        return Reason.NO_DIVISOR
    atoms = [dims for dims in (*call.operands, *rule.results) if dims is not None]
    if not any(atom for dims in atoms for dim in dims for atom in dim):
        return Reason.SCALAR
    if _VALUE_TAGS & set(getattr(op.target, "tags", ())):
        return Reason.VALUES
    return Reason.NO_FACTOR


def _share(parts: Iterable[float], whole: float) -> float:
    return sum(parts) / whole if whole else 1.0


@dataclass(frozen=True, slots=True)
class Kind:
    """Replicated operators of one overload and reason. lines: of the model's code, most first."""

    op_name: str
    reason: Reason
    count: int
    flops: float
    nbytes: float
    lines: tuple[str, ...]


def replicated(coverage: Coverage) -> tuple[Kind, ...]:
    """By overload and reason, those with most work first."""
    groups: dict[tuple[str, Reason], list[Covered]] = {}
    for c in coverage.operators:
        if c.reason is not None:
            groups.setdefault((c.op.op_name, c.reason), []).append(c)
    kinds = [
        Kind(
            name,
            reason,
            len(cs),
            sum(c.flops for c in cs),
            sum(c.nbytes for c in cs),
            tuple(
                line for line, _ in Counter(c.op.source for c in cs if c.op.source).most_common()
            ),
        )
        for (name, reason), cs in groups.items()
    ]
    return tuple(sorted(kinds, key=lambda k: (k.flops, k.nbytes, k.count), reverse=True))


def coverage_report(coverage: Coverage) -> RenderableType:
    """Both tables and a line that sums them up."""
    by_family = Table(header_style="bold", caption_justify="left")
    by_family.add_column("operators")
    for column in ("forward", "backward", "FLOPs", "sharded", "bytes", "sharded"):
        by_family.add_column(column, justify="right")
    for family in (*FAMILIES, *_UNWRITTEN):
        members = [c for c in coverage.operators if c.family == family]
        if members:
            by_family.add_row(family, *_family_cells(members))
    by_family.add_section()
    by_family.add_row("all", *_family_cells(coverage.operators), style="bold")
    parts: list[RenderableType] = [by_family]
    kinds = replicated(coverage)
    if kinds:
        parts.append(_replicated_table(coverage, kinds))
    parts.append(_summary(coverage))
    return Group(*parts)


def _family_cells(members: Sequence[Covered]) -> list[str]:
    flops, nbytes = sum(c.flops for c in members), sum(c.nbytes for c in members)
    sharded = [c for c in members if c.splits > 1]
    return [
        str(sum(c.op.phase is Phase.FORWARD for c in members)),
        str(sum(c.op.phase is Phase.BACKWARD for c in members)),
        flops_text(flops) if flops else "-",
        percent_text(_share((c.flops for c in sharded), flops)) if flops else "-",
        bytes_text(nbytes) if nbytes else "-",
        percent_text(_share((c.nbytes for c in sharded), nbytes)) if nbytes else "-",
    ]


def _replicated_table(coverage: Coverage, kinds: Sequence[Kind]) -> Table:
    table = Table(title="Replicated", title_justify="left", header_style="bold")
    for column in ("operator", "count", "FLOPs", "bytes", "why", "where"):
        table.add_column(column, overflow="fold")
    for kind in kinds:
        rest = len(kind.lines) - _MAX_LINES
        lines = [*kind.lines[:_MAX_LINES], *([f"and {rest} more"] if rest > 0 else [])]
        style = "red" if kind.reason is Reason.NO_RULE else ""
        table.add_row(
            kind.op_name,
            str(kind.count),
            percent_text(_share([kind.flops], coverage.flops)) if kind.flops else "-",
            percent_text(_share([kind.nbytes], coverage.nbytes)) if kind.nbytes else "-",
            Text(kind.reason.value, style),
            "\n".join(lines),
        )
    return table


def _summary(coverage: Coverage) -> Text:
    where = f" on {coverage.cluster}" if coverage.cluster else ""
    text = Text.assemble(
        (coverage.model, "bold"),
        f"{where}: ",
        (percent_text(coverage.sharded_flops), "bold"),
        " of the FLOPs and ",
        (percent_text(coverage.sharded_bytes), "bold"),
        " of the bytes can be sharded",
    )
    if coverage.num_devices > 1:
        best = number_text(1 / coverage.device_flops)
        devices = coverage.num_devices
        text.append(f"; each of {devices} devices does 1/{best} of the FLOPs at best")
    return text


def coverage_record(coverage: Coverage) -> dict[str, object]:
    """For --json."""
    families = {}
    for family in (*FAMILIES, *_UNWRITTEN):
        members = [c for c in coverage.operators if c.family == family]
        if members:
            families[family] = {
                "forward": sum(c.op.phase is Phase.FORWARD for c in members),
                "backward": sum(c.op.phase is Phase.BACKWARD for c in members),
                "flops": sum(c.flops for c in members),
                "sharded_flops": sum(c.flops for c in members if c.splits > 1),
                "bytes": sum(c.nbytes for c in members),
                "sharded_bytes": sum(c.nbytes for c in members if c.splits > 1),
            }
    return {
        "model": coverage.model,
        "cluster": coverage.cluster or None,
        "num_operators": len(coverage.operators),
        "flops": coverage.flops,
        "bytes": coverage.nbytes,
        "sharded_flops_share": coverage.sharded_flops,
        "sharded_bytes_share": coverage.sharded_bytes,
        "device_flops_share": coverage.device_flops if coverage.num_devices else None,
        "families": families,
        "replicated": [
            {
                "operator": k.op_name,
                "reason": k.reason.value,
                "count": k.count,
                "flops": k.flops,
                "bytes": k.nbytes,
                "lines": list(k.lines),
            }
            for k in replicated(coverage)
        ],
    }
