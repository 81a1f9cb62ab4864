"""What every method keeps, whatever it is: run over the whole registry, on tiny data."""

from __future__ import annotations

import dataclasses
import io
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from reason import registry
from reason.engine import runner
from reason.engine.checkpoint import load_tensors
from reason.engine.config import resolve
from reason.engine.evaluation import judge, judge_depths
from reason.engine.meter import silent
from reason.engine.parallel import World
from reason.engine.session import Session, load_dataset, open_run
from reason.engine.worker import work
from reason.errors import RunError
from reason.keys import walk
from reason.methods.base import Step
from reason.reports.plots import draw_figures
from reason.reports.terminal import figure

PLUGINS = Path(__file__).parent.parent / "plugins"
FOREIGN = (
    "probe",
    "voting",
)  # of another distribution: weights that stay frozen; two networks and no training
STAGES = ("particle-policy",)  # experiments of a method that trains in stages
METHODS = [*registry.names("methods"), *FOREIGN, *STAGES]
HERE = World(0, 1, torch.device("cpu"))
pytestmark = pytest.mark.parametrize("name", METHODS)


@pytest.fixture(autouse=True)
def installed(name, monkeypatch):
    """The foreign distribution, where its methods are what is tested."""
    if name in FOREIGN:
        monkeypatch.syspath_prepend(str(PLUGINS))
        paths = [str(PLUGINS), *filter(None, [os.environ.get("PYTHONPATH")])]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
        registry._entries.cache_clear()
    yield
    if name in FOREIGN:
        registry._entries.cache_clear()


def card_of(name):
    return resolve(name, environ={}).card


@pytest.fixture
def tiny(name, tiny_by_view, installed):
    """Words that make a run of the method take about a second."""
    words = tiny_by_view[card_of(name).view]
    return [w for w in words if name not in FOREIGN or not w.startswith("backbone.")]


@pytest.fixture
def trains(name, tiny):
    """Only where a method trains."""
    if not plan(name, tiny).trains:
        pytest.skip(f"{name} trains nothing")


def plan(name, tiny, *words):
    return resolve(name, [*tiny, *words], environ={})


def execute(name, tiny, *words):
    """A run without a tracker: its folder."""
    p = plan(name, tiny, *words)
    folder = runner.prepare(p, load_dataset(p).digest)
    work({"folder": str(folder.path), "device": "cpu", "quiet": True})
    assert folder.result
    return folder


def session(name, tiny, *words):
    Path("work").mkdir(exist_ok=True)
    return Session.begin(plan(name, tiny, *words), HERE, Path("work"))


def numbers(folder):
    """All that must be reproducible in a result: accuracies, metrics and cost at every depth."""
    kept = ("accuracy", "valid_accuracy", "metrics", "cost")

    def told(outcome):
        return {k: getattr(outcome, k) for k in kept}

    return [
        {
            "depth": j.depth,
            "effective_depth": j.effective_depth,
            **told(j),
            "rivals": {n: told(r) for n, r in j.rivals.items()},
        }
        for j in folder.result.curve
    ]


def test_a_tiny_run_takes_seconds_and_repeats_itself(name, tiny):
    first = execute(name, tiny)
    start = time.process_time()
    second = execute(name, tiny)
    assert time.process_time() - start < 5
    assert numbers(first) == numbers(second)
    assert numbers(execute(name, tiny, "seed=1")) != numbers(first)


def test_resume_equals_uninterrupted(name, tiny, trains, monkeypatch):
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
        work(payload)
    assert (cut / "checkpoints" / "step-4").exists() and cut.result is None
    work(payload)
    assert numbers(cut) == numbers(whole)


def test_cost_never_falls_with_depth_and_rows_are_examples(name, tiny):
    s = session(name, tiny)
    seen = [judge(s.method, s.ctx, HERE, s.network, s.ctx.data.test, d) for d in s.plan.depths]
    for lower, higher in itertools.pairwise(seen):
        assert lower.evaluation.cost.keys() == higher.evaluation.cost.keys()
        for counter, cost in lower.evaluation.cost.items():
            assert higher.evaluation.cost[counter] >= cost, counter
        assert higher.effective_depth >= lower.effective_depth
    for judged in seen:
        rows = judged.evaluation.rows
        assert rows.num_rows == len(s.ctx.data.test) == len(set(rows.column("id").to_pylist()))
        assert judged.evaluation.rivals.keys() == seen[0].evaluation.rivals.keys()
        for ratios in (judged.evaluation.metrics, *(r.metrics for r in judged.evaluation.rivals.values())):
            assert judged.evaluation.accuracy in ratios
            for ratio in ratios.values():
                assert np.isfinite(rows.column(ratio.numerator).to_numpy()).all()


def test_depths_judged_in_one_call_are_those_judged_one_by_one(name, tiny):
    s = session(name, tiny)
    meters = {depth: silent(HERE.device) for depth in s.plan.depths}
    together = dict(judge_depths(s.method, s.ctx, HERE, s.network, s.ctx.data.test, meters, limit=9))
    assert list(together) == s.plan.depths
    if s.plan.card.depth.bound:  # else the samples of a depth may depend on how many are drawn
        for depth, found in together.items():
            alone = judge(s.method, s.ctx, HERE, s.network, s.ctx.data.test, depth, limit=9)
            assert alone.evaluation.rows.equals(found.evaluation.rows)


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
def test_every_parameter_that_trains_is_reached(name, tiny, trains, train_depth):
    s = session(name, tiny, f"train_depth={train_depth}")
    generator = torch.Generator().manual_seed(0)
    batch = s.ctx.data.train.batch(np.arange(8))
    s.network.train()
    losses = s.method.loss(s.network, batch, Step(0, 0, 0.0, generator))
    torch.stack([total / count for total, count in losses.values()]).sum().backward()
    trained = {key: p for key, p in s.network.named_parameters() if p.requires_grad}
    for key, p in trained.items():
        assert p.grad is not None and p.grad.abs().sum() > 0, key
    listed = [p for group in s.method.param_groups(s.network) for p in group["params"]]
    assert len(listed) == len({id(p) for p in listed}) == len(trained)


def test_what_is_kept_is_what_was_trained(name, tiny):
    """A run keeps no copy of what it only opened, and a model is never put on other frozen weights."""
    folder = execute(name, tiny)
    model, trains = folder / "model" / "model.safetensors", plan(name, tiny).trains
    assert model.exists() == trains == (folder.result.training is not None)
    assert trains or not any((folder / "checkpoints").iterdir())
    opened = open_run(folder)
    frozen = {n for n, p in opened.session.network.named_parameters() if not p.requires_grad}
    if trains:
        written = load_tensors(model, train_hash=folder.identity["train_hash"])[0]
        assert written.keys() == opened.session.network.state_dict().keys() - frozen
        for kept in (folder / "checkpoints").glob("*/model.safetensors"):
            assert not {f"network.{n}" for n in frozen} & load_tensors(kept)[0].keys()
    if trains and frozen:
        with torch.no_grad():
            dict(opened.session.network.named_parameters())[min(frozen)].add_(1)
        with pytest.raises(RunError, match="different frozen weights"):
            opened.session.load_model(folder, folder.identity["train_hash"])


def test_a_finished_run_opens_without_its_data(name, tiny, monkeypatch):
    folder = execute(name, tiny)
    monkeypatch.setattr("reason.engine.session.load_dataset", lambda plan: pytest.fail("the data was opened"))
    assert open_run(folder).session.network is not None


def test_counts_are_those_of_the_loss(name, tiny, trains):
    from reason.methods.base import Method

    s = session(name, tiny)
    batch = s.ctx.data.train.batch(np.arange(5))
    place = Step(0, 0, 0.0, torch.Generator().manual_seed(0))
    assert s.method.counts(s.network, batch, place) == Method.counts(s.method, s.network, batch, place)


def test_inspect_and_baselines(name, tiny):
    s = session(name, tiny)
    with torch.no_grad():
        s.ctx.calibration = s.method.calibrate(s.ctx, s.network.eval(), s.ctx.data.fit)
        figures = s.method.inspect(s.ctx, s.network, "")
    assert figures
    draw_figures(figures, Path("figures.png"))
    assert Path("figures.png").stat().st_size > 1000
    for f in figures:
        drawn = io.StringIO()
        Console(file=drawn, width=100).print(figure(f))
        assert f.title in drawn.getvalue()
    for limit in (0, 7):
        ctx = dataclasses.replace(s.ctx, limit=limit)
        own = s.method.evaluate(ctx, s.network, s.ctx.data.test, 1)
        baselines = s.method.baselines(ctx, s.network, s.ctx.data.test, 1)
        assert baselines
        for rival in baselines.values():
            assert rival.accuracy == own.accuracy
            assert rival.rows.column("id").to_pylist() == own.rows.column("id").to_pylist()


def test_the_card_is_light_and_its_keys_are_explained(name, tiny):
    code = f"import sys; from reason import registry; registry.card('methods', {card_of(name).name!r}); print('torch' in sys.modules or 'numpy' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"
    card = card_of(name)
    assert [k.name for k in walk(card.Config) if not k.meaning] == []
