"""Curves on their way into the run folder: window means, a few microseconds per call.

A training loop may log at every step; what is kept is one mean per curve and window, so a run never
holds more than ``1 / WINDOW_S`` points a second and curve, however fast it is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from reason.tracking.folder import RunFolder

WINDOW_S = 0.1  # seconds that one point stands for
FLUSH_S = 1.0  # seconds after which points reach the disk, at the next call


class PointLog:
    """Collects points of curves and appends their window means to ``metrics.jsonl``.

    A point has the mean of the values of its window, the step and the time of the last one. A window
    with a value that is not finite becomes ``"value": null`` with ``"kind"`` nan, inf or -inf: it stays
    visible, and the file stays JSON. Points that cannot be written, as on a full disk, are lost:
    ``problem`` says how many and why. Not for use by several threads at once.

    Args:
        clock: seconds since the epoch.
    """

    def __init__(self, folder: RunFolder, clock: Callable[[], float] = time.time):
        self._folder, self._clock = folder, clock
        self._open: dict[str, list[Any]] = {}  # name -> [start, total, count, step, time]
        self._sealed: list[dict[str, Any]] = []
        self._due = clock() + FLUSH_S
        self._lost, self._why = 0, ""

    @property
    def problem(self) -> str:
        """What became of points that could not be written, in words; '' where all were."""
        return f"{self._lost:,} points of curves could not be written: {self._why}" if self._lost else ""

    def log(self, name: str, value: float, step: int) -> None:
        """Add one value to curve ``name`` at ``step``."""
        now = self._clock()
        window = self._open.get(name)
        if window is not None and 0 <= now - window[0] < WINDOW_S:
            window[1] += float(value)
            window[2] += 1
            window[3:] = step, now
        else:
            if window is not None:
                self._seal(name, window)
            self._open[name] = [now, float(value), 1, step, now]
        if now >= self._due:
            self._write(now)

    def flush(self) -> None:
        """Everything logged so far is on disk when this returns, or counted in ``problem``."""
        self._write(math.inf)

    close = flush

    def __enter__(self) -> PointLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _seal(self, name: str, window: list[Any]) -> None:
        _, total, count, step, last = window
        mean = total / count
        point: dict[str, Any] = {"name": name, "value": mean, "step": int(step), "time": round(last, 3)}
        if not math.isfinite(mean):
            point |= {"value": None, "kind": str(mean)}
        self._sealed.append(point)

    def _write(self, now: float) -> None:
        """Seal the windows that are over at ``now`` and append what is sealed."""
        for name in [name for name, window in self._open.items() if now - window[0] >= WINDOW_S]:
            self._seal(name, self._open.pop(name))
        points, self._sealed = self._sealed, []
        try:
            self._folder.log_points(points)
        except OSError as error:
            self._lost, self._why = self._lost + len(points), error.strerror or str(error)
        self._due = self._clock() + FLUSH_S
