"""The cards of the datasets that offer ``text``: light, named, and true."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from reason import registry
from reason.cli.data import app
from reason.datasets.documents import Corpus
from reason.keys import walk

GENERATED = ["arithmetic", "p-hop", "chains", "listops", "mixed-stream"]
NAMES = ["stdlib-text", "text", "hub-text", "problems", *GENERATED]


@pytest.mark.parametrize("name", NAMES)
def test_cards(name):
    card = registry.card("datasets", name)
    config = card.Config()
    assert "text" in card.views and card.summary and card.licence and card.sources
    assert config.name == name and dataclasses.fields(config)[0].name == "name"
    assert all(type(getattr(config, f.name)) in (str, int, float, bool) for f in dataclasses.fields(config))
    assert all(k.meaning for k in walk(card.Config))
    assert callable(registry.resolve(card.target))


@pytest.mark.parametrize("name", GENERATED)
def test_generated_datasets_answer_the_view(name):
    card = registry.card("datasets", name)
    keys = {"train_documents": 120, "valid_documents": 9, "test_documents": 8}
    data = registry.resolve(card.target)(card.Config(**keys), offline=True)
    assert data.name == name and len(data.digest) == 32 and isinstance(data.text(), Corpus)
    assert [len(part) for part in data.text().parts.values()] == [120, 9, 8]
    result = CliRunner().invoke(app, ["verify", name, *(f"{k}={v}" for k, v in keys.items()), "--json"])
    assert json.loads(result.stdout)["digest"] == data.digest


def test_cards_import_nothing_heavy():
    code = (
        "import sys\nfrom reason import registry\n"
        f"for name in {NAMES!r}: registry.card('datasets', name).Config()\n"
        "heavy = {'torch', 'numpy', 'pyarrow', 'filelock', 'mlflow', 'transformers', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "module",
    [
        "documents",
        "generated",
        "stdlib",
        "textfiles",
        "hubtext",
        "arithmetic",
        "tasks",
        "problems",
        "problemfiles",
        "gym",
    ],
)
def test_the_parent_of_a_run_loads_text_without_torch(module):
    code = f"import sys, reason.datasets.{module}\nassert not {{'torch', 'mlflow', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
