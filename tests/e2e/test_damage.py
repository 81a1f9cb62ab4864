"""A disk fills up, a copy breaks off: one damaged run is told with its mend, and hides no good one."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import yaml
from command import runs

from reason.files import read_json, write_json
from reason.tracking.folder import RunFolder

FINISHED, INTERRUPTED, GOOD = "latent-aaaaaaaa-1", "latent-bbbbbbbb-1", "latent-cccccccc-1"
NAMES = [FINISHED, INTERRUPTED, GOOD]
JSON = ["run.json", "result.json", "origin.json", "env.json", "calibration.json", "mlflow.json"]
OTHERS = [
    "config.yaml", "events.jsonl", "metrics.jsonl", "rows/test-depth1.arrow", "rows/valid-depth2.arrow",
    "rows/test-popularity.arrow", "alive",
]  # fmt: skip
CUTS = {
    "half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "null": lambda data: b"null",
    "hollow": lambda data: b"{}",
}


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("kept") / "runs"


@pytest.fixture
def three(kept, reason, tiny, store) -> Path:
    """A finished run, an interrupted one and a good one. Made once by the command, and copied."""
    if not kept.exists():
        assert reason("run", "latent", *tiny).code == 0
        (made,) = Path("runs").iterdir()
        for i, name in enumerate(NAMES):
            shutil.copytree(made, kept / name)
            _become(kept / name, name, seed=i)
        (kept / INTERRUPTED / "result.json").unlink()
        events = (kept / INTERRUPTED / "events.jsonl").read_text().splitlines()
        (kept / INTERRUPTED / "events.jsonl").write_text("\n".join(events[:3]) + "\n")
        shutil.rmtree("runs")
    shutil.copytree(kept, "runs")
    return Path("runs")


def _become(folder: Path, name: str, seed: int) -> None:
    """The same run with another name and seed."""
    identity, result = read_json(folder / "run.json"), read_json(folder / "result.json")
    config = yaml.safe_load((folder / "config.yaml").read_text()) | {"seed": seed}
    own = {"config_hash": name.split("-")[1] * 8, "created": identity["created"] + seed}
    write_json(folder / "run.json", identity | own)
    write_json(folder / "result.json", result | own | {"run": name, "seed": seed})
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "mlflow.lock").unlink()


def test_the_three_are_what_they_are_to_be(three, reason):
    told = json.loads(reason("list", "runs", "--json").out)["runs"]
    assert {r["run"]: r["status"] for r in told} == {
        FINISHED: "finished",
        INTERRUPTED: "killed",
        GOOD: "finished",
    }
    tables = json.loads(reason("compare", "--json").out)["tables"]
    assert [r["seeds"] for r in tables[0]["rows"] if r["kind"] == "method"] == [[0, 2]] * 3


@pytest.mark.parametrize(
    ("file", "cut"),
    [
        (file, cut)
        for file in JSON + OTHERS
        for cut in CUTS
        if cut != "null" or file in JSON
        if cut != "hollow" or file == "result.json"
    ],
)
def test_a_damaged_file_hides_no_good_run_and_nothing_ends_in_a_traceback(three, reason, file, cut):
    damaged = [n for n in (FINISHED, INTERRUPTED) if (three / n / file).exists()]
    for name in damaged:
        path = three / name / file
        path.write_bytes(CUTS[cut](path.read_bytes()))

    def ask(*words: str, codes: tuple[int, ...] = (0,)):
        said = reason(*words)
        assert said.code in codes and "Traceback" not in said.err, (words, said)
        return said

    told = ask("list", "runs", "--json")
    rows = {r["run"]: r for r in json.loads(told.out)["runs"]}
    assert rows.keys() == set(NAMES) and rows[GOOD]["status"] == "finished" and rows[GOOD]["accuracy"]
    if file in (*JSON, "config.yaml") and file != "mlflow.json":  # that one is made again
        for name in damaged:
            assert rows[name]["status"] == "damaged"
            assert f"{name} is damaged: {file}" in " ".join(told.err.split())
    assert ask("list", "runs").out.count("latent-") >= 3

    for verb in ("compare", "study"):
        said = ask(verb, "--json")
        answer = json.loads(said.out)
        seeds = _seeds(answer)
        assert 2 in seeds and (0 in seeds or FINISHED in said.err)
        if file.endswith(".arrow"):
            assert seeds == {2} and file in said.err and GOOD not in said.err

    synced = {r["run"]: r for r in json.loads(ask("sync", "--json", codes=(0, 1)).out)["runs"]}
    assert synced.keys() == set(NAMES) and synced[GOOD]["error"] is None
    for name in (FINISHED, INTERRUPTED):
        assert synced[name]["error"] is None or file in synced[name]["error"]
        ask("show", name, codes=(0, 1))
    assert ask("show", GOOD).out

    ask("rm", "-y", FINISHED, INTERRUPTED)
    assert [p.name for p in three.iterdir() if p.is_dir()] == [GOOD]


def test_a_sweep_goes_on_beside_damaged_runs(three, reason, tiny):
    (three / FINISHED / "run.json").write_text("")
    (three / INTERRUPTED / "run.json").write_text("null")
    words = ["sweep", "latent", *tiny, "depth=0,1", "seed=0", "train_depth=1"]
    for _ in range(2):  # made, and found again
        said = reason(*words)
        assert said.code == 0, said.err
    assert len([r for r in runs() if r.identity["parent"]]) == 2
    assert reason("resume", "last").code == 0


SWEEP = ["depth=0,1", "seed=0", "train_depth=1"]


@pytest.mark.parametrize(
    "depth", [0, 1]
)  # of a trial that took over the model, and of the one that trained it
@pytest.mark.parametrize("content", ["{", "{}"])
def test_a_trial_whose_result_cannot_be_read_is_made_again(reason, tiny, store, depth, content):
    words = ["sweep", "latent", *tiny, *SWEEP]
    assert reason(*words).code == 0
    torn = next(r for r in runs() if r.identity["parent"] and r.config["depth"] == depth)
    (torn / "result.json").write_text(content)
    said = reason(*words)
    assert said.code == 0, said.err
    assert f"{torn.name} is damaged: result.json" in said.err and "It counts as not finished" in said.err
    (sweep,) = runs("sweep")
    results = [RunFolder(Path("runs") / t.run).result for t in sweep.sweep_result.trials]
    assert [r.depth for r in results] == [1, 0] and torn.name not in {r.run for r in results}
    with open(sweep / "trials.csv", encoding="utf-8") as f:
        assert [float(row["accuracy"]) for row in csv.DictReader(f)] == [r.accuracy.value for r in results]


def test_a_trial_whose_result_is_torn_while_the_sweep_goes_on_is_told_and_ends_nothing(
    reason, tiny, store, monkeypatch
):
    from reason.engine import sweep as engine

    real = engine.run

    def torn(plan, **keys):
        made = real(plan, **keys)
        if plan.config.depth == 1:
            (made / "result.json").write_text("{")
        return made

    with monkeypatch.context() as m:
        m.setattr(engine, "run", torn)
        said = reason("sweep", "latent", *tiny, *SWEEP)
    assert said.code == 3 and "Traceback" not in said.err, said.err
    (sweep,) = runs("sweep")
    assert "It counts as not finished" in said.err and sweep.status == "failed" and sweep.sweep_result is None
    with open(sweep / "trials.csv", encoding="utf-8") as f:
        assert [bool(row["accuracy"]) for row in csv.DictReader(f)] == [False, True]
    assert reason("resume", sweep.name).code == 0
    assert sweep.sweep_result.metrics["trials"] == 2


def test_the_result_of_a_run_as_json_is_that_of_its_file(three, reason):
    shown = json.loads(reason("show", GOOD, "--json").out)["result"]
    assert shown == read_json(three / GOOD / "result.json")


def _seeds(answer) -> set[int]:
    """Every number of a list called ``seeds``, wherever it stands."""
    if isinstance(answer, dict):
        own = answer.get("seeds")
        here = set(own) if isinstance(own, list) else set()
        return here.union(*map(_seeds, answer.values())) if answer else here
    return set().union(*map(_seeds, answer)) if isinstance(answer, list) and answer else set()
