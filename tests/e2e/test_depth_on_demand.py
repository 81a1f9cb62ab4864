"""A policy from the command line: fitted once per run, kept with it, swept over, refused where it does not belong."""

import io
import json
import shutil

import pytest

from reason.files import read_json, write_json
from reason.tracking.folder import RunFolder


@pytest.fixture
def ask(reason, monkeypatch):
    def call(run, *requests):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(map(json.dumps, requests))))
        return reason("predict", run)

    return call


def test_policies_are_a_sweep_axis_over_one_model(reason, tiny, store):
    said = reason("sweep", "latent", *tiny, "latent.policy=fixed,cos,router", "seed=0", "dataset.fit=0.7")
    assert said.code == 0, said.err
    trials = [run for run in RunFolder.all("runs") if run.identity["kind"] == "run"]
    assert len(trials) == 3 and sum(run.identity["trained_by"] is None for run in trials) == 1
    for run in trials:
        kept = json.loads((run / "calibration.json").read_text())
        policy = run.config["latent"]["policy"]
        assert ("policy" in kept["fitted"]) == (policy != "fixed")
        assert [judged.depth for judged in run.result.curve] == [2]
        assert run.result.metrics["effective_depth"] <= 2
        assert {"coverage@10", "gini@10"} <= run.result.curve[-1].overall.keys()
    said = reason("compare", "latent", "--json")
    (table,) = json.loads(said.out)["tables"]
    assert {row["label"] for row in table["rows"] if row["kind"] == "method"} == {
        "latent", "latent policy=cos", "latent policy=router",
    }  # fmt: skip
    (cos,) = [row for row in table["rows"] if "cos" in row["label"]]
    assert cos["reference"] == "latent at depth 2", "a policy is measured against its own model"


def test_a_policy_answers_and_belongs_to_its_model_and_data(reason, ask, tiny, store):
    assert reason("run", "latent", *tiny, "latent.policy=cos", "latent.threshold=0.9").code == 0
    (run,) = RunFolder.all("runs")
    user = json.loads(reason("inspect", run.name, "--json").out)["figures"][0]["title"].split()[-1]
    said = ask(run.name, {"user": user}, {"history": ["i01"], "depth": 0}, {"history": []})
    assert said.code == 0, said.err
    by_policy, by_hand, unknown = (json.loads(line) for line in said.out.splitlines())
    assert by_policy["depth"] in (1, 2) and "cos" in by_policy["stopped"]
    assert by_hand["depth"] == 0 and "stopped" not in by_hand
    assert unknown["depth"] == 0 and "popular" in unknown["note"]
    said = reason("inspect", run.name)
    assert said.code == 0 and "(answer)" in said.out
    kept = read_json(run / "calibration.json")
    for key, what in (("model", "model"), ("data_digest", "dataset")):
        write_json(run / "calibration.json", kept | {key: "0" * 64})
        said = ask(run.name, {"user": user})
        assert (
            said.code == 1 and f"fitted to a different {what}" in said.err and "reason evaluate" in said.err
        )
        assert "Traceback" not in said.err
    (run / "calibration.json").write_text('{"model": ')
    said = ask(run.name, {"user": user})
    assert said.code == 1 and "is not a valid calibration" in said.err and "Traceback" not in said.err
    (run / "calibration.json").unlink()
    for said in (ask(run.name, {"user": user}), reason("inspect", run.name)):
        assert said.code == 1 and "calibration.json is missing" in said.err
    # A folder whose policy came from a run of other data, by hand: refused as well.
    other = [word.replace("users=40", "users=41") for word in tiny]
    assert reason("run", "latent", *other, "latent.policy=cos").code == 0
    (stranger,) = [r for r in RunFolder.all("runs") if r.name != run.name]
    shutil.copy(stranger / "calibration.json", run / "calibration.json")
    assert "fitted to a different model" in ask(run.name, {"user": user}).err


def test_a_deadline_that_cannot_be_met_is_refused_before_training(reason, tiny, store):
    said = reason("run", "latent", *tiny, "latent.deadline_ms=0.0001")
    assert said.code == 2 and "shorter than an answer without any latent step" in said.err
    (run,) = RunFolder.all("runs")
    assert not (run / "model").exists()
