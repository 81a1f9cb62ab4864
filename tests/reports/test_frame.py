"""What may stand in one table, what is chosen, and what names mean."""

from __future__ import annotations

from dataclasses import replace

import pytest
from report_folders import UNITS

from reason.errors import ConfigError
from reason.reports.frame import Frame, frames
from reason.tracking.result import SweepTrial


def only(found: list[Frame]) -> Frame:
    (frame,) = found
    return frame


def test_runs_that_differ_in_the_seed_alone_are_one_group(store):
    frame = only(frames(store.root))
    shape = {(k.train_depth, k.depth): [p.seed for p in points] for k, points in frame.groups.items()}
    assert shape == {(0, 0): [0, 1, 2]} | {(3, d): [0, 1, 2] for d in range(4)}
    assert all(not key.settings for key in frame.groups)  # hardware keys differ and do not count


def test_a_run_stands_at_every_depth_of_its_curve(make):
    make.run(depths=(0, 1, 2))
    assert [key.depth for key in only(frames(make.root)).groups] == [0, 1, 2]


def test_settings_that_differ_make_groups_of_their_own(make):
    make.run(settings={"latent.loss": "erl"})
    make.run(settings={"latent.loss": "prl"})
    make.run(settings={"latent.loss": "prl"}, seed=1)
    groups = only(frames(make.root)).groups
    assert {(dict(k.settings)["latent.loss"], len(p)) for k, p in groups.items()} == {("erl", 1), ("prl", 2)}


def test_of_repeats_the_newest_counts(make):
    old, new = make.run(), make.run()
    frame = only(frames(make.root))
    assert {p.run for p in frame.points} == {new.name}
    assert any(old.name in note for note in frame.notes)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"digest": "f" * 32}, "data digest"),
        ({"accuracy": "exact match"}, "accuracy"),
        ({"users": 100}, "number of examples"),
        ({"units": {"depth": "d", "zero": "", "example": "user", "latency": "one answer", "throughput": "users/s"}},
         "unit of latency"),
    ],
)  # fmt: skip
def test_named_runs_that_cannot_be_ranked_are_refused_and_told_apart(make, other, words):
    a, b = make.run(), make.run(experiment="other", **other)
    with pytest.raises(ConfigError, match=words) as refused:
        frames(make.root, ["latent", "other"])
    assert a.name in str(refused.value) and b.name in str(refused.value)
    assert (
        len(frames(make.root)) == len(frames(make.root, ["latent"])) == 2
    )  # of one method, or of all: two tables
    assert only(frames(make.root, ["other"])).points[0].run == b.name


def test_a_different_unit_of_depth_does_not_hinder(make):
    make.run()
    make.run(method="pauserec", experiment="pauserec", units=replace(UNITS, depth="pause tokens"))
    assert len(only(frames(make.root, ["latent", "pauserec"])).groups) == 6


def test_names_are_experiments_methods_sweeps_and_runs(make):
    sweep = make.sweep(depths=(0, 1), seeds=(0,))
    lone = make.run(experiment="latent-beauty", settings={"latent.loss": "erl"})

    def runs(*names: str) -> set[str]:
        return {p.run for p in only(frames(make.root, names)).points}

    children = {t.run for t in sweep.sweep_result.trials}
    assert runs("latent") == children | {lone.name}  # the method of all
    assert runs("latent-beauty") == {lone.name} == runs(lone.name) == runs(lone.name[:-3])
    assert runs(sweep.name) == children
    assert runs(str(sweep / "")) == children
    assert runs(sweep.name, lone.name) == children | {lone.name}


def test_a_sweep_counts_the_finished_runs_it_found(make):
    found = make.run(depths=(0,), train_depth=1)
    sweep = make.sweep(depths=(1,), seeds=(0,))
    result = sweep.sweep_result
    trials = [*result.trials, SweepTrial({"depth": "0"}, found.name)]
    sweep.write_result(replace(result, trials=trials))
    assert {p.run for p in only(frames(make.root, [sweep.name])).points} >= {found.name}


def test_names_that_mean_nothing_are_refused_with_the_nearest(make):
    with pytest.raises(ConfigError, match="no finished run"):
        frames(make.root)
    with pytest.raises(ConfigError, match="reason run latent"):
        frames(make.root, ["latent"])
    make.run()
    with pytest.raises(ConfigError, match="Did you mean 'latent'"):
        frames(make.root, ["latant"])
    unfinished = make.run(experiment="later")
    (unfinished / "result.json").unlink()
    with pytest.raises(ConfigError, match="interrupted and has no result"):
        frames(make.root, [unfinished.name])


def test_a_damaged_run_is_left_out_with_a_note_and_the_rest_stands(make):
    good, bad, worse, empty = (make.run(seed=seed) for seed in range(4))
    (bad / "rows/test-depth1.arrow").unlink()
    (worse / "result.json").write_text("{", encoding="utf-8")
    (empty / "result.json").write_text('{"schema": 1}', encoding="utf-8")
    frame = only(frames(make.root))
    assert {p.run for p in frame.points} == {good.name}
    assert any(bad.name in n and "test-depth1" in n for n in frame.notes)
    assert any(worse.name in n and "not valid JSON" in n for n in frame.notes)
    assert any(empty.name in n and "has no run" in n and "reason resume" in n for n in frame.notes)


def test_hours_of_a_shared_model_include_its_training(store):
    frame = only(frames(store.root))
    by_depth = {key.depth: points[0].device_hours for key, points in frame.groups.items() if key.train_depth}
    assert by_depth[3] == pytest.approx(0.032)  # trains: its own hours have it all
    assert by_depth[0] == pytest.approx(0.002 + 0.030)  # its own, and what training cost
