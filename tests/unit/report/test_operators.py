from __future__ import annotations

import re

from autopar.report.operators import operator_table
from autopar.report.text import rendered_text
from tests.unit.report.plans import hand_plan


def test_operators_are_listed_by_pattern_with_their_stage() -> None:
    text = rendered_text(operator_table(hand_plan(), re.compile(r"^mm|relu")))
    rows = [line.split() for line in text.splitlines()[1:]]
    assert rows[:4] == [
        ["0", "2x2", "relu_1", "b", "-"],
        ["1", "4", "mm", "-"],
        ["1", "4", "mm_1", "k"],
        ["1", "4", "relu_1", "b", "-"],
    ]
    assert "4 of 11 operators" in text
