"""Every slip gets a sentence, an exit code and no traceback; nothing finished is lost."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from command import mlflow_runs, runs


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["run", "latnet"], 2, "latent"),
        (["run", "latent", "train.lrr=1"], 2, "train.lr"),
        (["run", "latent", "latent.loss=plr"], 2, "prl"),
        (["run", "latent", "train.epochs=ten"], 2, "whole number"),
        (["run", "latent", "depth"], 2, "key=value"),
        (["run", "latent", "depth=-1"], 2, "smallest"),
        (["run", "latent", "depth=3", "train_depth=2"], 2, "train_depth=3"),
        (["run", "latent", "--gpus", "4"], 2, "--device cpu --gpus 4"),
        (["run", "latent", "--device", "cuda"], 2, "--device cpu"),
        (["run", "latent", "--device", "tpu"], 2, "cuda"),
        (["run", "latent", "-c", "absent.yaml"], 2, "absent.yaml"),
        (["run", "latent", "dataset=movielens-1m"], 2, "movielens-100k"),
        (["run", "latent", "dataset=absent.csv"], 2, "absent.csv"),
        (["run", "latent", "--offline"], 2, "offline"),
        (["run", "latent", "--device", "cpu", "--gpus", "3", "train.batch_size=2"], 2, "train.batch_size=3"),
        (["sweep", "latent"], 2, "depth=0,1,2"),
        (["sweep", "latent", "seed=3..1"], 2, "1..3"),
        (["sweep", "latent", "seed=0,1", "--on-error", "panic"], 2, "continue"),
        (["resume", "nothing"], 2, "no run"),
        (["evaluate", "nothing"], 2, "no run"),
        (["compare", "nothing"], 2, "nothing"),
        (["list", "method"], 2, "methods"),
        (["rm", "nothing"], 2, "no run"),
        (["show", "latnet"], 2, "latent"),
        (["data", "path", "movielens"], 2, "movielens-100k"),
        (["run", "mor", "backbone.layers=9"], 2, "backbone.layers="),
        (["run", "mor", "train_depth=4"], 2, "backbone.layers="),
        (["run", "mor", "mor.capacities=1,0.3,0.6"], 2, "mor.capacities=1,0.6,0.3"),
        (["run", "mor", "mor.capacities=1,0.5"], 2, "3 recursions"),
        (["run", "mor", "backbone.sharing=middle_sequence"], 2, "middle_cycle"),
        (["run", "mor", "mor.gap=sharing"], 2, "mor.gap"),
        (["run", "mor", "mor.gap=share_first"], 2, "mor.force=true"),
        (["run", "mor", "mor.mean_depth=5"], 2, "between 1 and 3"),
        (["run", "mor", "mor.routing=token", "mor.route=topk"], 2, "auto, token, fixed"),
        (["run", "mor", "backbone=sasrec"], 2, "recursive"),
        (["run", "mor", "dataset=movielens-100k"], 2, "stdlib-text"),
        (["run", "latent", "dataset=stdlib-text"], 2, "movielens-100k"),
        (["run", "mor", "backbone.source=smolm2-135m"], 2, "smollm2-135m"),
        (["run"], 2, "NAME"),
        (["rum", "latent"], 2, "run"),
    ],
)
def test_refused_before_anything_is_made(reason, words, code, said, tmp_path, monkeypatch):
    monkeypatch.setenv("REASON_CACHE", str(tmp_path / "cache"))
    told = reason(*words)
    assert told.code == code, told.err
    assert said in told.err + told.out
    assert "Traceback" not in told.err
    assert runs() == [] and not Path("mlflow.db").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("user_id,film\n1,2\n", "film"),
        ("user_id,item_id,timestamp\n1,a,10\n1,b,soon\n1,c,3\n", "soon"),
        ("", "empty"),
        ("user_id,item_id,timestamp\n", "no rows"),
        ("user_id,item_id,timestamp\n1,a,1\n1,b,2\n2,a,1\n", "3"),
    ],
)
def test_a_broken_file_of_interactions(reason, text, said):
    Path("mine.csv").write_text(text)
    told = reason("run", "latent", "dataset=mine.csv")
    assert told.code == 2, told.err
    assert said in told.err and "mine.csv" in told.err
    assert runs() == []


def test_a_folder_that_cannot_be_written(reason, tiny):
    Path("file").write_text("")
    told = reason("run", "latent", *tiny, "runs=file/below")
    assert told.code == 2 and "runs=PATH" in told.err


def test_a_loss_that_is_not_finite_fails_and_names_the_step(reason, tiny, store):
    told = reason("run", "latent", *tiny, "train.lr=1e30", "train.clip=0", "train.epochs=4")
    assert told.code == 1
    assert "not finite at step" in told.err and "Traceback" not in told.err
    (folder,) = runs()
    assert folder.status == "failed" and "not finite" in folder.events()[-1]["why"]
    assert mlflow_runs(store)[folder.name].info.status == "FAILED"


def test_a_foreign_model_is_refused(reason, tiny, store):
    assert reason("run", "latent", *tiny).code == 0
    (folder,) = runs()
    path = folder / "model" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    told = reason("evaluate", folder.name, "eval.limit=5")
    assert told.code == 1 and "corrupt" in told.err
    from safetensors.torch import load_file, save_file

    path.write_bytes(whole)
    save_file(load_file(path), path)
    told = reason("inspect", folder.name)
    assert told.code == 1 and "not written by reason" in told.err


def test_an_unreachable_store_costs_nothing(reason, tiny, store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    told = reason("run", "latent", *tiny)
    assert told.code == 0, told.err
    assert told.err.count("cannot be reached") == 1 and "reason sync" in told.err
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert reason("sync").code == 0
    (folder,) = runs()
    recorded = mlflow_runs(store)[folder.name]
    assert recorded.info.status == "FINISHED" and "train/loss" in recorded.data.metrics


def test_predict_without_a_pipe(reason, monkeypatch):
    class Terminal:
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    assert reason("predict", "last").code == 2


PLUGIN = """
from dataclasses import dataclass
from reason.methods.base import DepthAxis, MethodCard, Units

@dataclass
class Config:
    width: int = 3  # units

card = MethodCard("{name}", "from elsewhere", "none", Config, DepthAxis("steps", 0, 1, "none"), "sequences",
                  Units("user", "NDCG@10", "one request", "users/s"), "absent:Nothing", "sasrec", "synthetic-interactions")
"""


def test_a_broken_plugin_is_a_warning_in_list_and_an_error_in_run(spawn, tmp_path):
    site = tmp_path / "site"
    info = site / "elsewhere-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[reason.methods]\nsound = sound:card\nbroken = broken:card\n")
    (site / "sound.py").write_text(PLUGIN.replace("{name}", "sound"))
    (site / "broken.py").write_text("import a_package_that_is_not_there\n")
    listed = spawn("list", "methods", "--json", PYTHONPATH=str(site))
    out, err = listed.communicate()
    assert listed.returncode == 0 and "sound" in [m["name"] for m in json.loads(out)["methods"]]
    assert "a_package_that_is_not_there" in err
    shown = spawn("run", "sound", "sound.width=4", "--dry-run", PYTHONPATH=str(site))
    out, err = shown.communicate()
    assert shown.returncode == 0 and "sound.width" in out, err
    run = spawn("run", "broken", PYTHONPATH=str(site))
    _, err = run.communicate()
    assert run.returncode == 1 and "a_package_that_is_not_there" in err and "Traceback" not in err
