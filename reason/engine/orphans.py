"""Processes that end with the one that started them, even where that is killed and can tell nobody.

Run as a module it does so for a command of Python's: ``python -m reason.engine.orphans PID MODULE ARGUMENT ...``
runs MODULE, and ends its whole process group as soon as its parent is no longer PID.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable

PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
LOOK_S = 0.5  # seconds between two looks at who the parent is


def end_with(parent: int) -> None:
    """From now on this process is killed when its parent ends; at once, if that is no longer ``parent``.

    On Linux the kernel does it, at the end of the *thread* that started us: it has to wait for us, as
    ``launch`` does. Elsewhere a thread looks who our parent is.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before we asked
            os._exit(1)
    else:
        watch(parent, lambda: os._exit(1))


def watch(parent: int, ended: Callable[[], object]) -> None:
    """Call ``ended()``, in a thread, when our parent is no longer ``parent``."""

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_S)
        ended()

    threading.Thread(target=look, name="watch for the parent", daemon=True).start()


if __name__ == "__main__":
    watch(int(sys.argv[1]), lambda: os.killpg(0, signal.SIGKILL))
    sys.argv[:] = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
