"""`reason sweep`: a resumable grid of runs that trains each model once."""

from __future__ import annotations

from typing import Annotated

import typer

from reason.cli.arguments import Device, DryRun, Files, Gpus, Offline, Overrides, Seed, SweepName, flags


def sweep(
    name: SweepName, overrides: Overrides = None, c: Files = None, gpus: Gpus = None, device: Device = None,
    seed: Seed = None, dry_run: DryRun = False, offline: Offline = False,
    on_error: Annotated[str, typer.Option("--on-error", help="What to do when a trial fails: continue or stop.")] = "continue",
) -> None:  # fmt: skip
    """Run a grid of trials; run the same command again to finish an interrupted sweep.

    Comma-separated values are varied; a..b is a range of integers. At the end all trials are compared, and
    accuracy is plotted against depth and costs in comparison.png in the folder of the sweep.

    Example: reason sweep latent depth=0,1,2,3 seed=0..2
    """
    from reason.engine import sweep as engine
    from reason.errors import ConfigError, unknown

    if on_error not in ("continue", "stop"):
        raise unknown("choice for --on-error", on_error, ("continue", "stop"))
    options = {"files": c or [], "flags": flags(gpus, device, seed, offline)}
    if dry_run:
        draw_plan(engine.plan_sweep(name, overrides or [], **options))
        return
    if seed is not None and any(w.startswith("seed=") for w in overrides or []):
        raise ConfigError("The seed is given twice, by --seed and by seed=...", "Use one of the two.")
    folder = engine.sweep(name, overrides or [], **options, stop_on_error=on_error == "stop")
    draw_sweep(folder, picture=True)


PICTURE = "comparison.png"  # in the folder of a sweep; what ``reason compare --plot`` draws of it


def draw_sweep(folder, picture: bool = False) -> None:
    """The trials of a finished sweep, compared; with ``picture`` also as a picture in its folder."""
    from pathlib import Path

    from reason.cli.compare import compare
    from reason.cli.output import stdout

    compare([folder.name], plot=folder / PICTURE if picture else None, runs=Path(folder.path.parent))
    metrics = folder.sweep_result.metrics
    stages = metrics.get("stages", 0)
    begun = f" (and {stages} they start from)" if stages else ""
    hours = metrics.get("lineage_device_hours", metrics.get("device_hours"))
    spent = "device-hours not known" if hours is None else f"{hours:.4f} device-hours"
    stdout().print(
        f"{metrics.get('trials', 0)} trials, {metrics.get('trainings', 0)} models trained{begun}, {spent}. "
        f"Folder: {folder.path}",
        soft_wrap=True,
    )


def draw_plan(plan) -> None:
    """What a sweep would do: its trials in the order of execution."""
    from rich.table import Table

    from reason.cli.output import stdout

    title = f"sweep {plan.name}: {len(plan.trials)} trials, {plan.trainings} trainings"
    table = Table(title=title, title_justify="left")
    keys = list(plan.trials[0].varied)
    fixed = [key for key in ("depth", "train_depth") if key not in keys]
    for key in [*keys, *fixed, "trains"]:
        table.add_column(key)
    seen: set[str] = set()
    for trial in plan.trials:
        trains = trial.plan.trains and trial.train_hash not in seen
        seen.add(trial.train_hash)
        cells = [*(trial.varied[k] for k in keys), *(str(getattr(trial.plan.config, k)) for k in fixed)]
        table.add_row(*cells, "yes" if trains else "")
    stdout().print(table)
    draw_stages([trial.plan for trial in plan.trials])


def draw_stages(plans) -> None:
    """The runs that plans begin with, in the order in which they are made or found."""
    from reason.cli.output import stdout
    from reason.engine.stages import chain

    for stage in {(s.plan.experiment, s.plan.config.seed): s for plan in plans for s in chain(plan)}.values():
        run = f"{stage.plan.experiment}, seed {stage.plan.config.seed} (used as {stage.key})"
        stdout().print(f"Runs first, unless already finished: {run}", soft_wrap=True)
