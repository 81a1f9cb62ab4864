"""Where a run comes from: code, machine, versions. Quick, and silent where something is missing.

No host name and no free look at the environment: only variables that change numbers or speed.
torch is not imported; the engine, which has it, names the devices it uses.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from reason.errors import ConfigError

PACKAGES = (
    *("reason-lab", "torch", "numpy", "mlflow", "transformers", "safetensors", "pyarrow", "pyyaml"),
    *("scikit-learn", "scipy", "matplotlib", "typer", "ray", "optuna", "gguf", "accelerate", "triton"),
)
VARIABLES = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "CUDA_VISIBLE_DEVICES"),
    *("CUBLAS_WORKSPACE_CONFIG", "PYTORCH_CUDA_ALLOC_CONF", "NCCL_P2P_DISABLE", "PYTHONHASHSEED"),
    *("TOKENIZERS_PARALLELISM", "HF_HUB_OFFLINE"),
)
DIFF_CAP = 1_000_000  # characters kept of a diff
DIFF = "REASON_DIFF"
NOT_KEPT = f"[not kept: {DIFF}=off]\n"


def capture(cwd: Path | str = ".") -> dict[str, Any]:
    """Commit, machine and versions as plain JSON values. Absent pieces are None, never guessed.

    ``commit``, ``branch``, ``dirty`` (tracked files changed; None without git), ``diff_kept``
    (whether REASON_DIFF lets ``diff`` keep the changes), ``python``, ``platform``,
    ``cpu``, ``cores``, ``memory_gb``, ``accelerators`` (names), ``versions``, ``environment``.
    """
    # One git call for all three: `# branch.oid`, `# branch.head`, then a line per changed file.
    words = ("status", "--porcelain=v2", "--branch", "--untracked-files=no")
    status = _git(cwd, *words, "--ignore-submodules=dirty")
    head = dict(re.findall(r"^# branch\.(oid|head) (.+)$", status or "", re.M))
    commit = head.get("oid")
    return {
        "commit": None if commit == "(initial)" else commit,
        "branch": None if head.get("head") == "(detached)" else head.get("head"),
        "dirty": None if status is None else bool(re.search(r"^[^#]", status, re.M)),
        "diff_kept": _keeps_diff(),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu(),
        "cores": _cores(),
        "memory_gb": _memory_gb(),
        "accelerators": _accelerators(),
        "versions": versions(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def versions() -> dict[str, str]:
    """The installed packages that can change a result, without importing one."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def diff(cwd: Path | str = ".") -> str:
    """What tracked files differ by from the last commit, or '' outside a checkout. Capped, with a note.

    Files that git does not track are never looked at. With REASON_DIFF=off nothing is, and ``NOT_KEPT`` stands
    for the changes, if ``capture`` says that there are any.

    Raises:
        ConfigError: REASON_DIFF is neither on nor off.
    """
    if not _keeps_diff():
        return NOT_KEPT
    words = ("diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv", "--submodule=short")
    text = _git(cwd, *words, "--ignore-submodules=dirty", seconds=10.0) or ""
    if len(text) > DIFF_CAP:
        return text[:DIFF_CAP] + f"\n[truncated: {len(text) - DIFF_CAP} more characters]\n"
    return text


def _keeps_diff() -> bool:
    """Whether uncommitted changes are kept in the run's folder, and so sent to the tracking store."""
    wish = os.environ.get(DIFF, "").strip().lower()
    if wish in ("off", "false", "no", "0"):
        return False
    if wish in ("", "on", "true", "yes", "1"):
        return True
    raise ConfigError(f"{DIFF}={wish} is neither on nor off.", f"With {DIFF}=off, no diff is kept or sent.")


# A folder is looked at, not trusted: nothing that its own git configuration names is run. (Submodules
# have configurations of their own; --ignore-submodules=dirty keeps git from starting in them.)
_HARMLESS = {
    "core.fsmonitor": "", "core.hooksPath": os.devnull, "core.pager": "cat", "core.sshCommand": "false",
    "core.gitProxy": "", "diff.external": "", "credential.helper": "",
}  # fmt: skip
_SEALED = {
    "GIT_OPTIONAL_LOCKS": "0", "GIT_NO_LAZY_FETCH": "1", "GIT_ALLOW_PROTOCOL": "none", "GIT_TERMINAL_PROMPT": "0",
    "GIT_PAGER": "cat",
}  # fmt: skip


def _git(cwd: Path | str, *words: str, seconds: float = 3.0) -> str | None:
    """What git says about a folder, None where it says nothing. Runs no program but git."""
    filters = _filters(cwd)
    if filters is None or any("=" in name for name in filters):  # which -c could not name
        return None
    settings = [f"{key}={value}" for key, value in _HARMLESS.items()]
    settings += [f"{name}.{key}={value}" for name in filters for key, value in _NO_FILTER.items()]
    return _plain_git(cwd, *(word for s in settings for word in ("-c", s)), *words, seconds=seconds)


# A filter's programs run over contents, for `status` and `diff` too.
_NO_FILTER = {"clean": "", "smudge": "", "process": "", "required": "false"}


def _filters(cwd: Path | str) -> set[str] | None:
    """``filter.<name>`` of each filter that the folder's own configuration defines; None where there is no git.

    Filters of the user's own configuration stay: a file under them would count as changed.
    """
    listed = _plain_git(cwd, "config", "--list", "--show-scope", "--name-only", "-z")
    if listed is None:
        return None
    scopes_and_keys = listed.split("\0")
    pairs = zip(scopes_and_keys[::2], scopes_and_keys[1::2], strict=False)
    own = [key for scope, key in pairs if scope in ("local", "worktree")]
    return {key.rpartition(".")[0] for key in own if key.startswith("filter.") and key.count(".") > 1}


def _plain_git(cwd: Path | str, *words: str, seconds: float = 3.0) -> str | None:
    command = ["git", "--no-optional-locks", "--no-pager", *words]
    env = {k: v for k, v in os.environ.items() if k != "GIT_EXTERNAL_DIFF"} | _SEALED
    try:
        done = subprocess.run(
            command, cwd=cwd, env=env, capture_output=True, timeout=seconds, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", errors="replace") if done.returncode == 0 else None


def _cores() -> int:
    """Cores that this process may use, which in a container are fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu() -> str | None:
    """The name of the processor's model, as far as the machine tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or None
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.M)
    return found[1].strip() if found else platform.processor() or None


def _memory_gb() -> float | None:
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
    return round(pages * size / 1e9, 1)


def _accelerators() -> list[str]:
    """Names of NVIDIA devices from the driver's own files, of Apple's chip from the platform."""
    names = []
    for info in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        found = re.search(r"^Model:\s*(.+)$", info.read_text(encoding="utf-8", errors="replace"), re.M)
        names.append(found[1].strip() if found else "NVIDIA device")
    if sys.platform == "darwin" and platform.machine() == "arm64":
        names.append("Apple GPU")
    return names
