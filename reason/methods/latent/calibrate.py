"""What is fitted to a trained model, on validation and nothing else: temperatures, thresholds, a router.

The router's weights are fitted on one half of the cases and its share of requests on the other, so that
it cannot spend more than it was given because it remembers the first half.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from reason.errors import ConfigError
from reason.methods.base import Context
from reason.methods.latent.candidates import Catalogue, excluded, seen
from reason.methods.latent.policy import (
    LESS_IS_SURER,
    OUT,
    Measure,
    Policy,
    Router,
    Stop,
    depths,
    features,
    solve,
)
from reason.methods.latent.serve import Reasoning, serve
from reason.metrics.ranking import target_rank

if TYPE_CHECKING:
    from reason.backbones.encoder import SequenceEncoder

MOST = 10_000  # validation cases that thresholds are fitted on, spread evenly
MOST_FOR_TEMPERATURE = 500  # a temperature is one number
NEVER = 1e30  # a bar that nothing reaches
TIMED = 40  # requests that are timed for a deadline, after a few that are not


def fit(config: Any, ctx: Context, model: SequenceEncoder, cases: Any) -> dict[str, Any]:
    """Everything that answering with ``latent.policy`` needs, as JSON data.

    Keys: ``temperatures`` (K + 1). With a policy or a deadline: ``depth``, the most steps a request takes. With
    a policy: ``policy`` and ``valid_mean_depth``. With a deadline: ``times_ms`` by depth, the policy's own
    tests included. ``notes``: what people should know.
    """
    latent = config.latent
    with torch.inference_mode():
        catalogue = Catalogue.of(model)
        tau = temperatures(config, ctx, model, catalogue, cases)
        found: dict[str, Any] = {"temperatures": tau, "notes": []}
        depth, policy, spent = config.depth, None, 0.0
        if latent.policy != "fixed":
            policy, spent = _policy(config, ctx, model, catalogue, cases, depth, tau)
        if latent.deadline_ms:
            found["times_ms"] = times_ms(config, ctx, model, catalogue, cases, depth, policy)
            if found["times_ms"][0] > latent.deadline_ms:  # a finished training is not thrown away for it
                depth = 0
                found["notes"].append(
                    f"the deadline of {latent.deadline_ms:g} ms is missed even without a step: "
                    f"{found['times_ms'][0]:.3g} ms here (95th percentile)."
                )
            else:
                depth = affordable(found["times_ms"], latent.deadline_ms)
            if policy is not None and depth < config.depth:
                policy, spent = _policy(config, ctx, model, catalogue, cases, depth, tau)
        if policy is not None or latent.deadline_ms:
            found["depth"] = depth
        if policy is not None:
            found |= {"policy": policy.to_json(), "valid_mean_depth": spent}
            found["notes"] += _told(latent, policy, depth, spent)
    return found


def _told(latent: Any, policy: Policy, depth: int, spent: float) -> list[str]:
    """A budget that is not met is not passed over in silence."""
    if policy.least >= depth:
        return [
            f"{policy.name} decides nothing: all requests take {depth} steps before it is asked, or may take no more."
        ]
    if latent.mean_depth is not None and abs(spent - latent.mean_depth) > 0.02:
        return [
            f"{policy.name} spends {spent:.2f} steps on validation where {latent.mean_depth:g} were asked for: "
            "its measure has too few levels, or the deadline affords no more."
        ]
    return []


# --- the deadline -----------------------------------------------------------------------------------


def times_ms(
    config: Any, ctx: Context, model: SequenceEncoder, catalogue: Catalogue, cases: Any, depth: int, policy: Policy | None = None
) -> list[float]:  # fmt: skip
    """The 95th percentile of the time of one request at depth 0..``depth``, in ms.

    Ranking and the tests of ``policy`` are included, as if they never stopped anyone.
    """
    chosen = np.random.default_rng(config.seed).permutation(len(cases))[:TIMED]
    warm = chosen[:5]
    patient = (
        None
        if policy is None
        else replace(policy, threshold=-NEVER if policy.name in LESS_IS_SURER else NEVER)
    )
    counts = log_counts(ctx)
    spent: list[list[float]] = [[] for _ in range(depth + 1)]
    for i in [*warm, *chosen]:
        for batch, exclude in _batches_with_exclusion(config, ctx, cases, 0, np.array([i])):
            for k in range(depth + 1):
                began = ctx.meter.now()
                run = _start(config, ctx, model, catalogue, batch, k)
                scores = catalogue.scores(
                    serve(run, None if patient is None else Stop(patient, counts, exclude)).state
                )
                if exclude is not None:
                    scores = scores.masked_fill(exclude, OUT)
                scores.topk(min(10, scores.shape[1]))
                spent[k].append(1e3 * (ctx.meter.now() - began))
    return [float(np.percentile(s[len(warm) :], 95)) for s in spent]


def affordable(times: list[float], deadline_ms: float) -> int:
    """The most steps that end before the deadline. times: ms at depth 0, 1, ...

    Raises:
        ConfigError: none does.
    """
    within = [k for k, t in enumerate(times) if t <= deadline_ms]
    if not within:
        raise ConfigError(
            f"latent.deadline_ms={deadline_ms:g} is shorter than an answer without any latent step: "
            f"encoding and ranking take {times[0]:.3g} ms on this machine (95th percentile).",
            f"Allow at least latent.deadline_ms={1.2 * times[0]:.2g}, or choose a smaller backbone.",
        )
    return max(within)


# --- temperatures -----------------------------------------------------------------------------------


def temperatures(
    config: Any, ctx: Context, model: SequenceEncoder, catalogue: Catalogue, cases: Any
) -> list[float]:
    """For step 0..K the temperature at which the scores predict validation targets best (least NLL).

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, with one temperature a step.
    """
    states, target, barred = [], [], []
    for batch, exclude in _batches_with_exclusion(config, ctx, cases, MOST_FOR_TEMPERATURE):
        run = _start(config, ctx, model, catalogue, batch, model.steps)
        reads = [run.read()]
        for _ in range(model.steps):
            run.step()
            reads.append(run.read())
        states.append(torch.stack(reads, 1))
        target.append(batch["target"].to(ctx.device))
        if exclude is not None:  # the target stays a candidate, whatever was seen
            barred.append(exclude.scatter(1, target[-1][:, None], False))
    state, label = torch.cat(states), torch.cat(target)  # (n, K + 1, d), (n,)
    out = torch.cat(barred) if barred else torch.zeros((), dtype=torch.bool, device=state.device)
    return [
        best_temperature(catalogue.scores(state[:, k]).masked_fill(out, OUT), label)
        for k in range(model.steps + 1)
    ]


def best_temperature(scores: Tensor, label: Tensor) -> float:
    """argmin over t of the mean NLL of ``softmax(scores / t)``: bisection, for it is convex in 1 / t.

    scores: (n, N), ``OUT`` where an item is no candidate; label: (n,). Kept between 1e-3 and 1e3 times the
    scores' own spread.
    """
    own = scores.gather(1, label[:, None]).squeeze(1)
    spread = float(scores[scores > OUT].std()) or 1.0
    low, high = 1e-3 / spread, 1e3 / spread  # of 1 / t
    for _ in range(20):  # to a part in 10^5 of 1 / t
        beta = (low * high) ** 0.5
        expected = ((beta * scores).softmax(-1) * scores).sum(-1)
        if float((expected - own).mean()) > 0:  # the slope of the NLL
            high = beta
        else:
            low = beta
    return (low * high) ** -0.5


# --- thresholds -------------------------------------------------------------------------------------


def _policy(
    config: Any, ctx: Context, model: SequenceEncoder, catalogue: Catalogue, cases: Any, depth: int, tau: list[float]
) -> tuple[Policy, float]:  # fmt: skip
    """The policy, and the steps it spends on validation on average."""
    latent = config.latent
    least = latent.first_test(depth)
    target = latent.mean_depth if latent.mean_depth is not None else (least + depth) / 2
    target = min(max(target, least), depth)
    policy = Policy(latent.policy, 0.0, least, tau, latent.shortlist)
    if latent.policy == "router":
        return _routed(config, ctx, model, catalogue, cases, policy, depth, target)
    found = _measured(config, ctx, model, catalogue, cases, policy, depth)  # (n, K)
    bar = solve(found, target, least)
    if latent.threshold is not None:
        bar = -latent.threshold if policy.name in LESS_IS_SURER else latent.threshold
    threshold = -bar if policy.name in LESS_IS_SURER else bar
    spent = float(depths(found, bar, least).float().mean())
    return Policy(policy.name, threshold, least, tau, latent.shortlist), spent


def _measured(
    config: Any,
    ctx: Context,
    model: SequenceEncoder,
    catalogue: Catalogue,
    cases: Any,
    policy: Policy,
    depth: int,
) -> Tensor:
    """(n, depth): the measure of every case after step 0..depth-1, below the least step -inf."""
    rows = []
    for batch, exclude in _batches_with_exclusion(config, ctx, cases, MOST):
        run = _start(config, ctx, model, catalogue, batch, depth)
        measure = Measure(policy, exclude=exclude)
        columns = []
        for k in range(depth):
            columns.append(
                measure(run) if k >= policy.least else run.state.new_full((len(run.state),), -torch.inf)
            )
            if k + 1 < depth:
                run.step()
        rows.append(torch.stack(columns, 1) if columns else run.state.new_zeros(len(run.state), 0))
    return torch.cat(rows).float()


def _routed(
    config: Any, ctx: Context, model: SequenceEncoder, catalogue: Catalogue, cases: Any, policy: Policy, depth: int, target: float
) -> tuple[Policy, float]:  # fmt: skip
    """A router whose weights come from the even cases and whose threshold from the odd ones."""
    names = config.latent.feature_names
    xs, gains, counts = [], [], log_counts(ctx)
    for batch, exclude in _batches_with_exclusion(config, ctx, cases, MOST):
        run = _start(config, ctx, model, catalogue, batch, depth)
        xs.append(features(names, Measure(policy, counts, exclude), run))
        label = batch["target"].to(ctx.device)
        before = target_rank(catalogue.scores(run.read()), label, exclude)
        for _ in range(depth):
            run.step()
        after = target_rank(catalogue.scores(run.read()), label, exclude)
        gains.append(_ndcg(after) - _ndcg(before))
    x, gain = torch.cat(xs).double().cpu().numpy(), torch.cat(gains).double().cpu().numpy()
    first = np.arange(len(x)) % 2 == 0
    router = fit_router(names, x[first], gain[first])
    standard = (x[~first] - np.array(router.mean)) / np.array(router.scale)
    score = standard @ np.array(router.weight) + router.bias
    bar = solve(torch.from_numpy(-score)[:, None], target / max(depth, 1), 0)
    spent = float(depths(torch.from_numpy(-score)[:, None], bar, 0).double().mean()) * depth
    return Policy("router", bar, 0, policy.temperature, policy.shortlist, router), spent


def fit_router(names: list[str], x: np.ndarray, gain: np.ndarray) -> Router:
    """Logistic regression of whether depth gains or loses, each case weighted by how much; without an
    opinion (weights 0) where nothing is gained or lost, or all of it is one or the other.

    x: (n, F), gain: (n,), change of the accuracy from no step to all of them.
    """
    mean, scale = x.mean(0), np.maximum(x.std(0), 1e-6)
    told = gain != 0
    weight, bias = np.zeros(x.shape[1]), 0.0
    if len(np.unique(gain[told] > 0)) == 2:
        from sklearn.linear_model import LogisticRegression

        much = np.abs(gain[told])
        model = LogisticRegression(C=0.1, max_iter=1000)
        model.fit((x[told] - mean) / scale, gain[told] > 0, sample_weight=much / much.mean())
        weight, bias = np.asarray(model.coef_)[0], float(np.asarray(model.intercept_)[0])
    return Router(names, mean.tolist(), scale.tolist(), weight.tolist(), bias)


# --- walking over cases -----------------------------------------------------------------------------


def log_counts(ctx: Context) -> Tensor:
    """(N,): log of 1 + occurrences in training."""
    return torch.as_tensor(cast(Any, ctx.data).train_counts, device=ctx.device).float().log1p()


def _ndcg(rank: Tensor) -> Tensor:
    return torch.where(rank <= 10, 1 / (rank.double() + 1).log2(), 0.0)


def _start(
    config: Any,
    ctx: Context,
    model: SequenceEncoder,
    catalogue: Catalogue,
    batch: dict[str, Tensor],
    depth: int,
) -> Reasoning:
    return Reasoning(
        config.latent, model, catalogue, batch["items"].to(ctx.device), batch["length"].to(ctx.device), depth
    )


def _batches_with_exclusion(
    config: Any, ctx: Context, cases: Any, most: int, index: np.ndarray | None = None
):
    """Batches of at most ``most`` cases, spread evenly, or of those at ``index``; and (B, N) bool of the items
    that are no candidates, or None where all are."""
    if index is None:
        index = np.unique(np.linspace(0, len(cases) - 1, min(most, len(cases))).round().astype(np.int64))
    size = ctx.config.eval.batch_size
    for part in (index[a : a + size] for a in range(0, len(index), size)):
        exclude = excluded(seen(config, cases, part), len(part), ctx.data.num_items)
        yield cases.batch(part), None if exclude is None else exclude.to(ctx.device)
