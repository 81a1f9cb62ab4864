"""A whole run of ``particle`` whose policy is behind a server."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from scripted_server import Scripted, letters

from reason.engine import runner
from reason.engine.config import resolve
from reason.engine.session import load_dataset, open_run
from reason.engine.worker import work
from reason.errors import ConfigError


@pytest.fixture
def words(tmp_path) -> list[str]:
    """Problems that the scripted model can read, and its tokenizer."""
    texts = ["".join(some) for n in (3, 4, 5) for some in itertools.product("ab", repeat=n)]
    rows = [json.dumps({"problem": text, "answer": "a"}) for text in texts]
    Path("mine.jsonl").write_text("\n".join(rows) + "\n")
    Path("tokenizer").mkdir()
    letters().save(Path("tokenizer"))
    return [
        "dataset=mine.jsonl", "dataset.valid=0.2", "dataset.test=0.2", "particle.server.tokenizer=tokenizer", "particle.server.context=64",
        "particle.server.retries=2", "particle.reward.kind=rules", "particle.reward.source=", "particle.separator=,", "particle.length=12",
        "particle.steps=3", "depth=2", "eval.limit=5", "eval.resamples=100", "eval.latency_samples=2", "hardware.threads=1",
    ]  # fmt: skip


def execute(*words: str):
    plan = resolve("particle", words, environ={})
    folder = runner.prepare(plan, load_dataset(plan).digest)
    work({"folder": str(folder.path), "device": "cpu", "quiet": True})
    return folder


def test_a_run_over_a_server(words):
    with Scripted() as at:
        folder = execute(f"particle.server.url={at.url}", *words)
        judged = folder.result.curve[-1]
        assert judged.cost["tokens"] > 0 and "flops" not in judged.cost and judged.rivals
        assert at.asked and folder.result.params_m == 0
        (reply,) = open_run(folder).predict([{"problem": "abab"}])
        assert reply["particles"] == 2 and reply["tokens"] > 0 and "flops" not in reply
    with pytest.raises(Exception, match="server"):
        open_run(folder)  # nobody listens any more, and it says so


def test_where_the_server_is_makes_no_other_run(words):
    plans = [
        resolve("particle", [f"particle.server.url=http://localhost:{p}", *words], environ={}) for p in (1, 2)
    ]
    assert plans[0].hashes("d") == plans[1].hashes("d")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("particle.reward.kind=value", "does not show"),
        ("particle.ancestor_sampling=true", "does not"),
        ("particle.stage=policy", "in this process"),
    ],
)
def test_what_a_server_cannot_do_is_refused(words, word, message):
    with pytest.raises(ConfigError, match=message):
        resolve(
            "particle",
            ["particle.server.url=http://localhost:1", *words, "particle.reward.source=run:x", word],
            environ={},
        )
