"""Depth on demand: an early exit is a depth that was picked, thresholds mean what they say, budgets are kept."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from reason.backbones.config import SasrecConfig
from reason.backbones.encoder import SequenceEncoder
from reason.engine.config import resolve
from reason.engine.parallel import World
from reason.engine.session import Session
from reason.errors import ConfigError
from reason.methods.latent import objective
from reason.methods.latent.calibrate import Calibrator, affordable, fit_router
from reason.methods.latent.config import LatentConfig
from reason.methods.latent.policy import DepthPolicy, Measure, PolicyTest, rising
from reason.methods.latent.reasoning import ItemEmbeddings, Reasoning, run_steps
from reason.methods.latent.recommender import Recommender
from reason.metrics.calibration import expected_calibration_error, steps_taken, threshold_for_mean_steps

N, K, B = 40, 4, 33
TESTS = ("cos", "kl", "margin", "overlap", "entropy")


@pytest.fixture(params=["prl", "erl"])
def config(request):
    return LatentConfig(loss=request.param)


@pytest.fixture
def model():
    torch.manual_seed(3)
    sizes = SasrecConfig(hidden=16, layers=2, ffn=24, max_length=12, dropout=0.0)
    found = SequenceEncoder(sizes, num_items=N, steps=K).eval()
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "norm" not in name:
                parameter.mul_(15)
    return found


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(5)
    items = torch.randint(0, N, (B, 12), generator=generator)
    length = torch.randint(1, 13, (B,), generator=generator)
    items[torch.arange(12) >= length[:, None]] = N
    return items, length


def start(config, model, batch, depth=K):
    return Reasoning(config, model, ItemEmbeddings.of(model), *batch, depth)


def everything(config, model, batch):
    """(B, K + 1, d): the state that would answer after every step, by the way that training runs."""
    items, length = batch
    with torch.no_grad():
        states, _ = model.reason(items)
    states = states[torch.arange(len(items)), length - 1]  # (B, K + 1, d)
    mean = config.loss == "erl"
    return torch.stack(
        [states[:, : k + 1].mean(1) if mean else states[:, k] for k in range(K + 1)], 1
    ), states


class Given:
    """A stop test that was told the depth of every row."""

    def __init__(self, depth):
        self.depth = depth

    def __call__(self, run):
        return self.depth <= run.k

    def keep(self, rows):
        self.depth = self.depth[rows]


@pytest.mark.parametrize("compact", [0.0, 0.5, 0.75, 1.0])
@torch.no_grad()
def test_an_early_exit_equals_running_all_steps_and_picking(config, model, batch, compact):
    depth = torch.arange(B) % (K + 1)
    found = run_steps(start(config, model, batch), Given(depth), compact=compact, with_cosine=True)
    reads, states = everything(config, model, batch)
    assert torch.equal(found.depth, depth)
    torch.testing.assert_close(found.state, reads[torch.arange(B), depth], atol=1e-5, rtol=0)
    for row, k in enumerate(depth.tolist()):
        expected = (
            torch.cosine_similarity(states[row, k], states[row, k - 1], dim=0) if k else torch.tensor(1.0)
        )
        torch.testing.assert_close(found.step_cosine[row], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", TESTS)
@torch.no_grad()
def test_a_row_alone_stops_where_it_stops_in_a_batch(config, model, batch, name):
    policy = fitted(config, model, batch, name, 2.0)
    whole = run_steps(start(config, model, batch), PolicyTest(policy), compact=0.75)
    assert len(whole.depth.unique()) > 1
    items, length = batch
    for row in range(B):
        alone = run_steps(
            start(config, model, (items[row : row + 1, : length[row]], length[row : row + 1])),
            PolicyTest(policy),
        )
        assert alone.depth.tolist() == [int(whole.depth[row])]
        torch.testing.assert_close(alone.state[0], whole.state[row], atol=1e-5, rtol=0)


def measures(config, model, batch, name, least=1, tau=None):
    policy = DepthPolicy(name, 0.0, least, tau or [0.3 + 0.1 * k for k in range(K + 1)], 20)
    run, measure = start(config, model, batch), Measure(policy)
    columns = [torch.full((B,), -torch.inf)] * least
    for k in range(K):
        if k >= least:
            columns.append(measure(run))
        run.step()
    return policy, torch.stack(columns, 1)


def fitted(config, model, batch, name, target):
    from dataclasses import replace

    policy, found = measures(config, model, batch, name)
    return replace(policy, threshold=rising(name, threshold_for_mean_steps(found, target, 1)))


@pytest.mark.parametrize("name", TESTS)
@torch.no_grad()
def test_thresholds_at_their_extremes_and_in_between(config, model, batch, name):
    from dataclasses import replace

    policy, found = measures(config, model, batch, name)
    spent = []
    values = found[:, 1:].flatten().unique()
    between = (values[:-1] + values[1:]) / 2  # on a value itself, the size of the batch could decide
    for level in [-1e9, *between.tolist()[::7], 1e9]:
        test = PolicyTest(replace(policy, threshold=rising(name, level)))
        output = run_steps(start(config, model, batch), test)
        assert torch.equal(output.depth, steps_taken(found, level, 1)), "what is fitted is what happens"
        spent.append(float(output.depth.double().mean()))
    assert spent[0] == 1.0 and spent[-1] == K, "always stopping is min_depth, never stopping is all steps"
    assert spent == sorted(spent), "mean depth never falls as the threshold rises"


@pytest.mark.parametrize("name", TESTS)
@torch.no_grad()
def test_measures_against_their_definitions(config, model, batch, name):
    """On a shortlist that holds the whole catalogue nothing is left for the bucket, and all is exact."""
    from dataclasses import replace

    tau = [0.3 + 0.1 * k for k in range(K + 1)]
    policy, _ = measures(config, model, batch, name, tau=tau)
    run, measure = start(config, model, batch), Measure(replace(policy, shortlist=N))
    reads, states = everything(config, model, batch)
    scores = (reads @ model.item_vectors().T).double()  # (B, K + 1, N)
    p = torch.stack([(scores[:, k] / tau[k]).softmax(-1) for k in range(K + 1)], 1)
    for k in range(1, K):
        run.step()
        best = p[:, k].topk(2).values
        top = [set(scores[:, j].topk(10).indices[0].tolist()) for j in (k - 1, k)]
        expected = {
            "cos": torch.cosine_similarity(states[:, k], states[:, k - 1]).double(),
            "kl": -(p[:, k - 1] * (p[:, k - 1].log() - p[:, k].log())).sum(-1),
            "margin": best[:, 0] - best[:, 1],
            "entropy": (p[:, k] * p[:, k].log()).sum(-1) / np.log(N + 1),
        }
        found = measure(run).double()
        if name == "overlap":
            assert float(found[0]) == pytest.approx(len(top[0] & top[1]) / 10)
        else:
            torch.testing.assert_close(found, expected[name], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_the_bucket_holds_what_the_shortlist_leaves_out(config, model, batch):
    policy, _ = measures(config, model, batch, "entropy")
    run = start(config, model, batch)
    measure = Measure(policy)  # twenty items of forty
    log_p = measure.log_p(run)
    scores = run.read() @ model.item_vectors().T / policy.temperature[0]
    best = scores.softmax(-1).topk(20).values
    found = log_p.exp()[:, :20].sort(descending=True).values
    torch.testing.assert_close(found, best, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(log_p.exp()[:, 20], 1 - best.sum(-1), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_clock_stops_everyone(config, model, batch):
    found = run_steps(
        start(config, model, batch), Given(torch.arange(B) % (K + 1)), out_of_time=lambda k: k >= 2
    )
    assert found.out_of_time and found.depth.tolist() == [min(row % (K + 1), 2) for row in range(B)]


def test_router_learns_who_gains_and_is_silent_without_a_reason():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 2))
    router = fit_router(["history", "norm"], x, np.where(x[:, 0] > 0, 0.3, -0.3))
    assert router.weight[0] > 1 and abs(router.weight[1]) < 0.3
    assert fit_router(["history"], x[:, :1], np.zeros(2000)).weight == [0.0]
    assert fit_router(["history"], x[:, :1], np.full(2000, 0.1)).weight == [0.0]


@pytest.mark.parametrize(
    ("name", "depth", "cap", "says"),
    [
        ("cos", 2, 4, "the cosine of the last two states reached 0.25 after step 2"),
        ("kl", 3, 4, "the divergence from the step before fell to 0.25 after step 3"),
        (
            "margin",
            4,
            4,
            "the margin of the first item over the second never reached 0.25: all 4 steps were taken",
        ),
        ("entropy", 4, 4, "the entropy of the answers never fell to 0.25: all 4 steps were taken"),
        ("overlap", 1, 1, "the stop test is asked only after 1 step"),
        ("router", 0, 4, "the router expected no gain from depth"),
        ("router", 4, 4, "the router expected a gain from depth"),
    ],
)
def test_the_reason_for_stopping_in_words(name, depth, cap, says):
    assert DepthPolicy(name, 0.25, 1, [1.0] * 5, 20).reason(depth, cap) == says


# --- in a run ---------------------------------------------------------------------------------------

WORDS = [
    "dataset=synthetic-interactions", "dataset.users=120", "dataset.items=60", "dataset.categories=4",
    "dataset.mean_length=9", "backbone.hidden=16", "backbone.ffn=16", "backbone.max_length=6",
    "eval.batch_size=16", "depth=3", "latent.shortlist=20",
]  # fmt: skip


def begin(tmp_path, *words):
    tmp_path.mkdir(exist_ok=True)
    session = Session.begin(resolve("latent", [*WORDS, *words]), World(0, 1, torch.device("cpu")), tmp_path)
    torch.manual_seed(7)
    with torch.no_grad():
        for name, parameter in session.network.named_parameters():
            if "norm" not in name:
                parameter.mul_(12)
    session.network.eval()
    return session


def means_of_all_thresholds(s, name):
    """Mean depths on validation that the thresholds of a stop test can have, found by trying each of them."""
    cases, least, depth = s.ctx.data.fit, 1, 3
    tau = s.ctx.calibration["temperatures"]
    rows = []  # the measures of each case after steps 1 and 2
    for a in range(0, len(cases), 16):  # in the batches that thresholds are fitted in
        batch = cases.batch(np.arange(a, min(a + 16, len(cases))))
        run = start(s.plan.config.latent, s.network, (batch["items"], batch["length"]), depth)
        measure, columns = Measure(DepthPolicy(name, 0.0, least, tau, 20)), []
        for _ in range(least, depth):
            run.step()
            columns.append(measure(run))
        rows += torch.stack(columns, 1).tolist()
    values = sorted({v for row in rows for v in row})
    means = []
    for threshold in [*values, values[-1] + 1]:
        taken = [next((k for k, v in enumerate(row, least) if v >= threshold), depth) for row in rows]
        means.append(float(np.mean(taken)))
    return means


@pytest.mark.parametrize("name", [*TESTS, "router"])
@torch.no_grad()
def test_a_policy_is_fitted_kept_and_used(tmp_path, name):
    s = begin(tmp_path, f"latent.policy={name}", "latent.mean_depth=1.8", "dataset.fit=0.8")
    fitted = s.method.calibrate(s.ctx, s.network, s.ctx.data.fit)
    assert json.loads(json.dumps(fitted, allow_nan=False)) == fitted, "it is JSON data"
    assert DepthPolicy.from_json(fitted["policy"]).to_json() == fitted["policy"]
    s.ctx.calibration = fitted
    found = s.method.evaluate(s.ctx, s.network, s.ctx.data.fit, 3)
    used = found.rows.column("depth_used").to_numpy()
    if name != "router":  # the router's share is chosen on the odd cases alone
        assert used.mean() == pytest.approx(fitted["valid_mean_depth"])
        spent = means_of_all_thresholds(s, name)
        best = min(abs(mean - 1.8) for mean in spent)
        assert abs(fitted["valid_mean_depth"] - 1.8) == pytest.approx(best, abs=1e-6), (
            "no threshold is nearer"
        )
        assert max(spent) - min(spent) > 1.5, "there was a choice"
    else:
        one = 3 / len(
            used[1::2]
        )  # two cases that differ by rounding alone may change sides with the shape of a batch
        assert set(used) == {0.0, 3.0}
        assert used[1::2].mean() == pytest.approx(fitted["valid_mean_depth"], abs=one + 1e-9)
    assert found.cost["steps"] == used.sum()
    fixed = begin(tmp_path / "fixed", "dataset.fit=0.8")
    by_depth = [fixed.method.evaluate(fixed.ctx, fixed.network, fixed.ctx.data.fit, k) for k in range(4)]
    ranks = np.stack([e.rows.column("rank").to_numpy() for e in by_depth])
    np.testing.assert_array_equal(
        found.rows.column("rank").to_numpy(), ranks[used.astype(int), np.arange(len(used))]
    )
    user = str(s.ctx.data.test.id[0])
    (reply,) = s.method.predict(s.ctx, s.network, [{"user": user}], 3)
    assert reply["depth"] in range(4) and reply["stopped"]
    (deep,) = s.method.predict(s.ctx, s.network, [{"user": user, "depth": 3}], 3)
    assert deep["depth"] == 3 and "stopped" not in deep, "a request may ask for its own depth"


def test_without_calibration_the_depth_is_fixed(tmp_path):
    """Validation while training must not depend on a policy: one model serves every policy of a sweep."""
    s = begin(tmp_path, "latent.policy=cos")
    used = s.method.evaluate(s.ctx, s.network, s.ctx.data.valid, 2).rows.column("depth_used").to_numpy()
    assert set(used) == {2.0}


@pytest.mark.parametrize("name", ["kl", "router"])
def test_nothing_is_fitted_on_the_test_split(tmp_path, name):
    s = begin(tmp_path, f"latent.policy={name}")
    fitted = s.method.calibrate(s.ctx, s.network, s.ctx.data.fit)
    s.ctx.data.test.target[:] = 0
    s.ctx.data.test.start[:] = 0
    assert s.method.calibrate(s.ctx, s.network, s.ctx.data.fit) == fitted


def test_judging_draws_nothing_at_random(tmp_path):
    """No noise, no second branch, no dropout: the contrast belongs to training alone."""
    s = begin(tmp_path, "latent.policy=router", "latent.loss=prl", "latent.noise=10", "backbone.dropout=0.5")
    before = torch.random.get_rng_state()
    fitted = s.method.calibrate(s.ctx, s.network, s.ctx.data.fit)
    s.ctx.calibration = fitted
    first, second = (s.method.evaluate(s.ctx, s.network, s.ctx.data.test, 3).rows for _ in range(2))
    assert first.equals(second) and torch.equal(torch.random.get_rng_state(), before)
    assert s.method.calibrate(s.ctx, s.network, s.ctx.data.fit) == fitted


def test_policies_share_a_model_and_differ_as_results():
    plans = [
        resolve("latent", [*WORDS, *words]) for words in ([], ["latent.policy=cos"], ["latent.policy=kl"])
    ]
    train, whole = zip(*(plan.hashes("digest") for plan in plans), strict=True)
    assert len(set(train)) == 1 and len(set(whole)) == 3
    assert plans[1].depths == [3]


@torch.no_grad()
def test_router_sees_nothing_of_the_answer(tmp_path):
    """It is never handed a target, and has no word to ask for one."""
    s = begin(tmp_path, "latent.policy=router", "dataset.fit=0.8")
    s.ctx.calibration = s.method.calibrate(s.ctx, s.network, s.ctx.data.fit)
    recommend = Recommender(s.plan.config, s.ctx, s.network, s.ctx.data.catalogue)
    batch = s.ctx.data.test.batch(np.arange(20))
    assert len(recommend(batch["items"], batch["length"], 3).output.depth.unique()) == 2
    with pytest.raises(ConfigError, match="target_popularity"):
        resolve("latent", ["latent.policy=router", "latent.features=history,target_popularity"])


@pytest.mark.parametrize("name", [*TESTS, "router"])
def test_nothing_to_decide_is_no_reason_to_fail(tmp_path, name):
    s = begin(tmp_path, f"latent.policy={name}", "depth=0", "train_depth=0")
    s.ctx.calibration = s.method.calibrate(s.ctx, s.network, s.ctx.data.fit)
    assert "decides nothing" in s.ctx.calibration["notes"][0]
    used = s.method.evaluate(s.ctx, s.network, s.ctx.data.test, 0).rows.column("depth_used").to_numpy()
    assert set(used) == {0.0}


@pytest.mark.parametrize("name", ["kl", "margin", "overlap", "entropy"])
@torch.no_grad()
def test_what_is_no_candidate_does_not_count(config, model, batch, name):
    """Fewer candidates than the shortlist holds: the same measures as over the candidates alone."""
    from dataclasses import replace

    exclude = torch.rand(B, N, generator=torch.Generator().manual_seed(2)) < 0.7  # a dozen are left of forty
    policy = replace(measures(config, model, batch, name)[0], shortlist=30)
    run, measure = start(config, model, batch), Measure(policy, exclude=exclude)
    reads, _ = everything(config, model, batch)
    scores = (reads @ model.item_vectors().T).double().masked_fill(exclude[:, None], -torch.inf)
    run.step()
    found = measure(run).double()
    p = [(scores[:, k] / policy.temperature[k]).softmax(-1) for k in (0, 1)]
    log = [q.clamp_min(1e-300).log() for q in p]
    best = p[1].topk(2).values
    expected = {
        "kl": -(p[0] * (log[0] - log[1])).sum(-1),
        "margin": best[:, 0] - best[:, 1],
        "entropy": (p[1] * log[1]).sum(-1) / np.log(31),
    }
    if name == "overlap":
        enough = (~exclude).sum(1) >= 10
        tops = [scores[:, k].topk(10).indices for k in (0, 1)]
        for row in enough.nonzero().squeeze(1).tolist():
            same = len(set(tops[0][row].tolist()) & set(tops[1][row].tolist()))
            assert float(found[row]) == pytest.approx(same / 10)
    else:
        torch.testing.assert_close(found, expected[name], atol=1e-4, rtol=1e-3)


def test_temperatures_are_fitted_over_the_candidates(tmp_path):
    s = begin(tmp_path, "dataset.candidates=unseen")
    cases, embeddings = s.ctx.data.valid, ItemEmbeddings.of(s.network)
    batch = cases.batch(np.arange(len(cases)))
    with torch.no_grad():
        counts = s.ctx.data.catalogue.train_counts
        found, errors = Calibrator(s.plan.config, s.ctx, s.network, cases, counts).temperatures()
        scores = s.network.start(batch["items"], batch["length"]).state @ embeddings.columns
    exclude = torch.zeros(len(cases), len(embeddings), dtype=torch.bool)
    exclude[cases.seen(np.arange(len(cases)))] = True
    exclude[torch.arange(len(cases)), batch["target"]] = False
    scores = scores.masked_fill(exclude, -torch.inf)
    nll = [
        float(torch.nn.functional.cross_entropy(scores / t, batch["target"]))
        for t in (found[0] * 0.9, found[0], found[0] * 1.1)
    ]
    assert min(nll) == nll[1]
    trained = objective.temperatures(s.plan.config.latent, 3)
    for kind, t in (("uncalibrated", trained[0]), ("calibrated", found[0])):
        confidence, first = (scores.double() / t).softmax(-1).max(-1)
        for bins in ("equal_width", "equal_mass"):
            by_hand = expected_calibration_error(
                confidence.numpy(), (first == batch["target"]).numpy(), equal_mass=bins == "equal_mass"
            )
            assert errors[0][kind][bins] == pytest.approx(by_hand, abs=1e-6)
    assert (
        len(errors) == 4 and errors[0]["calibrated"]["equal_mass"] < errors[0]["uncalibrated"]["equal_mass"]
    )


@pytest.mark.parametrize("name", ["kl", "router"])
def test_calibration_keeps_to_the_limit(tmp_path, name):
    """With ``eval.limit`` as many cases as it says, spread evenly, and no others are looked at."""
    s = begin(tmp_path / "limited", f"latent.policy={name}", "eval.limit=30")
    valid = s.ctx.data.valid
    chosen = np.round(np.linspace(0, len(valid) - 1, 30)).astype(int)
    looked, plain = set(), type(valid).batch

    def watched(cases, index):
        looked.update(cases.id[index].tolist())
        return plain(cases, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(valid), "batch", watched)
        fitted = s.method.calibrate(s.ctx, s.network, valid)
    assert looked == set(valid.id[chosen].tolist()) and len(looked) == 30
    whole = begin(tmp_path / "whole", f"latent.policy={name}")
    assert whole.method.calibrate(whole.ctx, whole.network, valid.take(chosen)) == fitted
    assert whole.method.calibrate(whole.ctx, whole.network, valid) != fitted


def test_a_budget_that_is_missed_is_told(tmp_path):
    s = begin(tmp_path, "latent.policy=overlap", "latent.mean_depth=1.01")
    fitted = s.method.calibrate(s.ctx, s.network, s.ctx.data.fit)
    missed = abs(fitted["valid_mean_depth"] - 1.01) > 0.02
    assert bool(fitted["notes"]) == missed and (not missed or "was asked for" in fitted["notes"][0])


@pytest.mark.parametrize("few", ["dataset.users=24", "eval.limit=12"])
def test_a_router_needs_cases(tmp_path, few):
    s = begin(tmp_path, "latent.policy=router", few)
    held = min(len(s.ctx.data.fit), 12)
    with pytest.raises(ConfigError, match=f"there are {held}"):
        s.method.check(s.ctx, s.network)


def test_a_deadline_caps_the_depth(tmp_path):
    assert affordable([2.0, 2.5, 3.0, 3.5], 3.1) == 2
    with pytest.raises(ConfigError, match="shorter than an answer without any latent step") as error:
        affordable([2.0, 2.5], 1.0)
    assert "latent.deadline_ms=2.4" in error.value.hint
    s = begin(tmp_path, "latent.deadline_ms=1e-6")
    with pytest.raises(ConfigError, match="shorter"):
        s.method.check(s.ctx, s.network)
    s = begin(tmp_path, "latent.deadline_ms=1e6")
    s.method.check(s.ctx, s.network)
    s.ctx.calibration = s.method.calibrate(s.ctx, s.network, s.ctx.data.fit)
    assert s.ctx.calibration["depth"] == 3 and len(s.ctx.calibration["times_ms"]) == 4
    user = {"user": str(s.ctx.data.test.id[0])}
    assert s.method.predict(s.ctx, s.network, [user], 3)[0]["depth"] == 3
    s.ctx.calibration["times_ms"] = [1.0, 1.0, 1e9, 2e9]  # a second step would never be in time
    (reply,) = s.method.predict(s.ctx, s.network, [user], 3)
    assert reply["depth"] == 1 and "deadline" in reply["stopped"]
    two = begin(tmp_path / "two", "latent.deadline_ms=1e6", "dataset.users=2")
    assert len(two.method.calibrate(two.ctx, two.network, two.ctx.data.fit)["times_ms"]) == 4
    s.ctx.calibration |= {"depth": 2, "times_ms": [0.0, 0.0, 0.0, 0.0]}
    (reply,) = s.method.predict(s.ctx, s.network, [user], 3)
    assert reply["depth"] == 2 and reply["stopped"] == "the deadline allows 2 of 3 steps"


@pytest.mark.parametrize(
    "words, says",
    [
        (["latent.policy=cos", "latent.threshold=1.5"], "never"),
        (["latent.policy=cos", "latent.threshold=-1"], "always"),
        (["latent.policy=kl", "latent.threshold=0"], "never"),
        (["latent.policy=margin", "latent.threshold=1"], "never"),
        (["latent.policy=overlap", "latent.threshold=1.1"], "never"),
        (["latent.policy=entropy", "latent.threshold=0"], "never"),
        (["latent.policy=entropy", "latent.threshold=2"], "always"),
        (["latent.policy=router", "latent.threshold=0.1"], "mean_depth"),
        (["latent.policy=cos", "latent.mean_depth=5"], "cannot be spent"),
        (["latent.policy=cos", "latent.mean_depth=0.5"], "1 to 2 steps"),
        (["latent.policy=cos", "latent.mean_depth=1", "latent.threshold=0.9"], "leave one out"),
        (["latent.mean_depth=1"], "does not read it"),
        (["latent.policy=cosine"], "not one of the choices"),
        (["latent.features="], "sees nothing"),
        (["latent.shortlist=3"], "shortlist"),
        (["latent.deadline_ms=-1"], "deadline"),
    ],
)
def test_policies_that_mean_nothing_are_refused_before_anything_is_loaded(words, says):
    with pytest.raises(ConfigError) as error:
        resolve("latent", words)
    assert says in f"{error.value.message} {error.value.hint}"


def test_thresholds_that_people_write_are_used_as_written(tmp_path):
    s = begin(tmp_path, "latent.policy=kl", "latent.threshold=0.25")
    fitted = s.method.calibrate(s.ctx, s.network, s.ctx.data.fit)
    assert fitted["policy"]["threshold"] == pytest.approx(0.25)
    assert SimpleNamespace(**fitted["policy"]).least == 1
