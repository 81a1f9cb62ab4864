"""The training loop: plain torch, the same on one CPU and on many GPUs.

Every random number is a function of (seed, step, rank, micro-batch), and the order of examples
one of (seed, epoch); so a run that is killed and resumed goes the way it would have gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from reason.engine.checkpoint import Checkpoints
from reason.engine.evaluation import judge_validation
from reason.engine.parallel import Objective, World, totals, whole, without_sync
from reason.errors import RunError
from reason.methods.base import Context, Losses, Method, Step
from reason.tracking.result import Training


@dataclass
class Progress:
    """What the loop tells whoever watches."""

    step: int
    steps: int
    epoch: float
    loss: float | None = None
    valid: float | None = None


class Trainer:
    """Trains ``objective`` in ``world``; resumes from ``checkpoints`` when there are any."""

    def __init__(
        self, method: Method, network: nn.Module, ctx: Context, world: World, checkpoints: Checkpoints,
        watch: Callable[[Progress], None] = lambda _: None,
    ):  # fmt: skip
        self.method, self.network, self.ctx, self.world = method, network, ctx, world
        self.checkpoints, self.watch = checkpoints, watch
        self.config = ctx.config.train
        self.wrapped = world.wrap(Objective(method, network))
        self.optimizer = _optimizer(self.config, method.param_groups(network))
        examples, least = len(ctx.data.train), world.size * self.config.accumulate
        if examples < least:
            raise RunError(
                f"{examples} training examples are too few for {least} micro-batches.",
                "Use fewer ranks, train.accumulate=1 or more data.",
            )
        # A last batch that is not full is left out (each epoch another one), so that the number of
        # steps does not depend on how a batch is cut.
        self.per_epoch = max(examples // self.config.batch_size, 1)
        self.steps = self.config.steps or self.config.epochs * self.per_epoch
        self.every = self.config.every or self.per_epoch

    def fit(self) -> Training:
        """Train to the end of the plan or until validation stops gaining; leaves the best weights in place."""
        state = self.checkpoints.load(self.wrapped, self.optimizer) or {
            "step": 0, "best_step": None, "best_valid": None, "bad": 0, "stopped": "", "notes": [],
        }  # fmt: skip
        step = state["step"]
        self.network.train()
        for index in self._batches(step):
            if step >= self.steps or state["stopped"]:
                break
            total = self._step(index, step)
            step += 1
            self.watch(Progress(step, self.steps, step / self.per_epoch, loss=total))
            if step % self.every == 0 or step == self.steps:
                self._validate(step, state)
                state |= {"step": step}
                if self.config.patience and state["bad"] >= self.config.patience:
                    state["stopped"] = "early"
                if problem := self.checkpoints.save(step, self.wrapped, self.optimizer, state):
                    state["notes"].append(f"the checkpoint of step {step} could not be written: {problem}")
        if state["best_step"] is not None:
            self.checkpoints.load_best(state["best_step"], self.wrapped)
        best = state["best_step"]
        return Training(
            step, step / self.per_epoch, best, best / self.per_epoch if best else None, state["best_valid"],
            state["stopped"] or "planned", state["notes"],
            parameters=sum(p.numel() for p in self.network.parameters() if p.requires_grad),
        )  # fmt: skip

    # --- one optimiser step ------------------------------------------------------------------

    def _batches(self, step: int) -> Iterator[np.ndarray]:
        """Indices of the global batches from ``step`` on, for ever."""
        while True:
            epoch, within = divmod(step, self.per_epoch)
            rng = np.random.default_rng([self.ctx.config.seed, epoch])
            order = self.ctx.data.train.order(rng, self.config.batch_size)
            for first in range(within, self.per_epoch):
                yield order[first * self.config.batch_size : (first + 1) * self.config.batch_size]
                step += 1

    def _step(self, index: np.ndarray, step: int) -> float:
        """One optimiser step on the examples ``index``, over all ranks. Returns the total loss."""
        k, rank = self.config.accumulate, self.world.rank
        shares = np.array_split(index, self.world.size * k)[rank * k : (rank + 1) * k]
        batches = [self._to_device(self.ctx.data.train.batch(share)) for share in shares]
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * group.get("lr_scale", 1.0) * self._schedule(step)

        denominators = None
        if k > 1:  # known before the first backward pass, so that nothing need be kept alive
            each = [self.method.counts(self.network, b, self._place(step, m)) for m, b in enumerate(batches)]
            denominators = totals(self.world, {n: sum(c[n] for c in each) for n in each[0]})
        sums: dict[str, float] = {}
        for micro, batch in enumerate(batches):
            place = self._place(step, micro)
            with without_sync(self.wrapped, last=micro == k - 1):
                with self._autocast():
                    losses: Losses = self.wrapped(batch, place)
                if denominators is None:
                    denominators = totals(self.world, {n: float(c) for n, (_, c) in losses.items()})
                # Both wrappers average gradients over ranks; our sums are already over ranks.
                scaled = [s * (self.world.size / max(denominators[n], 1e-12)) for n, (s, _) in losses.items()]
                torch.stack(scaled).sum().backward()
            for name, (s, _) in losses.items():
                sums[name] = sums.get(name, 0.0) + float(s.detach())
        assert denominators is not None
        sums = totals(self.world, sums)
        terms = {n: s / max(denominators[n], 1e-12) for n, s in sums.items()}
        total = sum(terms.values())
        if not math.isfinite(total):
            named = ", ".join(f"{n} {v:.4g}" for n, v in terms.items())
            raise RunError(
                f"The loss is not finite at step {step + 1} ({named}).",
                f"Lower train.lr ({self.config.lr:g}), set train.clip, or check the loss terms named above.",
            )
        norm = self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(self.network, self._place(step, 0))
        for name, term in terms.items():
            self.ctx.log(f"train/{name}", term, step + 1)
        self.ctx.log("train/loss", total, step + 1)
        self.ctx.log("train/lr", self.optimizer.param_groups[0]["lr"], step + 1)
        self.ctx.log("train/grad_norm", norm, step + 1)
        return total

    def _place(self, step: int, micro: int) -> Step:
        """Where training stands, with all randomness of this micro-batch set by its coordinates."""
        words = np.random.SeedSequence([self.ctx.config.seed, step, self.world.rank, micro]).generate_state(2)
        torch.manual_seed(int(words[0]))
        generator = torch.Generator(self.world.device).manual_seed(int(words[1]))
        return Step(step // self.per_epoch, step, step / self.steps, generator)

    def _to_device(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.to(self.world.device, non_blocking=True) for k, v in batch.items()}

    def _autocast(self):
        if self.config.precision == "bf16":
            return torch.autocast(self.world.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def _clip(self) -> float:
        parameters = [p for p in self.wrapped.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.clip or math.inf)
        full = getattr(norm, "full_tensor", None)
        return float(full() if full else norm)

    def _schedule(self, step: int) -> float:
        """The learning rate's factor for the step after ``step`` complete ones."""
        c, done = self.config, step / self.steps
        if c.warmup and done < c.warmup:
            return (step + 1) / (c.warmup * self.steps + 1)
        through = (done - c.warmup) / max(1 - c.warmup, 1e-12)
        if c.schedule == "linear":
            return 1 - through
        if c.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * through))
        if c.schedule == "trapezoid" and c.cooldown and done > 1 - c.cooldown:
            return (1 - done) / c.cooldown
        return 1.0

    # --- validation --------------------------------------------------------------------------

    def _validate(self, step: int, state: dict[str, Any]) -> None:
        """Judge at train_depth on validation; keep the weights if they are the best so far."""
        ctx, depth = self.ctx, self.ctx.config.train_depth
        with whole(self.wrapped):
            judged = judge_validation(self.method, ctx, self.world, self.network, ctx.data.valid, depth)
        value, best = judged.accuracy, state["best_valid"]
        better = best is None or (value > best if judged.larger_is_better else value < best)
        if better:
            if problem := self.checkpoints.save_best(step, self.wrapped):
                state["notes"].append(f"the best weights (step {step}) could not be written: {problem}")
            else:
                state |= {"best_step": step, "best_valid": value}
        state["bad"] = 0 if better else state["bad"] + 1
        self.ctx.log("valid/accuracy", value, step)
        self.watch(Progress(step, self.steps, step / self.per_epoch, valid=value))


def _optimizer(config: Any, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    groups = [{"weight_decay": config.weight_decay, **g} for g in groups]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.beta1)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr, betas=(config.beta1, config.beta2))
