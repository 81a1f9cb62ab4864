"""A store that is made once per session and copied for each test, and folders as the runner leaves them."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml
from tracking_samples import CONFIG

from reason.files import write_json
from reason.tracking.folder import RunFolder


@pytest.fixture
def uri(store) -> str:
    """A store of this test's own, with the right schema and no runs."""
    return store


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def make(root):
    """``make(name, **identity)``: a run folder before its first attempt."""

    def make_(name: str = "latent", config: dict | None = CONFIG, **identity) -> RunFolder:
        folder = RunFolder.create(root, name, "c" * 64)
        if config is not None:
            (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        write_json(folder / "env.json", {"commit": "abc", "dirty": True, "versions": {"torch": "2"}})
        (folder / "git.diff").write_text("+1\n", encoding="utf-8")
        write_json(
            folder / "run.json",
            {"kind": "run", "experiment": name, "method": "latent", "config_hash": "c" * 64, "train_hash": "t" * 64,
             "data_digest": "d" * 32, "parent": None, "trained_by": None, "created": time.time(),
             "argv": ["reason", "run", name], **identity},
        )  # fmt: skip
        return folder

    return make_
