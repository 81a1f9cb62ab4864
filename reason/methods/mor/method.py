"""Mixture-of-Recursions as a method: what it trains, how it is judged, how it writes.

Bae et al., arXiv 2507.10524. Reported numbers come from routes that see nothing of the future: thresholds
calibrated on validation text for expert-choice, the token's own choice for token-choice. Top-k, by which
expert-choice is trained, can be asked for (``mor.route=topk``); the run is told, and keeps, that it looks ahead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from reason.backbones.from_run import keep, kept
from reason.backbones.pretrained import Causal, opened
from reason.backbones.tokens import Tokens
from reason.datasets.documents import Corpus
from reason.datasets.packing import Cases, Windows, encode
from reason.errors import ConfigError, DataError
from reason.methods.base import Context, Evaluation, Examples, Losses, Method, Ratio, Splits, Step
from reason.methods.figures import Figure
from reason.methods.mor import audit, judge, objective
from reason.methods.mor.answer import Answers
from reason.methods.mor.cache import MoRCache
from reason.methods.mor.convert import Layout, Teacher, convert
from reason.methods.mor.decode import prefill, step
from reason.methods.mor.flops import Shape
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

    @property
    def fit(self) -> Cases:
        return self.valid

    @cached_property
    def test(self) -> Cases:
        return Cases(encode(self.corpus.test, self.tokens), self.context)


class Mor(Method):
    """See the module. The network is a ``MixtureOfRecursions``; ``train_depth=0`` is the vanilla decoder."""

    def data(self, ctx: Context) -> Splits:
        corpus, backbone = ctx.dataset.text(), self.config.backbone
        if (trained := kept(ctx.owner)) is not None:
            return cast(Splits, TextSplits(corpus, trained[-1], backbone.context, ctx.dataset.info))
        if (source := self._source()) is not None:
            told = {"source": source.where} | (
                {"layers": note} if (note := self._layout(source).note) else {}
            )
            return cast(
                Splits, TextSplits(corpus, source.tokens, backbone.context, {**ctx.dataset.info, **told})
            )
        kind = backbone.tokenizer if backbone.tokenizer != "auto" else "word" if corpus.words else "bpe"
        tokens = Tokens.train(corpus.train.text, kind, backbone.vocab)
        return cast(Splits, TextSplits(corpus, tokens, backbone.context, ctx.dataset.info))

    def build(self, ctx: Context) -> nn.Module:
        recursions, backbone = max(self.config.train_depth, 1), self.config.backbone
        mor = self.config.mor if self.config.train_depth else type(self.config.mor)(routing="none")
        source = teacher = None
        if (trained := kept(ctx.owner)) is not None:
            shape, lora, _ = trained
            decoder = ctx.open(shape=shape, recursions=recursions, lora=lora)
        elif (source := self._source()) is None:
            shape = backbone.shape(ctx.data.tokens.size)
            decoder = ctx.open(shape=shape, recursions=recursions, lora=mor.lora)
        else:
            decoder = convert(source, self._layout(source), ctx.open, mor.lora)
            teacher = Teacher(source)
        if ctx.rank == 0:
            keep(
                ctx.workdir,
                decoder,
                ctx.data.tokens,
                lora=0 if decoder.corrections is None else mor.lora,
                routing=mor.routing,
            )
        return MixtureOfRecursions(decoder, mor, backbone.init_std, teacher, bool(backbone.source))

    def _source(self) -> Causal | None:
        """The model to begin with, opened once per process."""
        source = self.config.backbone.source
        return opened(source, self.config.offline) if source else None

    def _layout(self, source: Causal) -> Layout:
        """Refuses what the source is too small for."""
        config, context = self.config, source.shape.context
        if context and config.backbone.context > context:
            raise ConfigError(
                f"{source.where} reads {context:,} tokens at a time; backbone.context={config.backbone.context} is more.",
                f"Use backbone.context={context} or less.",
            )
        recursions = max(config.train_depth, 1)
        return Layout.of(source.shape.layers, config.backbone.sharing, recursions, config.mor.init)

    # --- training ------------------------------------------------------------------------------

    def loss(self, model: nn.Module, batch: dict[str, Tensor], step: Step) -> Losses:
        network = cast(MixtureOfRecursions, model)
        return objective.losses(network.config, network, batch, step)

    def counts(self, model: nn.Module, batch: dict[str, Tensor], step: Step) -> dict[str, float]:
        network, state = cast(MixtureOfRecursions, model), step.generator.get_state()
        found = objective.counts(network.config, network, batch, step)
        step.generator.set_state(state)  # the loss of this batch draws the same
        return found

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

    def check(self, ctx: Context, model: nn.Module) -> None:
        """Refuse a text that does not fill one batch."""
        windows, batch = len(ctx.data.train), self.config.train.batch_size
        if windows < batch and (self.config.train.steps or self.config.train.epochs):
            raise DataError(
                f"The training text fills {windows:,} windows of {self.config.backbone.context:,} tokens, fewer than one "
                f"batch takes ({batch:,}).",
                f"Use train.batch_size={windows} or less, a smaller backbone.context, or more text.",
            )

    def calibrate(self, ctx: Context, model: nn.Module, valid: Examples) -> dict[str, Any] | None:
        from reason.methods.mor.calibrate import fit

        return fit(self.config, ctx, cast(MixtureOfRecursions, model), cast(Cases, valid))

    def evaluate(self, ctx: Context, model: nn.Module, split: Examples, depth: int) -> Evaluation:
        """The loss of every token of each document, in windows of ``backbone.context`` tokens.

        Columns: id; nll (nats), bits, correct, targets, bytes: sums over the document; tokens, depth_used
        (mean recursions of its tokens); at_1, at_2 ...: tokens that left after so many. Where the data says how
        hard a token is: correct_L and targets_L for each level L, depth_L the sum of their depths; easy_at_R and
        hard_at_R: targets of level 0 and of the others that were given R recursions. fallbacks: tokens of which
        the router said no number. ``audit.COLUMNS``: sums of those documents that were judged at all depths
        (``mor.audit``), 0 of the others.
        """
        network, cases = cast(MixtureOfRecursions, model), cast(Cases, split)
        cap = min(depth, network.recursions)
        mine, levels = ctx.shard(len(cases)), cases.levels
        audited = self._audited(ctx, network, cases, cap)
        parts: list[dict[str, np.ndarray]] = []
        shape, flops = sizes(network), 0.0
        for index in cases.batches(mine, ctx.config.eval.batch_size):
            batch = cases.batch(index)
            with ctx.meter.batch(int(batch["length"].sum())):
                told = self._tell(ctx, network, batch, cap)
            flops += judge.cost(network, shape, told.depth)
            parts.append(_by_document(told, batch, len(index), network.recursions, levels))
            parts[-1] |= self._audit(ctx, network, cases, index, told, cap, audited)
        self._time_tokens(ctx, network, cases, cap)
        if not parts:  # a rank without a document has columns all the same
            batch = cases.batch(mine)
            parts = [_by_document(judge.Told.of(0, 0), batch, 0, network.recursions, levels)]
            parts[0] |= {name: np.zeros(0) for name in audit.COLUMNS}
        columns = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        spent = float(sum(r * columns[f"at_{r}"].sum() for r in range(1, network.recursions + 1)))
        rows = pa.table(
            {"id": pa.array([cases.id[i] for i in mine], pa.string()), "bytes": cases.bytes[mine], **columns}
        )
        metrics = METRICS | {f"accuracy at level {n}": Ratio(f"correct_{n}", f"targets_{n}") for n in levels}
        cost_of = {"steps": spent, "tokens": float(columns["tokens"].sum()), "flops": flops}
        return Evaluation(rows, "next-token accuracy", metrics, cost_of, _overall)

    def _audited(self, ctx: Context, network: MixtureOfRecursions, cases: Cases, cap: int) -> set[int]:
        """The documents whose depths are audited, on all ranks together."""
        if cap == 1:
            return set()
        judged = replace(ctx, rank=0, world_size=1).shard(len(cases))
        return set(audit.sampled(judged, network.config.audit, self.config.seed).tolist())

    def _audit(
        self, ctx: Context, network: MixtureOfRecursions, cases: Cases, index: np.ndarray, told: judge.Told,
        cap: int, audited: set[int],
    ) -> dict[str, np.ndarray]:  # fmt: skip
        """``audit.COLUMNS`` of the documents at ``index``."""
        columns = {name: np.zeros(len(index)) for name in audit.COLUMNS}
        where = np.flatnonzero([int(i) in audited for i in index])
        if len(where):
            batch = cases.batch(index)
            rows = np.isin(batch["case"].numpy(), where)
            some = {name: column[torch.from_numpy(rows)] for name, column in batch.items()}
            some["case"] = torch.from_numpy(np.searchsorted(where, some["case"].numpy()))
            found = audit.audit(
                network, some, told.pick(rows), cap, size=ctx.config.eval.batch_size, device=ctx.device,
                seed=self.config.seed,
            )  # fmt: skip
            for name, values in found.items():
                columns[name][where] = values
        return columns

    def _tell(
        self, ctx: Context, network: MixtureOfRecursions, batch: dict[str, Tensor], cap: int
    ) -> judge.Told:
        """A batch of windows, a few at a time."""
        size, parts = max(1, ctx.config.eval.batch_size), []
        for a in range(0, len(batch["tokens"]), size):
            tokens, targets, real = (
                batch[k][a : a + size].to(ctx.device) for k in ("tokens", "targets", "length")
            )
            routed = network(
                tokens, self._route(ctx, network, tokens), real=real, cap=cap, memory=network.config.memory
            )
            parts.append(judge.tell(network, routed, targets))
        return judge.joined(parts)

    def _time_tokens(self, ctx: Context, network: MixtureOfRecursions, cases: Cases, cap: int) -> None:
        """Time the decoding of single tokens, each after the beginning of a document; nothing where a route looks ahead."""
        for i in ctx.meter.requests(len(cases)):
            batch = cases.batch(np.array([i]))
            text = batch["tokens"][0, : min(int(batch["length"][0]), PROMPT)]
            route = self._route(ctx, network, text[None].to(ctx.device))
            if route is not None and route.looks_ahead:
                return
            pace = Pace(network, route, cap)
            past = MoRCache(network).open()
            if len(text) > 1:
                prefill(network, past, text[:-1], pace, read="none")
            with ctx.meter.request():
                int(step(network, [past], [int(text[-1])], [pace])[0].argmax())

    def _route(self, ctx: Context, network: MixtureOfRecursions, tokens: Tensor) -> Route | None:
        fitted = judge.thresholds_of(ctx.calibration, network.config.profile)
        return judge.judging_route(network.config, network, tokens, fitted, self.config.seed)

    # --- trivial rivals ------------------------------------------------------------------------

    def baselines(self, ctx: Context, model: nn.Module, split: Examples, depth: int) -> dict[str, Evaluation]:
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
                             "depth_used": np.zeros(n)}).take(ctx.shard(n))  # fmt: skip
            found[name] = Evaluation(rows, "next-token accuracy", METRICS)
        return found

    # --- writing -------------------------------------------------------------------------------

    def predict(
        self, ctx: Context, model: nn.Module, requests: Sequence[dict[str, Any]], depth: int
    ) -> list[dict[str, Any]]:
        """Continue ``{"prompt": text, "tokens": 64}``; also ``"depth"``, ``"temperature"``, ``"top_p"`` and ``"seed"``.

        Each answer: ``{"text", "tokens", "depth", "stopped"}``: what was written, in how many tokens, the mean
        recursions that a token took, and whether the end of a document stopped it. ``"depth": n`` in a request
        caps its recursions, else the run's does; ``"profile"`` picks the thresholds. ``{"replay": record}``, of
        ``audit.jsonl`` (``mor.record``), writes a text again. A request that makes no sense gets ``{"error": ...}``.
        """
        network = cast(MixtureOfRecursions, model)
        if network.config.route == "topk":
            raise ConfigError(
                "mor.route=topk looks ahead: whom it chooses depends on the tokens that are still to be written.",
                "Write with thresholds: reason evaluate RUN mor.route=threshold, then predict with that run.",
            )
        with torch.inference_mode():
            return Answers(ctx, network, depth).all(requests)

    # --- showing -------------------------------------------------------------------------------

    def inspect(self, ctx: Context, model: nn.Module, example: str) -> list[Figure]:
        """A test document coloured by depth, and where that depth was well spent ('' = one of median length)."""
        from reason.methods.mor.show import figures

        return figures(self.config, ctx, cast(MixtureOfRecursions, model), example)


def sizes(network: MixtureOfRecursions) -> Shape:
    """What the FLOP accounting has to know of a network."""
    s, sharing = network.decoder.shape, network.decoder.sharing
    lora = network.config.lora if network.decoder.corrections is not None else 0
    return Shape(s.hidden, s.heads, s.kv_heads, s.head_dim, s.ffn, s.vocab, sharing.block, sharing.ends, lora)


def _overall(rows: pa.Table) -> dict[str, float]:
    """The share of tokens of which the router said no number; where the data says how hard a token is, how surely its
    depth tells the hard ones from the easy ones; and what the audit found."""

    def column(name: str) -> float:
        return float(rows.column(name).to_numpy().sum())

    found = {"fallbacks": column("fallbacks") / max(column("tokens"), 1)}
    steps = [name.removeprefix("easy_at_") for name in rows.column_names if name.startswith("easy_at_")]
    easy, hard = (np.array([column(f"{kind}_at_{r}") for r in steps]) for kind in ("easy", "hard"))
    if easy.sum() and hard.sum():
        below = np.cumsum(easy) - easy  # easy targets of less depth
        found["auroc of depth"] = float((hard * (below + easy / 2)).sum() / (easy.sum() * hard.sum()))
    return found | audit.overall(column)


def _by_document(
    told: judge.Told, batch: dict[str, Tensor], documents: int, recursions: int, levels: list[int]
) -> dict[str, np.ndarray]:
    """Sums over the windows of each document."""
    case, target = batch["case"].numpy(), (batch["targets"] >= 0).numpy()
    level = batch["level"].numpy()

    def summed(values: np.ndarray) -> np.ndarray:
        whole = np.bincount(case, weights=values.sum(1).astype(np.float64), minlength=documents)
        return whole.astype(np.float64)  # of no window, it counts in integers

    columns = {"nll": summed(told.nll), "correct": summed(told.hit), "targets": summed(target)}
    columns["bits"] = columns["nll"] / math.log(2)
    for r in range(1, recursions + 1):
        columns[f"at_{r}"] = summed(told.depth == r)
    columns["tokens"] = summed(told.depth > 0)
    columns["fallbacks"] = summed(told.broken)
    columns["depth_used"] = summed(told.depth) / np.maximum(columns["tokens"], 1)
    for n in levels:
        at = target & (level == n)
        columns |= {f"correct_{n}": summed(told.hit & at), f"targets_{n}": summed(at)}
        columns[f"depth_{n}"] = summed(told.depth * at)
    if levels:
        for r in range(1, recursions + 1):
            columns[f"easy_at_{r}"] = summed((told.depth == r) & target & (level == 0))
            columns[f"hard_at_{r}"] = summed((told.depth == r) & target & (level > 0))
    return columns
