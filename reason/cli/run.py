"""`reason run`: execute a method or a named experiment."""

from __future__ import annotations

from reason.cli.arguments import Device, DryRun, Files, Gpus, Name, Offline, Overrides, Seed, flags


def run(
    name: Name, overrides: Overrides = None, c: Files = None, gpus: Gpus = None, device: Device = None,
    seed: Seed = None, dry_run: DryRun = False, offline: Offline = False,
) -> None:  # fmt: skip
    """Train a model, evaluate it at every depth, log to MLflow and print the results.

    Example: reason run latent depth=3 train.epochs=10 --seed 1
    """
    from reason.engine.config import resolve

    plan = resolve(name, overrides or [], files=c or [], flags=flags(gpus, device, seed, offline))
    if dry_run:
        from reason.cli.show import draw_plan
        from reason.cli.sweep import draw_stages

        draw_plan(plan, origin=True)
        draw_stages([plan])
        draw_estimate(plan)
        return
    from reason.engine import runner

    draw_result(runner.run(plan))


def draw_estimate(plan) -> None:
    """What the run will cost, as far as that is known."""
    from reason.cli.output import stdout
    from reason.engine.estimate import estimate

    for line in estimate(plan):
        stdout().print(line, soft_wrap=True)


def draw_result(folder) -> None:
    """The closing table of a run, on stdout."""
    from reason.cli.output import stdout
    from reason.reports.summaries import run_summary

    stdout().print(run_summary(folder.result, folder.path))
