"""Configuration: one meaning for a value wherever it is written, and refusals that help."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, Literal

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from reason import registry
from reason.cli.app import main
from reason.engine.config import resolve, restore
from reason.engine.layers import experiments, sweeps
from reason.engine.sweep import axes, expand, plan_sweep
from reason.engine.typed import Draft
from reason.errors import ConfigError
from reason.keys import key, marked, walk
from reason.methods.base import DepthAxis, MethodCard, Units
from reason.reports.frame import defaults, evaluation_keys, marked_keys


def plan(*words, name="latent", **kwargs):
    return resolve(name, words, environ=kwargs.pop("environ", {}), **kwargs)


def written(**files: str) -> None:
    """Files of YAML in the working folder, by their stems."""
    for stem, text in files.items():
        Path(f"{stem}.yaml").write_text(text)


def shown(capsys, *words: str) -> str:
    """What ``reason show`` prints."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["reason", "show", *words])
        main()
    told = capsys.readouterr()
    assert end.value.code in (0, None), told.err
    return told.out


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

    @pytest.mark.parametrize("kind", ["methods", "backbones", "datasets"])
    def test_every_key_has_a_meaning(self, kind):
        for name in registry.names(kind):
            assert [k.name for k in walk(registry.card(kind, name).Config) if not k.meaning] == []
        assert [k.name for k in walk(type(plan().config)) if not k.meaning] == []

    def test_a_wrong_value_names_its_layer_though_a_higher_one_replaces_it(self):
        written(low="train: {lr: fast}")
        with pytest.raises(ConfigError, match=r"train\.lr=fast \(low\.yaml\) is not a number"):
            plan("train.lr=0.1", files=[Path("low.yaml")])

    def test_dataclasses_check_what_is_resolved_and_nothing_before(self, probe):
        ProbeConfig.checked = []
        plan("probe.limit=0.5", name="probe", files=[])
        assert ProbeConfig.checked == [0.5]


class TestRecorded:
    def test_a_recorded_plan_restores_itself(self):
        got = plan("depth=1", "train_depth=3", "train.lr=0.02")
        again = restore("latent", yaml.safe_load(got.to_yaml()))
        assert again.flat == got.flat
        assert again.hashes("d") == got.hashes("d")

    @pytest.mark.parametrize(
        "text", ["00123", "12:30", "null", "on", "1e-3", "a${b", "\\${seed}", "2024-01-01"]
    )
    def test_text_survives_the_file(self, text):
        got = plan(f"runs={text}")
        again = restore("latent", yaml.safe_load(got.to_yaml()))
        assert again.config.runs == got.config.runs == text.replace("\\${", "${")
        assert again.written == {}

    def test_values_that_yaml_has_typed(self):
        recorded = "{method: latent, depth: 2, train_depth: 2, train: {lr: 1.0e-05, epochs: 3}, eval: {curve: false}, runs: '007', latent: {mean_depth: null}}"
        got = restore("latent", yaml.safe_load(recorded)).config
        assert (got.train.lr, got.train.epochs, got.eval.curve, got.runs) == (1e-5, 3, False, "007")
        assert got.latent.mean_depth is None

    def test_a_key_of_another_version(self):
        with pytest.raises(
            ConfigError, match=r"(?s)another version of reason.*'train\.lookahead'.*env\.json"
        ):
            restore("latent", {"method": "latent", "train": {"lookahead": 3}})

    def test_a_word_beside_it_is_an_ordinary_word(self):
        with pytest.raises(ConfigError, match=r"Unknown key 'train\.lrr'"):
            restore("latent", {"method": "latent"}, {"train.lrr": "1"})


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
            (["train=3"], "a section, not a key"),
            (["depth"], "key=value"),
            (["depth=-1"], "too small: the smallest depth"),
            (["depth=3", "train_depth=2"], "greater than train_depth"),
            (["backbone=sasrek"], "sasrec"),
            (["backbone=recursive"], "sequence encoder"),
            (["dataset=movielens"], "movielens-100k"),
            (["dataset=chains"], "sequences"),
            (["train.epochs=-1"], "at least 0"),
            (["train.warmup=2"], "must be between"),
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

    @pytest.mark.parametrize(
        "text",
        [
            "a: [", "- 1\n- 2", "experimentz: {}", "experiments: [a, b]", "experiments: text", "experiments: {a: [1]}",
            "sweeps: [a]", "[" * 100_000, "{a: " * 900 + "1" + "}" * 900, "- " * 5000 + "1", "a: &a [*a]", "? [1]\n: 2",
        ],
    )  # fmt: skip
    def test_broken_experiments_file(self, text):
        Path("experiments.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"experiments\.yaml"):
            plan()
            sweeps()

    def test_anchors_that_grow_without_bound_are_refused_at_once(self):
        lines = [
            "l0: &l0 [lol, lol]",
            *(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 40)),
        ]
        written(laughs="\n".join(lines))
        with pytest.raises(ConfigError, match="anchors"):
            plan(files=[Path("laughs.yaml")])

    def test_anchors_are_fine(self):
        written(f="train: &t {lr: 0.5}\neval: {limit: 7}\n", g="hardware: &h {threads: 2}\n")
        assert plan(files=[Path("f.yaml"), Path("g.yaml")]).config.train.lr == 0.5
        written(
            experiments="experiments:\n  a: {method: latent, train: &t {lr: 0.5}}\n  b: {method: latent, train: *t}"
        )
        assert plan(name="b").config.train.lr == 0.5

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("seed: 1\ntrain: {lr: 1}\ntrain: {clip: 2}\n", r"(?s)f\.yaml.*'train' appears twice.*line 3"),
            ("train: {lr: 1}\ntrain.lr: 2\n", r"train\.lr is set twice in f\.yaml"),
        ],
    )
    def test_a_key_that_is_set_twice_in_one_file(self, text, said):
        written(f=text)
        with pytest.raises(ConfigError, match=said):
            plan(files=[Path("f.yaml")])

    def test_the_vary_of_a_sweep_is_a_mapping(self):
        written(experiments="sweeps: {wide: {run: latent, vary: [1, 2]}}")
        with pytest.raises(ConfigError, match="vary of the sweep 'wide'"):
            plan_sweep("wide")

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

    def test_an_interpolation_is_one_value(self):
        assert expand("${oc.env:A,1},2") == ["${oc.env:A,1}", "2"]
        assert axes(["train.lr=${oc.env:A,1}"]) == ({}, ["train.lr=${oc.env:A,1}"])

    @pytest.mark.parametrize("value", ["3..1", "1,,2", "1,1", "${a},,2"])
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


def test_a_local_sweep_overrides_a_shipped_one_key_by_key():
    written(experiments="sweeps: {latent-depth: {vary: {seed: '0..1'}}}")
    assert sweeps()["latent-depth"]["run"] == "latent"
    assert len(plan_sweep("latent-depth").trials) == 2


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
        assert plan_sweep("latent", ["depth=0,1"]).trials[0].plan.origin["train_depth"] == "sweep default"

    def test_brackets_keep_a_comma(self):
        assert axes(["dataset.text=[title,genres]"]) == ({}, ["dataset.text=title,genres"])

    def test_trials_on_other_paths_are_other_trainings(self):
        assert plan_sweep("latent", ["dataset=./a.csv,./b.csv"]).trainings == 2

    def test_one_folder_of_runs(self):
        with pytest.raises(ConfigError, match="share one runs folder"):
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


Choice = Literal["left", "right"]


def draft(kind, value):
    """What a field declared as ``kind`` becomes."""
    schema = dataclasses.make_dataclass("Schema", [("x", kind, field(default=dataclasses.MISSING))])
    made = Draft(schema, "latent")
    made.merge("command line", {"x": value})
    return made.finish().x


class TestTypes:
    @pytest.mark.parametrize(
        ("text", "kind", "value"),
        [
            ("007", int, 7), ("1e-3", float, 1e-3), ("5", float, 5.0), ("On", bool, True), ("no", bool, False),
            ("off", bool, False), ("YES", bool, True), ("1", bool, True), ("00123", str, "00123"), ("12:30", str, "12:30"),
            ("null", str, "null"), ("null", int | None, None), ("none", float | None, None), ("~", str | None, None),
            ("", int | None, None), ("4", int | None, 4), ("[1, 2]", list[int], [1, 2]), ("a,b", list[str], ["a", "b"]),
            ("", list[int], []), ("null", list[float] | None, None), ("0.5,1", list[float] | None, [0.5, 1.0]),
            (True, bool, True), (1e-05, float, 1e-05), (3, str, "3"), (None, int | None, None), ([1, 2], list[int], [1, 2]),
            ("left", Choice, "left"), ("right,left", list[Choice], ["right", "left"]), ("null", Choice | None, None),
            ("1,2", tuple[int, ...], (1, 2)), ("${", str, "${"), ("a${b", str, "a${b"), ("x${", list[str], ["x${"]),
            ("\\\\${", str, "\\\\${"), ("\\a", str, "\\a"), ("$5 {}", str, "$5 {}"),
        ],
    )  # fmt: skip
    def test_text_takes_the_declared_type(self, text, kind, value):
        got = draft(kind, text)
        assert got == value and type(got) is type(value)

    @pytest.mark.parametrize(
        ("text", "kind", "said"),
        [
            ("1.5", int, "not a whole number"), ("2.0", int, "not a whole number"), ("1e3", int, "not a whole number"),
            ("", int, "not a whole number"), ("x", float, "not a number"), ("maybe", bool, "not true or false"),
            ("1,x", list[int], "x=1,x is not a list of whole numbers"), ("x", int | None, r"whole number \(or null\)"),
            ("nan", float, "not a number"), ("-INF", float, "not a number"), ("1e999", float, "not a number"),
            ("1,nan", list[float], "not a list of numbers"), ("infinity", float | None, "not a number"),
            ("lef", Choice, "(?s)not one of the choices.*'left'.*left, right"), ("lef,right", list[Choice], "mean 'left'"),
            ("rihgt", Choice | None, "mean 'right'"), ("${x", int, "not a whole number"), ("${", Choice, "left, right"),
            (["a", "b"], str, "x=a,b is not text"), (["1"], int, "not a whole number"),
            ([["1"]], list[int], "list of whole numbers"), ([{"a": "b"}], list[str], "list of texts"), ([None], list[str], "list of texts"),
            (["1", ["2"]], list[int] | None, "list of whole numbers"), (None, str, "x=null is not text"),
            ("???", int, "but has no value"), ("???", str, "x=TEXT"), ("a,???", list[str], "x is required but has no value"),
        ],
    )  # fmt: skip
    def test_what_is_not_of_the_type_is_refused(self, text, kind, said):
        with pytest.raises(ConfigError, match=said):
            draft(kind, text)

    @given(st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.booleans())
    def test_a_value_survives_its_spelling(self, value):
        assert draft(type(value), str(value)) == value

    @given(st.text(alphabet="${}\\.:,'\"[]ab ?", max_size=12))
    @example("${oc.env:A}")
    def test_recorded_text_is_text_whatever_stands_in_it(self, text):
        if text != "???":
            made = Draft(dataclasses.make_dataclass("Schema", [("x", str, field(default=""))]), "latent")
            made.merge("recorded run", {"x": text})
            assert made.finish().x == text


class TestInterpolation:
    def test_it_is_hashed_and_recorded_as_what_it_stands_for(self):
        got, plain = (
            plan("train.every=${train.steps}", "train.steps=70"),
            plan("train.every=70", "train.steps=70"),
        )
        assert got.flat == plain.flat and got.hashes("d") == plain.hashes("d")
        assert got.to_yaml() == plain.to_yaml()
        assert got.written == {"train.every": "${train.steps}"}

    def test_every_layer_has_it(self, monkeypatch):
        monkeypatch.setenv("FOLDER", "00123")
        written(
            experiments="experiments: {mine: {method: latent, train.every: '${train.steps}', train: {steps: 9}}}",
            more="runs: ${oc.env:FOLDER}",
        )
        got = plan(
            "seed=${.train.every}", name="mine", files=[Path("more.yaml")],
            environ={"REASON_EVAL__LIMIT": "${..train.steps}"},
        )  # fmt: skip
        assert (got.config.train.every, got.config.runs, got.config.seed, got.config.eval.limit) == (
            9,
            "00123",
            9,
            9,
        )
        assert set(got.written) == {"train.every", "runs", "seed", "eval.limit"}
        assert got.origin["train.every"] == "./experiments.yaml: mine"

    def test_a_higher_layer_replaces_it(self):
        written(f="train: {every: '${nothing}'}")
        got = plan("train.every=3", files=[Path("f.yaml")])
        assert got.config.train.every == 3 and got.written == {}

    def test_what_it_stands_for_is_read_like_text(self, monkeypatch, probe):
        for name, value in {"NOTHING": "null", "LIST": "4,5", "SWITCH": "off", "WIDTH": "064"}.items():
            monkeypatch.setenv(name, value)
        got = plan(
            "probe.limit=${oc.env:NOTHING}", "probe.reward.layers=${oc.env:LIST}", "eval.curve=${oc.env:SWITCH}",
            "backbone.hidden=${oc.env:WIDTH}", "runs=a-${oc.env:WIDTH}", "train.every=${oc.env:ABSENT,7}", name="probe",
        ).config  # fmt: skip
        assert (got.probe.limit, got.probe.reward.layers, got.eval.curve) == (None, [4, 5], False)
        assert (got.backbone.hidden, got.runs, got.train.every) == (64, "a-064", 7)

    def test_depths_are_filled_before_others_refer_to_them(self):
        assert plan("train.steps=${depth}").config.train.steps == 2
        got = plan("train.steps=${train_depth}", "depth=${train.every}", "train.every=3")
        assert (got.config.train.steps, got.config.train_depth, got.config.depth) == (3, 3, 3)

    def test_a_null_depth_from_elsewhere_is_filled_too(self):
        got = plan("depth=${oc.env:ABSENT,null}", "train_depth=${depth}")
        assert (got.config.depth, got.config.train_depth) == (2, 2)

    def test_names_may_come_from_the_environment(self, monkeypatch):
        monkeypatch.setenv("DATA", "mine/data.csv")
        monkeypatch.setenv("BACKBONE", "bert4rec")
        got = plan("dataset=${oc.env:DATA}", "backbone=${oc.env:BACKBONE}")
        assert got.config.dataset.path == str(Path("mine/data.csv").absolute())
        assert (got.config.dataset.name, got.config.backbone.name) == ("interactions", "bert4rec")
        assert got.written == {"dataset.path": "${oc.env:DATA}", "backbone.name": "${oc.env:BACKBONE}"}

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("train: {every: '${train.stepz}'}", r"(?s)train\.every=.*\(f\.yaml\).*'train\.stepz'.*mean \$\{train\.steps\}"),
            ("{seed: '${train.every}', train: {every: '${sed}'}}", r"train\.every=\$\{sed\} \(f\.yaml\)"),
            ("seed: ${.sed}", "mean .{seed}"),
            ("runs: '${oc.env:NOT_SET}'", r"(?s)runs=.*\(f\.yaml\).*NOT_SET is not set.*\{oc\.env:NOT_SET,VALUE\}"),
            ("seed: ${seed}", r"seed=\$\{seed\} \(f\.yaml\) refers to itself"),
            ("{seed: '${train.every}', train: {every: '${seed}'}}", "refers to itself"),
            ("runs: a${runs}", "refers to itself"),
            ("runs: ${train}", "refers to a section, not a key"),
            ("train: {every: '${train}'}", "refers to a section, not a key"),
            ("seed: ${runs}", r"seed=\$\{runs\} \(f\.yaml\) resolves to 'runs', which is not a whole number"),
            ("train: {lr: '${oc.env:RATE}'}", "resolves to 'nan', which is not a number"),
            ("train: {schedule: '${runs}'}", "(?s)resolves to 'runs'.*Choices: constant"),
            ("seed: ${oc.nev:A}", "no resolver 'oc.nev'"),
            ("runs: '${oc.decode:\"{\"}'", "cannot be resolved"),
            ("dataset: ${runs}", r"dataset\.name=\$\{runs\} \(f\.yaml\).*no layer sets"),
            ("depth: ${train.stepz}", "depth=.*'train.stepz'"),
        ],
    )  # fmt: skip
    def test_refusals_name_key_and_layer_and_mend(self, text, said, monkeypatch):
        monkeypatch.setenv("RATE", "nan")
        written(f=text)
        with pytest.raises(ConfigError, match=said):
            plan(files=[Path("f.yaml")])

    def test_show_gives_both(self, capsys):
        told = json.loads(shown(capsys, "latent", "train.every=${train.steps}", "train.steps=70", "--json"))
        assert told["config"]["train"]["every"] == 70
        assert told["written"] == {"train.every": "${train.steps}"}
        table = shown(capsys, "latent", "train.every=${train.steps}", "train.steps=70")
        lines = table[table.index("train.every") :].splitlines()
        assert "70" in lines[0] and "${train.steps}" in lines[1]


class TestExtends:
    CHAIN = """
experiments:
  base: {summary: the first, method: mor, train: {lr: 0.5, steps: 9}, mor.routing: none}
  middle: {extends: base, train.steps: 8}
  top: {extends: middle, summary: the last, train: {warmup: 0.25}}
"""

    def test_it_is_a_difference_to_another(self):
        written(experiments=self.CHAIN)
        got = plan(name="top")
        assert (got.card.name, got.config.train.lr, got.config.train.steps, got.config.train.warmup) == (
            "mor", 0.5, 8, 0.25,
        )  # fmt: skip
        assert got.origin["train.lr"] == got.origin["mor.routing"] == "./experiments.yaml: base"
        assert got.origin["train.steps"] == "./experiments.yaml: middle"
        assert got.origin["train.warmup"] == "./experiments.yaml: top"

    def test_a_list_of_experiments_knows_the_method_and_not_the_summary(self):
        written(experiments=self.CHAIN)
        got = experiments()
        assert [got[n]["method"] for n in ("base", "middle", "top")] == ["mor"] * 3
        assert [got[n]["summary"] for n in ("base", "middle", "top")] == ["the first", "", "the last"]

    def test_a_shipped_one_is_extended_and_named(self):
        written(experiments="experiments: {mine: {extends: mor-expert, train.lr: 0.5}}")
        got = plan(name="mine")
        assert got.origin["mor.routing"] == "shipped experiments.yaml: mor-expert"
        assert got.origin["train_depth"] == "shipped experiments.yaml: mor-recursive"
        assert plan(name="mor-expert").origin["method"] == "shipped experiments.yaml: mor-vanilla"

    def test_a_local_override_of_a_shipped_one_is_inherited_too(self):
        written(
            experiments="experiments: {mor-recursive: {train.lr: 0.5}, mine: {extends: mor-token, train.steps: 3}}"
        )
        for name in ("mor-recursive", "mor-token", "mine"):
            got = plan(name=name)
            assert (
                got.config.train.lr == 0.5 and got.origin["train.lr"] == "./experiments.yaml: mor-recursive"
            )
        assert experiments()["mor-recursive"]["method"] == "mor"
        assert experiments()["mor-recursive"]["summary"]

    def test_a_local_override_may_extend_another(self):
        written(experiments="experiments: {mor-expert: {extends: mor-smollm2}}")
        got = plan(name="mor-expert")
        assert got.config.backbone.source == "smollm2-135m" and got.config.mor.routing == "expert"

    def test_an_experiment_of_a_methods_name_passes_the_method_on(self):
        written(experiments="experiments: {latent: {train.lr: 0.5}, mine: {extends: latent}}")
        assert plan(name="mine").card.name == "latent" and plan(name="mine").config.train.lr == 0.5
        assert experiments()["mine"]["method"] == "latent"

    def test_a_replaced_dataset_takes_its_keys_along(self):
        written(
            experiments="experiments:\n"
            "  one: {method: latent, dataset: {name: synthetic-interactions, users: 9, min_user: 2}}\n"
            "  two: {extends: one, dataset: movielens-100k}\n"
        )
        got = plan(name="two").config.dataset
        assert (got.name, got.min_user) == ("movielens-100k", 2) and not hasattr(got, "users")

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("{a: {method: latent, extends: a}}", "(?s)'a' .*extends itself: a -> a.*merged onto"),
            ("{a: {extends: b}, b: {extends: c}, c: {extends: a}}", "extends itself: a -> b -> c -> a"),
            (
                "{a: {extends: mor-expret}}",
                "(?s)'a'.*experiments.yaml.*unknown experiment: 'mor-expret'.*'mor-expert'",
            ),
            ("{a: {extends: mor}}", "method: mor"),
            ("{a: {extends: [b, c]}}", "`extends` of the experiment 'a'"),
            ("{a: {extends: ''}}", "`extends` of the experiment 'a'"),
            ("{b: {train.lr: 1}, a: {extends: b}}", "does not name a method"),
        ],
    )
    def test_refused(self, text, said):
        written(experiments=f"experiments: {text}")
        with pytest.raises(ConfigError, match=said):
            plan(name="a")


@dataclass
class JudgeConfig:
    temperature: float = key(1.0, "softmax temperature", evaluation=True)
    prompt: str = key("", "file of the prompt", path=True)


@dataclass
class RewardConfig:
    source: str = key("", "the model that rewards", path="settled")
    lr: float = key(0.1, "learning rate of the reward model")
    layers: list[int] | None = key(None, "layers that are trained; null = all")
    judge: JudgeConfig = field(default_factory=JudgeConfig)

    def __post_init__(self):
        if self.lr <= 0:
            raise ValueError(f"probe.reward.lr is {self.lr}; it must be above 0.")


@dataclass
class ProbeConfig:
    checked: ClassVar[list] = []  # limits, in the order in which they were checked
    limit: float | None = key(None, "a limit")
    names: list[str] = key(["a", "b"], "names")
    reward: RewardConfig = field(default_factory=lambda: RewardConfig(lr=0.25))

    def __post_init__(self):
        self.checked.append(self.limit)


@pytest.fixture
def probe(monkeypatch):
    """A registered method whose Config has sections inside sections."""
    card = MethodCard(
        name="probe", summary="", paper="", Config=ProbeConfig, depth=DepthAxis("steps", 0, 2, "none"), view="sequences",
        units=Units("user", "NDCG@10", "one request", "users/s"), target="nowhere:Nothing", backbone="sasrec",
        dataset="movielens-100k",
    )  # fmt: skip
    entries = registry._entries
    entry = SimpleNamespace(name="probe", value="probe:card", load=lambda: card)
    monkeypatch.setattr(
        registry, "_entries", lambda kind: entries(kind) | ({"probe": entry} if kind == "methods" else {})
    )
    marked_keys.cache_clear()
    defaults.cache_clear()
    yield card
    marked_keys.cache_clear()
    defaults.cache_clear()


@pytest.mark.usefixtures("probe")
class TestNestedSections:
    def test_every_layer_reaches_them(self):
        written(
            experiments="experiments: {mine: {method: probe, probe: {reward: {judge: {temperature: 3}}, limit: 1}}}",
            f="probe: {reward: {layers: [4, 5]}}",
        )
        got = plan(
            "probe.reward.lr=0.5", name="mine", files=[Path("f.yaml")],
            environ={"REASON_PROBE__REWARD__SOURCE": "00123"},
        )  # fmt: skip
        reward = got.config.probe.reward
        assert isinstance(reward, RewardConfig) and isinstance(reward.judge, JudgeConfig)
        assert (reward.source, reward.lr, reward.layers, reward.judge.temperature) == (
            "00123",
            0.5,
            [4, 5],
            3.0,
        )
        assert got.origin["probe.reward.source"] == "REASON_PROBE__REWARD__SOURCE"
        assert got.origin["probe.reward.judge.temperature"] == "./experiments.yaml: mine"
        assert got.flat["probe.reward.judge.temperature"] == 3.0 and got.flat["probe.names"] == ["a", "b"]

    def test_a_section_keeps_the_defaults_of_who_holds_it(self):
        assert plan(name="probe").config.probe.reward.lr == 0.25

    def test_lists_may_be_null_or_empty_and_are_nobody_elses(self):
        assert plan(name="probe").config.probe.reward.layers is None
        got = plan("probe.reward.layers=", "probe.names=", name="probe").config.probe
        assert got.reward.layers is None and got.names == []
        plan(name="probe").config.probe.names.append("c")
        assert plan(name="probe").config.probe.names == ["a", "b"] == ProbeConfig().names

    def test_they_are_recorded(self):
        got = plan("probe.reward.judge.temperature=2", "probe.reward.layers=1,2", name="probe")
        recorded = yaml.safe_load(got.to_yaml())
        assert recorded["probe"]["reward"]["judge"]["temperature"] == 2.0
        again = restore("probe", recorded)
        assert again.flat == got.flat and again.hashes("d") == got.hashes("d")

    def test_hashes(self):
        def hashes(*words):
            return plan(*words, name="probe").hashes("d")

        plain = hashes()
        assert hashes("probe.reward.lr=0.5")[0] != plain[0]
        judged = hashes("probe.reward.judge.temperature=2")
        assert judged[0] == plain[0] and judged[1] != plain[1]
        assert hashes("probe.reward.source=elsewhere", "probe.reward.judge.prompt=p.txt") == plain

    def test_paths_are_recorded_from_the_root(self):
        got = plan("probe.reward.judge.prompt=p.txt", "probe.reward.source=hub/id", name="probe").config.probe
        assert got.reward.judge.prompt == str(Path("p.txt").absolute()) and got.reward.source == "hub/id"

    def test_a_sweep_over_them(self):
        got = plan_sweep("probe", ["probe.reward.judge.temperature=1,2", "probe.reward.lr=0.1,0.2"])
        assert len(got.trials) == 4 and got.trainings == 2

    def test_reports_know_them(self):
        assert evaluation_keys("probe") == {"probe.reward.judge.temperature"}
        told = defaults("probe")
        assert (told["probe.reward.lr"], told["probe.reward.layers"], told["probe.names"]) == (
            0.25,
            None,
            ["a", "b"],
        )
        assert marked(ProbeConfig, "path") == {"reward.source", "reward.judge.prompt"}

    def test_show_explains_them(self, capsys):
        told = shown(capsys, "probe", "probe.reward.layers=1,2")
        assert "probe.reward.judge.temperature" in told and "softmax temperature" in told
        config = json.loads(shown(capsys, "probe", "--json"))["config"]
        assert config["probe"]["reward"]["judge"] == {"temperature": 1.0, "prompt": ""}

    @pytest.mark.parametrize(
        ("word", "said"),
        [
            ("probe.reward.sorce=x", "mean 'probe.reward.source'"),
            ("probe.reward.temperature=2", "mean 'probe.reward.judge.temperature'"),
            ("probe.reward.judge.lr=2", "mean 'probe.reward.lr'"),
            ("probe.reward.laers=2", "mean 'probe.reward.layers'"),  # and not backbone.layers
            ("probe.reward=x", "e.g. probe.reward.source="),
            ("probe.reward.judge=x", "e.g. probe.reward.judge.temperature="),
            ("probe.reward.lr=0", "above 0"),
            ("probe.reward.layers=1,x", "list of whole numbers"),
            ("probe.reward.lr.x=1", "Unknown key 'probe.reward.lr.x'"),
        ],
    )
    def test_refusals(self, word, said):
        with pytest.raises(ConfigError, match=said):
            plan(word, name="probe")


@pytest.mark.parametrize("words", [["--help"], ["list"], ["list", "experiments"]])
def test_what_resolves_nothing_does_not_import_omegaconf(words):
    code = (
        f"import sys\nfrom reason.cli.app import main\nsys.argv = ['reason', *{words}]\n"
        "try: main()\n"
        "finally: print('omegaconf' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "False" and done.stdout


def test_names_are_completed_without_omegaconf():
    code = "import sys; from reason.cli.arguments import _sweepable; print(_sweepable('mor-ex'), 'omegaconf' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['mor-expert', 'mor-expert-flops'] False"
