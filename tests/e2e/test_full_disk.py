"""A full disk costs what could not be written, says so, and ends nothing that could go on."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import runs, until


@pytest.fixture
def small(tmp_path):
    """A file system of 3 MB. Only root may mount one, and not everywhere."""
    place = tmp_path / "runs"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path, name: str = "ballast") -> Path:
    with open(place / name, "wb", buffering=0) as f:
        try:
            while True:
                f.write(b"\0" * 4096)
        except OSError as error:
            assert error.errno == errno.ENOSPC
    return place / name


def points(folder) -> int:
    return (folder / "metrics.jsonl").stat().st_size if (folder / "metrics.jsonl").exists() else 0


def training(words: list[str]) -> list[str]:
    return [*words, "train.epochs=40", "train.patience=0", "train.every=100", "train.batch_size=4"]


def begun():
    return next((r for r in runs() if any((r / "checkpoints").glob("step-*")) and points(r)), None)


class TestARun:
    def test_goes_on_and_notes_what_was_lost(self, small, spawn, tiny, store):
        process = spawn("run", "latent", *training(tiny))
        folder = until(begun)
        process.send_signal(signal.SIGSTOP)
        ballast, before = fill(small), points(folder)
        process.send_signal(signal.SIGCONT)
        time.sleep(1)  # points are due at the next step, and cannot be written
        assert process.poll() is None and points(folder) - before < 4096
        ballast.unlink()
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert "Traceback" not in err and "points of curves could not be written: No space left" in err
        assert any("points of curves could not be written" in n for n in folder.result.training.notes)
        assert points(folder) > before  # it went on when there was room

    def test_that_cannot_keep_its_model_is_refused_in_words_and_can_be_resumed(
        self, small, spawn, reason, tiny, store
    ):
        process = spawn("run", "latent", *training(tiny))
        folder = until(begun)
        ballast = fill(small)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 1 and "Traceback" not in err, err
        assert "could not be saved" in err and "No space left on device" in err and "reason resume" in err
        ballast.unlink()
        assert reason("resume", folder.name).code == 0
        assert folder.result is not None

    def test_on_a_disk_that_is_full_from_the_start_is_refused(self, small, spawn, tiny, store):
        fill(small)
        process = spawn("run", "latent", *tiny)
        _, err = process.communicate(timeout=120)
        assert process.returncode in (1, 2) and "Traceback" not in err, err
        assert "No space left on device" in err and "runs=PATH" in err
        assert not any(p.is_dir() for p in small.iterdir())

    def test_a_full_log_of_the_terminal_ends_nothing(self, tiny, store):
        if not Path("/dev/full").exists():
            pytest.skip("no /dev/full here")
        code = "from reason.cli.app import main; main()"
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-c", code, "run", "latent", *tiny],
                stderr=full,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert runs()[0].result is not None and "NDCG" in done.stdout
        assert done.returncode == 0


def test_an_answer_into_a_full_file_is_told():
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    code = "from reason.cli.app import main; main()"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code, "list", "methods"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "cannot be written: No space left on device" in done.stderr


class TestASweep:
    def test_on_a_full_disk_says_so(self, small, spawn, tiny, store):
        fill(small)
        process = spawn("sweep", "latent", *tiny, "seed=0,1")
        _, err = process.communicate(timeout=120)
        assert process.returncode in (1, 2, 3) and "Traceback" not in err, err
        assert "No space left on device" in err

    @pytest.mark.parametrize("where", ["mkdir", "open"])
    def test_one_trial_fails_and_the_others_go_on(self, reason, tiny, monkeypatch, where):
        """The second folder of a run cannot be made, or nothing be written into it."""
        made: list[str] = []
        mkdir, opened = os.mkdir, open

        def counted(path, *rest, **words):
            name = Path(path).name
            if name.startswith("latent-") and "sweep" not in name and name not in made:
                made.append(name)
                if len(made) == 2 and where == "mkdir":
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return mkdir(path, *rest, **words)

        def full(file, mode="r", *rest, **words):
            if where == "open" and len(made) >= 2 and made[1] in str(file) and "r" not in mode:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
            return opened(file, mode, *rest, **words)

        monkeypatch.setattr(os, "mkdir", counted)
        monkeypatch.setattr("builtins.open", full)
        said = reason("sweep", "latent", *tiny, "seed=0..2")
        assert said.code == 3 and "1 of 3 trials failed" in said.err and "No space left" in said.err
        assert sum(r.result is not None for r in runs()) == 2 and len(runs()) == 2
