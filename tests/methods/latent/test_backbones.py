"""Latent reasoning on every sequence encoder: trained, judged, stored, loaded again and asked."""

import itertools

import numpy as np
import pytest
import torch

from reason.engine import runner
from reason.engine.config import resolve
from reason.engine.evaluation import judge
from reason.engine.parallel import World
from reason.engine.session import Session, load_dataset, open_run
from reason.engine.worker import work
from reason.errors import ConfigError
from reason.methods.base import Step

WORDS = {
    "sasrec": ["backbone=sasrec"],
    "sasrec with text": ["backbone.text=tfidf", "backbone.text_dim=8"],
    "bert4rec": ["backbone=bert4rec"],
    "unisrec": ["backbone=unisrec", "backbone.text_dim=8", "backbone.experts=3"],
    "unisrec with ids": ["backbone=unisrec", "backbone.text_dim=8", "backbone.ids=true"],
}
every_encoder = pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
HERE = World(0, 1, torch.device("cpu"))


def execute(tiny, words, *more):
    """A run without a tracker: its folder."""
    plan = resolve("latent", [*tiny, *words, *more], environ={})
    folder = runner.prepare(plan, load_dataset(plan).digest)
    work({"folder": str(folder.path), "device": "cpu", "quiet": True})
    return folder


@every_encoder
def test_a_run_is_trained_judged_loaded_and_asked(tiny, words):
    folder = execute(tiny, words)
    curve = folder.result.curve
    assert [judged.depth for judged in curve] == [0, 1, 2]
    for lower, higher in itertools.pairwise(curve):
        assert all(higher.cost[name] >= cost for name, cost in lower.cost.items())
        assert higher.cost["flops"] > lower.cost["flops"]

    loaded = open_run(folder)
    s = loaded.session
    again = judge(s.method, s.ctx, HERE, s.network.eval(), s.ctx.data.test, 2)
    assert again.accuracy == pytest.approx(curve[2].accuracy.value, abs=1e-6)
    history = [s.ctx.dataset.item_ids[i] for i in (3, 1, 4)]
    (answer,) = loaded.predict([{"history": history, "k": 5}])
    with torch.no_grad():
        states, _ = s.network.reason(torch.tensor([[3, 1, 4]]))
        best = (states[0, -1, -1] @ s.network.item_vectors().T).topk(5)
    assert [item["id"] for item in answer["items"]] == [s.ctx.dataset.item_ids[i] for i in best.indices]
    assert [item["score"] for item in answer["items"]] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert loaded.inspect()


@every_encoder
def test_the_same_run_gives_the_same_numbers(tiny, words):
    first, second = (execute(tiny, words, "latent.loss=erl", "train.epochs=1").result for _ in range(2))
    for one, other in zip(first.curve, second.curve, strict=True):
        assert one.metrics == other.metrics and one.cost == other.cost


@every_encoder
def test_every_loss_falls(tiny, words, tmp_path):
    plan = resolve("latent", [*tiny, *words, "train_depth=2", "backbone.dropout=0"], environ={})
    s = Session.begin(plan, HERE, tmp_path)
    batch, model = s.ctx.data.train.batch(np.arange(24)), s.network.train()
    optimizer = torch.optim.Adam(s.method.param_groups(model), lr=1e-2)
    totals = []
    for step in range(25):
        torch.manual_seed(step)
        losses = s.method.loss(model, batch, Step(0, step, 0.0, torch.Generator().manual_seed(step)))
        totals.append(torch.stack([total / count for total, count in losses.values()]).sum())
        optimizer.zero_grad()
        totals[-1].backward()
        optimizer.step()
    assert totals[-1] < 0.8 * totals[0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["backbone.experts=4"], "Unknown key 'backbone.experts'"),
        (["backbone=bert4rec", "backbone.ids=true"], "Unknown key 'backbone.ids'"),
        (["backbone=unisrec", "backbone.text=none"], "Choices: tfidf, minilm"),
        (["backbone=unisrec", "backbone.experts=1"], "at least 2"),
        (["backbone=bert4rec", "backbone.heads=3"], "backbone.heads=2"),
    ],
)
def test_keys_that_an_encoder_does_not_read_are_refused(words, says):
    with pytest.raises(ConfigError) as refused:
        resolve("latent", words, environ={})
    assert says in str(refused.value)


def test_items_that_no_text_tells_apart_are_refused(tmp_path):
    """Of data without an item table the ids are all that is known, and ids are not words that recur."""
    rows = [(user, (user * 7 + step * 3) % 120, step) for user in range(60) for step in range(8)]
    lines = [f"u{user},i{item}x{item * 7919},{step}" for user, item, step in rows]
    (tmp_path / "plays.csv").write_text("\n".join(["user_id,item_id,timestamp", *lines]))
    plan = resolve("latent", [f"dataset={tmp_path / 'plays.csv'}", "backbone=unisrec"], environ={})
    with pytest.raises(ConfigError, match="do not tell them apart"):
        Session.begin(plan, HERE, tmp_path)
