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

RECORDED = "recorded run"  # the layer that holds what an earlier run has resolved
RESERVED_ENVIRONMENT = {"REASON_CACHE", "REASON_DIFF", "REASON_MEMORY_GB"}
MOST_BYTES = 4_000_000  # of a file
DEEPEST = 50  # levels of a file; keys nest four
MOST_NODES = 100_000  # of a file with its anchors written out; the largest experiments file has hundreds


def shipped_experiments() -> Path:
    """The experiments file that comes with the package (beside it in a source checkout)."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "experiments.yaml"
    return inside if inside.exists() else package.parent / "experiments.yaml"


def experiments(cwd: Path | None = None) -> dict[str, dict[str, str]]:
    """Named experiments, shipped and local: {name: {"summary", "method"}}."""
    found = _definitions("experiments", cwd)
    listed = {}
    for name in found:
        own = {k: v for _, body in found[name] for k, v in body.items()}
        layers = _through_extends(name, found)
        listed[name] = {"summary": str(own.get("summary", "")), "method": str(_method(layers) or name)}
    return listed


def sweeps(cwd: Path | None = None) -> dict[str, dict[str, Any]]:
    """Named sweeps: {name: {"summary", "run", "vary": {key: [text]}, "set": {key: text}}}."""
    found = {}
    for name, bodies in _definitions("sweeps", cwd).items():
        found[name] = {k: v for _, body in bodies for k, v in body.items()}
        for key in ("vary", "set"):
            if not isinstance(found[name].get(key) or {}, dict):
                raise ConfigError(
                    f"{key} of the sweep {name!r} ({bodies[-1][0]}) is not a mapping of keys to values.",
                    "Write lines of the form `key: value` below it.",
                )
    return found


Definitions = dict[str, list[tuple[str, dict[str, Any]]]]  # {name: [(file, body)]}, the shipped file first


def _definitions(section: str, cwd: Path | None) -> Definitions:
    shipped, local = shipped_experiments(), (cwd or Path.cwd()) / "experiments.yaml"
    files = [("shipped experiments.yaml", shipped)]
    if local.exists() and local.resolve() != shipped.resolve():
        files.append(("./experiments.yaml", local))
    found: Definitions = {}
    for where, path in files:
        for name, body in _section(path, section).items():
            found.setdefault(name, []).append((where, body))
    return found


def _section(path: Path, section: str) -> dict[str, dict[str, Any]]:
    content = read_yaml(path)
    for key in content:
        if key not in ("experiments", "sweeps", "version"):
            raise unknown(f"section of {path}", key, ("experiments", "sweeps", "version"))
    bodies = content.get(section) or {}
    if not isinstance(bodies, dict):
        raise ConfigError(
            f"{section} in {path} is not a mapping of names to settings.",
            f"Write lines of the form `NAME:` below `{section}:`.",
        )
    for name, body in bodies.items():
        if not isinstance(body, dict):
            raise ConfigError(
                f"{section}.{name} in {path} is not a mapping of keys to values.",
                "Write lines of the form `key: value` below it.",
            )
    return bodies


def experiment_layers(name: str, cwd: Path) -> list[Layer]:
    """The layers that an experiment is made of: of what it extends first, of each the shipped file first.

    Raises:
        ConfigError: no such method or experiment, a wrong ``extends``, or no method anywhere.
    """
    found = _definitions("experiments", cwd)
    if name not in found and name not in registry.names("methods"):
        if name in _definitions("sweeps", cwd):
            raise ConfigError(f"{name!r} is a sweep.", f"Run it with: reason sweep {name}")
        raise unknown("method or experiment", name, [*registry.names("methods"), *found])
    layers = _through_extends(name, found) if name in found else []
    if layers and _method(layers) is None:
        raise ConfigError(
            f"The experiment {name!r} does not name a method.", "Add a line such as `method: latent`."
        )
    return layers


def _through_extends(name: str, found: Definitions) -> list[Layer]:
    layers: list[Layer] = []
    for ancestor in _ancestry(name, found):
        here: list[Layer] = []
        for file, body in found[ancestor]:
            values = flatten(body, where := f"{file}: {ancestor}")
            here.append((where, {k: v for k, v in values.items() if k not in ("summary", "extends")}))
        if ancestor in registry.names("methods") and _method([*layers, *here]) is None:
            here[0][1]["method"] = ancestor  # an experiment of a method's name changes its defaults
        layers += here
    return layers


def _ancestry(name: str, found: Definitions) -> list[str]:
    """``name`` and what it extends, directly or not; the last ancestor first."""
    line = [name]
    while (extends := _extended(line[0], found)) is not None:
        where, above = extends
        if above in line:
            circle = " -> ".join([*line[: line.index(above) + 1][::-1], above])
            raise ConfigError(
                f"The experiment {line[0]!r} ({where}) extends itself: {circle}.",
                "Remove `extends` from one of them."
                + " A local experiment is always merged onto the shipped one of the same name."
                * (above == line[0]),
            )
        if above not in found:
            error = unknown("experiment", above, found)
            error.message = f"The experiment {line[0]!r} ({where}) extends an unknown experiment: {above!r}."
            if above in registry.names("methods"):
                error.hint = f"{above} is a method. Write `method: {above}` instead of `extends`."
            raise ConfigError(error.message, error.hint)
        line.insert(0, above)
    return line


def _extended(name: str, found: Definitions) -> tuple[str, str] | None:
    """(file, experiment) of the ``extends`` of an experiment; the local file's, where both have one."""
    for where, body in reversed(found[name]):
        above = body.get("extends")
        if above is not None and not (isinstance(above, str) and above):
            raise ConfigError(
                f"`extends` of the experiment {name!r} ({where}) must be the name of one experiment.",
                "Write `extends: NAME`.",
            )
        if above is not None:
            return where, above
    return None


def _method(layers: list[Layer]) -> Any:
    return next((values["method"] for _, values in reversed(layers) if "method" in values), None)


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
        told = path.stat()
        if told.st_size > MOST_BYTES:
            raise ConfigError(
                f"{path} has {told.st_size:,} bytes; a file of experiments has at most {MOST_BYTES:,}.",
                "Is it the right file?",
            )
        content = _parsed(path, told.st_mtime_ns)
        nodes = _nodes(content, {})
    except FileNotFoundError as error:
        raise ConfigError(f"There is no file {path}.", "Check the path given to -c.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.", "Give a YAML text file.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}", "Correct the line named above.") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply.", "Keys nest only a few levels deep.") from error
    if content in (None, ""):
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} is not a mapping of keys to values.", "Write lines of the form `key: value`."
        )
    if nodes > MOST_NODES:
        raise ConfigError(
            f"{path} has more than {MOST_NODES:,} values once its anchors are expanded.",
            "Use fewer references to anchors.",
        )
    return content


_BaseLoader: Any = getattr(yaml, "CBaseLoader", yaml.BaseLoader)  # PyYAML may lack libyaml


class _Loader(_BaseLoader):
    """Scalars stay text, and a key that stands twice is refused, where YAML's other loaders drop the first."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[str, Any]:
        found = super().construct_mapping(node, deep)
        if len(found) < len(node.value):
            names = [key.value for key, _ in node.value]
            twice = next(key for i, (key, _) in enumerate(node.value) if key.value in names[:i])
            problem = f"the key {twice.value!r} appears twice"
            raise yaml.constructor.ConstructorError(None, None, problem, twice.start_mark)
        return found


@functools.cache
def _parsed(path: Path, changed: int) -> Any:
    return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)


def _nodes(tree: Any, counted: dict[int, int], level: int = 0) -> int:
    """Nodes of a tree written out in full. What an anchor shares is counted once and added up often."""
    if not isinstance(tree, (dict, list)):
        return 1
    if level > DEEPEST:
        raise RecursionError
    if id(tree) not in counted:
        inside = tree.values() if isinstance(tree, dict) else tree
        counted[id(tree)] = 1 + sum(_nodes(node, counted, level + 1) for node in inside)
    return counted[id(tree)]


def split(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals or not key.strip():
        example = f"{word.strip('= ') or 'depth'}=2"
        raise ConfigError(f"{word!r} is not of the form key=value.", f"For example: {example}")
    return key.strip(), value


def flatten(tree: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """{"train": {"lr": 1}} -> {"train.lr": 1}. Dotted keys may stand in the tree too.

    Raises:
        ConfigError: a key that is set in both spellings; ``where`` says in what layer.
    """
    flat: dict[str, Any] = {}
    at = f" in {where}" if where else ""
    for key, value in tree.items():
        inside = flatten(value, where) if isinstance(value, Mapping) else None
        found = {key: value} if inside is None else {f"{key}.{leaf}": v for leaf, v in inside.items()}
        for twice in found.keys() & flat.keys():
            raise ConfigError(f"{twice} is set twice{at}.", "Remove one of the two.")
        flat |= found
    return flat
