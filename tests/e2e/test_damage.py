"""A disk fills up, a copy breaks off, a bit flips: what is damaged is told with its mend, no number is wrong, and no
good run is hidden.

``python tests/e2e/test_damage.py`` damages every file in every way under every verb, and prints the table.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import random
import runpy
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import runs, timeless

from reason.cli.app import main
from reason.files import append_json_lines, read_json
from reason.tracking.folder import RunFolder

WORDS = runpy.run_path(str(Path(__file__).parents[1] / "conftest.py"))["TINY"]["sequences"]
PARTS = ("first", "middle", "last")  # third of a file
DAMAGES = ("half", "empty", "null", "hollow", *PARTS)
READS = ("list", "show", "compare", "study", "predict", "inspect")
WRITES = ("sync", "evaluate", "resume", "rm")
SAME, TOLD = "=", "!"  # the same answer; said, with the file or as a plain error


def damaged(data: bytes, how: str, seed: str) -> bytes:
    """The content of a file after an accident; a part of it names where a bit flips."""
    if how not in PARTS:
        return {"half": data[: len(data) // 2], "empty": b"", "null": b"null", "hollow": b"{}"}[how]
    rng, n = random.Random(f"{seed} {how}"), len(data)
    first, after = (n * (PARTS.index(how) + i) // 3 for i in (0, 1))
    at = rng.randrange(first, max(after, first + 1))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


class Bench:
    """A finished run, an interrupted one and a good one, made once by the command and restored after each accident."""

    def __init__(self, place: Path, store: Path | None = None):
        self.kept = place / "kept"
        (place / "work").mkdir()
        if store is not None:
            shutil.copy(store, place / "work" / "mlflow.db")
        os.chdir(place / "work")
        for seed in range(3):
            code, _, err = self.call("run", "latent", *WORDS, f"seed={seed}")
            assert code == 0, err
        made = sorted(runs(), key=lambda r: r.config["seed"])
        self.finished, self.interrupted, self.good = (r.name for r in made)
        assert self.call("sync")[0] == 0
        self._interrupt(made[1])
        self.call("list", "runs")  # closes it
        shutil.copytree("runs", self.kept / "runs")
        self.answers: dict[tuple[str, str], str] = {}
        for run in (self.finished, self.interrupted):
            for verb in (*READS, *WRITES):
                self.restore()
                self.answers[run, verb] = self.answer(verb, run)[-1]
        self.restore()

    @staticmethod
    def _interrupt(run: RunFolder) -> None:
        """As if it had been killed while it was judged."""
        (run / "result.json").unlink()
        events = [e for e in run.events() if e["event"] != "closed"]
        (run / "events.jsonl").unlink()
        append_json_lines(run / "events.jsonl", events)
        run.beat()

    def restore(self) -> None:
        shutil.rmtree("runs")
        shutil.copytree(self.kept / "runs", "runs")

    @staticmethod
    def call(*words: str, stdin: str = "") -> tuple[int, str, str]:
        """The command in this process: exit code, stdout, stderr."""
        out, err, before = io.StringIO(), io.StringIO(), (sys.argv, sys.stdin)
        sys.argv, sys.stdin = ["reason", *words], io.StringIO(stdin)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        finally:
            sys.argv, sys.stdin = before
        return code, out.getvalue(), err.getvalue()

    def answer(self, verb: str, run: str) -> tuple[int, str, str, str]:
        """Exit code, all that was said, stderr, and the answer without what differs from time to time."""
        before = set(Path("runs").iterdir())
        words = {
            "list": ("list", "runs", "--json"), "show": ("show", run, "--json"), "compare": ("compare", "--json"),
            "study": ("study", "--json"), "inspect": ("inspect", run, "--json"), "sync": ("sync", "--json"),
            "rm": ("rm", "-y", run),
        }  # fmt: skip
        if verb == "rm":  # the store is not restored
            (Path("runs") / run / "mlflow.json").unlink(missing_ok=True)
        code, out, err = self.call(*words.get(verb, (verb, run)), stdin='{"user": "1"}\n{"user": "7"}\n')
        said = f"{out}\n{' '.join(err.split())}"
        assert "Traceback" not in said, said
        if verb in ("evaluate", "resume"):
            new = (
                [p for p in Path("runs").iterdir() if p not in before]
                if verb == "evaluate"
                else [Path("runs") / run]
            )
            found = RunFolder(new[0]).result if code == 0 else None
            out = json.dumps([[timeless(vars(j)) | {"rivals": "", "accuracy": vars(j.accuracy)} for j in found.curve]
                              if found else None, found and found.train_hash], default=str)  # fmt: skip
        elif verb == "compare":  # a command that is suggested is no number
            out = json.dumps([t | {"hints": []} for t in json.loads(out)["tables"]]) if code == 0 else out
        elif verb == "sync" and out:
            out = json.dumps([(r["run"], r["status"], r["error"]) for r in json.loads(out)["runs"]])
        return code, said, err, f"{code} {out}"

    def outcome(self, verb: str, run: str, file: str, how: str) -> str:
        """What became of a verb after an accident, or an assertion that fails."""
        code, said, err, answer = self.answer(verb, run)
        where = f"{verb} after {file} of {run}: {how}\n{said}"
        told = Path(file).name in (said if verb == "sync" else err) or (code != 0 and "error:" in err)
        assert told or answer == self.answers[run, verb], f"silently wrong: {where}\n{answer}"
        if verb == "list":
            row = next(r for r in json.loads(said[: said.rindex("}") + 1])["runs"] if r["run"] == self.good)
            assert row in json.loads(self.answers[run, "list"].partition(" ")[2])["runs"], where
        if verb in ("compare", "study"):
            assert code == 0 and 2 in _seeds(json.loads(said[: said.rindex("}") + 1])), where
        if verb == "resume" and code == 0:  # whole again, and no hours lost in silence
            result, kept = RunFolder(Path("runs") / run).result, self.kept / "runs" / run / "result.json"
            assert result is not None
            least = read_json(kept)["metrics"]["device_hours"] if kept.exists() else 0.0
            hours = result.metrics.get("device_hours")
            assert hours >= least if hours is not None else "device-hours are left out" in said, where
        return TOLD if told else SAME

    def files(self, run: str) -> list[str]:
        folder = self.kept / "runs" / run
        found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        alike = ("best-3", "step-3", "depth0", "test-depth2", "valid-depth1", "successor", "mlflow.lock")
        return [f for f in found if (folder / f).stat().st_size and not any(word in f for word in alike)]

    def accident(self, run: str, file: str, how: str, verbs: tuple[str, ...]) -> dict[str, str]:
        """The outcome of each verb after one file of a run was damaged."""
        outcomes = {}
        for verb in verbs:
            if verb in WRITES or not outcomes:
                self.restore()
                path = Path("runs") / run / file
                path.write_bytes(damaged(path.read_bytes(), how, f"{run.split('-')[0]} {file}"))
            outcomes[verb] = self.outcome(verb, run, file, how)
        return outcomes


@pytest.fixture(scope="module")
def bench(tmp_path_factory, template) -> Iterator[Bench]:
    here = Path.cwd()
    yield Bench(tmp_path_factory.mktemp("bench"), template)
    os.chdir(here)


@pytest.fixture
def accidents(bench, monkeypatch):
    monkeypatch.chdir(bench.kept.parent / "work")
    return bench


# What a file can be damaged by: JSON also by being something else.
JSON = ("run.json", "result.json", "origin.json", "env.json", "calibration.json", "mlflow.json")
READ = [
    *JSON, "config.yaml", "events.jsonl", "metrics.jsonl", "alive", "catalogue.arrow", "rows/test-depth1.arrow",
    "rows/valid-depth2.arrow", "rows/test-popularity.arrow", "model/model.safetensors",
]  # fmt: skip
RESUMED = [
    "run.json", "config.yaml", "events.jsonl", "alive", "metrics.jsonl", "checkpoints/step-6/model.safetensors",
    "checkpoints/step-6/optimizer.safetensors", "checkpoints/step-6/state.json", "checkpoints/best-6.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("file", READ)
def test_a_damaged_file_of_a_finished_run_gives_no_wrong_number_and_hides_no_good_run(accidents, file):
    """One accident in each third of a file and two coarse ones, seeded by the file; the whole table takes minutes."""
    kinds = ("half", "empty", *(("null", "hollow") if file in JSON else ()))
    rng = random.Random(file)
    for how in (rng.choice(kinds), rng.choice(PARTS)):
        accidents.accident(accidents.finished, file, how, READS)


@pytest.mark.parametrize(
    "file", ["model/model.safetensors", "calibration.json", "events.jsonl", "result.json"]
)
def test_evaluating_a_run_with_a_damaged_file(accidents, file):
    found = accidents.accident(accidents.finished, file, "middle", ("evaluate", "sync"))
    assert found["evaluate"] == (TOLD if "model" in file or "result" in file else SAME)
    assert not [r for r in runs() if r.status == "failed"]  # refused before anything was made


@pytest.mark.parametrize("file", RESUMED)
def test_an_interrupted_run_with_a_damaged_file_comes_to_the_same_end_or_says_why_not(accidents, file):
    rng = random.Random(file)
    accidents.accident(
        accidents.interrupted, file, rng.choice(("half", "empty", *PARTS)), ("list", "show", "resume")
    )


@pytest.mark.parametrize("how", ["half", "middle"])
@pytest.mark.parametrize(
    "file", ["model/model.safetensors", "rows/test-depth2.arrow", "calibration.json", "catalogue.arrow"]
)
def test_the_mend_that_is_told_makes_the_run_whole_again(accidents, file, how):
    """Every number, file by file, is that of before."""
    accidents.restore()
    run = Path("runs") / accidents.finished
    before = read_json(run / "result.json")
    (run / file).write_bytes(damaged((run / file).read_bytes(), how, file))
    code, out, err = (
        accidents.call("compare") if "rows" in file else accidents.call("predict", run.name, stdin="{}\n")
    )
    said = " ".join((out + err).split())
    assert file.rpartition("/")[2] in said, said
    mend = (
        said.partition(f"reason resume {run}")[1].split()[1:]
        if file != "catalogue.arrow"
        else ["resume", run.name]
    )
    assert mend, said
    code, _, err = accidents.call(*mend)
    assert code == 0 and file in err, err
    after = read_json(run / "result.json")
    same = [name for name in before["files"] if not name.endswith(".jsonl")]
    assert {n: after["files"][n]["sha256"] for n in same if "depth" not in n} == {
        n: before["files"][n]["sha256"] for n in same if "depth" not in n
    }
    assert timeless(after["curve"]) == timeless(before["curve"]) and not RunFolder(run).altered(
        RunFolder(run).result
    )
    assert after["metrics"]["device_hours"] > before["metrics"]["device_hours"]
    assert accidents.call(*mend)[2] == ""  # nothing is left to do


@pytest.mark.parametrize("file", ["model/model.safetensors", "network.json", "tokenizer/tokenizer.json"])
def test_a_damaged_run_is_no_source_until_it_is_mended(reason, tiny_text, store, file):
    words = [*tiny_text, "mor.routing=none", "train.epochs=1", "dataset.train_documents=20"]
    assert reason("run", "mor", *words).code == 0
    (made,) = runs()
    numbers = timeless(read_json(made / "result.json")["curve"])
    (made / file).write_bytes(damaged((made / file).read_bytes(), "last", file))
    for verb in (("run", "mor", *words, f"backbone.source=run:{made.name}"), ("inspect", made.name)):
        said = reason(*verb)
        told = " ".join(said.err.split())
        assert said.code in (1, 2) and file.partition("/")[0] in told and len(runs()) == 1, told
        assert f"reason resume {made.path.resolve()}" in told or f"reason resume {made.path}" in told, told
    assert reason("resume", made.name).code == 0
    assert timeless(read_json(made / "result.json")["curve"]) == numbers
    assert reason("inspect", made.name).code == 0
    assert reason("run", "mor", *words, f"backbone.source=run:{made.name}", "seed=1").code == 0


def test_a_mend_that_fails_leaves_the_result(accidents, monkeypatch):
    from reason.engine import runner

    accidents.restore()
    run = RunFolder(Path("runs") / accidents.finished)
    (run / "model/model.safetensors").write_bytes(b"")
    before = (run / "result.json").read_bytes()

    def broken(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runner, "launch", broken)
    code, _, err = accidents.call("resume", run.name)
    assert code == 1 and "No space left" in err
    assert run.status == "finished" and (run / "result.json").read_bytes() == before
    monkeypatch.undo()
    os.chdir(accidents.kept.parent / "work")
    assert accidents.call("resume", run.name)[0] == 0 and not run.altered(run.result)


def test_a_running_run_is_not_told_to_be_resumed(accidents):
    accidents.restore()
    run = RunFolder(Path("runs") / accidents.interrupted)
    with run.lock():
        for verb in ("evaluate", "predict", "inspect", "show", "compare"):
            code, out, err = accidents.call(verb, run.name)
            said = " ".join((out + err).split())
            assert "is running" in said and "Wait until it has finished" in said and "resume" not in said, (
                said
            )
        code, _, err = accidents.call("resume", run.name)
        assert code == 1 and "is running in another process" in err
        rows = json.loads(accidents.call("list", "runs", "--json")[1])["runs"]
        assert {r["run"]: r["status"] for r in rows}[run.name] == "running"


def test_a_sweep_goes_on_beside_damaged_runs(accidents, tiny):
    accidents.restore()
    (Path("runs") / accidents.finished / "run.json").write_text("")
    (Path("runs") / accidents.interrupted / "run.json").write_text("null")
    words = ["sweep", "latent", *tiny, "depth=0,1", "seed=0", "train_depth=1"]
    for _ in range(2):  # made, and found again
        code, _, err = accidents.call(*words)
        assert code == 0, err
    assert len([r for r in runs() if r.identity["parent"]]) == 2
    assert accidents.call("resume", "last")[0] == 0


SWEEP = ["depth=0,1", "seed=0", "train_depth=1"]


# of a trial that took over the model, and of the one that trained it
@pytest.mark.parametrize(("depth", "content"), [(0, "{"), (1, "{}")])
def test_a_trial_whose_result_cannot_be_read_is_made_again(reason, tiny, store, depth, content):
    words = ["sweep", "latent", *tiny, *SWEEP]
    assert reason(*words).code == 0
    torn = next(r for r in runs() if r.identity["parent"] and r.config["depth"] == depth)
    (torn / "result.json").write_text(content)
    said = reason(*words)
    assert said.code == 0, said.err
    assert f"{torn.name} is damaged: result.json" in said.err and "It counts as not finished" in said.err
    (sweep,) = runs("sweep")
    results = [RunFolder(Path("runs") / t.run).result for t in sweep.sweep_result.trials]
    assert [r.depth for r in results] == [1, 0] and torn.name not in {r.run for r in results}
    with open(sweep / "trials.csv", encoding="utf-8") as f:
        assert [float(row["accuracy"]) for row in csv.DictReader(f)] == [r.accuracy.value for r in results]


def test_a_trial_whose_result_is_torn_while_the_sweep_goes_on_is_told_and_ends_nothing(
    reason, tiny, store, monkeypatch
):
    from reason.engine import sweep as engine

    real = engine.run

    def torn(plan, **keys):
        made = real(plan, **keys)
        if plan.config.depth == 1:
            (made / "result.json").write_text("{")
        return made

    with monkeypatch.context() as m:
        m.setattr(engine, "run", torn)
        said = reason("sweep", "latent", *tiny, *SWEEP)
    assert said.code == 3 and "Traceback" not in said.err, said.err
    (sweep,) = runs("sweep")
    assert "It counts as not finished" in said.err and sweep.status == "failed" and sweep.sweep_result is None
    with open(sweep / "trials.csv", encoding="utf-8") as f:
        assert [bool(row["accuracy"]) for row in csv.DictReader(f)] == [False, True]
    assert reason("resume", sweep.name).code == 0
    assert sweep.sweep_result.metrics["trials"] == 2


def _seeds(answer) -> set[int]:
    """Every number of a list called ``seeds``, wherever it stands."""
    if isinstance(answer, dict):
        own = answer.get("seeds")
        here = set(own) if isinstance(own, list) else set()
        return here.union(*map(_seeds, answer.values())) if answer else here
    return set().union(*map(_seeds, answer)) if isinstance(answer, list) and answer else set()


def table() -> Iterator[str]:
    """Every file of a finished and of an interrupted run, damaged in every way, under every verb."""
    with tempfile.TemporaryDirectory() as place:
        here = Bench(Path(place))
        yield f"= same answer, ! told (the file is named, or a plain error); verbs: {' '.join((*READS, *WRITES))}"
        for kind, run in (("finished", here.finished), ("interrupted", here.interrupted)):
            yield f"{kind:42}" + " ".join(f"{how:10}" for how in DAMAGES)
            for file in here.files(run):
                cells = []
                for how in DAMAGES:
                    fits = how not in ("null", "hollow") or file.endswith(".json")
                    writes = WRITES if how in ("half", "middle") else ()
                    found = here.accident(run, file, how, (*READS, *writes)) if fits else {}
                    cells.append(f"{''.join(found.values()):10}")
                yield f"{file:42}" + " ".join(cells)
        os.chdir("/")


if __name__ == "__main__":
    for line in table():
        print(line, flush=True)
