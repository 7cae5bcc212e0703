"""Placements that the user pins, by patterns of parameter names.

Patterns are expanded against the names of the whole model. A search folds equal layers and numbers
what is left without gaps, so that a pin on a parameter of a block would meet another block there:
then every layer is written. Layers that are pinned alike still are of one class.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from autopar.errors import OptionError
from autopar.graph.congruence import numbered_block
from autopar.graph.program import InputKind
from autopar.graph.repeat import Folded, whole_graph
from autopar.options import SearchOptions
from autopar.search.workload import Workload


def expand_pins(folded: Folded, placements: Mapping[str, str]) -> tuple[Folded, dict[str, str]]:
    """The graph in which the pins can be honoured, and canonical parameter name -> layout at rest.

    A name in full goes before patterns, an earlier pattern before a later one. OptionError, with
    close names, for a pattern that matches nothing. O(parameters x patterns)."""
    if not placements:
        return folded, {}
    whole = whole_graph(folded)
    names = sorted({i.owner for i in whole.inputs_of(InputKind.PARAMETER)})
    pins = {name: placements[name] for name in names if name in placements}
    for pattern, layout in placements.items():
        found = [name for name in names if name == pattern or fnmatchcase(name, pattern)]
        if not found:
            raise OptionError(
                f"placements pins {pattern!r}, which is no parameter: did you mean "
                f"{' or '.join(_close(pattern, names))}?"
            )
        for name in found:
            pins.setdefault(name, layout)
    if max(folded.copies) == 1 or not any(map(numbered_block, pins)):
        return folded, pins
    return Folded(whole, (1,) * folded.num_layers), pins


def _close(pattern: str, names: Sequence[str]) -> list[str]:
    return difflib.get_close_matches(pattern, names, n=3) or list(names[:3])


@dataclass(frozen=True, slots=True, eq=False)
class _Written:
    """A workload in which the pins can be honoured."""

    workload: Workload
    placements: Mapping[str, str]
    known: dict[tuple[int, bool], Folded] = field(default_factory=dict)

    @property
    def counts(self) -> tuple[int, ...]:
        return self.workload.counts

    def at(self, num_microbatches: int) -> Folded:
        return self._graph(num_microbatches, exact=False)

    def exact(self, num_microbatches: int) -> Folded:
        return self._graph(num_microbatches, exact=True)

    def expect(self, num_microbatches: int) -> None:
        self.workload.expect(num_microbatches)

    def _graph(self, count: int, *, exact: bool) -> Folded:
        if (count, exact) not in self.known:
            folded = self.workload.exact(count) if exact else self.workload.at(count)
            self.known[count, exact] = expand_pins(folded, self.placements)[0]
        return self.known[count, exact]


def with_pins(workload: Workload, options: SearchOptions) -> tuple[Workload, SearchOptions]:
    """The same with patterns expanded to names."""
    if not options.placements:
        return workload, options
    written = _Written(workload, options.placements)
    _, pins = expand_pins(workload.at(workload.counts[0]), options.placements)
    return written, replace(options, placements=pins)
