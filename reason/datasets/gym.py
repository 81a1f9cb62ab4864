"""Problems of reasoning-gym: a task by name, generated, with the task's own judge of answers.

Needs the extra ``gym``. The same seed gives the same problems under the same version of the library, which is part of
the digest. An answer is right where the task's ``score_answer`` gives it the full score of 1; the library's parts of a
point, for answers that are nearly right, are not given.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import re
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from typing import Any

import yaml

from reason.answers import stated
from reason.datasets.documents import SPLITS
from reason.datasets.generated import names
from reason.datasets.problems import Problem, ProblemData, Problems, finish, plain
from reason.datasets.subsets import unit
from reason.datasets.textconfig import GymConfig
from reason.errors import ConfigError, DataError, MissingExtra, unknown

SPARE = 3  # problems drawn for each that is asked for, at most: some tasks repeat themselves
OPTION = re.compile(r"(?:^|[,;\s]+)([A-Za-z_]\w*)=")


def load(config: GymConfig, offline: bool = False) -> ProblemData:
    """Generate the problems of ``config.task``. Nothing is fetched, so ``offline`` is moot.

    Raises:
        MissingExtra: reasoning-gym is not installed.
        ConfigError: no such task or option, or a value that the task refuses.
        DataError: the task has too few different problems.
    """
    try:
        factory = importlib.import_module("reasoning_gym.factory")
    except ImportError as error:
        raise MissingExtra("The dataset reasoning-gym needs the library of that name.", "gym") from error
    if config.task not in factory.DATASETS:
        raise unknown("task of reasoning-gym", config.task, factory.DATASETS)
    options = _options(config, factory.DATASETS[config.task][1])
    create = partial(factory.create_dataset, config.task, **options)
    seen: set[str] = set()
    parts = {split: Problems(_drawn(config, create, split, seen)) for split in reversed(SPLITS)}
    version = metadata.version("reasoning-gym")
    info = {"task": config.task, "reasoning_gym": version}
    notes = [f"The problems are those of reasoning-gym {version}; another version may have others."]
    name = f"{config.name}:{config.task}"
    return finish(name, {split: parts[split] for split in SPLITS}, config.fit, info, notes)


def _options(config: GymConfig, kind: type) -> dict[str, Any]:
    """``dataset.options`` as arguments of the task's configuration: key=value, values as in YAML."""
    parts = OPTION.split(config.options.strip())
    if parts[0].strip():
        raise ConfigError(
            f"dataset.options={config.options} is no list of key=value.",
            "For example dataset.options=min_terms=2,max_terms=4",
        )
    known = [f.name for f in dataclasses.fields(kind) if f.name not in ("seed", "size")]
    options = {}
    for key, text in zip(parts[1::2], parts[2::2], strict=True):
        if key not in known:
            raise unknown(f"option of {config.task}", key, known)
        try:
            options[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(
                f"dataset.options: {key}={text} cannot be read.", "Write it as YAML."
            ) from error
    return options


def _drawn(config: GymConfig, create: Callable, split: str, seen: set[str]) -> list[Problem]:
    """As many problems as ``split`` is to have, none of them among ``seen``, to which they are added."""
    wanted = getattr(config, f"{split}_documents")
    seed = int(unit(f"{config.task} {config.seed} {split}", "reasoning-gym") * 2**31)
    try:
        task = create(seed=seed, size=SPARE * wanted)
        entries = iter(task)
        first = next(entries)
    except (AssertionError, TypeError, ValueError) as error:
        raise ConfigError(
            f"The task {config.task} refuses its options: {error or type(error).__name__}.",
            f"Change dataset.options={config.options}"
            if config.options
            else "Choose another task: dataset.task=NAME",
        ) from error
    found: list[Problem] = []
    fresh = _fresh(itertools.chain([first], entries), seen)
    for name in names(split, wanted):
        entry = next(fresh, None)
        if entry is None:
            raise DataError(
                f"{config.task}: only {len(found):,} different problems were found for {split}; {wanted:,} are asked "
                f"for under dataset.{split}_documents.",
                "Ask for fewer, or give the task options that allow more.",
            )
        found.append(_problem(name, entry, task))
    return found


def _fresh(entries: Iterator[dict[str, Any]], seen: set[str]) -> Iterator[dict[str, Any]]:
    """Those whose question is not among ``seen``, to which it is added."""
    try:
        for entry in entries:
            if plain(entry["question"]) not in seen:
                seen.add(plain(entry["question"]))
                yield entry
    except IndexError:
        return  # so some tasks say that they have no more


def _problem(name: str, entry: dict[str, Any], task: Any) -> Problem:
    answer = entry["answer"] if isinstance(entry["answer"], str) else None
    solution = entry["metadata"].get("answer_cot") or ""
    if not isinstance(solution, str) or stated(solution) is None:
        solution = ""
    return Problem(name, entry["question"].strip(), answer, solution, score=partial(_right, task, entry))


def _right(task: Any, entry: dict[str, Any], answer: str) -> bool:
    """Whether the task gives ``answer`` its full score; what it cannot read is wrong."""
    try:
        return float(task.score_answer(answer, entry)) >= 1
    except Exception:  # of 106 judges, some trip over what is no answer at all
        return False
