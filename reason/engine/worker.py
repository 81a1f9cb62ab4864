"""What every rank of a run does: load, train or take over a model, calibrate, judge every depth, write."""

from __future__ import annotations

import time
import traceback
from dataclasses import replace
from typing import Any

import torch
from safetensors import SafetensorError

from reason.engine.checkpoint import Checkpoints
from reason.engine.cost import costs
from reason.engine.evaluation import judge_baselines, judge_depths, report, write_rows
from reason.engine.memory import enough_memory
from reason.engine.meter import Stopwatch, device_name, peak_memory_gb
from reason.engine.parallel import World, world
from reason.engine.plan import Plan
from reason.engine.progress import RunLog
from reason.engine.session import Session, model_owner, recorded_plan
from reason.engine.trainer import Progress, Trainer
from reason.errors import FREE_SPACE, ReasonError, RunError, writing
from reason.methods.base import Evaluation, Ratio
from reason.tracking.folder import RunFolder
from reason.tracking.points import PointLog
from reason.tracking.result import Judged, Outcome, Result, RunUnits, Training


def work(payload: dict[str, Any]) -> None:
    """The work of one rank. ``payload``: folder, device, quiet."""
    folder = RunFolder(payload["folder"])
    plan = recorded_plan(folder)
    with world(payload["device"], plan.config.hardware) as here:
        run_log = RunLog(folder.path, here.rank, payload["quiet"])
        points = PointLog(folder) if here.is_main else None
        try:
            with (
                enough_memory(plan),
                writing(f"The run folder {folder.name}", f"{FREE_SPACE}, then: reason resume {folder.path}"),
            ):
                result = _execute(plan, here, folder, run_log, points)
                memory = peak_memory_gb(here)
                if points:
                    points.close()
                    _note_lost(points, result, run_log)
                if result is not None:
                    on_gpu = payload["device"] == "cuda"
                    metrics = costs(folder, model_owner(folder), here.size, on_gpu) | {
                        "peak_memory_gb": memory
                    }
                    metrics, gpus = result.metrics | metrics, here.size if on_gpu else 0
                    if lost := folder.log_problem("events.jsonl"):
                        run_log.say(f"  warning: {lost.message} Its device-hours are left out.")
                    told = replace(result, metrics=metrics, device=payload["device"], gpus=gpus)
                    folder.write_result(replace(told, files=folder.contents()))
            here.barrier()
        except Exception as error:
            if not isinstance(error, ReasonError):
                run_log.note(traceback.format_exc())
            raise
        finally:
            run_log.close()
            if points:
                points.close()


def _execute(
    plan: Plan, here: World, folder: RunFolder, run_log: RunLog, points: PointLog | None
) -> Result | None:
    """Everything but what the run has cost and on what; None on other ranks than the first."""
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
    elif plan.trains:
        _phase(folder, here, "train")
        training = _train(session, folder, identity["train_hash"], run_log)
    _phase(folder, here, "evaluate")
    session.calibrate(folder, owner)
    for note in (session.ctx.calibration or {}).get("notes", []):
        run_log.say(f"  note: {note}")
    curve, baselines = _evaluate(session, folder, run_log)
    if not here.is_main:
        return None
    axis, units, config = plan.card.depth, plan.card.units, plan.config
    head = next(judged for judged in curve if judged.depth == config.depth)
    return Result(
        run=folder.name, experiment=plan.experiment, method=plan.card.name, version=identity["version"],
        backbone=config.backbone.name, dataset=config.dataset.name, data_digest=identity["data_digest"],
        split="test", depth=config.depth, train_depth=config.train_depth, seed=config.seed,
        config_hash=identity["config_hash"], train_hash=identity["train_hash"],
        trained_by=identity["trained_by"], stages=identity["stages"],
        units=RunUnits(axis.unit, axis.zero, units.example, units.latency, units.throughput, axis.least),
        beside=list(plan.card.beside), curve=curve, baselines=baselines, metrics=_flat_metrics(head),
        training=training, device_name=device_name(here.device), world_size=here.size,
        threads=torch.get_num_threads(), info=session.ctx.data.info, created=identity["created"],
        params_m=sum(p.numel() for p in session.network.parameters()) / 1e6,
    )  # fmt: skip


def _note_lost(points: PointLog, result: Result | None, run_log: RunLog) -> None:
    if points.problem:
        run_log.say(f"  note: {points.problem}")
        if result is not None and result.training is not None:
            result.training.notes.append(points.problem)


def _phase(folder: RunFolder, here: World, phase: str) -> None:
    if here.is_main:
        folder.event("phase", phase=phase)


def _train(session: Session, folder: RunFolder, train_hash: str, run_log: RunLog) -> Training:
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
    except (OSError, SafetensorError) as error:
        hint = f"{FREE_SPACE}, then resume the run with `reason resume`."
        raise RunError(f"The model could not be saved: {error}.", hint) from error
    session.world.barrier()
    run_log.progress("training", 1, 1)
    stopped = ", stopped early (validation no longer improved)" if training.stopped == "early" else ""
    best = f", best at epoch {training.best_epoch:.3g}" if training.best_epoch else ""
    run_log.say(
        f"  trained {training.epochs:.3g} epochs ({training.steps} steps) "
        f"in {time.perf_counter() - started:.0f} s{stopped}{best}"
    )
    return training


# --- judging ----------------------------------------------------------------------------------------


def _evaluate(
    session: Session, folder: RunFolder, run_log: RunLog
) -> tuple[list[Judged], dict[str, Outcome]]:
    """Judge every depth of the plan on validation and test, and the baselines on test; write their rows.

    Returns the curve and the baselines; nothing on other ranks than the first.
    """
    here, ctx, method, network = session.world, session.ctx, session.method, session.network
    config, depths = session.plan.config, session.plan.depths
    resamples, limit = config.eval.resamples, config.eval.limit
    validation: dict[int, dict[str, Outcome]] = {}  # depth -> the method's outcome as "", and those of rivals
    curve: list[Judged] = []
    for number, split in enumerate(("valid", "test")):
        samples = config.eval.latency_samples if split == "test" else 0
        meters = {depth: Stopwatch(here.device, samples, config.seed, here.is_main) for depth in depths}
        done = number * len(depths)
        run_log.progress("evaluating", done, 2 * len(depths), f"{split}, depth {depths[0]}")
        judged = judge_depths(method, ctx, here, network, getattr(ctx.data, split), meters, limit=limit)
        for depth, found in judged:
            done += 1
            run_log.progress("evaluating", done, 2 * len(depths), f"{split}, depth {depth}")
            if not here.is_main:
                continue
            evaluation, path = found.evaluation, f"rows/{split}-depth{depth}.arrow"
            write_rows(evaluation.rows, folder / path)
            outcomes = {"": _outcome(evaluation, evaluation.metrics, path, resamples)}
            for name, rival in evaluation.rivals.items():
                outcome = _outcome(evaluation, rival.metrics, path, resamples)
                cost = rival.cost or evaluation.cost
                outcomes[name] = replace(
                    outcome, meaning=rival.meaning, cost=cost, bound=rival.bound, variant_of=rival.variant_of,
                    **found.rival_latency[name],
                )  # fmt: skip
            if split == "valid":
                validation[depth] = outcomes
                continue
            for name, seen in validation[depth].items():
                outcomes[name] = replace(outcomes[name], valid_accuracy=seen.accuracy, valid_rows=seen.rows)
            own = outcomes.pop("")
            curve.append(Judged(
                **{**vars(own), **found.latency}, depth=depth, effective_depth=found.effective_depth,
                throughput_per_s=found.throughput, rivals=outcomes,
                overall=evaluation.overall(evaluation.rows) if evaluation.overall else {},
            ))  # fmt: skip
    baselines: dict[str, Outcome] = {}
    evaluations = judge_baselines(method, ctx, here, network, ctx.data.test, config.depth, limit=limit)
    if here.is_main:
        for name, evaluation in evaluations.items():
            path = f"rows/test-{name}.arrow"
            write_rows(evaluation.rows, folder / path)
            baselines[name] = _outcome(evaluation, evaluation.metrics, path, resamples)
    return curve, baselines


def _outcome(evaluation: Evaluation, ratios: dict[str, Ratio], path: str, resamples: int) -> Outcome:
    """One way of answering: its accuracy and further metrics with intervals, its cost, and where its rows are."""
    measures = {name: report(evaluation, ratios, name, resamples) for name in ratios}
    accuracy = measures.pop(evaluation.accuracy)
    return Outcome(accuracy=accuracy, rows=path, metrics=measures, cost=evaluation.cost)


def _flat_metrics(head: Judged) -> dict[str, float]:
    """The numbers of the run's depth under the names that MLflow shows; what was not measured is left out."""
    flat = {
        "accuracy": head.accuracy.value,
        "valid_accuracy": head.valid_accuracy.value if head.valid_accuracy else None,
        "latency_p50_ms": head.latency_p50_ms, "latency_p95_ms": head.latency_p95_ms,
        "throughput_per_s": head.throughput_per_s, "effective_depth": head.effective_depth,
    }  # fmt: skip
    flat |= {f"eval/{_metric_key(name)}": m.value for name, m in head.metrics.items()}
    flat |= {f"eval/{_metric_key(name)}": v for name, v in head.overall.items()}
    flat |= {f"cost/{name}": v for name, v in head.cost.items()}
    for name, rival in head.rivals.items():
        key = _metric_key(name)
        flat |= {f"rival/{key}": rival.accuracy.value, f"rival_latency_p50_ms/{key}": rival.latency_p50_ms}
        flat |= {f"rival_{c}/{key}": rival.cost[c] for c in ("tokens", "flops") if c in rival.cost}
    return {k: v for k, v in flat.items() if v is not None}


def _short(value: Any) -> str:
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:.4g}" if isinstance(value, float) else text


def _metric_key(name: str) -> str:
    """NDCG@10 -> ndcg_at_10, the spelling under which MLflow shows it."""
    return name.lower().replace("@", "_at_").replace(" ", "_")
