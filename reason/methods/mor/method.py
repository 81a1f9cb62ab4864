"""Mixture-of-Recursions as a method: training, evaluation, and generation.

Bae et al., arXiv 2507.10524. Reported numbers come from routes that do not look ahead: thresholds calibrated on
validation text for expert-choice, the token's own choice for token-choice. Top-k, by which expert-choice is trained, is
available (``mor.route=topk``); the run then notes that it looks ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from reason.backbones.from_run import read_network, write_network
from reason.backbones.pretrained import Pretrained, opened
from reason.backbones.tokens import Tokens
from reason.datasets.ngrams import NGramModel
from reason.datasets.packing import Cases, TextSplits
from reason.errors import ConfigError, DataError
from reason.methods.base import Context, Evaluation, Losses, Method, Step
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
from reason.methods.mor.token_selection import Route, evaluation_route
from reason.metrics import language
from reason.metrics.association import auroc_of_counts

PROMPT = 64  # tokens at most before the one whose decoding is timed


Run = Context[TextSplits[Tokens]]


class Mor(Method[TextSplits[Tokens], Cases, MixtureOfRecursions]):
    """See the module. ``train_depth=0`` is the vanilla decoder."""

    def data(self, ctx: Run) -> TextSplits[Tokens]:
        corpus, keys, info = ctx.dataset.text(), self.config.backbone, ctx.dataset.info
        if (trained := read_network(ctx.owner)) is not None:
            tokens = trained[-1]
        elif (source := self._source()) is not None:
            tokens, note = source.tokens, self._layout(source).note
            info = {**info, "source": source.where} | ({"layers": note} if note else {})
        else:
            kind = keys.tokenizer if keys.tokenizer != "auto" else "word" if corpus.words else "bpe"
            tokens = Tokens.train(corpus.train.text, kind, keys.vocab)
        return TextSplits(corpus, tokens, keys.context, self.config.dataset.fit, info)

    def build(self, ctx: Run) -> MixtureOfRecursions:
        recursions, backbone = max(self.config.train_depth, 1), self.config.backbone
        mor = self.config.mor if self.config.train_depth else type(self.config.mor)(routing="none")
        source = teacher = None
        if (trained := read_network(ctx.owner)) is not None:
            shape, lora, _ = trained
            decoder = ctx.open(shape=shape, recursions=recursions, lora=lora)
        elif (source := self._source()) is None:
            shape = backbone.shape(ctx.data.tokens.size)
            decoder = ctx.open(shape=shape, recursions=recursions, lora=mor.lora)
        else:
            decoder = convert(source, self._layout(source), ctx.open, mor.lora)
            teacher = Teacher(source)
        if ctx.rank == 0:
            lora = 0 if decoder.corrections is None else mor.lora
            write_network(ctx.workdir, decoder, self._tokens(ctx), lora=lora, routing=mor.routing)
        return MixtureOfRecursions(decoder, mor, backbone.init_std, teacher, bool(backbone.source))

    def _tokens(self, ctx: Run) -> Tokens:
        """The tokenizer: the one that the run keeps, so that it generates without its data."""
        trained = read_network(ctx.owner)
        return ctx.data.tokens if trained is None else trained[-1]

    def _source(self) -> Pretrained | None:
        """The pretrained model to convert, opened once per process."""
        source = self.config.backbone.source
        return opened(source, self.config.offline) if source else None

    def _layout(self, source: Pretrained) -> Layout:
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

    def loss(self, model: MixtureOfRecursions, batch: dict[str, Tensor], step: Step) -> Losses:
        return objective.losses(model.config, model, batch, step)

    def counts(self, model: MixtureOfRecursions, batch: dict[str, Tensor], step: Step) -> dict[str, float]:
        state = step.generator.get_state()
        found = objective.counts(model.config, model, batch, step)
        step.generator.set_state(state)  # the loss of this batch draws the same random numbers
        return found

    def param_groups(self, model: MixtureOfRecursions) -> list[dict[str, Any]]:
        """Norms have no weight decay. Auxiliary routers, which learn from their own targets alone, have ten times the
        learning rate."""
        foreseers = [p for router in model.foreseers for p in router.parameters()]
        apart = {id(p) for p in foreseers}
        rest = [p for p in model.parameters() if id(p) not in apart]
        groups = [
            {"params": [p for p in rest if p.ndim > 1]},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
            {"params": foreseers, "lr_scale": 10.0},
        ]
        return [group for group in groups if group["params"]]

    def after_step(self, model: MixtureOfRecursions, step: Step) -> None:
        if model.by_token is not None and model.config.balance == "bias":
            load = model.take_load()
            model.bias.copy_(balance_bias(model.bias, load, model.config.balance_rate))

    # --- evaluation -------------------------------------------------------------------------------

    def check(self, ctx: Run, model: MixtureOfRecursions) -> None:
        """Raises DataError where the text does not fill one batch."""
        windows, batch = len(ctx.data.train), self.config.train.batch_size
        if windows < batch and (self.config.train.steps or self.config.train.epochs):
            raise DataError(
                f"The training text fills {windows:,} windows of {self.config.backbone.context:,} tokens, fewer than one "
                f"batch takes ({batch:,}).",
                f"Use train.batch_size={windows} or less, a smaller backbone.context, or more text.",
            )

    def calibrate(self, ctx: Run, model: MixtureOfRecursions, held: Cases) -> dict[str, Any] | None:
        return fit(self.config, ctx, model, held)

    def evaluate(self, ctx: Run, model: MixtureOfRecursions, split: Cases, depth: int) -> Evaluation:
        """The loss of every token of each document, in windows of ``backbone.context`` tokens.

        Columns: id; bytes; those of ``outcomes.routed_columns``; ``audit.COLUMNS``: sums of the documents that were
        evaluated at all depths (``mor.audit``), 0 for the others.
        """
        cap = min(depth, model.recursions)
        mine, levels = ctx.shard(len(split)), split.levels
        audited = self._audited(ctx, model, split, cap)
        parts: list[dict[str, np.ndarray]] = []
        sizes, flops = decoder_flops(model), 0.0
        for index in split.batches(mine, ctx.config.eval.batch_size):
            batch = split.batch(index)
            with ctx.meter.batch(int(batch["length"].sum())):
                outcomes = self._outcomes(ctx, model, batch, cap)
            flops += forward_flops(model, sizes, outcomes.depth)
            parts.append(routed_columns(outcomes, batch, len(index), model.recursions, levels))
            parts[-1] |= self._audit(ctx, model, split, index, outcomes, cap, audited)
        self._time_tokens(ctx, model, split, cap)
        if not parts:  # a rank without a document has columns all the same
            batch = split.batch(mine)
            parts = [routed_columns(RoutedOutcomes.empty(), batch, 0, model.recursions, levels)]
            parts[0] |= {name: np.zeros(0) for name in audit.COLUMNS}
        columns = {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}
        spent = float(sum(r * columns[f"at_{r}"].sum() for r in range(1, model.recursions + 1)))
        rows = pa.table(
            {"id": pa.array([split.id[i] for i in mine], pa.string()), "bytes": split.bytes[mine], **columns}
        )
        cost = {"steps": spent, "tokens": float(columns["tokens"].sum()), "flops": flops}
        return Evaluation(rows, language.ACCURACY, language.metrics(levels), cost, _overall)

    def _audited(self, ctx: Run, network: MixtureOfRecursions, cases: Cases, cap: int) -> set[int]:
        """The documents whose depths are audited, on all ranks together."""
        if cap == 1:
            return set()
        sharded = replace(ctx, rank=0, world_size=1).shard(len(cases))
        return set(audit.sample_documents(sharded, network.config.audit, self.config.seed).tolist())

    def _audit(
        self, ctx: Run, network: MixtureOfRecursions, cases: Cases, index: np.ndarray, outcomes: RoutedOutcomes,
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
        self, ctx: Run, network: MixtureOfRecursions, batch: dict[str, Tensor], cap: int
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
                kv_mode=network.config.kv_mode,
            )
            parts.append(routed_outcomes(network, routed, targets))
        return RoutedOutcomes.concatenate(parts)

    def _time_tokens(self, ctx: Run, network: MixtureOfRecursions, cases: Cases, cap: int) -> None:
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

    def _route(self, ctx: Run, network: MixtureOfRecursions, tokens: Tensor) -> Route | None:
        fitted = profile_thresholds(ctx.calibration, network.config.profile)
        return evaluation_route(network.config, network.recursions, tokens, fitted, self.config.seed)

    # --- baselines ------------------------------------------------------------------------

    def baselines(
        self, ctx: Run, model: MixtureOfRecursions, split: Cases, depth: int
    ) -> dict[str, Evaluation]:
        """``unigram``: the most frequent token of training; ``bigram``: the token that most often followed the last one there."""
        data, cases, found = ctx.data, split.take(ctx.shard(len(split))), {}
        for name, columns in NGramModel(data.train, data.tokens.size).by_document(cases).items():
            columns |= {"bits": language.bits(columns["nll"]), "depth_used": np.zeros(len(cases))}
            rows = {"id": pa.array(cases.id.tolist(), pa.string()), "bytes": cases.bytes, **columns}
            found[name] = Evaluation(pa.table(rows), language.ACCURACY, language.METRICS)
        return found

    # --- generation -------------------------------------------------------------------------------

    def predict(
        self, ctx: Run, model: MixtureOfRecursions, requests: Sequence[dict[str, Any]], depth: int
    ) -> list[dict[str, Any]]:
        """Continue ``{"prompt": text, "tokens": 64}``; also ``"depth"``, ``"temperature"``, ``"top_p"`` and ``"seed"``.

        Each reply: ``{"text", "tokens", "depth", "stopped"}``: the generated text, its number of tokens, the mean
        recursions per token, and whether the end of a document stopped it. ``"depth": n`` in a request caps its
        recursions, else the run's depth does; ``"profile"`` chooses the thresholds. ``{"replay": record}``, of
        ``audit.jsonl`` (``mor.record``), generates a text again. An invalid request gets ``{"error": ...}``.
        """
        if model.config.route == "topk":
            raise ConfigError(
                "mor.route=topk looks ahead: which tokens it chooses depends on tokens that are not written yet.",
                "Use thresholds: reason evaluate RUN mor.route=threshold, then predict with that run.",
            )
        with torch.inference_mode():
            return RequestHandler(ctx, model, self._tokens(ctx), depth).all(requests)

    # --- inspection -------------------------------------------------------------------------------

    def inspect(self, ctx: Run, model: MixtureOfRecursions, example: str) -> list[Figure]:
        """A test document coloured by depth, and where depth was well spent ('' = one of median length)."""
        from reason.methods.mor.show import figures

        return figures(self.config, ctx, model, example)


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
