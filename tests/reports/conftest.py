"""Fixtures: a maker of run folders, and a store that many tests read."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_folders import Maker


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    return Maker(tmp_path / "runs")


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Three seeds by four depths of one sweep, and a base for each seed. Read only."""
    maker = Maker(tmp_path_factory.mktemp("store") / "runs")
    maker.bases()
    maker.sweep()
    return maker
