"""Blocks about language models, for ``pages.py``: each makes a table of the runs of a set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
from pyarrow import feather

from reason.metrics.statistics import ExampleScores, holm, paired_differences
from reason.reports.frame import read_rows
from reason.tracking.folder import RunFolder
from reason.tracking.result import Judged, Measure, Outcome, Result

Grouped = dict[str, dict[int, RunFolder]]  # {experiment: {seed: run}}
ACCURACY, BITS = "next-token accuracy", "bits per byte"


def language(runs: list[RunFolder]) -> str:
    """A line for each model at its full depth, its differences to the plain recursive one paired over documents and seeds."""
    grouped = _by_experiment(runs)
    reference = next((e for e in grouped if e.endswith("-recursive")), next(iter(grouped)))
    others = [e for e in grouped if e != reference]
    gaps = {
        metric: dict(zip(others, paired_differences(
            [(_rows(grouped[e], metric), _rows(grouped[reference], metric)) for e in others]
        ), strict=True)) if others else {}
        for metric in (BITS, ACCURACY)
    }  # fmt: skip
    corrected = dict(zip(others, holm([gaps[BITS][e].p for e in others]), strict=True))
    heads = "model | seeds | parameters, M | tokens trained, M | mean depth | MFLOP a token | bits per byte | difference | p (Holm) | next-token accuracy | difference"
    lines = [
        f"Difference: to {reference}, paired over documents and seeds, 95% intervals. Fewer bits are better.\n",
        f"| {heads} |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: | --- |",
    ]
    for experiment, of in sorted(grouped.items(), key=lambda item: _mean(item[1], BITS)):
        first, last = _result(of), [_last(run) for run in of.values()]
        apart = {
            m: f"{d.value:+.4f} [{d.low:+.4f}, {d.high:+.4f}]"
            for m, d in ((m, gaps[m].get(experiment)) for m in gaps) if d
        }  # fmt: skip
        p = corrected.get(experiment)
        lines.append(_line(
            experiment, len(of), f"{first.params_m:.2f}", f"{_seen(of) / 1e6:.2f}",
            f"{np.mean([e.effective_depth for e in last]):.2f}",
            f"{np.mean([e.cost['flops'] / e.cost['tokens'] for e in last]) / 1e6:.2f}",
            f"{_mean(of, BITS):.4f}", apart.get(BITS, ""), "" if p is None else f"{p:.3f}",
            f"{_mean(of, ACCURACY):.4f}", apart.get(ACCURACY, ""),
        ))  # fmt: skip
    result = _result(grouped[reference])
    for rival, baseline in result.baselines.items():
        bits, right = baseline.metrics[BITS].value, baseline.accuracy.value
        lines.append(_line(rival, *[""] * 5, f"{bits:.4f}", "", "", f"{right:.4f}", ""))
    lines.append(
        f"\n{result.dataset} (digest `{result.data_digest[:12]}`), {result.accuracy.n:,} test documents per seed."
    )
    return "\n".join(lines) + "\n"


def routing(runs: list[RunFolder]) -> str:
    """What the learned router adds to each control: bits per byte of ``-expert`` less those of every other model, at equal
    tokens; then ``-expert-flops`` less those that took as many operations."""
    grouped = _by_experiment(runs)
    longer = {e for e in grouped if e.endswith("-flops")}
    level = {e for e in grouped if e not in longer and f"{e}-flops" not in grouped}  # cost as much as it is
    pairs = []
    for end, others in (("-expert", set(grouped) - longer), ("-expert-flops", longer | level)):
        learned = next(e for e in grouped if e.endswith(end))
        pairs += [(learned, e) for e in sorted(others - {learned}, key=lambda e: _mean(grouped[e], BITS))]
    gaps = paired_differences([(_rows(grouped[a], BITS), _rows(grouped[b], BITS)) for a, b in pairs])
    p = holm([gap.p for gap in gaps])
    lines = ["| bits per byte of | less those of | difference | p (Holm) |", "| --- | --- | --- | ---: |"]
    before = ""
    for (a, b), gap, q in zip(pairs, gaps, p, strict=True):
        interval = f"{gap.value:+.4f} [{gap.low:+.4f}, {gap.high:+.4f}]"
        lines.append(_line(a if a != before else "", b, interval, f"{q:.3f}"))
        before = a
    return "\n".join(lines) + "\n"


def recovered(runs: list[RunFolder]) -> str:
    """How much of the loss that making a model recursive costs is regained by training.

    (loss of ``-converted`` - loss) / (loss of ``-converted`` - loss of ``-source``), over the same documents, in bits
    per byte (per token the share would be the same); the interval is of resampled documents.
    """
    grouped = _by_experiment(runs)
    source, converted = (next(e for e in grouped if e.endswith(end)) for end in ("-source", "-converted"))
    tables = {e: _rows(of, BITS) for e, of in grouped.items()}
    documents = len(next(iter(tables[source].values())).id)
    draws = np.random.default_rng(0).integers(0, documents, (5000, documents))

    def losses(experiment: str, index: np.ndarray) -> np.ndarray:
        """(k,) bits per byte over each of these (k, n) documents, mean over seeds."""
        return np.mean(
            [r.numerator[index].sum(1) / r.denominator[index].sum(1) for r in tables[experiment].values()], 0
        )

    def share(experiment: str, index: np.ndarray) -> np.ndarray:
        start = losses(converted, index)
        return (start - losses(experiment, index)) / (start - losses(source, index))

    whole = np.arange(documents)[None]
    lines = [
        "| model | tokens trained, M | bits per byte | of the gap regained |",
        "| --- | ---: | ---: | --- |",
    ]
    for experiment in sorted(grouped, key=lambda e: -losses(e, whole)[0]):
        recovered = ""
        if experiment not in (source, converted):
            low, high = np.quantile(share(experiment, draws), [0.025, 0.975])
            recovered = f"{share(experiment, whole)[0]:.1%} [{low:.1%}, {high:.1%}]"
        lines.append(_line(
            experiment, f"{_seen(grouped[experiment]) / 1e6:.2f}", f"{losses(experiment, whole)[0]:.3f}", recovered
        ))  # fmt: skip
    return "\n".join(lines) + "\n"


def levels(runs: list[RunFolder]) -> str:
    """Of tasks whose answers need a known number of steps: what was answered, and the depth that was given.

    Differences are to the experiment whose name ends with ``-random``, at the hardest level.
    """
    grouped = _by_experiment(runs)
    tables = {
        e: [feather.read_table(of[s] / _last(of[s]).rows) for s in sorted(of)] for e, of in grouped.items()
    }
    columns = next(iter(tables.values()))[0].column_names
    known = sorted({int(c.split("_")[1]) for c in columns if c.startswith("targets_")})
    hardest = {"column": f"correct_{known[-1]}", "denominator": f"targets_{known[-1]}"}
    rows = {
        e: {
            s: read_rows(run, result_of(run), _last(run).rows, replace(_last(run).accuracy, **hardest))
            for s, run in of.items()
        }
        for e, of in grouped.items()
    }
    control = next(e for e in grouped if e.endswith("-random"))
    others = [e for e in grouped if e != control]
    gaps = dict(zip(others, paired_differences([(rows[e], rows[control]) for e in others]), strict=True))
    heads = [f"right at {n} | depth at {n}" for n in known]
    lines = [
        f"| model | seeds | {' | '.join(heads)} | points more than {control}, level {known[-1]} | AUROC of depth, hard against easy |",
        "| --- | ---: |" + " ---: | ---: |" * len(known) + " --- | --- |",
    ]
    for experiment, of in grouped.items():
        cells = []
        for n in known:
            right, depth, total = (
                np.array([t.column(f"{c}_{n}").to_numpy().sum() for t in tables[experiment]])
                for c in ("correct", "depth", "targets")
            )
            cells += [f"{np.mean(right / total):.1%}", f"{np.mean(depth / total):.2f}"]
        gap = gaps.get(experiment)
        cells.append(f"{100 * gap.value:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]" if gap else "")
        aurocs = [_last(of[s]).overall.get("auroc of depth") for s in sorted(of)]
        aurocs = [a for a in aurocs if a is not None]
        cells.append(f"{np.mean(aurocs):.3f} ({', '.join(f'{a:.3f}' for a in aurocs)})" if aurocs else "")
        lines.append(_line(experiment, len(of), *cells))
    return "\n".join(lines) + "\n"


BLOCKS: dict[str, Callable[[list[RunFolder]], str]] = {
    "language": language,
    "routing": routing,
    "recovered": recovered,
    "levels": levels,
}


def _by_experiment(runs: Iterable[RunFolder]) -> Grouped:
    grouped: Grouped = {}
    for run in runs:
        result = result_of(run)
        grouped.setdefault(result.experiment, {})[result.seed] = run
    return grouped


def result_of(run: RunFolder) -> Result:
    """Of a run that is kept, and therefore finished."""
    result = run.result
    assert result is not None, run.name
    return result


def _result(of: dict[int, RunFolder]) -> Result:
    return result_of(next(iter(of.values())))


def _last(run: RunFolder) -> Judged:
    """What was found at full depth."""
    return result_of(run).curve[-1]


def _told(outcome: Outcome, metric: str) -> Measure:
    return outcome.accuracy if outcome.accuracy.name == metric else outcome.metrics[metric]


def _rows(of: dict[int, RunFolder], metric: str) -> dict[int, ExampleScores]:
    return {
        s: read_rows(run, result_of(run), _last(run).rows, _told(_last(run), metric)) for s, run in of.items()
    }


def _mean(of: dict[int, RunFolder], metric: str) -> float:
    return float(np.mean([_told(_last(run), metric).value for run in of.values()]))


def _seen(of: dict[int, RunFolder]) -> int:
    """Tokens trained on."""
    size = next(iter(of.values())).config
    training = _result(of).training
    steps = training.steps if training else 0
    return steps * size["train"]["batch_size"] * size["backbone"]["context"]


def _line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
