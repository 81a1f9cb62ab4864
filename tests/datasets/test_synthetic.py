"""The generator: seeded, of the sizes asked for, and predictable beyond popularity."""

from __future__ import annotations

import numpy as np
import pytest

from reason.datasets.config import SyntheticConfig
from reason.datasets.synthetic import load
from reason.errors import ConfigError


def test_the_seed_decides():
    small = {"users": 50, "items": 24, "mean_length": 8, "categories": 4}
    assert load(SyntheticConfig(**small)).digest == load(SyntheticConfig(**small)).digest
    assert load(SyntheticConfig(**small)).digest != load(SyntheticConfig(**small, seed=1)).digest


def test_sizes():
    data = load(SyntheticConfig(users=400, items=100, mean_length=12, categories=5))
    assert data.info["users"] == 400 and data.info["items"] <= 100
    assert 11 < data.info["mean_length"] < 13
    assert np.diff(data.offsets).min() >= 3
    assert len(set(data.item_text)) == len(data.item_ids)
    assert len(set(data.item_fields["genres"])) == 5
    for key in ("users", "mean_length", "categories", "items"):
        with pytest.raises(ConfigError, match=f"dataset.{key}=1 "):
            SyntheticConfig(**{key: 1})


def test_the_last_item_tells_more_than_popularity():
    """Counting transitions in training must beat popularity by far; else methods have nothing to learn."""
    splits = load(SyntheticConfig(seed=3)).sequences(50)
    pairs = np.zeros((splits.pad, splits.pad))
    batch = splits.train.batch(np.arange(len(splits.train)))
    real = batch["targets"] >= 0
    np.add.at(pairs, (batch["items"][real].numpy(), batch["targets"][real].numpy()), 1)
    cases = splits.test.batch(np.arange(len(splits.test)))
    last = cases["items"][np.arange(len(splits.test)), cases["length"] - 1].numpy()
    target = splits.test.target

    def hits(scores):
        return float(((scores > scores[np.arange(len(target)), target][:, None]).sum(1) < 10).mean())

    popular = hits(np.broadcast_to(splits.catalogue.train_counts.astype(float), (len(target), splits.pad)))
    assert hits(pairs[last] + splits.catalogue.train_counts * 1e-6) > 3 * popular
