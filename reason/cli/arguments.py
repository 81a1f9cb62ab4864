"""Arguments that several verbs share, and the completion of names in the shell."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated

from typer import Argument, Option


def _runnable(incomplete: str) -> list[str]:
    from reason import registry
    from reason.engine.layers import experiments

    return [n for n in [*registry.names("methods"), *experiments()] if n.startswith(incomplete)]


def _sweepable(incomplete: str) -> list[str]:
    from reason.engine.layers import sweeps

    return [n for n in sweeps() if n.startswith(incomplete)] + _runnable(incomplete)


def _runs(incomplete: str) -> list[str]:
    from reason.tracking.folder import RunFolder

    return [r.name for r in RunFolder.all(RUNS) if r.name.startswith(incomplete)]


def _anything(incomplete: str) -> list[str]:
    return _sweepable(incomplete) + _runs(incomplete)


Name = Annotated[
    str, Argument(metavar="NAME", help="A method or a named experiment.", autocompletion=_runnable)
]
SweepName = Annotated[
    str, Argument(metavar="NAME", help="A named sweep, an experiment or a method.", autocompletion=_sweepable)
]
RunName = Annotated[
    str,
    Argument(
        metavar="RUN",
        help="A run: its folder, its name or the start of its name, or 'last'.",
        autocompletion=_runs,
    ),
]
AnyName = Annotated[
    str, Argument(metavar="NAME|RUN", help="A method, experiment, sweep or run.", autocompletion=_anything)
]
Names = Annotated[
    list[str] | None,
    Argument(
        metavar="[NAME ...]",
        help="Methods, experiments, sweeps or runs. Default: all finished runs.",
        autocompletion=_anything,
    ),
]
Overrides = Annotated[
    list[str] | None,
    Argument(metavar="[KEY=VALUE ...]", help="Configuration keys; `reason show NAME` lists them."),
]
Files = Annotated[
    list[Path] | None,
    Option("-c", metavar="FILE", help="YAML file with configuration keys; may be repeated, later files win."),
]
Gpus = Annotated[
    int | None, Option("--gpus", min=1, help="Number of GPUs; with --device cpu, number of processes.")
]
Device = Annotated[str | None, Option("--device", help="Device to run on: auto, cpu, cuda or mps.")]
Seed = Annotated[int | None, Option("--seed", help="Random seed; the same as seed=N.")]
DryRun = Annotated[bool, Option("--dry-run", help="Print the resolved configuration and exit.")]
Offline = Annotated[bool, Option("--offline", help="Do not download anything.")]
Plot = partial(Option, "--plot", metavar="FILE")  # what is drawn differs from verb to verb
RUNS = Path(os.environ.get("REASON_RUNS", "runs"))
Runs = Annotated[Path, Option("--runs", help="Folder with the runs.")]
Json = Annotated[bool, Option("--json", help="Print one JSON object to stdout.")]


def flags(gpus: int | None, device: str | None, seed: int | None, offline: bool) -> dict[str, object]:
    """The flags as dotted keys; None where unset."""
    return {
        "hardware.gpus": gpus,
        "hardware.device": device,
        "seed": seed,
        "offline": True if offline else None,
    }
