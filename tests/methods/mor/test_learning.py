"""A learned router finds the tokens that need depth; one that picks at random does not (the paper's claim, in miniature)."""

from __future__ import annotations

import json

import pytest

from reason.engine import runner
from reason.engine.config import resolve
from reason.engine.session import load_dataset

SMALL = (
    "train_depth=2", "backbone.layers=2", "backbone.context=56", "dataset.symbols=4", "dataset.length=40", "dataset.train_documents=8000",
    "dataset.valid_documents=60", "dataset.test_documents=100", "train.batch_size=48", "eval.latency_samples=0", "eval.resamples=100", "hardware.device=cpu",
    "hardware.threads=1",
)  # fmt: skip
ROUTED = ("mor.capacities=1,0.3", "mor.capacity_warmup=150", "train.steps=400")


def run(name, *words):
    plan = resolve(name, [*SMALL, *words])
    folder = runner.prepare(plan, load_dataset(plan).digest)
    runner.execute(folder, plan, "cpu", 1, quiet=True)
    [judged] = json.loads((folder.path / "result.json").read_text())["curve"]
    return (
        folder.path,
        judged["metrics"]["accuracy at level 1"]["value"],
        judged["overall"].get("auroc of depth"),
    )


@pytest.mark.slow
def test_a_learned_router_beats_chance_at_equal_depth(tmp_path, monkeypatch):
    monkeypatch.setenv("REASON_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    plain, solved, _ = run("mor-mixed-recursive", "train.steps=400")
    assert solved > 0.9, "two recursions for every token answer the questions"
    source = f"backbone.source=run:{plain}"
    _, learned, aligned = run("mor-mixed-expert", source, *ROUTED)
    _, chance, blind = run("mor-mixed-random", source, *ROUTED)
    assert learned > chance + 0.2, (learned, chance)
    assert aligned > 0.8 and abs(blind - 0.5) < 0.1, (aligned, blind)
