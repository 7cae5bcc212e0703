"""What a worker does in a step, one action at a time, and what each of them waits for.

    F(m) of stage s    F(m) of stage s-1
    B(m) of stage s    B(m) of stage s+1 and F(m) of s
    W(m) of stage s    B(m) of s

A schedule that splits backward plays in B what the gradients of the stage's inputs need and in W
the rest; the others play all of backward in B.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from autopar.errors import ScheduleError


class ActionKind(StrEnum):
    """What one action does; the value is its letter in the text form."""

    FORWARD = "F"
    BACKWARD = "B"
    WEIGHT = "W"  # the part of backward that nobody else waits for
    REDUCE = "R"  # gradients, once per step, after the last backward


@dataclass(frozen=True, slots=True)
class Action:
    """One step of one stage. microbatch is None for REDUCE, and only for it."""

    kind: ActionKind
    stage: int
    microbatch: int | None = None

    def __post_init__(self) -> None:
        if (self.kind is ActionKind.REDUCE) != (self.microbatch is None):
            raise ScheduleError(
                f"F, B and W name a microbatch, R does not: got {self.kind.name} of "
                f"{self.microbatch}"
            )
        if self.stage < 0 or (self.microbatch is not None and self.microbatch < 0):
            raise ScheduleError(
                f"stages and microbatches count from 0: got {self.microbatch} of stage {self.stage}"
            )

    def __str__(self) -> str:
        return str(self.kind) if self.microbatch is None else f"{self.kind}{self.microbatch}"

    @classmethod
    def parse(cls, text: str, stage: int) -> Action:
        """ "F0", "B12", "W1", "R" of a stage; "2F0" names stage 2 itself."""
        match = re.fullmatch(r"(\d*)(?:([FBW])(\d+)|R)", text)
        if match is None:
            raise ScheduleError(
                "an action is F<microbatch>, B<microbatch>, W<microbatch> or R, after the number "
                f"of its stage where a worker has several: got {text!r}"
            )
        stage = int(match[1] or stage)
        if match[2] is None:
            return cls(ActionKind.REDUCE, stage)
        return cls(ActionKind(match[2]), stage, int(match[3]))


Row = tuple[Action, ...]  # of one worker, in order


def prerequisites(num_stages: int, action: Action) -> tuple[Action, ...]:
    """The actions that must have ended before this one may start."""
    kind, stage, microbatch = action.kind, action.stage, action.microbatch
    if kind is ActionKind.FORWARD:
        return (Action(kind, stage - 1, microbatch),) if stage > 0 else ()
    if kind is ActionKind.BACKWARD:
        own = Action(ActionKind.FORWARD, stage, microbatch)
        return (own, Action(kind, stage + 1, microbatch)) if stage < num_stages - 1 else (own,)
    if kind is ActionKind.WEIGHT:
        return (Action(ActionKind.BACKWARD, stage, microbatch),)
    return ()
