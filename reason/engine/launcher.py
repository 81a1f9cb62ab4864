"""Start the workers of a run: in this process for one, elastic workers for several."""

from __future__ import annotations

import importlib
import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reason.engine.orphans import end_with
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

    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=0, start_method="spawn", monitor_interval=0.2, run_id=f"reason-{os.getpid()}",
    )  # fmt: skip
    # It logs the traceback of a rank that was killed, which is told below in a sentence.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    failure = Path(payload["folder"]) / FAILURE
    failure.unlink(missing_ok=True)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)  # the ranks inherit it
    try:
        elastic_launch(config, _guarded)(work, payload, os.getpid())
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from error
        raise Terminated from error
    except ChildFailedError as error:
        if failure.exists():
            raise _recorded(read_json(failure)) from None
        rank, first = error.get_first_failure()
        raise RunError(
            f"Rank {rank} exited with code {first.exitcode}.",
            f"Its last output is in {failure.with_name(f'log-rank{rank}.txt' if rank else 'log.txt')}.",
        ) from None
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


# --- in the workers ---------------------------------------------------------------------------------


def _guarded(work: Callable[..., Any], payload: dict[str, Any], parent: int) -> None:
    """Leave an error for people where the parent finds it, and end this rank so that the others end too."""
    end_with(parent)
    try:
        work(payload)
    except ReasonError as error:
        failure = Path(payload["folder"]) / FAILURE
        if not failure.exists():
            write_json(failure, _record(error))
        raise SystemExit(1) from None


def _record(error: ReasonError) -> dict[str, Any]:
    kind, arguments = error.__reduce__()
    return {
        "module": kind.__module__, "name": kind.__qualname__, "message": error.message, "hint": error.hint,
        "arguments": [a if isinstance(a, str | int | float | bool | None) else str(a) for a in arguments],
    }  # fmt: skip


def _recorded(record: dict[str, Any]) -> ReasonError:
    """The error that a rank recorded, of its own type where that can be made again here."""
    try:
        kind: Any = importlib.import_module(record["module"])
        for name in record["name"].split("."):
            kind = getattr(kind, name)
        error = kind(*record["arguments"])
    except (ImportError, AttributeError, TypeError):  # a local class, or one that is made in another way
        error = None
    return error if isinstance(error, ReasonError) else RunError(record["message"], record["hint"])
