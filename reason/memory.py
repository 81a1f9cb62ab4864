"""How much memory a file may take: few bytes on disk can stand for more than a machine holds.

What reading a file would cost is counted before or while it is read, against half of the memory that is
free (of the machine, of the container and of the process's own limit). ``REASON_MEMORY_GB`` sets another limit.
"""

from __future__ import annotations

import math
import os
import re
from contextlib import suppress
from pathlib import Path

from reason.errors import ConfigError, DataError

LIMIT = "REASON_MEMORY_GB"
PARSED = 20  # bytes of memory that a byte of JSON takes, about, once it is read
_CGROUP = "/sys/fs/cgroup"
_CGROUPS = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


class Budget:
    """Memory for what is read from ``where``.

    Args:
        share: of what is free.
    Raises:
        ConfigError: REASON_MEMORY_GB is no positive number.
    """

    def __init__(self, where: Path | str, share: float = 0.5):
        self.where = where
        self.limit, self._said = _limit(share)
        self.spent = 0

    def spend(self, size: int, what: str = "") -> None:
        """Count ``size`` bytes; ``what`` says what they are for, as far as that is known before reading.

        Raises:
            DataError: that is more than there is, all together.
        """
        self.spent += size
        if self.spent > self.limit:
            needs = (
                f"would take {in_words(self.spent)}" if what else f"takes more than {in_words(self.limit)}"
            )
            raise DataError(
                f"{self.where} {needs} of memory once it is read{what and f' ({what})'}; {self._said}.",
                f"If the file is what it should be, allow more with {LIMIT}=NUMBER, or use a part of it.",
            )


def _limit(share: float) -> tuple[int, str]:
    if text := os.environ.get(LIMIT, "").strip():
        try:
            limit = float(text)
        except ValueError:
            limit = math.nan
        if not 0 < limit < math.inf:
            raise ConfigError(f"{LIMIT}={text} is not a positive number.", f"For example: {LIMIT}=8")
        return int(limit * 1e9), f"{LIMIT} allows {in_words(limit * 1e9)}"
    limit = int(available() * share)
    return limit, f"{'half of ' if share < 1 else ''}what is free here is {in_words(limit)}"


def available() -> int:
    """Bytes that this process may still take, as far as the system tells; a generous guess where it does not."""
    found = []
    with suppress(OSError, ValueError, AttributeError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError):
        told = re.search(
            r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"), re.M
        )
        found += [int(told[1]) * 1024] if told else []
    for most, used in _CGROUPS:
        with suppress(OSError, ValueError):  # "max": no limit
            most, used = (int(Path(_CGROUP, name).read_text(encoding="ascii")) for name in (most, used))
            found.append(most - used)
    with suppress(ImportError, OSError):
        import resource

        if (most := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            found.append(most - pages * resource.getpagesize())
    return max(min(found, default=2**36), 0)


def in_words(size: float) -> str:
    """A number of bytes for people: "1.9 GB"."""
    unit, *larger = ("bytes", "kB", "MB", "GB", "TB")
    while larger and size >= 1000:
        unit, size = larger.pop(0), size / 1000
    return f"{size:,.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:.1f} {unit}"
