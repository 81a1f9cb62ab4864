"""What every method keeps, whatever it is: run over the whole registry, on tiny data."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from reason import registry
from reason.engine import runner
from reason.engine.config import resolve
from reason.engine.describe import comments
from reason.engine.evaluation import judge
from reason.engine.parallel import World
from reason.engine.session import Session, load_dataset
from reason.methods.base import Step
from reason.methods.figures import HeatMap, Lines, Table, Tokens

METHODS = registry.names("methods")
HERE = World(0, 1, torch.device("cpu"))
pytestmark = pytest.mark.parametrize("name", METHODS)


@pytest.fixture
def tiny(name, tiny_by_view):
    """Words that make a run of the method take about a second."""
    return tiny_by_view[registry.card("methods", name).view]


def plan(name, tiny, *words):
    return resolve(name, [*tiny, *words], environ={})


def execute(name, tiny, *words):
    """A run without a tracker: its folder."""
    p = plan(name, tiny, *words)
    folder = runner.prepare(p, load_dataset(p).digest)
    runner.work({"folder": str(folder.path), "device": "cpu", "quiet": True})
    assert folder.result
    return folder


def session(name, tiny, *words):
    Path("work").mkdir(exist_ok=True)
    return Session.begin(plan(name, tiny, *words), HERE, Path("work"))


def numbers(folder):
    """All that must be reproducible in a result: accuracies, metrics and cost at every depth."""
    return [
        {k: e[k] for k in ("depth", "accuracy", "valid_accuracy", "metrics", "cost", "effective_depth")}
        for e in folder.result["curve"]
    ]


def test_a_tiny_run_takes_seconds_and_repeats_itself(name, tiny):
    first = execute(name, tiny)
    start = time.process_time()
    second = execute(name, tiny)
    assert time.process_time() - start < 5
    assert numbers(first) == numbers(second)
    assert numbers(execute(name, tiny, "seed=1")) != numbers(first)


def test_resume_equals_uninterrupted(name, tiny, monkeypatch):
    words = ("train.every=2", "train.epochs=3")
    whole = execute(name, tiny, *words)
    from reason.engine.trainer import Trainer

    step = Trainer._step

    def killed(self, index, number):
        if number == 5:
            raise KeyboardInterrupt
        return step(self, index, number)

    p = plan(name, tiny, *words)
    cut = runner.prepare(p, load_dataset(p).digest)
    payload = {"folder": str(cut.path), "device": "cpu", "quiet": True}
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Trainer, "_step", killed)
        runner.work(payload)
    assert (cut / "checkpoints" / "step-4").exists() and cut.result is None
    runner.work(payload)
    assert numbers(cut) == numbers(whole)


def test_cost_never_falls_with_depth_and_rows_are_examples(name, tiny):
    s = session(name, tiny)
    least, most = s.plan.card.depth.least, s.plan.config.depth
    seen = [judge(s.method, s.ctx, HERE, s.network, s.ctx.data.test, d) for d in range(least, most + 1)]
    for lower, higher in itertools.pairwise(seen):
        assert lower.evaluation.cost.keys() == higher.evaluation.cost.keys()
        for counter, cost in lower.evaluation.cost.items():
            assert higher.evaluation.cost[counter] >= cost, counter
        assert higher.effective_depth >= lower.effective_depth
    for judged in seen:
        rows = judged.evaluation.rows
        assert rows.num_rows == len(s.ctx.data.test) == len(set(rows.column("id").to_pylist()))
        for ratio in judged.evaluation.metrics.values():
            assert np.isfinite(rows.column(ratio.numerator).to_numpy()).all()


def test_a_limit_judges_a_spread_of_examples(name, tiny):
    s = session(name, tiny)
    whole = judge(s.method, s.ctx, HERE, s.network, s.ctx.data.test, 1).evaluation.rows
    few = judge(s.method, s.ctx, HERE, s.network, s.ctx.data.test, 1, limit=7).evaluation.rows
    assert few.num_rows == 7
    at = {key: i for i, key in enumerate(whole.column("id").to_pylist())}
    places = [at[key] for key in few.column("id").to_pylist()]
    assert places[0] == 0 and places[-1] == whole.num_rows - 1
    column = s.method.evaluate(s.ctx, s.network.eval(), s.ctx.data.test, 1)
    name_ = column.metrics[column.accuracy].numerator
    np.testing.assert_allclose(
        few.column(name_).to_numpy(), whole.column(name_).to_numpy()[places], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("train_depth", [0, 2])
def test_every_parameter_is_reached(name, tiny, train_depth):
    s = session(name, tiny, f"train_depth={train_depth}")
    generator = torch.Generator().manual_seed(0)
    batch = s.ctx.data.train.batch(np.arange(8))
    s.network.train()
    losses = s.method.loss(s.network, batch, Step(0, 0, 0.0, generator))
    torch.stack([total / count for total, count in losses.values()]).sum().backward()
    for key, p in s.network.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, key
    listed = [p for group in s.method.param_groups(s.network) for p in group["params"]]
    assert len(listed) == len({id(p) for p in listed}) == len(list(s.network.parameters()))


def test_counts_are_those_of_the_loss(name, tiny):
    from reason.methods.base import Method

    s = session(name, tiny)
    batch = s.ctx.data.train.batch(np.arange(5))
    place = Step(0, 0, 0.0, torch.Generator().manual_seed(0))
    assert s.method.counts(s.network, batch, place) == Method.counts(s.method, s.network, batch, place)


def test_inspect_and_baselines(name, tiny):
    s = session(name, tiny)
    with torch.no_grad():
        s.ctx.calibration = s.method.calibrate(s.ctx, s.network.eval(), s.ctx.data.valid)
        figures = s.method.inspect(s.ctx, s.network, "")
    assert figures and all(isinstance(f, (Table, Lines, HeatMap, Tokens)) for f in figures)
    own = s.method.evaluate(s.ctx, s.network, s.ctx.data.test, 1)
    rivals = s.method.baselines(s.ctx, s.ctx.data.test)
    assert rivals
    for rival in rivals.values():
        assert rival.accuracy == own.accuracy
        assert rival.rows.column("id").to_pylist() == own.rows.column("id").to_pylist()


def test_the_card_is_light_and_its_keys_are_explained(name, tiny):
    code = f"import sys; from reason import registry; registry.card('methods', {name!r}); print('torch' in sys.modules or 'numpy' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"
    card = registry.card("methods", name)
    told = comments(card.Config)
    assert [f.name for f in dataclasses.fields(card.Config) if not told.get(f.name)] == []
