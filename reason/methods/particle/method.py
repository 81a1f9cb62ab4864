"""Particle filtering as a method: what its stages train, how it is judged beside its rivals, how it answers.

Puri et al., arXiv 2502.01618. A run of the stage ``solve`` trains nothing: a policy writes, a reward judges, and ``depth``
particles are resampled. The stages before it, ``policy`` and ``value``, are runs of their own that train these two.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional as F

from reason.backbones.causal import FOLDER, Causal, opened
from reason.backbones.from_run import MODEL
from reason.backbones.tokens import Tokens
from reason.datasets.packing import IGNORE
from reason.datasets.problems import Problems, ProblemSplits, ending
from reason.datasets.subsets import evenly_spaced
from reason.errors import ConfigError, DataError
from reason.files import append_json_lines
from reason.methods.base import TRACES, Context, Evaluation, Losses, Meter, Method, Ratio, Step
from reason.methods.figures import Figure
from reason.methods.particle import audit
from reason.methods.particle.answering import Answering, Inspection, answer_of
from reason.methods.particle.calibrate import fit as fit_reward
from reason.methods.particle.calibrate import quality, quality_by_depth
from reason.methods.particle.config import ParticleConfig
from reason.methods.particle.data import (
    ParticleSplits,
    Solutions,
    keep_rollouts,
    kept_rollouts,
    some_of,
)
from reason.methods.particle.judging import ACCURACY, Samples, Spent, evaluation
from reason.methods.particle.network import (
    Policy,
    Served,
    opened_value,
    trained_on,
    write_trained_on,
    write_value,
)
from reason.methods.particle.rewards import refuse_known, refuse_seen
from reason.methods.particle.rollouts import Rollouts, collect
from reason.methods.particle.selection import Candidates, judge, solved
from reason.methods.particle.solver import Solver, prompt_of, sampling_of, stop_of
from reason.methods.particle.traces import trace
from reason.methods.particle.value import ValueHead

Run = Context[ParticleSplits]
FIT_SOLUTIONS = 8  # of each held-out problem, that a reward is calibrated on
TRACED = 5  # problems that are shown as traces: a store takes a second for each
MORE = 1.25  # plain samples for each particle, so that there are as many as equal tokens pay for


class Particle(Method[ParticleSplits, Problems, Policy]):
    """See the module."""

    @property
    def own(self) -> ParticleConfig:
        return self.config.particle

    # --- data and networks -----------------------------------------------------------------------

    def data(self, ctx: Run) -> ParticleSplits:
        found: ProblemSplits = ctx.dataset.problems()
        train, info = found.train, dict(found.info)
        if self.own.stage == "policy":
            tokens = self._tokens(ctx, found.train)
            train, fit = Solutions.of(
                found.train, tokens, prompt_of(self.own, tokens), self.config.backbone.context
            )
            if not len(train):
                raise DataError(
                    f"No training problem has a worked solution of at most {self.config.backbone.context:,} tokens to learn from.",
                    "Name the column of solutions (dataset.solution=COLUMN), or use a larger backbone.context.",
                )
            info |= {"solutions": len(fit)}
        elif self.own.stage == "value":
            train = self._rollouts(ctx, some_of(found.train, self.own.value.problems))
            info |= {
                "prefixes": len(train),
                "ended_right": round(float(train.label[train.finished].mean()), 4),
            }
        return ParticleSplits(train, found.valid, found.fit, found.test, info, found.train)

    def build(self, ctx: Run) -> Policy:
        stage = self.own.stage
        if stage == "policy":
            lm = self._trained_lm(ctx)
            if not isinstance(lm, Causal):
                raise ConfigError(
                    f"particle.stage=policy cannot go on training {lm.where}: it is a model of another method.",
                    "Train it with its own method, or use another backbone.source.",
                )
            if ctx.rank == 0:
                lm.write(ctx.workdir)
                if ctx.workdir == ctx.owner and not (ctx.workdir / MODEL).is_file():
                    write_trained_on(ctx.workdir, frozenset(p.fingerprint for p in ctx.data.trained_on))
            return Policy(lm, trains="lm")
        if self.own.server.url:
            return Policy(Served(self.own.server, self.config.offline))
        lm = self._lm(ctx)
        if stage == "value":
            head = ValueHead(lm.width, self.own.value.hidden)
            if ctx.rank == 0 and ctx.workdir == ctx.owner and not (ctx.workdir / MODEL).is_file():
                write_value(
                    ctx.workdir, head, self.own.value.hidden, self._policy_digest, ctx.data.train.seen
                )
            return Policy(lm, head, trains="head")
        if "value" not in self.own.reward.kinds:
            return Policy(lm)
        source = opened_value(self.own.reward.source, self.config.offline)
        if source.policy != self._policy_digest:
            raise ConfigError(
                f"The value head of {source.where} reads the states of another policy than {self.config.backbone.source}.",
                "Train a head on this policy (particle.stage=value with this backbone.source), or use the policy that it was "
                "trained on.",
            )
        return Policy(lm, source.load())

    @cached_property
    def _policy_digest(self) -> str:
        source = self.config.backbone.source
        return opened(source, self.config.offline).digest if source else ""

    def _lm(self, ctx: Run) -> Any:
        """The policy as it was found. Frozen, so one will do for the whole run."""
        if "lm" not in self.__dict__:
            source, torch_state = self.config.backbone.source, torch.get_rng_state()
            tokens = None if source else self._tokens(ctx, None)
            self.lm = ctx.open(tokens=tokens, offline=self.config.offline)
            if source:
                torch.set_rng_state(torch_state)
        return self.lm

    def _trained_lm(self, ctx: Run) -> Any:
        """The policy that this run trains: as its run keeps it, or at its beginning."""
        if (ctx.owner / MODEL).is_file() and (ctx.owner / FOLDER).is_dir():
            return ctx.open(kept=ctx.owner)
        return ctx.open(tokens=self._tokens(ctx, None), offline=self.config.offline)

    def _tokens(self, ctx: Run, train: Problems | None) -> Tokens:
        """The tokenizer: of the run's own model, of its source, or trained on the worked solutions."""
        if (ctx.owner / FOLDER).is_dir() and (ctx.owner / MODEL).is_file():
            return Tokens.from_folder(ctx.owner / FOLDER)
        keys = self.config.backbone
        if keys.source:
            return opened(keys.source, self.config.offline).tokens
        texts: list[str] = []
        if keys.tokenizer != "byte":
            found: Problems = ctx.dataset.problems().train if train is None else train
            texts = [p.prompt + ending(p) for p in found] or [""]
        return Tokens.train(texts, "bpe" if keys.tokenizer == "auto" else keys.tokenizer, keys.vocab)

    def _rollouts(self, ctx: Run, problems: Problems) -> Rollouts:
        """Solutions that the policy samples of ``problems``, sampled once and kept with the run."""
        own = self.own
        shaping = {k: v for k, v in asdict(own).items() if k in (
            "prompt", "system", "temperature", "top_p", "separator", "chunk", "steps", "length", "boxed", "value")}  # fmt: skip
        told = [self._policy_digest, self.config.seed, shaping, [p.fingerprint for p in problems]]
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        for folder in (ctx.workdir, ctx.owner):
            if (kept := kept_rollouts(folder, digest)) is not None:
                return kept
        lm = self._lm(ctx).to(ctx.device)
        prompt = prompt_of(own, lm.tokens)
        with torch.no_grad():
            found = collect(
                lm.batch(), sampling_of(own), stop_of(own), problems, [prompt(p) for p in problems],
                count=own.value.solutions, completions=own.value.completions, seed=self.config.seed, steps=own.steps,
                width=own.together,
            )  # fmt: skip
        if ctx.rank == 0:
            keep_rollouts(ctx.workdir, found, digest)
        return found

    # --- training -----------------------------------------------------------------------------------

    def loss(self, model: Policy, batch: dict[str, Tensor], step: Step) -> Losses:
        if self.own.stage == "value":
            assert model.head is not None
            return {**model.head.loss(batch)}
        return {"solution": _solution_loss(model, batch)}

    def counts(self, model: Policy, batch: dict[str, Tensor], step: Step) -> dict[str, float]:
        if self.own.stage == "value":
            return {"value": float(len(batch["label"]))}
        return {"solution": float((batch["targets"] != IGNORE).sum())}

    def param_groups(self, model: Policy) -> list[dict[str, Any]]:
        """Norms and biases have no weight decay."""
        trained = [p for p in model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.ndim > 1]},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def validate(self, ctx: Run, model: Policy, split: Problems, depth: int) -> Evaluation:
        """By the loss on validation problems: of their worked solutions, or of the ends of solutions of the policy's own."""
        problems = split.take(ctx.shard(len(split)))
        total, count = np.zeros(len(problems)), np.zeros(len(problems))
        if self.own.stage == "value":
            assert model.head is not None
            known = [i for i, p in enumerate(problems) if p.judged]
            if known:
                rollouts = self._validation_rollouts(ctx, Problems(problems[i] for i in known))
                batch = rollouts.batch(np.arange(len(rollouts)))
                logits = model.head(batch["known"].to(ctx.device)).cpu()
                loss = F.binary_cross_entropy_with_logits(logits, batch["label"], reduction="none")
                where = np.array(known)[rollouts.problem]
                np.add.at(total, where, loss.double().numpy())
                np.add.at(count, where, 1.0)
        else:
            tokens = model.lm.tokens
            rows, where = Solutions.of(problems, tokens, prompt_of(self.own, tokens), model.lm.context)
            size = self.config.eval.batch_size
            for a in range(0, len(rows), size):
                index = np.arange(a, min(a + size, len(rows)))
                batch = {name: t.to(ctx.device) for name, t in rows.batch(index).items()}
                loss = _token_losses(model, batch).sum(1).double().cpu().numpy()
                total[where[index]], count[where[index]] = (
                    loss,
                    (batch["targets"] != IGNORE).sum(1).cpu().numpy(),
                )
        rows_ = pa.table({
            "id": pa.array([p.id for p in problems], pa.string()), "depth_used": np.zeros(len(problems)), "loss": total,
            "counted": count,
        })  # fmt: skip
        return Evaluation(rows_, "Loss", {"Loss": Ratio("loss", "counted", larger_is_better=False)})

    def _validation_rollouts(self, ctx: Run, problems: Problems) -> Rollouts:
        """Half as many problems as the head learns from, sampled once."""
        if "held" not in self.__dict__:
            lm = self._lm(ctx)
            prompt = prompt_of(self.own, lm.tokens)
            with torch.no_grad():
                self.held = collect(
                    lm.batch(), sampling_of(self.own), stop_of(self.own), problems, [prompt(p) for p in problems],
                    count=2, seed=self.config.seed, steps=self.own.steps, width=self.own.together,
                )  # fmt: skip
        return self.held

    # --- what is fitted ------------------------------------------------------------------------------

    def check(self, ctx: Run, model: Policy) -> None:
        """Refuse a reward that has seen what it is tested on, and problems that nobody can judge."""
        data = ctx.data
        if not any(problem.judged for problem in data.test):
            raise DataError(
                "None of the test problems has an answer, so nothing can be judged.",
                "Name the column of answers (dataset.answer=COLUMN). `reason predict` solves problems without answers.",
            )
        solver = Solver(self.config, model)
        judged = [*data.valid, *data.fit, *data.test]
        refuse_seen(solver.raw_reward, judged)
        if self.config.backbone.source:
            known = trained_on(self.config.backbone.source)
            refuse_known("The policy was trained", "the policy", known, judged)

    def calibrate(self, ctx: Run, model: Policy, fit: Problems) -> dict[str, Any] | None:
        """How long solutions are, and how the reward is to be read, from samples of the held-out problems."""
        solver = Solver(self.config, model)
        problems = Problems(p for p in fit.take(evenly_spaced(len(fit), self.config.eval.limit)) if p.judged)
        if not len(problems):
            kind = self.own.fitting
            return {
                "notes": [f"The reward is not calibrated ({kind}): no held-out problem has an answer."]
                if kind
                else []
            }
        own = self.own
        rollouts = collect(
            solver.writer, solver.sampling, solver.stop, problems, [solver.prompt(p) for p in problems],  # type: ignore[arg-type]
            count=FIT_SOLUTIONS, seed=self.config.seed, reward=solver.raw_reward, steps=own.steps, width=own.together,
        )  # fmt: skip
        ends = rollouts.finished
        right = float(rollouts.label[ends].mean())
        found: dict[str, Any] = {
            "steps": float(rollouts.step[ends].mean()),
            "one_sample": right,
            "reward_quality": {str(d): q for d, q in quality_by_depth(rollouts).items()},
        }
        notes = (
            []
            if self.config.backbone.source or own.server.url or own.trains
            else ["the policy has random weights"]
        )
        notes += [f"one sample is right in {100 * right:.1f} % of {len(problems):,} held-out problems"]
        if own.reward.kinds != ("constant",):
            whole = quality(rollouts.reward, rollouts.label)
            area = f"AUROC {whole['auroc']:.3f}, " if "auroc" in whole else ""
            notes.append(
                f"reward on their prefixes: {area}calibration error {whole['ece']:.3f}; weighed by {own.weighing}"
            )
        if own.fitting:
            fitted = fit_reward(own.fitting, rollouts)
            found["reward"] = fitted.to_json()
            before, after = fitted.before["ece"], fitted.after["ece"]
            notes += [
                f"calibrated ({fitted.kind}): error {before:.3f} before, {after:.3f} after",
                *fitted.notes,
            ]
        return {**found, "notes": notes}

    # --- judging --------------------------------------------------------------------------------------

    def evaluate(self, ctx: Run, model: Policy, split: Problems, depth: int) -> Evaluation:
        return next(self.evaluate_depths(ctx, model, split, {depth: ctx.meter}))[1]

    def evaluate_depths(
        self, ctx: Run, model: Policy, split: Problems, meters: Mapping[int, Meter]
    ) -> Iterator[tuple[int, Evaluation]]:
        """Every depth with rivals from the same plain samples; beam search and DVTS have samples of their own."""
        problems = split.take(ctx.shard(len(split)))
        asks = self.own.reward.questions and ctx.rank == 0
        solver = Solver(self.config, model, ctx.calibration, ctx.workdir if asks else None)
        rivals = set(self.own.rivals)
        prompts = np.array([len(solver.prompt(p)) for p in problems], float)
        samples = None
        if "samples" in rivals:
            count = int(np.ceil(MORE * max(meters)))
            drawn = solver.run([solver.samples(p, count) for p in problems])
            samples = Samples(problems, [outcome.result for outcome in drawn], prompts)
        for depth, meter in meters.items():
            self._time(solver, meter, split, depth, rivals)
            spent: list[int] = []
            with meter.batch(lambda spent=spent: sum(spent)):
                found = solver.run([solver.filtered(p, depth) for p in problems])
                spent += [outcome.ledger.drawn for outcome in found]
            searches = {}
            for name, search in (("beam search", solver.beam), ("DVTS", solver.dvts)):
                if name.split()[0].lower() in rivals:
                    several = solver.run([search(p, depth) for p in problems])
                    cost = Spent.of([outcome.ledger for outcome in several], prompts)
                    searches[name] = [outcome.result for outcome in several], cost
            self._record(ctx, solver, split, problems, depth, found)
            uniform = np.array([solver.draws(p).uniforms("selection").random()[0] for p in problems])
            yield depth, evaluation(
                problems, depth, [solver.voters(outcome.result) for outcome in found],
                Spent.of([outcome.ledger for outcome in found], prompts), self.own.final_selection, uniform,
                solver.flops, samples, searches, monitored=depth == self.config.depth,
            )  # fmt: skip

    def _time(self, solver: Solver, meter: Meter, split: Problems, depth: int, rivals: set[str]) -> None:
        """Solve single problems, one by one, by the filter and by each rival."""
        for i in meter.requests(len(split)):
            problem = split[i]
            fresh = Solver(
                self.config, solver.policy, solver.calibration
            )  # it remembers no reward of the batch
            for name, task in (
                ("", fresh.filtered(problem, depth)),
                ("samples", fresh.samples(problem, depth)),
                ("beam", fresh.beam(problem, depth)),
                ("dvts", fresh.dvts(problem, depth)),
            ):
                if name and name not in rivals:
                    continue
                with meter.request(name):
                    fresh.run([task])

    def _record(
        self, ctx: Run, solver: Solver, split: Problems, problems: Problems, depth: int, found: Sequence[Any]
    ) -> None:  # fmt: skip
        """Write the first test problems of the run's depth into audit.jsonl, and as traces."""
        if not (self.own.record and ctx.rank == 0 and depth == self.config.depth and split is ctx.data.test):
            return
        path, seen = ctx.workdir / audit.FILE, ctx.workdir / TRACES
        path.unlink(missing_ok=True)
        seen.unlink(missing_ok=True)
        for number, (problem, outcome) in enumerate(
            list(zip(problems, found, strict=True))[: self.own.record]
        ):
            answer = answer_of(solver, problem, outcome.result)
            about = {"policy": self._policy_digest}
            rule = self.own.final_selection
            audit.write(path, problem, solver.recipe(problem, depth), outcome.result, about, (rule, answer))
            if number < TRACED:
                append_json_lines(seen, [trace(problem, outcome.result.chains[-1][-1], answer)])

    def baselines(self, ctx: Run, model: Policy, split: Problems, depth: int) -> dict[str, Evaluation]:
        """``greedy``: the most probable token, always; ``commonest answer``: of the training problems."""
        problems = split.take(ctx.shard(len(split)))
        solver = Solver(self.config, model, ctx.calibration)
        prompts = np.array([len(solver.prompt(p)) for p in problems], float)
        found = solver.run([solver.greedy(p) for p in problems])
        spent = Spent.of([outcome.ledger for outcome in found], prompts)
        greedy = Candidates.of([[outcome.result] for outcome in found])
        right = solved(greedy.select("majority"), greedy.correct(problems))
        return {
            "greedy": _baseline(problems, right, spent.cost(solver.flops, rewarded=False)),
            "commonest answer": _baseline(problems, self._commonest(ctx, problems), {}),
        }

    def _commonest(self, ctx: Run, problems: Problems) -> np.ndarray:
        answers = [p.answer for p in ctx.data.trained_on if p.answer is not None]
        if not answers:
            return np.zeros(len(problems))
        names, counts = np.unique(np.array(answers), return_counts=True)
        answer = str(names[counts.argmax()])
        return np.array([float(bool(right)) for right in judge(list(problems), [answer] * len(problems))])

    # --- answering and showing ---------------------------------------------------------------------

    def predict(
        self, ctx: Run, model: Policy, requests: Sequence[dict[str, Any]], depth: int
    ) -> list[dict[str, Any]]:
        """Solve ``{"problem": text}``; also ``"answer"``, ``"depth"``, ``"budget"`` (tokens) and ``"seed"``.

        Each reply: ``{"answer", "mass", "margin", "contested", "particles", "tokens", "status", "solution"}``: the answer, its share
        of the particles' weight, how far that is above the next, whether the best reward would answer otherwise, and
        the solution behind it; ``"right"`` where the answer is given. A bad request gets ``{"error": ...}``.
        """
        solver = Solver(self.config, model, ctx.calibration)
        return Answering(solver, depth, model.lm.flops_per_token, ctx.meter.now).all(requests)

    def inspect(self, ctx: Run, model: Policy, example: str) -> list[Figure]:
        """Who was copied from whom, and what the answer rests on.

        example: id of a test problem; a problem, ``{"problem": text}``; '' = one whose answer is the most contested of ten.
        """
        return Inspection(self.config, ctx, model).figures(example)


def _solution_loss(model: Policy, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    losses = _token_losses(model, batch)
    return losses.sum(), (batch["targets"] != IGNORE).sum()


def _token_losses(model: Policy, batch: dict[str, Tensor]) -> Tensor:
    """(n, T) nats, 0 where there is no target."""
    logits = model.lm(batch["tokens"])
    return F.cross_entropy(
        logits.transpose(1, 2).float(), batch["targets"], ignore_index=IGNORE, reduction="none"
    )


def _baseline(problems: Problems, right: np.ndarray, cost: dict[str, float]) -> Evaluation:
    judged = np.array([float(p.judged) for p in problems])
    rows = pa.table({
        "id": pa.array([p.id for p in problems], pa.string()), "depth_used": np.ones(len(problems)), "judged": judged,
        "exact": right * judged,
    })  # fmt: skip
    return Evaluation(rows, ACCURACY, {ACCURACY: Ratio("exact", "judged")}, cost)
