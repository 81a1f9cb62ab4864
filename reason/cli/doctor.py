"""`reason doctor`: what is here, what is missing, and what would run where."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import typer

from reason.cli.arguments import Json
from reason.cli.output import emit_json, show
from reason.errors import ReasonError


def doctor(as_json: Json = False) -> None:
    """Check the installation: packages, devices, tracking store, caches and registered plug-ins."""
    found = examine()
    if as_json:
        emit_json(found)
    else:
        show(_drawn(found))
    if found["problems"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """All findings as plain JSON values.

    ``problems`` will stop a run, each says its mend; ``warnings`` (a broken third-party card) will not.
    """
    problems: list[str] = []
    warnings: list[str] = []
    return {
        "packages": _packages(problems),
        "extras": _extras(),
        "devices": _devices(problems),
        "tracking": _tracking(problems),
        "caches": _caches(),
        "registered": _registered(warnings),
        "default_run": _default_run(problems),
        "problems": problems,
        "warnings": warnings,
    }


def _requirements() -> Iterator[tuple[str, str]]:
    """(package, extra or '') of everything that reason-lab asks for."""
    for line in metadata.requires("reason-lab") or ():
        name = re.match(r"[A-Za-z0-9._-]+", line)
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", line)
        if name:
            yield name[0], extra[1] if extra else ""


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _packages(problems: list[str]) -> dict[str, str | None]:
    from reason.tracking.provenance import capture

    facts = capture(Path.cwd())
    found = {"python": facts["python"], "reason-lab": _version("reason-lab")}
    for name, extra in _requirements():
        if not extra:
            found[name] = _version(name)
            if found[name] is None:
                problems.append(f"{name} is not installed: python -m pip install reason-lab")
    return found


def _extras() -> dict[str, dict[str, Any]]:
    """Per extra: its packages, those that are absent, and the command that brings them."""
    found: dict[str, dict[str, Any]] = {}
    for name, extra in _requirements():
        if extra:
            entry = found.setdefault(extra, {"packages": {}, "install": None})
            entry["packages"][name] = _version(name)
    for extra, entry in found.items():
        if None in entry["packages"].values():
            entry["install"] = f"python -m pip install 'reason-lab[{extra}]'"
    return found


def _devices(problems: list[str]) -> dict[str, Any]:
    from reason.tracking.provenance import capture

    facts = capture(Path.cwd())
    found: dict[str, Any] = {"cpu": facts["cpu"], "cores": facts["cores"], "memory_gb": facts["memory_gb"]}
    try:
        import torch
    except Exception as error:  # a broken build raises OSError and worse
        problems.append(
            f"torch cannot be imported ({_first(error)}): python -m pip install --force-reinstall torch"
        )
        return found
    found["threads"] = torch.get_num_threads()
    found["cuda"] = [
        {"name": torch.cuda.get_device_name(i), "memory_gb": round(torch.cuda.get_device_properties(i).total_memory / 1e9, 1)}
        for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    ]  # fmt: skip
    found["cuda_build"] = torch.version.cuda
    found["mps"] = torch.backends.mps.is_available()
    if facts["accelerators"] and not found["cuda"] and not found["mps"]:
        why = "its driver does not match the installed torch"
        if torch.version.cuda is None:
            why = "the installed torch is a CPU-only build"
        there = ", ".join(facts["accelerators"])
        found["note"] = f"{there} was found, but {why}; see https://pytorch.org/get-started"
    return found


def _tracking(problems: list[str]) -> dict[str, Any]:
    from reason.tracking.store import shown, sqlite_path, tracking_uri

    uri = tracking_uri()
    found: dict[str, Any] = {"store": shown(uri), "reachable": False, "exists": True, "runs": None}
    path = sqlite_path(uri)
    if path is not None and not path.exists():  # looking must not create it
        return found | {"exists": False, "reachable": path.parent.is_dir()}
    try:
        found |= {"runs": _number_of_runs(uri), "reachable": True}
    except ReasonError as error:
        problems.append(str(error).replace("\n", " "))
    return found


def _number_of_runs(uri: str) -> int:
    from reason.tracking.store import open_store

    client = open_store(uri)
    ids = [experiment.experiment_id for experiment in client.search_experiments()]
    total, token = 0, None
    while ids:
        page = client.search_runs(ids, max_results=1000, page_token=token)
        total, token = total + len(page), page.token
        if not token:
            break
    return total


def _caches() -> list[dict[str, Any]]:
    """What is fetched already, and how large it is."""
    from reason.datasets.fetch import PARCELS, cache_dir, cached

    place = cache_dir()
    fetched = {name: _size_mb(folder) for name in PARCELS if (folder := cached(name)) is not None}
    root = next(p for p in (place, *place.parents) if p.exists())
    free = round(shutil.disk_usage(root).free / 1e9, 1)
    return [{"place": str(place), "fetched_mb": fetched, "free_gb": free}]


def _size_mb(folder: Path) -> float:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return round(total / 1e6, 1)


def _registered(warnings: list[str]) -> dict[str, Any]:
    from reason import registry

    found = {kind: registry.cards(kind) for kind in registry.KINDS}
    warnings += [warning for _, broken in found.values() for warning in broken]
    return {kind: [card.name for card in cards] for kind, (cards, _) in found.items()}


def _default_run(problems: list[str]) -> dict[str, Any] | None:
    """Where a run goes when nothing is said."""
    try:
        from reason.engine.config import HardwareConfig
        from reason.engine.parallel import choose_device, threads_of
    except Exception as error:
        problems.append(f"The engine cannot be imported: {_first(error)}")
        return None
    hardware = HardwareConfig()
    kind, processes = choose_device(hardware)
    return {"device": kind, "processes": processes, "threads": threads_of(hardware, processes)}


def _first(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


# --- drawing ----------------------------------------------------------------------------------------


def _drawn(found: dict[str, Any]):
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for topic, text in _lines(found):
        table.add_row(Text(topic, style="bold"), Text(text))
    return table


def _lines(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "packages", ", ".join(f"{n} {version or 'MISSING'}" for n, version in found["packages"].items())
    for extra, entry in found["extras"].items():
        yield f"extra {extra}", "installed" if not entry["install"] else f"not installed; {entry['install']}"
    d = found["devices"]
    yield "cpu", f"{d['cpu'] or 'unknown'}, {d['cores']} cores, {d['memory_gb']} GB"
    if "cuda" in d:
        yield "cuda", ", ".join(f"{g['name']} ({g['memory_gb']} GB)" for g in d["cuda"]) or "none"
        yield "mps", "yes" if d["mps"] else "none"
    if "note" in d:
        yield "note", d["note"]
    t = found["tracking"]
    state = "not created yet; the first run creates it" if not t["exists"] else f"{t['runs']} runs"
    yield "tracking", f"{t['store']}: {state if t['reachable'] else 'NOT REACHABLE'}"
    for cache in found["caches"]:
        has = ", ".join(f"{name} ({mb} MB)" for name, mb in cache["fetched_mb"].items()) or "nothing fetched"
        yield "cache", f"{cache['place']}: {has}; {cache['free_gb']} GB free"
    for kind, names in found["registered"].items():
        yield kind, ", ".join(names) or "none"
    if run := found["default_run"]:
        threads = f"{run['threads']} thread{'s' * (run['threads'] != 1)}"
        yield "default run", f"{run['device']}, {run['processes']} process, {threads}"
    yield from (("warning", warning) for warning in found["warnings"])
    yield from (("PROBLEM", problem) for problem in found["problems"])
