"""What stands for a CUDA graph where there is no CUDA."""

from __future__ import annotations

from collections.abc import Callable

from autopar.runtime.captured import Recording, Results


class Recorder:
    """Replays by running again, into the memory of the first results."""

    def __init__(self) -> None:
        self.replays = 0
        self.forgotten = False

    def __call__(self, play: Callable[[], Results]) -> Recording:
        results = play()
        for (value,) in results.values():
            value.fill_(float("nan"))  # a capture computes nothing

        def replay() -> None:
            self.replays += 1
            for key, (value,) in play().items():
                results[key][0].copy_(value)

        return Recording(results, replay, lambda: setattr(self, "forgotten", True))
