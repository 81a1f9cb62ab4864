"""Where the weights of a language model come from, read off its name. Free of torch: ``--dry-run`` asks too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from reason.errors import ConfigError, nearest

CARRIED = ("smollm2-135m",)  # models that come without a hub: parcels of reason.datasets.fetch
HUB = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")  # owner/name or owner/name@revision
FORMS = (
    "a folder in Hugging Face's format, a .gguf file, a hub id such as HuggingFaceTB/SmolLM2-135M "
    f"(or owner/name@revision), run:NAME (a finished run), experiment:NAME, or {', '.join(CARRIED)}"
)

Kind = Literal["carried", "run", "experiment", "local", "hub"]


def kind(source: str) -> Kind:
    """What ``source`` names. A file or folder that exists comes before a hub id of the same spelling.

    Raises:
        ConfigError: none of what can be opened.
    """
    if source in CARRIED:
        return "carried"
    if source.startswith("run:"):
        return "run"
    if source.startswith("experiment:"):  # the engine makes it a run before anything is opened
        return "experiment"
    if _spelt_as_path(source) or (source and Path(source).exists()):
        return "local"
    if HUB.fullmatch(source):
        return "hub"
    close = nearest(source, CARRIED)
    raise ConfigError(
        f"{source!r} is not a language model: there is no such file or folder, and it is not a hub id.",
        (f"Did you mean {close!r}? " if close else "") + f"Give {FORMS}.",
    )


def settle(source: str) -> str:
    """``source`` so that it means the same in any folder: a path made absolute, anything else as it is."""
    try:
        found = kind(source) if source else "hub"
    except ConfigError:  # raised when it is opened: a recorded run must stay readable
        return source
    if found == "run" and (folder := run_folder(source)).is_dir():
        return f"run:{folder.absolute()}"
    return str(Path(source).expanduser().absolute()) if found == "local" else source


def run_folder(source: str) -> Path:
    """The folder of ``run:PATH``, or of ``run:NAME`` under ./runs."""
    path = Path(source.removeprefix("run:")).expanduser()
    return path if path.is_dir() or len(path.parts) > 1 else Path("runs") / path


def _spelt_as_path(source: str) -> bool:
    return source.startswith(("/", "./", "../", "~", ".\\", "..\\")) or source.lower().endswith(".gguf")
