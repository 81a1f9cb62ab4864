"""A sweep: a resumable plan of runs, kept as a folder and shown in MLflow as a parent of its trials.

Trials that differ only in depth or evaluation keys share one trained model: the deepest of them
trains, the others carry ``trained_by``. A trial that another process is executing is waited for. The
plan is a function of the command, so issuing the command again finds the same sweep and finishes what
is missing.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from reason.engine.config import resolve, restore
from reason.engine.cost import lineage
from reason.engine.launcher import Terminated, signals
from reason.engine.layers import flatten, sweeps
from reason.engine.plan import Plan
from reason.engine.progress import say
from reason.engine.runner import close, resume, run
from reason.errors import FREE_SPACE, ConfigError, DamagedRun, ReasonError, RunError, SweepError, writing
from reason.files import atomic, write_json
from reason.tracking import provenance
from reason.tracking.folder import FAILED, FINISHED, INTERRUPTED, KILLED, RUNNING, RunFolder
from reason.tracking.mirror import Mirror
from reason.tracking.result import Result, SweepResult, SweepTrial

WAIT_S = 0.5  # between two looks at a run that another process executes


@dataclass
class Trial:
    """One run of a sweep: what varies, its plan, its hashes, and the run folder once it has one."""

    varied: dict[str, str]
    plan: Plan
    train_hash: str
    config_hash: str
    run: str | None = None
    problem: str = ""


@dataclass
class SweepPlan:
    """A whole sweep before anything is executed. ``trials`` stand in the order of execution."""

    name: str
    trials: list[Trial]

    @property
    def trainings(self) -> int:
        """Models that the trials need, those not counted that they begin with."""
        return len({t.train_hash for t in self.trials if t.plan.trains})

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([t.config_hash for t in self.trials]).encode()).hexdigest()


def axes(overrides: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Cut words into what varies (``depth=0,1,2``, ``seed=0..2``) and what is fixed (the rest).

    A value with a comma varies; ``a..b`` is every whole number from a to b. Brackets keep a comma
    from varying (``key=[a,b]`` is the one value ``a,b``).
    """
    vary: dict[str, list[str]] = {}
    fixed = []
    for word in overrides:
        key, equals, value = word.partition("=")
        values = expand(value) if equals else []
        if len(values) > 1:
            vary[key.strip()] = values
        else:
            fixed.append(f"{key}={values[0]}" if values else word)
    return vary, fixed


def expand(value: str) -> list[str]:
    """``0,1,2`` -> three values; ``0..2`` -> the same; anything else -> itself."""
    if value.startswith("[") and value.endswith("]"):
        return [value[1:-1]]
    found: list[str] = []
    for part in re.split(r",(?![^{}]*\})", value):  # not at a comma inside ${...}
        low, dots, high = part.partition("..")
        if dots and low.strip().lstrip("-").isdigit() and high.strip().lstrip("-").isdigit():
            if int(high) < int(low):
                raise ConfigError(
                    f"The range {part!r} is empty: its end is below its start.", f"Write {high}..{low}."
                )
            found += [str(i) for i in range(int(low), int(high) + 1)]
        else:
            found.append(part.strip())
    if any(not v for v in found) and len(found) > 1:
        raise ConfigError(f"{value!r} contains an empty value.", "Remove the stray comma.")
    if twice := sorted({v for v in found if found.count(v) > 1}):
        raise ConfigError(f"{value!r} contains {', '.join(twice)} twice.", "Give each value once.")
    return found


def plan_sweep(
    name: str, overrides: Sequence[str] = (), *, files: Sequence[Path] = (), flags: Mapping[str, Any] | None = None,
    digests_of: Callable[[Plan], tuple[str, Mapping[str, str]]] | None = None,
) -> SweepPlan:  # fmt: skip
    """Resolve every trial of a grid. ``name`` is a sweep of an experiments file, an experiment or a method.

    train_depth defaults to the largest depth of the sweep, so that one model serves them all. Without
    ``digests_of`` (data and sources) nothing is read, and what a path holds is taken to be its own.
    """
    named = sweeps().get(name, {})
    base = str(named.get("run") or name)
    fixed = [f"{k}={v}" for k, v in (named.get("set") or {}).items()]
    vary = {
        key: [str(v) for v in values] if isinstance(values, list) else expand(str(values))
        for key, values in (named.get("vary") or {}).items()
    }
    varied_here, also_fixed = axes(overrides)
    for word in also_fixed:  # a fixed value on the command line replaces a varied one of the file
        vary.pop(word.partition("=")[0].strip(), None)
    vary |= varied_here
    fixed += also_fixed
    if not vary:
        raise ConfigError(
            "No key is varied in this sweep.",
            f"Give several values, e.g.: reason sweep {name} depth=0,1,2 seed=0..2",
        )
    for key in (k for k, v in (flags or {}).items() if v is not None and k in vary):
        if key in varied_here:
            raise ConfigError(f"{key} is varied and also set by a flag.", "Remove one of the two.")
        del vary[key]
    if "runs" in vary:
        raise ConfigError("All trials of a sweep share one runs folder.", "Give one path: runs=PATH")
    defaults: dict[str, Any] = {"eval.curve": "false"}
    if "depth" in vary:
        defaults["train_depth"] = str(max(_whole(v, "depth") for v in vary["depth"]))
    trials = []
    for values in itertools.product(*vary.values()):
        varied = dict(zip(vary, values, strict=True))
        words = [*fixed, *(f"{k}={v}" for k, v in varied.items())]
        plan = resolve(base, words, files=files, flags=flags, defaults=defaults)
        trials.append(Trial(varied, plan, *plan.hashes(*(digests_of or _where)(plan))))
    # The deepest trial of each model comes first: it trains. Python's sort keeps the rest in order.
    first = {t.train_hash: i for i, t in reversed(list(enumerate(trials)))}
    trials.sort(key=lambda t: (first[t.train_hash], -t.plan.config.depth))
    return SweepPlan(name, trials)


def _where(plan: Plan) -> tuple[str, Mapping[str, str]]:
    data = {k: v for k, v in plan.flat.items() if k.startswith("dataset.")}
    return json.dumps(data, sort_keys=True), plan.sources


def _whole(value: str, key: str) -> int:
    try:
        return int(value)
    except ValueError as error:
        raise ConfigError(f"{key}={value} is not a whole number.", f"For example: {key}=0,1,2") from error


def sweep(
    name: str, overrides: Sequence[str] = (), *, files: Sequence[Path] = (), flags: Mapping[str, Any] | None = None,
    stop_on_error: bool = False, quiet: bool = False,
) -> RunFolder:  # fmt: skip
    """Execute a sweep, or finish the one that this same command started earlier.

    Raises:
        SweepError: some trials failed (the others are done).
    """
    from reason.engine.session import load_dataset
    from reason.engine.stages import source_digests

    def digests(p: Plan) -> tuple[str, Mapping[str, str]]:
        return load_dataset(p).digest, source_digests(p)

    plan = plan_sweep(name, overrides, files=files, flags=flags, digests_of=digests)
    root = Path(plan.trials[0].plan.config.runs)
    with writing(f"The folder {root}", f"{FREE_SPACE}, or choose another folder: runs=PATH."):
        root.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(root / ".sweeps.lock"):  # the same command started twice is one sweep
            folder = _same(root, plan) or _make(root, plan, load_dataset(plan.trials[0].plan).digest)
    return _execute(folder, plan, stop_on_error, quiet)


def _same(root: Path, plan: SweepPlan) -> RunFolder | None:
    """The sweep that this same command started earlier."""
    same = ("sweep", plan.name, plan.digest)
    found, _ = RunFolder.scan(root, lambda r: (r["kind"], r["experiment"], r["config_hash"]) == same)
    return found[0] if found else None


def _make(root: Path, plan: SweepPlan, data_digest: str) -> RunFolder:
    folder = RunFolder.create(root, f"{plan.name}-sweep", plan.digest)
    write_json(folder / "env.json", provenance.capture(Path.cwd()))
    write_json(folder / "plan.json", {"name": plan.name, "trials": [_recorded(t) for t in plan.trials]})
    identity = {
        "kind": "sweep", "experiment": plan.name, "method": plan.trials[0].plan.card.name,
        "config_hash": plan.digest, "train_hash": "", "parent": None, "trained_by": None,
        "data_digest": data_digest, "created": time.time(), "argv": ["reason", *sys.argv[1:]],
    }  # fmt: skip
    write_json(folder / "run.json", identity)
    return folder


def resume_sweep(folder: RunFolder, *, stop_on_error: bool = False, quiet: bool = False) -> RunFolder:
    """Finish a sweep from its recorded plan."""
    recorded = folder.plan
    here = {"runs": str(folder.path.parent)}
    trials = [
        Trial(t["varied"], restore(t["experiment"], t["flat"], here), t["train_hash"], t["config_hash"])
        for t in recorded["trials"]
    ]
    return _execute(folder, SweepPlan(recorded["name"], trials), stop_on_error, quiet)


def _recorded(trial: Trial) -> dict[str, Any]:
    return {
        "varied": trial.varied, "experiment": trial.plan.experiment, "flat": trial.plan.flat,
        "train_hash": trial.train_hash, "config_hash": trial.config_hash,
    }  # fmt: skip


def _execute(folder: RunFolder, plan: SweepPlan, stop_on_error: bool, quiet: bool) -> RunFolder:
    from reason.engine.stages import chain

    if folder.status == FINISHED and all(_finished(folder, _runs_of(folder, t)) for t in plan.trials):
        say(f"{folder.name}: all {len(plan.trials)} trials are already finished", quiet)
        return folder
    failures: list[Trial] = []
    untrained: dict[str, str] = {}  # train_hash of a model that could not be trained -> why
    models_of = [[*(stage.train_hash for stage in chain(t.plan)), t.train_hash] for t in plan.trials]
    _say_outdated(folder, plan, quiet)
    fix = f"finish the sweep with: reason resume {folder.path}"
    full = writing(f"The sweep {folder.name}", f"{FREE_SPACE}, then {fix}")
    folder.settle()
    with full, signals(), folder.lock(), Mirror(folder) as mirror:
        folder.event("attempt", device="", devices=0)
        status = KILLED
        try:
            for number, (trial, models) in enumerate(zip(plan.trials, models_of, strict=True), 1):
                label = " ".join(f"{k}={v}" for k, v in trial.varied.items())
                say(f"[{number}/{len(plan.trials)}] {label}", quiet)
                try:
                    if why := next((untrained[m] for m in models if m in untrained), None):
                        raise RunError(f"The model of this trial could not be trained: {why}")
                    with writing("The run of this trial", f"{FREE_SPACE}, then {fix}"):
                        trial.run = _one(folder, trial, quiet).name
                except ReasonError as error:
                    trial.problem = str(error)
                    failures.append(trial)
                    untrained = {m: error.message for m in models if not _trained(folder, m)} | untrained
                    say(f"  failed: {error}", quiet)
                    if stop_on_error:
                        break
            results = _results(folder, plan, quiet)
            failures += [t for t in plan.trials if t.run and t.run not in results]
            status = FAILED if failures else FINISHED
            try:
                _write_table(folder, plan, results)
                if not failures:
                    folder.write_result(_summary(folder, plan, results, quiet))
            except OSError:
                status = FAILED
                if not failures:  # those are the more important news
                    raise
        except (KeyboardInterrupt, Terminated):
            status = KILLED
            raise
        finally:
            close(folder, mirror, status)
    if failures:
        raise SweepError(
            f"{len(failures)} of {len(plan.trials)} trials failed. First error: {failures[0].problem.splitlines()[0]}",
            f"Fix the cause, then {fix}",
        )
    return folder


def _one(folder: RunFolder, trial: Trial, quiet: bool) -> RunFolder:
    """A trial's finished run: found, waited for, resumed or executed now."""
    while True:
        same = _runs_of(folder, trial)
        begun = {
            run: run.status for run in same
        }  # before the results are looked at, one of which may come meanwhile
        if found := _finished(folder, same, quiet):
            say(f"  already finished: {found.name}", quiet)
            return found
        running = next((run for run, status in begun.items() if status == RUNNING), None)
        if running is None:
            break
        say(f"  {running.name} is this trial and running in another process; waiting for its result", quiet)
        while running.status == RUNNING:
            time.sleep(WAIT_S)
        if not (running / "result.json").exists():
            say(f"  {running.name} ended without a result", quiet)
    for child, status in begun.items():
        if status in (INTERRUPTED, KILLED, FAILED) and child.identity["parent"] == folder.name:
            return resume(child, quiet=quiet)
    return run(trial.plan, model=_trained(folder, trial.train_hash), sweep=folder, quiet=quiet)


def _say_outdated(folder: RunFolder, plan: SweepPlan, quiet: bool) -> None:
    """Why a model is trained again that another version of its method has trained: told once."""
    card, wanted = plan.trials[0].plan.card, plan.trials[0].plan
    others, _ = RunFolder.scan(
        folder.path.parent,
        lambda r: r["kind"] == "run" and r["method"] == card.name and r["version"] != card.version,
    )
    for other in others:
        if not wanted.retrains(flatten(other.config)):
            version = other.identity.get("version", "unknown")
            say(
                f"  The model of {other.name} is not reused: it was trained with version {version} of {card.name}, "
                f"and version {card.version} is installed.", quiet,
            )  # fmt: skip
            return


def _runs_of(folder: RunFolder, trial: Trial) -> list[RunFolder]:
    """Every run beside the sweep that is this trial, its own and others."""
    same = ("run", trial.config_hash)
    return RunFolder.scan(folder.path.parent, lambda r: (r["kind"], r["config_hash"]) == same)[0]


def _finished(folder: RunFolder, same: list[RunFolder], quiet: bool = True) -> RunFolder | None:
    """A finished one of the runs of a trial; one of this sweep's own, if there is one."""
    found = (r for r in same if _result(r, quiet))
    return max(found, key=lambda r: r.identity["parent"] == folder.name, default=None)


def _trained(folder: RunFolder, train_hash: str) -> RunFolder | None:
    """A finished run that trained the model of this hash."""
    wanted = ("run", train_hash, None)
    found, _ = RunFolder.scan(
        folder.path.parent, lambda r: (r["kind"], r["train_hash"], r["trained_by"]) == wanted
    )
    return next((r for r in found if _result(r)), None)


def _result(run: RunFolder, quiet: bool = True) -> Result | None:
    """The result of a run. One whose result cannot be read counts as not finished, which is said unless ``quiet``."""
    try:
        return run.result
    except DamagedRun as error:
        say(f"  {error.message} It counts as not finished. {error.hint}", quiet)
        return None


def _results(folder: RunFolder, plan: SweepPlan, quiet: bool) -> dict[str, Result]:
    """The results of the trials by run. A trial whose run has none that can be read gets its ``problem``."""
    found = {}
    for trial in plan.trials:
        if trial.run is None:
            continue
        if result := _result(RunFolder(folder.path.parent / trial.run), quiet):
            found[trial.run] = result
        else:
            trial.problem = f"{trial.run} has no result that can be read."
    return found


def _summary(folder: RunFolder, plan: SweepPlan, results: dict[str, Result], quiet: bool) -> SweepResult:
    """The trials of a sweep and the sums over them."""
    runs = {name: RunFolder(folder.path.parent / name) for name in results}
    metrics: dict[str, float] = {
        "trials": len(plan.trials),
        "trainings": sum(r.training is not None for r in results.values()),
        "stages": len({name for r in results.values() for name in r.stages.values()}),
    }
    with suppress(
        DamagedRun, KeyError
    ):  # a stage was deleted, or a run has lost its hours: they are not known
        metrics |= {n: sum(r.metrics[n] for r in results.values()) for n in ("device_hours", "gpu_hours")}
        stages = {s.name: s.result for r in runs.values() for s in lineage(r)}
        for name in ("device_hours", "gpu_hours"):
            metrics[f"lineage_{name}"] = metrics[name] + sum(r.metrics[name] for r in stages.values() if r)
    if valid := [r.valid_accuracy for r in results.values() if r.valid_accuracy]:
        best = max if valid[0].larger_is_better else min
        metrics["valid_accuracy"] = best(v.value for v in valid)
    trials = [SweepTrial(t.varied, t.run, t.problem) for t in plan.trials]
    return SweepResult(run=folder.name, experiment=plan.name, trials=trials, metrics=metrics)


def _write_table(folder: RunFolder, plan: SweepPlan, results: dict[str, Result]) -> None:
    """trials.csv: what varied and what came out."""
    varied = sorted({k for t in plan.trials for k in t.varied})
    costs = ("valid_accuracy", "device_hours", "latency_p50_ms")
    with atomic(folder / "trials.csv") as f:
        table = csv.writer(f)
        table.writerow([*varied, "run", "accuracy", "low", "high", *costs])
        for t in plan.trials:
            found = [""] * (3 + len(costs))
            if result := results.get(t.run or ""):
                a = result.accuracy
                found = [a.value, a.low, a.high, *(result.metrics.get(name, "") for name in costs)]
            table.writerow([*(t.varied.get(k, "") for k in varied), t.run or "", *found])
