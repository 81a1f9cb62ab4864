"""What a run will cost, told before it by a finished one."""

from __future__ import annotations

import re

from reason.engine import runner
from reason.engine.config import resolve
from reason.engine.estimate import estimate
from reason.engine.session import load_dataset
from reason.engine.worker import work


def executed(*words: str):
    plan = resolve("particle", words, environ={})
    folder = runner.prepare(plan, load_dataset(plan).digest)
    folder.event("attempt", device="cpu", devices=1)
    work({"folder": str(folder.path), "device": "cpu", "quiet": True})
    return folder


def test_without_a_run_the_keys_say_what_is_possible_at_most(tiny_by_view):
    words = tiny_by_view["problems"]
    (told,) = estimate(resolve("particle", words, environ={}))
    assert "at most 32 tokens for each problem at depth 4" in told  # 4 particles x 8 tokens
    (capped,) = estimate(resolve("particle", [*words, "particle.budget.tokens=20"], environ={}))
    assert "at most 20 tokens" in capped
    assert estimate(resolve("latent", environ={})) == []


def test_a_run_tells_what_one_like_it_costs(tiny_by_view):
    words = [*tiny_by_view["problems"], "particle.rivals=", "eval.latency_samples=0"]
    done = executed(*words)
    (told,) = estimate(resolve("particle", words, environ={}))
    assert done.name in told and "9 problems of the test split at depth 1, 2, 4" in told
    tokens = sum(judged.cost["tokens"] for judged in done.result.curve)
    assert f"about {tokens:,.0f} tokens" in told and re.search(r"about [\d.,]+ s on", told)
    (more,) = estimate(resolve("particle", [*words, "dataset.test_documents=30"], environ={}))
    assert f"each problem of the test split at depth 1, 2, 4: about {tokens / 9:.3g} tokens" in more
    (deeper,) = estimate(resolve("particle", [*words, "depth=8", "eval.curve=false"], environ={}))
    found = re.search(r"about ([\d,.]+) tokens", deeper)
    assert found
    last, before = (done.result.curve[k].cost["tokens"] for k in (-1, -2))
    assert abs(float(found[1].replace(",", "")) - (last + 2 * (last - before))) < 1
