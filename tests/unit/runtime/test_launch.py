"""Which device is whose, without any: what a process is told by torchrun, or has said itself."""

from __future__ import annotations

import pytest

from autopar.runtime import launch


@pytest.mark.parametrize(
    ("told", "joined", "current", "want"),
    [("3", True, 1, 3), (None, True, 1, 1), (None, False, 1, 0), ("2", False, 0, 2)],
    ids=["torchrun", "joined otherwise", "alone", "torchrun, not joined yet"],
)
def test_a_process_has_the_device_that_was_said(
    monkeypatch: pytest.MonkeyPatch, told: str | None, joined: bool, current: int, want: int
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if told is not None:
        monkeypatch.setenv("LOCAL_RANK", told)
    monkeypatch.setattr(launch, "is_connected", lambda: joined)
    monkeypatch.setattr("torch.cuda.current_device", lambda: current)
    assert launch._local_rank() == want
