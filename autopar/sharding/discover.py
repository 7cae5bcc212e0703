"""Rules found by running: what an operator that nobody wrote a rule for can be sharded by.

For each size that the operands have, every choice of one dim (or none) per operand is a candidate
letter. Two shards say what the results would be: sharded along the dim whose local size is a part
of the whole's, else a pending sum. A letter is kept if the shards recombine to the whole in every
trial of `probe.unsound`, alone and with the letters kept before; then groups of operands are tried
as pending sums. The result is a lettering, the same kind of data that a user registers.

    cost    at most CANDIDATES small runs per size, then some hundred per letter kept
    sound   as far as the samples tell; the operator is never trusted beyond them

An operator that cannot be examined (no CPU kernel, not the same twice, writes into its operands, a
crash, sizes in its constants that are too large to run) is replicated, with the reason. It runs in
a fork of the process. The search is deterministic: every process finds the same. Its outcome is
kept on disk (`autopar.cache`), named by a hash of operator, code, signature and versions; a rule
that is read back is checked again before it is used, so that a stale one costs a search, never a
result.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from autopar.cache import read_record, write_record
from autopar.errors import RuleError
from autopar.sharding.isolate import LIMIT_S, Crashed, isolated
from autopar.sharding.lettering import Lettering, Words
from autopar.sharding.probe import (
    SHARDS,
    NotRunnable,
    Probe,
    candidate_shapes,
    make_probe,
    unsound,
)
from autopar.sharding.rule import Call, Origin, Rule, replicate_rule

_LOG = logging.getLogger(__name__)
_KIND = "rules"  # of the cache
_VERSION = 1  # of the search and of its files
CANDIDATES = 2000

Choice = Mapping[int, int]  # operand -> the dim that is sharded


@dataclass(frozen=True, slots=True)
class Finding:
    """A lettering, or None and the reason."""

    lettering: Lettering | None
    reason: str = ""


def discovered_rule(call: Call) -> Rule:
    """The rule of an operator without one. Pure but for the cache on disk."""
    finding = _remembered(call)
    if finding.lettering is None:
        return replace(replicate_rule(call), origin=Origin.REPLICATED, note=finding.reason)
    rule = finding.lettering.rule(call)
    return replace(rule, origin=Origin.DISCOVERED, note=str(finding.lettering))


@lru_cache(maxsize=4096)
def _remembered(call: Call) -> Finding:
    """`find` once per process: the search builds many tables of the same operators."""
    return find(call)


def find(call: Call) -> Finding:
    """From disk if it is there and holds, else by search."""
    if not call.operands:
        return Finding(None, "it has no tensor operands")
    key = _key(call)
    known = _read(key)
    if known is not None and known.lettering is None:
        return known
    try:
        finding = isolated(lambda: _examine(call, known), LIMIT_S)
    except Crashed as error:
        finding = Finding(None, str(error))
    if finding != known:
        _write(key, finding)
    return finding


def _examine(call: Call, known: Finding | None) -> Finding:
    """What is known, if it still holds; else what is found."""
    try:
        probe = make_probe(call)
    except NotRunnable as error:
        return Finding(None, str(error))
    return known if known is not None and _still_holds(probe, known) else search(probe)


def search(probe: Probe) -> Finding:
    """Letters first, then linear groups."""
    found = Lettering(
        tuple((".",) * len(shape) for shape in probe.shapes),
        tuple((".",) * (0 if r is None else r.dim()) for r in probe.samples[0].results),
    )
    for choice in _choices(probe.shapes):
        if all(found.operands[i][dim] == "." for i, dim in choice.items()):
            letter = f"x{len(found.letters)}"
            wider = _with_letter(probe, found, choice, letter)
            if wider is not None and not unsound(probe, wider, about=letter):
                found = wider
    found = replace(found, linear=_linear_groups(probe, found)).renamed()
    if not found.letters and not found.linear:
        return Finding(None, "shards of its operands never make shards of its results")
    return Finding(found)


def _choices(shapes: Sequence[tuple[int, ...]]) -> Iterator[Choice]:
    """Per size: a dim of that size, or none, of every operand, those that shard most first. Where
    they are too many, dims at like places and single dims only."""
    for size in dict.fromkeys(n for shape in shapes for n in shape if n > 1):
        if not any(size % n == 0 for n in SHARDS):
            continue
        dims = [[d for d, n in enumerate(shape) if n == size] for shape in shapes]
        if math.prod(1 + len(d) for d in dims) <= CANDIDATES:
            picks = itertools.product(*([*d, None] for d in dims))
            found = [{i: d for i, d in enumerate(pick) if d is not None} for pick in picks]
        else:
            found = [
                {
                    i: place % len(shape)
                    for i, shape in enumerate(shapes)
                    if place % len(shape) in dims[i]
                }
                for place in range(-max(map(len, shapes)), max(map(len, shapes)))
            ]
            found += [{i: d} for i, choices in enumerate(dims) for d in choices]
        yield from sorted((f for f in found if f), key=len, reverse=True)


def _with_letter(probe: Probe, found: Lettering, choice: Choice, letter: str) -> Lettering | None:
    """The lettering with one letter more on the chosen dims, and where two shards say that the
    results have it; None where they do not fit together."""
    first = probe.samples[0]
    size = first.operands[min(choice)].shape[choice[min(choice)]]
    count = next(n for n in SHARDS if size % n == 0)
    operands = tuple(
        t.narrow(choice[i], 0, size // count).clone() if i in choice else t
        for i, t in enumerate(first.operands)
    )
    try:
        results = probe.run(operands)
    except Exception:  # shards that do not fit together: no letter
        return None
    if len(results) != len(first.results):
        return None
    places: list[int | None] = []
    for local, whole in zip(results, first.results, strict=True):
        place = None
        if whole is not None and local is not None:
            if local.dim() != whole.dim():
                return None
            smaller = [d for d, n in enumerate(whole.shape) if local.shape[d] != n]
            if len(smaller) > 1 or not (smaller or whole.dtype.is_floating_point):
                return None
            place = smaller[0] if smaller else None
        places.append(place)
    marked = [dict.fromkeys([] if place is None else [place], letter) for place in places]
    taken = [found.results[i][d] for i, mark in enumerate(marked) for d in mark]
    if any(word != "." for word in taken):
        return None
    summed = any(place is None and r is not None for place, r in zip(places, results, strict=True))
    return replace(
        found,
        operands=tuple(
            _marked(words, {choice[i]: letter} if i in choice else {})
            for i, words in enumerate(found.operands)
        ),
        results=tuple(map(_marked, found.results, marked)),
        sums=(*found.sums, letter) if summed else found.sums,
    )


def _marked(words: Words, marks: Mapping[int, str]) -> Words:
    return tuple(marks.get(dim, word) for dim, word in enumerate(words))


def _linear_groups(probe: Probe, found: Lettering) -> tuple[tuple[int, ...], ...]:
    """Single operands; of the others all together, and pairs of them."""
    first = probe.samples[0]
    if any(r is not None and not r.dtype.is_floating_point for r in first.results):
        return ()

    def is_linear(group: tuple[int, ...]) -> bool:
        return not unsound(probe, replace(found, linear=(group,)), about=group)

    floats = [i for i, t in enumerate(first.operands) if t.dtype.is_floating_point]
    alone = [(i,) for i in floats if is_linear((i,))]
    others = [i for i in floats if (i,) not in alone]
    together = [tuple(others)] if len(others) > 2 else []
    together += itertools.combinations(others, 2)
    return (*alone, *filter(is_linear, together))


# ---- the file of a finding


def _key(call: Call) -> str:
    """Hash of all that a search depends on. Real sizes count only where they are run."""
    sizes = sorted({n for i in range(len(call.operands)) for n in call.shape(i)})
    results = [
        None if m is None else (m.dtype, [sizes.index(n) if n in sizes else -1 for n in m.shape])
        for m in call.results
    ]
    parts = (
        _VERSION,
        torch.__version__,
        str(call.target),
        str(getattr(call.target, "_schema", "")),
        _code_of(str(getattr(call.target, "_name", ""))),
        call.args,
        call.kwargs,
        call.dtypes,
        tuple(candidate_shapes(call)),
        results,
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _code_of(name: str) -> str:
    """What Python code a custom operator runs, as far as it is one function; "" where unknown."""
    definition = torch._library.custom_ops.OPDEFS.get(name)
    code = getattr(getattr(definition, "_init_fn", None), "__code__", None)
    return "" if code is None else f"{code.co_code.hex()} {code.co_consts} {code.co_names}"


def _still_holds(probe: Probe, known: Finding) -> bool:
    assert known.lettering is not None
    try:
        return not unsound(probe, known.lettering)
    except RuleError:
        return False


def _read(key: str) -> Finding | None:
    """None where nothing is kept, or nothing that is a finding."""
    record = read_record(_KIND, key)
    if record is None:
        return None
    try:
        if record["rule"] is None:
            return Finding(None, str(record["reason"]))
        rule = record["rule"]
        return Finding(Lettering.parse(rule["text"], rule["reduction"], rule["linear"]))
    except (ValueError, KeyError, TypeError, AttributeError, RuleError) as error:
        _LOG.info("the kept rule %s is none and is searched anew: %s", key, error)
        return None


def _write(key: str, finding: Finding) -> None:
    rule = finding.lettering
    record: dict[str, Any] = {"rule": None, "reason": finding.reason}
    if rule is not None:
        record["rule"] = {
            "text": rule.text,
            "reduction": " ".join(rule.sums),
            "linear": rule.linear,
        }
    write_record(_KIND, key, record)
