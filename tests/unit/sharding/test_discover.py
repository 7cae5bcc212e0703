"""Rules found by running: what is found, what must not be, and what becomes of it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autopar.graph.program import TensorMeta
from autopar.layout import raw_dims
from autopar.sharding import discover
from autopar.sharding.discover import discovered_rule, find
from autopar.sharding.lettering import Lettering
from autopar.sharding.probe import make_probe, unsound
from autopar.sharding.rule import Call, Origin, Slot
from tests.oracles import MESHES, disagreements, make_sample
from tests.unit.sharding import custom  # noqa: F401  (defines the operators)
from tests.unit.sharding.case import Case, ints, x
from tests.unit.sharding.cases import UNINITIALISED, all_cases

ops = torch.ops.found
F32 = torch.float32


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPAR_CACHE_DIR", str(tmp_path))


def call_of(target: Any, *args: Any, results: tuple[tuple[int, ...], ...] = ()) -> Call:
    """Without running it where results are given."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    numbers = iter(range(len(tensors)))
    if not results:
        made = target(*args)
        made = made if isinstance(made, tuple) else (made,)
        metas = tuple(TensorMeta(tuple(t.shape), t.dtype) for t in made)
    else:
        metas = tuple(TensorMeta(shape, tensors[0].dtype) for shape in results)
    return Call(
        target=target.default,
        args=tuple(Slot(next(numbers)) if isinstance(a, Tensor) else a for a in args),
        kwargs=(),
        operands=tuple(raw_dims(tuple(t.shape)) for t in tensors),
        dtypes=tuple(t.dtype for t in tensors),
        results=metas,
        same=tuple(range(len(tensors))),
    )


def joined(*shapes: tuple[int, ...]) -> Call:
    """A list of tensors and one without dims."""
    scalar = call_of(ops.clamp, big(1))
    wide = (shapes[0][0], sum(shape[1] for shape in shapes))
    return replace(
        scalar,
        target=ops.joined.default,
        args=(tuple(Slot(i) for i in range(len(shapes))), Slot(len(shapes))),
        operands=(*map(raw_dims, shapes), ()),
        dtypes=(F32,) * (len(shapes) + 1),
        results=(TensorMeta(wide, F32),),
        same=tuple(range(len(shapes) + 1)),
    )


def big(*shape: int) -> Tensor:
    return torch.zeros(shape)


FOUND: dict[str, tuple[Call, str]] = {
    "contraction": (
        call_of(ops.mix, big(64, 32, 16), big(16, 8)),
        "a b c, c d -> a b d; sums c; linear 0; linear 1",
    ),
    "pointwise, two results": (
        call_of(ops.gate, big(1024, 48), big(1024, 48)),
        "a b, a b -> a b, a b",
    ),
    "softmax": (call_of(ops.normalise, big(64, 32, 16)), "a b . -> a b ."),
    "clamp is not linear": (call_of(ops.clamp, big(64, 32)), "a b -> a b"),
    "neighbours": (call_of(ops.shift, big(64, 32)), ". a -> . a; linear 0"),
    "equal sizes": (
        call_of(ops.square, big(8, 8), big(8, 8)),
        "a b, b c -> c a; sums b; linear 0; linear 1",
    ),
    "lookup": (call_of(ops.pick, big(64, 16), ints(8, 32)), ". a, b -> b a; linear 0"),
    "integers": (call_of(ops.count, big(64, 16)), ". a -> a"),
    "heads are whole": (call_of(ops.heads, big(64, 32), 4), "a . -> a .; linear 0"),
    "a constant is a size": (call_of(ops.padded, x(8, 6), 8), ". a -> . a"),
    "a size that is kept": (call_of(ops.boxes, big(64, 4)), "a . -> a"),
    "float32 only": (call_of(ops.single, big(64, 32)), "a . -> a .; linear 0"),
    "a list and a number": (
        joined((64, 32), (64, 16)),
        "a ., a .,  -> a .; linear 2; linear 0 1",
    ),
    "of torch": (call_of(torch.ops.aten.fliplr, big(64, 32)), "a . -> a .; linear 0"),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_is_found(name: str) -> None:
    call, text = FOUND[name]
    rule = discovered_rule(call)
    assert rule.note == text and rule.origin is Origin.DISCOVERED


REPLICATED: dict[str, tuple[Call, str]] = {
    "no kernel": (call_of(ops.cuda_only, big(8, 6), results=((8, 6),)), "it fails: NotImplemented"),
    "random": (call_of(ops.noisy, big(8, 6)), "different results for the same operands"),
    "no information": (call_of(ops.zero, big(8, 6)), "zero or not finite"),
    "crash": (call_of(ops.crash, big(5, 6)), "it crashes with SIGABRT"),
    "too large": (
        call_of(ops.padded, big(4096, 4096), 4096, results=((4096, 4096),)),
        "too large to run",
    ),
    "writes": (
        Call(
            target=torch.ops.aten.add_.Tensor,
            args=(Slot(0), Slot(1)),
            kwargs=(),
            operands=(((8,),), ((8,),)),
            dtypes=(F32, F32),
            results=(TensorMeta((8,), F32),),
            same=(0, 1),
        ),
        "writes into its operands",
    ),
}


@pytest.mark.parametrize("name", REPLICATED)
def test_what_is_replicated_and_why(name: str) -> None:
    call, reason = REPLICATED[name]
    state = torch.random.get_rng_state()
    rule = discovered_rule(call)
    assert rule.origin is Origin.REPLICATED and not rule.factors and reason in rule.note
    assert torch.equal(torch.random.get_rng_state(), state)


WRITTEN = [case for case in all_cases() if case.target not in UNINITIALISED]


@pytest.mark.parametrize("case", WRITTEN[5::20], ids=str)
def test_the_oracle_of_written_rules_agrees(case: Case) -> None:
    """Operators that have a rule, as if they had none."""
    sample = make_sample(case.target, case.args, case.kwargs)
    generator = torch.Generator().manual_seed(0)
    for mesh in MESHES:
        _, wrong = disagreements(sample, mesh, make_rule=discovered_rule, generator=generator)
        assert not wrong, str(wrong[0])


def test_the_check_sees_wrong_rules() -> None:
    for name, wrong in {
        "softmax": "a b c -> a b c",
        "neighbours": "a b -> a b",
        "heads are whole": "a b -> a b",
        "equal sizes": "a b, b c -> a c",
    }.items():
        probe = make_probe(FOUND[name][0])
        assert unsound(probe, Lettering.parse(wrong))
    probe = make_probe(FOUND["contraction"][0])
    for linear in ([(0, 1)], [(0,), (0, 1)]):
        assert "pending sum" in unsound(probe, Lettering.parse("a b c, c d -> a b d", "c", linear))
    assert unsound(probe, Lettering.parse("a b c, . d -> a b d", "c"))
    for name in ("clamp is not linear", "softmax"):
        probe = make_probe(FOUND[name][0])
        text = ", ".join(["..."] * len(probe.shapes))
        assert unsound(probe, Lettering.parse(f"{text} -> ...", linear=[(0,)]))


def test_a_finding_is_kept_and_checked_when_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, text = FOUND["softmax"]
    searched = find(call)
    (file,) = (tmp_path / "rules").iterdir()
    monkeypatch.setattr(discover, "search", lambda _: pytest.fail("searched again"))
    assert find(call) == searched
    monkeypatch.undo()
    os.environ["AUTOPAR_CACHE_DIR"] = str(tmp_path)
    record = json.loads(file.read_text())
    for spoilt in (
        "not JSON",
        "[]",
        json.dumps({"rule": {"text": "a -> b", "reduction": "", "linear": []}}),
        json.dumps({"rule": {**record["rule"], "text": "a b c -> a b c"}}),  # stale: wrong now
        json.dumps({"rule": {**record["rule"], "text": "a -> a"}}),
    ):
        file.write_text(spoilt)
        assert str(find(call).lettering) == text
        assert json.loads(file.read_text()) == record


def test_without_a_folder_the_search_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPAR_CACHE_DIR", "/dev/null/nowhere")
    call, text = FOUND["softmax"]
    assert [str(find(call).lettering) for _ in range(2)] == [text, text]


def test_sizes_share_a_finding_and_constants_do_not(tmp_path: Path) -> None:
    for rows in (1 << 20, 1 << 21):
        find(call_of(ops.normalise, big(rows, 2, 3), results=((rows, 2, 3),)))
    assert len(list((tmp_path / "rules").iterdir())) == 1
    for heads in (2, 4):
        find(call_of(ops.heads, big(1 << 10, 320), heads))
    assert len(list((tmp_path / "rules").iterdir())) == 3
