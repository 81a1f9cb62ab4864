"""What is drawn in a terminal: whole, within the window, and readable without colour."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from report_folders import FIGURES, PROBLEM_UNITS, RIVALS
from rich.console import Console

from reason.methods.figures import HeatMap, Lines, Table, Tree, as_dict
from reason.reports import formatting
from reason.reports.comparison import compare
from reason.reports.summaries import comparison, run_summary
from reason.reports.terminal import figure


def drawn(renderable, width=80, ascii_only=False, **keys) -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii" if ascii_only else "utf-8", write_through=True)
    Console(file=stream, width=width, highlight=False, **keys).print(renderable)
    return raw.getvalue().decode()


def fits(text: str, width: int) -> bool:
    return max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("f", FIGURES, ids=lambda f: type(f).__name__)
def test_figures_fit_and_are_plain_without_colour(f):
    for text in (drawn(figure(f)), drawn(figure(f), ascii_only=True)):
        assert fits(text, 80) and "\x1b" not in text
        assert f.title in text and f.note in text
    assert drawn(figure(f), ascii_only=True).isascii()


@pytest.mark.parametrize("f", FIGURES, ids=lambda f: type(f).__name__)
def test_no_color_wins_over_a_terminal(f, monkeypatch):
    coloured = drawn(figure(f), force_terminal=True, color_system="truecolor")
    assert re.search(r"\x1b\[[0-9;]*(3[0-7]|[34]8;2)", coloured) or isinstance(f, Table)
    monkeypatch.setenv("NO_COLOR", "1")
    plain = drawn(figure(f), force_terminal=True, color_system="truecolor")
    assert not re.search(r"\x1b\[[0-9;]*(3[0-7]|4[0-7]|[34]8)", plain)


def test_figures_say_their_numbers_without_colour():
    assert "Fargo [1996]" in drawn(figure(FIGURES[0])) and "0.5123" in drawn(figure(FIGURES[0]))
    lines = drawn(figure(FIGURES[1]))
    assert lines.count("●") == 5 and lines.count("▲") == 4  # points, and one in the legend
    heat = drawn(figure(FIGURES[2]))
    assert "█ 1.000" in heat and "▒ 0.500" in heat
    tokens = drawn(figure(FIGURES[3]))
    assert "the(1) cat(2)\n[sat](3)" in tokens and "recursions" in tokens


def test_a_tree_is_drawn_line_by_line():
    assert drawn(figure(FIGURES[4])).splitlines()[:7] == [
        "Lineage",
        "2+3+4",
        "├─ 2+3=5 0.90  2 copies",
        "│  └─ 5+4=9 0.95  9 right",
        "└─ 2+3=6 0.40",
        "   ├─ 6+4=10 0.30  dropped",
        "   └─ 6+[4]",
    ]
    assert "`- 2+3=6 0.40" in drawn(figure(FIGURES[4]), ascii_only=True)


def test_a_line_of_descent_is_one_line_and_wraps_beside_its_guides():
    n = 12
    f = Tree("T", [-1, *range(n)], ["step"] * (n + 1), [None] * (n + 1), [1] * (n + 1), [""] * (n + 1))
    text = drawn(figure(f), 40)
    assert fits(text, 40) and text.count("step") == n + 1 and text.count("→") == n
    twins = Tree("T", [-1, 0, 0], ["a", "word " * 30, "word " * 30], [None] * 3, [1] * 3, [""] * 3)
    lines = drawn(figure(twins), 40).splitlines()
    assert max(map(len, lines)) <= 40
    at = lines.index(next(line for line in lines if line.startswith("└─ ")))
    assert lines[2].startswith("├─ word") and at > 4
    assert all(line.startswith("│  word") for line in lines[3:at])
    assert all(line.startswith("   word") for line in lines[at + 1 : 2 * at - 2])


def test_a_tree_deeper_than_the_window_still_fits():
    parents, n = [-1], 60
    for i in range(n):  # a comb: it branches at every step
        parents += [2 * i - 1 if i else 0, 2 * i - 1 if i else 0]
    size = len(parents)
    f = Tree("T", parents, [f"n{i}" for i in range(size)], [None] * size, [1] * size, [""] * size)
    text = drawn(figure(f), 60)
    assert fits(text, 60) and all(f"n{i}" in text for i in range(size))


def test_a_heat_map_too_wide_is_turned_over():
    wide = HeatMap("Wide", [[i / 40 for i in range(40)]], ["step"], [f"item {i}" for i in range(40)])
    text = drawn(figure(wide))
    assert fits(text, 80) and sum(line.startswith("item") for line in text.splitlines()) == 40


def test_lines_without_points_or_range_are_drawn():
    assert "no data" in drawn(figure(Lines("None", [0, 1], {"a": [None, None]})))
    assert drawn(figure(Lines("Flat", [1], {"a": [2.0]}))).count("●") == 2


@pytest.mark.parametrize("f", FIGURES, ids=lambda f: type(f).__name__)
def test_figures_survive_json(f):
    import json

    told = json.loads(json.dumps(as_dict(f)))
    assert told.pop("kind") and type(f)(**told) == f


def test_run_summary_says_all_that_a_newcomer_needs(make):
    run = make.run(gain={0: 0.0, 1: 0.3, 2: 0.9})
    text = drawn(run_summary(run.result, run.path))
    assert fits(text, 80)
    flat = " ".join(text.split())
    for entry in run.result.curve:
        assert f"{entry.accuracy.value:.4f} [{entry.accuracy.low:.4f}" in text
    for needed in (
        "latent steps", "popularity", "NDCG@10 measures accuracy: 1 if the target is ranked first among all items",
        "300 users", "◂ 2 latent steps: the depth chosen on validation", "2 latent steps vs. 0 latent steps: +",
        "vs. popularity: +", "better", "device-hours on Test CPU, 2 threads", "stopped early", run.name,
        "reason sweep latent depth=0,1,2 seed=0..2", "reason run latent train_depth=0", f"reason inspect {run.name}",
    ):  # fmt: skip
        assert needed in flat, needed


def test_run_summary_marks_the_choice_of_validation_and_not_of_test(make):
    run = make.run(gain={0: 0.0, 1: 0.0, 2: 1.5}, valid_gain={0: 0.0, 1: 1.5, 2: 0.0})
    text = drawn(run_summary(run.result))
    assert re.search(r"^1 ◂", text, re.M) and not re.search(r"^2 ◂", text, re.M)


def test_run_summary_of_a_base_and_without_p95(make):
    run = make.run(depths=(0,), train_depth=0)
    (only,) = run.result.curve
    result = replace(run.result, curve=[replace(only, latency_p95_ms=None)])
    text = drawn(run_summary(result, run.path))
    assert "the base" in text and "p95" not in text and "◂" not in text and "sweep" not in text


def solved(make, **keys):
    """A run that is judged beside many rivals."""
    gain = {1: 0.0, 2: 0.4, 4: 0.8, 8: 1.2}
    return make.run(
        depths=tuple(gain),
        train_depth=1,
        gain=gain,
        units=PROBLEM_UNITS,
        **{"rivals": RIVALS, "spends": True} | keys,
    )


def test_all_rivals_fit_one_screen_each_with_its_difference_and_what_it_spends(make):
    run = solved(make)
    text = drawn(run_summary(run.result, run.path), 100)
    assert fits(text, 100) and len(text.splitlines()) <= 45  # the path of the run may take a line more
    head = re.findall(r"\S+", " ".join(text.splitlines()[2:4]))
    assert {"tokens/", "MFLOP/", "problem", "p50", "difference"} <= set(head)
    rows = text.splitlines()[5:]
    shown = run.result.head
    for name, rival in shown.rivals.items():
        label = rival.variant_of or name
        spent = formatting.number(rival.cost["tokens"] / rival.accuracy.n)
        own = [r for r in rows if r.startswith(label) and formatting.interval(rival.accuracy.interval) in r]
        assert len(own) == 1 and f" {spent} " in own[0] and re.search(r"[+-]\d\.\d{4} \[", own[0])
        assert bool(re.search("[▲▼≈]", own[0])) != rival.bound, "a bound is never better"
    order = [
        rows.index(next(r for r in rows if r.startswith(w)))
        for w in ("8 ◂", "DVTS", "at equal tokens:", "popularity")
    ]
    assert order == sorted(order) and sum(r.startswith("best-of-n ") for r in rows[order[2] :]) == 1
    assert (
        "Rivals answer the same problems, also with 8 particles. A bound is no method" in text
        and "8 particles vs. 1 particle: +" in text
    )
    assert text.count(" vs. ") == 1 and "after Holm's correction for 13 tests" in " ".join(text.split())
    assert "train_depth=0" not in text  # there is no base of what cannot be left out


def test_rivals_stand_beside_the_depth_that_was_asked_for_whatever_validation_prefers(make):
    run = solved(make, valid_gain={1: 0.0, 2: 2.0, 4: 0.0, 8: 0.0})
    text = drawn(run_summary(run.result, run.path), 100)
    assert re.search(r"^2 ◂", text, re.M) and "2 particles: the depth chosen on validation" in text
    assert "also with 8 particles" in text and "8 particles vs. 1 particle: +" in text
    rival = run.result.head.rivals["beam search"]
    assert re.search(rf"^beam search +{re.escape(formatting.interval(rival.accuracy.interval))}", text, re.M)


def test_a_window_too_narrow_for_the_differences_still_says_them(make):
    run = solved(make)
    text = " ".join(drawn(run_summary(run.result, run.path), 60).split())
    assert "difference [95%]" not in text.split("accuracy")[0] and "8 particles vs. best-of-n: +" in text


def test_operations_are_per_unit_of_throughput_where_the_data_decides_how_many_there_are(make):
    run = solved(make, spends=False, rivals=None)
    text = drawn(run_summary(run.result, run.path), 120)
    assert "MFLOP/token" in text and "tokens/problem" not in text.replace("\n", "")
    assert re.search(r"^8 .* 0\.180$", text, re.M)  # 9 MFLOP for 50 tokens


def test_comparison_keeps_accuracy_and_difference_at_80_columns(store):
    (table,) = compare(store.root)
    text = drawn(comparison(table))
    assert fits(text, 80) and "\x1b" not in text
    for e in table.entries:
        assert formatting.interval(e.accuracy) in text and re.search(rf"^{e.label} ", text, re.M)
        assert e.difference is None or formatting.difference(e.difference) in text
    assert "≈" in text and "▲" in text and "▼" in text and "Columns omitted to fit the window" in text
    assert "latent base, paired over 300 users and 3 seeds" in text
    wide = drawn(comparison(table), width=200)
    assert "Not shown" not in wide and "p95 ms" in wide and "Pareto" in wide
    assert drawn(comparison(table), ascii_only=True).isascii()


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0.0, "0"), (1.234, "1.23"), (12.34, "12.3"), (0.012345, "0.0123"), (5123.4, "5,123"), (123.4, "123"),
     (0.00001234, "1.23e-05"), (-0.5, "-0.500")],
)  # fmt: skip
def test_numbers_have_about_three_digits(value, text):
    assert formatting.number(value) == text


def test_output_is_light_to_import_and_plain_in_a_pipe():
    code = (
        "import sys; from reason.cli import output;"
        "assert not any(m == 'rich' or m.startswith('rich.') for m in sys.modules);"
        "output.show('[bold]x[/bold]'); output.say('[1, 2]'); output.emit_csv([{'a': 1, 'b': None}]); output.emit_json({'é': 1})"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "NO_COLOR")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout == '[bold]x[/bold]\na,b\n1,\n{\n  "é": 1\n}\n' and done.stderr == "[1, 2]\n"


def test_devices_that_differ_stand_beside_the_times_and_never_push_out_the_difference(make):
    make.run(device_name="Slow CPU")
    make.run(device_name="Fast CPU", settings={"latent.loss": "erl"})
    (table,) = compare(make.root)
    narrow, wide = drawn(comparison(table)), drawn(comparison(table), width=200)
    assert "difference [95%]" in narrow and "p50 ms" not in narrow.splitlines()[2]
    assert "Slow CPU, 2 threads" in wide and "p50 ms" in wide
