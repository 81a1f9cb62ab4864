"""What every rank of a run does: load, train or take over a model, calibrate, judge every depth, write."""

from __future__ import annotations

import time
import traceback
from dataclasses import asdict
from typing import Any

import torch

from reason.engine.checkpoint import Checkpoints
from reason.engine.cost import costs
from reason.engine.evaluation import judge_baselines, judge_depths, report, write_rows
from reason.engine.meter import Stopwatch, device_name, peak_memory_gb
from reason.engine.parallel import World, world
from reason.engine.plan import Plan
from reason.engine.progress import RunLog
from reason.engine.session import Session, model_owner, recorded_plan
from reason.engine.trainer import Progress, Trainer
from reason.errors import ReasonError, RunError
from reason.methods.base import Evaluation, Ratio
from reason.tracking.folder import RunFolder
from reason.tracking.points import PointLog


def work(payload: dict[str, Any]) -> None:
    """The work of one rank. ``payload``: folder, device, quiet."""
    folder = RunFolder(payload["folder"])
    plan = recorded_plan(folder)
    with world(payload["device"], plan.config.hardware) as here:
        run_log = RunLog(folder.path, here.rank, payload["quiet"])
        points = PointLog(folder) if here.is_main else None
        try:
            result = _execute(plan, here, folder, run_log, points)
            memory = peak_memory_gb(here)
            if here.is_main:
                if points:
                    points.close()
                on_gpu = payload["device"] == "cuda"
                result |= {"device": payload["device"], "gpus": here.size if on_gpu else 0}
                result["metrics"] |= costs(folder, model_owner(folder), here.size, on_gpu)
                result["metrics"] |= {"peak_memory_gb": memory}
                folder.write_result(result)
            here.barrier()
        except ReasonError:
            raise
        except Exception:
            run_log.note(traceback.format_exc())
            raise
        finally:
            run_log.close()
            if points:
                points.close()


def _execute(
    plan: Plan, here: World, folder: RunFolder, run_log: RunLog, points: PointLog | None
) -> dict[str, Any]:
    """Everything but what the run has cost; the content of result.json, {} on other ranks than the first."""
    identity, owner = folder.identity, model_owner(folder)
    _phase(folder, here, "load")
    log = points.log if points else lambda *_: None
    session = Session.begin(plan, here, folder.path, log, owner=owner.path)
    run_log.say("  " + ", ".join(f"{k} {_short(v)}" for k, v in session.ctx.data.info.items()))
    for note in session.ctx.dataset.notes:
        run_log.say(f"  note: {note}")
    training = None
    session.method.check(session.ctx, session.network)
    if identity["trained_by"] is not None:
        session.load_model(owner, identity["train_hash"])
        run_log.say(f"  using the model trained by {identity['trained_by']}")
    elif plan.card.trains:
        _phase(folder, here, "train")
        training = _train(session, folder, identity["train_hash"], run_log)
    _phase(folder, here, "evaluate")
    session.calibrate(folder, owner)
    for note in (session.ctx.calibration or {}).get("notes", []):
        run_log.say(f"  note: {note}")
    result = _evaluate(session, folder, run_log)
    if not here.is_main:
        return {}
    return _identity_of(plan, identity, folder) | result | {
        "training": training, "device_name": device_name(here.device), "world_size": here.size,
        "threads": torch.get_num_threads(), "info": session.ctx.data.info, "created": identity["created"],
        "params_m": sum(p.numel() for p in session.network.parameters()) / 1e6,
    }  # fmt: skip


def _phase(folder: RunFolder, here: World, phase: str) -> None:
    if here.is_main:
        folder.event("phase", phase=phase)


def _train(session: Session, folder: RunFolder, train_hash: str, run_log: RunLog) -> dict[str, Any]:
    """Train (or go on training) and keep the model."""
    last: dict[str, float] = {}

    def watch(p: Progress) -> None:
        if p.loss is not None:
            last["loss"] = p.loss
        if p.valid is not None:
            last["valid"] = p.valid
            run_log.note(f"step {p.step} epoch {p.epoch:.2f} valid {p.valid:.5f}")
        text = "  ".join(f"{k} {v:.4f}" for k, v in last.items())
        run_log.progress("training", p.step, p.steps, text)

    checkpoints = Checkpoints(folder / "checkpoints", session.world, train_hash)
    trainer = Trainer(session.method, session.network, session.ctx, session.world, checkpoints, watch)
    started = time.perf_counter()
    training = trainer.fit()
    for note in training.notes:
        run_log.say(f"  note: {note}")
    try:
        session.keep_trained(trainer.wrapped, folder, train_hash)
    except OSError as error:
        raise RunError(
            f"The model could not be saved: {error}.",
            "Free some disk space, then resume the run with `reason resume`.",
        ) from error
    session.world.barrier()
    run_log.progress("training", 1, 1)
    stopped = ", stopped early (validation no longer improved)" if training.stopped == "early" else ""
    best = f", best at epoch {training.best_epoch:.3g}" if training.best_epoch else ""
    run_log.say(
        f"  trained {training.epochs:.3g} epochs ({training.steps} steps) "
        f"in {time.perf_counter() - started:.0f} s{stopped}{best}"
    )
    parameters = sum(p.numel() for p in session.network.parameters() if p.requires_grad)
    return asdict(training) | {"parameters": parameters}


# --- judging ----------------------------------------------------------------------------------------


def _evaluate(session: Session, folder: RunFolder, run_log: RunLog) -> dict[str, Any]:
    """Judge every depth of the plan on validation and test; write rows; the numbers of result.json."""
    here, ctx, config = session.world, session.ctx, session.plan.config
    depths = session.plan.depths
    curve: dict[int, dict[str, Any]] = {depth: {"depth": depth} for depth in depths}
    for number, split in enumerate(("valid", "test")):
        samples = config.eval.latency_samples if split == "test" else 0
        meters = {depth: Stopwatch(here.device, samples, config.seed, here.is_main) for depth in depths}
        done = number * len(depths)
        run_log.progress("evaluating", done, 2 * len(depths), f"{split}, depth {depths[0]}")
        judged = judge_depths(
            session.method,
            ctx,
            here,
            session.network,
            getattr(ctx.data, split),
            meters,
            limit=config.eval.limit,
        )
        for depth, found in judged:
            done += 1
            run_log.progress("evaluating", done, 2 * len(depths), f"{split}, depth {depth}")
            if not here.is_main:
                continue
            evaluation, path = found.evaluation, f"rows/{split}-depth{depth}.arrow"
            write_rows(evaluation.rows, folder / path)
            outcome = _outcome(evaluation, evaluation.metrics, path, config.eval.resamples)
            rivals = {
                name: _outcome(evaluation, rival.metrics, path, config.eval.resamples)
                | {"meaning": rival.meaning, "cost": rival.cost or evaluation.cost}
                for name, rival in evaluation.rivals.items()
            }
            if split == "valid":
                curve[depth] |= _as_validation(outcome)
                curve[depth]["rivals"] = {name: _as_validation(rival) for name, rival in rivals.items()}
                continue
            rivals = {name: rival | curve[depth]["rivals"][name] for name, rival in rivals.items()}
            curve[depth] |= outcome | {
                "throughput_per_s": found.throughput, "effective_depth": found.effective_depth,
                "cost": evaluation.cost, **found.latency,
                "overall": evaluation.overall(evaluation.rows) if evaluation.overall else {},
                "rivals": rivals,
            }  # fmt: skip
    baselines = {}
    judged = judge_baselines(
        session.method, ctx, here, session.network, ctx.data.test, config.depth, limit=config.eval.limit
    )
    if not here.is_main:
        return {}
    for name, evaluation in judged.items():
        path = f"rows/test-{name}.arrow"
        write_rows(evaluation.rows, folder / path)
        baselines[name] = _outcome(evaluation, evaluation.metrics, path, config.eval.resamples)
        baselines[name]["cost"] = evaluation.cost
    head = curve[config.depth]
    return {
        "accuracy": head["accuracy"], "valid_accuracy": head["valid_accuracy"], "curve": list(curve.values()),
        "baselines": baselines, "metrics": _flat_metrics(head),
    }  # fmt: skip


def _outcome(evaluation: Evaluation, ratios: dict[str, Ratio], path: str, resamples: int) -> dict[str, Any]:
    """The accuracy and the further metrics of one way of answering, with intervals, and where their rows are."""
    name = evaluation.accuracy
    metrics = {m: report(evaluation, ratios, m, resamples) for m in ratios if m != name}
    return {"accuracy": report(evaluation, ratios, name, resamples), "rows": path, "metrics": metrics}


def _as_validation(outcome: dict[str, Any]) -> dict[str, Any]:
    return {"valid_accuracy": outcome["accuracy"], "valid_rows": outcome["rows"]}


def _flat_metrics(head: dict[str, Any]) -> dict[str, float]:
    """The numbers of the run's depth under the names that MLflow shows; what was not measured is left out."""
    flat = {
        "accuracy": head["accuracy"]["value"], "valid_accuracy": head["valid_accuracy"]["value"],
        "latency_p50_ms": head["latency_p50_ms"], "latency_p95_ms": head["latency_p95_ms"],
        "throughput_per_s": head["throughput_per_s"], "effective_depth": head["effective_depth"],
    }  # fmt: skip
    flat |= {f"eval/{_metric_key(m)}": r["value"] for m, r in head["metrics"].items()}
    flat |= {f"eval/{_metric_key(m)}": v for m, v in head["overall"].items()}
    flat |= {f"cost/{k}": v for k, v in head["cost"].items()}
    flat |= {f"rival/{_metric_key(name)}": r["accuracy"]["value"] for name, r in head["rivals"].items()}
    return {k: v for k, v in flat.items() if v is not None}


def _identity_of(plan: Plan, identity: dict[str, Any], folder: RunFolder) -> dict[str, Any]:
    axis, units, config = plan.card.depth, plan.card.units, plan.config
    return {
        "schema": 1, "run": folder.name, "experiment": plan.experiment, "method": plan.card.name,
        "version": identity["version"], "backbone": config.backbone.name, "dataset": config.dataset.name,
        "data_digest": identity["data_digest"], "split": "test", "depth": config.depth,
        "train_depth": config.train_depth, "seed": config.seed, "config_hash": identity["config_hash"],
        "train_hash": identity["train_hash"], "trained_by": identity["trained_by"], "stages": identity["stages"],
        "units": {
            "depth": axis.unit, "least": axis.least, "zero": axis.zero, "example": units.example, "latency": units.latency,
            "throughput": units.throughput,
        },
        "beside": list(plan.card.beside),
    }  # fmt: skip


def _short(value: Any) -> str:
    return (
        f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)
    )


def _metric_key(name: str) -> str:
    """NDCG@10 -> ndcg_at_10, the spelling under which MLflow shows it."""
    return name.lower().replace("@", "_at_").replace(" ", "_")
