"""What `reason inspect` tells of a latent run, against slow and plain ways of finding the same."""

import importlib.util
import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from reason.engine import runner
from reason.engine.config import resolve
from reason.engine.parallel import World
from reason.engine.session import Session, load_dataset
from reason.engine.worker import work
from reason.errors import DataError
from reason.methods.base import Step
from reason.methods.figures import HeatMap, Table
from reason.methods.latent import objective
from reason.methods.latent.explain import Explainer, category_mass, nearest_items
from reason.methods.latent.faithfulness import attributions, faithfulness, scrambled
from reason.methods.latent.show import DISCLAIMER, figures
from reason.metrics.association import spearman

WORDS = [
    "dataset=synthetic-interactions", "dataset.users=60", "dataset.items=40", "dataset.categories=4",
    "dataset.mean_length=9", "backbone.hidden=16", "backbone.ffn=16", "backbone.max_length=6",
]  # fmt: skip
ROOT = Path(__file__).resolve().parents[3]
HISTORY = torch.tensor([1, 5, 9, 3, 17])


def begin(tmp_path, *words):
    """A session whose untrained encoder has steps that matter."""
    plan = resolve("latent", [*WORDS, *words], environ={})
    session = Session.begin(plan, World(0, 1, torch.device("cpu")), tmp_path)
    session.network.eval()
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in session.network.named_parameters():
            if "norm" not in name:
                parameter.mul_(12)
    return session


def explainer(session, depth=2):
    return Explainer(session.plan.config, session.network, depth)


def show(session, example="", catalogue=None, **keys):
    catalogue = catalogue or session.ctx.data.catalogue
    return figures(session.plan.config, session.ctx, session.network, catalogue, example, **keys)


def named(found, title):
    (figure,) = [f for f in found if f.title.startswith(title)]
    return figure


@pytest.fixture
def session(tmp_path):
    return begin(tmp_path)


@pytest.fixture(params=["prl", "erl"])
def either(request, tmp_path):
    """A model that answers with its last state, and one that answers with the mean of all."""
    return begin(tmp_path, f"latent.loss={request.param}")


def scores_by_hand(session, items, depth):
    """(N,), by the trie way of running the encoder."""
    with torch.no_grad():
        states = session.network.reason(torch.as_tensor(items)[None])[0][0, -1, : depth + 1]
        state = states.mean(0) if session.plan.config.latent.loss == "erl" else states[-1]
        return session.network.item_vectors() @ state


# --- the trace ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_contributions_of_steps_sum_to_the_change_of_the_score(either, depth):
    found = explainer(either, depth).trace(HISTORY)
    for k in range(depth + 1):
        torch.testing.assert_close(found.scores[k], scores_by_hand(either, HISTORY, k), atol=1e-5, rtol=1e-5)
    change = scores_by_hand(either, HISTORY, depth) - scores_by_hand(either, HISTORY, 0)
    torch.testing.assert_close(found.contributions.sum(0), change, atol=1e-5, rtol=1e-5)
    if depth:
        assert change.abs().max() > 0.1


def test_attention_is_a_share_of_items_and_latent_tokens(session):
    found = explainer(session).trace(HISTORY)
    n = len(HISTORY)
    assert found.attention.shape == (2, 2, n + 2)  # step, layer, key
    torch.testing.assert_close(found.attention.sum(-1), torch.ones(2, 2))
    assert (found.attention[0, :, n + 1] == 0).all() and (found.attention[1, :, n:] > 0).all()
    weights = []
    with torch.no_grad():
        thought = session.network.start(HISTORY[None], torch.tensor([n]))
        session.network.advance(thought, weights)
    for layer, weight in enumerate(weights):
        torch.testing.assert_close(found.attention[0, layer, : n + 1], weight[0].mean(0))
    torch.testing.assert_close(found.item_attention, found.attention[..., :n].sum((0, 1)) / 4)


def test_nearest_items_are_those_of_largest_cosine(session):
    explain = explainer(session)
    states = explain.trace(HISTORY).states
    cosine, items = nearest_items(states, explain.vectors, 5)
    for state, told, codes in zip(states.tolist(), cosine.tolist(), items.tolist(), strict=True):
        every = [
            np.dot(state, v) / np.linalg.norm(state) / np.linalg.norm(v) for v in explain.vectors.tolist()
        ]
        assert codes == sorted(range(len(every)), key=lambda i: -every[i])[:5]
        assert told == pytest.approx([every[i] for i in codes], abs=1e-5)


def test_categories_share_the_probability_of_their_items():
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.2, 0.0]])
    mass = category_mass(p, [["war"], ["war", "love"], [], ["love"]])
    assert list(mass) == ["war", "none", "love"]  # by the last row
    assert mass["war"] == pytest.approx([0.2, 0.75])
    assert mass["love"] == pytest.approx([0.5, 0.05])
    assert mass["none"] == pytest.approx([0.3, 0.2])
    assert "none" not in category_mass(p, [["war"]] * 4)


# --- what the answer rests on ---------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 2])
def test_occlusion_is_the_score_without_the_item(either, depth):
    effect = explainer(either, depth).occlusion(HISTORY, 11)
    whole = scores_by_hand(either, HISTORY, depth)[11]
    for i in range(len(HISTORY)):
        rest = [item for place, item in enumerate(HISTORY.tolist()) if place != i]
        assert float(effect[i]) == pytest.approx(
            float(whole - scores_by_hand(either, rest, depth)[11]), abs=1e-4
        )
    assert effect.abs().min() > 0


def test_gradient_is_the_slope_of_the_score_in_the_items_own_vectors(either):
    item, model = 11, either.network  # 11 is not in the history: its vector is met as an answer alone
    found = explainer(either).gradient(HISTORY, item)
    table = model.table.weight
    before = scores_by_hand(either, HISTORY, 2)[item].double()
    for i, code in enumerate(HISTORY.tolist()):
        step = 1e-3 * table[code].detach().clone()
        with torch.no_grad():
            table[code] += step
            up = scores_by_hand(either, HISTORY, 2)[item].double()
            table[code] -= 2 * step
            down = scores_by_hand(either, HISTORY, 2)[item].double()
            table[code] += step
        assert float(found[i]) == pytest.approx(float(up - down) / 2e-3, abs=0.02 * float(before.abs()))


@pytest.mark.parametrize(
    "words",
    [("backbone=bert4rec",), ("backbone=unisrec", "backbone.text=tfidf", "backbone.text_dim=8")],
    ids=["bert4rec", "unisrec"],
)
def test_every_encoder_can_be_asked(tmp_path, words):
    session = begin(tmp_path, *words)
    explain, n = explainer(session), len(HISTORY)
    told = attributions(explain, HISTORY, 11)
    assert set(told) == {"attention", "gradient", "occlusion"}
    torch.testing.assert_close(explain.trace(HISTORY).attention.sum(-1), torch.ones(2, 2))

    def score(items, vectors):
        with torch.no_grad():
            states, _ = session.network.reason(items[None], 2, vectors=vectors)
        return float(states[0, -1, -1] @ explain.vectors[11])

    for i, code in enumerate(HISTORY.tolist()):
        up, down = explain.vectors.clone(), explain.vectors.clone()
        up[code] *= 1.001
        down[code] *= 0.999
        slope = (score(HISTORY, up) - score(HISTORY, down)) / 0.002
        assert float(told["gradient"][i]) == pytest.approx(slope, abs=3e-3)
        rest = HISTORY[torch.arange(n) != i]
        fall = score(HISTORY, explain.vectors) - score(rest, explain.vectors)
        assert float(told["occlusion"][i]) == pytest.approx(fall, abs=1e-4)
    config, test = session.plan.config, session.ctx.data.test
    assert faithfulness(config, session.network, test, 2, n=3).requests == 3


def test_gradient_tells_repeated_items_apart_and_wants_no_gradient_mode(session):
    with torch.no_grad():
        found = explainer(session).gradient(torch.tensor([4, 8, 4]), 4)
    assert not found.requires_grad and found[0] != found[2] and bool(found.all())
    assert all(parameter.grad is None for parameter in session.network.parameters())


# --- the figures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 2])
def test_figures_show_history_answers_and_steps(tmp_path, depth):
    session = begin(tmp_path, f"depth={depth}", f"train_depth={depth}")
    cases = session.ctx.data.test
    found = show(session, cases.id[3])
    assert len(found) == (7 if depth else 5)
    history, top = found[:2]
    titles = session.ctx.dataset.item_fields["title"]
    items = cases.batch(np.array([3]))["items"][0]
    best = scores_by_hand(session, items, depth).topk(10).indices.tolist()
    assert [row[1] for row in history.rows] == [titles[i] for i in items]
    assert history.columns == ["place", "item", *["attention"] * (depth > 0), "effect"]
    effect = Explainer(session.plan.config, session.network, depth).occlusion(items, best[0])
    assert [float(row[-1]) for row in history.rows] == pytest.approx(effect.tolist(), abs=6e-3)
    assert titles[best[0]] in history.note and titles[cases.target[3]] in history.note
    assert top.columns == ["place", *(f"step {k}" for k in range(depth)), f"step {depth} (answer)"]
    assert [row[0] for row in top.rows[:10]] == list(range(1, 11))
    for row, item in zip(top.rows[:10], best, strict=True):
        assert row[-1].startswith(titles[item])
    assert (DISCLAIMER in top.note) == (depth > 0)
    confidence = named(found, "Confidence")
    assert len(confidence.rows) == depth + 1
    categories = named(found, "Probability")
    assert isinstance(categories, HeatMap) and len(categories.rows) == 4
    np.testing.assert_allclose(np.sum(categories.values, 0), 1, atol=1e-9)
    if depth:
        part, seen = named(found, "Where the scores"), named(found, "Attention of each latent")
        assert isinstance(part, HeatMap) and part.columns[0] == "step 0" and part.columns[-1] == "total"
        for row, item in zip(part.values, best, strict=True):
            assert sum(row[:-1]) == pytest.approx(row[-1], abs=1e-5)
            assert row[-1] == pytest.approx(float(scores_by_hand(session, items, depth)[item]), abs=1e-5)
        assert isinstance(seen, HeatMap) and len(seen.columns) == 4
        np.testing.assert_allclose(np.sum(seen.values, 0), 1, atol=1e-5)  # six items: all are shown


def test_long_histories_are_cut_to_what_can_be_read(tmp_path):
    session = begin(tmp_path, "dataset.mean_length=60", "backbone.max_length=32")
    cases = session.ctx.data.test
    longest = int(cases.history.argmax())
    found = show(session, cases.id[longest])
    history, seen = found[0], named(found, "Attention of each latent")
    whole = int(cases.history[longest])
    assert [row[0] for row in history.rows] == list(range(whole - 19, whole + 1))
    assert f"The last 20 of {whole} items; the encoder reads the last 32." in history.note
    assert "Largest effect of an older item" in history.note
    assert len(seen.rows) == 12 and "The other 22 items" in seen.note
    total, traced = np.sum(seen.values, 0), explainer(session).trace(cases.batch([longest])["items"][0])
    shown = traced.attention.flatten(0, 1)[:, :32].mean(0).topk(10).indices
    rest = 1 - traced.attention.flatten(0, 1)[:, shown].sum(1) - traced.attention.flatten(0, 1)[:, 32:].sum(1)
    np.testing.assert_allclose(1 - total, rest, atol=1e-5)


def test_moves_entries_and_exits_are_marked(session):
    cases = session.ctx.data.test
    titles = session.ctx.dataset.item_fields["title"]
    marks = set()
    for case in range(0, len(cases), 9):
        items, target = cases.batch([case])["items"][0, : cases.length[case]], int(cases.target[case])
        top = show(session, cases.id[case])[1]
        order = [scores_by_hand(session, items, k).argsort(descending=True).tolist() for k in range(3)]
        for k in (1, 2):
            before, after = order[k - 1][:10], order[k][:10]
            for place, item in enumerate(after):
                move = before.index(item) - place if item in before else None
                mark = (
                    " (new)"
                    if move is None
                    else ""
                    if not move
                    else f" ↑{move}"
                    if move > 0
                    else f" ↓{-move}"
                )
                marks.add(mark[:2])
                assert top.rows[place][k + 1] == titles[item] + " *" * (item == target) + mark
            left = [
                f"{titles[i]}{' *' * (i == target)} → {order[k].index(i) + 1}"
                for i in before
                if i not in after
            ]
            assert [row[k + 1] for row in top.rows[10:] if row[k + 1]] == left
        places = ", ".join(f"{ranked.index(target) + 1} (step {k})" for k, ranked in enumerate(order))
        assert f"in place {places} of 40." in top.note
    assert marks == {"", " (", " ↑", " ↓"}


def test_items_already_seen_are_no_candidates_when_asked(tmp_path):
    session = begin(tmp_path, "dataset.candidates=unseen")
    cases = session.ctx.data.test
    titles = session.ctx.dataset.item_fields["title"]
    found = show(session, cases.id[0])
    seen = {titles[i] for i in cases.seen(np.array([0]))[1]} - {titles[cases.target[0]]}
    for row in found[1].rows[:10]:
        assert not any(cell.startswith(title) for cell in row[1:] for title in seen)
    assert f"of {40 - len(seen)}." in found[1].note
    np.testing.assert_allclose(np.sum(named(found, "Probability").values, 0), 1, atol=1e-9)


def test_the_step_that_answered_is_marked_and_the_reason_told(session):
    case = session.ctx.data.test.id[3]
    found = show(session, case, depth=1, stopped="cos reached 0.9 after step 1.")
    top = found[1]
    assert top.columns == ["place", "step 0", "step 1 (answer)", "step 2 (not taken)"]
    assert "cos reached 0.9 after step 1." in top.note
    assert [row[0] for row in named(found, "Confidence").rows] == top.columns[1:]
    assert named(found, "Where the scores").columns == ["step 0", "step 1", "total"]
    assert len(named(found, "Attention of each latent").columns) == 2
    assert named(found, "Items nearest").columns == ["", "step 0", "step 1"]
    items = session.ctx.data.test.batch([3])["items"][0]
    best = int(scores_by_hand(session, items, 1).argmax())
    effect = explainer(session, 1).occlusion(items, best)
    assert [float(row[-1]) for row in found[0].rows] == pytest.approx(effect.tolist(), abs=6e-3)


def test_confidence_is_told_at_the_temperatures_that_were_fitted(session):
    session.ctx.calibration = {"temperatures": [3.0, 2.0, 1.0]}
    case = session.ctx.data.test.id[3]
    items = session.ctx.data.test.batch([3])["items"][0]
    table = named(show(session, case), "Confidence")
    for k, t in enumerate([3.0, 2.0, 1.0]):
        p = (scores_by_hand(session, items, k) / t).softmax(0)
        assert table.rows[k][1:3] == [f"{t:.3g}", f"{float(p.max()):.2%}"]
        entropy = float(-(p * p.log()).sum() / np.log(40))
        assert float(table.rows[k][4]) == pytest.approx(entropy, abs=2e-3)
    session.ctx.calibration = None
    trained = objective.temperatures(session.plan.config.latent, 2)
    assert [row[1] for row in named(show(session, case), "Confidence").rows] == [f"{t:.3g}" for t in trained]


def test_the_calibration_error_of_each_step_is_shown(session):
    session.ctx.calibration = session.method.calibrate(session.ctx, session.network, session.ctx.data.valid)
    table = named(show(session), "Confidence")
    place = table.columns.index("ECE")
    assert table.columns[place:] == ["ECE", "ECE uncalibrated"] and "equal mass" in table.note
    for row, error in zip(table.rows, session.ctx.calibration["ece"], strict=True):
        shown = [f"{error[kind]['equal_mass']:.3f}" for kind in ("calibrated", "uncalibrated")]
        assert row[place:] == shown
    session.ctx.calibration = {"temperatures": [3.0, 2.0, 1.0]}  # of a run made before it was measured
    assert "ECE" not in named(show(session), "Confidence").columns


@pytest.mark.parametrize("candidates", ["all", "unseen"])
def test_a_history_that_is_given_is_shown_like_a_case(tmp_path, candidates):
    session = begin(tmp_path, f"dataset.candidates={candidates}")
    cases, ids = session.ctx.data.test, session.ctx.dataset.item_ids
    titles = session.ctx.dataset.item_fields["title"]
    codes = session.ctx.dataset.history(int(cases.user[3]))[:-1]  # without the target
    found = show(session, json.dumps({"history": [*(ids[i] for i in codes), "nonsense"]}))
    case = show(session, cases.id[3])
    history, top = found[:2]
    assert history.title == "History of the given user" and history.rows == case[0].rows
    assert "left out: nonsense." in history.note and "The next item was" not in history.note
    target = titles[cases.target[3]]
    plain = [[str(cell).replace(" *", "") for cell in row] for row in case[1].rows]
    if candidates == "all" or cases.target[3] not in codes:
        assert [[str(cell) for cell in row] for row in top.rows] == plain
    assert not any("*" in str(cell) for row in top.rows for cell in row) and "true next item" not in top.note
    if candidates == "unseen":
        assert not any(
            str(cell).startswith(titles[i]) for row in top.rows[:10] for cell in row for i in codes
        )
    assert target in case[0].note and [f.title for f in found[2:]] == [f.title for f in case[2:]]


@pytest.mark.parametrize(
    ("example", "says"),
    [
        ('{"history": ["i1"', "no JSON object"),
        ('{"user": "u1"}', '"user"'),
        ('{"history": ["i01"], "k": 3}', '"k"'),
        ('{"history": []}', "The history is empty"),
        ('{"history": ["i010"]}', "holds none of the 1 items.*\n.*Did you mean 'i1"),
        ('{"history": "i01"}', "must be a list"),
    ],
)
def test_a_history_that_makes_no_sense_is_refused(session, example, says):
    with pytest.raises(DataError, match=says):
        show(session, example)


def test_a_history_of_every_item_leaves_none_to_recommend(tmp_path):
    session = begin(tmp_path, "dataset.candidates=unseen")
    with pytest.raises(DataError, match="leaves none to recommend"):
        show(session, json.dumps({"history": session.ctx.dataset.item_ids}))


def test_a_history_of_one_item_says_what_cannot_be_told(session):
    cases = session.ctx.data.test
    short = deepcopy(cases)
    short.start, short.length, short.history = cases.start + cases.length - 1, cases.length * 0 + 1, cases.length * 0 + 1  # fmt: skip
    shorter = replace(session.ctx.data, test=short)
    session.ctx.load_data = lambda: shorter
    found = show(session, cases.id[3])
    history, seen = found[0], named(found, "Attention of each latent")
    assert history.columns == ["place", "item", "attention"] and len(history.rows) == 1
    assert "cannot be tested" in history.note
    assert seen.rows[-2:] == ["earlier latent tokens", "its own latent token"] and len(seen.rows) == 3
    with pytest.raises(ValueError, match="one item"):
        explainer(session).occlusion(torch.tensor([3]), 1)
    with pytest.raises(DataError, match="6 items or more"):
        faithfulness(session.plan.config, session.network, short, 2)


def test_unknown_categories_are_left_out_and_long_titles_cut(session):
    long = [f"{i} " + "x" * 60 for i in range(40)]
    found = show(session, catalogue=replace(session.ctx.data.catalogue, item_fields={"title": long}))
    assert len(found) == 6 and all(len(row[1]) == 40 and row[1].endswith("…") for row in found[0].rows)


def test_figures_are_the_same_each_time(tmp_path):
    session = begin(tmp_path, "dataset.users=200", "dataset.items=12000", "dataset.mean_length=80",
                    "backbone.hidden=64", "backbone.ffn=128", "backbone.max_length=50")  # fmt: skip
    case = session.ctx.data.test.id[int(session.ctx.data.test.length.argmax())]
    first = show(session, case)
    assert show(session, case) == first


# --- are the attributions faithful? ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small encoder that has learned the synthetic world."""
    words = ("dataset.users=150", "dataset.mean_length=14", "backbone.max_length=12", "backbone.dropout=0.1")
    plan = resolve("latent", [*WORDS, *words], environ={})
    session = Session.begin(plan, World(0, 1, torch.device("cpu")), tmp_path_factory.mktemp("trained"))
    model, data, step = session.network, session.ctx.data, 0
    optimizer, rng = torch.optim.Adam(model.parameters(), lr=5e-3), np.random.default_rng(0)
    model.train()
    for epoch in range(15):
        order = data.train.order(rng, 32)
        for a in range(0, len(order), 32):
            place = Step(epoch, step, 0.0, torch.Generator().manual_seed(step))
            losses = session.method.loss(model, data.train.batch(order[a : a + 32]), place)
            optimizer.zero_grad()
            sum(total / count for total, count in losses.values()).backward()
            optimizer.step()
            step += 1
    model.eval()
    return session


@pytest.fixture(scope="module")
def judged(trained):
    return faithfulness(trained.plan.config, trained.network, trained.ctx.data.test, 2, n=80)


def test_removing_what_matters_costs_more_than_removing_anything(judged):
    assert judged.requests == 80 and set(judged.deletion) == {"attention", "gradient", "occlusion"}
    fall = judged.deletion["occlusion"]
    assert fall.low > 0 and fall.p < 0.01 and fall.n == 80


def test_agreement_with_occlusion_is_a_correlation(judged):
    assert set(judged.agreement) == {"attention", "gradient"}
    for found in judged.agreement.values():
        assert -1 <= found.low <= found.value <= found.high <= 1 and found.n <= 80


def test_scrambled_weights_give_other_attributions(trained, judged):
    for found in judged.scrambled.values():
        assert abs(found.value) < 0.2
    ruin = scrambled(trained.network, 0)
    for (name, a), b in zip(trained.network.named_parameters(), ruin.parameters(), strict=True):
        torch.testing.assert_close(a.flatten().sort().values, b.flatten().sort().values)
        assert name.endswith("bias") or a.numel() < 20 or not torch.equal(a, b), name


def test_faithfulness_by_hand_on_one_case(trained):
    """The numbers of two cases, worked out one deletion at a time."""
    cases, config = trained.ctx.data.test, trained.plan.config
    found = faithfulness(config, trained.network, cases, 2, n=2, seed=5)
    rng = np.random.default_rng(5)
    chosen = np.sort(rng.permutation(np.flatnonzero(cases.length >= 6))[:2])
    falls, rho = [], []
    for case in chosen:
        items = cases.batch([case])["items"][0]
        scores = scores_by_hand(trained, items, 2)
        best = int(scores.argmax())
        told = attributions(Explainer(config, trained.network, 2), items, best)
        first = told["attention"].topk(3).indices.tolist()

        def without(places, items=items, best=best):
            rest = [item for i, item in enumerate(items.tolist()) if i not in places]
            return float(scores_by_hand(trained, rest, 2)[best])

        drawn = [rng.choice(len(items), 3, replace=False).tolist() for _ in range(10)]
        falls.append(float(np.mean([without(places) for places in drawn])) - without(first))
        rho.append(spearman(told["attention"].numpy(), told["occlusion"].numpy()))
    assert found.deletion["attention"].value == pytest.approx(np.mean(falls), abs=1e-4)
    assert found.agreement["attention"].value == pytest.approx(np.mean(rho), abs=1e-6)


def test_faithfulness_is_a_function_of_its_seed(trained):
    def judge(seed, depth=2):
        config, test = trained.plan.config, trained.ctx.data.test
        return faithfulness(config, trained.network, test, depth, n=8, seed=seed).as_dict()

    assert judge(1) == judge(1) != judge(2)
    assert set(judge(1, depth=0)["agreement"]) == {"gradient"}


# --- the command ----------------------------------------------------------------------------------------


def test_faithfulness_of_runs_is_one_json_list(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location(
        "faithfulness_script", ROOT / "docs/results/faithfulness.py"
    )
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    plan = resolve("latent", [*WORDS, "train.epochs=1", "hardware.threads=1"], environ={})
    folder = runner.prepare(plan, load_dataset(plan).digest)
    work({"folder": str(folder.path), "device": "cpu", "quiet": True})
    assert script.main([str(folder.path), str(folder.path), "--cases", "5"]) == 0
    told, again = json.loads(capsys.readouterr().out)
    assert told == again
    assert told["run"] == folder.name and told["requests"] == 5 and told["depth"] == 2
    assert set(told["deletion"]["occlusion"]) == {"value", "low", "high", "p", "n", "seeds"}
    assert script.main(["nosuchrun"]) == 2 and "nosuchrun" in capsys.readouterr().err
    assert script.main([str(folder.path), "--cases", "1"]) == 2 and "too few" in capsys.readouterr().err


def test_tables_are_tables(session):
    for figure in show(session):
        if isinstance(figure, Table):
            assert all(len(row) == len(figure.columns) for row in figure.rows), figure.title
        else:
            assert isinstance(figure, HeatMap) and len(figure.values) == len(figure.rows)
            assert all(len(row) == len(figure.columns) for row in figure.values)
