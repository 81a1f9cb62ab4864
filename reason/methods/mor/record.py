"""Audit records: how a text was written, so that it can be looked into and written again exactly.

A record is one line of JSON in ``audit.jsonl``. The depths of its tokens are all that a replay needs beside the model:
known depths lead every token through the steps that it took, whatever decided them then.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from reason.errors import DataError
from reason.files import append_json_lines
from reason.methods.mor.cache import MoRCache
from reason.methods.mor.generate import Generation, Request, Sampling, generate
from reason.methods.mor.routes import Known
from reason.methods.mor.trace import RoutingTrace, trace

if TYPE_CHECKING:
    from reason.methods.mor.network import MixtureOfRecursions

FILE = "audit.jsonl"  # in the folder of the run
NEEDED = ("model", "kv", "cap", "sampling", "stop", "prompt", "written", "stopped", "depth")  # by a replay


def identity(model: MixtureOfRecursions) -> str:
    """SHA-256 of the names, types and values of all weights: what a record was made with."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        whole = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}\n".encode())
        digest.update(memoryview(whole.flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def look(model: MixtureOfRecursions, kind: str, text: Sequence[int], depth: np.ndarray) -> RoutingTrace:
    """What the routers said of a text of known depths (T,), read once more at a time."""
    known = torch.from_numpy(depth)
    tokens = torch.tensor([list(text[: len(depth)])], device=model.decoder.embed.weight.device)
    route = Known(known.to(tokens.device))
    return trace(model, model(tokens, route, memory=kind), None)


def record_of(
    model: MixtureOfRecursions, name: str, request: Request, done: Generation, **more: Any
) -> dict[str, Any]:
    """The record of a text. name: ``identity``; more: what else it tells."""
    kind, sampling = model.config.memory, request.sampling
    seen = look(model, kind, [*request.prompt, *done.tokens], done.depth)
    return {
        "model": name, "kv": kind, "cap": request.cap,
        "sampling": {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed},
        "stop": sorted(request.stop), "prompt": list(request.prompt), "written": done.tokens, "stopped": done.stopped,
        "depth": runs(done.depth), "counts": seen.counts[0].tolist(), "logits": pack(seen.logits[0]),
        "kv_bytes": MoRCache(model).needed(done.depth), **more,
    }  # fmt: skip


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line, in one write. What a killed writer left unfinished stays a line of its own."""
    append_json_lines(path, [record])


def replay(model: MixtureOfRecursions, name: str, record: Any) -> tuple[bool, list[int]]:
    """Write a record's text again by its depths: whether tokens and depths are the same, and the tokens.

    Raises:
        DataError: no record, or one of another model.
    """
    if not isinstance(record, dict) or (gone := [key for key in NEEDED if key not in record]):
        missing = f": it has no {gone[0]!r}" if isinstance(record, dict) else ""
        raise DataError(f'"replay" is no audit record{missing}.', f"Give it a line of {FILE}.")
    if record["model"] != name:
        raise DataError(
            f"The record is of another model ({str(record['model'])[:8]}, here {name[:8]}): it would write other text.",
            "Replay it with the run that wrote it.",
        )
    try:
        prompt, written, depth = record["prompt"], record["written"], unrun(record["depth"])
        request = Request(
            prompt, len(written) + record["stopped"], Known(torch.from_numpy(depth)), record["cap"],
            Sampling(**record["sampling"]), frozenset(record["stop"]),
        )  # fmt: skip
        done = generate(model, request, cache=MoRCache(model, record["kv"]))
    except (TypeError, ValueError, IndexError, RuntimeError) as error:
        raise DataError(f'The record in "replay" is damaged: {error}'.replace("\n", " ")) from error
    same = done.tokens == written and done.stopped == record["stopped"]
    return same and np.array_equal(done.depth, depth), done.tokens


# --- small forms --------------------------------------------------------------------------------------


def runs(depth: np.ndarray) -> list[list[int]]:
    """Depths run by run: [depth, how many tokens have it]."""
    return [[int(d), len(list(same))] for d, same in itertools.groupby(depth.tolist())]


def unrun(listed: Sequence[Sequence[int]]) -> np.ndarray:
    """The depths (T,) int64 of ``runs``."""
    return np.repeat(*np.array(listed, np.int64).reshape(-1, 2).T)


def pack(logits: Tensor) -> dict[str, Any]:
    """Logits (N_r, T), NaN where none, in 8 bits: ``low + (byte - 1) step``, byte 0 where none; base64 of each recursion."""
    value = logits.float().cpu().numpy()
    known = np.isfinite(value)
    low, high = (float(f(value[known])) if known.any() else 0.0 for f in (np.min, np.max))
    step = (high - low) / 254 or 1.0
    byte = np.where(known, np.round((np.where(known, value, low) - low) / step) + 1, 0).astype(np.uint8)
    return {"low": low, "step": step, "bytes": [base64.b64encode(row.tobytes()).decode() for row in byte]}


def unpack(packed: Mapping[str, Any]) -> np.ndarray:
    """(N_r, T) float64, NaN where none: what ``pack`` kept, within half a step."""
    byte = np.stack([np.frombuffer(base64.b64decode(row), np.uint8) for row in packed["bytes"]])
    return np.where(byte > 0, packed["low"] + (byte.astype(np.float64) - 1) * packed["step"], np.nan)
