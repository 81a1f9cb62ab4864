"""Latent reasoning as a method: judged, answering and explaining on generated interactions."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from reason.datasets.catalogue import Catalogue
from reason.engine.config import resolve
from reason.engine.meter import Stopwatch
from reason.engine.parallel import World
from reason.engine.session import Session
from reason.errors import ConfigError, DataError
from reason.methods.latent.config import LatentConfig

WORDS = [
    "dataset=synthetic-interactions", "dataset.users=60", "dataset.items=40", "dataset.categories=4",
    "dataset.mean_length=9", "backbone.hidden=16", "backbone.ffn=16", "backbone.max_length=6", "eval.batch_size=16",
]  # fmt: skip


def begin(tmp_path, *words):
    plan = resolve("latent", [*WORDS, *words])
    session = Session.begin(plan, World(0, 1, torch.device("cpu")), tmp_path)
    session.network.eval()
    torch.manual_seed(7)
    with torch.no_grad():  # an encoder whose steps matter
        for name, parameter in session.network.named_parameters():
            if "norm" not in name:
                parameter.mul_(12)
    return session


@pytest.fixture
def session(tmp_path):
    return begin(tmp_path)


def judge(s, depth, split=None, **changes):
    ctx = replace(s.ctx, **changes)
    return s.method.evaluate(ctx, s.network, split or s.ctx.data.test, depth)


def column(evaluation, name):
    return evaluation.rows.column(name).to_numpy()


def scores_by_hand(s, case, depth):
    """(N,) scores of one test case, from the trie way of running the encoder."""
    batch = s.ctx.data.test.batch(np.array([case]))
    with torch.no_grad():
        states, _ = s.network.reason(batch["items"], depth)
        return (states[0, -1, -1] @ s.network.item_vectors().T), batch


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_rows_rank_the_whole_catalogue(session, depth):
    found = judge(session, depth)
    cases = session.ctx.data.test
    assert found.rows.num_rows == len(cases) and column(found, "id").tolist() == cases.id.tolist()
    for case in range(0, len(cases), 7):
        scores, batch = scores_by_hand(session, case, depth)
        target = int(batch["target"][0])
        rank = 1 + int((scores > scores[target]).sum())
        assert column(found, "rank")[case] == rank
        assert column(found, "ndcg@10")[case] == pytest.approx(1 / np.log2(rank + 1) if rank <= 10 else 0.0)
        assert column(found, "target")[case] == target
        assert column(found, "target_count")[case] == session.ctx.data.catalogue.train_counts[target]
        ten = scores.topk(10).indices.numpy()
        assert column(found, "popularity@10")[case] == pytest.approx(
            session.ctx.data.catalogue.train_counts[ten].mean()
        )
    assert set(column(found, "depth_used")) == {float(depth)}
    assert found.accuracy == "NDCG@10" and all(
        r.numerator in found.rows.column_names for r in found.metrics.values()
    )
    assert (column(found, "recall@5") <= column(found, "recall@10")).all()
    assert ("step_cosine" in found.rows.column_names) == (depth > 0)


def test_neither_batch_size_nor_ranks_change_a_row(session):
    whole = judge(session, 2)
    session.ctx.config.eval.batch_size = 5
    np.testing.assert_array_equal(column(judge(session, 2), "rank"), column(whole, "rank"))
    halves = [judge(session, 2, rank=rank, world_size=2) for rank in range(2)]
    for rank, half in enumerate(halves):
        assert column(half, "id").tolist() == column(whole, "id")[rank::2].tolist()
        assert (column(half, "rank") == column(whole, "rank")[rank::2]).all()
    for name, count in whole.cost.items():
        assert sum(half.cost[name] for half in halves) == pytest.approx(count)


def test_cost_counters_grow_with_depth(session):
    costs = [judge(session, depth).cost for depth in range(3)]
    for name in ("steps", "tokens", "flops"):
        assert costs[0][name] < costs[1][name] < costs[2][name]
    cases = session.ctx.data.test
    assert costs[2]["steps"] == 2 * len(cases)
    assert costs[2]["tokens"] == cases.length.sum() + 2 * len(cases)


def test_seen_items_are_no_candidates_when_asked(tmp_path):
    session = begin(tmp_path, "dataset.candidates=unseen")
    cases = session.ctx.data.test
    found = judge(session, 2)
    for case in range(0, len(cases), 7):
        scores, batch = scores_by_hand(session, case, 2)
        target = int(batch["target"][0])
        rivals = set(range(len(scores))) - set(cases.seen(np.array([case]))[1].tolist()) - {target}
        assert column(found, "rank")[case] == 1 + sum(bool(scores[i] > scores[target]) for i in rivals)
    history = [session.ctx.dataset.item_ids[i] for i in (3, 4, 5)]
    (answer,) = session.method.predict(session.ctx, session.network, [{"history": history, "k": 40}], 2)
    assert len(answer["items"]) == 37 and not set(history) & {item["id"] for item in answer["items"]}


def test_requests_and_batches_are_timed(session):
    meter = Stopwatch(torch.device("cpu"), samples=5)
    judge(session, 1, meter=meter)
    assert meter.latency()["latency_n"] == 5
    counted, seconds = meter.rate()
    assert counted == len(session.ctx.data.test) - 16 and seconds > 0  # the first batch warms up


def test_baselines_rank_the_same_rows(session):
    cases, data = session.ctx.data.test, session.ctx.data
    found = session.method.baselines(session.ctx, session.network, cases, 1)
    assert set(found) == {"popularity", "successor"}
    followed = np.zeros((data.pad, data.pad))
    train = data.train.batch(np.arange(len(data.train)))
    for items, targets in zip(train["items"].tolist(), train["targets"].tolist(), strict=True):
        for a, b in zip(items, targets, strict=True):
            if b >= 0:
                followed[a, b] += 1
    batch = cases.batch(np.arange(len(cases)))
    for case, target in enumerate(cases.target):
        last = int(batch["items"][case, batch["length"][case] - 1])
        for name, scores in (
            ("popularity", data.catalogue.train_counts),
            (
                "successor",
                followed[last] + data.catalogue.train_counts / (data.catalogue.train_counts.sum() + 1),
            ),
        ):
            above, level = (
                (scores > scores[target]).sum(),
                np.isclose(scores, scores[target], atol=1e-12, rtol=0).sum(),
            )
            assert column(found[name], "rank")[case] == 1 + above + (level - 1) / 2
    mine = judge(session, 0)
    for evaluation in found.values():
        assert column(evaluation, "id").tolist() == column(mine, "id").tolist()
        assert evaluation.metrics.items() <= mine.metrics.items()


def test_requests_are_answered(session):
    dataset = session.ctx.dataset
    ids = dataset.item_ids
    requests = [
        {"history": [ids[1], "nonsense", ids[2]], "k": 3},
        {"user": dataset.user_ids[4]},
        {"history": []},
        {"history": ["nonsense"], "k": 2},
    ]
    known, user, empty, nothing = session.method.predict(session.ctx, session.network, requests, 2)
    assert known["unknown"] == ["nonsense"] and known["depth"] == 2 and len(known["items"]) == 3
    with torch.no_grad():
        states, _ = session.network.reason(torch.tensor([[1, 2]]))
        scores = states[0, -1, -1] @ session.network.item_vectors().T
    best = scores.topk(3)
    assert [item["id"] for item in known["items"]] == [ids[i] for i in best.indices]
    assert [item["score"] for item in known["items"]] == pytest.approx(best.values.tolist(), rel=1e-4)
    assert all(
        item["title"] == dataset.item_fields["title"][ids.index(item["id"])] for item in known["items"]
    )
    (same,) = session.method.predict(
        session.ctx, session.network, [{"history": [ids[i] for i in dataset.history(4)], "k": 10}], 2
    )
    assert same["items"] == user["items"]
    popular = np.sort(session.ctx.data.catalogue.train_counts)[::-1]
    for answer, k in ((empty, 10), (nothing, 2)):
        assert [item["score"] for item in answer["items"]] == popular[:k].tolist()
        assert "most popular" in answer["note"] and answer["depth"] == 0


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({}, "A request is"),
        ({"history": [], "user": "u1"}, "A request is"),
        ({"history": [], "n": 3}, "Unknown key 'n'"),
        ({"history": [], "k": 0}, "from 1 to"),
        ({"history": [], "k": True}, "whole number"),
        ({"history": "i1"}, "must be a list"),
        ({"user": "nobody"}, "There is no user 'nobody'"),
        (["i1"], "A request is"),
    ],
)
def test_bad_requests_are_told_why(session, request_, says):
    good = {"history": [session.ctx.dataset.item_ids[0]]}
    bad, fine = session.method.predict(session.ctx, session.network, [request_, good], 1)
    assert says in bad["error"] and "\n" not in bad["error"]
    assert len(fine["items"]) == 10


def test_unknown_user_is_refused_with_the_nearest(session):
    with pytest.raises(DataError, match="no case of user 'u999'"):
        session.method.inspect(session.ctx, session.network, "u999")


# --- a finished run needs nothing but itself ----------------------------------------------------------


def touched():
    raise AssertionError("the data was touched")


def sealed(session, **changes):
    """The context of a session, whose data must not be touched."""
    return replace(session.ctx, load_data=touched, load_dataset=touched, **changes)


@pytest.fixture
def finished(tmp_path):
    """A session whose model lies in its folder."""
    session = begin(tmp_path, "dataset.candidates=unseen", "backbone.text=tfidf", "backbone.text_dim=8")
    (tmp_path / "model").mkdir()
    save_file(session.network.state_dict(), tmp_path / "model" / "model.safetensors")
    return session


def test_a_finished_run_answers_without_its_data(finished):
    ids = finished.ctx.dataset.item_ids
    requests = [{"history": [ids[1], "nonsense", ids[2]], "k": 3}, {"history": []}, {"history": "no list"}]
    expected = finished.method.predict(finished.ctx, finished.network, requests, 2)
    assert finished.method.predict(sealed(finished), finished.network, requests, 2) == expected
    assert len(expected[0]["items"]) == 3 and "error" in expected[2]
    example = json.dumps({"history": ids[1:4]})
    shown = finished.method.inspect(sealed(finished), finished.network, example)
    assert shown == finished.method.inspect(finished.ctx, finished.network, example)
    with pytest.raises(AssertionError, match="touched"):  # a user is a row of the data
        finished.method.predict(sealed(finished), finished.network, [{"user": "u1"}], 2)


def test_a_finished_run_is_built_without_its_data(finished, tmp_path):
    torch.manual_seed(0)
    again = finished.method.build(sealed(finished))
    assert {n: p.shape for n, p in again.state_dict().items()} == {
        n: p.shape for n, p in finished.network.state_dict().items()
    }
    torch.testing.assert_close(again.text, finished.network.text)
    (tmp_path / "later").mkdir()  # a run that takes over the model
    finished.method.build(sealed(finished, workdir=tmp_path / "later"))
    assert Catalogue.load(tmp_path / "later").digest == finished.ctx.data.catalogue.digest
    assert not (tmp_path / "other").exists()
    (tmp_path / "other").mkdir()
    finished.method.build(sealed(finished, workdir=tmp_path / "other", rank=1))
    assert not list((tmp_path / "other").iterdir()), "one rank writes"


def test_a_run_without_a_model_takes_its_catalogue_from_the_data(tmp_path):
    begin(tmp_path, "dataset.items=24")
    session = begin(tmp_path)  # what an earlier attempt has left does not count
    assert len(session.network.item_vectors()) == session.ctx.data.pad > 24
    assert Catalogue.load(tmp_path).digest == session.ctx.data.catalogue.digest


def test_a_finished_run_of_before_takes_its_catalogue_from_the_data(finished, tmp_path):
    (tmp_path / "catalogue.arrow").unlink()
    ids = finished.ctx.dataset.item_ids
    (answer,) = finished.method.predict(finished.ctx, finished.network, [{"history": ids[:2]}], 1)
    assert len(answer["items"]) == 10
    finished.method.build(finished.ctx)
    assert Catalogue.load(tmp_path).item_ids == ids


def test_text_vectors_reach_the_network(tmp_path):
    session = begin(tmp_path, "backbone.text=tfidf", "backbone.text_dim=8")
    assert session.network.text.shape == (session.ctx.data.pad, 8)
    assert judge(session, 1).rows.num_rows == len(session.ctx.data.test)


def test_initial_scale_of_step_positions_is_a_key(tmp_path):
    wide, narrow = (
        Session.begin(
            resolve("latent", [*WORDS, f"latent.step_std={std}", "train_depth=4"]),
            World(0, 1, torch.device("cpu")),
            tmp_path,
        )
        for std in (1.0, 0.01)
    )
    assert wide.network.step_position.shape == (4, 16)
    torch.testing.assert_close(wide.network.step_position, 100 * narrow.network.step_position)


@pytest.mark.parametrize("wrong", [{"tau": 0.0}, {"alpha": -1.0}, {"noise": -0.1}, {"kl_bound": 0.0}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"latent.{next(iter(wrong))}"):
        LatentConfig(**wrong)


def test_depth_beyond_training_is_refused_before_anything_is_loaded():
    with pytest.raises(ConfigError, match="greater than train_depth=1"):
        resolve("latent", ["depth=3", "train_depth=1"])


def test_training_learns_the_synthetic_world(tmp_path):
    session = begin(tmp_path, "dataset.users=150", "dataset.mean_length=12")
    torch.manual_seed(0)
    model = session.method.build(session.ctx)
    from reason.methods.base import Step

    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    rng, first, total, step = np.random.default_rng(0), None, None, 0
    data = session.ctx.data
    model.train()
    for epoch in range(12):
        order = data.train.order(rng, 32)
        for a in range(0, len(order), 32):
            place = Step(epoch, step, 0.0, torch.Generator().manual_seed(step))
            losses = session.method.loss(model, data.train.batch(order[a : a + 32]), place)
            total = sum(s / c for s, c in losses.values())
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            first, step = first or total.item(), step + 1
    model.eval()
    ours = session.method.evaluate(session.ctx, model, data.test, 2)
    popular = session.method.baselines(session.ctx, session.network, data.test, 1)["popularity"]
    assert total.item() < 0.8 * first
    assert column(ours, "ndcg@10").mean() > 1.3 * column(popular, "ndcg@10").mean()
