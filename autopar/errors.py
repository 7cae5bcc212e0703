"""The error tree of autopar.

Every error a user can meet derives from :class:`AutoparError`. Its text says what was wrong, what
was got, and the way out. Programming errors inside the compiler are :class:`InternalError`: a
verifier after a pass found a broken invariant, which is always a bug of autopar and never of the
user.
"""

from __future__ import annotations


class AutoparError(Exception):
    """Base of all errors raised on purpose by autopar."""


class CaptureError(AutoparError):
    """The model cannot be traced into one dataflow graph. Names the user's source line where
    known."""


class MeshError(AutoparError):
    """A mesh, submesh or axis that does not exist or does not fit the cluster."""


class LayoutError(AutoparError):
    """A layout that a tensor cannot have."""


class RuleError(AutoparError):
    """A sharding rule that does not fit its operator, or that the operator does not obey."""


class RuleWarning(UserWarning):
    """An operator has no sharding rule of autopar's own: what was done instead."""


class PlanError(AutoparError):
    """A plan, or a plan file, that is malformed or does not belong to this model, cluster or
    version."""


class ScheduleError(AutoparError):
    """A schedule that is incomplete, out of order, or would deadlock."""


class OptionError(AutoparError):
    """A search option, pin or argument with a value that cannot be honoured."""


class BatchError(AutoparError):
    """A batch whose structure, shapes or dtypes differ from those the plan was made for."""


class NoFeasiblePlan(AutoparError):
    """No plan fits the budget: the text names what binds and the smallest change that would fit.

    least_bytes: the least bytes per device of any plan in the space, or None where unknown.
    """

    def __init__(self, message: str, *, least_bytes: float | None = None) -> None:
        super().__init__(message)
        self.least_bytes = least_bytes


class SolverError(AutoparError):
    """A solver is missing, failed, or stopped without any solution."""


class RuntimeFailure(AutoparError):
    """A rank failed while a plan was running."""


class VerificationError(AutoparError):
    """The parallel program computed something else than the single-device one."""


class InternalError(AutoparError):
    """A broken invariant found by a verifier: a bug in autopar. Please report it with the plan
    file."""
