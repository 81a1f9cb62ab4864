"""Two tables for the terminal: the summary of one run, and a comparison of many. Drawn with rich.

Both fit the width there is: the least important columns go first, and a line says which.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table as RichTable
from rich.text import Text

from reason.metrics.statistics import Interval, paired_difference, smallest_p
from reason.reports import formatting
from reason.reports.frame import device, evaluation_keys, overrides, read_rows
from reason.reports.terminal import plain_table, title
from reason.tracking.folder import RunFolder

if TYPE_CHECKING:
    from reason.reports.comparison import Comparison, Entry


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
    for i, column in enumerate(kept):
        table.add_column(
            Text(column.head), justify="right" if column.right else "left", no_wrap=i > 0, overflow="fold"
        )
    for i, style in enumerate(styles):
        table.add_row(*(Text(c.cells[i]) for c in kept), style=style, end_section=i in rules)
    return table, dropped[::-1]


@dataclass(frozen=True)
class _Signs:
    """Signs that fall back to ASCII where the stream cannot carry others."""

    chosen: str
    better: str
    worse: str
    unclear: str

    @classmethod
    def of(cls, options: ConsoleOptions) -> _Signs:
        return cls("<", "+", "-", "~") if options.ascii_only else cls("◂", "▲", "▼", "≈")


def curve_on_demand(curve: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries of a curve whose examples were not all given the depth in full."""
    return [e for e in curve if e.get("effective_depth") is not None and e["effective_depth"] != e["depth"]]


def _spent(entry: dict[str, Any]) -> str:
    """The depth of an entry; where it was spent on demand, the mean and the cap."""
    return (
        f"{entry['effective_depth']:.2f} of {entry['depth']}"
        if curve_on_demand([entry])
        else str(entry["depth"])
    )


# --- the summary of a run -----------------------------------------------------------------------


def run_summary(result: dict[str, Any], folder: Path | str | None = None) -> Any:
    """What ``reason run`` prints at its end: one line per depth, and how to read it.

    Args:
        result: result.json. folder: the run folder; with it the differences between depths, and to
            the trivial baselines, are computed from the rows.
    """
    return _RunSummary(result, Path(folder) if folder is not None else None)


@dataclass
class _RunSummary:
    result: dict[str, Any]
    folder: Path | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        r, signs = self.result, _Signs.of(options)
        units, accuracy = r["units"], r["accuracy"]
        name, plural = accuracy["name"], f"{units['example']}s"
        chosen = self._chosen()
        trained = f"trained with {r['train_depth']} {units['depth']}" if r["train_depth"] else "the base"
        yield title(
            f"{r['experiment']}: {r['method']} on {r['dataset']} with {r['backbone']}, {trained}, seed {r['seed']}"
        )
        yield Text()
        curve, rivals = r["curve"], self._rivals()
        records = [*(e["accuracy"] for e in curve), *(b["accuracy"] for b in rivals.values())]
        blank = [""] * len(rivals)
        depths = [_spent(e) + (f" {signs.chosen}" if e is chosen else "") for e in curve]
        columns = [
            _Column(units["depth"], [*depths, *rivals], right=False),
            _Column(f"{name} [95%]", [formatting.interval(_interval(a)) for a in records]),
            *(self._beside(metric, [*curve, *rivals.values()]) for metric in r.get("beside") or ()),
            _Column("validation", [_value(e.get("valid_accuracy")) for e in curve] + blank, 3),
            _Column("p50 ms", [formatting.number(e.get("latency_p50_ms")) for e in curve] + blank, 1),
            _Column("p95 ms", [formatting.number(e.get("latency_p95_ms")) for e in curve] + blank, 5),
            _Column(
                units["throughput"], [formatting.number(e.get("throughput_per_s")) for e in curve] + blank, 4
            ),
            _Column(f"MFLOP/{self._unit}", [formatting.number(self._megaflops(e)) for e in curve] + blank, 2),
        ]
        styles = ["bold" if e is chosen else "" for e in curve] + ["dim"] * len(rivals)
        table, dropped = _fitted(columns, options.max_width, styles, {len(curve) - 1} if rivals else set())
        yield table
        yield Text()
        for line in self._reading(name, plural, chosen, signs, dropped):
            yield Text(line)
        yield Text()
        for command, remark in self._next():
            line = f"  {command}  # {remark}"
            yield Text(line if cell_len(line) <= options.max_width else f"  {command.rstrip()}", style="cyan")

    def _rivals(self) -> dict[str, dict[str, Any]]:
        """What else answered the same examples: the rivals at the run's depth, and the trivial baselines."""
        head = next(e for e in self.result["curve"] if e["depth"] == self.result["depth"])
        return {**head.get("rivals", {}), **(self.result.get("baselines") or {})}

    def _beside(self, metric: str, entries: Sequence[dict[str, Any]]) -> _Column:
        """A further metric of depths and rivals."""
        found = [e["metrics"].get(metric) for e in entries]
        return _Column(metric, [formatting.number(m["value"], 4) if m else "" for m in found], 1)

    @property
    def _unit(self) -> str:
        """What throughput counts: "token", "user"."""
        return self.result["units"]["throughput"].removesuffix("s/s")

    def _megaflops(self, entry: dict[str, Any]) -> float | None:
        """Operations that judging one unit took, in millions, where the method counts them."""
        cost = entry.get("cost") or {}
        if "flops" not in cost:
            return None
        return cost["flops"] / (cost.get(f"{self._unit}s") or entry["accuracy"]["n"]) / 1e6

    def _chosen(self) -> dict[str, Any] | None:
        """The curve's entry that validation prefers (a tie goes to the shallowest), where it has a choice."""
        entries = [e for e in self.result["curve"] if e.get("valid_accuracy")]
        if len(entries) < 2:
            return None
        sign = 1 if self.result["accuracy"].get("larger_is_better", True) else -1
        return max(entries, key=lambda e: (sign * e["valid_accuracy"]["value"], -e["depth"]))

    def _reading(
        self, name: str, plural: str, chosen: dict[str, Any] | None, signs: _Signs, dropped: list[str]
    ) -> Iterable[str]:
        r, units = self.result, self.result["units"]
        explained = formatting.meaning(name, units["example"])
        yield f"{name} measures accuracy" + (f": {explained}." if explained else ".")
        n = r["accuracy"]["n"]
        over = f"the {n:,} {plural}" if n != 1 else f"one {units['example']}"
        reading = "brackets give 95% bootstrap confidence intervals."
        if smallest_p(n) >= 0.05:
            reading = "with so few examples the confidence intervals in brackets are too narrow."
        yield f"Averaged over {over} of the {r['split']} split; {reading}"
        least = r["curve"][0]
        if least["depth"] == 0 and r["train_depth"]:
            yield f"0 {units['depth']} means {units['zero']}."
        if chosen is not None:
            yield f"{signs.chosen} {chosen['depth']} {units['depth']}: the depth chosen on validation."
        for entry in curve_on_demand(r["curve"]):
            yield (
                f"Depth on demand: {entry['effective_depth']:.2f} of at most {entry['depth']} {units['depth']} were "
                f"used on average."
            )
        yield from self._differences(chosen or r["curve"][-1])
        yield f"Latency is that of {units['latency']} at batch size 1." + (
            f" Columns omitted to fit the window: {', '.join(dropped)}." if dropped else ""
        )
        yield self._cost()
        if self.folder is not None:
            yield f"Run folder: {self.folder}"

    def _differences(self, entry: dict[str, Any]) -> Iterable[str]:
        """Paired differences on this run's own rows: to the least depth, to each trivial baseline."""
        if self.folder is None:
            return
        r, unit = self.result, self.result["units"]["depth"]
        sides = {}
        if entry["depth"] != r["curve"][0]["depth"]:
            sides[f"{r['curve'][0]['depth']} {unit}"] = r["curve"][0]
        sides |= self._rivals()
        mine = read_rows(self.folder / entry["rows"], entry["accuracy"])
        sign = 1 if r["accuracy"].get("larger_is_better", True) else -1
        for name, side in sides.items():
            rows = read_rows(self.folder / side["rows"], entry["accuracy"] | side["accuracy"])
            d = paired_difference({0: mine}, {0: rows})
            verdict = "not distinguishable"
            if d.distinguishable:
                verdict = "better" if sign * d.value > 0 else "worse"
            yield f"{entry['depth']} {unit} vs. {name}: {formatting.difference(d)}, {verdict}."

    def _cost(self) -> str:
        r, m = self.result, self.result["metrics"]
        parts = []
        if "device_hours" in m:
            parts.append(f"{formatting.number(m['device_hours'])} device-hours")
            if r.get("stages"):
                parts.append(
                    f"{formatting.number(m['lineage_device_hours'])} including the runs it starts from"
                )
        if r.get("gpus"):
            parts.append(f"{formatting.number(m['gpu_hours'])} GPU-hours")
        training = r.get("training") or {}
        said = f"Cost: {', '.join(parts)} on {device(r)}."
        if training.get("stopped") == "early":
            said += f" Training stopped early, best at epoch {formatting.number(training['best_epoch'])}."
        if r.get("trained_by"):
            said += f" The model was trained by {r['trained_by']}."
        return said

    def _next(self) -> list[tuple[str, str]]:
        """Commands worth trying after this run, each with a remark."""
        r, example = self.result, self.result["units"]["example"]
        name, said = r["experiment"], r["experiment"]
        if self.folder is not None:
            trainer = self.folder.parent / (r.get("trained_by") or self.folder.name)
            typed = overrides(RunFolder(trainer if trainer.is_dir() else self.folder))
            said = " ".join(
                [name, *(w for w in typed if w.split("=")[0] not in evaluation_keys(r["method"]))]
            )
        depths = [e["depth"] for e in r["curve"]]
        varied = ",".join(
            map(str, depths if len(depths) > 1 else range(r["units"].get("least", 0), r["train_depth"] + 1))
        )
        commands = []
        if r["train_depth"]:
            commands.append((f"reason run {said} train_depth=0", "the base, trained without the method"))
        if r["train_depth"]:
            commands.append(
                (f"reason sweep {said} depth={varied} seed=0..2", "three seeds, to tell gain from luck")
            )
        commands.append((f"reason compare {name}", "compare its runs"))
        commands.append((f"reason inspect {r['run']}", f"one {example}, step by step"))
        commands.append(("reason ui", "all runs in MLflow"))
        width = max(len(command) for command, _ in commands)
        return [(f"{command:<{width}}", remark) for command, remark in commands]


def _interval(record: dict[str, Any]) -> Interval:
    return Interval(record["value"], record["low"], record["high"], record["n"])


def _value(record: dict[str, Any] | None) -> str:
    return f"{record['value']:.4f}" if record else ""


# --- a comparison -------------------------------------------------------------------------------


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
        over = f"{t.split} split, {t.n:,} {t.units['example']}s"
        yield title(f"{t.accuracy} on {t.dataset}, {over}. Depth: {', '.join(t.depth_units)}")
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
                t.units["throughput"],
                [formatting.number(e.costs.get("throughput_per_s")) for e in entries],
                10,
            ),
            _Column("Pareto", [" ".join(_SHORT[c] for c in e.fronts) for e in entries], 8, right=False),
        ]
        if not t.one_device:
            columns.append(
                _Column("device", ["; ".join(sorted({p.device for p in e.points})) for e in entries], 2)
            )
        styles = [
            {"base": "cyan", "baseline": "dim"}.get(e.kind, "bold" if e.chosen else "") for e in entries
        ]
        rules = {i for i in range(len(entries) - 1) if _series(entries[i]) != _series(entries[i + 1])}
        drawn, dropped = _fitted(columns, options.max_width, styles, rules)
        yield drawn
        yield Text()
        for line in self._legend(signs, dropped):
            yield Text(line)

    def _depth(self, e: Entry, signs: _Signs) -> str:
        if e.depth is None:
            return ""
        mean = e.costs.get("effective_depth")
        depth = str(e.depth) if mean in (None, e.depth) else f"{mean:.2f} of {e.depth}"
        return f"{signs.chosen} {depth}" if e.chosen else depth

    def _difference(self, e: Entry, signs: _Signs) -> str:
        if e.difference is None:
            return ""
        mark = signs.unclear
        if e.distinguishable:
            better = (e.difference.value > 0) == self.table.larger_is_better
            mark = signs.better if better else signs.worse
        return f"{formatting.difference(e.difference)} {mark}"

    def _legend(self, signs: _Signs, dropped: list[str]) -> Iterable[str]:
        t = self.table
        compared = [e for e in t.entries if e.difference is not None]
        if compared:
            references = list(dict.fromkeys(e.reference for e in compared))
            seeds = sorted({e.difference.seeds for e in compared if e.difference})
            over = f"{t.n:,} {t.units['example']}s and {_span(seeds)}"
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
    if seeds == [1]:
        return "1 seed"
    return f"{seeds[0]} seeds" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"


def _series(e: Entry) -> tuple:
    return (e.kind, e.key.family if e.key else ())
