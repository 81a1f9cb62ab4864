"""``reason data``: answers on stdout, faults as errors with a mend; the cards behind it are light."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
from interaction_files import ROWS
from typer.testing import CliRunner

from reason import registry
from reason.cli.data import app
from reason.datasets import fetch
from reason.errors import ConfigError, DataError


def invoke(*words):
    result = CliRunner().invoke(app, list(words))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.stdout


@pytest.fixture
def minilm():
    """A folder in the cache that looks as if it had been fetched."""
    folder = fetch.cache_dir() / "minilm"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / fetch.RECEIPT).write_text(
        json.dumps({"files": {"config.json": fetch.sha256(folder / "config.json")}})
    )
    return folder


def test_path_and_fetch_print_the_folder(minilm):
    assert invoke("path", "minilm").strip() == invoke("fetch", "minilm", "--offline").strip() == str(minilm)
    with pytest.raises(DataError, match="not in the cache"):
        invoke("path", "movielens-100k")
    with pytest.raises(DataError, match="--offline forbids"):
        invoke("fetch", "movielens-100k", "--offline")
    with pytest.raises(DataError, match="does not need to be fetched"):
        invoke("fetch", "synthetic-interactions")
    with pytest.raises(ConfigError, match="Unknown name to fetch"):
        invoke("path", "minlm")


def test_verify_checks_fetched_files(minilm):
    assert "checksums  match" in invoke("verify", "minilm")
    with pytest.raises(ConfigError, match="takes no keys"):
        invoke("verify", "minilm", "seed=1")
    (minilm / "config.json").write_text("{ }")
    with pytest.raises(DataError, match=r"damaged: config\.json"):
        invoke("verify", "minilm")


def test_verify_a_file(files):
    path = files.write(ROWS)
    shown = json.loads(invoke("verify", str(path), "--json"))
    assert shown["digest"] == files.load(ROWS).digest
    assert (shown["users"], shown["items"], shown["interactions"]) == (3, 3, 9)
    assert (shown["valid_cases"], shown["test_cases"]) == (2, 2)
    assert "only trained" in shown["notes"][0]
    assert "are only trained on" in " ".join(invoke("verify", str(path)).split())
    assert json.loads(invoke("verify", str(path), "dataset.min_user=3", "--json"))["users"] == 2
    with pytest.raises(ConfigError, match="min_user=many"):
        invoke("verify", str(path), "min_user=many")
    with pytest.raises(ConfigError, match="Unknown key 'min_users'"):
        invoke("verify", str(path), "min_users=3")
    with pytest.raises(DataError, match="no file"):
        invoke("verify", "nowhere.csv")
    with pytest.raises(ConfigError, match="Unknown dataset 'synthetic'"):
        invoke("verify", "synthetic")


def test_verify_a_registered_dataset():
    shown = json.loads(invoke("verify", "synthetic-interactions", "users=30", "--json"))
    assert shown["users"] == 30


@pytest.mark.parametrize("name", ["movielens-100k", "interactions", "synthetic-interactions"])
def test_cards(name):
    card = registry.card("datasets", name)
    config = card.Config()
    assert config.name == name and dataclasses.fields(config)[0].name == "name"
    assert all(type(getattr(config, f.name)) in (str, int, float, bool) for f in dataclasses.fields(config))
    assert callable(registry.resolve(card.target)) and registry.card("datasets", name) is card


def test_cards_and_help_import_nothing_heavy():
    code = (
        "import sys, reason.datasets, reason.cli.data\n"
        "heavy = {'torch', 'numpy', 'pyarrow', 'filelock', 'mlflow', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
