"""What a run learns from: worked solutions for the policy, prefixes of its own solutions for a value head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reason.backbones.tokens import Tokens
from reason.backbones.weights import read_tensors, write_tensors
from reason.datasets.packing import IGNORE
from reason.datasets.problems import Problem, Problems, ending
from reason.errors import DataError
from reason.methods.particle.rollouts import Rollouts

ROLLOUTS = "rollouts.safetensors"  # in the folder of a run that trains a value head


@dataclass(frozen=True)
class ParticleSplits:
    """The four uses of problems. train: what ``Method.loss`` reads; where nothing is trained, the problems."""

    train: Any  # Solutions, Rollouts or Problems
    valid: Problems
    fit: Problems
    test: Problems
    info: dict[str, Any] = field(default_factory=dict)
    trained_on: Problems = field(default_factory=Problems)  # the training problems themselves


class Solutions:
    """Worked solutions, one a row: the prompt is read, the solution and its end are learnt.

    Args:
        prompts: token ids. bodies: of the solutions, with the token that ends them.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], bodies: Sequence[Sequence[int]], pad: int):
        self._rows = [[*p, *b] for p, b in zip(prompts, bodies, strict=True)]
        self._first = np.array([len(p) for p in prompts], np.int64)
        self._pad = pad

    @classmethod
    def of(
        cls, problems: Sequence[Problem], tokens: Tokens, prompt: Callable[[Problem], list[int]], context: int
    ) -> tuple[Solutions, np.ndarray]:
        """Those of ``problems`` that have a solution which fits, and which these are (n,)."""
        solved = [i for i, problem in enumerate(problems) if problem.solution]
        prompts = [prompt(problems[i]) for i in solved]
        bodies = [ids for ids, _ in tokens.encode([ending(problems[i]) for i in solved])] if solved else []
        fits = [k for k in range(len(solved)) if len(prompts[k]) + len(bodies[k]) < context]
        some = cls([prompts[k] for k in fits], [[*bodies[k], tokens.eos] for k in fits], tokens.eos)
        return some, np.array([solved[k] for k in fits], np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def order(self, rng: np.random.Generator, batch_size: int) -> np.ndarray:
        return rng.permutation(len(self))

    def batch(self, index: np.ndarray) -> dict[str, Tensor]:
        """tokens and targets (n, T), padded at the right; a target is the next token, or -100 in the prompt and the pad."""
        rows = [self._rows[i] for i in index]
        width = max(map(len, rows), default=1) - 1
        tokens = torch.full((len(rows), width), self._pad)
        targets = torch.full((len(rows), width), IGNORE)
        for k, (i, row) in enumerate(zip(index, rows, strict=True)):
            first = int(self._first[i])
            tokens[k, : len(row) - 1] = torch.tensor(row[:-1])
            targets[k, first - 1 : len(row) - 1] = torch.tensor(row[first:])
        return {"tokens": tokens, "targets": targets}


def kept_rollouts(folder: Path, digest: str) -> Rollouts | None:
    """Rollouts that a run has sampled already, if they are of this policy and these settings.

    digest: of what they depend on.
    """
    try:
        tensors, told = read_tensors(folder / ROLLOUTS)
    except Exception:  # absent, torn or damaged: they are sampled again
        return None
    if told is None or told.get("digest") != digest:
        return None
    columns = {
        name: tensors[name].numpy() for name in ("label", "step", "problem", "finished", "reward", "members")
    }
    return Rollouts(tensors["known"], **columns, fingerprints=tuple(told["fingerprints"]))


def keep_rollouts(folder: Path, rollouts: Rollouts, digest: str) -> None:
    tensors = {name: torch.from_numpy(np.ascontiguousarray(getattr(rollouts, name))) for name in (
        "label", "step", "problem", "finished", "reward", "members")}  # fmt: skip
    aside = folder / f".{ROLLOUTS}"
    write_tensors(
        aside,
        {"known": rollouts.known, **tensors},
        {"digest": digest, "fingerprints": list(rollouts.fingerprints)},
    )
    aside.replace(folder / ROLLOUTS)


def some_of(problems: Problems, count: int) -> Problems:
    """The first ``count`` problems; 0 = all.

    Raises:
        DataError: none of them has an answer to learn from.
    """
    known = Problems(p for p in problems if p.judged)
    if not len(known):
        raise DataError(
            "No training problem has an answer, so there is nothing to learn a value head from.",
            "Name the column of answers (dataset.answer=COLUMN), or use another reward.",
        )
    return known[:count] if count else known
