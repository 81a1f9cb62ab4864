"""What depth brings on the whole: every depth trained for by every depth judged at, and the answer in one line."""

from __future__ import annotations

from dataclasses import dataclass, field

from reason.metrics.statistics import Interval
from reason.reports.study.models import Evidence, Model, Outcome, Tested, compared, tested


@dataclass
class Cell:
    """A model at a depth, over its seeds."""

    accuracy: Interval
    valid: float | None
    chosen: bool  # by validation, in its line
    best: bool  # by validation, in its series: over all that was trained of one configuration
    ms: float | None
    means: dict[str, float]  # of the columns in MEANS
    overall: dict[str, float]  # of the evaluation as a whole


@dataclass
class Line:
    """One trained configuration: a line of the triangle."""

    label: str
    train_depth: int
    base: bool
    seeds: list[int]
    cells: dict[int, Cell] = field(default_factory=dict)  # depth -> cell


@dataclass
class Answer:
    """A model at its deep depth against the base and against itself without depth."""

    model: str
    train_depth: int
    deep: int
    deep_is: str
    least: int
    to_base: Tested | None
    to_least: Tested | None
    ms_base: float | None  # null where times come from several kinds of device
    ms_least: float | None
    ms_deep: float | None


def triangle(evidence: Evidence) -> list[Line]:
    """Bases first, then each model by configuration and the depth it was trained for."""
    lines = [_line(b.label, {b.depth: b}, True, 0) for b in evidence.bases]
    series: dict[tuple, list[tuple[float, int, Line, int]]] = {}
    for model in sorted(evidence.models, key=lambda m: (_series(m), m.train_depth)):
        line = _line(model.label, model.depths, False, model.train_depth)
        if model.chosen is not None:
            line.cells[model.chosen].chosen = True
        for depth, cell in line.cells.items():
            if cell.valid is not None:
                rank = (evidence.sign * cell.valid, -depth, line, depth)
                series.setdefault(_series(model), []).append(rank)
        lines.append(line)
    for ranks in series.values():
        if len({id(line) for _, _, line, _ in ranks}) > 1:
            _, _, line, depth = max(ranks, key=lambda r: r[:2])
            line.cells[depth].best = True
    return lines


def _series(model: Model) -> tuple:
    """What models that differ only in the depth they were trained for have in common."""
    k = model.key
    return (k.experiment, k.method, k.backbone, k.dataset, k.settings)


def _line(label: str, depths: dict[int, Outcome], base: bool, train_depth: int) -> Line:
    seeds = sorted(set().union(*(o.rows for o in depths.values())))
    cells = {d: _cell(o) for d, o in depths.items()}
    return Line(label, train_depth, base, seeds, cells)


def _cell(o: Outcome) -> Cell:
    valid = o.entry.valid.value if o.entry.valid else None
    return Cell(o.entry.accuracy, valid, False, False, o.ms, o.means, o.overall)


def answers(evidence: Evidence) -> list[Answer]:
    """Each model's deep depth against its base and its least depth; p over all of these together."""
    pairs: list[tuple[Model, Outcome | None]] = []
    for model in evidence.models:
        least = model.depths[model.least] if model.deep > model.least else None
        pairs += [(model, model.base), (model, least)]
    # each by itself: the same resamples, and so to the last digit the same intervals, as `reason compare`
    found = tested([compared([(m.depths[m.deep].rows, b.rows) if b else None])[0] for m, b in pairs])
    told = []
    for i, model in enumerate(evidence.models):
        timed = evidence.table.one_device
        told.append(
            Answer(
                model.label, model.train_depth, model.deep, model.deep_is, model.least,
                to_base=found[2 * i],
                to_least=found[2 * i + 1],
                ms_base=model.base.ms if model.base and timed else None,
                ms_least=model.depths[model.least].ms if timed else None,
                ms_deep=model.depths[model.deep].ms if timed else None,
            )
        )  # fmt: skip
    return told
