"""Deleting run folders: which may go, and how. What is not surely a run of ours is never deleted."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from reason.errors import ConfigError, DamagedRun, RunError, nearest
from reason.tracking.folder import LEFTOVER_S, RunFolder
from reason.tracking.mirror import forget


def deletable(name: str, root: Path | str) -> RunFolder:
    """The run that ``name`` means to delete: its full name under ``root``, or the path of its folder.

    A folder whose run.json is damaged or missing goes by its full name only, and only if it otherwise
    looks as we make run folders.

    Raises:
        ConfigError: the name is no full name and no path of a run. RunError: it may just be starting.
    """
    if Path(name).name in ("", "..") or not name.strip():  # Path(".").name is empty too
        raise ConfigError(
            f"{name!r} is not the name of a run. Give the full name of a run, or the path of its folder.",
            "`reason list runs` lists the names.",
        )
    under = Path(root) / name
    by_name = Path(name).name == name and (under.is_dir() or under.is_symlink())
    folder = RunFolder(under if by_name else Path(name))
    try:
        _ = folder.identity
        return folder
    except DamagedRun as error:
        if by_name and folder.looks_ours:
            if error.what == "is missing" and time.time() - folder.path.stat().st_mtime < LEFTOVER_S:
                raise RunError(
                    f"{name} has no run.json yet; it may just be starting.", "Try again in a minute."
                ) from None
            return folder
        if folder.path.is_dir():
            raise ConfigError(
                f"{folder.path} is not deleted, because it is not a valid run: {error.file} {error.what}.",
                "Delete a damaged run by its full name, as shown by `reason list runs`.",
            ) from None
    names = [run.name for run in [*RunFolder.all(root), *RunFolder.leftovers(root)]]
    longer = [n for n in names if n.startswith(name)]
    close = longer[:8] or [n for n in [nearest(name, names)] if n]
    raise ConfigError(
        f"There is no run {name!r} under {root}. To delete a run, give its full name.",
        f"Did you mean {' or '.join(close)}?" if close else "`reason list runs` lists the names.",
    )


def check_unused(folders: Sequence[RunFolder]) -> None:
    """Refuse to delete ``folders`` while runs that stay use a model of theirs.

    Raises:
        ConfigError: it names those runs.
    """
    gone = {folder.path.absolute() for folder in folders}
    for folder in folders:
        users = [
            run.name
            for run in RunFolder.scan(folder.path.parent, lambda r, f=folder: r["trained_by"] == f.name)[0]
            if run.path.absolute() not in gone
        ]
        if users:
            more = f" and {len(users) - 3} more" if len(users) > 3 else ""
            raise ConfigError(
                f"The model of {folder.name} is used by {', '.join(users[:3])}{more}.",
                "Delete them too, in the same command.",
            )


@contextlib.contextmanager
def held(folders: Sequence[RunFolder]) -> Iterator[None]:
    """Hold the locks of all ``folders``, so that none of them is executed meanwhile.

    Raises:
        RunError: one is being executed, or is gone.
    """
    with contextlib.ExitStack() as locks:
        for folder in folders:
            if not folder.path.is_symlink():
                locks.enter_context(folder.lock())
        yield


def delete(folder: RunFolder) -> None:
    """Delete a folder that is ``held``, and mark its MLflow run deleted. Of a link, the link alone.

    Raises:
        RunError: something in it cannot be deleted.
    """
    try:
        if folder.path.is_symlink():
            folder.path.unlink()
            return
        forget(folder)
        # What tells us that it is a run goes last, so that a deletion that was killed can be repeated.
        last = ("rows", "checkpoints", "run.json", "lock")
        inside = sorted(folder.path.iterdir(), key=lambda p: last.index(p.name) if p.name in last else -1)
        for path in inside:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        folder.path.rmdir()
    except OSError as error:
        raise RunError(
            f"{folder.name} cannot be deleted: {error.strerror or error} ({error.filename}).",
            "Make its folder writable, then repeat the command.",
        ) from error
