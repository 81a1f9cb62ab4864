"""Where the weights of a language model come from: what a name means, and the folder behind it.

Importing this imports no torch: ``--dry-run`` asks what names mean, too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from reason.errors import ConfigError, DataError, nearest

CARRIED = ("smollm2-135m",)  # models that come without a hub: parcels of reason.datasets.fetch
HUB = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")  # owner/name or owner/name@revision
FORMS = (
    "a folder in Hugging Face's format, a .gguf file, a hub id such as HuggingFaceTB/SmolLM2-135M "
    f"(or owner/name@revision), run:NAME (a finished run), experiment:NAME, or {', '.join(CARRIED)}"
)

FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)  # fmt: skip
WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")

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


def run_of(source: str) -> Path:
    """The folder of a run that is a source.

    Raises:
        DataError: there is none.
    """
    folder = run_folder(source)
    if not folder.is_dir():
        raise DataError(f"There is no run {folder}.", "`reason list runs` lists the runs.")
    return folder


def folder_of(source: str, offline: bool) -> tuple[Path, str]:
    """The model folder, in Hugging Face's format, of a source that is no run; and what to call it.

    Raises:
        ConfigError: no such source.
        DataError: it cannot be fetched, or is broken.
        MissingExtra: a GGUF file, and the library gguf is not installed.
    """
    found = kind(source)
    if found == "hub":
        return _fetched(source, offline)
    if found == "carried":
        from reason.backbones.from_gguf import unpacked
        from reason.datasets.fetch import carrier

        (file,) = carrier(source, offline).glob("*.gguf")
        return unpacked(file, source), source
    path = Path(source).expanduser()
    if path.is_dir():
        return path, str(path)
    if path.is_file() and path.suffix.lower() == ".gguf":
        from reason.backbones.from_gguf import unpacked

        return unpacked(path, str(path)), str(path)
    if path.exists():
        raise ConfigError(f"{path} is neither a folder nor a .gguf file.", f"Give {FORMS}.")
    close = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
    hint = f"Did you mean {path.parent / close}?" if close else f"Give {FORMS}."
    raise DataError(f"There is no {path}.", hint)


def _fetched(source: str, offline: bool) -> tuple[Path, str]:
    """The folder of a hub's repository, and what to call it. Weights as safetensors, no code."""
    from huggingface_hub import errors, snapshot_download

    name, _, revision = source.partition("@")
    try:
        folder = snapshot_download(
            name, revision=revision or None, allow_patterns=[*FILES, *WEIGHTS], local_files_only=offline
        )
    except errors.LocalEntryNotFoundError as error:
        if offline:
            raise DataError(
                f"{source} is not in the Hugging Face cache, and --offline forbids downloading it.",
                "Run once online and without --offline, or give a folder that contains the model.",
            ) from error
        raise _out_of_reach(source, error) from error
    except errors.GatedRepoError as error:
        raise DataError(
            f"{source} is gated: you must accept its terms first.",
            "Accept them on the model's page, then run: hf auth login",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DataError(
            f"{name} has no revision {revision!r}.", "Omit the revision to use the newest."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DataError(
            f"There is no model {name!r} on the Hugging Face hub, or it is private.",
            "Check the spelling (owner/name). For a private model, run: hf auth login",
        ) from error
    except errors.HFValidationError as error:
        raise ConfigError(f"{source!r} is not a hub id: {error}.", f"Give {FORMS}.") from error
    except Exception as error:  # network errors; the library has changed their types twice
        raise _out_of_reach(source, error) from error
    return Path(folder), f"{name} at revision {Path(folder).name[:12]}"


def _out_of_reach(source: str, error: Exception) -> DataError:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return DataError(
        f"{source} cannot be downloaded: {reason[0]}",
        "Check the network (HF_ENDPOINT can point to a mirror), or give a folder that contains the model; "
        "smollm2-135m comes from PyPI instead.",
    )
