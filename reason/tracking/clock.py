"""When things happened, so that durations are right although the time of day can be set.

The time of day says when; a monotonic clock, which nobody sets, says how long. Its readings can be
compared within one boot of one machine. Across boots, and in folders that have no such readings, the
time of day has to do.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reason.tracking.folder import RunFolder


@dataclass(frozen=True)
class Instant:
    """A moment: the time of day and, where it was noted, a monotonic reading with the boot it belongs to."""

    time: float  # seconds since the epoch
    clock: float | None = None  # seconds of time.monotonic()
    boot: str = ""

    @classmethod
    def now(cls) -> Instant:
        return cls(time.time(), time.monotonic(), boot())

    @classmethod
    def of(cls, event: Mapping[str, Any]) -> Instant:
        """When an event was written."""
        return cls(event["time"], event.get("clock"), event.get("boot", ""))

    @classmethod
    def end_of(cls, closed: Mapping[str, Any]) -> Instant:
        """When the attempt ended that an event closes: at its ``until`` where it was closed by others, later."""
        if "until" not in closed:
            return cls.of(closed)
        until = min(closed["until"], closed["time"])
        return cls(until, closed.get("until_clock"), closed.get("until_boot", ""))

    def since(self, earlier: Instant) -> float:
        """Seconds from ``earlier`` to here, never negative."""
        if self.clock is not None and earlier.clock is not None and self.boot and self.boot == earlier.boot:
            return max(self.clock - earlier.clock, 0.0)
        return max(self.time - earlier.time, 0.0)


@functools.cache
def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def boot() -> str:
    """What monotonic readings have in common that can be compared: a boot, or else a process."""
    return _boot_id() or f"process {os.getpid()}"


def device_hours(folder: RunFolder, devices: int) -> dict[str, float]:
    """Device-hours that a run has held so far, from its events: {"total", "train"}.

    Every attempt counts, killed and failed ones too, up to its last sign of life.

    Args:
        devices: how many an attempt held that does not say so.
    """
    total = train = 0.0
    start: Instant | None = None
    phase: Instant | None = None  # the beginning of the training that goes on
    held = devices
    now = Instant.now() if folder.is_locked() else folder.last_sign
    for e in [*folder.events(), None]:
        if start is not None and (e is None or e["event"] == "closed"):
            end = now if e is None else Instant.end_of(e)
            total += end.since(start) * held
            if phase is not None:
                train += end.since(phase) * held
            start = phase = None
        if e is None:
            break
        if e["event"] == "attempt":
            start, held = Instant.of(e), e.get("devices", devices)
        elif e["event"] == "phase" and start is not None:
            here = Instant.of(e)
            if phase is not None:
                train += here.since(phase) * held
            phase = here if e.get("phase") == "train" else None
    return {"total": total / 3600, "train": train / 3600}
