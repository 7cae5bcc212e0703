"""A sharding rule as text: what a user registers, what discovery finds, what a plan records.

    b i k, b k j -> b i j; sums k; linear 0; linear 1

One word per dim, "." for a dim without a factor; "..." stands for any number of dims, which align
at the right and broadcast. The letters mean what they mean in `rule.lettered`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from autopar.errors import RuleError
from autopar.sharding.rule import Call, Rule, letter_rule

DOTS = "..."
_WORD = re.compile(r"\.|\.\.\.|[A-Za-z][A-Za-z0-9_]*")

Words = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Lettering:
    """operands, results: a word per dim of each. sums: letters that are summed over. linear: groups
    of operands in which the call is jointly linear."""

    operands: tuple[Words, ...]
    results: tuple[Words, ...]
    sums: tuple[str, ...] = ()
    linear: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        _check(self)

    @classmethod
    def parse(
        cls, text: str, reduction: str = "", linear: Sequence[Sequence[int]] = ()
    ) -> Lettering:
        """RuleError where the text is not a rule."""
        sides = text.split("->")
        if len(sides) != 2:
            raise RuleError(f'a rule reads like "b i k, b k j -> b i j": got {text!r}')
        operands, results = (
            tuple(tuple(word.split()) for word in side.split(",")) for side in sides
        )
        groups = tuple(tuple(int(i) for i in group) for group in linear)
        return cls(operands, results, tuple(reduction.split()), groups)

    @property
    def text(self) -> str:
        """Operands and results: what `parse` reads."""
        sides = (", ".join(" ".join(w) for w in words) for words in (self.operands, self.results))
        return " -> ".join(sides)

    def __str__(self) -> str:
        parts = [self.text]
        parts += [f"sums {' '.join(self.sums)}"] if self.sums else []
        parts += [f"linear {' '.join(map(str, group))}" for group in self.linear]
        return "; ".join(parts)

    @property
    def letters(self) -> tuple[str, ...]:
        """In order of appearance, without dots."""
        words = itertools.chain.from_iterable((*self.operands, *self.results))
        return tuple(dict.fromkeys(w for w in words if w not in (".", DOTS)))

    def renamed(self) -> Lettering:
        """The same with letters a, b, c, .. in order of appearance."""
        new = {letter: _name(number) for number, letter in enumerate(self.letters)}

        def words(sides: tuple[Words, ...]) -> tuple[Words, ...]:
            return tuple(tuple(new.get(w, w) for w in side) for side in sides)

        sums = tuple(sorted(new[letter] for letter in self.sums))
        return Lettering(words(self.operands), words(self.results), sums, self.linear)

    def at_ranks(self, operands: Sequence[int], results: Sequence[int | None]) -> Lettering:
        """The same with every "..." written out. RuleError where a number of dims is another one.
        None: a result that does not exist."""
        for what, words, ranks in (
            ("operand", self.operands, operands),
            ("result", self.results, results),
        ):
            if len(words) != len(ranks):
                raise RuleError(
                    f"the rule {self} names {len(words)} {what}s, the call has {len(ranks)}"
                )
        return Lettering(
            tuple(self._at_rank(w, r) for w, r in zip(self.operands, operands, strict=True)),
            tuple(self._at_rank(w, r) for w, r in zip(self.results, results, strict=True)),
            self.sums,
            self.linear,
        )

    def _at_rank(self, words: Words, rank: int | None) -> Words:
        if rank is None:
            return ()
        spare = rank - len([w for w in words if w != DOTS])
        if spare < 0 or (spare and DOTS not in words):
            raise RuleError(
                f'the rule {self} gives "{" ".join(words)}" to a tensor of {rank} dims: one word'
                ' per dim, or "..." for any number of them'
            )
        leading = tuple(f"_{spare - i}" for i in range(spare))  # numbered from the right
        where = words.index(DOTS) if DOTS in words else 0
        return (*words[:where], *leading, *words[where + (DOTS in words) :])

    def rule(self, call: Call) -> Rule:
        """The factors and result dims of a call. RuleError where it does not fit."""
        ranks = [None if m is None else len(m.shape) for m in call.results]
        fitted = self.at_ranks([len(dims) for dims in call.operands], ranks)
        sizes: dict[str, int] = {}
        for number, words in enumerate(fitted.operands):
            for word, size in zip(words, call.shape(number), strict=True):
                if word != "." and size != 1 and sizes.setdefault(word, size) != size:
                    raise RuleError(
                        f"the rule {self} of {call.target} gives the letter {word!r} to dims of"
                        f" sizes {sizes[word]} and {size}: dims of one letter have one size"
                    )
        return letter_rule(
            call,
            fitted.operands,
            fitted.results,
            reduction=set(self.sums),
            linear=self.linear,
        )


def _name(number: int) -> str:
    return chr(ord("a") + number) if number < 26 else f"a{number}"


def _check(rule: Lettering) -> None:
    """Every word is a letter, "." or one "..."; letters come from operands; groups exist."""
    for words in (*rule.operands, *rule.results):
        for word in words:
            if not _WORD.fullmatch(word) and not re.fullmatch(r"_\d+", word):
                raise RuleError(f'a dim is a letter, "." or "...": got {word!r} in {rule}')
        if words.count(DOTS) > 1:
            raise RuleError(f'"..." stands once in a tensor: got {" ".join(words)!r} in {rule}')
    known = set(itertools.chain.from_iterable(rule.operands)) - {"."}
    unknown = set(itertools.chain.from_iterable(rule.results)) - known - {"."}
    if unknown:
        raise RuleError(
            f"{rule}: no operand has {', '.join(sorted(unknown))}, which a result names: a result's"
            ' letters come from the operands; write "." for a dim that no operand has'
        )
    lost = set(rule.sums) - known
    if lost:
        raise RuleError(f"{rule}: no operand has {', '.join(sorted(lost))}, which is summed over")
    for group in rule.linear:
        wrong = [i for i in group if not 0 <= i < len(rule.operands)]
        if wrong or not group or len(set(group)) != len(group):
            raise RuleError(
                f"{rule}: linear is groups of operand numbers from 0 to {len(rule.operands) - 1},"
                f" such as [(0,), (1, 2)]: got {group}"
            )
