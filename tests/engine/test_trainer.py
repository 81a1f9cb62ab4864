"""Training: the same numbers however it is cut, interrupted or resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from reason.engine import runner
from reason.engine.checkpoint import Checkpoints, load_tensors, save_tensors
from reason.engine.config import resolve
from reason.engine.evaluation import value
from reason.engine.parallel import World
from reason.engine.session import Session, load_dataset
from reason.engine.trainer import Trainer
from reason.engine.worker import work
from reason.errors import RunError
from reason.files import read_json
from reason.tracking.result import to_json

HERE = World(0, 1, torch.device("cpu"))


def begin(words, folder="work", log=lambda *_: None):
    Path(folder).mkdir(exist_ok=True)
    plan = resolve("latent", words, environ={})
    session = Session.begin(plan, HERE, Path(folder), log)
    return session, Checkpoints(Path(folder) / "checkpoints", HERE, "hash")


def losses(words, folder="work", stop_at=None):
    """Losses of every step; ``stop_at`` interrupts after so many steps of this attempt."""
    session, checkpoints = begin(words, folder)
    seen = []

    def watch(p):
        if p.loss is not None:
            seen.append(p.loss)
            if stop_at and len(seen) == stop_at:
                raise KeyboardInterrupt

    trainer = Trainer(session.method, session.network, session.ctx, HERE, checkpoints, watch)
    try:
        report = trainer.fit()
    except KeyboardInterrupt:
        report = None
    return seen, session, report


class TestDeterminism:
    def test_same_seed_same_numbers_other_seed_others(self, tiny):
        a, b = losses(tiny, "a")[0], losses(tiny, "b")[0]
        assert a == b
        assert losses([*tiny, "seed=1"], "c")[0] != a

    @pytest.mark.parametrize("loss", ["prl", "erl"])
    def test_a_resumed_training_is_the_uninterrupted_one(self, tiny, loss):
        words = [*tiny, "train.epochs=3", "train.every=2", f"latent.loss={loss}"]
        whole, session, report = losses(words, "whole")
        first, *_ = losses(words, "cut", stop_at=5)  # the checkpoint of step 4 is the last
        second, resumed, report2 = losses(words, "cut")
        assert first == whole[:5]
        assert second == whole[4:]
        assert report == report2
        for key, tensor in session.network.state_dict().items():
            assert torch.equal(tensor, resumed.network.state_dict()[key]), key


def test_training_validates_by_the_methods_own_means(tiny, monkeypatch):
    session, checkpoints = begin(tiny)
    cheap = session.method.evaluate(
        replace(session.ctx, limit=0), session.network.eval(), session.ctx.data.valid, 0
    )
    monkeypatch.setattr(session.method, "validate", lambda ctx, model, split, depth: cheap, raising=True)
    monkeypatch.setattr(session.method, "evaluate", lambda *_: pytest.fail("training called evaluate"))
    report = Trainer(session.method, session.network, session.ctx, HERE, checkpoints).fit()
    assert report.best_valid == pytest.approx(value(cheap, cheap.accuracy))


class TestAccumulation:
    @pytest.mark.parametrize("loss", ["prl", "erl", "ce"])
    def test_micro_batches_sum_to_the_batch(self, tiny, loss):
        # Contrast is within a micro-batch, as in a batch: it is left out here and tested over ranks.
        words = [*tiny, "backbone.dropout=0", f"latent.loss={loss}", "latent.contrast_weight=0"]
        one, many = losses(words, "one")[0], losses([*words, "train.accumulate=3"], "many")[0]
        np.testing.assert_allclose(many, one, rtol=1e-5)

    def test_declared_counts_are_those_of_the_loss(self, tiny):
        session, _ = begin(tiny)
        trainer = Trainer(
            session.method, session.network, session.ctx, HERE, Checkpoints(Path("c"), HERE, "h")
        )
        batch = session.ctx.data.train.batch(np.arange(5))
        own = session.method.counts(session.network, batch, trainer._place(0, 0))
        base = super(type(session.method), session.method).counts(
            session.network, batch, trainer._place(0, 0)
        )
        assert own == base


class TestPlan:
    @pytest.mark.parametrize(
        ("words", "factors"),
        [
            (["train.schedule=constant"], [1, 1, 1, 1]),
            (["train.schedule=linear"], [1, 0.75, 0.5, 0.25]),
            (["train.schedule=cosine"], [1, 0.853553, 0.5, 0.146447]),
            (["train.schedule=trapezoid", "train.cooldown=0.5"], [1, 1, 1, 0.5]),
            (["train.schedule=constant", "train.warmup=0.5"], [1 / 3, 2 / 3, 1, 1]),
        ],
    )
    def test_schedules(self, tiny, words, factors):
        session, checkpoints = begin([*tiny, "train.steps=4", *words])
        trainer = Trainer(session.method, session.network, session.ctx, HERE, checkpoints)
        assert [trainer._schedule(s) for s in range(4)] == pytest.approx(factors, abs=1e-5)

    def test_a_trapezoid_begins_low_stays_and_ends_at_nothing(self, tiny):
        words = ["train.steps=20", "train.schedule=trapezoid", "train.warmup=0.2", "train.cooldown=0.2"]
        session, checkpoints = begin([*tiny, *words])
        trainer = Trainer(session.method, session.network, session.ctx, HERE, checkpoints)
        path = [trainer._schedule(s) for s in range(21)]
        assert path[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
        assert path[4:17] == [1.0] * 13
        assert path[17:] == pytest.approx([0.75, 0.5, 0.25, 0])

    def test_early_stopping_keeps_the_best(self, tiny):
        # A rate this high only does harm after the first steps.
        _, session, report = losses([*tiny, "train.epochs=40", "train.patience=2", "train.lr=0.3"])
        assert report.stopped == "early" and report.steps < 40 * 3
        assert report.steps == report.best_step + 2 * 3
        best = load_tensors(Path(f"work/checkpoints/best-{report.best_step}.safetensors"))[0]
        assert all(torch.equal(best[f"network.{k}"], v) for k, v in session.network.state_dict().items())

    def test_every_example_once_an_epoch(self, tiny):
        session, checkpoints = begin([*tiny, "train.batch_size=7"])
        trainer = Trainer(session.method, session.network, session.ctx, HERE, checkpoints)
        batches = trainer._batches(0)
        epoch = np.concatenate([next(batches) for _ in range(trainer.per_epoch)])
        assert len(set(epoch)) == len(epoch) == len(session.ctx.data.train) // 7 * 7, (
            "a last part is left out"
        )
        again = trainer._batches(2)  # resumed in the middle of the epoch
        assert np.array_equal(next(again), epoch[14:21])

    def test_bf16_trains(self, tiny):
        seen = losses([*tiny, "train.precision=bf16", "train.epochs=4"])[0]
        assert np.isfinite(seen).all() and seen[-1] < seen[0]


class TestNotFinite:
    def test_the_step_is_named_and_nothing_is_saved(self, tiny):
        with pytest.raises(RunError, match=r"not finite at step \d+"):
            losses([*tiny, "train.lr=1e30", "train.clip=0", "train.epochs=5", "train.every=1000"])
        assert not list(Path("work/checkpoints").glob("step-*"))


class TestCheckpoints:
    def test_the_last_two_are_kept_and_the_best(self, tiny):
        losses([*tiny, "train.every=1"])
        kept = sorted(p.name for p in Path("work/checkpoints").glob("step-*"))
        assert kept == ["step-5", "step-6"]
        state = read_json("work/checkpoints/step-6/state.json")
        assert Path(f"work/checkpoints/best-{state['best_step']}.safetensors").exists()

    def test_a_corrupt_one_is_passed_over(self, tiny):
        words = [*tiny, "train.every=1"]
        whole = losses(words, "whole")[0]
        losses(words, "cut", stop_at=5)
        path = Path("cut/checkpoints/step-4/model.safetensors")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert losses(words, "cut")[0] == whole[3:]

    def test_all_corrupt_is_said(self, tiny):
        words = [*tiny, "train.every=1"]
        losses(words, "cut", stop_at=5)
        for path in Path("cut/checkpoints").glob("step-*/optimizer.safetensors"):
            path.write_bytes(b"nonsense")
        with pytest.raises(RunError, match="No checkpoint of this run can be used"):
            losses(words, "cut")

    def test_a_foreign_one_is_refused(self, tmp_path):
        save_tensors(tmp_path / "a", {"x": torch.ones(2)}, {"train_hash": "mine"})
        with pytest.raises(RunError, match="another configuration"):
            load_tensors(tmp_path / "a", train_hash="yours")
        from safetensors.torch import save_file

        save_file({"x": torch.ones(2)}, tmp_path / "b")
        with pytest.raises(RunError, match="not written by reason"):
            load_tensors(tmp_path / "b")

    def test_a_full_disk_leaves_the_one_before(self, tiny, monkeypatch):
        """The second checkpoint meets a full disk: the first stands, training goes on and says so."""
        import reason.engine.checkpoint as module

        real = module.save_tensors

        def full(path, tensors, meta):
            real(path, tensors, meta)
            if path.name == "optimizer.safetensors" and meta["step"] == 4:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(module, "save_tensors", full)
        _, _, report = losses([*tiny, "train.every=2"])
        assert "step 4 could not be written: No space left on device" in report.notes[0]
        assert sorted(p.name for p in Path("work/checkpoints").glob("*step-*")) == ["step-2", "step-6"]


class TestWork:
    """What a rank does, on a folder: result.json is last and complete."""

    def folder(self, words):
        plan = resolve("latent", words, environ={})
        return runner.prepare(plan, load_dataset(plan).digest)

    def work(self, folder):
        work({"folder": str(folder.path), "device": "cpu", "quiet": True})
        return folder.result

    def test_result(self, tiny):
        folder = self.folder(tiny)
        with folder.lock():
            folder.event("attempt", device="cpu", devices=1)
            result = self.work(folder)
        assert [judged.depth for judged in result.curve] == [0, 1, 2]
        assert result.metrics["accuracy"] == result.curve[-1].accuracy.value
        assert result.metrics["gpu_hours"] == 0 and result.metrics["device_hours"] > 0
        assert "latency_p95_ms" not in result.metrics, "4 samples are too few for a p95"
        accuracy = result.accuracy
        assert accuracy.low <= accuracy.value <= accuracy.high and accuracy.n == 40
        assert json.dumps(to_json(result), allow_nan=False)
