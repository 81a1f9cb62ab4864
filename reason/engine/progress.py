"""What a run says while it works: log files for every rank, stderr for whoever watches rank 0."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from reason import printable

LINE_EVERY_S = 10.0  # without a terminal, at most one progress line per this many seconds


class RunLog:
    """The log of one rank; rank 0 also prints to stderr, with a progress bar and the time left on a terminal."""

    def __init__(self, folder: Path, rank: int, quiet: bool = False):
        self.path = folder / (f"log-rank{rank}.txt" if rank else "log.txt")
        self._prints = rank == 0 and not quiet
        self._bar: Any = None
        self._task: Any = None
        self._phase = ""
        self._last_line = 0.0
        self._began = (0.0, 0.0)  # when this phase was first seen, and how far a resumed run had come

    def say(self, text: str) -> None:
        """One line to the log, and to stderr on rank 0."""
        text = printable.printable(text)
        self.note(text)
        if self._prints:
            if self._bar is not None:
                self._bar.console.print(text, highlight=False, markup=False)
            else:
                say(text)

    def note(self, text: str) -> None:
        """To the log alone."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with (
            suppress(OSError),
            open(self.path, "a", encoding="utf-8") as f,
        ):  # no run ends for want of a log line
            f.write("".join(f"{stamp} {line}\n" for line in printable.printable(text).splitlines()))

    def progress(self, phase: str, done: float, total: float, text: str = "") -> None:
        """``done`` of ``total`` of a phase. Cheap enough to call at every step."""
        if not self._prints:
            return
        if sys.stderr.isatty():
            self._draw(phase, done, total, text)
            return
        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._began, self._last_line = phase, (now, done), now
        elif now - self._last_line >= LINE_EVERY_S and done > self._began[1]:
            self._last_line = now
            left = (now - self._began[0]) * (total - done) / (done - self._began[1])
            say(f"  {phase} {done:.0f}/{total:.0f}  {text}  {_duration(left)} left")

    def _draw(self, phase: str, done: float, total: float, text: str) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}", markup=False), BarColumn(bar_width=30),
                TextColumn("{task.completed:.0f}/{task.total:.0f}"), TimeRemainingColumn(),
                TextColumn("{task.fields[text]}", markup=False), console=Console(stderr=True), transient=True,
                refresh_per_second=4,
            )  # fmt: skip
            self._bar.start()
        if phase != self._phase:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task, self._phase = self._bar.add_task(phase, total=total, text=text), phase
        self._bar.update(self._task, completed=done, total=total, text=text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None
            self._phase = ""


def say(text: str, quiet: bool = False) -> None:
    """One line to stderr, unless ``quiet``."""
    if not quiet:
        printable.say(text)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
