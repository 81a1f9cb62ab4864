"""The life of a run: folder and mirror, workers, result, closing. (design: parent and workers)

The parent resolves, refuses early, makes the folder and the MLflow run, launches the workers and
closes. The workers train, evaluate and write; rank 0 writes result.json last, by rename. What the
folder says is what happened: the parent derives status and cost from it, never from memory.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reason.engine.launcher import Terminated, launch, signals
from reason.engine.layers import flatten
from reason.engine.plan import Plan
from reason.errors import ConfigError, ReasonError, RunError
from reason.files import atomic, write_json
from reason.tracking import provenance
from reason.tracking.clock import device_hours
from reason.tracking.folder import FAILED, FINISHED, KILLED, RunFolder
from reason.tracking.mirror import Mirror

BEAT_S = 1.0


def run(
    plan: Plan, *, model: RunFolder | None = None, sweep: RunFolder | None = None, quiet: bool = False
) -> RunFolder:
    """Execute a plan in a fresh folder.

    Args:
        model: a finished run whose model is used instead of training.
        sweep: the sweep's folder, when this run is one of its trials.
    Raises:
        ConfigError: refused before anything was made.
        RunError: it failed; the folder says how far it came.
    """
    from reason.engine.parallel import choose_device
    from reason.engine.session import load_dataset

    kind, processes = choose_device(plan.config.hardware)
    _check_batch(plan, processes)
    _say(f"{plan.experiment}: {_sentence(plan, kind, processes)}", quiet)
    folder = prepare(plan, load_dataset(plan).digest, model=model, sweep=sweep)
    execute(folder, plan, kind, processes, quiet=quiet)
    return folder


def prepare(
    plan: Plan, data_digest: str, *, model: RunFolder | None = None, sweep: RunFolder | None = None
) -> RunFolder:
    """A fresh folder that says what the run is, before its first attempt."""
    from reason.engine.session import source_digest

    source = source_digest(plan)
    train_hash, config_hash = plan.hashes(data_digest, source)
    if model is not None and model.identity["train_hash"] != train_hash:
        recorded = flatten(model.config)
        changed = [f"{k}={plan.flat[k]} (it has {recorded[k]})" for k in plan.retrains(recorded)]
        what = ", ".join(changed) or "its data, or the version of reason that made it, has changed"
        raise ConfigError(
            f"{model.name} holds another model: {what}.",
            f"Change only eval.* and {', '.join(sorted(plan.judging))}; or train anew with `reason run`.",
        )
    folder = RunFolder.create(plan.config.runs, plan.experiment, config_hash)
    with atomic(folder / "config.yaml") as f:
        f.write(plan.to_yaml())
    write_json(folder / "origin.json", plan.origin)
    write_json(folder / "env.json", provenance.capture(Path.cwd()))
    (folder / "git.diff").write_text(provenance.diff(Path.cwd()), encoding="utf-8")
    identity = {
        "kind": "run", "experiment": plan.experiment, "method": plan.card.name,
        "config_hash": config_hash, "train_hash": train_hash, "data_digest": data_digest, "source_digest": source,
        "parent": sweep.name if sweep else None, "trained_by": model.name if model else None,
        "created": time.time(), "argv": ["reason", *sys.argv[1:]],
    }  # fmt: skip
    write_json(folder / "run.json", identity)
    return folder


def resume(folder: RunFolder, hardware: Mapping[str, Any] | None = None, *, quiet: bool = False) -> RunFolder:
    """Go on with a run that was interrupted, killed or failed; a finished one is left as it is.

    Args:
        hardware: dotted keys that say where it goes on, if elsewhere than it began.
    """
    from reason.engine.parallel import choose_device
    from reason.engine.session import load_dataset, recorded_plan, source_digest

    if folder.status == FINISHED:
        return folder
    plan = recorded_plan(folder, dict(hardware or {}))
    kind, processes = choose_device(plan.config.hardware)
    _check_batch(plan, processes)
    digest = load_dataset(plan).digest
    if digest != folder.identity["data_digest"]:
        raise RunError(
            f"The data of {folder.name} has changed since it started ({digest[:8]}, then {folder.identity['data_digest'][:8]}).",
            "Start a new run.",
        )
    if source_digest(plan) != folder.identity.get("source_digest", ""):
        raise RunError(
            f"The model that {folder.name} began with has changed: {plan.source}.", "Start a new run."
        )
    _say(f"{folder.name}: resuming", quiet)
    if hardware:
        with atomic(folder / "config.yaml") as f:
            f.write(plan.to_yaml())
    execute(folder, plan, kind, processes, quiet=quiet)
    return folder


def execute(folder: RunFolder, plan: Plan, kind: str, processes: int, *, quiet: bool = False) -> None:
    """One attempt at a run: hold its lock, launch its workers, close it as what it became."""
    from reason.engine.parallel import threads_of

    payload = {"folder": str(folder.path), "device": kind, "quiet": quiet}
    threads = threads_of(plan.config.hardware, processes)
    folder.settle()  # an attempt that was killed could not say so: its last sign of life bounds its cost
    with signals(), folder.lock():
        folder.event("attempt", device=kind, devices=processes)
        with Mirror(folder) as mirror, _heart(folder):
            try:
                launch(work, payload, processes, threads)
                status, problem = FINISHED, None
            except (KeyboardInterrupt, Terminated) as error:
                status, problem = KILLED, error
            except ReasonError as error:
                status, problem = FAILED, error
            except BaseException as error:
                status, problem = FAILED, error
                with open(folder / "log.txt", "a", encoding="utf-8") as f:
                    f.write(traceback.format_exc())
            if status != FINISHED and (folder / "result.json").exists():
                status = FINISHED  # killed after the last act: nothing was lost
            folder.event(
                "closed",
                status=status,
                **(
                    {"why": str(problem).splitlines()[0] if str(problem) else type(problem).__name__}
                    if problem
                    else {}
                ),
            )
            mirror.close(status)
        if status == KILLED:
            _say(f"{folder.name} is interrupted. It goes on with: reason resume {folder.path}", quiet)
        if problem is None:
            return
        if isinstance(problem, ReasonError):
            problem.hint = f"{problem.hint} The run is kept in {folder.path}.".strip()
        elif isinstance(problem, Exception):
            raise RunError(
                f"{type(problem).__name__}: {problem}",
                f"The traceback is at the end of {folder / 'log.txt'}.",
            ) from problem
        raise problem


# --- in the workers ---------------------------------------------------------------------------------


def work(payload: dict[str, Any]) -> None:
    """What every rank does. ``payload``: folder, device, quiet."""
    from reason.engine.meter import device_name, peak_memory_gb
    from reason.engine.parallel import world
    from reason.engine.progress import Voice
    from reason.engine.session import Session, model_owner, recorded_plan
    from reason.tracking.points import PointLog

    folder = RunFolder(payload["folder"])
    plan = recorded_plan(folder)
    identity = folder.identity
    with world(payload["device"], plan.config.hardware) as here:
        voice = Voice(folder.path, here.rank, payload["quiet"])
        points = PointLog(folder) if here.is_main else None
        try:
            _phase(folder, here, "load")
            owner = model_owner(folder)
            log = points.log if points else lambda *_: None
            session = Session.begin(plan, here, folder.path, log, owner=owner.path)
            voice.say("  " + ", ".join(f"{k} {_short(v)}" for k, v in session.ctx.data.info.items()))
            for note in session.dataset.notes:
                voice.say(f"  note: {note}")
            training = None
            session.method.check(session.ctx, session.network)
            if identity["trained_by"] is not None:
                session.load_model(owner, identity["train_hash"])
                voice.say(f"  model trained by {identity['trained_by']}")
            else:
                _phase(folder, here, "train")
                training = _train(session, folder, identity["train_hash"], voice)
            _phase(folder, here, "evaluate")
            session.calibrate(folder, owner)
            for note in (session.ctx.calibration or {}).get("notes", []):
                voice.say(f"  note: {note}")
            result = _evaluate(session, folder, voice)
            if here.is_main:
                if points:
                    points.close()
                spent = hours(folder, here.size)
                trained = hours(owner, here.size)["train"]
                result |= _identity_of(plan, identity, folder)
                result |= {
                    "training": training, "device": payload["device"], "device_name": device_name(here.device),
                    "world_size": here.size, "threads": _threads(), "gpus": here.size if payload["device"] == "cuda" else 0,
                    "params_m": sum(p.numel() for p in session.network.parameters()) / 1e6,
                    "info": session.ctx.data.info, "created": identity["created"],
                }  # fmt: skip
                result["metrics"] |= {
                    "device_hours": spent["total"], "train_device_hours": trained,
                    "gpu_hours": spent["total"] if payload["device"] == "cuda" else 0.0,
                    "peak_memory_gb": peak_memory_gb(here.device),
                }  # fmt: skip
                folder.write_result(result)
            here.barrier()
        except ReasonError:
            raise
        except Exception:
            voice.note(traceback.format_exc())
            raise
        finally:
            voice.close()
            if points:
                points.close()


def _train(session: Any, folder: RunFolder, train_hash: str, voice: Any) -> dict[str, Any]:
    """Train (or go on training) and keep the model."""
    from dataclasses import asdict

    from reason.engine.checkpoint import Checkpoints
    from reason.engine.trainer import Progress, Trainer

    last: dict[str, float] = {}

    def watch(p: Progress) -> None:
        if p.loss is not None:
            last["loss"] = p.loss
        if p.valid is not None:
            last["valid"] = p.valid
            voice.note(f"step {p.step} epoch {p.epoch:.2f} valid {p.valid:.5f}")
        text = "  ".join(f"{k} {v:.4f}" for k, v in last.items())
        voice.progress("training", p.step, p.steps, text)

    checkpoints = Checkpoints(folder / "checkpoints", session.world, train_hash)
    trainer = Trainer(session.method, session.network, session.ctx, session.world, checkpoints, watch)
    started = time.perf_counter()
    report = trainer.fit()
    for note in report.notes:
        voice.say(f"  note: {note}")
    try:
        session.keep_trained(trainer.wrapped, folder, train_hash)
    except OSError as error:
        raise RunError(
            f"The model could not be written: {error}.", "Free some space and `reason resume` the run."
        ) from error
    session.world.barrier()
    voice.progress("training", 1, 1)
    why = "validation stopped gaining" if report.stopped == "early" else "as planned"
    best = f", best at epoch {report.best_epoch:.3g}" if report.best_epoch else ""
    voice.say(
        f"  trained {report.epochs:.3g} epochs ({report.steps} steps) in {time.perf_counter() - started:.0f} s, {why}{best}"
    )
    return asdict(report) | {"parameters": sum(p.numel() for p in session.network.parameters())}


def _evaluate(session: Any, folder: RunFolder, voice: Any) -> dict[str, Any]:
    """Judge every depth of the plan on validation and test; write rows; the content of result.json."""
    import torch

    from reason.engine.evaluation import judge, keep_ids, report, write_rows
    from reason.engine.meter import Stopwatch

    plan, here, ctx = session.plan, session.world, session.ctx
    config = plan.config
    resamples, limit = config.eval.resamples, config.eval.limit
    curve, shown, name = [], 0, ""
    ids = None
    depths = plan.depths
    for depth in depths:
        entry: dict[str, Any] = {"depth": depth}
        for split in ("valid", "test"):
            voice.progress("evaluating", shown, 2 * len(depths), f"depth {depth}, {split}")
            shown += 1
            meter = Stopwatch(
                here.device, config.eval.latency_samples if split == "test" else 0, config.seed, here.is_main
            )
            with torch.no_grad():
                judged = judge(
                    session.method,
                    ctx,
                    here,
                    session.network,
                    getattr(ctx.data, split),
                    depth,
                    meter=meter,
                    limit=limit,
                )
            if not here.is_main:
                continue
            evaluation = judged.evaluation
            name = evaluation.accuracy
            path = f"rows/{split}-depth{depth}.arrow"
            write_rows(evaluation.rows, folder / path)
            accuracy = report(evaluation, name, resamples)
            if split == "valid":
                entry |= {"valid_accuracy": accuracy, "valid_rows": path}
                continue
            ids = evaluation.rows.column("id")
            entry |= {
                "accuracy": accuracy, "rows": path,
                "metrics": {m: report(evaluation, m, resamples) for m in evaluation.metrics if m != name},
                "throughput_per_s": judged.throughput, "effective_depth": judged.effective_depth,
                "cost": evaluation.cost, **judged.latency,
                "overall": evaluation.overall(evaluation.rows) if evaluation.overall else {},
            }  # fmt: skip
        curve.append(entry)
    if not here.is_main:
        return {}
    baselines = {}
    for rival, evaluation in session.method.baselines(ctx, ctx.data.test).items():
        assert ids is not None
        evaluation = keep_ids(evaluation, ids)
        path = f"rows/test-{rival}.arrow"
        write_rows(evaluation.rows, folder / path)
        baselines[rival] = {
            "accuracy": report(evaluation, evaluation.accuracy, resamples), "rows": path,
            "metrics": {m: report(evaluation, m, resamples) for m in evaluation.metrics if m != evaluation.accuracy},
        }  # fmt: skip
    head = next(e for e in curve if e["depth"] == config.depth)
    flat = {
        "accuracy": head["accuracy"]["value"], "valid_accuracy": head["valid_accuracy"]["value"],
        "latency_p50_ms": head["latency_p50_ms"], "latency_p95_ms": head["latency_p95_ms"],
        "throughput_per_s": head["throughput_per_s"], "effective_depth": head["effective_depth"],
    }  # fmt: skip
    flat |= {f"eval/{_metric_key(m)}": r["value"] for m, r in head["metrics"].items()}
    flat |= {f"eval/{_metric_key(m)}": v for m, v in head["overall"].items()}
    flat |= {f"cost/{k}": v for k, v in head["cost"].items()}
    return {
        "accuracy": head["accuracy"], "valid_accuracy": head["valid_accuracy"], "curve": curve,
        "baselines": baselines, "metrics": {k: v for k, v in flat.items() if v is not None},
    }  # fmt: skip


def _identity_of(plan: Plan, identity: dict[str, Any], folder: RunFolder) -> dict[str, Any]:
    axis, units, config = plan.card.depth, plan.card.units, plan.config
    return {
        "schema": 1, "run": folder.name, "experiment": plan.experiment, "method": plan.card.name,
        "backbone": config.backbone.name, "dataset": config.dataset.name, "data_digest": identity["data_digest"],
        "split": "test", "depth": config.depth, "train_depth": config.train_depth, "seed": config.seed,
        "config_hash": identity["config_hash"], "train_hash": identity["train_hash"], "trained_by": identity["trained_by"],
        "units": {
            "depth": axis.unit, "least": axis.least, "zero": axis.zero, "example": units.example, "latency": units.latency,
            "throughput": units.throughput,
        },
        "beside": list(plan.card.beside),
    }  # fmt: skip


# --- cost and signs of life -------------------------------------------------------------------------


def hours(folder: RunFolder, devices: int) -> dict[str, float]:
    """Device-hours that a run has held so far: see ``tracking.clock.device_hours``."""
    return device_hours(folder, devices)


def _phase(folder: RunFolder, here: Any, phase: str) -> None:
    if here.is_main:
        folder.event("phase", phase=phase)


@contextmanager
def _heart(folder: RunFolder) -> Iterator[None]:
    """Touch the folder's sign of life every second, from a thread."""
    stop = threading.Event()

    folder.beat()

    def beat() -> None:
        while not stop.wait(BEAT_S):
            try:
                folder.beat()
            except OSError:
                continue

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _check_batch(plan: Plan, processes: int) -> None:
    train = plan.config.train
    if plan.card.trains and train.batch_size < processes * train.accumulate:
        raise ConfigError(
            f"train.batch_size={train.batch_size} cannot be shared by {processes} processes x {train.accumulate} micro-batches.",
            f"Use train.batch_size={processes * train.accumulate} or more.",
        )


def _sentence(plan: Plan, kind: str, processes: int) -> str:
    c = plan.config
    where = f"{processes} {'GPU' if kind == 'cuda' else kind + ' process'}{'es' if processes > 1 and kind != 'cuda' else ''}"
    return (
        f"method {plan.card.name} on {c.dataset.name}, trained for {c.train_depth} {plan.card.depth.unit}, "
        f"evaluated at {', '.join(map(str, plan.depths))}; seed {c.seed}; {where}"
    )


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def _short(value: Any) -> str:
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
    )


def _metric_key(name: str) -> str:
    """NDCG@10 -> ndcg_at_10, the spelling under which MLflow shows it."""
    return name.lower().replace("@", "_at_").replace(" ", "_")


def _threads() -> int:
    import torch

    return torch.get_num_threads()
