"""Two tables for the terminal: the summary of one run, and a comparison of many. Drawn with rich.

Both fit the width there is: the least important columns go first, and a line says which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table as RichTable
from rich.text import Text

from reason.metrics.statistics import holm, paired_difference, paired_differences, smallest_p
from reason.reports import formatting
from reason.reports.comparison import ALPHA, varies
from reason.reports.frame import device, evaluation_keys, overrides, read_rows
from reason.reports.terminal import plain_table, title
from reason.tracking.folder import RunFolder
from reason.tracking.result import Judged, Outcome

if TYPE_CHECKING:
    from reason.metrics.statistics import Difference, ExampleScores
    from reason.reports.comparison import Comparison, Entry
    from reason.tracking.result import Result


# --- tables that fit ----------------------------------------------------------------------------


FOLDED = 20  # a column of labels may be folded to this
WORTH_FOLDING = 3  # for columns up to this rank


@dataclass
class _Column:
    """A column of a table that must fit: the highest ``rank`` is left out first. A head may have two lines."""

    head: str
    cells: list[str]
    rank: int = 0
    right: bool = True

    @property
    def width(self) -> int:
        return max(map(cell_len, (*self.head.splitlines(), *self.cells)), default=0)

    @property
    def name(self) -> str:
        """The head on one line."""
        return self.head.replace("\n", "")


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
        if worst.rank <= WORTH_FOLDING and kept[0].width - over >= FOLDED:
            break  # labels on two lines are better than a table without what it is for
        kept.remove(worst)
        dropped.append(worst.name)
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


def _verdict(d: Difference, p: float | None, larger_is_better: bool, signs: _Signs) -> str:
    """A difference with the sign of what it shows; one that is no test (a bound's) has none."""
    if p is None:
        return formatting.difference(d)
    better = (d.value > 0) == larger_is_better
    clear = d.distinguishable and p < ALPHA
    return (
        f"{formatting.difference(d)} {(signs.better if better else signs.worse) if clear else signs.unclear}"
    )


def _amount(depth: int, unit: str) -> str:
    """2 -> "2 particles"."""
    return f"{depth} {unit.removesuffix('s') if depth == 1 else unit}"


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


class _Line(NamedTuple):
    """A line of the table: an outcome; without one the heading of a section."""

    label: str
    outcome: Outcome | None
    section: str
    style: str


Differences = dict[int, tuple["Difference", float | None]]
"""By id of an outcome, with p after Holm's correction; None where it is no test."""


@dataclass
class _RunSummary:
    result: Result
    folder: Path | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        r, signs = self.result, _Signs.of(options)
        units, name, larger = r.units, r.accuracy.name, r.accuracy.larger_is_better
        chosen = self._chosen()
        trained = f"trained with {_amount(r.train_depth, units.depth)}" if r.train_depth else "the base"
        trained = trained if r.training or r.trained_by else "no training"
        yield title(f"{r.experiment}: {r.method} on {r.dataset} with {r.backbone}, {trained}, seed {r.seed}")
        yield Text()
        # Rivals stand beside the run's own depth: it is what was asked for, and what MLflow shows of them.
        shown = r.head if r.head.rivals else chosen or r.curve[-1]
        lines = self._lines(shown, chosen, signs)
        answers = [line.outcome for line in lines]
        judged = [a if isinstance(a, Judged) else None for a in answers]
        differences = self._differences(shown) if shown.rivals else {}
        told = [differences.get(id(a)) for a in answers]
        valid = [j and j.valid_accuracy for j in judged]
        break_ = "\n" if self._spent else ""
        columns = [
            _Column(units.depth, [line.label for line in lines], right=False),
            _Column(
                f"{name} [95%]", [formatting.interval(a.accuracy.interval) if a else "" for a in answers]
            ),
            _Column(
                "difference [95%]", [_verdict(*d, larger, signs) if d else "" for d in told], 1, right=False
            ),
            *(self._beside(metric, answers) for metric in r.beside),
            _Column("validation", [f"{v.value:.4f}" if v else "" for v in valid], 6),
            _Column(f"tokens/{break_}{units.example}", self._each(answers, self._tokens), 3),
            _Column("p50 ms", self._each(answers, lambda a: a.latency_p50_ms), 2),
            _Column("p95 ms", self._each(judged, lambda j: j.latency_p95_ms), 8),
            _Column(units.throughput, self._each(judged, lambda j: j.throughput_per_s), 7),
            _Column(f"MFLOP/{break_}{self._unit}", self._each(answers, self._megaflops), 4),
        ]
        rules = {i for i in range(len(lines) - 1) if lines[i].section != lines[i + 1].section}
        table, dropped = _fitted(columns, options.max_width, [line.style for line in lines], rules)
        yield table
        yield Text()
        for line in self._reading(shown, chosen, differences, signs, dropped):
            yield Text(line)
        yield Text()
        for command, remark in self._next():
            line = f"  {command}  # {remark}"
            yield Text(line if cell_len(line) <= options.max_width else f"  {command.rstrip()}", style="cyan")

    def _lines(self, shown: Judged, chosen: Judged | None, signs: _Signs) -> list[_Line]:
        """The depths, the rivals at the depth that is shown with their variants apart, and the baselines."""
        lines = []
        for e in self.result.curve:
            label = _spent(e.depth, e.effective_depth) + (f" {signs.chosen}" if e is chosen else "")
            lines.append(_Line(label, e, "depth", "bold" if e is chosen else ""))
        lines += [
            _Line(f"{name} (bound)" if rival.bound else name, rival, "rival", "dim")
            for name, rival in shown.rivals.items()
            if not rival.variant_of
        ]
        for name, rival in shown.rivals.items():
            if of := rival.variant_of:
                section = name.removeprefix(of).strip()
                if lines[-1].section != section:
                    lines.append(_Line(f"{section}:", None, section, "dim"))
                lines.append(_Line(of, rival, section, "dim"))
        return lines + [_Line(n, b, "baseline", "dim") for n, b in self.result.baselines.items()]

    @staticmethod
    def _each(answers: Sequence[Any], of: Callable[[Any], float | None]) -> list[str]:
        """The cells of a column of numbers; empty where there is nothing to ask."""
        return [formatting.number(of(a)) if a else "" for a in answers]

    def _beside(self, metric: str, answers: Sequence[Outcome | None]) -> _Column:
        """A further metric of depths and rivals; one that rivals do not have is the first to make room for others."""
        found = [a.metrics.get(metric) if a else None for a in answers]
        alone = self.result.head.rivals and not any(
            metric in r.metrics for r in self.result.head.rivals.values()
        )
        return _Column(metric, [formatting.number(m.value, 4) if m else "" for m in found], 5 if alone else 1)

    @cached_property
    def _spent(self) -> bool:
        """Whether what throughput counts is spent on examples, by depth, rather than a constant of the data."""
        answers = [o for judged in self.result.curve for o in (judged, *judged.rivals.values())]
        counter = f"{self._counted}s"
        return varies([o.cost[counter] / o.accuracy.n for o in answers if counter in o.cost])

    @property
    def _counted(self) -> str:
        """What throughput counts: "token", "user"."""
        return self.result.units.throughput.removesuffix("s/s")

    @property
    def _unit(self) -> str:
        """What operations are counted for: an example, or what is a constant of the data."""
        return self.result.units.example if self._spent else self._counted

    def _tokens(self, outcome: Outcome) -> float | None:
        """Tokens that were spent on one example."""
        return (
            outcome.cost["tokens"] / outcome.accuracy.n if self._spent and "tokens" in outcome.cost else None
        )

    def _megaflops(self, outcome: Outcome) -> float | None:
        """Operations that judging one unit took, in millions, where the method counts them."""
        cost = outcome.cost
        if "flops" not in cost:
            return None
        units = None if self._spent else cost.get(f"{self._counted}s")
        return cost["flops"] / (units or outcome.accuracy.n) / 1e6

    def _chosen(self) -> Judged | None:
        """The curve's entry that validation prefers (a tie goes to the shallowest), where it has a choice."""
        values = [(e.valid_accuracy.value, e) for e in self.result.curve if e.valid_accuracy]
        if len(values) < 2:
            return None
        sign = 1 if self.result.accuracy.larger_is_better else -1
        return max(values, key=lambda found: (sign * found[0], -found[1].depth))[1]

    def _reading(
        self, shown: Judged, chosen: Judged | None, differences: Differences, signs: _Signs, dropped: list[str]
    ) -> Iterable[str]:  # fmt: skip
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
            yield f"{signs.chosen} {_amount(chosen.depth, units.depth)}: the depth chosen on validation."
        for e in r.curve:
            if e.effective_depth not in (None, e.depth):
                spent = f"{e.effective_depth:.2f} of at most {e.depth} {units.depth}"
                yield f"Depth on demand: {spent} were used on average."
        if shown.rivals:
            bounds = (
                " A bound is no method and is not ranked."
                if any(o.bound for o in shown.rivals.values())
                else ""
            )
            same = f"Rivals answer the same {units.example}s, also with {_amount(shown.depth, units.depth)}."
            yield same + bounds
        if differences and "difference [95%]" not in dropped:
            tests = sum(p is not None for _, p in differences.values())
            yield (
                f"difference: from {_amount(shown.depth, units.depth)}, paired; {signs.better} better, {signs.worse} worse, "
                f"{signs.unclear} not distinguishable at p < 0.05{_holm(tests)}."
            )
        yield from self._compared(shown, short=bool(differences) and "difference [95%]" not in dropped)
        omitted = f" Columns omitted to fit the window: {', '.join(dropped)}." if dropped else ""
        yield f"Latency is that of {units.latency} at batch size 1.{omitted}"
        yield self._cost()
        if self.folder is not None:
            yield f"Run folder: {self.folder}"

    def _scores(self, outcome: Outcome) -> dict[int, ExampleScores]:
        assert self.folder is not None
        return {0: read_rows(RunFolder(self.folder), self.result, outcome.rows, outcome.accuracy)}

    def _differences(self, shown: Judged) -> Differences:
        """Paired differences of all else from the depth that is shown, on this run's own rows; a bound's is no test."""
        if self.folder is None:
            return {}
        everything = (*self.result.curve, *shown.rivals.values(), *self.result.baselines.values())
        others = [o for o in everything if o is not shown]
        own = self._scores(shown)
        found = paired_differences([(self._scores(o), own) for o in others])
        tested = [i for i, o in enumerate(others) if not o.bound]
        p = dict(zip(tested, holm([found[i].p for i in tested]), strict=True))
        return {id(o): (d, p.get(i)) for i, (o, d) in enumerate(zip(others, found, strict=True))}

    def _compared(self, judged: Judged, short: bool) -> Iterable[str]:
        """Sentences on paired differences: to the least depth; unless ``short`` to rivals and trivial baselines too."""
        if self.folder is None:
            return
        least, unit = self.result.curve[0], self.result.units.depth
        sides: dict[str, Outcome] = {_amount(least.depth, unit): least} if judged.depth != least.depth else {}
        sides |= {} if short else judged.rivals | self.result.baselines
        mine, sign = self._scores(judged), 1 if judged.accuracy.larger_is_better else -1
        for name, side in sides.items():
            d = paired_difference(mine, self._scores(side))
            verdict = "better" if sign * d.value > 0 else "worse"
            verdict = verdict if d.distinguishable else "not distinguishable"
            yield f"{_amount(judged.depth, unit)} vs. {name}: {formatting.difference(d)}, {verdict}."

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
        if r.train_depth and r.units.least == 0 and (r.training or r.trained_by):
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
        entries, each = t.entries, t.units.example
        labels = [
            "" if i and _series(entries[i - 1]) == _series(e) and e.kind != "baseline" else t.short(e)
            for i, e in enumerate(entries)
        ]
        yield heading(t)
        yield Text()
        columns = [
            _Column("", labels, right=False),
            _Column("depth", [self._depth(e, signs) for e in entries]),
            _Column(f"{t.accuracy} [95%]", [formatting.interval(e.accuracy) for e in entries]),
            _Column("difference [95%]", [self._difference(e, signs) for e in entries], 1, right=False),
            _Column("seeds", [str(len(e.points)) if e.points else "" for e in entries], 6),
            _Column("p", [formatting.probability(e.p) for e in entries], 7),
            _Column("validation", [f"{e.valid.value:.4f}" if e.valid else "" for e in entries], 8),
            *(
                _Column(f"{word}/\n{each}", self._costs(cost, unit), rank)
                for cost, word, unit, rank in _COUNTED
                if cost in t.spent
            ),
            _Column("p50 ms", self._costs("latency_p50_ms"), 3),
            _Column("p95 ms", self._costs("latency_p95_ms"), 10),
            _Column("hours", self._costs("device_hours"), 4),
            _Column(t.units.throughput, self._costs("throughput_per_s"), 11),
            _Column("Pareto", [" ".join(_SHORT[c] for c in e.fronts) for e in entries], 9, right=False),
        ]
        if not t.one_device:
            devices = ["; ".join(sorted({p.device for p in e.points})) for e in entries]
            columns.append(_Column("device", devices, 2))
        colours = {"base": "cyan", "bound": "dim", "baseline": "dim"}
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

    def _costs(self, cost: str, unit: float = 1.0) -> list[str]:
        found = [e.costs.get(cost) for e in self.table.entries]
        return [formatting.number(None if c is None else c / unit) for c in found]

    def _difference(self, e: Entry, signs: _Signs) -> str:
        return _verdict(e.difference, e.p, self.table.larger_is_better, signs) if e.difference else ""

    def _legend(self, signs: _Signs, dropped: list[str]) -> Iterable[str]:
        t = self.table
        compared = [e for e in t.entries if e.difference is not None]
        if compared:
            references = list(dict.fromkeys(e.reference for e in compared if not e.rival))
            if any(e.rival for e in compared):
                references.append("(rivals) their method at the same depth")
            seeds = sorted({e.difference.seeds for e in compared if e.difference})
            over = f"{t.n:,} {t.units.example}s and {_span(seeds)}"
            yield f"difference: from {' or '.join(references)}, paired over {over}."
            tests = _holm(sum(e.p is not None for e in compared))
            yield f"{signs.better} better, {signs.worse} worse, {signs.unclear} not distinguishable at p < 0.05{tests}."
            if bounds := list(dict.fromkeys(t.short(e) for e in t.entries if e.kind == "bound")):
                yield f"{', '.join(bounds)}: a bound that no method can reach by itself; it is not ranked."
            if seeds == [1]:
                yield "With one seed the intervals cover variation between examples only; use at least three seeds to include training noise."
        if any(e.chosen for e in t.entries):
            yield f"{signs.chosen} the depth chosen on validation."
        if "hours" not in dropped and any("device_hours" in e.costs for e in t.entries):
            yield "hours: device-hours per run, training included."
        if any(e.fronts for e in t.entries) and "Pareto" not in dropped:
            fewer = "".join(f", {said}" for cost, said in _FEWER.items() if cost in t.spent)
            yield f"Pareto: nothing else is as accurate for fewer device-hours (h), at a lower latency (ms){fewer}."
        if dropped:
            yield f"Columns omitted to fit the window: {', '.join(dropped)}. Widen it, or use --csv."


_SHORT = {
    "device_hours": "h",
    "latency_p50_ms": "ms",
    "tokens_per_example": "tok",
    "flops_per_example": "FLOP",
}
_FEWER = {
    "tokens_per_example": "for fewer tokens (tok)",
    "flops_per_example": "for fewer operations (FLOP)",
}
_COUNTED = (("tokens_per_example", "tokens", 1.0, 3), ("flops_per_example", "MFLOP", 1e6, 5))


def _holm(tests: int) -> str:
    return f" after Holm's correction for {tests} tests" if tests > 1 else ""


def _span(seeds: list[int]) -> str:
    """[1] -> "1 seed", [1, 3] -> "1 to 3 seeds"."""
    return " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1])))) + f" seed{'s' * (seeds != [1])}"


def _series(e: Entry) -> tuple:
    return (e.kind, e.key.family if e.key else ())
