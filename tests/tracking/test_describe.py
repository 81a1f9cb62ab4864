"""Names, params, tags, thinning: what MLflow accepts, and what the folder says."""

from __future__ import annotations

import math
import time
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from tracking_samples import CONFIG, RESULT

from reason.tracking.describe import PARAM_CAP, TAG_CAP, Description, legal_name, thinned


def test_names_that_we_use():
    vocabulary = {
        "eval/ndcg@10": "eval/ndcg_at_10",
        "NDCG@10": "NDCG_at_10",
        "train/loss": "train/loss",
        "latency_p50_ms": "latency_p50_ms",
        "latent.loss": "latent.loss",
        "eval/recall@5 (cold)": "eval/recall_at_5 _cold_",
        "/rooted//twice/": "rooted/twice",
        "../up": "_/up",
        "größe": "gr__e",
        "": "_",
    }
    for name, legal in vocabulary.items():
        assert legal_name(name) == legal


@settings(deadline=None)
@given(st.text(max_size=400))
def test_every_name_becomes_one_that_mlflow_accepts(name):
    from mlflow.utils.validation import _validate_metric, _validate_param

    legal = legal_name(name)
    _validate_metric(legal, 1.0, 0, 0)
    _validate_param(legal, "1")
    assert legal_name(legal) == legal


def test_params_are_plain_and_shared(make):
    folder = make()
    params = Description(folder).params()
    assert params["latent.loss"] == "prl" and params["train.lr"] == "0.001" and params["backbone.dim"] == "64"
    assert {k: params[k] for k in ("method", "backbone", "dataset", "depth", "train_depth", "seed")} == {
        "method": "latent", "backbone": "sasrec", "dataset": "movielens-100k", "depth": "2",
        "train_depth": "2", "seed": "7",
    }  # fmt: skip
    assert not [k for k in params if k.startswith(("hardware", "runs", "offline"))]
    assert "gpus" not in params  # not known before an attempt
    folder.event("attempt", device="", devices=0)  # as a sweep has it: its trials hold the devices
    assert "gpus" not in Description(folder).params() and "world_size" not in Description(folder).params()
    folder.event("attempt", device="cpu", devices=2)
    params = Description(folder).params()
    assert (params["gpus"], params["world_size"]) == ("0", "2")
    folder.write_result(replace(RESULT, device="cuda", world_size=4))
    params = Description(folder).params()
    assert (params["gpus"], params["world_size"], params["params_m"]) == ("4", "4", "0.5")


def test_caps(make):
    folder = make(config={**CONFIG, "latent": {"note": "x" * 20_000}}, argv=["y" * 20_000])
    about = Description(folder)
    assert len(about.params()["latent.note"]) == PARAM_CAP
    assert len(about.tags()["mlflow.source.name"]) == TAG_CAP


def test_absent_pieces(make):
    folder = make(config=None, kind="sweep")
    (folder / "env.json").unlink()
    about = Description(folder)
    assert about.params() == {"method": "latent"}
    assert "mlflow.source.git.commit" not in about.tags()
    assert about.final_points() == [] and about.metrics() == {}


def test_tags_and_sentence(make):
    folder = make(parent="sweep-1", trained_by="latent-cccccccc-9")
    folder.write_result(RESULT)
    tags = Description(folder).tags()
    assert tags["reason.sweep"] == "sweep-1" and tags["trained_by"] == "latent-cccccccc-9"
    assert tags["accuracy_metric"] == "NDCG@10" and tags["reason.dirty"] == "true"
    assert tags["reason.data_digest"] == "d" * 32
    assert "latent** on movielens-100k with sasrec, depth 2" in tags["mlflow.note.content"]
    assert "NDCG@10 = 0.25" in tags["mlflow.note.content"]


def test_final_points(make):
    folder = make()
    folder.write_result(RESULT)
    points = {(p.name, p.step): p.value for p in Description(folder).final_points()}
    assert points["accuracy", 0] == 0.25 and points["eval/NDCG_at_10", 0] == 0.25
    assert [points["depth/accuracy", d] for d in (0, 1, 2)] == [0.1, 0.2, 0.25]
    assert points["depth/recall_at_5", 1] == 0.1 and points["depth/latency_p50_ms", 2] == 3.0
    assert {n for n, _ in points} == {
        *("accuracy", "valid_accuracy", "device_hours", "gpu_hours", "latency_p50_ms"),
        *(
            "eval/NDCG_at_10",
            "eval/recall_at_5",
            "depth/accuracy",
            "depth/recall_at_5",
            "depth/latency_p50_ms",
            "depth/latency_n",
        ),
    }


def test_thinning():
    start = 1_700_000_000.0
    dense = [{"name": "a", "value": float(i), "step": i, "time": start + i / 100} for i in range(200)]
    sparse = [{"name": "b", "value": 1.0, "step": i, "time": start + i} for i in range(5)]
    points = thinned(dense + sparse + [{"no": "point"}])
    a = [p for p in points if p.name == "a"]
    assert len(a) == 20 and [p.step for p in a] == list(range(9, 200, 10))
    assert [p.value for p in a] == [4.5 + 10 * i for i in range(20)]  # neighbours become their mean
    assert len([p for p in points if p.name == "b"]) == 5
    bad = thinned([{"name": "a", "value": None, "step": 3, "time": start}])
    assert math.isnan(bad[0].value) and bad[0].time == 1_700_000_000_000


def test_times_come_from_the_folder(make):
    folder = make(created=1_700_000_000.0)
    folder.event("attempt")
    folder.event("closed", status="killed", until=1_700_000_900.0)
    about = Description(folder)
    assert (about.start_ms, about.end_ms) == (1_700_000_000_000, 1_700_000_900_000)
    folder.write_result(RESULT)
    assert abs(Description(folder).end_ms - time.time() * 1000) < 5000


def test_files_travel_late_or_not_at_all(make):
    folder = make()
    (folder / "rows" / "test.arrow").write_bytes(b"x")
    (folder / "rows" / "big.arrow").write_bytes(b"x" * (8 * 2**20 + 1))
    (folder / "figures").mkdir()
    (folder / "figures" / "curve.png").write_bytes(b"x")
    (folder / "log.txt").write_text("hello")
    about = Description(folder)
    assert set(about.files(ended=False)) == {"config.yaml", "env.json", "git.diff", "run.json"}
    assert set(about.files(ended=True)) - set(about.files(ended=False)) == {
        "rows/test.arrow", "figures/curve.png", "log.txt",
    }  # fmt: skip
