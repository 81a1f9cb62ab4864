"""Everything that can go wrong for a user, as one small tree.

A ``ReasonError`` reaches the terminal as two sentences (what happened, how to
mend it) and an exit code; a traceback is kept for our own mistakes.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class ReasonError(Exception):
    """Base of all errors meant for people. ``hint`` says what to do about it."""

    exit_code = 1

    def __init__(self, message: str, hint: str = ""):
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message

    def __reduce__(self):  # survives the trip from a worker process
        return (type(self), (self.message, self.hint))


class ConfigError(ReasonError, ValueError):
    """Usage or configuration: refused before anything is loaded (exit 2)."""

    exit_code = 2


class DataError(ConfigError):
    """A dataset that cannot be had or cannot be read (exit 2)."""


class RunError(ReasonError):
    """The run itself failed (exit 1)."""


class DamagedRun(RunError):
    """A file of a run folder that cannot be read as what it has to be (exit 1).

    Args:
        run: the folder's name. file: the file's name in it.
        what: what is wrong with it, after "is" or "has" or the like: "is not valid JSON".
        mend: a whole sentence that says what to do about it.
    """

    def __init__(self, run: str, file: str, what: str, mend: str):
        super().__init__(f"{run} is damaged: {file} {what}.", mend)
        self.run, self.file, self.what, self.mend = run, file, what, mend

    def __reduce__(self):
        return (type(self), (self.run, self.file, self.what, self.mend))


class SweepError(ReasonError):
    """Some trials of a sweep failed (exit 3)."""

    exit_code = 3


class MissingExtra(ReasonError):
    """An optional dependency is absent (exit 4)."""

    exit_code = 4

    def __init__(self, message: str, extra: str = ""):
        hint = f"Install it with: python -m pip install 'reason-lab[{extra}]'" if extra else ""
        super().__init__(message, hint)
        self.extra = extra

    def __reduce__(self):
        return (type(self), (self.message, self.extra))


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
FREE_SPACE = "Free some disk space"


@contextmanager
def writing(what: str, hint: str = f"{FREE_SPACE}, then issue the command again.") -> Iterator[None]:
    """Within, a disk that is full (or may not be written) is a RunError: "``what`` cannot be written"."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        named = f" ({error.filename})" if error.filename else ""
        raise RunError(f"{what} cannot be written: {error.strerror}{named}.", hint) from error


def nearest(name: str, choices: Iterable[str]) -> str:
    """The choice closest to ``name``, or ''."""
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return found[0] if found else ""


def unknown(kind: str, name: str, choices: Iterable[str]) -> ConfigError:
    """The error for a name that is not among ``choices``, with the nearest one."""
    choices = sorted(choices)
    if not choices:
        return ConfigError(f"Unknown {kind} {name!r}.", "None is available.")
    close = nearest(name, choices)
    hint = f"Did you mean {close!r}?" if close else ""
    listed = ", ".join(choices[:20]) + (", ..." if len(choices) > 20 else ".")
    return ConfigError(f"Unknown {kind} {name!r}.", f"{hint} Available: {listed}".strip())
