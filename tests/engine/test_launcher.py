"""Workers: their errors arrive, nothing of the parent's changes, and no kill leaves an orphan."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reason.engine import orphans
from reason.engine.launcher import _record, _recorded, launch
from reason.errors import ConfigError, DamagedRun, MissingExtra, ReasonError, RunError


class OwnError(ReasonError):
    """Of a package that is not reason."""

    exit_code = 4

    def __init__(self, number: int, message: str):
        super().__init__(message, "Mend it.")
        self.number = number

    def __reduce__(self):
        return (type(self), (self.number, self.message))


def fails(payload: dict) -> None:
    assert os.environ["OMP_NUM_THREADS"] == "3"
    raise OwnError(7, "It went wrong.")


def works(payload: dict) -> None:
    Path(payload["folder"], f"threads-{os.environ['RANK']}").write_text(os.environ["OMP_NUM_THREADS"])


def test_an_error_of_any_package_arrives_as_what_it_is(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    with pytest.raises(OwnError, match="It went wrong") as told:
        launch(fails, {"folder": str(tmp_path)}, 2, 3)
    assert told.value.number == 7 and told.value.hint == "Mend it."
    assert "OMP_NUM_THREADS" not in os.environ


def test_the_number_of_threads_is_that_of_the_workers_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    launch(works, {"folder": str(tmp_path)}, 2, 3)
    assert [(tmp_path / f"threads-{r}").read_text() for r in (0, 1)] == ["3", "3"]
    assert os.environ["OMP_NUM_THREADS"] == "5"


def test_errors_survive_being_written_down():
    class Local(ReasonError):
        pass

    for error in (
        RunError("a", "b"), ConfigError("a"), MissingExtra("a", "tune"), DamagedRun("r", "f", "is", "m"), OwnError(1, "x")
    ):  # fmt: skip
        again = _recorded(_record(error))
        assert type(again) is type(error) and (again.message, again.hint) == (error.message, error.hint)
    again = _recorded(_record(Local("said", "mend")))
    assert type(again) is RunError and (again.message, again.hint) == ("said", "mend")
    for strange in ({"module": "nowhere"}, {"module": "os", "name": "getcwd"}, {"name": "ReasonErr"}):
        said = {**_record(RunError("said", "mend")), **strange}
        assert (_recorded(said).message, type(_recorded(said))) == ("said", RunError)


LAUNCH = """
import os, sys, time
from pathlib import Path
from reason.engine.launcher import launch

def work(payload):
    import torch.distributed as dist
    dist.init_process_group("gloo")
    Path(payload["folder"], f"joined-{dist.get_rank()}").touch()
    time.sleep(600)

if __name__ == "__main__":
    from torch.distributed.launcher.api import elastic_launch  # once, for all the parents that are forked here
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            launch(work, {"folder": line.strip()}, 2, 1)
        print(child, flush=True)
        os.waitpid(child, 0)
"""


def descendants(pid: int) -> set[int]:
    found: set[int] = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            child = int(stat.parent.name)
            found |= {child} | descendants(child)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_workers_end_with_a_parent_that_is_killed_at_any_moment(tmp_path):
    """Before they have joined and after. The moments count from when the first worker is there."""
    (tmp_path / "job.py").write_text(LAUNCH)
    jobs = []
    with subprocess.Popen(
        [sys.executable, "job.py"], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.DEVNULL,
    ) as starter:  # fmt: skip
        assert starter.stdin and starter.stdout
        for moment in (0.1, 0.5, 1.0, 2.0, 4.0, None):  # None: all have joined
            folder = tmp_path / str(moment)
            folder.mkdir()
            starter.stdin.write(f"{folder}\n")
            starter.stdin.flush()
            parent = int(starter.stdout.readline())
            end = time.monotonic() + 60
            while len(descendants(parent)) < 2 and time.monotonic() < end:
                time.sleep(0.02)
            if moment is None:
                while len(list(folder.glob("joined-*"))) < 2 and time.monotonic() < end:
                    time.sleep(0.1)
                assert len(list(folder.glob("joined-*"))) == 2
            else:
                time.sleep(moment)
            workers = descendants(parent)
            os.kill(parent, signal.SIGKILL)
            assert workers
            jobs.append((moment, workers))
        starter.stdin.close()
    end = time.monotonic() + 15  # a worker that is still loading torch looks when it has
    while time.monotonic() < end and any(alive(pid) for _, workers in jobs for pid in workers):
        time.sleep(0.1)
    left = {moment: [pid for pid in workers if alive(pid)] for moment, workers in jobs}
    for pids in left.values():
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    assert not any(left.values()), left


WATCHED = """
import os, subprocess, sys, time
code = "import sys, time; from reason.engine import orphans; sys.platform = sys.argv[2]; " \\
       "orphans.end_with(int(sys.argv[1])); print('ready', flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", code, str(os.getpid()), sys.argv[1]], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_the_kernel_or_a_thread_sees_the_parent_end(platform):
    parent = subprocess.Popen([sys.executable, "-c", WATCHED, platform], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    child = int(parent.stdout.readline())
    time.sleep(2 * orphans.LOOK_S)
    assert alive(child)
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    end = time.monotonic() + 5
    while alive(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(child)


def test_a_parent_that_is_gone_already_ends_a_worker():
    code = "from reason.engine.orphans import end_with; end_with(1234567); print('went on')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and "went on" not in done.stdout
