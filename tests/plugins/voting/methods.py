"""The methods of ``voting``. Every outcome is a function of the seed and the user, however users are batched."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from reason.files import read_json, write_json
from reason.methods.base import Evaluation, Method, Ratio, Rival
from reason.methods.figures import Table

HIT = {"hit rate": Ratio("hit")}


class Sampler(nn.Module):
    """Frozen scores of items: log frequency times ``sharpness``."""

    def __init__(self, config, counts):
        super().__init__()
        scores = config.sharpness * torch.as_tensor(counts, dtype=torch.float32).log1p()
        self.scores = nn.Parameter(scores, requires_grad=False)  # (N,)


class Two(nn.Module):
    def __init__(self, policy, reward):
        super().__init__()
        self.policy, self.reward = policy, reward


def counts_of(ctx):
    """Occurrences in training; kept with the run, so that it answers without its data."""
    if not (ctx.owner / "counts.json").exists():
        write_json(ctx.workdir / "counts.json", ctx.data.catalogue.train_counts.tolist())
        return ctx.data.catalogue.train_counts
    return read_json(ctx.owner / "counts.json")


class Voting(Method):
    def data(self, ctx):
        return ctx.dataset.sequences(8)

    def build(self, ctx):
        counts = counts_of(ctx)
        return Two(ctx.open(counts=counts), ctx.open("voting.reward", counts=counts))

    def guesses(self, model, cases, index, depth):
        """(n, depth) items."""
        chances = model.policy.scores.softmax(-1)
        rows = []
        for user in cases.user[index].tolist():
            generator = torch.Generator().manual_seed(1000 * self.config.seed + user)
            rows.append(torch.multinomial(chances, depth, replacement=True, generator=generator))
        return torch.stack(rows) if rows else torch.zeros(0, depth, dtype=torch.int64)

    def evaluate(self, ctx, model, split, depth):
        return next(self.evaluate_depths(ctx, model, split, {depth: ctx.meter}))[1]

    def evaluate_depths(self, ctx, model, split, meters):
        index = ctx.shard(len(split))
        drawn = self.guesses(model, split, index, max(meters))
        target = torch.from_numpy(split.target[index])
        for depth, meter in meters.items():
            some = drawn[:, :depth]
            for i in meter.requests(len(split)):
                for name in ("", "guesses"):
                    with meter.request(name):
                        vote(self.guesses(model, split, np.array([i]), depth))
            with meter.batch(len(index)):
                answer = vote(some)
            best = some.gather(1, model.reward.scores[some].argmax(1, keepdim=True))[:, 0]
            hits = {"hit": answer, "hit_best": best, "hit_first": some[:, 0]}
            found = {name: (said == target).double().numpy() for name, said in hits.items()}
            rows = pa.table({
                "id": pa.array(split.id[index].tolist(), pa.string()),
                "depth_used": np.full(len(index), float(depth)),
                **found,
                "hit_any": (some == target[:, None]).any(1).double().numpy(),
            })  # fmt: skip
            rivals = {
                "best-of-n": Rival(
                    "the guess with the highest reward", {"hit rate": Ratio("hit_best")}, timed_as="guesses"
                ),
                "first guess": Rival(
                    "one guess", {"hit rate": Ratio("hit_first")}, {"tokens": float(len(index))}
                ),
                "any guess": Rival("a bound", {"hit rate": Ratio("hit_any")}, bound=True),
                "best-of-n at once": Rival(
                    "the same", {"hit rate": Ratio("hit_best")}, variant_of="best-of-n"
                ),
            }
            yield (
                depth,
                Evaluation(rows, "hit rate", HIT, {"tokens": float(depth * len(index))}, rivals=rivals),
            )

    def calibrate(self, ctx, model, fit):
        return {"share": float(len(fit))}

    def baselines(self, ctx, model, split, depth):
        index = ctx.shard(len(split))
        hit = (split.target[index] == int(model.policy.scores.argmax())).astype(float)
        rows = pa.table({
            "id": pa.array(split.id[index].tolist(), pa.string()), "depth_used": np.zeros(len(index)), "hit": hit,
        })  # fmt: skip
        return {"most frequent": Evaluation(rows, "hit rate", HIT)}

    def predict(self, ctx, model, requests, depth):
        chances = model.policy.scores.softmax(-1)
        generator = torch.Generator().manual_seed(self.config.seed)
        drawn = torch.multinomial(chances, len(requests) * depth, replacement=True, generator=generator)
        return [{"item": item} for item in vote(drawn.view(len(requests), depth)).tolist()]

    def inspect(self, ctx, model, example):
        return [Table("scores", ["item", "score"], [[0, float(model.policy.scores[0])]])]


def vote(guesses):
    """(n, depth) -> (n,): the commonest guess, the first of those that tie."""
    votes = (guesses[:, :, None] == guesses[:, None]).sum(-1)
    return guesses.gather(1, votes.argmax(1, keepdim=True))[:, 0]


class Probed(nn.Module):
    def __init__(self, items, width):
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(items, width), requires_grad=False)
        self.head = nn.Linear(width, items)

    def forward(self, last):
        return self.head(self.vectors[last])


class Probe(Method):
    def data(self, ctx):
        return ctx.dataset.sequences(8)

    def build(self, ctx):
        return Probed(len(counts_of(ctx)), self.config.probe.width)

    def loss(self, model, batch, step):
        real = batch["targets"] >= 0
        scores = model(batch["items"][real])
        return {"next": (cross_entropy(scores, batch["targets"][real], reduction="sum"), real.sum())}

    def evaluate(self, ctx, model, split, depth):
        index = ctx.shard(len(split))
        batch = split.batch(index)
        last = batch["items"][torch.arange(len(index)), batch["length"] - 1]
        with ctx.meter.batch(len(index)):
            found = model(last).argmax(-1)
        rows = pa.table({
            "id": pa.array(split.id[index].tolist(), pa.string()),
            "depth_used": np.full(len(index), float(depth)),
            "hit": (found == batch["target"]).double().numpy(),
        })  # fmt: skip
        return Evaluation(rows, "hit rate", HIT, {"readings": float(depth * len(index))})

    def baselines(self, ctx, model, split, depth):
        return {"again": self.evaluate(ctx, model, split, depth)}

    def inspect(self, ctx, model, example):
        return [Table("vectors", ["item", "first"], [[0, float(model.vectors[0, 0])]])]
