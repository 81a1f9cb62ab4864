"""Is deeper reasoning worth it: groups, oracle and luck, policies and chance, shares, claims; and how it is told."""

from __future__ import annotations

import importlib.util
import io
import json
import re
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import feather
from rich.console import Console

from reason.methods.base import Cohort
from reason.metrics.statistics import ExampleScores, Interval, holm
from reason.reports.comparison import METHOD, Comparison, Entry
from reason.reports.frame import Key
from reason.reports.study import SECTIONS, as_dict, studies
from reason.reports.study.claims import ABSENT, judge
from reason.reports.study.cohorts import cohort, contrast, cut
from reason.reports.study.models import Evidence, Model, Outcome
from reason.reports.study.oracle import oracle
from reason.reports.study.picture import draw_study
from reason.reports.study.policies import mixed_at, policies
from reason.reports.study.shares import AT_RANDOM, deep_shares, first
from reason.reports.study.views import StudyView, markdown

# --- models made by hand ----------------------------------------------------------------------------


def outcome(
    values, depth: int = 0, used=None, label: str = "", weights=None, ms: float | None = None
) -> Outcome:
    """values: (S, n), or (n,) for one seed."""
    values = np.atleast_2d(np.asarray(values, dtype=float))
    ids = np.array([str(i) for i in range(values.shape[1])])
    rows = {
        s: ExampleScores(ids, v, None if weights is None else np.asarray(weights, float))
        for s, v in enumerate(values)
    }
    key = Key("latent", "latent", "sasrec", "movielens-100k", 2, depth)
    costs = {} if ms is None else {"latency_p50_ms": ms}
    mean = float(np.mean([r.value for r in rows.values()]))
    entry = Entry(label, METHOD, key, [], rows, Interval(mean, mean, mean, len(ids)), costs=costs)
    used = np.full(len(ids), float(depth)) if used is None else np.asarray(used, float)
    return Outcome(label, entry, rows, dict.fromkeys(rows, used))


def evidence_of(
    depths: dict, base=None, chosen=None, larger=True, columns=None, policy=(), **keys
) -> Evidence:
    """One model with what it did at each depth, each value as for ``outcome``."""
    made = {d: v if isinstance(v, Outcome) else outcome(v, d, **keys) for d, v in depths.items()}
    bases = [] if base is None else [outcome(base, **keys)]
    deepest = made[max(made)]
    model = Model("m", deepest.entry.key, made, bases[0] if bases else None, chosen, list(policy))
    ids = next(iter(deepest.rows.values())).id
    table = Comparison("NDCG@10", larger, "d", "0" * 32, "test", len(ids), {"example": "user"}, [])
    cards = {"latent": (Cohort("history", "items"), Cohort("target", "target", known=False))}
    told = {k: np.asarray(v, dtype=float) for k, v in (columns or {}).items()}
    return Evidence(table, ids, [model], bases, cards, told)


def only(evidence: Evidence) -> Model:
    (model,) = evidence.models
    return model


# --- groups -----------------------------------------------------------------------------------------


def test_edges_are_upper_bounds_and_included():
    groups = cut(np.array([1, 5, 6, 10, 11, 50, 51, 5]), (5, 10, 20, 50))
    assert [g.label for g in groups] == ["up to 5", "6 to 10", "11 to 20", "21 to 50", "above 50"]
    assert [g.index.tolist() for g in groups] == [[0, 1, 7], [2, 3], [4], [5], [6]]
    assert [g.label for g in cut(np.array([3, 60]), (5, 10, 20, 50))] == [
        "up to 5",
        "above 50",
    ]  # none is empty
    assert [g.label for g in cut(np.array([0.2, 0.7]), (0.5, 0.9))] == [
        "up to 0.500",
        "above 0.500, up to 0.900",
    ]


def test_quarters_have_equal_mass_and_never_part_equal_values():
    groups = cut(np.array([4, 1, 3, 2, 8, 7, 6, 5]))
    assert [g.label for g in groups] == ["1 to 2", "3 to 4", "5 to 6", "7 to 8"]
    assert [g.index.tolist() for g in groups] == [[1, 3], [0, 2], [6, 7], [4, 5]]
    tied = cut(np.array([2] * 6 + [1, 3]))  # the middle of the block of 2 lies in the third quarter: 1, 2, 3
    assert [(g.low, g.high, len(g.index)) for g in tied] == [(1, 1, 1), (2, 2, 6), (3, 3, 1)]
    assert [(g.label, len(g.index)) for g in cut(np.array([0.0, 1.0, 1.0, 1.0]))] == [("0", 1), ("1", 3)]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40))
def test_groups_hold_everyone_once_in_order(values):
    groups = cut(np.array(values))
    assert sorted(np.concatenate([g.index for g in groups]).tolist()) == list(range(len(values)))
    assert all(a.high < b.low for a, b in pairwise(groups))
    whole = max(values.count(v) for v in values)
    assert all(len(g.index) <= len(values) / 4 + 2 * whole for g in groups)


def test_a_cohort_by_hand_with_its_correction():
    rng = np.random.default_rng(0)
    history = np.repeat([1, 2, 3, 4], 30)
    gain = np.where(history == 1, 1.0, 0.0) + 0.3 * rng.normal(size=120)
    base = rng.normal(size=120)
    shy = outcome(base, 2, used=np.where(history == 4, 2, 1), label="shy")
    evidence = evidence_of({0: base, 2: base + gain}, base=base, columns={"history": history}, policy=[shy])
    found = cohort(only(evidence), Cohort("history", "items"), evidence)
    assert [g.n for g in found.groups] == [30] * 4 and found.tests == 4
    for i, g in enumerate(found.groups):
        where = history == i + 1
        assert g.base == pytest.approx(base[where].mean()) == g.at[0]
        assert g.to_base.difference.value == pytest.approx(gain[where].mean()) == g.to_least.difference.value
        assert g.exits == {"shy": 2.0 if i == 3 else 1.0}
    raw = [g.to_base.difference.p for g in found.groups]
    assert [g.to_base.p for g in found.groups] == holm(raw)
    assert [g.to_base.verdict(1) for g in found.groups] == ["better", *["not distinguishable"] * 3]
    assert found.groups[0].to_base.verdict(-1) == "worse"


def test_a_group_too_small_is_not_tested():
    values = np.arange(60.0)
    evidence = evidence_of({0: values, 1: values + 1}, columns={"history": [9] * 3 + [1] * 57})
    small = cohort(only(evidence), Cohort("history", "items", edges=(5,)), evidence).groups[1]
    assert small.n == 3 and small.to_least is None and small.at[1] == pytest.approx(2.0)


def test_contrast_is_the_difference_of_the_gains():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(3, 100)), rng.normal(size=(3, 100))
    one, other = cut(np.repeat([0, 1], [40, 60]))
    found = contrast(outcome(a), outcome(b), one, other)
    gain = (a - b).mean(0)
    assert found.value == pytest.approx(gain[:40].mean() - gain[40:].mean()) and found.n == 100
    two = np.sqrt(np.var((a - b).mean(0)[:40]) / 40 + np.var((a - b).mean(0)[40:]) / 60)
    assert (found.high - found.low) / 3.92 == pytest.approx(two, rel=0.25)


# --- the oracle and its null ------------------------------------------------------------------------


def test_the_oracle_by_hand_ties_go_to_the_shallowest():
    evidence = evidence_of(
        {0: [0.5, 0.0, 0.2, 0.0], 1: [0.5, 0.4, 0.1, 0.0], 2: [0.1, 0.4, 0.9, 0.0]}, chosen=1
    )
    found = oracle(only(evidence), evidence)
    assert found.oracle.value == pytest.approx((0.5 + 0.4 + 0.9 + 0.0) / 4)
    assert found.gain.value == pytest.approx((0.0 + 0.0 + 0.8 + 0.0) / 4) and found.fixed == 1
    assert found.histogram == {0: 0.5, 1: 0.25, 2: 0.25} and found.alike == 0.25
    assert found.null is None and "no base" in found.why_no_null


def test_the_null_by_hand():
    depths = {0: [[0.0, 0.2, 0.0], [0.1, 0.0, 0.0]], 1: [[0.3, 0.0, 0.0], [0.0, 0.0, 0.6]]}
    base = [[0.4, 0.0, 0.0], [0.0, 0.2, 0.0]]
    evidence = evidence_of(depths, base=base, chosen=1)
    null = oracle(only(evidence), evidence).null
    assert null.runs == 2 and null.oracle.value == pytest.approx(0.6 / 3)  # max: .4 .2 .0
    assert null.gain.value == pytest.approx(0.2 - (0.4 + 0.2) / 6)
    assert null.model_gain.value == pytest.approx((0.2 + 0.1) / 6)  # seed 0 gains .2, seed 1 .1
    assert null.excess.value == pytest.approx((0.2 + 0.1) / 6 - 0.1)
    assert null.over_base.value == pytest.approx(0.1 / 0.1)


def best_of(runs: np.ndarray, count: int, held: int) -> np.ndarray:
    """The maximum over sets of ``count`` runs that hold ``held``, averaged; slow and plain."""
    sets = [s for s in combinations(range(len(runs)), count) if held in s]
    return np.mean([[max(runs[i][x] for i in s) for x in range(runs.shape[1])] for s in sets], axis=0)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_fewer_or_more_base_runs_than_depths(seeds):
    rng = np.random.default_rng(2)
    depths, base = rng.random((3, 2, 30)), rng.random((seeds, 30))  # three depths, two seeds
    evidence = evidence_of(dict(enumerate(depths)), base=base, chosen=2)
    null = oracle(only(evidence), evidence).null
    runs = min(3, seeds)
    assert null.runs == runs
    gains = [best_of(base, runs, s) - base[s] for s in range(seeds)]
    assert null.gain.value == pytest.approx(np.mean(gains))
    mine = [best_of(depths[:, s], runs, 2) - depths[2, s] for s in range(2)]
    assert null.model_gain.value == pytest.approx(np.mean(mine))
    assert null.excess.value == pytest.approx(np.mean(mine) - np.mean(gains[:2]))  # paired over shared seeds


def test_luck_alone_is_called_luck_and_more_is_called_more():
    rng = np.random.default_rng(3)
    user = rng.random(400)
    noise = lambda *shape: user + 0.2 * rng.normal(size=(*shape, 400))  # noqa: E731
    evidence = evidence_of(dict(enumerate(noise(3, 3))), base=noise(3), chosen=0)
    null = oracle(only(evidence), evidence).null
    assert null.verdict == "not distinguishable from luck" and null.gain.low > 0.1
    depths = noise(3, 3)
    for d in range(3):  # each user has a depth that suits
        depths[d, :, d::3] += 1.0
    evidence = evidence_of(dict(enumerate(depths)), base=noise(3), chosen=0)
    assert oracle(only(evidence), evidence).null.verdict == "more than luck"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 4), st.booleans())
def test_no_depth_and_no_policy_is_better_than_the_oracle_in_any_case(seed, count, larger):
    rng = np.random.default_rng(seed)
    depths = rng.integers(0, 4, size=(count, 2, 12)) / 3
    used = rng.integers(0, count, size=12)
    policy = outcome(
        np.stack([depths[used, s, np.arange(12)] for s in range(2)]), count - 1, used=used, label="p"
    )
    evidence = evidence_of(dict(enumerate(depths)), larger=larger, policy=[policy], chosen=count - 1)
    best = depths.max(0) if larger else depths.min(0)
    found = oracle(only(evidence), evidence)
    assert found.oracle.value == pytest.approx(best.mean())
    assert sum(found.histogram.values()) == pytest.approx(1)
    for d in range(count):  # ties to the shallowest: what no shallower depth equals
        mine = (depths[d] == best) & ~(depths[:d] == best).any(0)
        assert found.histogram[d] == pytest.approx(mine.mean())
    assert found.gain.value >= 0
    if "p" in found.recovery:
        assert found.recovery["p"].value <= 1 + 1e-9
    # of one depth it is that depth
    alone = evidence_of({0: depths[0], 1: depths[0]}, larger=larger)
    assert oracle(only(alone), alone).oracle.value == pytest.approx(depths[0].mean())
    assert oracle(only(alone), alone).histogram == {0: 1.0, 1: 0.0}


def test_where_lower_is_better_everything_is_turned_over():
    rng = np.random.default_rng(4)
    depths, base = rng.random((3, 3, 50)), rng.random((3, 50))
    up = evidence_of(dict(enumerate(depths)), base=base, chosen=1)
    down = evidence_of(dict(enumerate(-depths)), base=-base, chosen=1, larger=False)
    a, b = oracle(only(up), up), oracle(only(down), down)
    assert b.oracle.value == pytest.approx(-a.oracle.value)
    assert b.gain.value == pytest.approx(a.gain.value) and b.histogram == a.histogram
    assert b.null.excess.value == pytest.approx(a.null.excess.value)


def test_a_ratio_has_an_oracle_only_where_depth_leaves_its_denominators_alone():
    tokens = np.array([1.0, 10.0, 4.0])
    nats = {0: [1.0, 20.0, 9.0], 1: [2.0, 15.0, 8.0]}
    evidence = evidence_of(nats, larger=False, weights=tokens, chosen=1)
    found = oracle(only(evidence), evidence)
    assert found.oracle.value == pytest.approx((1 + 15 + 8) / 15) and found.gain.value == pytest.approx(
        1 / 15
    )
    changed = {0: outcome(nats[0], 0, weights=tokens), 1: outcome(nats[1], 1, weights=tokens + 1)}
    with pytest.raises(ValueError, match="denominators change with depth"):
        oracle(only(evidence_of(changed)), evidence_of(changed))


def test_what_an_oracle_needs_is_said():
    evidence = evidence_of({2: [0.1, 0.2]})
    with pytest.raises(ValueError, match="one depth only"):
        oracle(only(evidence), evidence)
    evidence = evidence_of({0: [0.1, 0.2], 1: [0.2, 0.1]}, base=[0.1, 0.1], chosen=1)
    assert "seed=1" in oracle(only(evidence), evidence).why_no_null


# --- policies and chance ----------------------------------------------------------------------------


def test_a_policy_against_the_mixture_by_hand():
    depths = np.array([[0.0, 0.2, 0.4, 0.6], [0.4, 0.2, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]])
    used = np.array([2, 0, 0, 1])
    policy = outcome(depths[used, np.arange(4)], 2, used=used, label="p")
    evidence = evidence_of(dict(enumerate(depths)), chosen=1, policy=[policy])
    (found,) = policies(only(evidence), evidence)
    mine = (1.0 + 0.2 + 0.4 + 1.0) / 4
    mixture = sum(share * depths[d].mean() for d, share in {0: 0.5, 1: 0.25, 2: 0.25}.items())
    line = 0.25 * depths[0].mean() + 0.75 * depths[1].mean()  # mean depth 0.75
    assert found.mean_depth == 0.75 and found.shares == {0.0: 0.5, 1.0: 0.25, 2.0: 0.25}
    assert found.to_mixture.difference.value == pytest.approx(mine - mixture)
    assert found.to_line.difference.value == pytest.approx(mine - line)
    assert found.to_fixed.difference.value == pytest.approx(mine - depths[1].mean()) and found.fixed == 1


@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_the_mixture_of_neighbours_is_the_line(seed, share):
    rng = np.random.default_rng(seed)
    values = rng.random((2, 20))
    used = (rng.random(20) < share).astype(int)
    policy = outcome(values[used, np.arange(20)], 1, used=used, label="p")
    evidence = evidence_of(dict(enumerate(values)), policy=[policy])
    (found,) = policies(only(evidence), evidence)
    assert found.to_mixture.difference.value == pytest.approx(found.to_line.difference.value, abs=1e-12)


def test_the_mixture_is_what_dealing_at_random_gives_on_average():
    rng = np.random.default_rng(5)
    depths, used = rng.random((3, 40)), rng.integers(0, 3, size=40)
    policy = outcome(depths[used, np.arange(40)], 2, used=used, label="p")
    evidence = evidence_of(dict(enumerate(depths)), chosen=2, policy=[policy])
    (found,) = policies(only(evidence), evidence)
    dealt = [depths[rng.permutation(used), np.arange(40)].mean() for _ in range(4000)]
    expected = policy.rows[0].value - found.to_mixture.difference.value
    assert expected == pytest.approx(np.mean(dealt), abs=4 * np.std(dealt) / np.sqrt(4000))


def test_policies_are_corrected_together_and_one_that_follows_users_wins():
    rng = np.random.default_rng(6)
    depths = rng.random((2, 3, 300))
    good = (depths[1].mean(0) > depths[0].mean(0)).astype(int)
    random = rng.integers(0, 2, size=300)
    made = [
        outcome(np.stack([depths[used, s, np.arange(300)] for s in range(3)]), 1, used=used, label=name)
        for name, used in (("good", good), ("random", random), ("all", np.ones(300, int)))
    ]
    evidence = evidence_of(dict(enumerate(depths)), chosen=1, policy=made)
    found = policies(only(evidence), evidence)
    assert [p.to_mixture.tests for p in found] == [3] * 3
    assert [p.to_mixture.p for p in found] == holm([p.to_mixture.difference.p for p in found])
    assert [p.to_mixture.verdict(1) for p in found] == [
        "better",
        "not distinguishable",
        "not distinguishable",
    ]
    assert (
        found[2].to_mixture.difference.value == 0 == found[2].to_fixed.difference.value
    )  # all at depth 1: that depth


def test_what_a_policy_cannot_be_held_against_is_said():
    values = np.linspace(0, 1, 30)
    policy = outcome(values, 3, used=np.where(values < 0.5, 1, 3), label="p")
    evidence = evidence_of({0: values, 1: values, 2: values}, chosen=0, policy=[policy])
    (found,) = policies(only(evidence), evidence)
    assert found.to_mixture is None and "depth 3 was not evaluated as a fixed depth" in found.why
    assert found.to_fixed is not None
    with pytest.raises(ValueError, match="outside the fixed depths"):
        mixed_at(only(evidence), 0, 2.5)


# --- part of the requests ---------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.sampled_from([0.1, 0.25, 0.5]))
def test_a_share_is_met_exactly_and_equal_values_are_treated_alike(values, share):
    order = np.array(values)
    weight = first(order, share)
    assert weight.sum() == pytest.approx(share * len(values))
    assert all(len(set(weight[order == v].tolist())) == 1 for v in set(values))
    for a, b in combinations(range(len(values)), 2):
        if order[a] < order[b]:
            assert weight[a] >= weight[b] and (weight[a] == 1 or weight[b] == 0)


def test_shares_by_hand():
    least, deep = np.array([0.0, 0.2, 0.4, 0.0] * 10), np.array([0.4, 0.2, 0.0, 0.8] * 10)
    made = {0: outcome(least, 0, ms=2.0), 2: outcome(deep, 2, ms=6.0)}
    evidence = evidence_of(made, chosen=2, columns={"history": [1, 2, 3, 4] * 10})
    found = {(s.share, s.chosen): s for s in deep_shares(only(evidence), evidence)}
    assert len(found) == 9
    assert {share: s.ms for (share, _), s in found.items()} == pytest.approx({0.1: 2.4, 0.25: 3.0, 0.5: 4.0})
    for share in (0.1, 0.25, 0.5):
        chance = found[share, AT_RANDOM]
        assert (chance.inside, chance.outside) == (pytest.approx(0.35), pytest.approx(0.15))
        assert chance.total == pytest.approx(0.15 + share * 0.2) and chance.to_random is None
    quarter = found[0.25, "largest history"]  # all with history 4
    assert (quarter.inside, quarter.outside) == (pytest.approx(0.8), pytest.approx(0.2))
    assert quarter.total == pytest.approx((0.0 + 0.2 + 0.4 + 0.8) / 4)
    assert quarter.to_none.difference.value == pytest.approx(0.2) and quarter.to_none.tests == 9
    assert quarter.to_random.difference.value == pytest.approx(0.35 - 0.2) and quarter.to_random.tests == 6
    assert found[0.25, "smallest history"].total == pytest.approx((0.4 + 0.2 + 0.4) / 4)
    without = evidence_of(made, chosen=2)
    assert {s.chosen for s in deep_shares(only(without), without)} == {AT_RANDOM}


# --- whole studies ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A base, and a model with cohorts and two policies, over three seeds. Read only."""
    from report_folders import USERS, Maker

    maker = Maker(tmp_path_factory.mktemp("study") / "runs")
    maker.bases(cohorts=True, experiment="latent-base", latency=0.5)
    rng = np.random.default_rng(0)
    fixed = {"latent.policy": "fixed", "latent.mean_depth": None, "latent.loss": "prl"}
    gain = {0: 0.0, 1: 0.3, 2: 0.6}
    for seed in range(3):
        model = maker.run(seed=seed, cohorts=True, settings=fixed, gain=gain, latency=1.0 + 0.01 * seed)
        for policy in ("cos", "router"):
            used = rng.integers(0, 3, size=USERS)
            own = fixed | {"latent.policy": policy, "latent.mean_depth": 1}
            keys = {"seed": seed, "settings": own, "gain": gain, "depths": (2,), "trained_by": model.name}
            maker.run(**keys, cohorts=True, used=used)
    return maker


@pytest.fixture(scope="module")
def study(runs):
    (one,) = studies(runs.root)
    return one


def test_a_policy_belongs_to_the_model_whose_weights_it_used(study, make):
    (model,) = study.evidence.models
    assert model.label == "latent" and list(model.depths) == [0, 1, 2]
    assert [p.label for p in model.policies] == ["cos mean_depth=1", "router mean_depth=1"]
    assert model.base is study.evidence.bases[0] and model.base.label == "latent-base base"
    owner = make.run(settings={"latent.loss": "erl"})
    make.run(settings={"latent.loss": "prl"})
    make.run(settings={"latent.loss": "erl"}, depths=(2,), used=np.arange(300) % 3, trained_by=owner.name)
    make.run(settings={"latent.loss": "ce"}, depths=(2,), used=np.arange(300) % 3, trained_by="gone")
    (other,) = studies(make.root)
    assert {m.label: [p.label for p in m.policies] for m in other.evidence.models} == {
        "latent loss=erl": ["policy up to 2"], "latent loss=prl": []
    }  # fmt: skip
    assert any("loss=ce" in note and "omitted" in note for note in other.evidence.notes)


def test_rows_in_another_order_are_put_in_one(make):
    import pyarrow as pa

    make.bases(seeds=(0,), cohorts=True)
    run = make.run(cohorts=True)
    before = as_dict(studies(make.root)[0])
    path = str(run / "rows/test-depth1.arrow")
    table = feather.read_table(path)
    feather.write_feather(table.take(pa.array(np.random.default_rng(0).permutation(table.num_rows))), path)
    after = as_dict(studies(make.root)[0])
    for one, other in zip(before["cohorts"], after["cohorts"], strict=True):
        assert [g["at"] for g in one["groups"]] == [pytest.approx(g["at"]) for g in other["groups"]]
    assert before["oracle"][0]["histogram"] == after["oracle"][0]["histogram"]


def test_the_triangle_has_bases_train_depths_and_choices(make):
    make.bases(seeds=(0, 1))
    for seed in (0, 1):
        make.run(depths=(0, 1), train_depth=1, seed=seed, gain={0: 0.0, 1: 0.1}, cohorts=True)
        make.run(depths=(0, 1, 2), train_depth=2, seed=seed, gain={0: 0, 1: 0.6, 2: 0.2}, cohorts=True)
    (found,) = studies(make.root)
    shape = [(line.train_depth, line.base, list(line.cells), line.seeds) for line in found.triangle]
    assert shape == [(0, True, [0], [0, 1]), (1, False, [0, 1], [0, 1]), (2, False, [0, 1, 2], [0, 1])]
    chosen = [[d for d, c in line.cells.items() if c.chosen] for line in found.triangle]
    assert chosen == [[], [1], [1]]
    assert [[d for d, c in line.cells.items() if c.best] for line in found.triangle] == [[], [], [1]]
    cell = found.triangle[2].cells[2]
    assert cell.means["step_cosine"] == pytest.approx(0.9) and cell.overall["coverage@10"] == pytest.approx(
        0.3
    )
    for line in found.triangle:
        for c in line.cells.values():
            assert c.accuracy.low < c.accuracy.value < c.accuracy.high and c.accuracy.seeds == 2


def test_the_answer_is_paired_and_corrected(study):
    (told,) = study.answer
    assert (told.deep, told.deep_is, told.least) == (2, "chosen on validation", 0)
    model = study.evidence.models[0]
    expected = model.depths[2].entry.accuracy.value - model.base.entry.accuracy.value
    assert told.to_base.difference.value == pytest.approx(expected) and told.to_base.tests == 2
    entry = next(
        e for e in study.evidence.table.entries if e.depth == 2 and e.key == model.depths[2].entry.key
    )
    assert told.to_base.difference == entry.difference  # what `reason compare` says
    assert told.to_base.verdict(1) == "better" and told.ms_deep / told.ms_least == pytest.approx(1.6)


def test_json_is_whole_stable_and_without_nan(runs, study):
    data = as_dict(study)
    text = json.dumps(data, allow_nan=False)
    assert text == json.dumps(as_dict(studies(runs.root)[0]), allow_nan=False)
    assert all(data[section] for section in SECTIONS) and data["missing"] == {s: [] for s in SECTIONS}
    assert {"value", "low", "high", "p", "p_holm", "tests", "n", "seeds", "verdict"} == set(
        data["answer"][0]["to_base"]
    )
    assert data["oracle"][0]["null"]["verdict"]
    assert [c["column"] for c in data["cohorts"]] == ["history", "history", "target_count", "target_head"]
    assert [c["known"] for c in data["cohorts"]] == [True, True, False, False]


def test_every_section_says_what_it_lacks(make):
    make.run(depths=(2,))
    (found,) = studies(make.root)
    said = {section: " ".join(found.missing[section]) for section in SECTIONS}
    assert "reason run latent train_depth=0 seed=0" in said["answer"]
    assert "history, target_count, target_head" in said["cohorts"] and "reason evaluate" in said["cohorts"]
    assert "one depth only" in said["oracle"] and "one depth only" in said["deep"]
    assert "adaptive depth policy" in said["policies"]
    text = drawn(found)
    assert text.count("Not computed:") >= 5
    assert all(
        markdown(found, section).count("Not computed")
        for section in ("cohorts", "oracle", "policies", "deep")
    )


def test_a_base_that_was_not_named_is_pointed_at(runs):
    (found,) = studies(runs.root, ["latent-base", "latent"])
    assert found.missing["answer"] == []
    run = found.evidence.models[0].depths[2].entry.points[0].run
    (alone,) = studies(runs.root, [run])
    (why,) = alone.missing["answer"]
    assert why.endswith(f"reason study {run} latent-base")


def test_bases_alone_are_no_study(make):
    make.bases()
    (found,) = studies(make.root)
    assert "all models here are bases" in found.missing["answer"][0] and "all models here are bases" in drawn(
        found
    )


# --- how it is told ---------------------------------------------------------------------------------


def drawn(study, width: int = 80, ascii_only: bool = False) -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii" if ascii_only else "utf-8", write_through=True)
    Console(file=stream, width=width, highlight=False).print(StudyView(study))
    return raw.getvalue().decode()


def test_the_terminal_has_every_section_within_the_window(study):
    for width in (80, 120):
        text = drawn(study, width)
        assert max(map(len, text.splitlines())) <= width and "\x1b" not in text
        for words in (
            "Is it worth it?", "Training depth and evaluation depth", "Who benefits?", "history", "3 base runs (null)", "excess over luck",
            "cos mean_depth=1", "at random", "largest history", "not distinguishable", "Holm's correction",
            "known only once the answer is",
        ):  # fmt: skip
            assert words in text, words
    assert "Columns omitted" in drawn(study) and drawn(study, ascii_only=True).isascii()
    assert re.search(r"^latent +2 ◂ ", drawn(study), re.M)


def test_markdown_has_the_same_numbers_and_all_columns(study):
    text = {section: markdown(study, section) for section in SECTIONS}
    d = study.answer[0].to_base.difference
    assert f"{d.value:+.4f} [{d.low:+.4f}, {d.high:+.4f}]" in text["answer"] and "Not shown" not in "".join(
        text.values()
    )
    head = next(line for line in text["cohorts"].splitlines() if line.startswith("| history"))
    assert "depth by router mean_depth=1" in head and head.count("| p ") == 2
    for block in text.values():
        tables = re.findall(r"(?:^\|.*\n)+", block, re.M)
        assert tables and all(len({line.count("|") for line in t.splitlines()}) == 1 for t in tables)


def test_the_picture_shows_fixed_depths_policies_ceiling_and_groups(study, tmp_path):
    from matplotlib.colors import to_rgb
    from matplotlib.image import imread

    draw_study(study, tmp_path / "a.png")
    draw_study(study, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    image = imread(tmp_path / "a.png")[..., :3]
    for part in np.array_split(image, 2, axis=1):
        near = np.abs(part - np.array(to_rgb("#0072B2"))).max(-1) < 0.02
        assert near.sum() > 200  # the model, in both panels
    assert image.shape[1] > 1500


def test_the_verb_prints_draws_and_refuses(runs, capsys, tmp_path):
    from reason.cli.study import study as verb
    from reason.errors import ConfigError

    verb(None, json=True, runs=runs.root)
    out = capsys.readouterr()
    told = json.loads(out.out)
    assert told["schema"] == 1 and told["studies"][0]["answer"][0]["model"] == "latent" and out.err == ""
    verb(["latent"], plot=tmp_path / "s.png", runs=runs.root)
    out = capsys.readouterr()
    assert "Is it worth it?" in out.out and "Image:" in out.err and (tmp_path / "s.png").exists()
    with pytest.raises(ConfigError, match="has the wrong extension for the image"):
        verb(None, plot=tmp_path / "s.doc", runs=runs.root)
    with pytest.raises(ConfigError, match="Did you mean 'latent'"):
        verb(["latant"], runs=runs.root)


# --- claims and pages -------------------------------------------------------------------------------

PRL = {"latent.loss": "prl", "train_depth": 2}


def found_of(study, **test):
    (finding,) = judge([{"id": "c", "sets": ["s"], "test": test}], {"s": study})
    return finding


def test_a_claim_is_borne_out_contradicted_or_neither(study):
    better = found_of(study, kind="difference", a=PRL, b="base")
    assert better.verdict == "reproduced" and better.p < 0.05 and (better.n, better.seeds) == (300, 3)
    d = study.answer[0].to_base.difference
    assert f"{d.value:+.4f}" in better.measured
    worse = found_of(study, kind="difference", a={**PRL, "depth": 0}, b=PRL)
    assert worse.verdict == "contradicted"
    same = found_of(study, kind="difference", a={**PRL, "depth": 0}, b="base")
    assert same.verdict == "not distinguishable"


def test_claims_on_groups_luck_and_time(study):
    lost = found_of(study, kind="group", model=PRL, to="base", column="history", group="last", better=False)
    gained = found_of(study, kind="group", model=PRL, to="base", column="history", group="last", better=True)
    assert (lost.verdict, gained.verdict) == ("contradicted", "reproduced")
    contrasted = found_of(study, kind="contrast", model=PRL, to="least", column="target_count", more="first")
    assert contrasted.verdict == "not distinguishable" and "target_count" in contrasted.measured
    luck = found_of(study, kind="oracle", model=PRL)
    assert "from 3 base runs" in luck.measured and luck.p is not None
    assert found_of(study, kind="time", of="request", model=PRL, at_most=1.7).verdict == "reproduced"
    assert found_of(study, kind="time", of="request", model=PRL, at_most=1.5).verdict == "contradicted"
    said = found_of(study, kind="time", of="request", model=PRL, at_most=1.5).measured
    assert "a request takes 1.60 times as long as at depth 0" in said
    assert (
        found_of(study, kind="time", of="batch", model=PRL, at_most=1.5).verdict == "reproduced"
    )  # 1.4 times
    assert found_of(study, kind="time", of="batch", model=PRL, at_most=1.3).verdict == "contradicted"


def test_claims_on_what_was_trained(make):
    for seed in (0, 1, 2):
        for depth, gain in ((1, 0.0), (2, 0.9), (3, 0.1)):
            make.run(
                depths=(depth,),
                train_depth=depth,
                seed=seed,
                gain={depth: gain},
                settings={"latent.loss": "prl"},
            )
    (found,) = studies(make.root)
    assert found_of(found, kind="best_trained", model=PRL).verdict == "reproduced"
    assert found_of(found, kind="best_trained", model={**PRL, "train_depth": 3}).verdict == "contradicted"
    decline = found_of(found, kind="difference", a=PRL, b={**PRL, "train_depth": "deepest"})
    assert decline.verdict == "reproduced" and "trained at depth 3" in decline.measured


def test_a_claim_that_cannot_be_judged_says_why(study):
    told = judge(
        [
            {"id": "a", "sets": ["s", "gone"], "test": {"kind": "best_trained", "model": PRL}},
            {
                "id": "b",
                "sets": ["s"],
                "test": {"kind": "difference", "a": {"latent.loss": "erl"}, "b": "base"},
            },
            {
                "id": "c",
                "sets": ["s"],
                "test": {"kind": "difference", "a": PRL, "b": {**PRL, "train_depth": "deepest"}},
            },
            {"id": "d", "sets": ["s"], "test": {"kind": "oracle", "model": {**PRL, "depth": 7}}},
        ],
        {"s": study, "gone": "no runs with their rows are kept"},
    )
    assert {f.verdict for f in told} == {ABSENT}
    words = [
        "trained at depth 2 only",
        "no runs",
        "no model with latent.loss=erl",
        "greater depth than 2",
        "not evaluated at depth 7",
    ]
    assert all(word in f.measured for word, f in zip(words, told, strict=True))


def test_claims_judged_together_are_corrected_together(study):
    test = {"kind": "difference", "a": {**PRL, "depth": 1}, "b": "base"}
    alone = judge([{"id": "a", "sets": ["s"], "test": test}], {"s": study})[0].p
    many = judge([{"id": str(i), "sets": ["s"], "test": test} for i in range(4)], {"s": study})
    assert all(f.p == pytest.approx(min(1.0, 4 * alone)) for f in many)


@pytest.fixture
def pages(monkeypatch, tmp_path):
    file = Path(__file__).resolve().parents[2] / "docs" / "results" / "pages.py"
    monkeypatch.syspath_prepend(file.parent)  # as for any script: what lies beside it can be imported
    spec = importlib.util.spec_from_file_location("result_pages", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "DATA", tmp_path / "data")
    monkeypatch.setattr(module, "IMAGES", tmp_path / "images")
    return module


def numbers(value, path=""):
    """(path, number) of all that does not depend on resamples."""
    if isinstance(value, dict):
        for k, v in value.items():
            if k not in ("low", "high", "p", "p_holm"):
                yield from numbers(v, f"{path}.{k}")
    elif isinstance(value, list):
        for i, v in enumerate(value):
            yield from numbers(v, f"{path}.{i}")
    elif isinstance(value, int | float):
        yield path, value


def test_kept_rows_are_small_and_say_the_same(pages, runs, study):
    pages.keep("set", runs.root, [], bare=False)
    told, kept = as_dict(study), as_dict(studies(pages.DATA / "set")[0])
    for section in ("answer", "cohorts", "oracle", "policies", "deep"):  # but for what resampling draws
        assert dict(numbers(kept[section])) == pytest.approx(dict(numbers(told[section])))
    cells = kept["triangle"][1]["cells"]["2"]
    assert cells["overall"] == told["triangle"][1]["cells"]["2"]["overall"]
    assert cells["means"]["step_cosine"] == pytest.approx(0.9, abs=1e-3)

    def size(root):
        return sum(f.stat().st_size for f in Path(root).rglob("*.arrow"))

    assert size(pages.DATA / "set") < 0.6 * size(runs.root)
    (rows,) = (pages.DATA / "set").glob("latent-base-00000001-1/rows/test-depth0.arrow")
    assert "id" not in feather.read_table(rows).column_names


def test_a_page_is_filled_from_what_was_kept_alone(pages, runs, tmp_path, monkeypatch):
    pages.keep("set", runs.root, [], bare=False)
    monkeypatch.setattr(pages, "HERE", tmp_path)
    monkeypatch.setattr(pages, "PUBLISHED", tmp_path)
    (tmp_path / "paper.yaml").write_text(
        "source: S\nsets: [set]\nsaid: [{what: w, where: table 1, numbers: '+1 %'}]\n"
        "tables: [{title: T, columns: [base, A], metrics: [N, R], rows: {Yelp: [[0.02, 0.04], [0.03, 0.04]]}}]\n"
        "claims: [{id: deeper is better, paper: +1 %, test: {kind: difference, a: {latent.loss: prl}, b: base}}]\n"
    )
    part = {"value": 0.123, "low": 0.1, "high": 0.2}
    judged = {"experiment": "latent-prl", "depth": 2, "requests": 5, "agreement": {"attention": part}}
    judged |= {"deletion": {"attention": part, "occlusion": part}, "scrambled": {}}
    (pages.DATA / "set-faithfulness.json").write_text(json.dumps([judged]))
    kinds = [*SECTIONS, "study", "faithful"]
    blocks = [f"<!-- begin {k} set -->\nold\n<!-- end -->" for k in kinds]
    blocks += [f"<!-- begin {k} paper -->\nold\n<!-- end -->" for k in ("published", "claims")]
    page = tmp_path / "page.md"
    page.write_text("# P\n\n" + "\n\n".join(blocks) + "\n")
    pages.build()
    text = page.read_text()
    assert "old" not in text and str(tmp_path) not in text
    assert "| Yelp | .0200 / .0400 | .0300 / .0400 | +25.0% |" in text
    assert "| latent-prl, 2 steps | attention | +0.12 [+0.10, +0.20] | +0.12 [+0.10, +0.20] |  |" in text
    assert "|  | occlusion |  | +0.12" in text
    assert "| deeper is better | +1 % | set | vs. the base: +" in text and "**reproduced**" in text
    assert (tmp_path / "images" / "set-study.png").exists() and "cos mean_depth=1" in text
    pages.build()
    assert page.read_text() == text


def test_the_published_file_of_the_repository_is_whole(pages):
    paper = pages._published("latent")
    assert pages.published_block("latent").count("| Yelp |") == 2
    gains = [np.array(rest) / np.array(base) - 1 for base, *rest in paper["tables"][0]["rows"].values()]
    erl, prl = np.mean([g[0] for g in gains]), np.mean([g[1] for g in gains])
    assert (round(100 * erl, 2), round(100 * prl, 2)) == (6.76, 8.21)  # as recomputed in the specification
    assert all(set(c) <= {"id", "paper", "test", "sets"} for c in paper["claims"])
    assert len({c["id"] for c in paper["claims"]}) == len(paper["claims"])
