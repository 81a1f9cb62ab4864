"""From run folders to frames: sets of runs whose numbers may stand in one table.

Reads ``result.json``, ``config.yaml`` and ``run.json`` and nothing else; knows no method, only the
numbers that all of them report. What may not be ranked together (another accuracy, other data,
other units) never meets in one frame. The statistics are ``reason.reports.comparison``'s.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from reason.errors import ConfigError, DamagedRun, ReasonError, RunError, unknown
from reason.files import Altered, check_content
from reason.keys import marked, walk
from reason.tracking.folder import RunFolder
from reason.tracking.overview import Overview, overviews
from reason.tracking.result import Judged, Measure, Outcome, Result

if TYPE_CHECKING:
    import numpy as np

    from reason.metrics.statistics import ExampleScores

# Configuration keys that do not tell two configurations of one method apart: they stand in columns
# of their own, or say where and how long a run was executed and judged rather than what it was.
_NOT_SETTINGS = {"method", "depth", "train_depth", "seed", "runs", "offline", "backbone.name"}
_NOT_SETTINGS |= {"eval.curve", "eval.limit", "eval.latency_samples", "eval.resamples"}
_NOT_SETTINGS_UNDER = ("hardware.", "dataset.")  # the data digest speaks for the dataset


@dataclass(frozen=True)
class Point:
    """One run judged at one depth: an entry of a run's curve, or a rival's outcome there."""

    folder: RunFolder
    result: Result
    entry: Outcome
    depth: int
    config: dict[str, Any]  # dotted keys
    parent: str | None = None  # folder name of the sweep that it is a trial of
    rival: str = ""  # the rival whose outcome on the same examples this is; "" = the method's own
    # What ``rows`` has read.
    outcomes: dict[tuple, ExampleScores] = field(default_factory=dict, compare=False, repr=False)

    @property
    def run(self) -> str:
        return self.folder.name

    @property
    def seed(self) -> int:
        return self.result.seed

    @property
    def judged(self) -> Judged | None:
        """The entry of the method itself, with its times; None for a rival."""
        return self.entry if isinstance(self.entry, Judged) else None

    @property
    def train_depth(self) -> int:
        return self.result.train_depth

    @property
    def device(self) -> str:
        """What the times were taken on; times of different devices are not compared."""
        return device(self.result)

    @property
    def device_hours(self) -> float | None:
        """Hours that it took to have this model and these numbers: with the training of a model that was taken
        over, and with the stages that it stands on."""
        metrics = self.result.metrics
        own = metrics.get("lineage_device_hours", metrics.get("device_hours"))
        if own is None or "lineage_device_hours" in metrics or not self.result.trained_by:
            return own
        return own + metrics.get("train_device_hours", 0.0)  # a run of before stages had hours

    def rows(self, of: Measure, path: str) -> ExampleScores:
        """The per-example outcome behind the accuracy ``of``, from ``path`` in the run folder.

        Raises:
            RunError: the file is missing or lacks a column.
        """
        key = (path, of.column, of.denominator)
        if key not in self.outcomes:
            self.outcomes[key] = read_rows(self.folder, self.result, path, of)
        return self.outcomes[key]


def device(result: Result) -> str:
    """The device of a run by its name; on CPU with the threads of each process."""
    name, threads = result.device_name or result.device, result.threads
    if result.device != "cpu" or not threads:
        return name
    return f"{name}, {threads} thread{'s' * (threads != 1)}"


@dataclass(frozen=True)
class Key:
    """What runs of one group share: they differ in the seed alone."""

    experiment: str
    method: str
    backbone: str
    dataset: str
    train_depth: int
    depth: int
    settings: tuple[tuple[str, str], ...] = ()
    rival: str = ""  # as of ``Point``

    @property
    def family(self) -> tuple:
        """The key without its depth: the points of one curve."""
        same = (self.experiment, self.method, self.backbone, self.dataset, self.train_depth, self.settings)
        return (*same, self.rival)

    @property
    def trained(self) -> tuple[tuple[str, str], ...]:
        """The settings that shape the model; the others say how it is judged."""
        judging = evaluation_keys(self.method)
        return tuple((name, value) for name, value in self.settings if name not in judging)


def evaluation_keys(method: str) -> frozenset[str]:
    """The dotted keys of a method that shape how a model is judged and not the model."""
    return marked_keys(method, "evaluation")


@functools.cache
def marked_keys(method: str, mark: Literal["evaluation", "aside"]) -> frozenset[str]:
    """The dotted keys of a method that carry a mark (``reason.keys.key``)."""
    from reason import registry

    try:
        Config = registry.card("methods", method).Config
    except ReasonError:  # its package is no longer installed
        return frozenset()
    return frozenset(marked(Config, mark, f"{method}."))


@functools.cache
def defaults(method: str) -> dict[str, Any]:
    """The keys of a method at their defaults: what a run was made with that is older than them."""
    from reason import registry

    try:
        card = registry.card("methods", method)
    except ReasonError:  # its package is no longer installed
        return {}
    preset = {k: v for k, v in card.preset.items() if k.startswith(f"{method}.")}
    config = card.Config()
    return {f"{method}.{k.name}": attrgetter(k.name)(config) for k in walk(card.Config)} | preset


@dataclass
class Frame:
    """Runs that may be ranked together, grouped over seeds. Seeds ascend in each group."""

    what: dict[str, Any]  # what all of them share: accuracy, data_digest, split, examples, units
    groups: dict[Key, list[Point]]
    notes: list[str] = field(default_factory=list)

    @cached_property
    def points(self) -> list[Point]:
        return [point for group in self.groups.values() for point in group]


def frames(root: Path | str, names: Sequence[str] = ()) -> list[Frame]:
    """The finished runs under ``root``, as sets that may be ranked.

    Args:
        names: methods, experiments, runs or sweeps, in any mixture; none means every run.
    Returns:
        Without names, or with one, a frame for each set of runs that can be ranked, the newest first. With
        several names exactly one: they are to stand side by side.
    Raises:
        ConfigError: a name that fits nothing, nothing finished, or named runs that cannot be
            ranked together (it says which runs differ in what).
    """
    runs = overviews(root)
    finished = [run for run in runs if run.kind == "run" and run.finished]
    chosen = select(runs, names, root) if names else finished
    points, notes = read(chosen)
    told = {run.name for run in chosen}
    notes[:0] = [note for run in runs if run.name not in told and (note := _omitted(run))]
    if not points:
        raise ConfigError(
            f"There are no finished runs under {Path(root)}." + ("".join(f"\n{note}" for note in notes)),
            "Start one with `reason run latent`; `reason list runs` lists all runs.",
        )
    sets: dict[str, list[Point]] = {}
    for point in points:
        sets.setdefault(json.dumps(footing(point), sort_keys=True), []).append(point)
    if len(names) > 1 and len(sets) > 1:
        raise _not_comparable(list(sets.values()))
    ordered = sorted(sets.values(), key=lambda s: -max(p.result.created for p in s))
    found = [_grouped(members) for members in ordered]
    for frame in found:
        frame.notes[:0] = notes
    return found


def read(runs: Sequence[Overview]) -> tuple[list[Point], list[str]]:
    """The points of finished runs, and a note on each run that had to be left out."""
    points, notes = [], []
    for run in runs:
        try:
            points += _points(run.folder)
        except DamagedRun as error:
            notes.append(_left_out(run.name, error))
            continue
        try:
            _ = run.folder.origin
        except DamagedRun as error:
            notes.append(f"{error.message} Suggested commands leave its settings out. {error.hint}")
    points, unreadable = _with_rows(points)
    return points, notes + unreadable


def _omitted(run: Overview) -> str:
    """The note on a run whose results cannot be read; "" where they can."""
    if run.problem is None or run.kind == "sweep":
        return ""
    try:
        _points(run.folder)
    except DamagedRun as error:
        return _left_out(run.name, error)
    return ""


def _left_out(run: str, error: RunError) -> str:
    if isinstance(error, DamagedRun):
        return f"{run} is omitted: {error.file} {error.what}. {error.mend}"
    return f"{run} is omitted: {error.message} {error.hint}".rstrip()


def _with_rows(points: Sequence[Point]) -> tuple[list[Point], list[str]]:
    """The points of the runs whose rows can all be read, and a note on each run that is left out for its rows."""
    problems: dict[Path, str] = {}
    seen: set[Path] = set()
    for point in points:
        where = point.folder.path
        if where in problems:
            continue
        try:
            point.rows(point.entry.accuracy, point.entry.rows)
            if point.entry.valid_accuracy and point.entry.valid_rows:
                point.rows(point.entry.valid_accuracy, point.entry.valid_rows)
            baselines = point.result.baselines.values() if where not in seen else ()
            seen.add(where)
            for baseline in baselines:
                if (point.folder / baseline.rows).is_file():  # a comparison does without those that are gone
                    point.rows(baseline.accuracy, baseline.rows)
        except RunError as error:
            problems[where] = _left_out(point.run, error)
    return [p for p in points if p.folder.path not in problems], list(problems.values())


def _points(folder: RunFolder) -> list[Point]:
    if folder.identity["kind"] == "sweep" or (result := folder.result) is None:
        return []
    config = defaults(result.method) | dict(_flat(folder.config))
    parent = folder.identity["parent"]
    own = [(judged, "", judged) for judged in result.curve]
    rivals = [(judged, name, outcome) for judged in result.curve for name, outcome in judged.rivals.items()]
    return [Point(folder, result, o, j.depth, config, parent, name) for j, name, o in [*own, *rivals]]


def read_rows(folder: RunFolder, result: Result, path: str, measure: Measure) -> ExampleScores:
    """The columns ``id`` and those that ``measure`` names, from an Arrow file of rows.

    Kept evidence has no ids: its rows are sorted by them, so a row's number stands for its id.

    Raises:
        RunError: the file cannot be read, lacks a column or is not what ``result`` was read from.
    """
    import numpy as np

    from reason.metrics.statistics import ExampleScores

    up, down = measure.column, measure.denominator
    read = read_columns(folder, result, path, {"id", up, *([down] if down else [])})
    if missing := [c for c in (up, down) if c and c not in read]:
        raise _no_rows(folder, path, f"has no column {missing[0]}")
    above, below = (np.asarray(read[c], dtype=float) if c else None for c in (up, down))
    assert above is not None
    return ExampleScores(read.get("id", np.arange(len(above))), above, below)


def read_columns(folder: RunFolder, result: Result, path: str, names: set[str]) -> dict[str, np.ndarray]:
    """Those columns called ``names`` that a file of rows has.

    Raises:
        RunError: the file cannot be read, or is not what ``result`` was read from.
    """
    import numpy as np
    import pyarrow as pa
    from pyarrow import feather

    try:
        if (whole := result.files.get(path)) is not None:
            check_content(folder / path, whole)
        with pa.ipc.open_file(str(folder / path)) as file:
            there = [n for n in file.schema.names if n in names]
        table = feather.read_table(folder / path, columns=there) if there else None
        found = {n: table.column(n) for n in there} if table else {}
        return {n: np.array(c.to_pylist()) if n == "id" else c.to_numpy() for n, c in found.items()}
    except Altered as error:
        raise _no_rows(folder, path, str(error)) from error
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise _no_rows(folder, path, f"is not a table of rows: {str(error).rstrip('.')}") from error


def _no_rows(folder: RunFolder, path: str, what: str) -> RunError:
    return DamagedRun(folder.name, path, what, f"Make it again with: reason resume {folder.path}")


# --- choosing -----------------------------------------------------------------------------------


def select(runs: Sequence[Overview], names: Sequence[str], root: Path | str) -> list[Overview]:
    """The finished runs that ``names`` mean, each once. A name is tried as experiment, method, sweep, run.

    Raises:
        ConfigError: a name that means nothing, or nothing that is finished.
    """
    chosen: dict[str, Overview] = {}
    for name in names:
        found = _called(name, runs)
        if not found:
            try:
                folder = RunFolder.find(name, root)  # a path, or the beginning of a name
            except ConfigError as error:
                raise _nothing_called(name, runs, error) from error
            found = _called(folder.name, runs)
            if not found:
                if problem := folder.problem:
                    raise problem
                wrong = f"{folder.name} is {folder.status} and has no results yet."
                raise ConfigError(wrong, folder.unfinished)
        chosen |= {run.name: run for run in found}
    return list(chosen.values())


def _called(name: str, runs: Sequence[Overview]) -> list[Overview]:
    """The finished runs of the experiment, method, sweep or run of exactly that name.

    A sweep's trials are its children and the runs that it found finished when it came to them.
    """
    sweeps = {run.name: run for run in runs if run.kind == "sweep" and name in (run.name, run.experiment)}
    trials: set[str] = set()
    for sweep in sweeps.values():
        with contextlib.suppress(DamagedRun):  # its own trials are known without its result
            result = sweep.folder.sweep_result
            trials |= {t.run for t in result.trials if t.run} if result else set()
    return [
        run for run in runs
        if (name in (run.experiment, run.method, run.name) or run.name in trials or run.parent in sweeps)
        and _has_results(run)
    ]  # fmt: skip


def _has_results(run: Overview) -> bool:
    return run.kind == "run" and run.finished and not _omitted(run)


def _nothing_called(name: str, runs: Sequence[Overview], error: ConfigError) -> ConfigError:
    from reason import registry

    if name in registry.names("methods"):
        return ConfigError(f"{name!r} has no finished runs.", f"Start one with: reason run {name}")
    if "beginning of" in error.message:  # several runs begin like that: the folder's answer is better
        return error
    finished = [run for run in runs if _has_results(run)]
    known = {name for run in finished for name in (run.experiment, run.method, run.name, run.parent) if name}
    return unknown("method, experiment, run or sweep", name, known)


def footing(point: Point) -> dict[str, Any]:
    """What must agree before numbers may be ranked, under the names that people know."""
    units, accuracy = point.result.units, point.result.accuracy
    return {
        "accuracy": accuracy.name,
        "data digest": point.result.data_digest,
        "split": point.result.split,
        "number of examples": accuracy.n,
        "unit of an example": units.example,
        "unit of latency": units.latency,
        "unit of throughput": units.throughput,
    }


def _not_comparable(sets: list[list[Point]]) -> ConfigError:
    whats = [footing(members[0]) for members in sets]
    lines = []
    for field_name in whats[0]:
        values: dict[str, list[str]] = {}
        for what, members in zip(whats, sets, strict=True):
            values.setdefault(str(what[field_name]), []).extend(p.run for p in members)
        if len(values) > 1:
            sides = "; ".join(f"{value} ({_few(runs)})" for value, runs in values.items())
            lines.append(f"  {field_name}: {sides}")
    return ConfigError(
        "These runs cannot be compared in one table. They differ in:\n" + "\n".join(lines),
        "Name runs that agree in these, or give one name or none for a table per comparable set.",
    )


def _few(runs: Iterable[str], most: int = 3) -> str:
    unique = list(dict.fromkeys(runs))
    return ", ".join(unique[:most]) + (f" and {len(unique) - most} more" if len(unique) > most else "")


# --- grouping -----------------------------------------------------------------------------------


def _grouped(points: list[Point]) -> Frame:
    """Group over seeds. Of repeats of one configuration and seed the newest counts."""
    newest: dict[tuple[str, int, int, str], Point] = {}
    for point in sorted(points, key=lambda p: (p.result.created, p.run)):
        newest[point.result.config_hash, point.seed, point.depth, point.rival] = point
    differing = _differing_settings(list(newest.values()))
    members: dict[tuple[Key, int], Point] = {}
    for point in newest.values():  # oldest first, so the newest stays
        members[_key(point, differing), point.seed] = point
    left_out = sorted({p.run for p in points} - {p.run for p in members.values()})
    notes = [f"Only the newest of repeated runs is used; omitted: {_few(left_out)}."] if left_out else []
    groups: dict[Key, list[Point]] = {}
    for (key, _), point in sorted(members.items(), key=lambda m: (m[0][0].family, m[0][0].depth, m[0][1])):
        groups.setdefault(key, []).append(point)
    return Frame(footing(points[0]), groups, notes)


def _key(point: Point, differing: dict[tuple[str, str], list[str]]) -> Key:
    r = point.result
    settings = tuple((k, str(point.config.get(k))) for k in differing[r.method, r.backbone])
    known = (r.experiment, r.method, r.backbone, r.dataset, r.train_depth)
    return Key(*known, point.depth, settings, point.rival)


def _differing_settings(points: list[Point]) -> dict[tuple[str, str], list[str]]:
    """For each method and backbone, the configuration keys that are not the same in all runs."""
    seen: dict[tuple[str, str], dict[str, set[str]]] = {}
    for point in points:
        here = seen.setdefault((point.result.method, point.result.backbone), {})
        aside = marked_keys(point.result.method, "aside")
        for key, value in point.config.items():
            if key not in _NOT_SETTINGS | aside and not key.startswith(_NOT_SETTINGS_UNDER):
                here.setdefault(key, set()).add(str(value))
    return {who: sorted(k for k, values in keys.items() if len(values) > 1) for who, keys in seen.items()}


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        yield from _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]


def overrides(folder: RunFolder) -> list[str]:
    """The words ``key=value`` that repeat a run from its experiment, but for depth, seed and device.

    They are those that were typed, and the dataset where it is not the default.
    """
    try:
        origin, config = folder.origin, dict(_flat(folder.config))
    except DamagedRun:
        return []
    skip = ("depth", "train_depth", "seed", "runs", "hardware.")
    typed = [k for k, where in origin.items() if where == "command line" and not k.startswith(skip)]
    values = {k: str(config[k]).lower() if isinstance(config[k], bool) else config[k] for k in typed}
    words = [f"{k.removesuffix('.name')}={value}" for k, value in values.items()]
    if "dataset.name" not in typed and origin.get("dataset.name", "default") != "default":
        words.insert(0, f"dataset={config['dataset.name']}")
    return [shlex.quote(word) for word in words]
