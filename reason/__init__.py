"""reason: one platform for five ways of giving a model more reasoning.

    import reason
    run = reason.run("latent", seed=1)              # what `reason run latent seed=1` does
    answers = reason.load(run).predict([{"user": "196"}], depth=2)

Importing this package imports neither torch nor mlflow.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reason.engine.session import LoadedRun
    from reason.tracking.folder import RunFolder

__version__ = "0.1.0"
__all__ = ["__version__", "load", "run"]


def run(name: str, overrides: dict[str, Any] | None = None, /, **keys: Any) -> RunFolder:
    """Execute a method or experiment; the same as ``reason run NAME key=value ...``.

    Args:
        overrides: dotted keys, ``{"train.lr": 1e-3}``; ``keys`` are those without a dot.
    Raises:
        ReasonError: refused (ConfigError) or failed (RunError).
    """
    from reason.engine import config, runner

    words = [f"{k}={v}" for k, v in {**(overrides or {}), **keys}.items()]
    return runner.run(config.resolve(name, words))


def load(run: str | Path | RunFolder, runs: str | Path = "runs") -> LoadedRun:
    """A finished run with its model in memory, ready to ``predict`` and ``inspect``."""
    from reason.engine.session import open_run
    from reason.tracking.folder import RunFolder

    return open_run(run if isinstance(run, RunFolder) else RunFolder.find(str(run), runs))
