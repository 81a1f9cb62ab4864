"""``reason data``: fetch, check and locate what experiments read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Typer

from reason.cli.arguments import Json, Offline

app = Typer(no_args_is_help=True, help="Fetch, check and locate datasets and models.")


def _fetchable(incomplete: str) -> list[str]:
    from reason.datasets.fetch import PARCELS

    return [n for n in PARCELS if n.startswith(incomplete)]


def _checkable(incomplete: str) -> list[str]:
    from reason import registry

    return sorted(
        {*_fetchable(incomplete), *(n for n in registry.names("datasets") if n.startswith(incomplete))}
    )


Fetchable = Annotated[
    str, Argument(metavar="NAME", help="The dataset or model to fetch.", autocompletion=_fetchable)
]
Checkable = Annotated[
    str,
    Argument(
        metavar="NAME|PATH",
        help="A dataset, a fetched model, or a path to a file.",
        autocompletion=_checkable,
    ),
]
Keys = Annotated[
    list[str] | None, Argument(metavar="[KEY=VALUE ...]", help="Keys of the dataset, such as user=uid.")
]


@app.command()
def fetch(name: Fetchable, offline: Offline = False) -> None:
    """Download NAME into the cache, unless it is there already, and print its folder."""
    from reason.datasets.fetch import carrier

    _refuse_sourceless(name)
    print(carrier(name, offline=offline))


@app.command()
def path(name: Fetchable) -> None:
    """Print the folder of NAME in the cache, without downloading anything."""
    from reason.datasets.fetch import cache_dir, cached
    from reason.errors import DataError

    _refuse_sourceless(name)
    found = cached(name)
    if found is None:
        raise DataError(
            f"{name} is not in the cache ({cache_dir()}).", f"Fetch it with: reason data fetch {name}"
        )
    print(found)


@app.command()
def verify(name: Checkable, keys: Keys = None, offline: Offline = False, json: Json = False) -> None:
    """Check a dataset or a file of your own: checksums, counts, digest, split sizes, irregularities."""
    from reason.cli.output import emit_json, show
    from reason.datasets.fetch import PARCELS, carrier
    from reason.datasets.fetch import verify as damaged
    from reason.errors import DataError

    answer: dict[str, Any] = {"name": name}
    if name in PARCELS:
        folder = carrier(name, offline=offline)
        if bad := damaged(folder):
            raise DataError(
                f"{folder} is damaged: {', '.join(bad)}.",
                f"Delete that folder and fetch it again with: reason data fetch {name}",
            )
        answer |= {"path": str(folder), "checksums": "match"}
    answer |= _loaded(name, keys or [], offline)
    if json:
        emit_json(answer)
        return
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for key, value in answer.items():
        shown = f"{value:,}" if isinstance(value, int) else value
        table.add_row(key, "\n".join(shown) or "none" if isinstance(shown, list) else str(shown))
    show(table)


def _loaded(name: str, keys: list[str], offline: bool) -> dict[str, Any]:
    """What loading the dataset shows; nothing for a parcel that is no dataset."""
    from reason import registry
    from reason.datasets.fetch import PARCELS
    from reason.errors import ConfigError, unknown

    known = registry.names("datasets")
    name, task = registry.parted("datasets", name)
    if name in known:
        card, words = registry.card("datasets", name), [f"task={task}", *keys] if task else keys
    elif name in PARCELS:
        if keys:
            raise ConfigError(f"{name} is not a dataset and takes no keys.", "Remove " + " ".join(keys) + ".")
        return {}
    elif Path(name).exists() or Path(name).suffix or Path(name).parent != Path("."):
        card, words = registry.card("datasets", "interactions"), [f"path={name}", *keys]
    else:
        raise unknown("dataset", name, {*known, *PARCELS})
    data = registry.resolve(card.target)(_config(card.Config, words), offline=offline)
    return {"digest": data.digest, **data.info, "notes": data.notes}


def _config(kind: type, words: list[str]) -> Any:
    """The dataset's configuration with ``words`` (key=value) set; values take the type of the default."""
    from reason.errors import ConfigError, unknown

    default, values = kind(), {}
    for word in words:
        key, _, text = word.partition("=")
        key = key.removeprefix("dataset.")
        if not hasattr(default, key):
            raise unknown("key", key, vars(default))
        try:
            values[key] = type(getattr(default, key))(text)
        except ValueError as error:
            wanted = type(getattr(default, key)).__name__
            raise ConfigError(
                f"{key}={text} is not of type {wanted}.", f"Its default is {getattr(default, key)!r}."
            ) from error
    return kind(**values)


def _refuse_sourceless(name: str) -> None:
    """A dataset that is never fetched has no folder."""
    from reason import registry
    from reason.datasets.fetch import PARCELS
    from reason.errors import DataError

    if name not in PARCELS and name in registry.names("datasets"):
        raise DataError(
            f"{name} does not need to be fetched: {registry.card('datasets', name).summary}.",
            f"Check it with: reason data verify {name}",
        )
