"""Methods of another distribution, through the whole command: two networks, rivals, no training, frozen weights."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
from command import mlflow_runs, runs

from reason import registry

PLUGINS = Path(__file__).parent.parent / "plugins"
RIVALS = {"best-of-n", "first guess", "best-of-n at once"}
BOUND = "any guess"


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.syspath_prepend(str(PLUGINS))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(PLUGINS), os.environ.get("PYTHONPATH", "")]))
    registry._entries.cache_clear()
    yield
    registry._entries.cache_clear()


@pytest.fixture
def words(tiny):
    return [w for w in tiny if not w.startswith("backbone.")]


def test_rivals_stand_beside_their_method_at_every_depth(reason, words, store):
    said = reason("run", "voting", *words)
    assert said.code == 0, said.err
    for name in ("best-of-n", "first guess", "at once:", f"{BOUND} (bound)", "most frequent"):
        assert name in said.out
    (folder,) = runs()
    assert not (folder / "model").exists() and not any((folder / "checkpoints").iterdir())
    metrics = mlflow_runs(store)[folder.name].data.metrics
    assert {"rival/best-of-n", "rival/first_guess", "rival_latency_p50_ms/best-of-n"} <= metrics.keys()
    users = folder.result.accuracy.n
    assert metrics["rival_tokens/first_guess"] == users and metrics["rival_tokens/best-of-n"] == 4 * users
    assert metrics["depth/rivals/first guess/cost/tokens"] == users
    assert "rival_latency_p50_ms/first_guess" not in metrics, "it was not timed"
    (table,) = json.loads(reason("compare", "voting", "--json").out)["tables"]
    found = {(row["rival"], row["depth"]): row for row in table["rows"] if row["kind"] == "rival"}
    assert found.keys() == {(name, depth) for name in RIVALS for depth in (1, 2, 4)}
    own = {row["depth"]: row for row in table["rows"] if row["kind"] == "method"}
    for (name, depth), row in found.items():
        assert row["label"] == f"voting: {name}" and row["reference"] == f"voting at depth {depth}"
        assert row["difference"] == pytest.approx(row["accuracy"] - own[depth]["accuracy"])
    bounds = [row for row in table["rows"] if row["kind"] == "bound"]
    assert {row["rival"] for row in bounds} == {BOUND} and all(row["pareto"] == [] for row in bounds)
    alone = found["first guess", 1]
    assert alone["difference"] == 0, "one guess is the first guess"
    assert reason("compare", "voting", "--plot", "picture.png").code == 0
    study = reason("study", "voting", "--json")
    assert study.code == 0 and all(f"voting: {name}" in study.out for name in RIVALS)


def test_depths_are_powers_of_two_and_judge_one_model(reason, words, store):
    said = reason("sweep", "voting", "depth=1,6", *words)
    (sweep,) = runs("sweep")
    assert (
        said.code == 0 and f"{sweep / 'comparison.png'}" in said.err and (sweep / "comparison.png").exists()
    )
    deep, shallow = sorted(runs(), key=lambda r: -r.config["depth"])
    assert deep.identity["train_hash"] == shallow.identity["train_hash"]
    assert deep.identity["trained_by"] is None and shallow.identity["trained_by"] is None
    assert reason("run", "voting", "depth=6", *words).code == 0
    (curve,) = [r for r in runs() if r.config["eval"]["curve"]]
    shown = json.loads(reason("compare", curve.name, "--json").out)["tables"][0]["rows"]
    assert [row["depth"] for row in shown if row["kind"] == "method"] == [1, 2, 4, 6]


def test_two_ranks_judge_as_one(reason, words, store):
    assert reason("run", "voting", *words).code == 0
    assert reason("run", "voting", *words, "hardware.gpus=2").code == 0
    one, two = runs()
    for file in sorted(p.name for p in (one / "rows").iterdir()):
        assert (one / "rows" / file).read_bytes() == (two / "rows" / file).read_bytes(), file


def test_nested_keys_from_every_side(reason, words, store, monkeypatch):
    shown = reason("show", "voting", "voting.reward.sharpness=2", "--json")
    assert json.loads(shown.out)["config"]["voting"]["reward"]["sharpness"] == 2
    monkeypatch.setenv("REASON_VOTING__REWARD__SHARPNESS", "0")
    assert json.loads(reason("show", "voting", "--json").out)["config"]["voting"]["reward"]["sharpness"] == 0
    said = reason("run", "voting", "voting.reward.sharpnes=2")
    assert said.code == 2 and "voting.reward.sharpness" in said.err
    assert reason("sweep", "voting", *words, "voting.reward.sharpness=0,9").code == 0
    rates = {r.identity["config_hash"] for r in runs()}
    assert len(rates) == 2, "the second network's keys are part of the hash"


def test_a_run_answers_although_its_data_has_gone(reason, words, store, monkeypatch):
    assert reason("run", "voting", *words).code == 0
    monkeypatch.setattr("reason.engine.session.load_dataset", lambda plan: pytest.fail("the data was opened"))
    monkeypatch.setattr("sys.stdin", io.StringIO('{"any": 1}\n{"any": 2}\n'))
    said = reason("predict", "last")
    assert said.code == 0 and len(said.out.splitlines()) == 2 and "item" in said.out


def test_frozen_weights_are_not_written_and_come_back(reason, words, store):
    assert reason("run", "probe", *words).code == 0
    (folder,) = runs()
    assert reason("evaluate", folder.name, "depth=1").code == 0
    again = next(r for r in runs() if r.name != folder.name)
    one, two = ((r / "rows" / "test-depth1.arrow").read_bytes() for r in (folder, again))
    assert one == two
    assert reason("inspect", folder.name).code == 0


def test_another_version_of_a_method_trains_anew_and_says_why(reason, words, store, monkeypatch):
    assert reason("sweep", "probe", "seed=0,1", *words).code == 0
    import voting

    newer = voting.probe.__class__(**{**voting.probe.__dict__, "version": 2})
    monkeypatch.setattr(voting, "probe", newer)
    said = reason("sweep", "probe", "seed=0,1", *words)
    assert (
        said.code == 0
        and "version 1 of probe" in said.err
        and "version 2" in said.err.replace("this is ", "")
    )
    assert len(runs()) == 4
    old = next(r for r in runs() if r.identity["version"] == 1)
    refused = reason("evaluate", old.name, "depth=1")
    assert refused.code == 2 and "version 1 of probe" in refused.err
