"""Blocks about particle filtering, for ``pages.py``: each makes a table of the runs of a set."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from language import result_of

from reason.engine.layers import flatten
from reason.metrics.statistics import ExampleScores, holm, paired_differences
from reason.reports.frame import read_rows
from reason.tracking.folder import RunFolder
from reason.tracking.result import Judged, Outcome

Settings = tuple[tuple[str, str], ...]  # what tells the configurations of a set apart
SHOWN = ("self-consistency", "best-of-n", "weighted best-of-n", "beam search", "DVTS", "one sample", "oracle")
AGAINST = ("best-of-n at equal tokens", "self-consistency", "weighted best-of-n", "beam search", "DVTS")
HIDDEN = {
    "seed",
    "runs",
    "offline",
    "backbone.source",
    "particle.reward.source",
    "particle.rivals",
    "particle.record",
}


def solving(runs: list[RunFolder]) -> str:
    """A line for each configuration: exact match of the filter and of every rival at as many particles, and what they draw."""
    lines = [
        "| configuration | seeds | particle filter | " + " | ".join(SHOWN) + " | tokens a problem |",
        "| --- | ---: | --- |" + " ---: |" * (len(SHOWN) + 1),
    ]
    for name, of in grouped(runs).items():
        heads = [head(run) for run in of.values()]
        cells = [name, str(len(of)), _interval(of)]
        for rival in SHOWN:
            found = [h.rivals[rival].accuracy.value for h in heads if rival in h.rivals]
            cells.append(f"{np.mean(found):.3f}" if len(found) == len(heads) else "")
        cells.append(f"{np.mean([h.cost['tokens'] / h.accuracy.n for h in heads]):.0f}")
        lines.append("| " + " | ".join(cells) + " |")
    result = result_of(next(iter(runs)))
    lines.append(
        f"\nExact match, mean over seeds; intervals are of problems and seeds. {result.dataset} (digest "
        f"`{result.data_digest[:12]}`), {result.curve[-1].accuracy.n:,} test problems per seed."
    )
    return "\n".join(lines) + "\n"


def solving_differences(runs: list[RunFolder]) -> str:
    """The filter less each rival, paired over problems and seeds, with the tokens of both."""
    pairs, lines = [], []
    for name, of in grouped(runs).items():
        for rival in AGAINST:
            if all(rival in head(run).rivals for run in of.values()):
                mine = {s: rows(run, head(run)) for s, run in of.items()}
                theirs = {s: rows(run, head(run).rivals[rival]) for s, run in of.items()}
                tokens = np.mean(
                    [head(r).rivals[rival].cost["tokens"] / head(r).cost["tokens"] for r in of.values()]
                )
                pairs.append((name, rival, mine, theirs, tokens))
    gaps = paired_differences([(mine, theirs) for _, _, mine, theirs, _ in pairs])
    lines = [
        "| configuration | particle filter less | its tokens / the filter's | difference | p (Holm) |",
        "| --- | --- | ---: | --- | ---: |",
    ]
    before = ""
    for (name, rival, _, _, tokens), gap, p in zip(pairs, gaps, holm([g.p for g in gaps]), strict=True):
        interval = f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"
        lines.append(f"| {name if name != before else ''} | {rival} | {tokens:.2f} | {interval} | {p:.3f} |")
        before = name
    return "\n".join(lines) + "\n"


def solving_settings(runs: list[RunFolder]) -> str:
    """Every configuration less the first, paired over problems and seeds, with the tokens of each."""
    found = grouped(runs)
    names = list(found)
    table = {name: {s: rows(run, head(run)) for s, run in of.items()} for name, of in found.items()}
    gaps = paired_differences([(table[name], table[names[0]]) for name in names[1:]])
    corrected = holm([gap.p for gap in gaps])
    lines = [
        "| configuration | seeds | exact match | tokens a problem | difference to the first | p (Holm) |",
        "| --- | ---: | --- | ---: | --- | ---: |",
    ]
    for i, (name, of) in enumerate(found.items()):
        tokens = np.mean([head(run).cost["tokens"] / head(run).accuracy.n for run in of.values()])
        gap = "" if not i else f"{gaps[i - 1].value:+.3f} [{gaps[i - 1].low:+.3f}, {gaps[i - 1].high:+.3f}]"
        p = "" if not i else f"{corrected[i - 1]:.3f}"
        lines.append(f"| {name} | {len(of)} | {_interval(of)} | {tokens:.0f} | {gap} | {p} |")
    return "\n".join(lines) + "\n"


# --- inside -----------------------------------------------------------------------------------------


def grouped(runs: Sequence[RunFolder]) -> dict[str, dict[int, RunFolder]]:
    """{configuration: {seed: run}}; a configuration is called by the keys in which those of the set differ."""
    told = {run.name: {k: str(v) for k, v in flatten(run.config).items() if k not in HIDDEN} for run in runs}
    told = {
        name: {k: v for k, v in keys.items() if not k.startswith("hardware.")} for name, keys in told.items()
    }
    every = sorted({k for keys in told.values() for k in keys})
    differing = [k for k in every if len({keys.get(k) for keys in told.values()}) > 1]
    found: dict[str, dict[int, RunFolder]] = {}
    order = sorted(runs, key=lambda r: [_sortable(told[r.name].get(k, "")) for k in differing])
    for run in order:
        keys = told[run.name]
        name = (
            ", ".join(f"{k.rpartition('.')[2]} {keys.get(k, '')}" for k in differing)
            or result_of(run).experiment
        )
        found.setdefault(name, {})[result_of(run).seed] = run
    return found


def _sortable(text: str) -> tuple[float, str]:
    try:
        return float(text), ""
    except ValueError:
        return float("inf"), text


def head(run: RunFolder) -> Judged:
    """The run's own depth."""
    result = result_of(run)
    return next(judged for judged in result.curve if judged.depth == result.depth)


def rows(run: RunFolder, outcome: Outcome) -> ExampleScores:
    return read_rows(run, result_of(run), outcome.rows, outcome.accuracy)


def _interval(of: dict[int, RunFolder]) -> str:
    """Mean over seeds, with the interval that problems and seeds give together."""
    tables = {s: rows(run, head(run)) for s, run in of.items()}
    nothing = {s: ExampleScores(t.id, np.zeros_like(t.numerator), t.denominator) for s, t in tables.items()}
    (gap,) = paired_differences([(tables, nothing)])
    return f"{gap.value:.3f} [{gap.low:.3f}, {gap.high:.3f}]"


BLOCKS = {"solving": solving, "differences": solving_differences, "settings": solving_settings}
