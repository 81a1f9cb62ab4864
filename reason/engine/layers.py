"""The layers of a configuration: experiments files, ``-c`` files, environment, words.

Every scalar is kept as the text that was written; its declared type is applied later, once.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from reason import registry
from reason.errors import ConfigError, unknown

Layer = tuple[str, dict[str, Any]]  # (where it comes from, {dotted key: text})

RESERVED_ENVIRONMENT = {"REASON_CACHE"}


def shipped_experiments() -> Path:
    """The experiments file that comes with the package (beside it in a source checkout)."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "experiments.yaml"
    return inside if inside.exists() else package.parent / "experiments.yaml"


def experiments(cwd: Path | None = None) -> dict[str, dict[str, Any]]:
    """Named experiments, shipped and local: {name: {"summary", "method", "where"}}."""
    return _named("experiments", cwd)


def sweeps(cwd: Path | None = None) -> dict[str, dict[str, Any]]:
    """Named sweeps: {name: {"summary", "run", "vary": {key: [text]}, "where"}}."""
    return _named("sweeps", cwd)


def _files(cwd: Path) -> list[tuple[str, Path]]:
    shipped, local = shipped_experiments(), cwd / "experiments.yaml"
    found = [("shipped experiments.yaml", shipped)]
    if local.exists() and local.resolve() != shipped.resolve():
        found.append(("./experiments.yaml", local))
    return found


def _named(section: str, cwd: Path | None) -> dict[str, dict[str, Any]]:
    result: dict[str, dict[str, Any]] = {}
    for where, path in _files(cwd or Path.cwd()):
        for name, body in _sections(path)[section].items():
            if not isinstance(body, dict):
                raise ConfigError(
                    f"{section}.{name} in {path} is not a mapping of keys.",
                    "Write `key: value` lines below it.",
                )
            result[name] = {**body, "where": where}
    return result


def _sections(path: Path) -> dict[str, dict[str, Any]]:
    content = read_yaml(path)
    for key in content:
        if key not in ("experiments", "sweeps", "version"):
            raise unknown(f"section of {path}", key, ("experiments", "sweeps", "version"))
    return {key: content.get(key) or {} for key in ("experiments", "sweeps")}


def experiment_layers(name: str, cwd: Path) -> list[Layer]:
    layers: list[Layer] = []
    for where, path in _files(cwd):
        body = _sections(path)["experiments"].get(name)
        if body is not None:
            body = {k: v for k, v in body.items() if k != "summary"}
            layers.append((f"{where}: {name}", flatten(body)))
    if not layers and name not in registry.names("methods"):
        choices = [*registry.names("methods"), *experiments(cwd)]
        if name in sweeps(cwd):
            raise ConfigError(f"{name!r} is a sweep.", f"Start it with: reason sweep {name}")
        raise unknown("method or experiment", name, choices)
    if (
        layers
        and all("method" not in values for _, values in layers)
        and name not in registry.names("methods")
    ):
        raise ConfigError(
            f"The experiment {name!r} does not say its method.", "Add a line such as `method: latent`."
        )
    return layers


def environment_layers(environ: Mapping[str, str]) -> list[Layer]:
    """REASON_SEED=3 sets `seed`; a double underscore is a dot: REASON_TRAIN__LR=1e-3."""
    return [
        (name, {name.removeprefix("REASON_").lower().replace("__", "."): value})
        for name, value in sorted(environ.items())
        if name.startswith("REASON_") and name not in RESERVED_ENVIRONMENT
    ]


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping whose scalars are all text, as written. Not to be changed: it is read once."""
    try:
        content = _parsed(path, path.stat().st_mtime_ns)
    except FileNotFoundError as error:
        raise ConfigError(f"There is no file {path}.", "Check the path given to -c.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.", "Give a text file with YAML in it.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}", "Mend the line named above.") from error
    if content in (None, ""):
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no mapping.", "Write `key: value` lines.")
    return content


@functools.cache
def _parsed(path: Path, changed: int) -> Any:
    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)


def split(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals or not key.strip():
        raise ConfigError(
            f"{word!r} is not of the form key=value.", f"For example: {word.strip('= ') or 'depth'}=2"
        )
    return key.strip(), value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"train.lr": 1} -> {"train": {"lr": 1}}."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *above, leaf = key.split(".")
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[leaf] = value
    return tree
