"""What a run is called in MLflow: names, params, tags, a sentence, final metrics, files.

Everything here is read from the run folder and is plain data, so that it can be computed again at any
time and compared with what was sent. Absent pieces are left out. MLflow itself is not imported.
"""

from __future__ import annotations

import functools
import getpass
import json
import math
import posixpath
import re
from dataclasses import dataclass
from typing import Any

from reason import registry
from reason.errors import ReasonError
from reason.printable import printable
from reason.tracking.clock import Instant
from reason.tracking.folder import RunFolder, flat, is_number
from reason.tracking.result import Result, to_json

# MLflow's limits (mlflow/utils/validation.py, 3.17)
NAME_CAP, PARAM_CAP, TAG_CAP, DIGEST_CAP, BATCH_CAP, ENTRY_CAP = 250, 6000, 8000, 36, 1000, 100
POINTS_PER_SECOND = 10  # of one curve
FILE_CAP = 8 * 2**20  # bytes; larger files stay in the run folder

EARLY_FILES = ("config.yaml", "origin.json", "plan.json", "run.json", "env.json", "git.diff")
FILES = (*EARLY_FILES, "result.json", "log*.txt", "*.csv", "*.png", "figures/*", "rows/*.arrow")


@dataclass(frozen=True)
class Point:
    """One point of one curve as MLflow takes it. ``time`` in milliseconds since the epoch."""

    name: str
    value: float
    time: int
    step: int


def legal_name(name: str) -> str:
    """``name`` as MLflow accepts it for params and metrics: ``NDCG@10`` becomes ``NDCG_at_10``."""
    name = re.sub(r"[^A-Za-z0-9_\-./: ]", "_", name.replace("@", "_at_"))
    name = posixpath.normpath("/" + re.sub(r"\.\.+", "_", name)).strip("/")
    return name[:NAME_CAP].rstrip("/") or "_"


def thinned(points: list[dict[str, Any]], per_second: int = POINTS_PER_SECOND) -> list[Point]:
    """Points of ``metrics.jsonl`` for MLflow, at most ``per_second`` a second and curve.

    Where a curve has more in one second, neighbours become their mean, at the last one's step and time.
    A null value is NaN. Rows that are no points are passed over.
    """
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for point in points:
        if isinstance(point, dict) and point.keys() >= {"name", "value", "step", "time"}:
            groups.setdefault((point["name"], int(point["time"])), []).append(point)
    result = []
    for (name, _), group in groups.items():
        n = min(len(group), per_second)
        for i in range(n):
            part = group[i * len(group) // n : (i + 1) * len(group) // n]
            values = [math.nan if p["value"] is None else float(p["value"]) for p in part]
            last = part[-1]
            mean = sum(values) / len(values)
            result.append(Point(legal_name(name), mean, round(last["time"] * 1000), int(last["step"])))
    return result


class Description:
    """A run folder read once, in MLflow's words."""

    def __init__(self, folder: RunFolder):
        self.folder = folder
        self.identity = folder.identity
        self.is_sweep = self.identity["kind"] == "sweep"
        self.result = folder.sweep_result if self.is_sweep else folder.result
        self.env = folder.env
        self.events = folder.events()
        attempts = [e for e in self.events if e["event"] == "attempt" and e.get("device")]
        self._attempt = {**attempts[-1], "world_size": attempts[-1].get("devices")} if attempts else {}
        self.config = {} if self.is_sweep else folder.config

    def known(self, key: str) -> Any:
        """A fact from wherever the run wrote it down, the latest word first."""
        result = vars(self.result) if self.result else {}
        for source in (result, self.env, self.identity, self._attempt):
            if source.get(key) is not None:
                return source[key]
        return None

    @property
    def data_digest(self) -> str:
        return str(self.known("data_digest") or "")[:DIGEST_CAP]

    @property
    def start_ms(self) -> int:
        return round(self.identity["created"] * 1000)

    @property
    def end_ms(self) -> int:
        """When the run ended by its own files: the result, else the last closing, else the last beat."""
        if (self.folder / "result.json").exists():
            return self._result_ms
        closed = [e for e in self.events if e["event"] == "closed"]
        if closed:
            return round((Instant.end_of(closed[-1]).time or closed[-1]["time"]) * 1000)
        return round((self.folder.last_sign.time or self.identity["created"]) * 1000)

    @property
    def _result_ms(self) -> int:
        return (self.folder / "result.json").stat().st_mtime_ns // 1_000_000

    # --- params --------------------------------------------------------------------------------

    def params(self) -> dict[str, str]:
        """Plain scalars under legal names. What is not known yet is left out, since a param never changes."""
        keys = dict(flat(self.config, "."))
        found = {
            "method": self.identity.get("method") or keys.get("method"),
            "backbone": keys.pop("backbone.name", None),
            "dataset": keys.pop("dataset.name", None),
            **{key: keys.get(key) for key in ("depth", "train_depth", "seed")},
            **{key: self.known(key) for key in ("world_size", "threads", "params_m")},
            "gpus": self._gpus(),
        }
        for key, value in keys.items():
            if not key.startswith("hardware.") and key not in (*found, "runs", "offline"):
                found[key] = value
        return {legal_name(k): _text(v, PARAM_CAP) for k, v in found.items() if v is not None}

    def _gpus(self) -> int | None:
        """Devices held; 0 on a CPU, whatever its number of processes."""
        device = self.known("device")
        if device is None:
            return None
        return int(self.known("world_size") or 1) if str(device).startswith("cuda") else 0

    # --- tags ----------------------------------------------------------------------------------

    def tags(self) -> dict[str, str]:
        """Tags of the run, MLflow's own included, except the parent's id, which only the store knows."""
        identity = self.identity
        versions = self.env.get("versions")
        found = {
            "mlflow.runName": self.folder.name,
            "mlflow.user": _user(),
            "mlflow.source.type": "LOCAL",
            "mlflow.source.name": " ".join(map(str, identity.get("argv") or ())) or None,
            "mlflow.source.git.commit": self.env.get("commit"),
            "mlflow.source.git.branch": self.env.get("branch"),
            "mlflow.note.content": self.sentence(),
            "reason.id": self.id,
            "reason.kind": "sweep" if self.is_sweep else "run",
            "reason.method": identity.get("method") or self.config.get("method"),
            "reason.experiment": identity.get("experiment"),
            "reason.config_hash": identity.get("config_hash"),
            "reason.train_hash": identity.get("train_hash"),
            "reason.sweep": identity.get("parent"),
            "reason.device": self.known("device_name") or self.known("device"),
            "reason.dirty": self.env.get("dirty"),
            "reason.data_digest": self.data_digest or None,
            "reason.versions": json.dumps(versions, sort_keys=True) if versions else None,
            "trained_by": self.known("trained_by"),
            "reason.stage_of": identity.get("stage_of"),
            **{f"stage.{key}": name for key, name in identity.get("stages", {}).items()},
            **self.units(),
        }
        return {k: _text(v, TAG_CAP) for k, v in found.items() if v is not None}

    @property
    def id(self) -> str:
        """What makes this run the same run in any store."""
        return f"{self.folder.name}@{self.identity['created']}"

    def units(self) -> dict[str, str | None]:
        """What accuracy, depth, latency and throughput mean on this run."""
        measured = self.result.accuracy.name if isinstance(self.result, Result) else None
        units = units_of(str(self.identity.get("method")))
        return units | {"accuracy_metric": measured or units.get("accuracy_metric")}

    def sentence(self) -> str:
        """One readable sentence for the run's page."""
        if self.is_sweep:
            trials = self.metrics().get("trials")
            return f"Sweep {self.folder.name}" + (f" of {trials:.0f} trials." if trials else ".")
        keys = dict(flat(self.config, "."))
        text = f"**{self.identity.get('method', keys.get('method', 'A run'))}**"
        for word, key in (("on", "dataset.name"), ("with", "backbone.name")):
            text += f" {word} {keys[key]}" if keys.get(key) else ""
        if keys.get("depth") is not None:
            text += f", depth {keys['depth']}"
            if keys.get("train_depth") is not None:
                text += f" (trained for {keys['train_depth']})"
        text += "." if keys.get("seed") is None else f", seed {keys['seed']}."
        if stages := self.identity.get("stages"):
            text += f" It starts from {', '.join(dict.fromkeys(stages.values()))}."
        metrics = self.metrics()
        if "accuracy" in metrics:
            name = self.units()["accuracy_metric"] or "accuracy"
            text += f" {name} = {metrics['accuracy']:.4g}"
            if "device_hours" in metrics:
                text += f", {metrics['device_hours']:.3g} device-hours"
            if "latency_p50_ms" in metrics:
                text += f", median latency {metrics['latency_p50_ms']:.3g} ms"
            text += "."
        return text

    # --- numbers and files -----------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """The final numbers of result.json under legal names."""
        return {legal_name(k): v for k, v in self.result.metrics.items()} if self.result else {}

    def final_points(self) -> list[Point]:
        """Final numbers at step 0, and the curve over depth as ``depth/<name>`` (lower case) with step = depth."""
        if self.result is None:
            return []
        time = self._result_ms
        points = [Point(name, float(value), time, 0) for name, value in self.metrics().items()]
        for row in to_json(self.result).get("curve", ()):
            depth = row.pop("depth")
            points += [
                Point(legal_name(f"depth/{name.removeprefix('metrics/')}").lower(), float(value), time, depth)
                for name, value in flat(row, "/", leaf="value")
                if is_number(value)
            ]
        return points

    def files(self, ended: bool) -> dict[str, list[int]]:
        """Files to mirror, each with size and time of change, so that only changed ones travel."""
        found = {}
        for pattern in FILES if ended else EARLY_FILES:
            for path in sorted(self.folder.path.glob(pattern)):
                if path.is_file() and not path.name.startswith("."):
                    name, stat = path.relative_to(self.folder.path).as_posix(), path.stat()
                    if 0 < stat.st_size <= FILE_CAP:
                        found[name] = [stat.st_size, stat.st_mtime_ns]
        return found


@functools.cache
def units_of(method: str) -> dict[str, str | None]:
    """What the card of a method says of its numbers; empty where its package is gone: they stand without units."""
    try:
        card = registry.card("methods", method)
    except ReasonError:
        return {}
    return {
        "accuracy_metric": card.units.accuracy,
        "unit.depth": card.depth.unit,
        "unit.example": card.units.example,
        "unit.latency": card.units.latency,
        "unit.throughput": card.units.throughput,
    }


def surroundings(method: str) -> list[Any]:
    """What a description holds that does not stand in the run folder."""
    return [_user(), units_of(method)]


# --- small helpers ----------------------------------------------------------------------------------


def _text(value: Any, cap: int) -> str:
    text = str(value).lower() if isinstance(value, bool) else printable(value)
    return text if len(text) <= cap else text[: cap - 3] + "..."


@functools.cache
def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a user entry
        return None
