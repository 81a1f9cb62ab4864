"""Latent reasoning (ReaRec) as a method: what it trains, how it is judged, how it answers.

Tang et al., arXiv 2503.22675. After the last item of a history the encoder's own state is fed back as a
latent token, ``depth`` times; the state after that is scored against the whole catalogue.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from reason.backbones.encoder import SequenceEncoder
from reason.errors import ConfigError, DataError, RunError
from reason.methods.base import Context, Evaluation, Examples, Losses, Method, Ratio, Splits, Step
from reason.methods.figures import Figure
from reason.methods.latent import calibrate, candidates, objective
from reason.methods.latent.answer import TOP, Answerer
from reason.metrics.ranking import diversity, ranking_columns, target_rank

RANKING = {
    "NDCG@10": Ratio("ndcg@10"),
    "NDCG@20": Ratio("ndcg@20"),
    "Recall@5": Ratio("recall@5"),
    "Recall@10": Ratio("recall@10"),
    "Recall@20": Ratio("recall@20"),
    "MRR": Ratio("mrr"),
}
METRICS = RANKING | {
    "Popularity@10": Ratio("popularity@10", larger_is_better=False),
    "Tail share@10": Ratio("tail@10"),
}


class Latent(Method):
    """See the module. The network is a ``SequenceEncoder``; ``ctx.data`` is the view ``sequences`` itself."""

    def data(self, ctx: Context) -> Splits:
        return cast(Splits, ctx.dataset.sequences(self.config.backbone.max_length))

    def build(self, ctx: Context) -> nn.Module:
        kind, text = self.config.backbone.text, None
        if kind != "none":
            from reason.backbones.text import text_vectors

            width, offline = self.config.backbone.text_dim, self.config.offline
            text = text_vectors(ctx.data.item_text, kind, width, offline=offline)
        model = ctx.open(num_items=ctx.data.num_items, steps=self.config.train_depth, text=text)
        if model.steps:
            nn.init.normal_(model.step_position, std=self.config.latent.step_std)
        return model

    # --- training ------------------------------------------------------------------------------

    def loss(self, model: nn.Module, batch: dict[str, Tensor], step: Step) -> Losses:
        """One row of ``batch`` is a window of history; every prefix in it is a training sample."""
        model, config = cast(SequenceEncoder, model), self.config.latent
        names, noise, stop = objective.terms(config, model.steps), None, 0
        if "contrast" in names:
            shape = (model.steps, *batch["items"].shape, model.table.embedding_dim)
            noise = torch.randn(shape, generator=step.generator, device=step.generator.device)
            noise *= config.noise
        if "anytime" in names:
            where = step.generator.device
            stop = int(torch.randint(model.steps + 1, (), generator=step.generator, device=where))
        return objective.losses(config, model, batch, noise, stop)

    def counts(self, model: nn.Module, batch: dict[str, Tensor], step: Step) -> dict[str, float]:
        prefixes = float((batch["targets"] != objective.IGNORED).sum())
        return dict.fromkeys(
            objective.terms(self.config.latent, cast(SequenceEncoder, model).steps), prefixes
        )

    # --- judging -------------------------------------------------------------------------------

    def check(self, ctx: Context, model: nn.Module) -> None:
        """Refuse a router without cases, and a deadline that the encoder alone misses: its time does not
        depend on its weights."""
        latent = self.config.latent
        if latent.policy == "router" and len(ctx.data.valid) < 20:
            raise ConfigError(
                f"A router is fitted on validation, and there are {len(ctx.data.valid)} cases.",
                "It needs 20 at least; a stop test needs none: latent.policy=cos",
            )
        if not latent.deadline_ms:
            return
        was_training = model.training
        model.eval()
        with torch.inference_mode():
            encoder = cast(SequenceEncoder, model)
            times = calibrate.times_ms(
                self.config, ctx, encoder, candidates.Catalogue.of(encoder), ctx.data.valid, 0
            )
        model.train(was_training)
        calibrate.affordable(times, latent.deadline_ms)

    def calibrate(self, ctx: Context, model: nn.Module, valid: Examples) -> dict[str, Any]:
        """Temperatures of the steps; thresholds and router of the policy, if there is one."""
        return calibrate.fit(self.config, ctx, cast(SequenceEncoder, model), valid)

    def evaluate(self, ctx: Context, model: nn.Module, split: Examples, depth: int) -> Evaluation:
        """Full ranking of the catalogue for each user, scored a batch at a time.

        Columns: id, rank (ties count half), ndcg@k, recall@k, mrr, depth_used; history (its true
        length), target (code), target_count (its occurrences in training), target_head (1 where it is
        among the fifth of the items that occur most); top@10 (the codes answered), popularity@10 (their
        mean occurrences), tail@10 (the share of them outside that fifth); step_cosine, where a step
        was taken (cosine of the last two states: 1 means the last step changed nothing).
        """
        cases = cast(Any, split)
        with torch.inference_mode():
            answer = Answerer(self.config, ctx, cast(SequenceEncoder, model))
            counts = torch.as_tensor(ctx.data.train_counts, device=ctx.device)
            head = torch.from_numpy(head_items(ctx.data.train_counts)).to(ctx.device)
            mine = ctx.shard(len(split))
            by_length = np.argsort(cases.length[mine], kind="stable")[::-1]  # like lengths pad little
            parts: dict[str, list[np.ndarray]] = {}
            flops = tokens = 0.0
            for a in range(0, len(mine), ctx.config.eval.batch_size):
                index = mine[by_length[a : a + ctx.config.eval.batch_size]]
                batch = cases.batch(index)
                seen = candidates.seen(self.config, cases, index)
                with ctx.meter.batch(len(index)):
                    found = answer(batch["items"], batch["length"], depth, seen, watch=depth > 0)
                rank = target_rank(found.scores, batch["target"].to(ctx.device), found.exclude).cpu().numpy()
                columns = {"rank": rank, **ranking_columns(rank)}
                columns["target"] = batch["target"].numpy()
                columns["target_head"] = head[batch["target"].to(ctx.device)].double().cpu().numpy()
                columns["top@10"] = found.top.cpu().numpy()
                columns["popularity@10"] = counts[found.top].double().mean(1).cpu().numpy()
                columns["tail@10"] = (~head[found.top]).double().mean(1).cpu().numpy()
                columns["depth_used"] = found.served.depth.double().numpy()
                if found.served.moved is not None:
                    columns["step_cosine"] = found.served.moved.cpu().numpy()
                for name, column in columns.items():
                    parts.setdefault(name, []).append(column)
                flops += float(answer.flops(batch["length"], found.served.depth).sum())
                tokens += float(batch["length"].sum() + found.served.depth.sum())
            for i in ctx.meter.requests(len(cases)):
                index = np.array([i])
                batch, seen = cases.batch(index), candidates.seen(self.config, cases, index)
                with ctx.meter.request():
                    answer(batch["items"], batch["length"], depth, seen)
        back = np.empty_like(by_length)
        back[by_length] = np.arange(len(by_length))
        columns = {name: np.concatenate(part)[back] for name, part in parts.items()}
        steps = float(columns["depth_used"].sum())
        rows = _rows(ctx, cases, mine, columns)
        num_items = ctx.data.num_items
        return Evaluation(
            rows,
            "NDCG@10",
            METRICS,
            {"steps": steps, "tokens": tokens, "flops": flops},
            lambda whole: diversity(whole.column("top@10").to_numpy(), num_items),
        )

    # --- trivial rivals ------------------------------------------------------------------------

    def baselines(self, ctx: Context, model: nn.Module, split: Examples, depth: int) -> dict[str, Evaluation]:
        """``popularity``: items by their occurrences in training. ``successor``: by how often they followed
        the last item of the history there, ties by popularity (a first-order Markov chain)."""
        cases, data = cast(Any, split), cast(Any, ctx.data)
        popularity = torch.from_numpy(data.train_counts).double()
        successors = Successors(data.train, data.num_items)
        index = ctx.shard(len(split))
        ranks: dict[str, list[np.ndarray]] = {"popularity": [], "successor": []}
        for a in range(0, len(index), ctx.config.eval.batch_size):
            chunk = index[a : a + ctx.config.eval.batch_size]
            batch = cases.batch(chunk)
            last = batch["items"][torch.arange(len(chunk)), batch["length"] - 1]
            seen = candidates.seen(self.config, cases, chunk)
            exclude = candidates.excluded(seen, len(chunk), data.num_items)
            plain = popularity.expand(len(chunk), -1)
            followed = successors.scores(last) + plain / (popularity.sum() + 1)  # the second part is below 1
            for name, scores in (("popularity", plain), ("successor", followed)):
                ranks[name].append(target_rank(scores, batch["target"], exclude).numpy())
        result = {}
        for name, parts in ranks.items():
            rank = np.concatenate(parts)
            columns = {**ranking_columns(rank), "rank": rank, "target": cases.target[index]}
            columns["depth_used"] = np.zeros(len(rank))
            result[name] = Evaluation(_rows(ctx, cases, index, columns), "NDCG@10", RANKING)
        return result

    # --- answering and showing -----------------------------------------------------------------

    def predict(
        self, ctx: Context, model: nn.Module, requests: Sequence[dict[str, Any]], depth: int
    ) -> list[dict[str, Any]]:
        """Answer ``{"history": [item ids], "k": 10}`` or ``{"user": id}`` (the user's whole known history).

        ``"depth": n`` in a request spends exactly n steps on it, whatever the policy; without it the
        policy of the run decides, at most ``depth``.

        Each answer: ``{"items": [{"id", "title", "score"}, ...], "depth"}``, the depth that was used;
        ``stopped`` says why, where a policy or a deadline decided; ``unknown`` names items of
        the history that are not in the catalogue and were left out; ``note`` says that popularity
        answered where nothing was left. A request that makes no sense gets ``{"error": ...}``.
        """
        self._calibrated(ctx)
        codes = {name: code for code, name in enumerate(ctx.dataset.item_ids)}
        with torch.inference_mode():
            answer = Answerer(self.config, ctx, cast(SequenceEncoder, model))
            return [self._reply(ctx, answer, codes, request, depth) for request in requests]

    def _reply(
        self, ctx: Context, answer: Answerer, codes: dict[str, int], request: dict[str, Any], depth: int
    ) -> dict[str, Any]:
        began = ctx.meter.now()
        try:
            asked = _parse(ctx, codes, request, answer.model.steps)
        except ValueError as error:
            return {"error": str(error).replace("\n", " ")}
        history, k = asked.history, asked.k
        reply: dict[str, Any] = {"items": [], "depth": 0}
        seen = None
        if self.config.dataset.candidates != "all" and history:
            seen = (torch.zeros(len(history), dtype=torch.int64), torch.tensor(history))
            k = min(k, len(codes) - len(set(history)))
        if history:
            items = torch.tensor([history[-answer.model.max_length :]])
            found = answer(
                items,
                torch.tensor([items.shape[1]]),
                depth if asked.depth is None else asked.depth,
                seen,
                k=k,
                fixed=asked.depth is not None,
                began=began,
            )
            scores, top = found.scores, found.top
            reply["depth"] = int(found.served.depth[0])
            if asked.depth is None and (reason := answer.reason(found.served, depth)):
                reply["stopped"] = reason
        else:
            scores = torch.as_tensor(ctx.data.train_counts, device=ctx.device)[None].float()
            top = scores.topk(min(k, scores.shape[1])).indices
            reply["note"] = "no known item in the history: the most popular items, by popularity"
        titles = titles_of(ctx.dataset)
        reply["items"] = [
            {"id": ctx.dataset.item_ids[i], "title": titles[i], "score": float(scores[0, i])}
            for i in top[0].tolist()
        ]
        if asked.unknown:
            reply["unknown"] = asked.unknown
        return reply

    def _calibrated(self, ctx: Context) -> None:
        """A policy whose thresholds are gone does not turn into a fixed depth unsaid."""
        policy = self.config.latent.policy
        if policy != "fixed" and "policy" not in (ctx.calibration or {}):
            raise RunError(
                f"The run was made with latent.policy={policy}, and its calibration.json is gone.",
                "`reason evaluate` of the run fits it anew; latent.policy=fixed needs none.",
            )

    def inspect(self, ctx: Context, model: nn.Module, example: str) -> list[Figure]:
        """What each latent step did to the answer for one test user ('' = one with a history of median length)."""
        from reason.methods.latent.show import figures

        self._calibrated(ctx)
        return figures(self.config, ctx, cast(SequenceEncoder, model), example)


class Successors:
    """How often each item followed each other item in training, as sorted pairs."""

    def __init__(self, train: Any, num_items: int):
        self.num_items = num_items
        pairs = []
        for a in range(0, len(train), 4096):
            batch = train.batch(np.arange(a, min(a + 4096, len(train))))
            real = batch["targets"] >= 0
            pairs.append((batch["items"][real] * num_items + batch["targets"][real]).numpy())
        self.pair, self.count = np.unique(np.concatenate(pairs), return_counts=True)

    def scores(self, last: Tensor) -> Tensor:
        """(n,) items -> (n, N) float64 counts of what followed them."""
        scores = np.zeros((len(last), self.num_items))
        first = np.searchsorted(self.pair, last.numpy() * self.num_items)
        end = np.searchsorted(self.pair, (last.numpy() + 1) * self.num_items)
        for row, (a, b) in enumerate(zip(first, end, strict=True)):
            scores[row, self.pair[a:b] % self.num_items] = self.count[a:b]
        return torch.from_numpy(scores)


def head_items(counts: np.ndarray) -> np.ndarray:
    """(N,) bool: the fifth of the items that occur most in training; ties go to the lower code."""
    head = np.zeros(len(counts), dtype=bool)
    head[np.argsort(-counts, kind="stable")[: -(-len(counts) // 5)]] = True
    return head


def titles_of(dataset: Any) -> list[str]:
    """What to call each item: its title where there is one, else its text (the id, in the worst case)."""
    titles = dataset.item_fields.get("title") or dataset.item_text
    return [title or text for title, text in zip(titles, dataset.item_text, strict=True)]


def _rows(ctx: Context, cases: Any, index: np.ndarray, columns: dict[str, np.ndarray]) -> pa.Table:
    fixed = {
        "id": pa.array(cases.id[index].tolist(), pa.string()),
        "history": cases.history[index],
        "target_count": cast(Any, ctx.data).train_counts[cases.target[index]],
    }
    lists = {
        name: pa.array(list(column.astype(np.int32))) for name, column in columns.items() if column.ndim == 2
    }
    return pa.table(fixed | columns | lists)


@dataclass(frozen=True)
class Asked:
    """A request, understood."""

    history: list[int]  # item codes, oldest first; what is unknown is left out
    unknown: list[str]  # ids of the history that are not in the catalogue
    k: int  # items wanted
    depth: int | None  # steps asked for; None: the policy decides


_KEYS = ("history", "user", "k", "depth")


def _parse(ctx: Context, codes: dict[str, int], request: dict[str, Any], steps: int) -> Asked:
    """Raises ValueError, in words for the asker."""
    if not isinstance(request, dict) or ("history" in request) == ("user" in request):
        raise DataError(
            'A request is {"history": [item ids]} or {"user": id}, with "k" if not 10 items are wanted '
            'and "depth" for a number of steps of its own.'
        )
    if extra := sorted(set(request) - set(_KEYS)):
        raise DataError(
            f"Unknown key {extra[0]!r} in the request.", f"Known: {', '.join(map(json.dumps, _KEYS))}."
        )
    k, depth = request.get("k", TOP), request.get("depth")
    for name, value, least, most in (("k", k, 1, len(codes)), ("depth", depth, 0, steps)):
        if value is None and name == "depth":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise DataError(f'"{name}" is {value!r}; it must be a whole number from {least} to {most}.')
    if "user" in request:
        history = ctx.dataset.history(ctx.dataset.find(str(request["user"]))).tolist()
        return Asked(history, [], k, depth)
    if not isinstance(request["history"], list):
        raise DataError(f'"history" must be a list of item ids, oldest first, not {request["history"]!r}.')
    names = [str(name) for name in request["history"]]
    known = [codes[n] for n in names if n in codes]
    return Asked(known, [n for n in names if n not in codes], k, depth)
