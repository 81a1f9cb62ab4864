"""Two tables for the terminal: the summary of one run, and a comparison of many. Drawn with rich.

Both fit the width there is: the least important columns go first, and a line says which.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table as RichTable
from rich.text import Text

from reason.metrics.statistics import paired_difference, smallest_p
from reason.reports import formatting
from reason.reports.frame import device, evaluation_keys, overrides, read_rows
from reason.reports.terminal import plain_table, title
from reason.tracking.folder import RunFolder

if TYPE_CHECKING:
    from reason.reports.comparison import Comparison, Entry
    from reason.tracking.result import Judged, Outcome, Result


# --- tables that fit ----------------------------------------------------------------------------


FOLDED = 20  # a column of labels may be folded to this


@dataclass
class _Column:
    """A column of a table that must fit: the highest ``rank`` is left out first."""

    head: str
    cells: list[str]
    rank: int = 0
    right: bool = True

    @property
    def width(self) -> int:
        return max(map(cell_len, (self.head, *self.cells)))


def _fitted(
    columns: Sequence[_Column], width: int, styles: Sequence[str], rules: set[int]
) -> tuple[RichTable, list[str]]:
    """A table no wider than ``width``, and the heads of the columns that found no room.

    rules: indices of rows that are followed by a line.
    """
    kept = [c for c in columns if any(c.cells)]
    dropped: list[str] = []
    while (over := sum(c.width + 2 for c in kept) - 2 - width) > 0 and any(c.rank for c in kept):
        worst = max(kept, key=lambda c: c.rank)
        if worst.rank == 1 and kept[0].width - over >= FOLDED:
            break  # labels on two lines are better than a table without what it is for
        kept.remove(worst)
        dropped.append(worst.head)
    table = plain_table(padding=(0, 1, 0, 0))  # with the box's own space: two between columns
    for i, c in enumerate(kept):
        table.add_column(Text(c.head), justify="right" if c.right else "left", no_wrap=i > 0, overflow="fold")
    for i, style in enumerate(styles):
        table.add_row(*(Text(c.cells[i]) for c in kept), style=style, end_section=i in rules)
    return table, dropped[::-1]


class _Signs(NamedTuple):
    """Signs that fall back to ASCII where the stream cannot carry others."""

    chosen: str
    better: str
    worse: str
    unclear: str

    @classmethod
    def of(cls, options: ConsoleOptions) -> _Signs:
        return cls("<", "+", "-", "~") if options.ascii_only else cls("◂", "▲", "▼", "≈")


def _spent(depth: int, mean: float | None) -> str:
    """The depth that was judged; where it was spent on demand, the mean and the cap."""
    return str(depth) if mean in (None, depth) else f"{mean:.2f} of {depth}"


# --- the summary of a run -----------------------------------------------------------------------


def run_summary(result: Result, folder: Path | str | None = None) -> Any:
    """What ``reason run`` prints at its end: one line per depth, and how to read it.

    Args:
        folder: the run folder; with it the differences between depths, and to
            the trivial baselines, are computed from the rows.
    """
    return _RunSummary(result, Path(folder) if folder is not None else None)


@dataclass
class _RunSummary:
    result: Result
    folder: Path | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        r, signs = self.result, _Signs.of(options)
        units, name = r.units, r.accuracy.name
        chosen = self._chosen()
        trained = f"trained with {r.train_depth} {units.depth}" if r.train_depth else "the base"
        trained = trained if r.training or r.trained_by else "no training"
        yield title(f"{r.experiment}: {r.method} on {r.dataset} with {r.backbone}, {trained}, seed {r.seed}")
        yield Text()
        shown = chosen or r.curve[-1]
        curve, rivals = r.curve, self._rivals(shown)
        answers: list[Outcome] = [*curve, *rivals.values()]
        blank, valid = [""] * len(rivals), [e.valid_accuracy for e in curve]
        names = [f"{n} at {shown.depth}" if len(curve) > 1 and n in shown.rivals else n for n in rivals]
        marks = [f" {signs.chosen}" if e is chosen else "" for e in curve]
        depths = [_spent(e.depth, e.effective_depth) + mark for e, mark in zip(curve, marks, strict=True)]
        columns = [
            _Column(units.depth, [*depths, *names], right=False),
            _Column(f"{name} [95%]", [formatting.interval(a.accuracy.interval) for a in answers]),
            *(self._beside(metric, answers) for metric in r.beside),
            _Column("validation", [f"{v.value:.4f}" if v else "" for v in valid] + blank, 3),
            _Column("p50 ms", [formatting.number(e.latency_p50_ms) for e in curve] + blank, 1),
            _Column("p95 ms", [formatting.number(e.latency_p95_ms) for e in curve] + blank, 5),
            _Column(units.throughput, [formatting.number(e.throughput_per_s) for e in curve] + blank, 4),
            _Column(f"MFLOP/{self._unit}", [formatting.number(self._megaflops(a)) for a in answers], 2),
        ]
        styles = ["bold" if e is chosen else "" for e in curve] + ["dim"] * len(rivals)
        table, dropped = _fitted(columns, options.max_width, styles, {len(curve) - 1} if rivals else set())
        yield table
        yield Text()
        for line in self._reading(chosen, signs, dropped):
            yield Text(line)
        yield Text()
        for command, remark in self._next():
            line = f"  {command}  # {remark}"
            yield Text(line if cell_len(line) <= options.max_width else f"  {command.rstrip()}", style="cyan")

    def _rivals(self, judged: Judged) -> dict[str, Outcome]:
        """What else answered the same examples: the rivals at that depth, and the baselines."""
        return judged.rivals | self.result.baselines

    def _beside(self, metric: str, answers: Sequence[Outcome]) -> _Column:
        """A further metric of depths and rivals."""
        found = [a.metrics.get(metric) for a in answers]
        return _Column(metric, [formatting.number(m.value, 4) if m else "" for m in found], 1)

    @property
    def _unit(self) -> str:
        """What throughput counts: "token", "user"."""
        return self.result.units.throughput.removesuffix("s/s")

    def _megaflops(self, judged: Outcome) -> float | None:
        """Operations that judging one unit took, in millions, where the method counts them."""
        cost = judged.cost
        if "flops" not in cost:
            return None
        return cost["flops"] / (cost.get(f"{self._unit}s") or judged.accuracy.n) / 1e6

    def _chosen(self) -> Judged | None:
        """The curve's entry that validation prefers (a tie goes to the shallowest), where it has a choice."""
        values = [(e.valid_accuracy.value, e) for e in self.result.curve if e.valid_accuracy]
        if len(values) < 2:
            return None
        sign = 1 if self.result.accuracy.larger_is_better else -1
        return max(values, key=lambda found: (sign * found[0], -found[1].depth))[1]

    def _reading(self, chosen: Judged | None, signs: _Signs, dropped: list[str]) -> Iterable[str]:
        r, units, name = self.result, self.result.units, self.result.accuracy.name
        explained = formatting.meaning(name, units.example)
        yield f"{name} measures accuracy" + (f": {explained}." if explained else ".")
        n = r.accuracy.n
        over = f"the {n:,} {units.example}s" if n != 1 else f"one {units.example}"
        reading = "brackets give 95% bootstrap confidence intervals."
        if smallest_p(n) >= 0.05:
            reading = "with so few examples the confidence intervals in brackets are too narrow."
        yield f"Averaged over {over} of the {r.split} split; {reading}"
        if r.curve[0].depth == 0 and r.train_depth:
            yield f"0 {units.depth} means {units.zero}."
        if chosen is not None:
            yield f"{signs.chosen} {chosen.depth} {units.depth}: the depth chosen on validation."
        for e in r.curve:
            if e.effective_depth not in (None, e.depth):
                spent = f"{e.effective_depth:.2f} of at most {e.depth} {units.depth}"
                yield f"Depth on demand: {spent} were used on average."
        yield from self._differences(chosen or r.curve[-1])
        omitted = f" Columns omitted to fit the window: {', '.join(dropped)}." if dropped else ""
        yield f"Latency is that of {units.latency} at batch size 1.{omitted}"
        yield self._cost()
        if self.folder is not None:
            yield f"Run folder: {self.folder}"

    def _differences(self, judged: Judged) -> Iterable[str]:
        """Paired differences on this run's own rows: to the least depth, to each trivial baseline."""
        if self.folder is None:
            return
        least, unit = self.result.curve[0], self.result.units.depth
        sides: dict[str, Outcome] = {f"{least.depth} {unit}": least} if judged.depth != least.depth else {}
        sides |= self._rivals(judged)
        folder = RunFolder(self.folder)
        mine = read_rows(folder, self.result, judged.rows, judged.accuracy)
        sign = 1 if judged.accuracy.larger_is_better else -1
        for name, side in sides.items():
            theirs = read_rows(folder, self.result, side.rows, side.accuracy)
            d = paired_difference({0: mine}, {0: theirs})
            verdict = "better" if sign * d.value > 0 else "worse"
            verdict = verdict if d.distinguishable else "not distinguishable"
            yield f"{judged.depth} {unit} vs. {name}: {formatting.difference(d)}, {verdict}."

    def _cost(self) -> str:
        r, m, training = self.result, self.result.metrics, self.result.training
        parts = []
        if "device_hours" in m:
            parts.append(f"{formatting.number(m['device_hours'])} device-hours")
            if r.stages and "lineage_device_hours" in m:
                lineage = formatting.number(m["lineage_device_hours"])
                parts.append(f"{lineage} including the runs it starts from")
        else:
            parts.append("not known, because events of the run were lost,")
        if r.gpus and "gpu_hours" in m:
            parts.append(f"{formatting.number(m['gpu_hours'])} GPU-hours")
        said = f"Cost: {', '.join(parts)} on {device(r)}."
        if training is not None and training.stopped == "early":
            said += f" Training stopped early, best at epoch {formatting.number(training.best_epoch)}."
        if r.trained_by:
            said += f" The model was trained by {r.trained_by}."
        return said

    def _next(self) -> list[tuple[str, str]]:
        """Commands worth trying after this run, each with a remark."""
        r, example = self.result, self.result.units.example
        name, said = r.experiment, r.experiment
        if self.folder is not None:
            trainer = self.folder.parent / (r.trained_by or self.folder.name)
            typed = overrides(RunFolder(trainer if trainer.is_dir() else self.folder))
            said = " ".join([name, *(w for w in typed if w.split("=")[0] not in evaluation_keys(r.method))])
        depths = [judged.depth for judged in r.curve]
        varied = ",".join(map(str, depths if len(depths) > 1 else range(r.units.least, r.train_depth + 1)))
        commands = []
        if r.train_depth and (r.training or r.trained_by):
            commands.append((f"reason run {said} train_depth=0", "the base, trained without the method"))
        if r.train_depth:
            seeded = f"reason sweep {said} depth={varied} seed=0..2"
            commands.append((seeded, "three seeds, to tell gain from luck"))
        commands.append((f"reason compare {name}", "compare its runs"))
        commands.append((f"reason inspect {r.run}", f"one {example}, step by step"))
        commands.append(("reason ui", "all runs in MLflow"))
        width = max(len(command) for command, _ in commands)
        return [(f"{command:<{width}}", remark) for command, remark in commands]


# --- a comparison -------------------------------------------------------------------------------


def heading(t: Comparison) -> Text:
    """What a comparison, or a study of it, is about."""
    over = f"{t.split} split, {t.n:,} {t.units.example}s"
    return title(f"{t.accuracy} on {t.dataset}, {over}. Depth: {', '.join(t.depth_units)}")


def comparison(table: Comparison) -> Any:
    """A comparison as a table with its legend."""
    return _ComparisonView(table)


@dataclass
class _ComparisonView:
    table: Comparison

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        t, signs = self.table, _Signs.of(options)
        entries = t.entries
        labels = [
            "" if i and _series(entries[i - 1]) == _series(e) and e.kind != "baseline" else e.label
            for i, e in enumerate(entries)
        ]
        yield heading(t)
        yield Text()
        columns = [
            _Column("", labels, right=False),
            _Column("depth", [self._depth(e, signs) for e in entries]),
            _Column(f"{t.accuracy} [95%]", [formatting.interval(e.accuracy) for e in entries]),
            _Column("difference [95%]", [self._difference(e, signs) for e in entries], 1, right=False),
            _Column("seeds", [str(len(e.points)) if e.points else "" for e in entries], 5),
            _Column("p", [formatting.probability(e.p) for e in entries], 6),
            _Column("validation", [f"{e.valid.value:.4f}" if e.valid else "" for e in entries], 7),
            _Column("p50 ms", [formatting.number(e.costs.get("latency_p50_ms")) for e in entries], 3),
            _Column("p95 ms", [formatting.number(e.costs.get("latency_p95_ms")) for e in entries], 9),
            _Column("hours", [formatting.number(e.costs.get("device_hours")) for e in entries], 4),
            _Column(
                t.units.throughput, [formatting.number(e.costs.get("throughput_per_s")) for e in entries], 10
            ),
            _Column("Pareto", [" ".join(_SHORT[c] for c in e.fronts) for e in entries], 8, right=False),
        ]
        if not t.one_device:
            devices = ["; ".join(sorted({p.device for p in e.points})) for e in entries]
            columns.append(_Column("device", devices, 2))
        colours = {"base": "cyan", "baseline": "dim"}
        styles = [colours.get(e.kind, "bold" if e.chosen else "") for e in entries]
        rules = {i for i in range(len(entries) - 1) if _series(entries[i]) != _series(entries[i + 1])}
        drawn, dropped = _fitted(columns, options.max_width, styles, rules)
        yield drawn
        yield Text()
        for line in self._legend(signs, dropped):
            yield Text(line)

    def _depth(self, e: Entry, signs: _Signs) -> str:
        if e.depth is None:
            return ""
        depth = _spent(e.depth, e.costs.get("effective_depth"))
        return f"{signs.chosen} {depth}" if e.chosen else depth

    def _difference(self, e: Entry, signs: _Signs) -> str:
        if e.difference is None:
            return ""
        better = (e.difference.value > 0) == self.table.larger_is_better
        mark = (signs.better if better else signs.worse) if e.distinguishable else signs.unclear
        return f"{formatting.difference(e.difference)} {mark}"

    def _legend(self, signs: _Signs, dropped: list[str]) -> Iterable[str]:
        t = self.table
        compared = [e for e in t.entries if e.difference is not None]
        if compared:
            references = list(dict.fromkeys(e.reference for e in compared if e.kind != "rival"))
            if any(e.kind == "rival" for e in compared):
                references.append("(rivals) their method at the same depth")
            seeds = sorted({e.difference.seeds for e in compared if e.difference})
            over = f"{t.n:,} {t.units.example}s and {_span(seeds)}"
            yield f"difference: from {' or '.join(references)}, paired over {over}."
            tests = f" after Holm's correction for {len(compared)} tests" if len(compared) > 1 else ""
            yield f"{signs.better} better, {signs.worse} worse, {signs.unclear} not distinguishable at p < 0.05{tests}."
            if seeds == [1]:
                yield "With one seed the intervals cover variation between examples only; use at least three seeds to include training noise."
        if any(e.chosen for e in t.entries):
            yield f"{signs.chosen} the depth chosen on validation."
        if "hours" not in dropped and any("device_hours" in e.costs for e in t.entries):
            yield "hours: device-hours per run, training included."
        if any(e.fronts for e in t.entries) and "Pareto" not in dropped:
            yield "Pareto: nothing else is as accurate at a lower latency (ms) or for fewer device-hours (h)."
        if dropped:
            yield f"Columns omitted to fit the window: {', '.join(dropped)}. Widen it, or use --csv."


_SHORT = {"device_hours": "h", "latency_p50_ms": "ms"}


def _span(seeds: list[int]) -> str:
    """[1] -> "1 seed", [1, 3] -> "1 to 3 seeds"."""
    return " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1])))) + f" seed{'s' * (seeds != [1])}"


def _series(e: Entry) -> tuple:
    return (e.kind, e.key.family if e.key else ())
