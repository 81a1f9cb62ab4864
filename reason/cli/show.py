"""`reason show`: explain a method, an experiment, a sweep or a run, key by key."""

from __future__ import annotations

from typing import Annotated

import typer

from reason.cli.arguments import RUNS, AnyName, Files, Json, Overrides, Runs


def show(
    name: AnyName,
    overrides: Overrides = None,
    c: Files = None,
    origin: Annotated[bool, typer.Option("--origin", help="Also show which layer set each key.")] = False,
    json: Json = False,
    runs: Runs = RUNS,
) -> None:
    """Show every configuration key with its value and meaning; for a run, also its results."""
    import dataclasses

    from reason import registry
    from reason.cli.output import emit_json, say, stdout
    from reason.engine import config, layers
    from reason.errors import ConfigError
    from reason.tracking.folder import RunFolder

    if name in layers.sweeps():
        from reason.cli.sweep import draw_plan as draw_sweep_plan
        from reason.engine.sweep import plan_sweep

        sweep = plan_sweep(name, overrides or [], files=c or [])
        if json:
            trials = [{"varied": t.varied, "config": t.plan.flat} for t in sweep.trials]
            emit_json({"sweep": name, "trials": trials})
        else:
            draw_sweep_plan(sweep)
        return
    if name in registry.names("methods") or name in layers.experiments() or not _is_run(name, runs):
        plan = config.resolve(name, overrides or [], files=c or [])
        if json:
            told = {"experiment": plan.experiment, "config": dataclasses.asdict(plan.config)}
            emit_json(told | {"origin": plan.origin, "written": plan.written})
        else:
            _draw_card(plan)
            draw_plan(plan, origin)
        return
    folder = RunFolder.find(name, runs)
    if overrides or c:
        raise ConfigError(
            f"{folder.name} is a recorded run; its configuration cannot be changed.",
            f"To evaluate its model with other settings: reason evaluate {folder.name} KEY=VALUE",
        )
    is_sweep = folder.identity["kind"] == "sweep"
    if problem := folder.problem:
        say(f"warning: {problem.message} {problem.hint}")
    if not is_sweep and not json:
        from reason.engine.session import recorded_plan

        plan = recorded_plan(folder)
        plan.origin = folder.origin
        draw_plan(plan, origin)
    result = folder.sweep_result if is_sweep else folder.result
    if json:
        from reason.tracking.result import to_json

        told = {"run": folder.name, "status": folder.status, **folder.identity}
        emit_json(told | {"result": to_json(result) if result else None})
    elif not result:
        stdout().print(f"{folder.name} is {folder.status}. {folder.unfinished}")
    elif is_sweep:
        from reason.cli.sweep import draw_sweep

        draw_sweep(folder)
    else:
        from reason.cli.run import draw_result

        draw_result(folder)


def _is_run(name: str, runs) -> bool:
    from pathlib import Path

    from reason.tracking.folder import RunFolder

    known = name == "last" or (Path(name) / "run.json").exists()
    return known or any(r.name.startswith(name) for r in RunFolder.all(runs))


def _draw_card(plan) -> None:
    from rich.text import Text

    from reason.cli.output import stdout

    card = plan.card
    lines = [
        f"{card.name}  {card.summary}",
        f"paper: {card.paper}",
        f"depth: {card.depth.unit}, {card.depth.least} or more ({card.depth.least} means {card.depth.zero})",
        f"accuracy: {card.units.accuracy} per {card.units.example}; latency per {card.units.latency.removeprefix('one ')}; throughput in {card.units.throughput}",
    ]
    text = Text("\n".join(lines))
    text.stylize("bold", 0, len(card.name))
    stdout().print(text, soft_wrap=True)


def draw_plan(plan, origin: bool = False) -> None:
    """Every key of a resolved plan: value (and the interpolation it came from), layer that set it, meaning."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from reason.cli.output import stdout
    from reason.keys import walk

    title = f"{plan.experiment}: resolved configuration"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("key", no_wrap=True)
    table.add_column("value", overflow="fold", max_width=28)
    if origin:
        table.add_column("set by", overflow="fold", max_width=24)
    table.add_column("meaning", overflow="fold")
    for key in walk(type(plan.config)):
        layer = plan.origin.get(key.name, "default")
        shown = Text(_spelled(plan.flat[key.name]), style="" if layer == "default" else "bold")
        if key.name in plan.written:
            shown.append(f"\n= {_spelled(plan.written[key.name])}", style="dim not bold")
        table.add_row(key.name, shown, *([Text(layer)] if origin else []), Text(key.meaning))
    stdout().print(table)
    depths = ", ".join(map(str, plan.depths))
    trained = f"; trained at depth {plan.config.train_depth}" if plan.trains else ""
    stdout().print(f"Evaluated at depth {depths}{trained}.")


def _spelled(value) -> str:
    """A value as it would be typed."""
    if isinstance(value, list):
        return ",".join(map(_spelled, value))
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
