"""Configuration: one meaning for a value wherever it is written, and refusals that help."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from reason import registry
from reason.engine.config import resolve, restore
from reason.engine.describe import meanings
from reason.engine.layers import experiments, nested, sweeps
from reason.engine.sweep import axes, expand, plan_sweep
from reason.engine.typed import parse
from reason.errors import ConfigError


def plan(*words, name="latent", **kwargs):
    return resolve(name, words, environ=kwargs.pop("environ", {}), **kwargs)


class TestLayers:
    def test_later_layers_win_and_origin_names_them(self, tmp_path):
        Path("experiments.yaml").write_text(
            "experiments:\n  mine:\n    method: latent\n    seed: 1\n    train: {lr: 0.5, epochs: 7}\n"
        )
        Path("more.yaml").write_text("train:\n  lr: 0.25\n")
        got = plan("train.clip=3", name="mine", files=[Path("more.yaml")], environ={"REASON_SEED": "4"})
        assert (got.config.seed, got.config.train.lr, got.config.train.epochs, got.config.train.clip) == (
            4,
            0.25,
            7,
            3.0,
        )
        assert got.origin["train.epochs"] == "./experiments.yaml: mine"
        assert got.origin["train.lr"] == "more.yaml"
        assert got.origin["seed"] == "REASON_SEED"
        assert got.origin["train.clip"] == "command line"
        assert got.origin["train.beta1"] == "default"

    def test_flags_are_keys(self):
        got = plan(flags={"hardware.gpus": 3, "hardware.device": "cpu", "seed": None})
        assert (got.config.hardware.gpus, got.config.hardware.device, got.config.seed) == (3, "cpu", 0)

    @pytest.mark.parametrize("text", ["00123", "12:30", "1e-3", "on", "null", "0x10", "~", "a=b", "[1,2]"])
    def test_a_text_field_keeps_its_text_from_every_layer(self, text):
        for got in (
            plan(f"runs={text}"),
            plan(environ={"REASON_RUNS": text}),
        ):
            assert got.config.runs == text
        Path("f.yaml").write_text(yaml.safe_dump({"runs": text}))
        assert plan(files=[Path("f.yaml")]).config.runs == text
        Path("f.yaml").write_text(f"runs: {text}\n" if not text.startswith("[") else f"runs: '{text}'\n")
        assert plan(files=[Path("f.yaml")]).config.runs == text

    def test_numbers_and_flags_take_their_declared_type(self):
        got = plan("train.lr=1e-3", "train.epochs=10", "eval.curve=off", "depth=1", "train_depth=null").config
        assert (got.train.lr, got.train.epochs, got.eval.curve, got.train_depth) == (1e-3, 10, False, 1)

    def test_every_key_has_a_meaning(self):
        for name in registry.names("methods"):
            got = resolve(name, environ={})
            assert [k for k in got.flat if not meanings(got).get(k) and not k.endswith(".name")] == []

    def test_a_recorded_plan_restores_itself(self):
        got = plan("depth=1", "train_depth=3", "train.lr=0.02")
        again = restore("latent", yaml.safe_load(got.to_yaml()))
        assert again.flat == got.flat
        assert again.hashes("d") == got.hashes("d")


class TestHashes:
    def test_devices_and_paths_change_neither(self):
        a = plan().hashes("d")
        assert (
            plan("hardware.device=cpu", "hardware.threads=7", "runs=elsewhere", "offline=true").hashes("d")
            == a
        )

    def test_depth_and_evaluation_change_only_the_config_hash(self):
        a, b = (
            plan("depth=1", "train_depth=2").hashes("d"),
            plan("depth=2", "train_depth=2", "eval.limit=3").hashes("d"),
        )
        assert a[0] == b[0] and a[1] != b[1]

    @pytest.mark.parametrize("word", ["seed=1", "train.lr=0.1", "train_depth=3", "train.batch_size=7"])
    def test_what_shapes_the_model_changes_both(self, word):
        a, b = plan("depth=2").hashes("d"), plan("depth=2", word).hashes("d")
        assert a[0] != b[0] and a[1] != b[1]

    def test_data_changes_both(self):
        a, b = plan().hashes("d"), plan().hashes("e")
        assert a[0] != b[0] and a[1] != b[1]


class TestRefusals:
    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["train.lrr=1"], "train.lr"),
            (["lr=1"], "train.lr"),
            (["batchsize=4"], "train.batch_size"),
            (["train.epochs=many"], "whole number"),
            (["train.lr=fast"], "a number"),
            (["train.schedule=cosin"], "cosine"),
            (["eval.curve=perhaps"], "true or false"),
            (["train=3"], "group of keys"),
            (["depth"], "key=value"),
            (["depth=-1"], "below the least"),
            (["depth=3", "train_depth=2"], "beyond train_depth"),
            (["backbone=sasrek"], "sasrec"),
            (["backbone=recursive"], "sequence encoder"),
            (["dataset=movielens"], "movielens-100k"),
            (["dataset=chains"], "sequences"),
            (["train.epochs=-1"], "at least 0"),
            (["train.warmup=2"], "must lie in"),
            (["train.lr=-1"], "above 0"),
            (["backbone.heads=3"], "backbone.heads=2"),
            (["backbone.text=tf-idf"], "tfidf"),
            (["backbone.dropout=1"], "backbone.dropout"),
            (["latent.tau=0"], "latent.tau"),
            (["dataset.split=timed"], "time"),
        ],
    )
    def test_a_wrong_word_names_the_mend(self, words, said):
        with pytest.raises(ConfigError) as error:
            plan(*words)
        assert said in str(error.value)

    def test_unknown_name(self):
        with pytest.raises(ConfigError, match="latent"):
            plan(name="latnet")

    def test_environment_typo(self):
        with pytest.raises(ConfigError, match="REASON_TRAIN__LRR"):
            plan(environ={"REASON_TRAIN__LRR": "1"})

    @pytest.mark.parametrize("text", ["a: [", "- 1\n- 2", "experimentz: {}"])
    def test_broken_experiments_file(self, text):
        Path("experiments.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"experiments\.yaml"):
            plan()

    def test_absent_file(self):
        with pytest.raises(ConfigError, match=r"no\.yaml"):
            plan(files=[Path("no.yaml")])

    def test_a_sweep_is_not_an_experiment(self):
        Path("experiments.yaml").write_text("sweeps:\n  wide: {run: latent, vary: {seed: [0, 1]}}\n")
        with pytest.raises(ConfigError, match="reason sweep wide"):
            plan(name="wide")


class TestDepth:
    @pytest.mark.parametrize(
        ("words", "depth", "train_depth"),
        [([], 2, 2), (["depth=3"], 3, 3), (["train_depth=0"], 0, 0), (["depth=1", "train_depth=3"], 1, 3)],
    )
    def test_each_is_filled_from_the_other(self, words, depth, train_depth):
        got = plan(*words).config
        assert (got.depth, got.train_depth) == (depth, train_depth)

    def test_the_curve_ends_at_depth(self):
        assert plan("depth=3").depths == [0, 1, 2, 3]
        assert plan("depth=3", "eval.curve=false").depths == [3]


class TestDatasets:
    def test_a_path_is_ones_own_data(self):
        got = plan("dataset=some/file.csv").config.dataset
        assert (got.name, got.path) == ("interactions", str(Path("some/file.csv").absolute()))

    def test_keys_of_a_replaced_dataset_are_dropped(self):
        Path("experiments.yaml").write_text(
            "experiments:\n  s: {method: latent, dataset: {name: synthetic-interactions, users: 9}}\n"
        )
        assert plan(name="s").config.dataset.users == 9
        assert plan("dataset=x.csv", name="s").config.dataset.name == "interactions"


class TestSweeps:
    def test_words_vary_by_comma_and_range(self):
        vary, fixed = axes(["depth=0,1,2", "seed=0..2", "train.lr=0.1", "latent.x=[1,2]"])
        assert vary == {"depth": ["0", "1", "2"], "seed": ["0", "1", "2"]}
        assert fixed == ["train.lr=0.1", "latent.x=1,2"]

    @given(st.integers(-50, 50), st.integers(0, 30))
    def test_a_range_is_inclusive(self, low, length):
        assert expand(f"{low}..{low + length}") == [str(i) for i in range(low, low + length + 1)]

    @pytest.mark.parametrize("value", ["3..1", "1,,2", "1,1"])
    def test_slips_are_refused(self, value):
        with pytest.raises(ConfigError):
            expand(value)

    def test_one_model_per_seed_and_the_deepest_trial_first(self):
        got = plan_sweep("latent", ["depth=0,1,2,3", "seed=0..2"])
        assert len(got.trials) == 12 and got.trainings == 3
        assert {t.plan.config.train_depth for t in got.trials} == {3}
        firsts = {}
        for trial in got.trials:
            firsts.setdefault(trial.train_hash, trial.varied["depth"])
        assert set(firsts.values()) == {"3"}

    def test_a_named_sweep(self):
        Path("experiments.yaml").write_text(
            "sweeps:\n  wide: {run: latent, vary: {seed: [0, 1], depth: '0..1'}, set: {train.lr: 0.5}}\n"
        )
        got = plan_sweep("wide")
        assert len(got.trials) == 4 and got.trials[0].plan.config.train.lr == 0.5
        assert len(plan_sweep("wide", ["seed=7"]).trials) == 2

    def test_nothing_varies(self):
        with pytest.raises(ConfigError, match="depth=0,1,2"):
            plan_sweep("latent", ["depth=1"])


@pytest.mark.parametrize("name", [*experiments(), *registry.names("methods")])
def test_every_shipped_experiment_resolves(name):
    assert resolve(name, environ={}).depths


@pytest.mark.parametrize("name", list(sweeps()))
def test_every_shipped_sweep_resolves(name):
    assert plan_sweep(name).trials


def test_nested_is_the_inverse_of_flat():
    assert nested({"a.b": 1, "a.c": 2, "d": 3}) == {"a": {"b": 1, "c": 2}, "d": 3}


class TestSweepLayers:
    def test_a_flag_replaces_a_varied_key_of_the_file_and_refuses_a_spoken_one(self):
        Path("experiments.yaml").write_text(
            "sweeps:\n  wide: {run: latent, vary: {seed: '0..1', depth: '0..1'}}\n"
        )
        got = plan_sweep("wide", flags={"seed": 7})
        assert len(got.trials) == 2 and {t.plan.config.seed for t in got.trials} == {7}
        with pytest.raises(ConfigError, match="also set by a flag"):
            plan_sweep("latent", ["seed=0,1"], flags={"seed": 7})

    def test_its_defaults_lie_below_every_file(self):
        Path("f.yaml").write_text("train_depth: 4\neval: {curve: true}\n")
        got = plan_sweep("latent", ["depth=0,1"], files=[Path("f.yaml")]).trials[0].plan
        assert got.config.train_depth == 4 and got.config.eval.curve is True
        assert (
            plan_sweep("latent", ["depth=0,1"]).trials[0].plan.origin["train_depth"] == "default of a sweep"
        )

    def test_brackets_keep_a_comma(self):
        assert axes(["dataset.text=[title,genres]"]) == ({}, ["dataset.text=title,genres"])

    def test_trials_on_other_paths_are_other_trainings(self):
        assert plan_sweep("latent", ["dataset=./a.csv,./b.csv"]).trainings == 2

    def test_one_folder_of_runs(self):
        with pytest.raises(ConfigError, match="one folder"):
            plan_sweep("latent", ["runs=a,b"])


class TestReplacedDatasets:
    def test_a_path_does_not_leak_to_another_dataset(self):
        Path("f.yaml").write_text("dataset: {name: interactions, path: mine.csv, user: u}\n")
        got = plan("dataset=movielens-100k", files=[Path("f.yaml")])
        assert got.config.dataset.path == "" and got.origin["dataset.name"] == "command line"

    def test_a_slip_below_is_still_a_slip(self):
        Path("f.yaml").write_text("dataset: {userz: 4}\n")
        with pytest.raises(ConfigError, match="userz"):
            plan("dataset=synthetic-interactions", files=[Path("f.yaml")])

    def test_paths_are_recorded_from_the_root(self):
        assert plan("dataset=x.csv").config.dataset.path == str(Path("x.csv").absolute())


@pytest.mark.parametrize("word", ["train.lr=nan", "train.lr=inf", "train.clip=nan", "train.warmup=nan"])
def test_numbers_are_numbers(word):
    with pytest.raises(ConfigError):
        plan(word)


class TestTypes:
    @pytest.mark.parametrize(
        ("text", "kind", "value"),
        [
            ("007", int, 7), ("1e-3", float, 1e-3), ("5", float, 5.0), ("On", bool, True), ("no", bool, False),
            ("00123", str, "00123"), ("null", int | None, None), ("4", int | None, 4), ("[1, 2]", list[int], [1, 2]),
            ("a,b", list[str], ["a", "b"]), ("", list[int], []), (True, bool, True), (1e-05, float, 1e-05), (3, str, "3"),
            (None, int | None, None), ([1, 2], list[int], [1, 2]),
        ],
    )  # fmt: skip
    def test_parse(self, text, kind, value):
        got = parse(text, kind)
        assert got == value and type(got) is type(value)

    @pytest.mark.parametrize(
        ("text", "kind"), [("1.5", int), ("x", float), ("maybe", bool), ("1,x", list[int]), ("x", int | None)]
    )
    def test_what_is_not_of_the_type_is_refused(self, text, kind):
        with pytest.raises(ValueError):
            parse(text, kind)

    @given(st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.booleans() | st.text())
    def test_a_value_survives_its_spelling(self, value):
        assert parse(str(value), type(value)) == value


def test_a_comment_goes_on_inside_the_brackets_of_its_field():
    from reason.engine.describe import comments
    from reason.methods.mor.config import MorConfig

    told = comments(MorConfig)
    assert told["combine"].startswith("state after a step") and "delta with a source" in told["combine"]
    assert "#" not in "".join(told.values())
