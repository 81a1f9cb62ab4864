"""Sweeps under faults without end: no trial lost, none done twice, no process left, the store whole, the hours right.

A story is a sweep that is disturbed again and again, in a folder of its own, then brought to its end and held
against the same sweep undisturbed. An attempt is a process of its own that runs ``reason sweep`` or ``reason resume``; most
are forked off a server that has imported everything, some begin cold, as a command does. What happens to them:

- SIGKILL, SIGTERM, SIGINT or two SIGINT at a moment of ``soak_process.MOMENTS`` or after a while; SIGKILL to one of two ranks
- MLflow's database locked, read-only, deleted with -wal and -shm left, overwritten; a server that accepts and says nothing
- a full disk: a tmpfs with some KiB left or, where none can be mounted, a limit on the size of files
- the time of day set forward and back while a run goes on. Only ``time.time`` is, not the times of files
- files of single runs torn, emptied or made null between two attempts

Everything is drawn from one seed and printed, so that a failure can be replayed:

    SOAK_TRIALS  how many trials, at least (50)          SOAK_SEED  what faults are drawn from (0)
    SOAK_STORY   the number of a story: that one alone

Hours are held against an observer that reads /proc/locks, so the test is for Linux. It knows when a run was
locked and let go, when its result appeared, and when it was signalled. A killed attempt counts up to its last beat.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import soak_process
from command import timeless

from reason.errors import DamagedRun
from reason.tracking.describe import Description, thinned
from reason.tracking.folder import INTERRUPTED, RunFolder
from reason.tracking.result import to_json

TRIALS, SEED, ONLY = (
    int(os.environ.get(f"SOAK_{k}", v)) for k, v in (("TRIALS", 50), ("SEED", 0), ("STORY", -1))
)
MARK = f"SOAK_MARK={os.getpid()}"
LONG_S = 240.0  # a process that lives longer than this hangs
POLL_S = 0.01
BEAT_S = 1.0  # between two signs of life of a run

KILL, TERM, INT = int(signal.SIGKILL), int(signal.SIGTERM), int(signal.SIGINT)
SIGNALS = [[KILL], [TERM], [INT], [KILL], [INT, INT]]
STORES = ["locked", "read-only", "deleted", "overwritten", "mute", "deleted while open"]
FILES = [
    "result.json", "run.json", "config.yaml", "origin.json", "env.json", "calibration.json", "mlflow.json", "alive",
    "events.jsonl", "metrics.jsonl", "checkpoints",
]  # fmt: skip
STEPS = [3600.0, -7200.0, 86400.0, -30.0, 0.0, -400 * 86400.0]  # seconds that the clock is off


@dataclass
class Attempt:
    """One process and what happens to it."""

    how: str = "sweep"  # or "resume"
    cold: bool = False
    moment: str = ""  # of ``soak_process.MOMENTS``
    nth: int = 1
    after: float = 0.0  # seconds until it is signalled from outside, if no moment is named
    signals: list[int] = field(default_factory=list)
    target: str = "parent"  # or "rank"
    store: str = ""
    full_kib: int = 0  # what is left on the disk
    steps: bool = False  # of the clock
    torn: list[tuple[str, str, float]] = field(default_factory=list)  # before it: file, content, which run


@dataclass
class Story:
    number: int
    plan: str
    attempts: list[Attempt]
    on_tmpfs: bool = False
    root: Path = Path()
    signalled: dict[int, float] = field(default_factory=dict)  # pid -> when, by time.monotonic()
    removed: dict[str, float] = field(default_factory=dict)  # run -> when; another one may get its name
    problems: list[str] = field(default_factory=list)
    told: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        drawn = [{k: v for k, v in dataclasses.asdict(a).items() if v} for a in self.attempts]
        return (
            f"story {self.number} ({self.plan}{', on a tmpfs' if self.on_tmpfs else ''}): {json.dumps(drawn)}"
        )


def plans(tiny: list[str], tiny_text: list[str]) -> dict[str, list[str]]:
    """Sweeps by name: six trials of two and of three models; two on two ranks."""
    latent = ["latent", *tiny, "train.epochs=6", "train.patience=0", "train.every=3"]
    return {
        "latent": [*latent, "depth=0,1,2", "seed=0,1"],
        "mor": ["mor", *tiny_text, "train.every=3", "depth=1,2", "seed=0,1,2"],
        "ranks": [*latent, "train.epochs=30", "hardware.gpus=2", "depth=0,1"],
    }


def stories(seed: int, trials: int) -> Iterator[Story]:
    """Stories of so many trials together. Each kind of fault is dealt before any comes again."""
    rng = random.Random(seed)

    def deck(cards: list[Any]) -> Callable[[], Any]:
        left: deque[Any] = deque()

        def draw() -> Any:
            if not left:
                left.extend(rng.sample(cards, len(cards)))
            return left.popleft()

        return draw

    moment, signals, store = deck(list(soak_process.MOMENTS)), deck(SIGNALS), deck(STORES)
    file, content = deck(FILES), deck(["torn", "empty", "null"])
    for number in itertools.count():
        if trials <= 0:
            return
        if number % 9 == 0:
            attempts = [
                Attempt(after=rng.uniform(0, 1), signals=[KILL]),
                Attempt(after=rng.uniform(0, 1), signals=[KILL], target="rank"),
            ]
            yield Story(number, "ranks", attempts[:: rng.choice([1, -1])])
            trials -= 2
            continue
        attempts = []
        for _ in range(3):
            a = Attempt(how=rng.choice(["sweep", "resume"]), signals=signals())
            if rng.random() < 0.12:
                a.cold, a.after = True, rng.uniform(0.1, 8)
            elif rng.random() < 0.15:
                a.after = rng.uniform(0, 4)
            else:
                a.moment = moment()
                a.nth = 1 if a.moment in soak_process.ONCE else rng.choice([1, 2, 3, 4, 5])
            attempts.append(a)
        for a in attempts[1:]:
            a.torn = [(file(), content(), rng.random()) for _ in range(rng.choice([1, 2]))]
        if number % 9 != 5:
            a = rng.choice(attempts)
            a.store = store()
            if a.store == "mute":  # each run would wait ten seconds for it
                a.moment, a.after = "", a.after or rng.uniform(1, 6)
        if number % 9 in (2, 5, 8):
            a = rng.choice([a for a in attempts if not a.cold])
            a.full_kib, a.signals = rng.choice([4, 40, 150, 400]), []
            a.moment, a.nth, a.after = "", 1, 0.0
        if number % 9 in (3, 7):
            for a in attempts:
                a.steps = not a.cold
        yield Story(number, "latent" if number % 2 else "mor", attempts, on_tmpfs=number % 9 in (2, 8))
        trials -= 6


# --- an attempt, and what happens to it -------------------------------------------------------------


class Forked:
    """A process off the server; its output lies in files."""

    def __init__(self, words: list[str], root: Path, said: Path, fault: dict[str, Any]):
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(target=soak_process.run, args=(words, str(root), str(said), fault))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def wait(self, seconds: float) -> int | None:
        self._process.join(seconds)
        return self._process.exitcode


class Cold:
    """A process that begins with nothing, as that of a command does."""

    def __init__(self, words: list[str], root: Path, said: Path, fault: dict[str, Any]):
        code = "from reason.cli.app import main; main()"
        with open(f"{said}.out", "w") as out, open(f"{said}.err", "w") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, *words], cwd=root, env={**os.environ, **fault["environment"]},
                stdout=out, stderr=err, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip
        self.pid = self._process.pid

    def wait(self, seconds: float) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(seconds)
        return None


def attempt(story: Story, a: Attempt, words: list[str]) -> int:
    """Make it; returns the exit code."""
    number = len(list(story.root.parent.glob(f"{story.root.name}-said-*.err")))
    said = story.root.with_name(f"{story.root.name}-said-{number}")
    fault: dict[str, Any] = {"environment": {}}
    with contextlib.ExitStack() as during:
        if a.store:
            fault |= during.enter_context(ill_store(story, a.store))
        if a.full_kib and story.on_tmpfs:
            during.enter_context(full_disk(story.root, a.full_kib))
        elif a.full_kib:
            fault["file_limit"] = a.full_kib * 1024
        if a.steps:
            fault["clock"] = str(during.enter_context(stepping_clock(said)))
        if a.moment:
            fault |= {"moment": a.moment, "nth": a.nth, "signals": a.signals}
        process = (Cold if a.cold else Forked)(words, story.root, said, fault)
        if a.signals and not a.moment:
            _signal_from_outside(story, a, process)
        code = process.wait(LONG_S)
        if code is None:
            os.kill(process.pid, KILL)
            process.wait(10)
            story.problems.append(f"attempt {number} hung: {_tail(said)}")
        with contextlib.suppress(FileNotFoundError, ValueError):
            story.signalled[process.pid] = float(Path(f"{said}.signal").read_text())
    if "Traceback" in Path(f"{said}.err").read_text(errors="replace"):
        story.problems.append(f"attempt {number} ({words[0]}) printed a traceback: {_tail(said, 12)}")
    story.told["attempts"] += 1
    story.told["signalled"] += process.pid in story.signalled
    story.told[f"exit {code}"] += 1
    return -KILL if code is None else code


def _signal_from_outside(story: Story, a: Attempt, process: Forked | Cold) -> None:
    pid = process.pid
    if story.plan == "ranks":  # the ranks train: a checkpoint of this attempt is there
        seen = set(story.root.glob("runs/*/checkpoints/step-*"))
        while process.wait(0.05) is None and set(story.root.glob("runs/*/checkpoints/step-*")) <= seen:
            pass
    if process.wait(a.after) is not None:
        return
    with contextlib.suppress(ProcessLookupError, IndexError):
        if a.target == "rank":
            pid = random.Random(a.after).choice(_ranks(pid))
        story.signalled[process.pid] = time.monotonic()
        for number in a.signals:
            os.kill(pid, number)


def _ranks(parent: int) -> list[int]:
    children = map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
    return sorted(p for p in children if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes())


def _tail(said: Path, lines: int = 6) -> str:
    return " | ".join(Path(f"{said}.err").read_text(errors="replace").splitlines()[-lines:])


@contextlib.contextmanager
def ill_store(story: Story, kind: str) -> Iterator[dict[str, Any]]:
    """MLflow's store in a bad state, for one attempt; what its process has to know of it."""
    db = story.root / "mlflow.db"
    rng = random.Random(f"{SEED} {story.number} {kind}")
    if kind == "mute":
        with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
            yield {"environment": {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{server.getsockname()[1]}"}}
    elif kind == "read-only":
        db.chmod(0o444)
        yield {"obey": True}
        if db.exists():
            db.chmod(0o600)
    elif kind == "locked":
        with contextlib.closing(sqlite3.connect(db, check_same_thread=False, isolation_level=None)) as other:
            with contextlib.suppress(sqlite3.DatabaseError):  # overwritten before
                other.execute("BEGIN IMMEDIATE")
            free = threading.Timer(
                rng.uniform(1, 5), lambda: other.in_transaction and other.execute("ROLLBACK")
            )
            free.start()
            yield {}
            free.join()
    elif kind == "overwritten":
        where, junk = rng.choice([0, 4096 * rng.randrange(1, 60)]), rng.randbytes(4096)
        with contextlib.suppress(FileNotFoundError), open(db, "r+b") as f:
            f.seek(where)
            f.write(junk)
        yield {}
    elif kind == "deleted":
        _delete_but_for_what_is_beside(db)
        yield {}
    else:
        later = threading.Timer(rng.uniform(0.5, 5), _delete_but_for_what_is_beside, (db,))
        later.start()
        yield {}
        later.join()


def _delete_but_for_what_is_beside(db: Path) -> None:
    with contextlib.suppress(sqlite3.DatabaseError):
        with contextlib.closing(sqlite3.connect(db)) as other:
            other.execute("CREATE TABLE IF NOT EXISTS soak (x)")
            other.commit()
            beside = {p: p.read_bytes() for p in (Path(f"{db}-wal"), Path(f"{db}-shm")) if p.exists()}
            db.unlink()
        for path, content in beside.items():
            path.write_bytes(content)
    db.unlink(missing_ok=True)


@contextlib.contextmanager
def full_disk(root: Path, kib: int) -> Iterator[None]:
    """A file takes all but ``kib`` KiB of the tmpfs."""
    disk = os.statvfs(root)
    ballast = root / "ballast"
    with open(ballast, "wb") as f:
        os.posix_fallocate(f.fileno(), 0, max(disk.f_bavail * disk.f_bsize - kib * 1024, 4096))
    yield
    ballast.unlink()


@contextlib.contextmanager
def stepping_clock(said: Path) -> Iterator[Path]:
    """A file with the seconds that the time of day is off, which change a few times a second."""
    path, stop = Path(f"{said}.clock"), threading.Event()
    path.write_bytes(struct.pack("d", 0.0))

    def step() -> None:
        with open(path, "r+b", buffering=0) as f:
            for off in itertools.cycle(STEPS):
                if stop.wait(0.3):
                    return
                f.seek(0)
                f.write(struct.pack("d", off))

    thread = threading.Thread(target=step)
    thread.start()
    yield path
    stop.set()
    thread.join()


def tear(story: Story, file: str, content: str, which: float) -> None:
    """Damage a file of one run."""
    if file == "alive" and any(a.steps for a in story.attempts):
        return  # then only the time of day could say when an attempt ended
    paths = sorted(story.root.glob(f"runs/*/{file}"))
    runs = [p for p in paths if (p.parent / "config.yaml").exists() and "-sweep-" not in p.parent.name]
    if not runs:
        return
    path = runs[int(which * len(runs))]
    if file == "checkpoints":  # the last of two, as a copy that broke off
        steps = sorted(path.glob("step-*"), key=lambda p: int(p.name.split("-")[1]))
        if len(steps) < 2:
            return
        path = steps[-1] / ["state.json", "model.safetensors", "optimizer.safetensors"][int(which * 3)]
    data = path.read_bytes()
    if file.endswith(".jsonl"):  # what is noted there cannot be known again: only its end is torn
        path.write_bytes(data + {"torn": data[: len(data) % 37], "empty": b"", "null": b"\0" * 64}[content])
    else:
        path.write_bytes({"torn": data[: len(data) // 2], "empty": b"", "null": b"null"}[content])
    story.told["torn files"] += 1


# --- to the end -------------------------------------------------------------------------------------


def undisturbed(words: list[str], root: Path, template: Path) -> dict[str, Any]:
    """The results of a sweep to which nothing happens, by config_hash."""
    story = Story(-1, "", [], root=root)
    _new_folder(story, template)
    assert attempt(story, Attempt(), ["sweep", *words]) == 0, story.problems
    return {
        r.config_hash: timeless(to_json(r))
        for r in (f.result for f in RunFolder.scan(root / "runs")[0] if f.identity["kind"] == "run")
        if r
    }


def _new_folder(story: Story, template: Path) -> None:
    story.root.mkdir(parents=True)
    if story.on_tmpfs:
        mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", story.root]
        story.on_tmpfs = (
            bool(shutil.which("mount")) and subprocess.run(mount, capture_output=True).returncode == 0
        )
    shutil.copy(template, story.root / "mlflow.db")


def live(story: Story, words: list[str], template: Path) -> None:
    """A story from its beginning to its last sync."""
    _new_folder(story, template)
    for a in story.attempts:
        for torn in a.torn:
            tear(story, *torn)
        attempt(story, a, _command(story, a.how, words))
    for _ in range(2):  # the second time for what was damaged when the first one found it
        mend(story)
    last = Attempt(how=random.Random(f"{SEED} {story.number}").choice(["sweep", "resume"]))
    if code := attempt(story, last, _command(story, last.how, words)):
        story.problems.append(f"the last attempt ended with {code}: {_last_words(story)}")
    code = attempt(story, Attempt(), ["sync"])
    ill = {a.store for a in story.attempts} & {"overwritten", "deleted", "deleted while open"}
    if ill and (code or _integrity(story) != "ok"):
        story.told["stores rebuilt"] += 1
        code = attempt(story, Attempt(), ["sync", "--rebuild"])
    if code:
        story.problems.append(f"sync ended with {code}: {_last_words(story)}")


def _command(story: Story, how: str, words: list[str]) -> list[str]:
    sweeps = [r for r in RunFolder.scan(story.root / "runs")[0] if r.identity["kind"] == "sweep"]
    return ["resume", sweeps[0].name] if how == "resume" and sweeps else ["sweep", *words]


def _last_words(story: Story) -> str:
    said = max(
        story.root.parent.glob(f"{story.root.name}-said-*.err"), key=lambda p: int(p.stem.split("-")[-1])
    )
    return _tail(said.with_suffix(""))


def mend(story: Story) -> None:
    """Do with each damaged run what it says is to be done."""
    gone = set()
    for run in RunFolder.all(story.root / "runs"):
        if (problem := run.problem) is None:
            continue
        story.told["mended"] += 1
        if problem.mend.startswith("Delete the file"):
            (run / problem.file).unlink()
        else:
            gone.add(run.name)
    if not gone:
        return
    gone |= {r.name for r in RunFolder.scan(story.root / "runs")[0] if r.identity["trained_by"] in gone}
    code = attempt(story, Attempt(), ["rm", "-y", *sorted(gone)])
    story.removed |= dict.fromkeys(gone, time.monotonic())
    if code:
        story.problems.append(f"rm: {_last_words(story)}")


def _integrity(story: Story) -> str:
    try:
        with contextlib.closing(sqlite3.connect(story.root / "mlflow.db")) as db:
            return db.execute("PRAGMA integrity_check").fetchone()[0]
    except sqlite3.DatabaseError as error:
        return str(error)


def judge(story: Story, expected: dict[str, Any], observer: Observer) -> None:
    """Nothing lost, nothing twice, the numbers of the undisturbed sweep, the store the same, the hours right."""
    sound, damaged = RunFolder.scan(story.root / "runs")
    bad = story.problems
    bad += [f"still damaged: {d}" for d in damaged]
    finished: dict[str, list[RunFolder]] = {h: [] for h in expected}
    for run in (r for r in sound if r.identity["kind"] == "run"):
        with contextlib.suppress(DamagedRun):
            if run.result is not None:
                finished.setdefault(run.identity["config_hash"], []).append(run)
    for config_hash, runs in finished.items():
        if len(runs) != 1 or config_hash not in expected:
            bad.append(f"{config_hash[:8]} was to have one result and has {[r.name for r in runs]}")
            continue
        (run,) = runs
        result = run.result
        assert result is not None
        owner = RunFolder(run.path.parent / run.identity["trained_by"]) if run.identity["trained_by"] else run
        training = owner.result.training if owner.result else None
        if training and training.notes:  # a checkpoint that a full disk cost
            story.told["results beside lost checkpoints"] += 1
        elif timeless(to_json(result)) != expected[config_hash]:
            bad.append(
                f"{run.name} has other numbers: {_differences(timeless(to_json(result)), expected[config_hash])}"
            )
        low, high, error, attempts = observer.held(run, story)
        told = result.metrics["device_hours"] * 3600 / result.world_size
        story.told["ms told"] += round(told * 1000)
        story.told["ms held"] += round(high * 1000)
        if not low * 0.95 - error <= told <= high * 1.05 + error:
            bad.append(
                f"{run.name} tells {told:.3f} s and was held {low:.3f}-{high:.3f} s (± {error:.3f}) in {attempts} attempts"
            )
    story.told["trials"] += len(expected)
    bad += _of_the_store(story, sound)


def _of_the_store(story: Story, runs: list[RunFolder]) -> list[str]:
    if (whole := _integrity(story)) != "ok":
        return [f"the store is not whole: {whole}"]
    bad = []
    with contextlib.closing(sqlite3.connect(story.root / "mlflow.db")) as db:
        rows = db.execute(
            "SELECT name, status, run_uuid FROM runs WHERE lifecycle_stage = 'active'"
        ).fetchall()
        names = Counter(name for name, *_ in rows)
        if twice := {n: k for n, k in names.items() if k > 1}:
            bad.append(f"in MLflow more than once: {twice}")
        if other := names.keys() ^ {r.name for r in runs}:
            bad.append(f"only in MLflow or only in the folder: {sorted(other)}")
        ids = {name: (status, id_) for name, status, id_ in rows}
        for run in (r for r in runs if r.name in ids):
            status, id_ = ids[run.name]
            if status != ("KILLED" if run.status == INTERRUPTED else run.status.upper()):
                bad.append(f"{run.name} is {run.status}, and {status} in MLflow")
            latest = dict(db.execute("SELECT key, value FROM latest_metrics WHERE run_uuid = ?", (id_,)))
            wrong = {
                k: (v, latest.get(k)) for k, v in Description(run).metrics().items() if latest.get(k) != v
            }
            if wrong:
                bad.append(f"{run.name} has other numbers in MLflow: {wrong}")
            points = {(p.name, p.step) for p in thinned(run.points()[0])}
            there = set(db.execute("SELECT key, step FROM metrics WHERE run_uuid = ?", (id_,)))
            if not any(a.steps for a in story.attempts) and (lost := points - there):
                bad.append(f"{run.name} lacks points in MLflow: {sorted(lost)[:4]}")
    return bad


def _differences(one: Any, other: Any, path: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        return [d for k in {**one, **other} for d in _differences(one.get(k), other.get(k), f"{path}.{k}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [
            d
            for i, (a, b) in enumerate(zip(one, other, strict=True))
            for d in _differences(a, b, f"{path}.{i}")
        ]
    return [] if one == other else [f"{path}: {one} != {other}"]


# --- who looks on -----------------------------------------------------------------------------------


@dataclass
class Hold:
    """A lock that a process held, by time.monotonic()."""

    run: Path
    pid: int
    start: float
    before: int | None  # which result.json was there
    beaten: int | None
    end: float = 0.0
    result: float | None = None  # when another one appeared
    beat: float = 0.0  # when ``alive`` last changed
    gap: float = 0.0  # the longest that nobody looked


class Observer(threading.Thread):
    """Sees from outside who holds which run, without touching a lock."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.over: list[Hold] = []
        self._on: dict[tuple[int, str], Hold | None] = {}
        self._stop_ = threading.Event()

    def run(self) -> None:
        last = time.monotonic()
        while not self._stop_.wait(POLL_S):
            now = time.monotonic()
            self._look(now, now - last)
            last = now

    def close(self) -> None:
        self._stop_.set()
        self.join()

    def _look(self, now: float, gap: float) -> None:
        lines = (line.split() for line in Path("/proc/locks").read_text().splitlines())
        held = {(int(w[4]), w[5]) for w in lines if w[1] == "FLOCK" and w[3] == "WRITE"}
        for key in self._on.keys() - held:
            if hold := self._on.pop(key):
                self._see(hold, now, gap)
                hold.end = now
                self.over.append(hold)
        for key in held - self._on.keys():
            path = _locked_file(*key)
            hold = None
            if path is not None and path.name == "lock" and path.parent.parent.name == "runs":
                run = path.parent
                hold = Hold(run, key[0], now, _stamp(run / "result.json"), _stamp(run / "alive"), beat=now)
            self._on[key] = hold
        for hold in filter(None, self._on.values()):
            self._see(hold, now, gap)

    def _see(self, hold: Hold, now: float, gap: float) -> None:
        hold.gap = max(hold.gap, gap)
        if hold.result is None and (stamp := _stamp(hold.run / "result.json")) not in (None, hold.before):
            hold.result = now
        if (stamp := _stamp(hold.run / "alive")) != hold.beaten:
            hold.beaten, hold.beat = stamp, now

    def held(self, run: RunFolder, story: Story) -> tuple[float, float, float, int]:
        """Seconds that a run was held: at least, at most, the error of looking; and in how many attempts."""
        low = high = error = 0.0
        since = story.removed.get(run.name, 0.0)
        holds = [
            h for h in self.over if h.run == run.path and h.start > since and h.end - h.start > 2 * POLL_S
        ]
        for h in holds:
            end = h.result or h.end
            least = h.result or min(max(h.beat, h.start), end)
            if (at := story.signalled.get(h.pid)) and h.start < at < end:
                least = max(least - BEAT_S, min(least, at))
            low, high, error = low + max(least - h.start, 0), high + end - h.start, error + 2 * h.gap + 0.1
        return low, high, error, len(holds)


def _locked_file(pid: int, where: str) -> Path | None:
    inode = int(where.split(":")[2])
    with contextlib.suppress(OSError):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if fd.stat().st_ino == inode:
                    return fd.readlink()
    return None


def _stamp(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def alive() -> set[int]:
    """Processes that were started from here, whatever became of who started them."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if MARK.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.add(int(folder.name))
    return found


# --- all of it --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/locks").exists(), reason="needs Linux, to see who holds a lock")
def test_sweeps_survive_whatever_happens(tmp_path, template, tiny, tiny_text, monkeypatch):
    name, _, value = MARK.partition("=")
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")  # the server imports it without us
    multiprocessing.get_context("forkserver").set_forkserver_preload(soak_process.PRELOAD)
    words, begun = plans(tiny, tiny_text), time.monotonic()
    told = [s for s in stories(SEED, TRIALS) if ONLY in (-1, s.number)]
    for story in told:
        story.root = tmp_path / f"story{story.number}"
        print(story)
    first = Forked(["--version"], tmp_path, tmp_path / "first", {})
    assert first.wait(60) == 0
    servers = alive()
    observer = Observer()
    observer.start()
    try:
        with ThreadPoolExecutor(2) as two:
            used = sorted({s.plan for s in told}, reverse=True)
            found = two.map(lambda plan: undisturbed(words[plan], tmp_path / plan, template), used)
            expected = dict(zip(used, found, strict=True))
            for done in [two.submit(live, s, words[s.plan], template) for s in told]:
                done.result()
        observer.close()
        for story in told:
            judge(story, expected[story.plan], observer)
        end = time.monotonic() + 30
        while (left := alive() - servers) and time.monotonic() < end:
            time.sleep(0.2)
    finally:
        for story in told:
            if story.on_tmpfs:
                subprocess.run(["umount", "-l", story.root], check=False)
    sums: Counter[str] = functools.reduce(lambda a, b: a + b, (s.told for s in told))
    print(f"{time.monotonic() - begun:.0f} s:", ", ".join(f"{n} {what}" for what, n in sorted(sums.items())))
    problems = [f"story {s.number}: {p}" for s in told for p in s.problems]
    assert not problems, f"SOAK_SEED={SEED}\n" + "\n".join(problems)
    assert not left, f"processes left: {left}"
    assert ONLY >= 0 or sums["signalled"] >= 2 * len(told), "too few of the faults happened"
