"""Every dataset test has a cache of its own."""

from __future__ import annotations

import pytest
from interaction_files import Files


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REASON_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def files(tmp_path) -> Files:
    return Files(tmp_path / "files")
