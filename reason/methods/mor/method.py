"""Mixture-of-Recursions as a method: what it trains, how it is judged, how it writes.

Bae et al., arXiv 2507.10524. Reported numbers come from routes that see nothing of the future: thresholds
calibrated on validation text for expert-choice, the token's own choice for token-choice. Top-k, by which
expert-choice is trained, can be asked for (``mor.route=topk``) and is marked as looking ahead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from reason.backbones.tokens import Tokens
from reason.datasets.documents import Corpus
from reason.datasets.packing import Cases, Windows, encode
from reason.errors import ConfigError, DataError
from reason.methods.base import Context, Evaluation, Examples, Losses, Method, Ratio, Splits, Step
from reason.methods.figures import Figure
from reason.methods.mor import judge, objective
from reason.methods.mor.cache import MoRCache
from reason.methods.mor.decode import prefill, step
from reason.methods.mor.flops import Shape
from reason.methods.mor.generate import Request, Sampling, generate
from reason.methods.mor.network import MixtureOfRecursions
from reason.methods.mor.pace import Pace
from reason.methods.mor.rivals import Follower, targets
from reason.methods.mor.router import balance_bias
from reason.methods.mor.routes import Route

PROMPT = 64  # tokens at most that stand before one whose decoding is timed

METRICS = {
    "next-token accuracy": Ratio("correct", "targets"),
    "bits per byte": Ratio("bits", "bytes", larger_is_better=False),
    "loss": Ratio("nll", "targets", larger_is_better=False),
}


class TextSplits:
    """The splits of a corpus under a tokenizer, each encoded when it is first asked for: who only writes needs none."""

    def __init__(self, corpus: Corpus, tokens: Tokens, context: int, info: dict[str, Any]):
        self.corpus, self.tokens, self.context = corpus, tokens, context
        self.info = {"vocabulary": tokens.size, **info}

    @cached_property
    def train(self) -> Windows:
        return Windows(encode(self.corpus.train, self.tokens), self.context)

    @cached_property
    def valid(self) -> Cases:
        return Cases(encode(self.corpus.valid, self.tokens), self.context)

    @cached_property
    def test(self) -> Cases:
        return Cases(encode(self.corpus.test, self.tokens), self.context)


class Mor(Method):
    """See the module. The network is a ``MixtureOfRecursions``; ``train_depth=0`` is the vanilla decoder."""

    def data(self, ctx: Context) -> Splits:
        corpus, backbone = ctx.dataset.text(), self.config.backbone
        kind = backbone.tokenizer if backbone.tokenizer != "auto" else "word" if corpus.words else "bpe"
        tokens = Tokens.train(corpus.train.text, kind, backbone.vocab)
        return cast(Splits, TextSplits(corpus, tokens, backbone.context, ctx.dataset.info))

    def build(self, ctx: Context) -> nn.Module:
        recursions = max(self.config.train_depth, 1)
        shape = self.config.backbone.shape(ctx.data.tokens.size)
        decoder = ctx.backbone(shape=shape, recursions=recursions)
        mor = self.config.mor if self.config.train_depth else type(self.config.mor)(routing="none")
        return MixtureOfRecursions(decoder, mor, self.config.backbone.init_std)

    # --- training ------------------------------------------------------------------------------

    def loss(self, model: nn.Module, batch: dict[str, Tensor], step: Step) -> Losses:
        network = cast(MixtureOfRecursions, model)
        return objective.losses(network.config, network, batch, step)

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Norms do not decay. A router that foresees learns ten times as fast, from its own targets alone."""
        network = cast(MixtureOfRecursions, model)
        foreseers = [p for router in network.foreseers for p in router.parameters()]
        apart = {id(p) for p in foreseers}
        rest = [p for p in model.parameters() if id(p) not in apart]
        groups = [
            {"params": [p for p in rest if p.ndim > 1]},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
            {"params": foreseers, "lr_scale": 10.0},
        ]
        return [group for group in groups if group["params"]]

    def after_step(self, model: nn.Module, step: Step) -> None:
        network = cast(MixtureOfRecursions, model)
        if network.by_token is not None and network.config.balance == "bias":
            load = network.take_load()
            network.bias.copy_(balance_bias(network.bias, load, network.config.balance_rate))

    # --- judging -------------------------------------------------------------------------------

    def calibrate(self, ctx: Context, model: nn.Module, valid: Examples) -> dict[str, Any] | None:
        from reason.methods.mor.calibrate import fit

        return fit(self.config, ctx, cast(MixtureOfRecursions, model), cast(Cases, valid))

    def evaluate(self, ctx: Context, model: nn.Module, split: Examples, depth: int) -> Evaluation:
        """The loss of every token of each document, in windows of ``backbone.context`` tokens.

        Columns: id; nll (nats), bits, correct, targets, bytes: sums over the document; tokens, depth_used
        (mean recursions of its tokens); at_1, at_2 ...: tokens that left after so many. Where the data says how
        hard a token is: correct_L and targets_L for each level L, depth_L the sum of their depths.
        """
        network, cases = cast(MixtureOfRecursions, model), cast(Cases, split)
        cap = min(depth, network.recursions)
        mine, levels = ctx.shard(len(cases)), cases.levels
        parts: list[dict[str, np.ndarray]] = []
        flops = 0.0
        for index in cases.batches(mine, ctx.config.eval.batch_size):
            batch = cases.batch(index)
            with ctx.meter.batch(int(batch["length"].sum())):
                told, cost = self._tell(ctx, network, batch, cap)
            flops += cost
            parts.append(_by_document(told, batch, len(index), network.recursions, levels))
        self._time_tokens(ctx, network, cases, cap)
        columns = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        spent = float(sum(r * columns[f"at_{r}"].sum() for r in range(1, network.recursions + 1)))
        rows = pa.table(
            {"id": pa.array([cases.id[i] for i in mine], pa.string()), "bytes": cases.bytes[mine], **columns}
        )
        metrics = METRICS | {f"accuracy at level {n}": Ratio(f"correct_{n}", f"targets_{n}") for n in levels}
        cost_of = {"steps": spent, "tokens": float(columns["tokens"].sum()), "flops": flops}
        return Evaluation(rows, "next-token accuracy", metrics, cost_of)

    def _tell(
        self, ctx: Context, network: MixtureOfRecursions, batch: dict[str, Tensor], cap: int
    ) -> tuple[judge.Told, float]:
        """A batch of windows, a few at a time."""
        size, parts, flops = max(1, ctx.config.eval.batch_size), [], 0.0
        shape = sizes(network)
        for a in range(0, len(batch["tokens"]), size):
            tokens, targets, real = (
                batch[k][a : a + size].to(ctx.device) for k in ("tokens", "targets", "length")
            )
            routed = network(
                tokens, self._route(ctx, network, tokens), real=real, cap=cap, memory=network.config.memory
            )
            parts.append(judge.tell(network, routed, targets))
            flops += judge.cost(network, shape, routed)
        return judge.joined(parts), flops

    def _time_tokens(self, ctx: Context, network: MixtureOfRecursions, cases: Cases, cap: int) -> None:
        """Time the decoding of single tokens, each after the beginning of a document; nothing where a route looks ahead."""
        if network.config.route == "topk":
            return
        for i in ctx.meter.requests(len(cases)):
            batch = cases.batch(np.array([i]))
            text = batch["tokens"][0, : min(int(batch["length"][0]), PROMPT)]
            pace = Pace(network, self._route(ctx, network, text[None].to(ctx.device)), cap)
            past = MoRCache(network).open()
            if len(text) > 1:
                prefill(network, past, text[:-1], pace, read="none")
            with ctx.meter.request():
                int(step(network, [past], [int(text[-1])], [pace])[0].argmax())

    def _route(self, ctx: Context, network: MixtureOfRecursions, tokens: Tensor) -> Route | None:
        fitted = (ctx.calibration or {}).get("thresholds")
        return judge.judging_route(network.config, network, tokens, fitted, self.config.seed)

    # --- trivial rivals ------------------------------------------------------------------------

    def baselines(self, ctx: Context, split: Examples) -> dict[str, Evaluation]:
        """``unigram``: the commonest token of training; ``bigram``: what most often followed the last one there."""
        cases, data = cast(Cases, split), cast(TextSplits, ctx.data)
        follower, n = Follower(data.train, data.tokens.size), len(cases)
        sums = {name: np.zeros((3, n)) for name in ("unigram", "bigram")}
        for row, last, target in targets(cases):
            for name, total in sums.items():
                nats, hit = getattr(follower, name)(last, target)
                for line, values in enumerate((nats, hit, np.ones(len(row)))):
                    total[line] += np.bincount(row, weights=values, minlength=n)
        found = {}
        for name, (nll, correct, asked) in sums.items():
            columns = {"nll": nll, "bits": nll / math.log(2), "correct": correct, "targets": asked}
            rows = pa.table({"id": pa.array(cases.id.tolist(), pa.string()), "bytes": cases.bytes, **columns,
                             "depth_used": np.zeros(n)})  # fmt: skip
            found[name] = Evaluation(rows, "next-token accuracy", METRICS)
        return found

    # --- writing -------------------------------------------------------------------------------

    def predict(
        self, ctx: Context, model: nn.Module, requests: Sequence[dict[str, Any]], depth: int
    ) -> list[dict[str, Any]]:
        """Continue ``{"prompt": text, "tokens": 64}``; also ``"depth"``, ``"temperature"``, ``"top_p"`` and ``"seed"``.

        Each answer: ``{"text", "tokens", "depth", "stopped"}``: what was written, in how many tokens, the mean
        recursions that a token took, and whether the end of a document stopped it. ``"depth": n`` in a request
        caps its recursions, else the run's does. A request that makes no sense gets ``{"error": ...}``.
        """
        network = cast(MixtureOfRecursions, model)
        if network.config.route == "topk":
            raise ConfigError(
                "mor.route=topk looks ahead: whom it chooses depends on the tokens that are still to be written.",
                "Write with thresholds: reason evaluate RUN mor.route=threshold, then predict with that run.",
            )
        with torch.inference_mode():
            return [self._reply(ctx, network, request, depth) for request in requests]

    def _reply(
        self, ctx: Context, network: MixtureOfRecursions, request: dict[str, Any], depth: int
    ) -> dict[str, Any]:
        tokens, context = ctx.data.tokens, self.config.backbone.context
        try:
            asked = parse(request, network.recursions)
            ids = [tokens.eos, *tokens.encode([asked.prompt])[0][0]]
            if len(ids) >= context:
                raise DataError(
                    f"The prompt has {len(ids):,} tokens; the model was trained on {context:,} at a time.",
                    "Shorten it, or train with a larger backbone.context.",
                )
            most = min(asked.tokens, context - len(ids))
            whole = torch.tensor([ids + [tokens.eos] * most], device=ctx.device)
            route = self._route(ctx, network, whole)
            sampling = Sampling(asked.temperature, asked.top_p, asked.seed)
            cap = min(depth if asked.depth is None else asked.depth, network.recursions)
            done = generate(network, Request(ids, most, route, cap, sampling, frozenset({tokens.eos})))
        except ValueError as error:
            return {"error": str(error).replace("\n", " ")}
        reply = {
            "text": tokens.decode(done.tokens), "tokens": len(done.tokens),
            "depth": float(done.depth.mean()), "stopped": done.stopped,
        }  # fmt: skip
        if most < asked.tokens and not done.stopped:
            reply["note"] = f"the context of {context:,} tokens is full"
        return reply

    # --- showing -------------------------------------------------------------------------------

    def inspect(self, ctx: Context, model: nn.Module, example: str) -> list[Figure]:
        """A test document coloured by depth, and where that depth was well spent ('' = one of median length)."""
        from reason.methods.mor.show import figures

        return figures(self.config, ctx, cast(MixtureOfRecursions, model), example)


@dataclass(frozen=True)
class Asked:
    """A request, understood."""

    prompt: str
    tokens: int = 64  # to write at most
    depth: int | None = None  # recursions at most; None: the run's
    temperature: float = 0.0  # 0 = greedy
    top_p: float = 1.0
    seed: int = 0


def parse(request: dict[str, Any], recursions: int) -> Asked:
    """Raises DataError, in words for the asker."""
    if not isinstance(request, dict) or not isinstance(request.get("prompt"), str):
        raise DataError('A request is {"prompt": "text to continue"}, with "tokens" if not 64 are wanted.')
    if not request["prompt"].strip():
        raise DataError("The prompt is empty.", "Give the text that is to be continued.")
    known = [f.name for f in fields(Asked)]
    if extra := sorted(set(request) - set(known)):
        raise DataError(f"Unknown key {extra[0]!r} in the request.", f"Known: {', '.join(known)}.")
    for name, kind, least, most in (
        ("tokens", int, 1, 100_000), ("depth", int, 1, recursions), ("temperature", float, 0, 100),
        ("top_p", float, 1e-9, 1), ("seed", int, 0, 2**63 - 1),
    ):  # fmt: skip
        value = request.get(name)
        if value is None:
            continue
        fits = isinstance(value, int if kind is int else (int, float)) and not isinstance(value, bool)
        if not fits or not least <= value <= most:
            what = "a whole number" if kind is int else "a number"
            raise DataError(f'"{name}" is {value!r}; it must be {what} from {least:g} to {most:g}.')
    return Asked(**{k: v for k, v in request.items() if v is not None})


def sizes(network: MixtureOfRecursions) -> Shape:
    """What the FLOP accounting has to know of a network."""
    s, sharing = network.decoder.shape, network.decoder.sharing
    return Shape(s.hidden, s.heads, s.kv_heads, s.head_dim, s.ffn, s.vocab, sharing.block, sharing.ends)


def _by_document(
    told: judge.Told, batch: dict[str, Tensor], documents: int, recursions: int, levels: list[int]
) -> dict[str, np.ndarray]:
    """Sums over the windows of each document."""
    case, target = batch["case"].numpy(), (batch["targets"] >= 0).numpy()
    level = batch["level"].numpy()

    def summed(values: np.ndarray) -> np.ndarray:
        return np.bincount(case, weights=values.sum(1).astype(np.float64), minlength=documents)

    columns = {"nll": summed(told.nll), "correct": summed(told.hit), "targets": summed(target)}
    columns["bits"] = columns["nll"] / math.log(2)
    for r in range(1, recursions + 1):
        columns[f"at_{r}"] = summed(told.depth == r)
    columns["tokens"] = summed(told.depth > 0)
    columns["depth_used"] = summed(told.depth) / np.maximum(columns["tokens"], 1)
    for n in levels:
        at = target & (level == n)
        columns |= {f"correct_{n}": summed(told.hit & at), f"targets_{n}": summed(at)}
        columns[f"depth_{n}"] = summed(told.depth * at)
    return columns
