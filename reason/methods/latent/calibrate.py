"""What is fitted to a trained model, on held-out cases and nothing else: temperatures, thresholds, a router.

The router's weights are fitted on one half of the cases and its share of requests on the other, so that
it cannot spend more than it was given because it remembers the first half.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from reason.datasets.requests import TOP
from reason.datasets.subsets import evenly_spaced
from reason.errors import ConfigError
from reason.methods.base import Context
from reason.methods.latent import objective
from reason.methods.latent.policy import (
    DepthPolicy,
    DepthRouter,
    Measure,
    PolicyTest,
    features,
    log_counts,
    rising,
)
from reason.methods.latent.reasoning import ItemEmbeddings, Reasoning, run_steps
from reason.metrics.calibration import (
    EXCLUDED,
    expected_calibration_error,
    fit_temperature,
    steps_taken,
    threshold_for_mean_steps,
)
from reason.metrics.ranking import exclusion_mask, target_rank

if TYPE_CHECKING:
    from reason.backbones.encoder import SequenceEncoder
    from reason.datasets.sequences import SequenceCases

MAX_CASES = 10_000  # cases that thresholds are fitted on, spread evenly
MAX_TEMPERATURE_CASES = 500  # a temperature is one number
UNREACHABLE = 1e30  # a threshold that no measure reaches
TIMED_REQUESTS, WARM_UP = 40, 5  # that are timed for a deadline, and that are run before


@dataclass(frozen=True)
class Calibrator:
    """A trained model and the cases that something is fitted to. ``counts``: (N,) occurrences in training."""

    config: Any
    ctx: Context
    model: SequenceEncoder
    cases: SequenceCases
    counts: np.ndarray
    embeddings: ItemEmbeddings = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "embeddings", ItemEmbeddings.of(self.model))

    def fit(self) -> dict[str, Any]:
        """Everything that answering with ``latent.policy`` needs, as JSON data.

        Keys: ``temperatures`` (K + 1) and ``ece`` (see ``temperatures``). With a policy or a deadline:
        ``depth``, the most steps a request takes. With a policy: ``policy`` and ``valid_mean_depth``. With a
        deadline: ``times_ms`` by depth, the policy's own tests included. ``notes``: what people should know.
        """
        latent = self.config.latent
        tau, ece = self.temperatures()
        fitted: dict[str, Any] = {"temperatures": tau, "ece": ece, "notes": []}
        depth, policy, spent = self.config.depth, None, 0.0
        if latent.policy != "fixed":
            policy, spent = self._policy(depth, tau)
        if latent.deadline_ms:
            fitted["times_ms"] = self.times_ms(depth, policy)
            if fitted["times_ms"][0] > latent.deadline_ms:  # a finished training is not thrown away for it
                depth = 0
                fitted["notes"].append(
                    f"The deadline of {latent.deadline_ms:g} ms is missed even without a latent step: an answer "
                    f"takes {fitted['times_ms'][0]:.3g} ms on this machine (95th percentile)."
                )
            else:
                depth = affordable(fitted["times_ms"], latent.deadline_ms)
            if policy is not None and depth < self.config.depth:
                policy, spent = self._policy(depth, tau)
        if policy is not None or latent.deadline_ms:
            fitted["depth"] = depth
        if policy is not None:
            fitted |= {"policy": policy.to_json(), "valid_mean_depth": spent}
            fitted["notes"] += _budget_notes(latent, policy, depth, spent)
        return fitted

    # --- the deadline ---------------------------------------------------------------------------

    def times_ms(self, depth: int, policy: DepthPolicy | None = None) -> list[float]:
        """The 95th percentile of the time of one request at depth 0..``depth``, in ms.

        Ranking and the tests of ``policy`` are included, as if they never stopped anyone.
        """
        chosen = np.random.default_rng(self.config.seed).permutation(len(self.cases))[:TIMED_REQUESTS]
        warm_up = chosen[:WARM_UP]
        if policy is not None:
            policy = replace(policy, threshold=rising(policy.name, UNREACHABLE))
        counts, now = log_counts(self.counts, self.ctx.device), self.ctx.meter.now
        times: list[list[float]] = [[] for _ in range(depth + 1)]
        for i in [*warm_up, *chosen]:
            for batch, exclude in self._batches(np.array([i])):
                for k in range(depth + 1):
                    began = now()
                    run = self._start(batch, k)
                    test = None if policy is None else PolicyTest(policy, counts, exclude)
                    scores = self.embeddings.scores(run_steps(run, test).state)
                    if exclude is not None:
                        scores = scores.masked_fill(exclude, EXCLUDED)
                    scores.topk(min(TOP, scores.shape[1]))
                    times[k].append(1e3 * (now() - began))
        return [float(np.percentile(t[len(warm_up) :], 95)) for t in times]

    # --- temperatures ---------------------------------------------------------------------------

    def temperatures(self) -> tuple[list[float], list[dict[str, dict[str, float]]]]:
        """For step 0..K the temperature at which the scores predict the targets best (least NLL), and what that mends.

        Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, with one temperature a step. What
        it mends is the expected calibration error of the first item, "uncalibrated" (at the temperature that
        the step was trained at) and "calibrated", each over bins of "equal_width" and "equal_mass", on
        the cases that the temperature was fitted to.
        """
        states, target, excluded = [], [], []
        for batch, exclude in self._batches(evenly_spaced(len(self.cases), MAX_TEMPERATURE_CASES)):
            run = self._start(batch, self.model.steps)
            reads = [run.read()]
            for _ in range(self.model.steps):
                run.step()
                reads.append(run.read())
            states.append(torch.stack(reads, 1))
            target.append(batch["target"].to(self.ctx.device))
            if exclude is not None:  # the target stays a candidate, whatever was seen
                excluded.append(exclude.scatter(1, target[-1][:, None], False))
        state, label = torch.cat(states), torch.cat(target)  # (n, K + 1, d), (n,)
        exclude = torch.cat(excluded) if excluded else torch.zeros((), dtype=torch.bool, device=state.device)
        tau, ece = [], []
        for k, trained in enumerate(objective.temperatures(self.config.latent, self.model.steps)):
            scores = self.embeddings.scores(state[:, k]).masked_fill(exclude, EXCLUDED)
            tau.append(fit_temperature(scores, label))
            ece.append(
                {
                    "uncalibrated": _calibration_error(scores / trained, label),
                    "calibrated": _calibration_error(scores / tau[-1], label),
                }
            )
        return tau, ece

    # --- thresholds -----------------------------------------------------------------------------

    def _policy(self, depth: int, tau: list[float]) -> tuple[DepthPolicy, float]:
        """The policy, and the steps it spends on these cases on average."""
        latent = self.config.latent
        least = latent.first_test(depth)
        target = latent.mean_depth if latent.mean_depth is not None else (least + depth) / 2
        target = min(max(target, least), depth)
        policy = DepthPolicy(latent.policy, 0.0, least, tau, latent.shortlist)
        if latent.policy == "router":
            return self._routed(policy, depth, target)
        measures = self._measures(policy, depth)  # (n, K)
        threshold = latent.threshold
        if threshold is None:
            threshold = rising(policy.name, threshold_for_mean_steps(measures, target, least))
        spent = steps_taken(measures, rising(policy.name, threshold), least)
        return replace(policy, threshold=threshold), float(spent.float().mean())

    def _measures(self, policy: DepthPolicy, depth: int) -> Tensor:
        """(n, depth): the measure of every case after step 0..depth-1, below the least step -inf."""
        rows = []
        for batch, exclude in self._batches(evenly_spaced(len(self.cases), MAX_CASES)):
            run = self._start(batch, depth)
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

    def _routed(self, policy: DepthPolicy, depth: int, target: float) -> tuple[DepthPolicy, float]:
        """A router whose weights come from the even cases and whose threshold from the odd ones."""
        names = self.config.latent.feature_names
        xs, gains, counts = [], [], log_counts(self.counts, self.ctx.device)
        for batch, exclude in self._batches(evenly_spaced(len(self.cases), MAX_CASES)):
            run = self._start(batch, depth)
            xs.append(features(names, Measure(policy, counts, exclude), run))
            label = batch["target"].to(self.ctx.device)
            before = target_rank(self.embeddings.scores(run.read()), label, exclude)
            for _ in range(depth):
                run.step()
            after = target_rank(self.embeddings.scores(run.read()), label, exclude)
            gains.append(_ndcg(after) - _ndcg(before))
        x, gain = torch.cat(xs).double().cpu().numpy(), torch.cat(gains).double().cpu().numpy()
        first = np.arange(len(x)) % 2 == 0
        router = fit_router(names, x[first], gain[first])
        standard = (x[~first] - np.array(router.mean)) / np.array(router.scale)
        score = standard @ np.array(router.weight) + router.bias
        measures = torch.from_numpy(-score)[:, None]  # (n, 1): stopping at step 0 is the one choice
        threshold = threshold_for_mean_steps(measures, target / max(depth, 1), 0)
        spent = float(steps_taken(measures, threshold, 0).double().mean()) * depth
        return replace(policy, threshold=threshold, least=0, router=router), spent

    # --- walking over cases ---------------------------------------------------------------------

    def _start(self, batch: dict[str, Tensor], depth: int) -> Reasoning:
        items, length = (batch[name].to(self.ctx.device) for name in ("items", "length"))
        return Reasoning(self.config.latent, self.model, self.embeddings, items, length, depth)

    def _batches(self, index: np.ndarray) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
        """Batches of the cases at ``index``, each with what is no candidate, (B, N) bool, or None where all are."""
        size = self.config.eval.batch_size
        for part in (index[a : a + size] for a in range(0, len(index), size)):
            exclude = exclusion_mask(self.cases.excluded(part), len(part), len(self.embeddings))
            yield self.cases.batch(part), None if exclude is None else exclude.to(self.ctx.device)


def _budget_notes(latent: Any, policy: DepthPolicy, depth: int, spent: float) -> list[str]:
    """A budget that is not met is not passed over in silence."""
    if policy.least >= depth:
        steps = f"{depth} step{'s' * (depth != 1)}"
        return [f"latent.policy={policy.name} decides nothing here: every request takes exactly {steps}."]
    if latent.mean_depth is not None and abs(spent - latent.mean_depth) > 0.02:
        return [
            f"latent.policy={policy.name} spends {spent:.2f} steps on average where latent.mean_depth="
            f"{latent.mean_depth:g} was asked for: its measure takes too few distinct values, or the deadline "
            "does not allow more."
        ]
    return []


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


def fit_router(names: list[str], x: np.ndarray, gain: np.ndarray) -> DepthRouter:
    """Logistic regression of whether depth gains or loses, each case weighted by how much. The weights are 0
    where nothing is gained or lost, and where everything is one or the other.

    x: (n, F), gain: (n,), change of the accuracy from no step to all of them.
    """
    mean, scale = x.mean(0), np.maximum(x.std(0), 1e-6)
    decided = gain != 0
    weight, bias = np.zeros(x.shape[1]), 0.0
    if len(np.unique(gain[decided] > 0)) == 2:
        from sklearn.linear_model import LogisticRegression

        size = np.abs(gain[decided])
        model = LogisticRegression(C=0.1, max_iter=1000)
        model.fit((x[decided] - mean) / scale, gain[decided] > 0, sample_weight=size / size.mean())
        weight, bias = np.asarray(model.coef_)[0], float(np.asarray(model.intercept_)[0])
    return DepthRouter(names, mean.tolist(), scale.tolist(), weight.tolist(), bias)


def _ndcg(rank: Tensor) -> Tensor:
    return torch.where(rank <= 10, 1 / (rank.double() + 1).log2(), 0.0)


def _calibration_error(logits: Tensor, label: Tensor) -> dict[str, float]:
    """ECE of the first item, by the two ways of making bins. logits: (n, N), label: (n,)."""
    confidence, first = logits.double().softmax(-1).max(-1)
    columns = confidence.clamp_max(1.0).cpu().numpy(), (first == label).cpu().numpy()
    return {
        "equal_width": expected_calibration_error(*columns),
        "equal_mass": expected_calibration_error(*columns, equal_mass=True),
    }
