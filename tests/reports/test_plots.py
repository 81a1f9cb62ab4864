"""Pictures hold something: the right size, ink where it belongs, the same bytes each time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from report_folders import FIGURES, PROBLEM_UNITS, RIVALS

from reason.errors import ConfigError
from reason.reports import plots
from reason.reports.comparison import compare
from reason.reports.plots import _look, draw_comparison, draw_comparisons, draw_figures


def pixels(path) -> np.ndarray:
    from matplotlib.image import imread

    return imread(path)[..., :3]  # (H, W, 3)


def ink(image: np.ndarray) -> float:
    return float(np.mean(image.min(-1) < 0.97))


def has(image: np.ndarray, colour: str) -> bool:
    from matplotlib.colors import to_rgb

    return bool((np.abs(image - np.array(to_rgb(colour))).max(-1) < 0.02).sum() > 50)


def test_a_comparison_draws_panels_with_curve_base_and_front(store, tmp_path):
    (table,) = compare(store.root)
    draw_comparison(table, tmp_path / "c.png")
    image = pixels(tmp_path / "c.png")
    assert image.shape[0] > 500 and image.shape[1] > 1500
    halves = np.array_split(image[:, 120:], 2, axis=0)
    cells = [cell for half in halves for cell in np.array_split(half, 2, axis=1)]
    assert all(ink(part) > 0.02 and has(part, "#0072B2") for part in cells)  # the method in each
    assert has(image, "#bdbdbd") and has(image, "#222222")  # front, base


def test_many_rivals_are_drawn_against_every_cost_and_a_bound_as_one(make, tmp_path, monkeypatch):
    from matplotlib.colors import to_hex

    gain = {1: 0.0, 2: 0.4, 4: 0.8, 8: 1.1, 16: 1.3, 32: 1.4}
    keys = {"train_depth": 1, "gain": gain, "units": PROBLEM_UNITS, "rivals": RIVALS, "spends": True}
    for seed in range(2):
        make.run(depths=tuple(gain), seed=seed, **keys)
    (table,) = compare(make.root)
    kept = []
    monkeypatch.setattr(plots, "_save", lambda picture, path: kept.append(picture))
    draw_comparison(table, tmp_path / "c.png")
    panels = {ax.get_title("left"): ax for ax in kept[0].axes if ax.axison}
    assert list(panels) == [
        f"against {what}" for what in ("depth", "tokens", "FLOPs", "latency", "device-hours")
    ]
    (legend,) = [ax.get_legend() for ax in kept[0].axes if ax.get_legend()]
    names = [text.get_text() for text in legend.get_texts()]
    assert names[0] == "latent" and set(RIVALS) <= set(names) and not kept[0].legends
    assert panels["against depth"].get_xscale() == panels["against tokens"].get_xscale() == "log"

    def curves(title):
        return [
            line
            for line in panels[title].lines
            if len(line.get_xdata()) == 6
            and line.get_linestyle() != "None"
            and line.get_label() != "Pareto front"
        ]

    assert len(curves("against depth")) == len(curves("against tokens")) == len(curves("against FLOPs")) == 11
    assert len(curves("against latency")) == 6  # with the five that were timed
    (bound,) = [line for line in curves("against tokens") if line.get_color() == "#777777"]
    assert bound.get_linestyle() == "--" and bound.get_linewidth() == 1 and bound.get_marker() in ("", "None")
    spent = [e.costs["tokens_per_example"] for e in table.entries if e.rival == "oracle"]
    assert list(bound.get_xdata()) == spent
    colours = {line.get_label(): to_hex(line.get_color()) for line in curves("against depth")}
    assert colours["best-of-n"] == colours["best-of-n at equal tokens"] and len(set(colours.values())) == 8
    front = next(line for line in panels["against tokens"].lines if line.get_label() == "Pareto front")
    assert max(front.get_ydata()) < max(bound.get_ydata())
    plots._pyplot().close(kept[0])


def test_a_comparison_without_times_says_so(make, tmp_path):
    run = make.run()
    curve = [replace(judged, latency_p50_ms=None, latency_p95_ms=None) for judged in run.result.curve]
    run.write_result(replace(run.result, curve=curve))
    draw_comparison(compare(make.root)[0], tmp_path / "c.png")
    assert ink(pixels(tmp_path / "c.png")) > 0.02


def test_costs_far_apart_go_on_a_logarithmic_axis(make, tmp_path):
    make.run(latency=0.5)
    make.run(latency=80.0, settings={"latent.loss": "erl"})
    draw_comparison(compare(make.root)[0], tmp_path / "c.svg")
    text = (tmp_path / "c.svg").read_text(encoding="utf-8")
    assert len(text) > 10_000


def test_a_legend_of_long_labels_stays_inside_the_picture(make, tmp_path):
    for i in range(9):
        make.run(
            settings={
                "train.lr": 0.001 * (i + 1),
                "latent.loss": "erl" if i % 2 else "prl",
                "latent.noise": 0.1 * i,
            }
        )
    (table,) = compare(make.root)
    draw_comparison(table, tmp_path / "c.png")
    image = pixels(tmp_path / "c.png")
    legend = image[int(0.72 * len(image)) :]
    edges = [legend[:, :12], legend[:, -12:], image[-6:]]
    assert [ink(edge) for edge in edges] == [0, 0, 0]
    assert len({_look(i) for i in range(30)}) == 30


@pytest.mark.parametrize("name", ["a$^{$b", "_hidden", "x" * 120])
def test_any_name_can_be_drawn(make, tmp_path, name):
    make.run(experiment=name, rivals=RIVALS)
    draw_comparison(compare(make.root)[0], tmp_path / "c.png")
    assert ink(pixels(tmp_path / "c.png")) > 0.02


def test_several_comparisons_get_a_file_each(make, tmp_path):
    make.run()
    make.run(digest="f" * 32)
    paths = draw_comparisons(compare(make.root), tmp_path / "c.png")
    assert [p.name for p in paths] == ["c.png", "c-2.png"] and all(p.exists() for p in paths)


@pytest.mark.parametrize("f", FIGURES, ids=lambda f: type(f).__name__)
def test_each_figure_is_drawn(f, tmp_path):
    draw_figures([f], tmp_path / "f.png")
    image = pixels(tmp_path / "f.png")
    assert image.shape[1] == 1350 and ink(image) > 0.005


def test_figures_are_stacked_and_repeat_to_the_byte(tmp_path):
    for name in ("a.png", "b.png"):
        draw_figures(FIGURES, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    draw_figures(FIGURES[:1], tmp_path / "one.png")
    assert pixels(tmp_path / "a.png").shape[0] > 3 * pixels(tmp_path / "one.png").shape[0]


def test_nothing_and_nowhere_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="nothing to plot"):
        draw_figures([], tmp_path / "f.png")
    with pytest.raises(ConfigError, match="has the wrong extension for the image"):
        draw_figures(FIGURES, tmp_path / "f.txt")
