"""Latent reasoning (ReaRec) as a method: what it trains, how it is judged, how it answers.

Tang et al., arXiv 2503.22675. After the last item of a history the encoder's own state is fed back as a
latent token, ``depth`` times; the state after that is scored against the whole catalogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reason.backbones.encoder import SequenceEncoder
from reason.backbones.from_run import MODEL
from reason.datasets import catalogue as catalogues
from reason.datasets.catalogue import Catalogue, kept_catalogue
from reason.datasets.requests import read_request
from reason.datasets.sequences import SequenceCases, SequenceSplits
from reason.datasets.subsets import evenly_spaced
from reason.errors import ConfigError, RunError
from reason.methods.base import Context, Evaluation, Losses, Method, Ratio, Step
from reason.methods.figures import Figure
from reason.methods.latent import objective
from reason.methods.latent.calibrate import Calibrator, affordable
from reason.methods.latent.recommender import Recommender
from reason.methods.latent.show import figures
from reason.metrics import ranking
from reason.metrics.baselines import MarkovChain, baseline_ranks
from reason.metrics.ranking import exclusion_mask, ranking_rows, target_rank

RANKING = {name: Ratio(column) for name, column in ranking.METRICS.items()}
METRICS = RANKING | {
    "Popularity@10": Ratio("popularity@10", larger_is_better=False),
    "Tail share@10": Ratio("tail@10"),
}


Run = Context[SequenceSplits]


class Latent(Method[SequenceSplits, SequenceCases, SequenceEncoder]):
    """See the module."""

    def data(self, ctx: Run) -> SequenceSplits:
        return ctx.dataset.sequences(self.config.backbone.max_length)

    def build(self, ctx: Run) -> SequenceEncoder:
        trained = (ctx.owner / MODEL).is_file()
        catalogue = kept_catalogue(ctx.owner, lambda: ctx.data.catalogue) if trained else ctx.data.catalogue
        if ctx.rank == 0 and not (trained and (ctx.workdir / catalogues.FILE).is_file()):
            catalogue.save(ctx.workdir)
        kind, text = self.config.backbone.text, None
        if kind != "none":
            from reason.backbones.text import text_vectors

            width, offline = self.config.backbone.text_dim, self.config.offline
            text = text_vectors(catalogue.item_text, kind, width, offline=offline)
        model = ctx.open(num_items=len(catalogue), steps=self.config.train_depth, text=text)
        if model.steps:
            nn.init.normal_(model.step_position, std=self.config.latent.step_std)
        return model

    def _catalogue(self, ctx: Run) -> Catalogue:
        """What ``build`` has kept."""
        return kept_catalogue(ctx.workdir, lambda: ctx.data.catalogue)

    # --- training ------------------------------------------------------------------------------

    def loss(self, model: SequenceEncoder, batch: dict[str, Tensor], step: Step) -> Losses:
        """One row of ``batch`` is a window of history; every prefix in it is a training sample."""
        config = self.config.latent
        names, noise, stop = objective.terms(config, model.steps), None, 0
        if "contrast" in names:
            shape = (model.steps, *batch["items"].shape, model.table.embedding_dim)
            noise = torch.randn(shape, generator=step.generator, device=step.generator.device)
            noise *= config.noise
        if "anytime" in names:
            where = step.generator.device
            stop = int(torch.randint(model.steps + 1, (), generator=step.generator, device=where))
        return objective.losses(config, model, batch, noise, stop)

    def counts(self, model: SequenceEncoder, batch: dict[str, Tensor], step: Step) -> dict[str, float]:
        prefixes = float((batch["targets"] != objective.IGNORED).sum())
        return dict.fromkeys(objective.terms(self.config.latent, model.steps), prefixes)

    # --- judging -------------------------------------------------------------------------------

    def check(self, ctx: Run, model: SequenceEncoder) -> None:
        """Refuse a router without cases, and a deadline that the encoder alone misses: its time does not
        depend on its weights."""
        latent = self.config.latent
        cases = len(evenly_spaced(len(ctx.data.fit), self.config.eval.limit))
        if latent.policy == "router" and cases < 20:
            raise ConfigError(
                f"A router is fitted to the examples held out for it, and there are {cases}.",
                "It needs at least 20; a stop test needs none: latent.policy=cos",
            )
        if not latent.deadline_ms:
            return
        was_training = model.training
        model.eval()
        with torch.inference_mode():
            times = self._calibrator(ctx, model, ctx.data.fit).times_ms(0)
        model.train(was_training)
        affordable(times, latent.deadline_ms)

    def calibrate(self, ctx: Run, model: SequenceEncoder, fit: SequenceCases) -> dict[str, Any]:
        """Temperatures of the steps; thresholds and router of the policy, if there is one.

        On at most ``eval.limit`` cases, spread evenly.
        """
        cases = fit.take(evenly_spaced(len(fit), self.config.eval.limit))
        with torch.inference_mode():
            return self._calibrator(ctx, model, cases).fit()

    def _calibrator(self, ctx: Run, model: SequenceEncoder, cases: SequenceCases) -> Calibrator:
        counts = self._catalogue(ctx).train_counts
        return Calibrator(self.config, ctx, model, cases, counts)

    def evaluate(self, ctx: Run, model: SequenceEncoder, split: SequenceCases, depth: int) -> Evaluation:
        """Full ranking of the catalogue for each user, scored a batch at a time.

        Columns: those of ``ranking_rows``, with the items answered; depth_used; step_cosine, where a step
        was taken (cosine of the last two states: 1 means that the last step changed nothing).
        """
        catalogue = self._catalogue(ctx)
        with torch.inference_mode():
            recommend = Recommender(self.config, ctx, model, catalogue)
            mine = ctx.shard(len(split))
            by_length = np.argsort(split.length[mine], kind="stable")[
                ::-1
            ]  # similar lengths need little padding
            parts: dict[str, list[np.ndarray]] = {}
            flops = tokens = 0.0
            for a in range(0, len(mine), self.config.eval.batch_size):
                index = mine[by_length[a : a + self.config.eval.batch_size]]
                batch, excluded = split.batch(index), split.excluded(index)
                with ctx.meter.batch(len(index)):
                    found = recommend(batch["items"], batch["length"], depth, excluded, with_cosine=depth > 0)
                rank = target_rank(found.scores, batch["target"].to(ctx.device), found.exclude)
                columns = {"rank": rank, "top": found.top, "depth_used": found.output.depth.double()}
                if found.output.step_cosine is not None:
                    columns["step_cosine"] = found.output.step_cosine
                for name, column in columns.items():
                    parts.setdefault(name, []).append(column.cpu().numpy())
                flops += float(recommend.flops(batch["length"], found.output.depth).sum())
                tokens += float(batch["length"].sum() + found.output.depth.sum())
            for i in ctx.meter.requests(len(split)):
                index = np.array([i])
                batch, excluded = split.batch(index), split.excluded(index)
                with ctx.meter.request():
                    recommend(batch["items"], batch["length"], depth, excluded)
        back = np.empty_like(by_length)
        back[by_length] = np.arange(len(by_length))
        columns = {name: np.concatenate(part)[back] for name, part in parts.items()}
        cost = {"steps": float(columns["depth_used"].sum()), "tokens": tokens, "flops": flops}
        rows = _rows(split.take(mine), catalogue, **columns)
        return Evaluation(
            rows,
            "NDCG@10",
            METRICS,
            cost,
            lambda whole: ranking.diversity(whole.column("top@10").to_numpy(), len(catalogue)),
        )

    # --- trivial rivals ------------------------------------------------------------------------

    def baselines(
        self, ctx: Run, model: SequenceEncoder, split: SequenceCases, depth: int
    ) -> dict[str, Evaluation]:
        """``popularity`` and ``successor`` (a first-order Markov chain), see ``baseline_ranks``."""
        cases, catalogue = split.take(ctx.shard(len(split))), self._catalogue(ctx)
        N, size = len(catalogue), self.config.eval.batch_size

        def batches():
            for a in range(0, len(cases), size):
                index = np.arange(a, min(a + size, len(cases)))
                batch = cases.batch(index)
                last = batch["items"][torch.arange(len(index)), batch["length"] - 1]
                yield last, batch["target"], exclusion_mask(cases.excluded(index), len(index), N)

        previous, following = ctx.data.train.transitions()
        chain = MarkovChain(previous, following, N)
        return {
            name: Evaluation(
                _rows(cases, catalogue, rank, depth_used=np.zeros(len(cases))), "NDCG@10", RANKING
            )
            for name, rank in baseline_ranks(batches(), chain, catalogue.train_counts).items()
        }

    # --- answering and showing -----------------------------------------------------------------

    def predict(
        self, ctx: Run, model: SequenceEncoder, requests: Sequence[dict[str, Any]], depth: int
    ) -> list[dict[str, Any]]:
        """Answer ``{"history": [item ids], "k": 10}`` or ``{"user": id}`` (the user's whole known history).

        ``"depth": n`` in a request spends exactly n steps on it, whatever the policy; without it the
        policy of the run decides, at most ``depth``.

        Each answer: ``{"items": [{"id", "title", "score"}, ...], "depth"}``, the depth that was used;
        ``stopped`` says why, where a policy or a deadline decided; ``unknown`` names items of
        the history that are not in the catalogue and were left out; ``note`` says that popularity
        answered where nothing was left. A request that makes no sense gets ``{"error": ...}``.
        """
        self._refuse_lost_policy(ctx)
        catalogue = self._catalogue(ctx)
        with torch.inference_mode():
            recommend = Recommender(self.config, ctx, model, catalogue)
            return [self._reply(ctx, recommend, catalogue, request, depth) for request in requests]

    def _reply(
        self, ctx: Run, recommend: Recommender, catalogue: Catalogue, request: Any, depth: int
    ) -> dict[str, Any]:
        began = ctx.meter.now()

        def history_of(user: str) -> list[int]:
            return ctx.dataset.history(ctx.dataset.find(user)).tolist()

        try:
            asked = read_request(request, catalogue, history_of, recommend.model.steps)
        except ValueError as error:
            return {"error": str(error).replace("\n", " ")}
        history, k = asked.history, asked.k
        reply: dict[str, Any] = {"items": [], "depth": 0}
        if history:
            excluded = None
            if self.config.dataset.candidates != "all":
                excluded = (torch.zeros(len(history), dtype=torch.int64), torch.tensor(history))
                k = min(k, len(catalogue) - len(set(history)))
            items = torch.tensor([history[-recommend.model.max_length :]])
            fixed = asked.depth is not None
            steps = depth if asked.depth is None else asked.depth
            found = recommend(
                items, torch.tensor([items.shape[1]]), steps, excluded, k=k, fixed=fixed, began=began
            )
            top = found.top[0].tolist()
            scores = found.scores[0, top].tolist()
            reply["depth"] = int(found.output.depth[0])
            if not fixed and (reason := recommend.stopping_reason(found.output, depth)):
                reply["stopped"] = reason
        else:
            top = catalogue.most_popular(k)
            scores = catalogue.train_counts[top].tolist()
            reply["note"] = (
                "The history holds no known item, so these are the most popular items; the score is how often an "
                "item occurs in training."
            )
        reply["items"] = catalogue.listed(top, scores)
        if asked.unknown:
            reply["unknown"] = asked.unknown
        return reply

    def _refuse_lost_policy(self, ctx: Run) -> None:
        """A policy whose thresholds are gone does not turn into a fixed depth unsaid."""
        policy = self.config.latent.policy
        if policy != "fixed" and "policy" not in (ctx.calibration or {}):
            raise RunError(
                f"The run was made with latent.policy={policy}, but its calibration.json is missing.",
                "`reason evaluate` of the run fits it again; latent.policy=fixed needs none.",
            )

    def inspect(self, ctx: Run, model: SequenceEncoder, example: str) -> list[Figure]:
        """What each latent step did to the answer.

        example: id of a test user; a history, ``{"history": [item ids]}``; '' = a test user with a history
            of median length.
        """
        self._refuse_lost_policy(ctx)
        return figures(self.config, ctx, model, self._catalogue(ctx), example)


def _rows(
    cases: SequenceCases, catalogue: Catalogue, rank: np.ndarray, top: np.ndarray | None = None, **further: np.ndarray
):  # fmt: skip
    """One row per case, see ``ranking_rows``."""
    return ranking_rows(cases.id, cases.history, cases.target, rank, catalogue.train_counts, top, **further)
