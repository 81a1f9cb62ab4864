"""Runs that begin with another experiment: made when needed, made once, finished after whatever stops them."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import yaml
from command import mlflow_runs, runs, until

SOURCE = "backbone.source"


@pytest.fixture
def experiments(tiny_text):
    """``experiments(second={...})`` writes two: ``second`` begins with what ``first`` trains."""

    def write(**changes):
        keys = dict(word.split("=", 1) for word in tiny_text)
        keys |= {
            "dataset.name": keys.pop("dataset"),
            "method": "mor",
            "train_depth": "2",
            "eval.curve": "false",
        }
        first = {**keys, "mor.routing": "none"}
        sizes = ("backbone.hidden", "backbone.heads", "backbone.kv_heads", "backbone.ffn")
        second = {k: v for k, v in keys.items() if k not in sizes} | {SOURCE: "experiment:first"}
        found = {"first": first | changes.get("first", {}), "second": second | changes.get("second", {})}
        found |= {name: second | keys for name, keys in changes.items() if name not in found}
        Path("experiments.yaml").write_text(yaml.safe_dump({"experiments": found}))

    write()
    return write


def by_experiment():
    return {r.identity["experiment"]: r for r in runs()}


def test_a_stage_is_made_first_and_then_found(experiments, reason, store):
    shown = reason("run", "second", "--dry-run")
    assert shown.code == 0 and "Runs first, unless already finished: first" in shown.out
    said = reason("run", "second")
    assert said.code == 0, said.err
    assert "starts from first" in said.err
    made = by_experiment()
    first, second = made["first"], made["second"]
    assert second.identity["stages"] == second.result.stages == {SOURCE: first.name}
    assert first.identity["stage_of"] == second.name
    metrics = second.result.metrics
    both = first.result.metrics["device_hours"] + metrics["device_hours"]
    assert metrics["lineage_device_hours"] == pytest.approx(both, rel=1e-3)
    tags = mlflow_runs(store)[second.name].data.tags
    assert tags["stage.backbone.source"] == first.name
    assert "lineage_device_hours" in mlflow_runs(store)[second.name].data.metrics
    # What finished is found again, by the run itself and by an evaluation of it.
    assert reason("run", "second").code == 0
    assert reason("evaluate", second.name, "depth=1").code == 0
    assert sorted(r.identity["experiment"] for r in runs()) == ["first", "second", "second", "second"]


def test_a_sweep_makes_each_stage_once(experiments, reason, store):
    said = reason("sweep", "second", "seed=0,1")
    assert said.code == 0, said.err
    assert "2 trials, 2 models trained (and 2 they start from)" in said.out
    assert len(runs()) == 4 and all(r.result.training for r in runs())
    (sweep,) = runs("sweep")
    total = sum(r.result.metrics["device_hours"] for r in runs())
    assert sweep.sweep_result.metrics["lineage_device_hours"] == pytest.approx(total, rel=0.2)
    for child in runs():
        for name in child.identity["stages"].values():
            (stage,) = [r for r in runs() if r.name == name]
            assert stage.result.seed == child.result.seed


@pytest.mark.parametrize("killed", ["first", "second"])
def test_killed_in_either_stage_it_is_finished_by_resume(experiments, spawn, reason, store, killed):
    slow = {"train.epochs": "60", "train.every": "2", "train.patience": "0"}
    experiments(**{killed: slow})

    def begun():
        found = by_experiment().get(killed)
        return found if found and any((found / "checkpoints").glob("step-*")) else None

    process = spawn("run", "second")
    until(begun)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert by_experiment()["second"].status != "finished"
    said = reason("resume", "last")
    assert said.code == 0, said.err
    assert all(r.status == "finished" for r in runs()) and len(runs()) == 2
    if killed == "first":  # it went on from its checkpoint
        assert sum(e["event"] == "attempt" for e in by_experiment()["first"].events()) == 2


def test_a_stage_that_is_made_is_not_looked_up_again(experiments, reason, store):
    """Its run is written down: the experiments file may have changed or stand elsewhere."""
    assert reason("run", "second").code == 0
    second = by_experiment()["second"]
    (second / "result.json").unlink()
    Path("experiments.yaml").unlink()
    said = reason("resume", second.name)
    assert said.code == 0, said.err
    assert len(runs()) == 2


def test_what_stood_on_a_stage_is_judged_again_without_it(experiments, reason, store):
    assert reason("run", "second").code == 0
    made = by_experiment()
    assert reason("rm", made["first"].name, "-y").code == 0
    assert reason("evaluate", made["second"].name, "depth=1").code == 0
    again = next(r for r in runs() if r.name != made["second"].name).result
    assert again is not None
    before = made["second"].result.metrics
    stages = before["lineage_device_hours"] - before["device_hours"]
    whole = again.metrics["device_hours"] + before["train_device_hours"] + stages
    assert again.metrics["lineage_device_hours"] == pytest.approx(whole)


def test_a_failed_stage_fails_what_stands_on_it(experiments, reason, store):
    experiments(
        first={"train.lr": "1e30", "train.clip": "0", "train.epochs": "9"}, third={"train.lr": "1e-4"}
    )
    said = reason("run", "second")
    assert said.code == 1 and "first, which second" in said.err and "not finite" in said.err
    assert {name: r.status for name, r in by_experiment().items()} == {"first": "failed", "second": "failed"}
    said = reason("resume", by_experiment()["second"].name)
    assert said.code == 1 and "not finite" in said.err and "Traceback" not in said.err
    attempts = [e for e in by_experiment()["first"].events() if e["event"] == "attempt"]
    assert len(attempts) == 2
    said = reason("sweep", "second", "train.weight_decay=0,0.1")
    assert said.code == 3 and said.err.count("not finite") >= 2
    attempts = [e for e in by_experiment()["first"].events() if e["event"] == "attempt"]
    assert len(attempts) == 3, "a stage that failed is not tried again for each trial"


def test_experiments_that_begin_with_each_other_are_refused(experiments, reason):
    experiments(first={SOURCE: "experiment:second"})
    for words in (["run", "second", "--dry-run"], ["run", "second"]):
        said = reason(*words)
        assert said.code == 2 and "second -> first -> second" in said.err
    assert not runs()


def test_an_experiment_that_is_not_there_is_refused(experiments, reason):
    said = reason("run", "second", f"{SOURCE}=experiment:frist", "--dry-run")
    assert said.code == 2 and "'first'" in said.err and SOURCE in said.err
