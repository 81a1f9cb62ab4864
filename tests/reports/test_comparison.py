"""Differences, choices, fronts and hints; and the forms that programs read."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_folders import PROBLEM_UNITS, RIVALS

from reason.reports.comparison import BASE, BASELINE, BOUND, as_dict, as_lines, compare, pareto_front


def table_of(root, *names, **keys):
    (table,) = compare(root, names, **keys)
    return table


@pytest.fixture(scope="module")
def table(store):
    return table_of(store.root)


def test_base_and_trivial_baseline_stand_in_the_same_table(table):
    assert [e.kind for e in table.entries] == [BASE] + ["method"] * 4 + [BASELINE]
    assert [e.label for e in table.entries] == ["latent base", *["latent"] * 4, "popularity"]


def test_differences_are_to_the_base_on_the_same_users_and_seeds(table):
    base = table.entries[0]
    assert base.difference is None
    for e in table.entries[1:]:
        assert e.reference == "latent base" and e.difference
        assert e.difference.value == pytest.approx(e.accuracy.value - base.accuracy.value)
        assert (e.difference.n, e.difference.seeds) == (300, 3)
        assert e.p is not None and e.p >= e.difference.p  # Holm
    deep, rival = table.entries[3], table.entries[-1]
    assert deep.distinguishable and deep.difference.low > 0
    assert rival.distinguishable and rival.difference.high < 0
    paired = deep.difference.high - deep.difference.low
    assert paired < (deep.accuracy.high - deep.accuracy.low)  # users in common drop out
    assert table.entries[1].distinguishable is False  # depth 0 has no gain


def test_accuracy_is_the_mean_over_seeds_and_its_interval_holds_it(table):
    for e in table.entries[:-1]:
        mean = np.mean([p.entry.accuracy.value for p in e.points])
        assert e.accuracy.value == pytest.approx(mean)
        assert e.accuracy.low < mean < e.accuracy.high and e.accuracy.seeds == 3


def test_without_a_base_the_least_depth_is_the_reference_and_a_hint_says_what_to_run(make):
    make.run(depths=(0, 1, 2), typed={"train.lr": 0.003})
    table = table_of(make.root)
    assert [e.reference for e in table.entries] == ["", *["latent at depth 0"] * 3]
    (hint,) = table.hints
    assert hint.endswith("reason run latent train.lr=0.003 train_depth=0 seed=0")


def test_the_hint_names_all_seeds_and_a_base_silences_it(make):
    make.sweep(depths=(0, 1), seeds=(0, 1, 2))
    assert table_of(make.root).hints[0].endswith("reason sweep latent train_depth=0 depth=0 seed=0,1,2")
    make.bases()
    assert table_of(make.root).hints == []


def test_what_is_judged_as_usual_needs_no_words_for_it(make):
    make.run(settings={"latent.policy": "fixed", "latent.loss": "erl"})
    make.run(settings={"latent.policy": "cos", "latent.loss": "erl"})
    make.run(settings={"latent.policy": "fixed", "latent.loss": "prl"})
    labels = {e.label for e in table_of(make.root).entries if e.kind == "method"}
    assert labels == {"latent loss=erl", "latent loss=erl policy=cos", "latent loss=prl"}


def test_a_base_that_was_trained_otherwise_is_said(make):
    make.bases(seeds=(0,))
    make.run()
    assert not any("trained with other settings than" in note for note in table_of(make.root).notes)
    make.run(settings={"train.lr": 0.5, "latent.loss": "erl"})
    (note,) = [note for note in table_of(make.root).notes if "trained with other settings than" in note]
    assert (
        "train.lr=0.5 instead of" in note and "latent.loss" not in note
    )  # what belongs to the method is its own


def test_a_base_without_a_shared_seed_is_no_reference(make):
    make.bases(seeds=(5,))
    make.run(depths=(0, 1))
    references = {e.reference for e in table_of(make.root).entries if e.kind == "method"}
    assert references == {"", "latent at depth 0"}


def test_only_shared_seeds_are_paired_and_it_is_said(make):
    make.bases(seeds=(0,))
    make.run(seed=0)
    make.run(seed=1)
    table = table_of(make.root)
    assert all(e.difference.seeds == 1 for e in table.entries if e.difference)
    assert any("common seeds: 0" in note for note in table.notes)


# --- choices read validation only -----------------------------------------------------------------


def test_the_depth_is_chosen_by_validation_though_test_prefers_another(make):
    make.run(gain={0: 0.0, 1: 0.2, 2: 1.2}, valid_gain={0: 0.0, 1: 1.2, 2: 0.2})
    table = table_of(make.root)
    methods = [e for e in table.entries if e.kind == "method"]
    assert [e.chosen for e in methods] == [False, True, False]
    assert methods[2].accuracy.value > methods[1].accuracy.value  # test would have taken depth 2
    (best,) = [e for e in table_of(make.root, best=True).entries if e.kind == "method" and e.difference]
    assert best.depth == 1


def test_best_takes_settings_by_validation_too_and_keeps_the_base(make):
    make.bases(seeds=(0,))
    make.run(settings={"latent.loss": "erl"}, gain={0: 0, 1: 0, 2: 1.5}, valid_gain={0: 0, 1: 0, 2: 0.1})
    make.run(settings={"latent.loss": "prl"}, gain={0: 0, 1: 0, 2: 0.1}, valid_gain={0: 0, 1: 0, 2: 1.5})
    entries = table_of(make.root, best=True).entries
    assert [e.kind for e in entries] == [BASE, "method", BASELINE]
    assert dict(entries[1].key.settings)["latent.loss"] == "prl" and entries[1].depth == 2


def test_a_tie_on_validation_goes_to_the_shallowest(make):
    run = make.run(gain={0: 0.0, 1: 0.5, 2: 0.5})
    curve = [replace(j, valid_accuracy=replace(j.valid_accuracy, value=0.1)) for j in run.result.curve]
    run.write_result(replace(run.result, curve=curve))
    chosen = [e.depth for e in table_of(make.root).entries if e.chosen]
    assert chosen == [0]


# --- fronts ---------------------------------------------------------------------------------------


def test_pareto_front_by_hand():
    accuracy = [0.1, 0.3, 0.2, 0.3, 0.3, 0.9]
    cost = [1.0, 2.0, 3.0, 4.0, 2.0, None]
    assert pareto_front(accuracy, cost) == [True, True, False, False, True, False]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=9))
def test_pareto_front_is_what_nothing_dominates(points):
    def beaten(a, c):
        return any(b >= a and d <= c and (b > a or d < c) for b, d in points)

    found = pareto_front([float(a) for a, _ in points], [float(c) for _, c in points])
    assert found == [not beaten(a, c) for a, c in points]


def test_times_of_different_devices_are_not_ranked(make):
    make.run(device_name="Slow CPU")
    make.run(device_name="Fast GPU", settings={"latent.loss": "erl"})
    table = table_of(make.root)
    assert not table.one_device
    assert {cost for e in table.entries for cost in e.fronts} == {"flops_per_example"}  # counted, not timed
    assert any("Fast GPU" in note for note in table.notes)


def test_the_front_leaves_out_what_is_slower_and_worse(make):
    make.run(depths=(0, 1, 2), gain={0: 0.0, 1: 0.8, 2: 0.2})
    fronts = {e.depth: e.fronts for e in table_of(make.root).entries if e.kind == "method"}
    assert "latency_p50_ms" in fronts[0] and "latency_p50_ms" in fronts[1] and not fronts[2]


def test_a_bound_is_shown_and_never_ranked_and_rivals_stand_in_their_order(make):
    gain = {1: 0.0, 2: 0.5, 4: 0.9}
    make.run(depths=tuple(gain), train_depth=1, gain=gain, units=PROBLEM_UNITS, rivals=RIVALS, spends=True)
    table = table_of(make.root)
    assert [e.rival for e in table.entries if e.depth == 4] == [
        "",
        *(n for n in RIVALS if n != "oracle"),
        "oracle",
    ]
    assert table.spent == ["tokens_per_example", "flops_per_example"]
    bounds = [e for e in table.entries if e.kind == BOUND]
    assert len(bounds) == 3 and not any(e.chosen or e.fronts or e.p is not None for e in bounds)
    best = max(table.entries, key=lambda e: e.accuracy.value)
    assert best in bounds and best.reference == "latent at depth 4" and best.difference
    for cost in ("tokens_per_example", "flops_per_example", "latency_p50_ms"):
        assert (
            max((e for e in table.entries if cost in e.fronts), key=lambda e: e.accuracy.value).kind
            == "method"
        )
    assert [e.rival for e in table_of(make.root, best=True).entries if e.kind == BOUND] == []
    timed = {e.rival: e.costs.get("latency_p50_ms") for e in table.entries if e.depth == 4}
    assert timed["beam search"] == pytest.approx(1.3 * timed[""]) and timed["one sample"] is None
    assert not any("device_hours" in e.costs for e in table.entries if e.rival)  # hours are those of the run
    assert {table.short(e) for e in table.entries} == {"latent", "popularity", *RIVALS}


# --- for programs ---------------------------------------------------------------------------------

KEYS = [
    "label", "kind", "experiment", "method", "rival", "backbone", "train_depth", "depth", "depth_unit", "settings", "seeds",
    "runs", "accuracy", "accuracy_low", "accuracy_high", "valid_accuracy", "valid_accuracy_low", "valid_accuracy_high",
    "chosen_on_validation", "reference", "difference", "difference_low", "difference_high", "p", "p_holm",
    "distinguishable", "paired_seeds", "latency_p50_ms", "latency_p95_ms", "throughput_per_s", "effective_depth",
    "flops_per_example", "tokens_per_example", "device_hours", "gpu_hours", "pareto", "device",
]  # fmt: skip
SHARED = ["accuracy_metric", "dataset", "data_digest", "split", "n"]


def test_json_has_stable_keys_and_the_same_numbers_each_time(store, table):
    data = as_dict(table)
    assert list(data) == [*SHARED, "units", "notes", "hints", "rows"]
    assert all(list(row) == [*KEYS, "metrics"] for row in data["rows"])
    again = as_dict(table_of(store.root))
    assert json.dumps(data, allow_nan=False) == json.dumps(again, allow_nan=False)
    assert data["rows"][1]["metrics"].keys() == {"Recall@10", "MRR"}


def test_csv_lines_are_flat_and_all_alike(table):
    lines = as_lines(table)
    assert all(list(line) == SHARED + KEYS for line in lines)
    assert all(not isinstance(v, dict | list) for line in lines for v in line.values())
    assert lines[1]["seeds"] == "0 1 2"


def test_the_verb_prints_json_csv_and_tables(store, capsys, tmp_path):
    from reason.cli.compare import compare as verb

    verb(["latent"], json=True, runs=store.root)
    out = capsys.readouterr()
    assert json.loads(out.out)["tables"][0]["rows"][0]["kind"] == "base" and out.err == ""
    verb(None, csv=True, runs=store.root)
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 6 and rows[-1]["label"] == "popularity" and rows[-1]["latency_p50_ms"] == ""
    verb(["latent"], plot=tmp_path / "c.png", runs=store.root)
    out = capsys.readouterr()
    assert "popularity" in out.out and "Image:" in out.err and (tmp_path / "c.png").exists()


def test_the_verb_refuses_before_it_computes(store, tmp_path):
    from reason.cli.compare import compare as verb
    from reason.errors import ConfigError

    with pytest.raises(ConfigError, match="cannot be used together"):
        verb(None, json=True, csv=True, runs=store.root)
    with pytest.raises(ConfigError, match="has the wrong extension for the image"):
        verb(None, plot=tmp_path / "c.doc", runs=store.root)
    with pytest.raises(ConfigError, match="no folder"):
        verb(None, plot=tmp_path / "missing" / "c.png", runs=store.root)
