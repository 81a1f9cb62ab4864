"""A run and a sweep, and every verb that reads them."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from command import mlflow_runs, runs

from reason.engine import session
from reason.files import read_json


@pytest.fixture
def ran(reason, tiny, store):
    said = reason("run", "latent", *tiny)
    assert said.code == 0, said.err
    return said


class TestRun:
    def test_it_ends_with_a_table_and_everything_is_in_mlflow(self, ran, reason, store):
        for word in ("NDCG@10", "popularity", "latent steps"):
            assert word in ran.out
        (folder,) = runs()
        result = folder.result
        recorded = mlflow_runs(store)[folder.name]
        assert recorded.info.status == "FINISHED"
        metrics = recorded.data.metrics
        for name in (
            "accuracy", "valid_accuracy", "gpu_hours", "device_hours", "train_device_hours", "latency_p50_ms",
            "throughput_per_s", "effective_depth", "peak_memory_gb", "eval/ndcg_at_20", "train/loss",
        ):  # fmt: skip
            assert name in metrics, name
        assert metrics["accuracy"] == pytest.approx(result.accuracy.value)
        params = recorded.data.params
        assert params["method"] == "latent" and params["gpus"] == "0" and params["depth"] == "2"
        assert recorded.data.tags["reason.config_hash"] == folder.identity["config_hash"]

        listed = reason("list", "runs", "--json")
        assert json.loads(listed.out)["runs"][0]["status"] == "finished"
        shown = reason("show", folder.name, "--origin")
        assert "command line" in shown.out and "NDCG@10" in shown.out
        again = reason("sync")
        assert again.code == 0 and len(mlflow_runs(store)) == 1

    def test_evaluate_at_another_depth_trains_nothing(self, ran, reason):
        first = runs()[0]
        said = reason("evaluate", first.name, "depth=1", "eval.limit=10", "eval.curve=false")
        assert said.code == 0, said.err
        second = next(r for r in runs() if r.name != first.name)
        assert (
            second.identity["trained_by"] == first.name
            and second.identity["train_hash"] == first.identity["train_hash"]
        )
        assert second.result.training is None and second.result.accuracy.n == 10
        assert not list((second / "checkpoints").iterdir())
        assert reason("evaluate", first.name, "depth=3").code == 2
        assert reason("evaluate", first.name, "train.lr=1").code == 2
        assert reason("rm", first.name, "--yes").code == 2, "its model is in use"
        assert reason("rm", first.name, second.name, "--yes").code == 0 and runs() == []

    def test_predict_answers_line_by_line(self, ran, reason, monkeypatch):
        lines = ['{"user": "u1"}', "", "not json", '{"history": ["i3", "i4"], "k": 3}', "[1]"]
        result = runs()[0]
        from reason import load

        users = load(result).session.ctx.dataset.user_ids
        items = load(result).session.ctx.dataset.item_ids
        lines[0] = json.dumps({"user": users[0]})
        lines[3] = json.dumps({"history": items[:2], "k": 3})
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        said = reason("predict", "last", "--depth", "1")
        answers = [json.loads(line) for line in said.out.splitlines()]
        assert len(answers) == 4 and len(answers[0]["items"]) == 10 and len(answers[2]["items"]) == 3
        assert "line 3" in answers[1]["error"] and "line 5" in answers[3]["error"]

    def test_inspect_draws(self, ran, reason):
        said = reason("inspect", "last", "--plot", "user.png")
        assert said.code == 0, said.err
        assert "step" in said.out and Path("user.png").stat().st_size > 20_000
        figures = json.loads(reason("inspect", "last", "--json").out)["figures"]
        assert len(figures) >= 4
        assert reason("inspect", "last", "nobody").code in (1, 2)

    def test_from_python(self, tiny, store):
        import reason

        folder = reason.run("latent", dict(word.split("=") for word in tiny), seed=3)
        loaded = reason.load(folder)
        assert loaded.result.seed == 3
        user = loaded.session.ctx.dataset.user_ids[0]
        assert len(loaded.predict([{"user": user, "k": 5}], depth=0)[0]["items"]) == 5


def test_a_trained_run_answers_whatever_became_of_its_data(reason, store, monkeypatch):
    rows = [f"u{u},i{(u + 3 * t) % 9},{t}" for u in range(30) for t in range(6)]
    Path("mine.csv").write_text("user,item,timestamp\n" + "\n".join(rows) + "\n")
    quick = [
        "train.epochs=1",
        "backbone.hidden=16",
        "backbone.ffn=16",
        "hardware.threads=1",
        "eval.resamples=100",
    ]
    assert reason("run", "latent", "dataset=mine.csv", *quick).code == 0

    def ask():
        monkeypatch.setattr(sys, "stdin", io.StringIO('{"history": ["i1", "i4"], "k": 2}\n'))
        said = reason("predict", "last")
        assert said.code == 0, said.err
        return json.loads(said.out)

    before = ask()
    assert len(before["items"]) == 2
    with open("mine.csv", "a") as f:
        f.write("u0,i5,1700000000\n")
    session._datasets.clear()  # as in a process of its own
    assert ask() == before
    refused = reason("evaluate", "last")
    assert refused.code == 2 and "data has changed" in refused.err and "predict" in refused.err
    Path("mine.csv").rename("moved.csv")
    assert ask() == before


def test_a_run_of_before_versions_answers_and_is_not_taken_for_another(ran, reason, monkeypatch):
    """Its hashes were made of fewer keys: that is said, and not that its data has changed."""
    (folder,) = runs()
    new = ("version", "sources", "stages", "stage_of", "written")
    old = {k: v for k, v in folder.identity.items() if k not in new}
    (folder / "run.json").write_text(json.dumps(old))
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"history": []}\n'))
    assert reason("predict", folder.name).code == 0
    (folder / "run.json").write_text(json.dumps(old | {"train_hash": "0" * 64, "config_hash": "0" * 64}))
    said = reason("evaluate", folder.name, "depth=1")
    assert said.code == 2 and "earlier version of reason" in said.err and "data has" not in said.err
    (folder / "result.json").unlink()
    said = reason("resume", folder.name)
    assert said.code == 1 and "earlier version of reason" in said.err and "Traceback" not in said.err


class TestSweep:
    def test_trains_once_per_seed_and_compares(self, reason, tiny, store):
        words = [*tiny, "depth=0,1,2", "seed=0,1"]
        assert "2 trainings" in reason("sweep", "latent", *words, "--dry-run").out
        said = reason("sweep", "latent", *words)
        assert said.code == 0, said.err
        (sweep,) = runs("sweep")
        children = runs()
        assert len(children) == 6
        trained = [r for r in children if not r.identity["trained_by"]]
        assert len(trained) == 2 and all(r.result.depth == 2 for r in trained)
        found = mlflow_runs(store)
        assert len(found) == 7
        parent = found[sweep.name].info.run_id
        assert sum(r.data.tags.get("mlflow.parentRunId") == parent for r in found.values()) == 6
        for child in children:
            metrics = child.result.metrics
            owner = child.identity["trained_by"] or child.name
            own = next(r for r in children if r.name == owner)
            assert metrics["train_device_hours"] == pytest.approx(
                own.result.metrics["train_device_hours"], rel=1e-6
            )
        total = sum(r.result.metrics["device_hours"] for r in children)
        assert sweep.sweep_result.metrics["device_hours"] == pytest.approx(total, rel=0.2)

        # The same command again finds everything done.
        before = {r.name: (r / "result.json").stat().st_mtime_ns for r in children}
        assert reason("sweep", "latent", *words).code == 0
        assert {r.name: (r / "result.json").stat().st_mtime_ns for r in runs()} == before

        base = reason("run", "latent", *tiny, "train_depth=0")
        assert base.code == 0
        table = reason("compare", "latent", "--plot", "out.png")
        assert table.code == 0 and Path("out.png").stat().st_size > 20_000
        assert "base" in table.out and "popularity" in table.out
        told = json.loads(reason("compare", "--json").out)
        assert told
        assert reason("compare", "--csv").out.count("\n") >= 4

    def test_a_failing_trial_fails_alone(self, reason, tiny, store):
        said = reason("sweep", "latent", *tiny, "train.clip=0", "train.lr=0.001,1e30", "train.epochs=4")
        assert said.code == 3 and "1 of 2 trials failed" in said.err
        assert sorted(r.status for r in runs()) == ["failed", "finished"]
        assert runs("sweep")[0].status == "failed"


class TestLooking:
    def test_list_and_show_name_what_there_is(self, reason):
        told = json.loads(reason("list", "--json").out)
        assert "latent" in [m["name"] for m in told["methods"]]
        assert {"movielens-100k", "interactions"} <= {d["name"] for d in told["datasets"]}
        assert "latent.tau" in reason("show", "latent", "--origin").out

    def test_dry_run_makes_nothing(self, reason):
        said = reason("run", "latent", "depth=1", "--dry-run")
        assert said.code == 0 and "command line" in said.out
        assert list(Path().iterdir()) == []

    def test_version_and_help(self, reason):
        assert reason("--version").out.startswith("reason ")
        for verb in ("run", "sweep", "compare", "data", "ui", "doctor", "sync", "rm", "predict", "inspect"):
            assert reason(verb, "--help").code == 0


def test_the_folder_holds_what_it_says(ran):
    (folder,) = runs()
    for name in (
        "config.yaml",
        "origin.json",
        "run.json",
        "env.json",
        "events.jsonl",
        "metrics.jsonl",
        "log.txt",
        "result.json",
    ):
        assert (folder / name).exists(), name
    assert read_json(folder / "env.json")["versions"]["torch"]
    rows = folder.result.curve[0].rows
    assert (folder / rows).exists() and (folder / "model" / "model.safetensors").exists()
