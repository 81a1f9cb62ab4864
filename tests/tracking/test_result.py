"""``result.json``: what is written is read back, what was written long ago too, and what is none is damage."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from tracking_samples import RESULT

from reason.errors import DamagedRun
from reason.files import read_json, write_json
from reason.tracking.folder import FINISHED
from reason.tracking.result import Result, SweepResult, SweepTrial, from_json, to_json

KEPT = sorted((Path(__file__).parents[2] / "docs/results/data").glob("*/*/result.json"))
SWEEP = SweepResult(
    run="x-sweep-aaaaaaaa-1",
    experiment="x",
    trials=[SweepTrial({"depth": "1"}, "latent-aaaaaaaa-1"), SweepTrial({"depth": "2"}, None, "no memory")],
    metrics={"trials": 2, "device_hours": 0.5},
)
DELETED = object()


def changed(path: str, value: object) -> dict:
    """The content of a good result with one value changed. ``path``: keys and indices."""
    content = to_json(RESULT)
    *outer, last = path.split(".")
    here = content
    for step in outer:
        here = here[int(step)] if isinstance(here, list) else here[step]
    if value is DELETED:
        del here[last]
    else:
        here[last] = value
    return content


def test_every_kept_result_is_read_and_written_back_equal():
    assert len(KEPT) >= 147
    for file in KEPT:
        content = read_json(file)
        result = from_json(Result, content)
        written = to_json(result)
        assert from_json(Result, json.loads(json.dumps(written, allow_nan=False))) == result
        if "accuracy" in content:  # earlier versions wrote these two twice
            assert to_json(result.accuracy) == content["accuracy"], file
            assert to_json(result.valid_accuracy) == content["valid_accuracy"], file
        assert _holds(written, {k: v for k, v in content.items() if k in written}), file


def _holds(whole: object, part: object) -> bool:
    """Whether ``whole`` says all that ``part`` says; it may say more."""
    if isinstance(part, dict) and isinstance(whole, dict):
        return all(k in whole and _holds(whole[k], v) for k, v in part.items())
    if isinstance(part, list) and isinstance(whole, list):
        return len(whole) == len(part) and all(map(_holds, whole, part))
    return whole == part


@pytest.mark.parametrize("result", [RESULT, SWEEP], ids=["run", "sweep"])
def test_a_folder_gives_back_what_was_written(make, result):
    folder = make()
    assert folder.result is None and folder.sweep_result is None
    folder.write_result(result)
    assert (folder.result if isinstance(result, Result) else folder.sweep_result) == result
    assert read_json(folder / "result.json") == dataclasses.asdict(result)


def test_keys_that_are_not_known_are_left_out(make):
    folder = make()
    content = changed("curve.0.tomorrow", {"x": 1})
    write_json(folder / "result.json", content | {"accuracy": None, "later": [1]})
    assert folder.result == RESULT and folder.problem is None


def test_what_older_versions_did_not_write_has_its_default(make):
    folder, content = make(), to_json(RESULT)
    for key in ("version", "stages", "baselines", "beside", "training"):
        del content[key]
    for judged in content["curve"]:
        for key in ("cost", "rivals", "latency_n", "overall"):
            del judged[key]
        del judged["accuracy"]["denominator"]
    del content["units"]["least"]
    write_json(folder / "result.json", content)
    assert folder.result == RESULT


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not valid JSON"),
        ("null", "is not a JSON object"),
        ("{}", "has no schema, this version reads 1"),
        (changed("schema", 2), "has schema 2, this version reads 1"),
        (changed("curve", DELETED), "has no curve"),
        (changed("curve", []), "has no depth 2 in its curve"),
        (changed("depth", 5), "has no depth 5 in its curve"),
        (changed("curve.1.accuracy.value", DELETED), "has no curve[1].accuracy.value"),
        (
            changed("curve.1.accuracy.value", "0.2"),
            "has a value at curve[1].accuracy.value that is not a number",
        ),
        (changed("curve.1.accuracy", None), "has a value at curve[1].accuracy that is not an object"),
        (changed("curve", {}), "has a value at curve that is not a list"),
        (changed("seed", 1.5), "has a value at seed that is not a whole number"),
        (changed("seed", True), "has a value at seed that is not a whole number"),
        (changed("units", "steps"), "has a value at units that is not an object"),
        (changed("metrics", [1]), "has a value at metrics that is not an object"),
        (changed("metrics.accuracy", None), "has a value at metrics.accuracy that is not a number"),
        (changed("method", None), "has a value at method that is not text"),
        (to_json(SWEEP), "has no method"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
def test_what_is_no_result_is_damage_with_its_file_and_mend(make, content, words):
    folder = make()
    (folder / "result.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DamagedRun) as told:
        _ = folder.result
    assert told.value.file == "result.json" and words in told.value.what
    assert f"reason resume {folder.name}" in told.value.mend and "Delete the file" in told.value.mend
    assert str(folder.problem) == str(told.value) and folder.status == FINISHED


@pytest.mark.parametrize("content", [{}, {"schema": 1, "kind": "sweep"}, to_json(RESULT)])
def test_what_is_no_result_of_a_sweep_is_damage(make, content):
    sweep = make(kind="sweep", config=None)
    write_json(sweep / "result.json", content)
    with pytest.raises(DamagedRun, match=r"result\.json has no"):
        _ = sweep.sweep_result
    assert sweep.problem is not None and sweep.problem.file == "result.json"
