"""Plans of two machines compared: only those of equal graphs can be."""

from __future__ import annotations

from benchmarks.fingerprints import Fingerprint, comparison, comparison_text


def test_what_differs() -> None:
    ours = [Fingerprint(name, "graph", "same", "same", "0x1p-3") for name in "abcde"]
    theirs = [
        ours[0],
        Fingerprint("b", "another", "other", "other", "0x1p-2"),
        Fingerprint("c", "graph", "same", "other", "0x1p-2"),
        Fingerprint("d", "graph", "other", "other", "0x1p-2"),
    ]
    found = comparison(ours, theirs)
    assert (found.equal, found.other_graphs) == (("a",), ("b",))
    assert (found.other_figures, found.other_plans, found.missing) == (("c",), ("d",), ("e",))
    assert found.differs and not comparison(ours[:2], theirs).differs
    assert "DIFFERENT PLANS of the same graph: d" in comparison_text(found, {"versions": "x"})
