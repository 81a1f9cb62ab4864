"""Mixture-of-Recursions from the command line: a run, a sweep, and what they leave behind."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from command import mlflow_runs, runs

from reason import load


@pytest.fixture
def ran(reason, tiny_text, store):
    said = reason("run", "mor", *tiny_text)
    assert said.code == 0, said.err
    return said


def ask(reason, monkeypatch, *requests, run="last"):
    lines = "".join(json.dumps(r) + "\n" for r in requests)
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    said = reason("predict", run)
    assert said.code == 0, said.err
    return [json.loads(line) for line in said.out.splitlines()]


class TestRun:
    def test_the_table_and_mlflow_hold_what_people_ask_for(self, ran, store):
        for word in ("next-token accuracy", "bits per byte", "MFLOP/token", "p50 ms", "bigram", "of 3"):
            assert word in ran.out, word
        (folder,) = runs()
        metrics = mlflow_runs(store)[folder.name].data.metrics
        for name in (
            "accuracy", "valid_accuracy", "gpu_hours", "device_hours", "train_device_hours", "latency_p50_ms",
            "throughput_per_s", "effective_depth", "peak_memory_gb", "eval/bits_per_byte", "eval/loss",
            "cost/flops", "train/text",
        ):  # fmt: skip
            assert name in metrics, name
        assert 1 < metrics["effective_depth"] < 3

    def test_looking_into_it(self, ran, reason, monkeypatch):
        shown = reason("inspect", "last", "--html", "page.html")
        assert shown.code == 0, shown.err
        assert "recursions" in shown.out and "<html" in Path("page.html").read_text()[:200]

    def test_it_answers_requests(self, ran, reason, monkeypatch):
        (folder,) = runs()
        document = load(folder).session.ctx.dataset.corpus.parts["test"].text[0]
        prompt = " ".join(document.split()[:4])
        shallow, whole, again, foreign, empty, strange = ask(
            reason, monkeypatch,
            {"prompt": prompt, "tokens": 3, "depth": 1}, {"prompt": prompt, "tokens": 3}, {"prompt": prompt, "tokens": 3},
            {"prompt": "a > b"}, {"prompt": ""}, {"prompt": prompt, "dept": 1},
        )  # fmt: skip
        for answer in (shallow, whole):
            assert 1 <= answer["tokens"] <= 3 and (answer["tokens"] == 3 or answer["stopped"])
            assert len(answer["text"].split()) == answer["tokens"] - answer["stopped"]
        assert shallow["depth"] == 1 <= whole["depth"] <= 3 and whole == again
        assert "'a' is not in the vocabulary" in foreign["error"]
        assert "empty" in empty["error"] and "'dept'" in strange["error"]


def test_a_sweep_over_depth_trains_once_for_each_seed(reason, tiny_text, store):
    said = reason("sweep", "mor", "depth=1,2,3", "seed=0,1", *tiny_text)
    assert said.code == 0, said.err
    made = runs()
    assert len(made) == 6
    assert sum(r.identity["trained_by"] is None for r in made) == 2
    assert {(r.result.depth, r.result.seed) for r in made} == {(d, s) for d in (1, 2, 3) for s in (0, 1)}
    told = reason("compare", "mor", "--json")
    assert told.code == 0 and "next-token accuracy" in told.out


class TestBadInput:
    def test_top_k_is_not_written_with(self, ran, reason, monkeypatch):
        first = runs()[0]
        said = reason("evaluate", first.name, "mor.route=topk", "eval.limit=4")
        assert said.code == 0, said.err
        monkeypatch.setattr(sys, "stdin", io.StringIO('{"prompt": "a"}\n'))
        told = reason("predict", "last")
        assert told.code == 2 and "looks ahead" in told.err

    def test_other_keys_than_it_was_trained_with(self, ran, reason):
        first = runs()[0]
        said = reason("evaluate", first.name, "mor.gap=share_first")
        assert said.code == 2 and "mor.force=true" in said.err
        said = reason("evaluate", first.name, "mor.gap=share_first", "mor.force=true", "eval.limit=4")
        assert said.code == 0, said.err

    def test_a_corpus_that_is_too_small(self, reason):
        Path("few").mkdir()
        for i in range(40):
            Path(f"few/{i}.txt").write_text(f"only a few words in document {i}")
        said = reason(
            "run", "mor", "dataset=few", "dataset.valid=0.3", "dataset.test=0.3", "backbone.vocab=300"
        )
        assert said.code in (1, 2) and "backbone.context" in said.err and "Traceback" not in said.err
