"""A study as a picture: accuracy against mean depth, and what depth brings to whom."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reason.reports import plots
from reason.reports.plots import COLOURS, GREY, INK, _look, handles, headline, level, points, ring
from reason.reports.study import Study
from reason.reports.study.models import Tested


def draw_studies(found: Sequence[Study], path: Path) -> list[Path]:
    """One picture per study (``draw_each``)."""
    return plots.draw_each(found, path, draw_study)


def draw_study(study: Study, path: Path) -> None:
    """Left: fixed depths and the line of their mixtures, policies, base, the best depth for each and its null.
    Right: the difference to the base (else to the least depth) of each group of examples, with 95% intervals."""
    plt = plots._pyplot()
    rows = _forest(study)
    height = max(4.6, 1.6 + 0.21 * len(rows))
    with plt.rc_context(plots._STYLE):
        picture, (left, right) = plt.subplots(
            1, 2, figsize=(12.5, height), layout="constrained", gridspec_kw={"width_ratios": (1.15, 1)}
        )
        _depths(left, study)
        _groups(right, study, rows)
        headline(picture, study.evidence.table)
        drawn = handles((left, right))
        columns = min(4, max(len(drawn), 1))
        picture.legend(
            list(drawn.values()), list(drawn), loc="outside lower center", ncols=columns, handlelength=2.2
        )
        plots._save(picture, path)


def _depths(ax: Any, study: Study) -> None:
    t, models = study.evidence.table, study.evidence.models
    for i, base in enumerate(study.evidence.bases):
        level(ax, base.entry, i, 0.07, linewidth=1.3)
    names = list(dict.fromkeys(p.label for m in models for p in m.policies))
    for i, model in enumerate(models):
        colour, _ = _look(i)
        shift = 0.05 * (i - (len(models) - 1) / 2)
        at = [d + shift for d in model.depths]
        found = [o.entry.accuracy for o in model.depths.values()]
        label = f"{model.label}: fixed depths"
        points(ax, at, found, _look(i), markersize=6, linewidth=1.4, label=label, zorder=3)
        for depth, outcome in model.depths.items():
            ring(ax, depth + shift, outcome.entry)
        for policy in model.policies:
            a, x = policy.entry.accuracy, policy.mean_depth + shift
            points(
                ax, [x], [a], (colour, "o"), markersize=11, markerfacecolor="white", linewidth=1.0, linestyle="none",
                label=f"{model.label}: policies", zorder=4,
            )  # fmt: skip
            ax.text(
                x, a.value, str(names.index(policy.label) + 1), ha="center", va="center_baseline", fontsize=7.5,
                fontweight="bold", color=colour, zorder=6,
            )  # fmt: skip
    ax.set_xlabel(f"mean depth ({', '.join(t.depth_units)})")
    ax.set_ylabel(t.accuracy)
    ax.set_title("against mean depth; the lines are mixtures of two depths")
    _ceilings(ax, study)
    ax.margins(x=0.05)
    if names:  # a key of the numbers
        from matplotlib.lines import Line2D

        empty = [Line2D([], [], linestyle="none") for _ in names]
        key = [f"{i + 1}  {name}" for i, name in enumerate(names)]
        ax.legend(empty, key, loc="best", fontsize=8, handlelength=0, handletextpad=0)


def _ceilings(ax: Any, study: Study) -> None:
    """Right of the depths: the best depth for each, and the best of as many base runs."""
    depths = sorted({d for m in study.evidence.models for d in m.depths})
    labels = [m.label for m in study.evidence.models]
    nulls = {(o.null.runs, o.null.oracle.value): o.null.oracle for o in study.oracle if o.null}
    step = 0.045 * max(depths[-1] - depths[0], 1) if depths else 0.1
    start = at = (depths[-1] if depths else 0) + 3.5 * step
    stars = [
        (o.oracle, _look(labels.index(o.model))[0], "*", 11, "best depth for each") for o in study.oracle
    ]
    luck = [(a, GREY, "X", 8, f"best of {runs} base runs (luck only)") for (runs, _), a in nulls.items()]
    for a, colour, marker, size, label in [*stars, *luck]:
        points(ax, [at], [a], (colour, marker), markersize=size, linestyle="none", label=label, zorder=3)
        at += step
    ticks: dict[float, str] = {d: str(d) for d in depths}
    if at > start:
        ticks[(start + at - step) / 2] = "with\nhindsight"
    ax.set_xticks(list(ticks), list(ticks.values()))


# --- groups ---------------------------------------------------------------------------------------

# Label and (model, test) pairs of a group; None for a heading.
Bar = tuple[str, list[tuple[int, Tested]] | None]


def _forest(study: Study) -> list[Bar]:
    rows: list[Bar] = []
    labels = [m.label for m in study.evidence.models]
    for by in dict.fromkeys(c.label for c in study.cohorts):
        cuts = [c for c in study.cohorts if c.label == by]
        rows.append((by, None))
        for g in range(len(cuts[0].groups)):
            found = [(labels.index(c.model), c.groups[g].to_base or c.groups[g].to_least) for c in cuts]
            tests = [(m, t) for m, t in found if t]
            label = f"{cuts[0].groups[g].label}  (n {cuts[0].groups[g].n:,}{'' if tests else ', too few'})"
            rows.append((label, tests))
    return rows


def _groups(ax: Any, study: Study, rows: list[Bar]) -> None:
    ax.set_title("difference by group, " + ("vs. base" if study.evidence.bases else "vs. smallest depth"))
    ax.set_xlabel(f"difference in {study.evidence.table.accuracy}")
    if not rows:
        ax.text(0.5, 0.5, "no cohort columns", transform=ax.transAxes, ha="center", color=GREY)
        ax.set(xticks=[], yticks=[])
        return
    ax.axvline(0, color=INK, linewidth=1)
    models = len(study.evidence.models)
    for place, (_, tests) in enumerate(rows):
        for i, test in tests or ():
            d = test.difference
            colour, marker = _look(i)
            y = place + 0.62 * ((i + 0.5) / models - 0.5)
            ax.errorbar(
                d.value, y, xerr=[[d.value - d.low], [d.high - d.value]], color=colour, marker=marker, markersize=5, capsize=2,
                linewidth=1.2, markerfacecolor=colour if test.distinguishable else "white", linestyle="none",
            )  # fmt: skip
    ax.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8.5)
    for tick, (_, tests) in zip(ax.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if tests is None else "normal")
    ax.set_ylim(len(rows) - 0.4, -0.8)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0)
    filled: dict[str, Any] = {"color": COLOURS[0], "linestyle": "none", "markersize": 5}
    ax.plot([], [], "o", **filled, label="distinguishable after correction")
    ax.plot([], [], "o", **filled, markerfacecolor="white", label="not distinguishable")
