"""Two gloo ranks train as one process does: the same losses over 20 steps, the same first gradients."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from reason.engine.checkpoint import Checkpoints
from reason.engine.config import resolve
from reason.engine.launcher import launch
from reason.engine.meter import peak_memory_gb
from reason.engine.parallel import World, world
from reason.engine.session import Session
from reason.engine.trainer import Trainer

STEPS = 20


class Watched(Trainer):
    """Keeps the gradients of the first step, whole, before they are clipped."""

    first: dict[str, torch.Tensor] | None = None

    def _clip(self) -> float:
        if self.first is None:
            grads = {n: p.grad for n, p in self.wrapped.named_parameters() if p.grad is not None}
            whole = {n: g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for n, g in grads.items()}
            self.first = {n.removeprefix("module."): g for n, g in whole.items()}
        return super()._clip()


def train(payload: dict) -> None:
    """What a rank does. The first one leaves losses and gradients behind."""
    plan = resolve(payload["name"], payload["words"], environ={})
    folder = Path(payload["folder"])
    torch.set_default_dtype(torch.float64)  # what is left of a difference is then no rounding
    with world("cpu", plan.config.hardware) as here:
        session, losses = Session.begin(plan, here, folder), []
        trainer = Watched(
            session.method, session.network, session.ctx, here, Checkpoints(folder / "checkpoints", here, "h"),
            lambda p: losses.append(p.loss) if p.loss is not None else None,
        )  # fmt: skip
        trainer.fit()
        if here.is_main:
            torch.save((losses, trainer.first), folder / "seen.pt")
    torch.set_default_dtype(torch.float32)


def seen(folder: Path, name: str, words: list[str], processes: int):
    folder.mkdir()
    launch(train, {"name": name, "words": words, "folder": str(folder)}, processes, 1)
    return torch.load(folder / "seen.pt")


def hold(payload: dict) -> None:
    """The second rank holds 600 MB more than the first."""
    with world("cpu", resolve("latent", environ={}).config.hardware) as here:
        held = torch.ones(150_000_000 if here.rank else 1)
        peak = peak_memory_gb(here)
        if here.is_main:
            torch.save((peak, float(held[0])), Path(payload["folder"]) / "seen.pt")


def test_peak_memory_is_that_of_the_rank_that_holds_most(tmp_path):
    own = peak_memory_gb(World(0, 1, torch.device("cpu")))
    launch(hold, {"folder": str(tmp_path)}, 2, 1)
    assert torch.load(tmp_path / "seen.pt")[0] > 0.6 and own > 0


CASES = [
    ("latent", ["latent.loss=prl", "latent.noise=0"]),  # which every rank draws for itself
    ("latent", ["latent.loss=erl", "train.accumulate=2"]),
    ("latent", ["latent.loss=erl", "hardware.parallel=fsdp2"]),
    ("mor", ["mor.exit_weight=0.3"]),
    ("mor", ["mor.aux=router", "mor.z_weight=0.001", "train.accumulate=2"]),
    ("mor", ["mor.routing=token"]),
    ("mor", ["mor.routing=token", "mor.balance=bias", "mor.balance_rate=0.05", "mor.gate=sigmoid"]),
    ("mor", ["train_depth=0"]),
    ("mor", ["hardware.parallel=fsdp2", "train.accumulate=2"]),
]


@pytest.mark.parametrize(("name", "keys"), CASES, ids=lambda x: x if isinstance(x, str) else " ".join(x))
def test_two_ranks_train_as_one_process(name, keys, tiny, tiny_text, tmp_path):
    words = [*(tiny if name == "latent" else tiny_text), "train.batch_size=12", f"train.steps={STEPS}"]
    words += ["train.every=1000", "eval.limit=4", *keys]
    if name == "latent":
        words.append("backbone.dropout=0")
    if keys == ["mor.exit_weight=0.3"]:
        words.append("train_depth=2")
    one, one_grads = seen(tmp_path / "one", name, words, 1)
    two, two_grads = seen(tmp_path / "two", name, words, 2)
    assert len(one) == len(two) == STEPS
    np.testing.assert_allclose(two, one, rtol=1e-5)
    assert one_grads.keys() == two_grads.keys()
    for key, grad in one_grads.items():
        off = (two_grads[key] - grad).norm()
        assert off <= 1e-5 * grad.norm(), f"{key}: {off / grad.norm():.1e}"
