"""The life of a run: folder and mirror, stages, workers, result, closing. (design: parent and workers)

The parent resolves, refuses early, makes the folder and the MLflow run, launches the workers and closes. The
workers (``worker.py``) train, evaluate and write; rank 0 writes result.json last, by rename. What the folder
says is what happened: the parent derives status and cost from it, never from memory.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from reason.engine.launcher import Terminated, launch, signals
from reason.engine.layers import flatten
from reason.engine.plan import Plan
from reason.engine.progress import say
from reason.errors import FREE_SPACE, ConfigError, ReasonError, RunError, writing
from reason.files import write_json
from reason.tracking import provenance
from reason.tracking.folder import FAILED, FINISHED, KILLED, LOGS, RunFolder
from reason.tracking.mirror import Mirror

BEAT_S = 1.0


def run(
    plan: Plan, *, model: RunFolder | None = None, sweep: RunFolder | None = None,
    stage_of: RunFolder | None = None, quiet: bool = False,
) -> RunFolder:  # fmt: skip
    """Execute a plan in a fresh folder.

    Args:
        model: a finished run whose model is used instead of training.
        sweep: the sweep's folder, when this run is one of its trials.
        stage_of: the run that begins with this one.
    Raises:
        ConfigError: refused before anything was made.
        RunError: it failed; the folder says how far it came.
    """
    from reason.engine.parallel import choose_device
    from reason.engine.session import load_dataset
    from reason.engine.stages import chain

    kind, processes = choose_device(plan.config.hardware)
    _check_batch(plan, processes)
    if model is not None and sweep is None and plan.trains:
        _ = model.result  # what its training has cost is needed in the end
    stages = chain(plan) if model is None else []
    say(f"{plan.experiment}: {_sentence(plan, kind, processes)}", quiet)
    if stages and stage_of is None:
        say(f"  starts from {', then '.join(s.plan.experiment for s in stages)}", quiet)
    folder = prepare(plan, load_dataset(plan).digest, model=model, sweep=sweep, stage_of=stage_of)
    execute(folder, plan, kind, processes, quiet=quiet)
    return folder


def prepare(
    plan: Plan, data_digest: str, *, model: RunFolder | None = None, sweep: RunFolder | None = None,
    stage_of: RunFolder | None = None,
) -> RunFolder:  # fmt: skip
    """A fresh folder that says what the run is, before its first attempt."""
    from reason.engine.session import check_model
    from reason.engine.stages import source_digests

    original = model.identity if model else {}
    recorded = flatten(model.config) if model else {}
    same = original and all(recorded.get(key) == source for key, source in plan.sources.items())
    sources = original["sources"] if same and "sources" in original else source_digests(plan)
    train_hash, config_hash = plan.hashes(data_digest, sources)
    if model is not None and original["train_hash"] != train_hash:
        raise _another_model(plan, model, recorded)
    if model is not None and sweep is None and plan.trains:
        check_model(model)
    folder = RunFolder.create(plan.config.runs, plan.experiment, config_hash)
    identity = {
        "kind": "run", "experiment": plan.experiment, "method": plan.card.name, "version": plan.card.version,
        "config_hash": config_hash, "train_hash": train_hash, "data_digest": data_digest, "sources": sources,
        "parent": sweep.name if sweep else None,
        "trained_by": model.name if model and plan.trains else None,
        "stage_of": stage_of.name if stage_of else None, "stages": original.get("stages", {}), "written": plan.written,
        "created": time.time(), "argv": ["reason", *sys.argv[1:]],
    }  # fmt: skip
    try:
        with writing(f"The run folder {folder.path}", f"{FREE_SPACE}, or choose another folder: runs=PATH."):
            folder.write_config(plan.to_yaml())
            write_json(folder / "origin.json", plan.origin)
            write_json(folder / "env.json", provenance.capture(Path.cwd()))
            (folder / "git.diff").write_text(provenance.diff(Path.cwd()), encoding="utf-8")
            write_json(folder / "run.json", identity)
    except BaseException:  # nothing has happened in it yet
        shutil.rmtree(folder.path, ignore_errors=True)
        raise
    return folder


def _other_version(folder: RunFolder, plan: Plan) -> str:
    """In words, the version that a run was made with and the one here; "" where they are the same."""
    card, made = plan.card, folder.identity.get("version")
    old = f"version {made} of {card.name}" if made else "an earlier version of reason"
    return "" if made == card.version else f"{old}, and version {card.version} of {card.name} is installed"


def _another_model(plan: Plan, model: RunFolder, recorded: Mapping[str, Any]) -> ConfigError:
    changed = [f"{k}={plan.flat[k]} (recorded: {recorded[k]})" for k in plan.retrains(recorded)]
    if other := _other_version(model, plan):
        changed.append(f"it was trained with {other}")
    if not changed:
        return ConfigError(
            f"The data has changed since {model.name} was trained on it.",
            "Restore the data, or train a new model with `reason run`. `reason predict` needs no data.",
        )
    return ConfigError(
        f"These settings need a different model from that of {model.name}: {', '.join(changed)}.",
        f"Change only eval.* and {', '.join(sorted(plan.judging))}; or train a new model with `reason run`.",
    )


def resume(folder: RunFolder, hardware: Mapping[str, Any] | None = None, *, quiet: bool = False) -> RunFolder:
    """Go on with a run that was interrupted, killed or failed. A finished one is left as it is, unless files of it
    are gone or damaged: they are made again.

    Args:
        hardware: dotted keys that say where it goes on, if elsewhere than it began.
    """
    from reason.engine.parallel import choose_device
    from reason.engine.session import load_dataset, recorded_plan
    from reason.engine.stages import source_digests

    broken = _broken(folder) if (finished := folder.status == FINISHED) else []
    if finished and not broken:
        return folder
    plan, identity = recorded_plan(folder, dict(hardware or {})), folder.identity
    kind, processes = choose_device(plan.config.hardware)
    _check_batch(plan, processes)
    if other := _other_version(folder, plan):
        raise RunError(f"{folder.name} was started with {other}.", "Start a new run with `reason run`.")
    digest = load_dataset(plan).digest
    if digest != identity["data_digest"]:
        raise RunError(
            f"The data of {folder.name} has changed since it started (digest {digest[:8]}, was {identity['data_digest'][:8]}).",
            "Start a new run with `reason run`.",
        )
    sources = source_digests(plan, {key: identity["sources"][key] for key in identity.get("stages", {})})
    for key, source in sources.items():
        if identity.get("sources", {}).get(key, source) != source:
            raise RunError(
                f"The model that {folder.name} starts from has changed since then: {key}={plan.sources[key]}.",
                "Start a new run with `reason run`.",
            )
    if plan.hashes(digest, sources)[1] != identity["config_hash"]:
        raise RunError(
            f"The configuration of {folder.name} has changed since it started: its config.yaml and its hash differ.",
            "Restore config.yaml, or start a new run.",
        )
    say(f"Resuming {folder.name}" + (f": making {', '.join(broken)} again" if broken else ""), quiet)
    if hardware:
        folder.write_config(plan.to_yaml())
    with _without_result(folder) if broken else nullcontext():
        for name in broken:
            (folder / name).unlink(missing_ok=True)
        execute(folder, plan, kind, processes, quiet=quiet)
    return folder


def _broken(folder: RunFolder) -> list[str]:
    """What a finished run has made that is gone or damaged, and what has to be made again with it."""
    from reason.engine.session import MODEL, check_model

    result = folder.result
    assert result is not None
    broken = folder.altered(result)
    if result.training is not None and not broken:  # a run of an earlier version has no checksums
        try:
            check_model(folder)
        except RunError:
            broken = [MODEL]
    if any(not name.startswith("rows/") for name in broken):  # a network is built from several files
        broken = [name for name in {**result.files, MODEL: None} if name not in LOGS]
    return broken


@contextmanager
def _without_result(folder: RunFolder) -> Iterator[None]:
    """Within, a finished run is one that is not. If it does not come to its end again, it keeps the result it had."""
    result, aside = folder / "result.json", folder / ".result.json.before"
    result.rename(aside)
    try:
        yield
    finally:
        if not result.exists():
            aside.rename(result)
        aside.unlink(missing_ok=True)


def execute(folder: RunFolder, plan: Plan, kind: str, processes: int, *, quiet: bool = False) -> None:
    """One attempt at a run: hold its lock, make its stages, launch its workers, close it as what it became."""
    from reason.engine.parallel import threads_of
    from reason.engine.worker import work

    payload = {"folder": str(folder.path), "device": kind, "quiet": quiet}
    threads = threads_of(plan.config.hardware, processes)
    folder.settle()  # an attempt that was killed could not say so: its last sign of life bounds its cost
    problem: BaseException | None = None
    with signals(), folder.lock(), Mirror(folder) as mirror:
        try:
            _make_stages(folder, plan, quiet)
            with writing(f"The run folder {folder.name}", f"{FREE_SPACE}, then: reason resume {folder.path}"):
                folder.event("attempt", device=kind, devices=processes)
                with _heart(folder):
                    launch(work, payload, processes, threads)
            status = FINISHED
        except (KeyboardInterrupt, Terminated) as error:
            status, problem = KILLED, error
        except ReasonError as error:
            status, problem = FAILED, error
        except BaseException as error:
            status, problem = FAILED, error
            with suppress(OSError), open(folder / "log.txt", "a", encoding="utf-8") as f:
                f.write(traceback.format_exc())
        if (folder / "result.json").exists():
            status, problem = FINISHED, None  # stopped after the last act: nothing was lost
        why = {"why": (str(problem) or type(problem).__name__).splitlines()[0]} if problem is not None else {}
        close(folder, mirror, status, **why)
    if problem is None:
        return
    if status == KILLED and not folder.identity.get("stage_of"):
        say(f"{folder.name} was interrupted. Resume with: reason resume {folder.path}", quiet)
    if isinstance(problem, ReasonError):
        problem.hint = f"{problem.hint} The run folder is {folder.path}.".strip()
    elif isinstance(problem, Exception):
        raise RunError(
            f"{type(problem).__name__}: {problem}", f"The traceback is at the end of {folder / 'log.txt'}."
        ) from problem
    raise problem


def close(folder: RunFolder, mirror: Mirror, status: str, **why: str) -> None:
    """Note how an attempt ended, here and in the mirror. Where the disk is full, ``settle`` notes it later."""
    with suppress(OSError):
        folder.event("closed", status=status, **why)
    mirror.close(status)


def _make_stages(folder: RunFolder, plan: Plan, quiet: bool) -> None:
    """Find, finish or make the runs that this one begins with, and write down which they are."""
    from reason.engine.stages import stages_of

    identity = folder.identity
    if identity["trained_by"] is not None:
        return
    for stage in stages_of(plan, identity["stages"]):
        name = stage.plan.experiment
        try:
            if (done := stage.finished()) is not None:
                say(f"  {stage.key}: {name} is already finished: {done.name}", quiet)
            elif (begun := stage.unfinished()) is None:
                done = run(stage.plan, stage_of=folder, quiet=quiet)
            else:
                done = resume(begun, quiet=quiet)
        except ReasonError as error:
            raise RunError(
                f"{name}, which {folder.name} starts from, failed: {error.message}",
                f"{error.hint} Then resume with: reason resume {folder.path}",
            ) from error
        identity["stages"][stage.key] = done.name
        write_json(folder / "run.json", identity)


# --- signs of life, and what is said ----------------------------------------------------------------


@contextmanager
def _heart(folder: RunFolder) -> Iterator[None]:
    """Touch the folder's sign of life every second, from a thread."""
    stop = threading.Event()
    folder.beat()

    def beat() -> None:
        while not stop.wait(BEAT_S):
            with suppress(OSError):
                folder.beat()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _check_batch(plan: Plan, processes: int) -> None:
    train = plan.config.train
    if plan.trains and train.batch_size < (least := processes * train.accumulate):
        cut = f"{processes} processes x {train.accumulate} micro-batches"
        small = f"train.batch_size={train.batch_size} is too small for {cut}."
        raise ConfigError(small, f"Use train.batch_size={least} or more.")


def _sentence(plan: Plan, kind: str, processes: int) -> str:
    c = plan.config
    trained = f"trained with {c.train_depth} {plan.card.depth.unit}, " if plan.trains else ""
    where = f"{processes} {'GPU' if kind == 'cuda' else kind.upper() + ' process'}{'' if processes == 1 else 's' if kind == 'cuda' else 'es'}"
    judged = f"evaluated at depth {', '.join(map(str, plan.depths))}"
    return f"method {plan.card.name} on {c.dataset.name}, {trained}{judged}; seed {c.seed}; {where}"
