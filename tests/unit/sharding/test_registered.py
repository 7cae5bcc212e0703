"""`autopar.register_rule`: what it takes, what it refuses, and that plans follow it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import autopar
from autopar.errors import AutoparError, OptionError, RuleError, RuleWarning
from autopar.sharding.lettering import Lettering
from autopar.sharding.registered import REGISTERED, resolve
from autopar.sharding.registry import rule_for
from autopar.sharding.rule import Origin
from tests.oracles import MESHES, disagreements, make_sample
from tests.unit.sharding import custom  # noqa: F401  (defines the operators)
from tests.unit.sharding.case import x

ops = torch.ops.found
DOCS = Path(__file__).parents[3] / "docs" / "rules.md"


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """What a test registers is gone after it."""
    before = dict(REGISTERED._rules)
    yield
    REGISTERED._rules.clear()
    REGISTERED._rules.update(before)


def test_a_registered_rule_is_used_and_sound() -> None:
    autopar.register_rule("found::mix", "b i k, k j -> b i j", reduction="k", linear=[(0,), (1,)])
    sample = make_sample(ops.mix.default, (x(4, 8, 4), x(4, 8)))
    rule = rule_for(sample.call)
    assert rule.origin is Origin.REGISTERED
    assert [f.name for f in rule.factors] == ["b", "i", "k", "j", "+0", "+1"]
    generator = torch.Generator().manual_seed(0)
    for mesh in MESHES:
        tried, wrong = disagreements(sample, mesh, generator=generator)
        assert tried > 3 and not wrong


def test_dots_are_any_dims_and_broadcast() -> None:
    autopar.register_rule("found::gated", "..., ... -> ...", linear=[(0,)])
    for shapes in ([(4, 8), (4, 8)], [(4, 8), (8,)], [(2, 4, 8), (4, 1)], [(4,), ()]):
        sample = make_sample(ops.gated.default, tuple(x(*shape) for shape in shapes))
        rule = rule_for(sample.call)
        assert len(rule.factors) == len(shapes[0]) + 1
        _, wrong = disagreements(sample, MESHES[0], generator=torch.Generator().manual_seed(0))
        assert not wrong


def test_a_rule_that_cannot_be_checked_is_said_to_be_believed() -> None:
    with pytest.warns(
        RuleWarning, match="noisy.* cannot be checked, as it gives different results"
    ):
        autopar.register_rule("found::noisy", "a b -> a b")
    with pytest.warns(RuleWarning, match="is believed"):
        rule = rule_for(make_sample(ops.noisy.default, (x(4, 8),)).call)
    assert [f.name for f in rule.factors] == ["a", "b"]


REFUSED: dict[str, tuple[dict[str, Any], type[AutoparError], str]] = {
    "no operator": ({"op": "found::nothing"}, OptionError, "'found::nothing' is no operator"),
    "no namespace": ({"op": "nothing"}, OptionError, '"mylib::op"'),
    "no overload": ({"op": "found::mix.wide"}, OptionError, "no overload: found::mix has default"),
    "has a row": ({"op": "aten::mm"}, OptionError, "family 'contraction'.*replace=True"),
    "no arrow": ({"rule": "b i k, k j"}, RuleError, 'reads like "b i k, b k j -> b i j"'),
    "no word": ({"rule": "b i k, k j -> b i j!"}, RuleError, "got 'j!'"),
    "operands": ({"rule": "b i k -> b i k"}, RuleError, "names 1 operands.*has 2 tensors"),
    "results": ({"rule": "b i k, k j -> b i j, b"}, RuleError, "names 2 results.*has 1"),
    "unknown letter": ({"rule": "b i k, k j -> b i z"}, RuleError, "no operand has z"),
    "lost sum": ({"reduction": "z"}, RuleError, "no operand has z, which is summed"),
    "no such group": ({"linear": [(2,)]}, RuleError, "from 0 to 1"),
    "lost letter": ({"rule": "b k, k j -> b i j"}, RuleError, "no operand has i"),
    "rank of example": (
        {"example": (x(6, 6), x(6, 6))},
        RuleError,
        'gives "b i k" to a tensor of 2 dims',
    ),
    "no call": ({"example": (x(6, 6, 6), x(5, 6))}, RuleError, "fails on the example"),
    "sizes": (
        {"rule": "b i k, j j -> b i k", "example": (x(6, 12, 18), x(18, 6))},
        RuleError,
        "sizes 18 and 6",
    ),
    "wrong letter": (
        {"rule": "b i k, i j -> b i j", "example": (x(6, 6, 6), x(6, 6))},
        RuleError,
        "does not obey.*with 2 shards of i",
    ),
    "not linear": (
        {"linear": [(0, 1)]},
        RuleError,
        "operands 0, 1 as a pending sum.*whole,.*on shards",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    changes, error, text = REFUSED[name]
    given: dict[str, Any] = {"op": "found::mix", "rule": "b i k, k j -> b i j", "reduction": "k"}
    given |= changes
    with pytest.raises(error, match=re.compile(text, re.DOTALL)):
        autopar.register_rule(given.pop("op"), given.pop("rule"), **given)
    assert REGISTERED.get(ops.mix.default) is None


def test_a_second_rule_needs_replace() -> None:
    autopar.register_rule("found::normalise", "a . -> a .")
    with pytest.raises(OptionError, match=r"registered rule already, a \. -> a \..*replace=True"):
        autopar.register_rule("found::normalise", "a b . -> a b .")
    autopar.register_rule("found::normalise", "a b . -> a b .", replace=True)
    assert rule_for(make_sample(ops.normalise.default, (x(4, 8, 2),)).call).note == "a b . -> a b ."


def test_calls_are_checked_where_no_example_could_be_made() -> None:
    autopar.register_rule("found::heads", "a b -> a b")  # needs the number of heads
    call = make_sample(ops.heads.default, (x(4, 8), 4)).call
    with pytest.raises(RuleError, match=r"found\.heads.* does not obey.*shards of b.*check=False"):
        rule_for(call)
    autopar.register_rule("found::heads", "a b -> a b", check=False, replace=True)
    assert [f.name for f in rule_for(call).factors] == ["a", "b"]


def test_a_row_can_be_replaced() -> None:
    autopar.register_rule("aten::relu", "a ... -> a ...", replace=True)
    rule = rule_for(make_sample(torch.ops.aten.relu.default, (x(4, 8),)).call)
    assert rule.origin is Origin.REGISTERED


def test_text_round_trip_and_overloads() -> None:
    lettering = Lettering.parse("b i k, k j -> b i j", "k", [(0,), (1,)])
    assert str(lettering) == "b i k, k j -> b i j; sums k; linear 0; linear 1"
    assert Lettering.parse(lettering.text, "k", lettering.linear) == lettering
    assert Lettering.parse("b, -> ").operands == (("b",), ())
    assert resolve("aten::add.Tensor") is resolve(torch.ops.aten.add.Tensor)


def test_the_example_of_the_documentation() -> None:
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    (snippet,) = [block for block in blocks if "register_rule" in block]
    exec(snippet, {})
    found = REGISTERED.get(torch.ops.mylib.gated.default)
    assert found is not None and str(found[0]) == "..., ... -> ...; linear 0"
