"""The command in a process that ends, or is hampered, at a moment that has a name. See test_soak.py."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import resource
import signal
import struct
import sys
import time
from typing import Any

# What Python tells its audit hooks at a moment in the life of a sweep: (event, path), one after the other.
MOMENTS = {
    "spawned": [("open", "")],
    "folder made": [("os.mkdir", r"/rows$")],
    "configuration half written": [("open", r"/\.config\.yaml\.\d+\.tmp$")],
    "identity half written": [("open", r"/\.run\.json\.\d+\.tmp$")],
    "before run.json": [("os.rename", r"/run\.json$")],
    "about to be locked": [("open", r"/lock$")],
    "event": [("open", r"/events\.jsonl$")],
    "points": [("open", r"/metrics\.jsonl$")],
    "best weights unnamed": [("os.rename", r"/best-\d+\.safetensors$")],
    "checkpoint begun": [("os.mkdir", r"/\.step-\d+\.tmp$")],
    "checkpoint half written": [("open", r"/\.step-\d+\.tmp/state\.json$")],
    "checkpoint unnamed": [("os.rename", r"/step-\d+$")],
    "calibration unnamed": [("os.rename", r"/calibration\.json$")],
    "result half written": [("open", r"/\.result\.json\.\d+\.tmp$")],
    "before result.json": [("os.rename", r"/result\.json$")],
    "after result.json": [("os.rename", r"/result\.json$"), ("open", r"/events\.jsonl$")],
    "mirror's note unnamed": [("os.rename", r"/mlflow\.json$")],
}
ONCE = {"spawned"}  # the others come once a trial, or more often
PATH_AT = {"open": 0, "os.mkdir": 0, "os.rename": 1}
CAP_DAC_OVERRIDE = 1  # <linux/capability.h>

# What a sweep needs, for a server that forks: a process that has not to import it begins in no time.
PRELOAD = [
    "torch", "torch._dynamo", "torch.distributed.checkpoint.state_dict", "mlflow", "mlflow.store.tracking.sqlalchemy_store", "pytest",
    "reason.cli.app", "reason.cli.sweep", "reason.cli.compare", "reason.cli.sync", "reason.cli.resume", "reason.cli.rm",
    "reason.engine.sweep", "reason.engine.worker", "reason.reports.comparison", "reason.methods.latent.method",
    "reason.methods.mor.method", "sklearn", "scipy.stats", "pyarrow.feather",
]  # fmt: skip


def run(words: list[str], folder: str, said: str, fault: dict[str, Any]) -> None:
    """``reason WORDS`` in ``folder``, in this process. ``said``: files for stdout (.out) and stderr (.err).

    fault: "moment", "nth" and "signals": what this process sends itself then. "clock": a file with the
    seconds (a double) that the time of day is off. "file_limit": bytes. "obey": file permissions bind root
    too. "environment": variables.
    """
    os.chdir(folder)
    for stream, end in ((sys.stdout, "out"), (sys.stderr, "err")):
        stream.flush()
        # The standard descriptors, not those of pytest, which has put files of its own in their place.
        os.dup2(os.open(f"{said}.{end}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1 if end == "out" else 2)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", encoding="utf-8", closefd=False) for fd in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(fault.get("environment", {}))
    if "clock" in fault:
        _set_clock_by(fault["clock"])
    if "file_limit" in fault:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["file_limit"], resource.RLIM_INFINITY))
    if fault.get("obey") and os.geteuid() == 0:
        _drop(CAP_DAC_OVERRIDE)
    if "moment" in fault:
        _end_at(fault["moment"], fault["nth"], fault["signals"], f"{said}.signal")
    sys.argv = ["reason", *words]
    from reason.cli.app import main

    main()


def _end_at(moment: str, nth: int, signals: list[int], note: str) -> None:
    """Send this process ``signals`` when ``moment`` comes for the ``nth`` time, and write down when that was."""
    steps = [(event, re.compile(path)) for event, path in MOMENTS[moment]]
    seen = [0, 0]  # steps of the moment that goes on, whole moments
    file = os.open(note, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in PATH_AT or seen[1] == nth:
            return
        wanted, path = steps[seen[0]]
        if event != wanted or not path.search(str(arguments[PATH_AT[event]])):
            return
        seen[0] = (seen[0] + 1) % len(steps)
        seen[1] += seen[0] == 0
        if seen == [0, nth]:
            os.write(file, str(time.monotonic()).encode())
            for number in signals:
                os.kill(os.getpid(), number)

    sys.addaudithook(hook)


def _set_clock_by(path: str) -> None:
    """Let ``time.time`` be off by what stands in a file at each moment. The monotonic clock goes on."""
    with open(path, "rb") as f:
        shared = mmap.mmap(f.fileno(), 8, prot=mmap.PROT_READ)
    true = time.time
    time.time = lambda: true() + struct.unpack("d", shared[:8])[0]


def _drop(capability: int) -> None:
    """Do without a capability of root's, in this process."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    libc.capget(header, sets)
    for i in range(3):
        sets[i] &= ~(1 << capability)
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")
