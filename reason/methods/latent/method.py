"""Latent reasoning (ReaRec) as a method: what it trains, how it is judged, how it answers.

Tang et al., arXiv 2503.22675. After the last item of a history the encoder's own state is fed back as a
latent token, ``depth`` times; the state after that is scored against the whole catalogue.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from reason.backbones.encoder import SequenceEncoder
from reason.errors import DataError
from reason.methods.base import Context, Evaluation, Examples, Losses, Method, Ratio, Splits, Step
from reason.methods.figures import Figure
from reason.methods.latent import objective
from reason.metrics.ranking import ranking_columns, target_rank

TOP = 10  # items of an answer
METRICS = {
    "NDCG@10": Ratio("ndcg@10"),
    "NDCG@20": Ratio("ndcg@20"),
    "Recall@5": Ratio("recall@5"),
    "Recall@10": Ratio("recall@10"),
    "Recall@20": Ratio("recall@20"),
    "MRR": Ratio("mrr"),
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
        model = ctx.backbone(num_items=ctx.data.num_items, steps=self.config.train_depth, text=text)
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

    def evaluate(self, ctx: Context, model: nn.Module, split: Examples, depth: int) -> Evaluation:
        """Full ranking of the catalogue for each user, scored a batch at a time.

        Columns: id, rank (ties count half), ndcg@k, recall@k, mrr, depth_used; history (its true
        length), target (code), target_count (its occurrences in training), popularity@10 (mean
        occurrences of the ten items answered); step_cosine, where a step was taken (cosine of the
        last two states: 1 means the last step changed nothing).
        """
        encoder, cases = cast(SequenceEncoder, model), cast(Any, split)
        with torch.inference_mode():
            vectors = encoder.item_vectors()
            counts = torch.as_tensor(ctx.data.train_counts, device=ctx.device)
            mine = ctx.shard(len(split))
            by_length = np.argsort(cases.length[mine], kind="stable")[
                ::-1
            ]  # batches of like lengths pad little
            parts: dict[str, list[np.ndarray]] = {}
            flops = tokens = 0.0
            for a in range(0, len(mine), ctx.config.eval.batch_size):
                index = mine[by_length[a : a + ctx.config.eval.batch_size]]
                batch = cases.batch(index)
                seen = self._seen(cases, index)
                with ctx.meter.batch(len(index)):
                    states, scores, exclude, top = self._answer(
                        ctx, encoder, vectors, batch["items"], batch["length"], depth, seen
                    )
                rank = target_rank(scores, batch["target"].to(ctx.device), exclude).cpu().numpy()
                columns = {"rank": rank, **ranking_columns(rank)}
                columns["target"] = batch["target"].numpy()
                columns["popularity@10"] = counts[top].double().mean(1).cpu().numpy()
                if depth:
                    moved = torch.cosine_similarity(states[:, -1], states[:, -2])
                    columns["step_cosine"] = moved.cpu().numpy()
                for name, column in columns.items():
                    parts.setdefault(name, []).append(column)
                flops += float(encoder.flops(batch["length"], depth).sum())
                tokens += float(batch["length"].sum()) + depth * len(index)
            self._time_requests(ctx, encoder, vectors, cases, depth)
        back = np.empty_like(by_length)
        back[by_length] = np.arange(len(by_length))
        columns = {name: np.concatenate(part)[back] for name, part in parts.items()}
        rows = _rows(ctx, cases, mine, columns, depth)
        cost = {"steps": float(depth * len(mine)), "tokens": tokens, "flops": flops}
        return Evaluation(rows, "NDCG@10", METRICS, cost)

    def _time_requests(
        self, ctx: Context, model: SequenceEncoder, vectors: Tensor, cases: Any, depth: int
    ) -> None:
        for i in ctx.meter.requests(len(cases)):
            index = np.array([i])
            batch, seen = cases.batch(index), self._seen(cases, index)
            with ctx.meter.request():
                self._answer(ctx, model, vectors, batch["items"], batch["length"], depth, seen)

    def _seen(self, cases: Any, index: np.ndarray) -> tuple[Tensor, Tensor] | None:
        """(rows, items) that are no candidates, or None where all items are."""
        if self.config.dataset.candidates == "all":
            return None
        rows, items = cases.seen(index)
        return torch.from_numpy(rows), torch.from_numpy(items)

    def _answer(
        self,
        ctx: Context,
        model: SequenceEncoder,
        vectors: Tensor,
        items: Tensor,
        length: Tensor,
        depth: int,
        seen: tuple[Tensor, Tensor] | None = None,
        k: int = TOP,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Serve a batch of histories: encode, reason, score, pick.

        Returns states (B, depth + 1, d); scores (B, N); the items seen, which are no candidates, as a mask
        (B, N) or None; the k best candidates (B, k).
        """
        thought = model.start(items.to(ctx.device), length.to(ctx.device), depth)
        states = torch.stack([thought.state, *(model.advance(thought) for _ in range(depth))], 1)
        scores = objective.read(self.config.latent, states) @ vectors.T
        candidates, exclude = scores, None
        if seen is not None:
            exclude = _mask(seen, scores.shape).to(ctx.device)
            candidates = scores.masked_fill(exclude, -torch.inf)
        return states, scores, exclude, candidates.topk(min(k, scores.shape[1])).indices

    # --- trivial rivals ------------------------------------------------------------------------

    def baselines(self, ctx: Context, split: Examples) -> dict[str, Evaluation]:
        """``popularity``: items by their occurrences in training. ``successor``: by how often they followed
        the last item of the history there, ties by popularity (a first-order Markov chain)."""
        cases, data = cast(Any, split), cast(Any, ctx.data)
        popularity = torch.from_numpy(data.train_counts).double()
        successors = Successors(data.train, data.num_items)
        index = np.arange(len(split))
        ranks: dict[str, list[np.ndarray]] = {"popularity": [], "successor": []}
        for a in range(0, len(index), ctx.config.eval.batch_size):
            chunk = index[a : a + ctx.config.eval.batch_size]
            batch = cases.batch(chunk)
            last = batch["items"][torch.arange(len(chunk)), batch["length"] - 1]
            seen = self._seen(cases, chunk)
            exclude = None if seen is None else _mask(seen, (len(chunk), data.num_items))
            plain = popularity.expand(len(chunk), -1)
            followed = successors.scores(last) + plain / (popularity.sum() + 1)  # the second part is below 1
            for name, scores in (("popularity", plain), ("successor", followed)):
                ranks[name].append(target_rank(scores, batch["target"], exclude).numpy())
        result = {}
        for name, parts in ranks.items():
            rank = np.concatenate(parts)
            columns = {**ranking_columns(rank), "rank": rank, "target": cases.target}
            result[name] = Evaluation(_rows(ctx, cases, index, columns, 0), "NDCG@10", METRICS)
        return result

    # --- answering and showing -----------------------------------------------------------------

    def predict(
        self, ctx: Context, model: nn.Module, requests: Sequence[dict[str, Any]], depth: int
    ) -> list[dict[str, Any]]:
        """Answer ``{"history": [item ids], "k": 10}`` or ``{"user": id}`` (the user's whole known history).

        Each answer: ``{"items": [{"id", "title", "score"}, ...], "depth"}``; ``unknown`` names items of
        the history that are not in the catalogue and were left out; ``note`` says that popularity
        answered where nothing was left. A request that makes no sense gets ``{"error": ...}``.
        """
        encoder = cast(SequenceEncoder, model)
        codes = {name: code for code, name in enumerate(ctx.dataset.item_ids)}
        with torch.inference_mode():
            vectors = encoder.item_vectors()
            return [self._reply(ctx, encoder, vectors, codes, request, depth) for request in requests]

    def _reply(
        self,
        ctx: Context,
        model: SequenceEncoder,
        vectors: Tensor,
        codes: dict[str, int],
        request: dict[str, Any],
        depth: int,
    ) -> dict[str, Any]:
        try:
            history, unknown, k = _parse(ctx, codes, request)
        except ValueError as error:
            return {"error": str(error).replace("\n", " ")}
        answer: dict[str, Any] = {"items": [], "depth": depth}
        seen = None
        if self.config.dataset.candidates != "all" and history:
            seen = (torch.zeros(len(history), dtype=torch.int64), torch.tensor(history))
            k = min(k, len(vectors) - len(set(history)))
        if history:
            items = torch.tensor([history[-model.max_length :]])
            length = torch.tensor([items.shape[1]])
            _, scores, _, top = self._answer(ctx, model, vectors, items, length, depth, seen, k)
        else:
            scores = torch.as_tensor(ctx.data.train_counts, device=ctx.device)[None].float()
            top = scores.topk(min(k, scores.shape[1])).indices
            answer |= {
                "depth": 0,
                "note": "no known item in the history: the most popular items, by popularity",
            }
        titles = titles_of(ctx.dataset)
        answer["items"] = [
            {"id": ctx.dataset.item_ids[i], "title": titles[i], "score": float(scores[0, i])}
            for i in top[0].tolist()
        ]
        if unknown:
            answer["unknown"] = unknown
        return answer

    def inspect(self, ctx: Context, model: nn.Module, example: str) -> list[Figure]:
        """What each latent step did to the answer for one test user ('' = one with a history of median length)."""
        from reason.methods.latent.explain import figures

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


def _mask(seen: tuple[Tensor, Tensor], shape: Sequence[int]) -> Tensor:
    """(rows, items) -> bool of ``shape``, True at each of them."""
    mask = torch.zeros(tuple(shape), dtype=torch.bool)
    mask[seen] = True
    return mask


def titles_of(dataset: Any) -> list[str]:
    """What to call each item: its title where there is one, else its text (the id, in the worst case)."""
    titles = dataset.item_fields.get("title") or dataset.item_text
    return [title or text for title, text in zip(titles, dataset.item_text, strict=True)]


def _rows(
    ctx: Context, cases: Any, index: np.ndarray, columns: dict[str, np.ndarray], depth: int
) -> pa.Table:
    fixed = {
        "id": pa.array(cases.id[index].tolist(), pa.string()),
        "depth_used": np.full(len(index), float(depth)),
        "history": cases.history[index],
        "target_count": cast(Any, ctx.data).train_counts[cases.target[index]],
    }
    return pa.table(fixed | columns)


def _parse(ctx: Context, codes: dict[str, int], request: dict[str, Any]) -> tuple[list[int], list[str], int]:
    """History as codes, the ids that are unknown, and k. Raises ValueError, in words for the asker."""
    if not isinstance(request, dict) or ("history" in request) == ("user" in request):
        raise DataError(
            'A request is {"history": [item ids]} or {"user": id}, with "k" if not 10 items are wanted.'
        )
    if extra := sorted(set(request) - {"history", "user", "k"}):
        raise DataError(f"Unknown key {extra[0]!r} in the request.", 'Known: "history", "user", "k".')
    k = request.get("k", TOP)
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= len(codes):
        raise DataError(f'"k" is {k!r}; it must be a whole number from 1 to {len(codes)}.')
    if "user" in request:
        return ctx.dataset.history(ctx.dataset.find(str(request["user"]))).tolist(), [], k
    if not isinstance(request["history"], list):
        raise DataError(f'"history" must be a list of item ids, oldest first, not {request["history"]!r}.')
    names = [str(name) for name in request["history"]]
    return [codes[n] for n in names if n in codes], [n for n in names if n not in codes], k
