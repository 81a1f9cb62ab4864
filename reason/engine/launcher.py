"""Start the workers of a run: in this process for one, elastic workers for several."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reason import errors
from reason.errors import ReasonError, RunError
from reason.files import read_json, write_json

FAILURE = "failure.json"


class Terminated(BaseException):
    """SIGTERM arrived (exit 143)."""


@contextmanager
def signals() -> Iterator[None]:
    """Within, SIGTERM raises ``Terminated``, as SIGINT raises KeyboardInterrupt: both let us close the run."""

    def terminate(signum: int, frame: Any) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not the main thread: whoever runs us handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def launch(work: Callable[..., Any], payload: dict[str, Any], processes: int, threads: int) -> None:
    """Run module-level ``work(payload)`` in ``processes`` ranks and wait.

    Raises:
        ReasonError: what a rank raised for people, or RunError naming the rank that failed first.
    """
    if processes == 1:
        work(payload)
        return
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ["OMP_NUM_THREADS"] = str(threads)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=0, start_method="spawn", monitor_interval=0.2,
    )  # fmt: skip
    failure = Path(payload["folder"]) / FAILURE
    failure.unlink(missing_ok=True)
    try:
        elastic_launch(config, _guarded)(work, payload)
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from error
        raise Terminated from error
    except ChildFailedError as error:
        if failure.exists():
            said = read_json(failure)
            kind = getattr(errors, said["kind"])
            raise kind(*said["arguments"]) from None
        rank, first = error.get_first_failure()
        raise RunError(
            f"Rank {rank} ended with exit code {first.exitcode}.",
            f"Its last words are in {failure.with_name(f'log-rank{rank}.txt' if rank else 'log.txt')}.",
        ) from None


def _guarded(work: Callable[..., Any], payload: dict[str, Any]) -> None:
    """Leave an error for people where the parent finds it, and end this rank so that the others end too."""
    try:
        work(payload)
    except ReasonError as error:
        failure = Path(payload["folder"]) / FAILURE
        if not failure.exists():
            kind, arguments = error.__reduce__()
            write_json(failure, {"kind": kind.__name__, "arguments": list(arguments)})
        raise SystemExit(1) from None
