"""Stages: a run whose weights begin as those of another experiment (``backbone.source=experiment:NAME``).

The experiment's finished run with the same seed is that stage, found by its hash; where there is none,
the runner makes it first, as a run of its own. A stage may have stages. Its digest is the hash of the
training that makes it, so it is known before the training is done, and a sweep can plan with it.

Importing this imports no torch: ``--dry-run`` shows the chain.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

from reason import registry
from reason.engine.config import resolve
from reason.engine.plan import Plan
from reason.errors import ConfigError
from reason.tracking.folder import FINISHED, RUNNING, RunFolder

PREFIX = "experiment:"


@dataclass(frozen=True)
class Stage:
    """A run that another one begins with."""

    key: str  # the key that names it, such as "backbone.source"
    plan: Plan

    @property
    def train_hash(self) -> str:
        """Which model it is. Reads the data of the stage, not its model."""
        return self._hashes()[0]

    def finished(self) -> RunFolder | None:
        """The newest finished run that trained this model."""
        done = [r for r in self._runs() if r.status == FINISHED]
        return max(done, key=lambda r: r.identity["created"], default=None)

    def unfinished(self) -> RunFolder | None:
        """A run of exactly this plan that was started and has not finished; one that is running comes first."""
        wanted = self._hashes()[1]
        found = [r for r in self._runs() if r.identity["config_hash"] == wanted and r.status != FINISHED]
        return max(found, key=lambda r: (r.status == RUNNING, r.identity["created"]), default=None)

    def _hashes(self) -> tuple[str, str]:
        from reason.engine.session import load_dataset

        return self.plan.hashes(load_dataset(self.plan).digest, source_digests(self.plan))

    def _runs(self) -> list[RunFolder]:
        wanted = (self.train_hash, None)
        root = self.plan.config.runs
        return RunFolder.scan(root, lambda r: (r["train_hash"], r["trained_by"]) == wanted)[0]


def stages_of(plan: Plan, made: Container[str] = ()) -> list[Stage]:
    """What a plan begins with, without what that begins with in turn.

    made: keys whose stages are left out, because it is known which runs they are.

    Raises:
        ConfigError: an experiment that does not exist.
    """
    return [
        Stage(key, _stage_plan(plan, key, source.removeprefix(PREFIX)))
        for key, source in plan.sources.items()
        if source.startswith(PREFIX) and key not in made
    ]


def chain(plan: Plan) -> list[Stage]:
    """Every stage that a plan stands on, in the order in which they are made.

    Raises:
        ConfigError: an experiment that does not exist, or experiments that begin with each other.
    """
    found: dict[str, Stage] = {}

    def walk(here: Plan, above: tuple[str, ...]) -> None:
        for stage in stages_of(here):
            name = stage.plan.experiment
            if name in above:
                raise ConfigError(
                    f"The experiments start from each other: {' -> '.join((*above, name))}.",
                    "Give one of them another backbone.source.",
                )
            if name not in found:
                walk(stage.plan, (*above, name))
                found[name] = stage

    walk(plan, (plan.experiment,))
    return list(found.values())


def source_digests(plan: Plan, made: Mapping[str, str] | None = None) -> dict[str, str]:
    """Of what each of the plan's sources holds.

    made: the digests of stages that are known, by key: they were made and will not be made again.
    """
    digests = dict(made or {})
    digests |= {stage.key: f"{PREFIX}{stage.train_hash}" for stage in stages_of(plan, digests)}
    for key, source in plan.sources.items():
        if key not in digests:
            digests[key] = registry.resolve(plan.opener(key))(source, plan.config.offline).digest
    return digests


def _stage_plan(plan: Plan, key: str, name: str) -> Plan:
    """The experiment ``name`` as it stands, with the seed, devices and folders of the run that begins with it."""
    taken = ("seed", "runs", "offline")
    flags = {k: v for k, v in plan.flat.items() if k in taken or k.startswith("hardware.")}
    try:
        return resolve(name, flags=flags)
    except ConfigError as error:
        raise ConfigError(f"{key}={PREFIX}{name}: {error.message}", error.hint) from error
