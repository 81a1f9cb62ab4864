"""Mixture-of-Recursions as a method: training, evaluation, and generation.

Bae et al., arXiv 2507.10524. Reported numbers come from routes that do not look ahead: thresholds calibrated on
validation text for expert-choice, the token's own choice for token-choice. Top-k, by which expert-choice is trained, is
available (``mor.route=topk``); the run then notes that it looks ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from reason.backbones.from_run import read_network, write_network
from reason.backbones.pretrained import CausalLM, opened
from reason.backbones.tokens import Tokens
from reason.datasets.documents import Corpus
from reason.datasets.ngrams import NGramModel
from reason.datasets.packing import Cases, Windows, encode
from reason.errors import ConfigError, DataError
from reason.methods.base import Context, Evaluation, Examples, Losses, Method, Splits, Step
from reason.methods.figures import Figure
from reason.methods.mor import audit, objective
from reason.methods.mor.cache import MoRCache
from reason.methods.mor.calibrate import fit, profile_thresholds
from reason.methods.mor.convert import Layout, Teacher, convert
from reason.methods.mor.decode import prefill, step
from reason.methods.mor.halting import HaltingRule
from reason.methods.mor.network import MixtureOfRecursions
from reason.methods.mor.outcomes import (
    RoutedOutcomes,
    decoder_flops,
    forward_flops,
    routed_columns,
    routed_outcomes,
)
from reason.methods.mor.requests import RequestHandler
from reason.methods.mor.router import balance_bias
from reason.methods.mor.routes import Route, evaluation_route
from reason.metrics import language
from reason.metrics.association import auroc_of_counts

PROMPT = 64  # tokens at most before the one whose decoding is timed


class TextSplits:
    """The splits of a corpus under a tokenizer, each encoded when it is first used: generation needs none of them."""

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
        if (trained := read_network(ctx.owner)) is not None:
            return cast(Splits, TextSplits(corpus, trained[-1], backbone.context, ctx.dataset.info))
        if (source := self._source()) is not None:
            origin = {"source": source.where} | (
                {"layers": note} if (note := self._layout(source).note) else {}
            )
            return cast(
                Splits, TextSplits(corpus, source.tokens, backbone.context, {**ctx.dataset.info, **origin})
            )
        kind = backbone.tokenizer if backbone.tokenizer != "auto" else "word" if corpus.words else "bpe"
        tokens = Tokens.train(corpus.train.text, kind, backbone.vocab)
        return cast(Splits, TextSplits(corpus, tokens, backbone.context, ctx.dataset.info))

    def build(self, ctx: Context) -> nn.Module:
        recursions, backbone = max(self.config.train_depth, 1), self.config.backbone
        mor = self.config.mor if self.config.train_depth else type(self.config.mor)(routing="none")
        source = teacher = None
        if (trained := read_network(ctx.owner)) is not None:
            shape, lora, _ = trained
            decoder = ctx.backbone(shape=shape, recursions=recursions, lora=lora)
        elif (source := self._source()) is None:
            shape = backbone.shape(ctx.data.tokens.size)
            decoder = ctx.backbone(shape=shape, recursions=recursions, lora=mor.lora)
        else:
            decoder = convert(source, self._layout(source), ctx.backbone, mor.lora)
            teacher = Teacher(source)
        if ctx.rank == 0:
            write_network(
                ctx.workdir,
                decoder,
                ctx.data.tokens,
                lora=0 if decoder.corrections is None else mor.lora,
                routing=mor.routing,
            )
        return MixtureOfRecursions(decoder, mor, backbone.init_std, teacher, bool(backbone.source))

    def _source(self) -> CausalLM | None:
        """The pretrained model to convert, opened once per process."""
        source = self.config.backbone.source
        return opened(source, self.config.offline) if source else None

    def _layout(self, source: CausalLM) -> Layout:
        """Raises ConfigError where the source is too small."""
        config, context = self.config, source.shape.context
        if context and config.backbone.context > context:
            raise ConfigError(
                f"{source.where} was trained on {context:,} tokens at a time; backbone.context={config.backbone.context} is more.",
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
        step.generator.set_state(state)  # the loss of this batch draws the same random numbers
        return found

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Norms have no weight decay. Auxiliary routers, which learn from their own targets alone, have ten times the
        learning rate."""
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

    # --- evaluation -------------------------------------------------------------------------------

    def check(self, ctx: Context, model: nn.Module) -> None:
        """Raises DataError where the text does not fill one batch."""
        windows, batch = len(ctx.data.train), self.config.train.batch_size
        if windows < batch and (self.config.train.steps or self.config.train.epochs):
            raise DataError(
                f"The training text fills {windows:,} windows of {self.config.backbone.context:,} tokens, fewer than one "
                f"batch takes ({batch:,}).",
                f"Use train.batch_size={windows} or less, a smaller backbone.context, or more text.",
            )

    def calibrate(self, ctx: Context, model: nn.Module, valid: Examples) -> dict[str, Any] | None:
        return fit(self.config, ctx, cast(MixtureOfRecursions, model), cast(Cases, valid))

    def evaluate(self, ctx: Context, model: nn.Module, split: Examples, depth: int) -> Evaluation:
        """The loss of every token of each document, in windows of ``backbone.context`` tokens.

        Columns: id; bytes; those of ``outcomes.routed_columns``; ``audit.COLUMNS``: sums of the documents that were
        evaluated at all depths (``mor.audit``), 0 for the others.
        """
        network, cases = cast(MixtureOfRecursions, model), cast(Cases, split)
        cap = min(depth, network.recursions)
        mine, levels = ctx.shard(len(cases)), cases.levels
        audited = self._audited(ctx, network, cases, cap)
        parts: list[dict[str, np.ndarray]] = []
        sizes, flops = decoder_flops(network), 0.0
        for index in cases.batches(mine, ctx.config.eval.batch_size):
            batch = cases.batch(index)
            with ctx.meter.batch(int(batch["length"].sum())):
                outcomes = self._outcomes(ctx, network, batch, cap)
            flops += forward_flops(network, sizes, outcomes.depth)
            parts.append(routed_columns(outcomes, batch, len(index), network.recursions, levels))
            parts[-1] |= self._audit(ctx, network, cases, index, outcomes, cap, audited)
        self._time_tokens(ctx, network, cases, cap)
        if not parts:  # a rank without a document has columns all the same
            batch = cases.batch(mine)
            parts = [routed_columns(RoutedOutcomes.empty(), batch, 0, network.recursions, levels)]
            parts[0] |= {name: np.zeros(0) for name in audit.COLUMNS}
        columns = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        spent = float(sum(r * columns[f"at_{r}"].sum() for r in range(1, network.recursions + 1)))
        rows = pa.table(
            {"id": pa.array([cases.id[i] for i in mine], pa.string()), "bytes": cases.bytes[mine], **columns}
        )
        cost = {"steps": spent, "tokens": float(columns["tokens"].sum()), "flops": flops}
        return Evaluation(rows, language.ACCURACY, language.metrics(levels), cost, _overall)

    def _audited(self, ctx: Context, network: MixtureOfRecursions, cases: Cases, cap: int) -> set[int]:
        """The documents whose depths are audited, on all ranks together."""
        if cap == 1:
            return set()
        sharded = replace(ctx, rank=0, world_size=1).shard(len(cases))
        return set(audit.sample_documents(sharded, network.config.audit, self.config.seed).tolist())

    def _audit(
        self, ctx: Context, network: MixtureOfRecursions, cases: Cases, index: np.ndarray, outcomes: RoutedOutcomes,
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
                network, some, outcomes.select(rows), cap, size=ctx.config.eval.batch_size, device=ctx.device,
                seed=self.config.seed,
            )  # fmt: skip
            for name, values in found.items():
                columns[name][where] = values
        return columns

    def _outcomes(
        self, ctx: Context, network: MixtureOfRecursions, batch: dict[str, Tensor], cap: int
    ) -> RoutedOutcomes:
        """A batch of windows, a few at a time."""
        size, parts = max(1, ctx.config.eval.batch_size), []
        for a in range(0, len(batch["tokens"]), size):
            tokens, targets, lengths = (
                batch[k][a : a + size].to(ctx.device) for k in ("tokens", "targets", "length")
            )
            routed = network(
                tokens,
                self._route(ctx, network, tokens),
                lengths=lengths,
                cap=cap,
                kv_mode=network.config.memory,
            )
            parts.append(routed_outcomes(network, routed, targets))
        return RoutedOutcomes.concatenate(parts)

    def _time_tokens(self, ctx: Context, network: MixtureOfRecursions, cases: Cases, cap: int) -> None:
        """Time the decoding of single tokens, each after the beginning of a document; nothing where a route looks ahead."""
        for i in ctx.meter.requests(len(cases)):
            batch = cases.batch(np.array([i]))
            text = batch["tokens"][0, : min(int(batch["length"][0]), PROMPT)]
            route = self._route(ctx, network, text[None].to(ctx.device))
            if route is not None and route.looks_ahead:
                return
            rule = HaltingRule(network, route, cap)
            past = MoRCache(network).open()
            if len(text) > 1:
                prefill(network, past, text[:-1], rule, read="none")
            with ctx.meter.request():
                int(step(network, [past], [int(text[-1])], [rule])[0].argmax())

    def _route(self, ctx: Context, network: MixtureOfRecursions, tokens: Tensor) -> Route | None:
        fitted = profile_thresholds(ctx.calibration, network.config.profile)
        return evaluation_route(network.config, network.recursions, tokens, fitted, self.config.seed)

    # --- baselines ------------------------------------------------------------------------

    def baselines(self, ctx: Context, split: Examples) -> dict[str, Evaluation]:
        """``unigram``: the most frequent token of training; ``bigram``: the token that most often followed the last one there."""
        cases, data = cast(Cases, split), cast(TextSplits, ctx.data)
        found = {}
        for name, columns in NGramModel(data.train, data.tokens.size).by_document(cases).items():
            columns |= {"bits": language.bits(columns["nll"]), "depth_used": np.zeros(len(cases))}
            rows = {"id": pa.array(cases.id.tolist(), pa.string()), "bytes": cases.bytes, **columns}
            found[name] = Evaluation(pa.table(rows), language.ACCURACY, language.METRICS)
        return found

    # --- generation -------------------------------------------------------------------------------

    def predict(
        self, ctx: Context, model: nn.Module, requests: Sequence[dict[str, Any]], depth: int
    ) -> list[dict[str, Any]]:
        """Continue ``{"prompt": text, "tokens": 64}``; also ``"depth"``, ``"temperature"``, ``"top_p"`` and ``"seed"``.

        Each reply: ``{"text", "tokens", "depth", "stopped"}``: the generated text, its number of tokens, the mean
        recursions per token, and whether the end of a document stopped it. ``"depth": n`` in a request caps its
        recursions, else the run's depth does; ``"profile"`` chooses the thresholds. ``{"replay": record}``, of
        ``audit.jsonl`` (``mor.record``), generates a text again. An invalid request gets ``{"error": ...}``.
        """
        network = cast(MixtureOfRecursions, model)
        if network.config.route == "topk":
            raise ConfigError(
                "mor.route=topk looks ahead: which tokens it chooses depends on tokens that are not written yet.",
                "Use thresholds: reason evaluate RUN mor.route=threshold, then predict with that run.",
            )
        with torch.inference_mode():
            return RequestHandler(ctx, network, depth).all(requests)

    # --- inspection -------------------------------------------------------------------------------

    def inspect(self, ctx: Context, model: nn.Module, example: str) -> list[Figure]:
        """A test document coloured by depth, and where depth was well spent ('' = one of median length)."""
        from reason.methods.mor.show import figures

        return figures(self.config, ctx, cast(MixtureOfRecursions, model), example)


def _overall(rows: pa.Table) -> dict[str, float]:
    """The share of tokens for which an output of a router was not finite; where the data has levels of difficulty, the
    AUROC of depth for difficult tokens against easy ones; and the results of the audit."""

    def column(name: str) -> float:
        return float(rows.column(name).to_numpy().sum())

    found = {"fallbacks": column("fallbacks") / max(column("tokens"), 1)}
    steps = [name.removeprefix("easy_at_") for name in rows.column_names if name.startswith("easy_at_")]
    easy, hard = (np.array([column(f"{kind}_at_{r}") for r in steps]) for kind in ("easy", "hard"))
    if easy.sum() and hard.sum():
        found["auroc of depth"] = auroc_of_counts(hard, easy)
    return found | audit.overall(column)
