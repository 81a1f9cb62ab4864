"""Requests to a tiny session: profiles, records and their replay, broken routers, drift; and what judging tells."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from reason.engine.config import resolve
from reason.engine.evaluation import judge
from reason.engine.parallel import World
from reason.engine.session import Session
from reason.errors import ConfigError, RunError
from reason.files import read_json_lines
from reason.methods.figures import HeatMap, Table
from reason.methods.mor import record
from reason.methods.mor.audit import COLUMNS
from reason.methods.mor.requests import DriftMonitor

HERE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def begin(tiny_text, tmp_path):
    """A session whose routers disagree about tokens, calibrated."""

    def start(*words, calibrate=True):
        session = Session.begin(resolve("mor", [*tiny_text, "depth=3", *words], environ={}), HERE, tmp_path)
        torch.manual_seed(1)
        with torch.no_grad():
            for weight in session.network.parameters():
                if weight.ndim > 1:
                    weight.mul_(8)
            session.network.eval()
            if calibrate:
                fitted = session.method.calibrate(session.ctx, session.network, session.ctx.data.valid)
                session.ctx.calibration = json.loads(json.dumps(fitted))
        return session

    return start


def ask(session, *requests):
    return session.method.predict(session.ctx, session.network, list(requests), 3)


@torch.no_grad()
def inspect(session, example):
    return session.method.inspect(session.ctx, session.network, example)


def prompts(session):
    return [" ".join(text.split()[:6]) for text in session.ctx.dataset.text().test.text[:6]]


def spoil(session, value=torch.nan):
    with torch.no_grad():
        for router in session.network.by_step:
            router.layers[0].weight.fill_(value)


# --- profiles -----------------------------------------------------------------------------------------


def test_profiles_spend_more_and_more(begin):
    session = begin()
    fitted = session.ctx.calibration
    profiles = fitted["profiles"]
    depths = [profiles[name]["mean_depth"] for name in ("economy", "default", "max")]
    assert 1 < depths[0] < depths[1] < depths[2] == 3
    assert depths[0] == pytest.approx(1.5, abs=0.1) and depths[1] == pytest.approx(2, abs=0.1)
    assert profiles["default"]["thresholds"] == fitted["thresholds"]
    assert all(np.isfinite(p["nll"]) and sum(p["shares"]) == pytest.approx(1) for p in profiles.values())


@pytest.mark.parametrize(
    "words", [(), ("mor.capacities=1,0.5,0.2",), ("mor.mean_depth=2.4",), ("mor.aux=router",)]
)
def test_thresholds_keep_of_validation_what_they_should_within_a_hundredth(begin, words):
    session = begin(*words)
    rows = session.method.evaluate(session.ctx, session.network, session.ctx.data.valid, 3).rows
    at = np.array([rows[f"at_{r}"].to_numpy().sum() for r in (1, 2, 3)])
    kept = at[::-1].cumsum()[::-1] / at.sum()
    assert session.ctx.calibration["tokens"] == at.sum() > 200
    assert kept == pytest.approx(session.ctx.calibration["capacities"], abs=0.01)


def test_few_documents_judge_and_few_calibrate(begin):
    few, all_of_them = (begin(*words) for words in (["eval.limit=2"], []))
    held = np.sort(few.ctx.data.valid.tokens)
    assert few.ctx.calibration["tokens"] <= held[-2:].sum() < all_of_them.ctx.calibration["tokens"]


def test_a_profile_is_chosen_by_key_and_by_request(begin):
    session = begin()
    text = prompts(session)[0]
    found = [
        ask(session, {"prompt": text, "tokens": 12, "profile": p})[0] for p in ("economy", "default", "max")
    ]
    depths = [one["depth"] for one in found]
    assert depths[0] <= depths[1] <= depths[2] == 3
    (usual,) = ask(session, {"prompt": text, "tokens": 12})
    assert usual == found[1]
    spent = {}
    for name in ("economy", "default", "max"):
        session = begin(f"mor.profile={name}")
        judged = judge(session.method, session.ctx, HERE, session.network, session.ctx.data.test, 3)
        spent[name] = judged.effective_depth
    assert spent["economy"] < spent["default"] < spent["max"] == 3
    (wrong,) = ask(session, {"prompt": text, "profile": "turbo"})
    assert "Choose from economy, default, max" in wrong["error"]


@pytest.mark.parametrize(
    "words", [("mor.profile=max", "mor.mean_depth=1.5"), ("mor.profile=economy", "mor.routing=token")]
)
def test_profiles_that_mean_nothing_are_refused(tiny_text, words):
    with pytest.raises(ConfigError):
        resolve("mor", [*tiny_text, *words], environ={})


def test_what_was_not_calibrated_cannot_be_asked_for(begin):
    session = begin("mor.routing=token")
    assert set(session.ctx.calibration) == {"reference"}
    (told,) = ask(session, {"prompt": prompts(session)[0], "profile": "economy"})
    assert "profile" in told["error"]


@pytest.mark.parametrize("words", [(), ("mor.routing=token",), ("mor.routing=random",), ("mor.kv=sharing",)])
def test_many_requests_together_are_each_answered_as_alone(begin, words):
    """Of different lengths, depths and temperatures, with one that makes no sense among them."""
    session = begin(*words)
    requests = [{"prompt": p, "tokens": 5 + 3 * i} for i, p in enumerate(prompts(session))]
    requests[1] |= {"temperature": 1.0, "seed": 3}
    requests[2] |= {"depth": 1}
    requests.insert(3, {"prompt": ""})
    together = ask(session, *requests)
    assert together == [ask(session, request)[0] for request in requests]
    assert "empty" in together[3]["error"] and together[2]["depth"] == 1 and session.network.fallbacks == 0


def test_a_broken_router_is_said_of_all_that_were_written_together(begin):
    session = begin()
    spoil(session)
    told = ask(session, *({"prompt": p, "tokens": 5} for p in prompts(session)[:3]))
    assert all(one["depth"] == 3 and "in these 3 texts" in one["note"] for one in told)


# --- records ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [(), ("mor.kv=sharing",), ("mor.routing=token",), ("mor.routing=random",)])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 4}])
def test_a_record_is_written_again_exactly(begin, words, sampling):
    session = begin("mor.record=true", *words)
    requests = [{"prompt": p, "tokens": 15, **sampling} for p in prompts(session)[:3]]
    told = ask(session, *requests)
    lines = [json.loads(line) for line in (session.ctx.workdir / record.FILE).read_text().splitlines()]
    assert len(lines) == 3
    for one, line in zip(told, lines, strict=True):
        assert session.ctx.data.tokens.decode(line["written"]) == one["text"]
        depth = record.expand_run_lengths(line["depth"])
        assert depth.mean() == pytest.approx(one["depth"])
        assert line["counts"] == [int((depth > r).sum()) for r in range(3)]
        assert line["fallbacks"] == 0 and line["kv_bytes"] > 0 and set(line["seconds"]) == {"read", "write"}
    again = ask(session, *({"replay": line} for line in lines))
    assert [a["same"] for a in again] == [True] * 3 and [a["text"] for a in again] == [
        t["text"] for t in told
    ]
    changed = {**lines[0], "written": [*lines[0]["written"][:-1], (lines[0]["written"][-1] + 1) % 5]}
    assert ask(session, {"replay": changed})[0]["same"] is False


def test_a_record_of_another_model_is_refused(begin):
    session = begin("mor.record=true")
    ask(session, {"prompt": prompts(session)[0], "tokens": 4})
    line = json.loads((session.ctx.workdir / record.FILE).read_text())
    with torch.no_grad():
        next(session.network.parameters()).add_(1e-3)
    other, broken, beside, none = ask(
        session, {"replay": line}, {"replay": {"model": "x"}}, {"replay": line, "prompt": "a"}, {"replay": 3}
    )
    assert "another model" in other["error"] and "no 'kv'" in broken["error"]
    assert "only key" in beside["error"] and "not an audit record" in none["error"]
    damaged = {**line, "model": record.model_digest(session.network), "depth": [[1, 1]]}
    assert "damaged" in ask(session, {"replay": damaged})[0]["error"]


def test_nothing_is_recorded_unasked(begin):
    session = begin()
    ask(session, {"prompt": prompts(session)[0], "tokens": 4})
    assert not (session.ctx.workdir / record.FILE).exists()


def test_lines_survive_a_killed_writer(tmp_path):
    path = tmp_path / "audit.jsonl"
    record.append(path, {"a": 1})
    with path.open("a") as f:
        f.write('{"half')
    record.append(path, {"b": 2})
    assert list(read_json_lines(path)) == [{"a": 1}, None, {"b": 2}]


def test_small_forms_keep_what_they_hold():
    depth = np.array([1, 1, 3, 2, 2, 2])
    assert (
        record.run_lengths(depth) == [[1, 2], [3, 1], [2, 3]]
        and (record.expand_run_lengths(record.run_lengths(depth)) == depth).all()
    )
    logits = torch.randn(3, 40) * 9
    logits[1, ::3] = torch.nan
    packed = json.loads(json.dumps(record.quantize(logits)))
    back = record.dequantize(packed)
    np.testing.assert_allclose(back, logits, atol=packed["step"] / 2 + 1e-6)
    assert np.isnan(record.dequantize(record.quantize(torch.full((2, 3), torch.nan)))).all()


# --- what is said when routers fail -------------------------------------------------------------------


def test_a_broken_router_is_said(begin):
    session = begin("mor.record=true")
    spoil(session)
    (told,) = ask(session, {"prompt": prompts(session)[0], "tokens": 5})
    assert "NaN or infinity 33 times" in told["note"] and told["depth"] == 3
    line = json.loads((session.ctx.workdir / record.FILE).read_text())
    assert line["fallbacks"] > 0 and "NaN or infinity" in line["alerts"][0]
    assert ask(session, {"replay": line})[0]["same"]
    judged = judge(session.method, session.ctx, HERE, session.network, session.ctx.data.test, 3).evaluation
    assert judged.overall(judged.rows)["fallbacks"] == 1
    (table,) = [f for f in inspect(session, "") if f.title.startswith("Health")]
    assert ["fallbacks", "1.000", "ALERT"] in [
        row[:3] for row in table.rows
    ] and "NaN or infinity" in table.note


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_router_that_is_broken_before_it_is_calibrated_goes_all_the_way(begin, share):
    """Wherever it says no number; thresholds are fitted to what it does say."""
    session = begin(calibrate=False)
    generator = torch.Generator().manual_seed(0)

    def spoil_some(router, args, logits):
        return logits.masked_fill(torch.rand(logits.shape, generator=generator) < share, torch.nan)

    for router in session.network.by_step:
        router.register_forward_hook(spoil_some)
    with torch.no_grad():
        fitted = session.method.calibrate(session.ctx, session.network, session.ctx.data.valid)
    depth = fitted["profiles"]["default"]["mean_depth"]
    assert depth == 3 if share == 1 else 2.2 < depth < 2.8  # half as deep as ever, half as the router says
    session.ctx.calibration = fitted
    if share == 1:
        assert ask(session, {"prompt": prompts(session)[0], "tokens": 5})[0]["depth"] == 3


def test_a_profile_that_was_chosen_is_no_alert(begin):
    """The router is held against what its own profile gives to validation text."""
    for profile in ("economy", "max"):
        session = begin(f"mor.profile={profile}")
        fitted = session.ctx.calibration
        assert fitted["reference"]["shares"] == pytest.approx(fitted["profiles"][profile]["shares"])


def test_top_k_is_told_to_look_ahead(begin):
    (note,) = begin("mor.route=topk").ctx.calibration["notes"]
    assert "looks at the whole text" in note


def test_a_prompt_longer_than_the_context_and_a_context_that_fills_up(begin):
    session = begin()
    context, text = session.ctx.config.backbone.context, " ".join(prompts(session) * 50)
    (told,) = ask(session, {"prompt": text})
    assert f"trained on {context:,} at a time" in told["error"] and "Shorten it" in told["error"]
    (told,) = ask(session, {"prompt": prompts(session)[0], "tokens": 10_000})
    assert told["tokens"] < context and (told["stopped"] or "is full" in told["note"])


def test_a_rank_without_a_document_says_so_in_the_same_columns(begin):
    session = begin()
    full, empty = (
        session.method.evaluate(
            replace(session.ctx, rank=rank, world_size=2, limit=1), session.network, session.ctx.data.test, 3
        ).rows
        for rank in (0, 1)
    )
    assert full.num_rows == 1 and empty.num_rows == 0 and full.schema == empty.schema


def test_drift_is_said_and_guarded(begin):
    for guard in (False, True):
        session = begin("mor.profile=economy", f"mor.guard={guard}")
        for name in ("economy", "default"):  # as though clean text had left at once
            session.ctx.calibration["profiles"][name]["shares"] = [1.0, 0.0, 0.0]
        session.ctx.calibration["reference"]["drift"] = 0.1
        requests = [{"prompt": p, "tokens": 30} for p in prompts(session) * 12]
        told = ask(session, *requests)
        notes = [one.get("note", "") for one in told]
        first = next(i for i, note in enumerate(notes) if "drifted from those of validation" in note)
        assert not any("drifted" in note for note in notes[:first]) and first > 2
        after = [note for note in notes[first + 1 :] if "was used instead" in note]
        if guard:
            assert (
                "later requests use profile default" in notes[first] and len(after) == len(notes) - first - 1
            )
            assert "profile max" in notes[-1] and told[-1]["depth"] == 3
        else:
            assert not after


def test_drift_needs_enough_tokens():
    drift = DriftMonitor({"reference": {"drift": 0.2, "shares": [0.5, 0.5]}, "thresholds": []}, "default")
    assert drift.add(np.ones(500, int)) == 0 and drift.add(np.ones(50, int)) > 0.2
    assert drift.add(np.repeat([1, 2], 600)) == 0  # what is older is forgotten
    assert DriftMonitor(None, "default").add(np.ones(900, int)) == 0
    assert (
        DriftMonitor({"reference": {"drift": 0.2, "shares": [0.5, 0.5]}}, "economy").add(np.ones(900, int))
        == 0
    )


# --- judging and showing ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [(), ("mor.routing=token",), ("mor.routing=none",), ("train_depth=0", "depth=1")]
)
def test_rows_have_the_audit(begin, words):
    session = begin(*words, "mor.audit=0.3", calibrate=not words)
    depth = session.plan.config.depth
    judged = judge(
        session.method, session.ctx, HERE, session.network, session.ctx.data.test, depth
    ).evaluation
    rows = {name: judged.rows.column(name).to_numpy() for name in (*COLUMNS, "fallbacks")}
    n = len(session.ctx.data.test)
    assert rows["audited"].sum() == (0 if depth == 1 else round(0.3 * n)) and not rows["fallbacks"].any()
    unseen = rows["audited"] == 0
    assert not any(rows[name][unseen].any() for name in COLUMNS)
    overall = judged.overall(judged.rows)
    assert ("audit regret" in overall) == (depth > 1) and overall["fallbacks"] == 0
    few = judge(session.method, session.ctx, HERE, session.network, session.ctx.data.test, depth, limit=4)
    assert few.evaluation.rows.column("audited").to_numpy().sum() == (0 if depth == 1 else 1)


def test_inspect_shows_the_router(begin):
    session = begin()
    found = {f.title: f for f in inspect(session, "")}
    assert isinstance(found["Transitions between depths"], HeatMap)
    for title in ("Health of the router", "Misrouting audit", "Profiles"):
        assert isinstance(found[title], Table) and found[title].rows
    names = [row[0] for row in found["Health of the router"].rows]
    assert {"kept 2", "PSI", "AUROC 3", "explained by position", "regret"} <= set(names)
    assert [row[0] for row in found["Profiles"].rows] == ["economy", "default (in use)", "max"]
    bare = begin("mor.routing=token", calibrate=False)
    note = next(f.note for f in inspect(bare, "") if f.title == "Health of the router")
    assert "no calibrated reference" in note


@pytest.mark.parametrize("profile", ["default", "economy"])
def test_without_its_thresholds_a_run_is_refused_rather_than_routed_by_top_k(begin, profile):
    session = begin(f"mor.profile={profile}", calibrate=False)
    with pytest.raises(RunError, match=r"calibration\.json is gone") as caught:
        inspect(session, "")
    assert "reason evaluate RUN" in str(caught.value)
    with pytest.raises(RunError, match=r"calibration\.json is gone"):
        ask(session, {"prompt": prompts(session)[0]})


@pytest.mark.parametrize("words", [("mor.route=topk",), ("mor.route=fixed",), ("train_depth=0", "depth=1")])
def test_what_needs_no_thresholds_is_inspected_without_them(begin, words):
    assert inspect(begin(*words, calibrate=False), "")
