"""Names and values are whatever people call things: square brackets style nothing, and deep nesting ends nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import runs

EVIL = "[/] \\[bold"
NAMES = [EVIL, "[red]x[/red]", ":boom:", "\\[/]"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "words",
    [
        ["run", "latent", "dataset={}"],
        ["run", "latent", "train.lr={}"],
        ["run", "latent", "backbone={}"],
        ["run", "latent", "{}=1"],
        ["run", "{}"],
        ["run", "latent", "-c", "{}"],
        ["show", "{}"],
        ["list", "{}"],
        ["compare", "{}"],
        ["evaluate", "{}"],
        ["rm", "{}"],
    ],
)
def test_a_value_with_brackets_is_refused_as_it_stands(reason, words, name):
    said = reason(*(word.format(name) for word in words))
    assert said.code == 2 and "error:" in said.err
    assert name in said.err or json.dumps(name)[1:-1] in said.err or repr(name)[1:-1] in said.err, said.err


def test_an_experiment_a_folder_and_a_sweep_of_such_names(reason, tiny, store):
    body = {"method": "latent", "summary": "[/red] a [b]summary", "train.notes": None}
    del body["train.notes"]
    Path("experiments.yaml").write_text(json.dumps({"experiments": {EVIL: body}}))
    words = [*tiny, "runs=[/] runs", "train.epochs=1"]
    listed = reason("list", "experiments")
    assert listed.code == 0 and "[/red] a [b]summary" in " ".join(listed.out.split())
    dry = reason("run", EVIL, *words, "--dry-run")
    assert dry.code == 0 and f"{EVIL}: resolved configuration" in dry.out and "[/] runs" in dry.out
    assert reason("sweep", EVIL, *words, "seed=0,1", "depth=1", "--dry-run").code == 0
    made = reason("run", EVIL, *words)
    assert made.code == 0 and EVIL in made.out, made.err
    (run,) = [p.name for p in Path("[/] runs").iterdir() if p.is_dir()]
    for verb in (["show", run], ["show", run, "--origin"], ["list", "runs"], ["compare"], ["inspect", run]):
        said = reason(*verb, "--runs", "[/] runs")
        assert said.code == 0 and said.out, (verb, said)
    assert EVIL in reason("compare", "--runs", "[/] runs").out
    assert reason("sync", "--runs", "[/] runs").code == 0
    (Path("[/] runs") / run / "run.json").write_text("[/]")
    assert "is damaged" in reason("list", "runs", "--runs", "[/] runs").err


@pytest.mark.parametrize(
    "text",
    ["[a, b]", "experiments: [a, b]", "experiments: {a: [b]}", "sweeps: [a]", "experiments: " + "{a: " * 300 + "1" + "}" * 300,
     "experiments: " + "[" * 100_000],
)  # fmt: skip
def test_an_experiments_file_of_another_form_is_refused(reason, text):
    Path("experiments.yaml").write_text(text)
    for words in (["list"], ["run", "latent", "--dry-run"], ["show", "latent"]):
        said = reason(*words)
        if "sweeps" not in text or words[0] == "list":
            assert said.code == 2 and "experiments.yaml" in said.err, said


def test_a_model_folder_with_a_deeply_nested_file(reason, tiny_text):
    Path("model").mkdir()
    Path("model/config.json").write_text('{"a":' * 100_000)
    said = reason("run", "mor", *tiny_text, "backbone.source=./model")
    assert said.code == 2 and "nested too deeply" in said.err and not runs()


def test_too_little_memory_says_what_to_lower(reason, tiny, store):
    said = reason("run", "latent", *tiny, "backbone.hidden=8000000000000")
    assert said.code == 1 and "Traceback" not in said.err, said.err
    told = " ".join(said.err.split())
    assert "not enough memory" in told
    for key in (
        "train.accumulate (now 1)",
        "train.batch_size (now 13)",
        "eval.batch_size",
        "backbone.hidden (now 8000000000000)",
    ):
        assert key in told, told
