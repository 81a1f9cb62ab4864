"""Audit records: how a text was generated, so that it can be examined and replayed exactly.

A record is one line of JSON in ``audit.jsonl``. Beside the model, a replay needs only the depths of the tokens: known
depths take every token through the same steps again, whatever decided them before.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reason.backbones.generation import Sampling
from reason.backbones.weights import digest_of
from reason.errors import DataError
from reason.files import append_json_lines
from reason.methods.mor.cache import MoRCache
from reason.methods.mor.generate import Generation, GenerationRequest, generate
from reason.methods.mor.network import MixtureOfRecursions
from reason.methods.mor.token_selection import KnownDepths
from reason.methods.mor.trace import RoutingTrace, trace

FILE = "audit.jsonl"  # in the folder of the run
REQUIRED = ("model", "kv", "cap", "sampling", "stop", "prompt", "written", "stopped", "depth")  # for a replay


def model_digest(model: MixtureOfRecursions) -> str:
    """SHA-256 of the names, types and values of all weights."""
    return digest_of(model.state_dict().items())


def trace_again(
    model: MixtureOfRecursions, kv_mode: str, text: Sequence[int], depth: np.ndarray
) -> RoutingTrace:
    """The trace of a text of known depths (T,), from one more pass over all of it."""
    known = torch.from_numpy(depth)
    tokens = torch.tensor([list(text[: len(depth)])], device=model.decoder.embed.weight.device)
    route = KnownDepths(known.to(tokens.device))
    return trace(model, model(tokens, route, kv_mode=kv_mode), None)


def record_of(
    model: MixtureOfRecursions, digest: str, request: GenerationRequest, done: Generation, **more: Any
) -> dict[str, Any]:
    """The record of a generated text. digest: ``model_digest``; more: further keys."""
    kv_mode, sampling = model.config.kv_mode, request.sampling
    routing = trace_again(model, kv_mode, [*request.prompt, *done.tokens], done.depth)
    return {
        "model": digest, "kv": kv_mode, "cap": request.cap,
        "sampling": {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": request.seed},
        "stop": sorted(request.stop), "prompt": list(request.prompt), "written": done.tokens, "stopped": done.stopped,
        "depth": run_lengths(done.depth), "counts": routing.counts[0].tolist(), "logits": quantize(routing.logits[0]),
        "kv_bytes": MoRCache(model).bytes_needed(done.depth), **more,
    }  # fmt: skip


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line, in one write. What a killed writer left unfinished stays a line of its own."""
    append_json_lines(path, [record])


def replay(model: MixtureOfRecursions, digest: str, record: Any) -> tuple[bool, list[int]]:
    """Generate a record's text again by its depths: whether tokens and depths are the same, and the tokens.

    Raises:
        DataError: not a record, or one of another model.
    """
    if not isinstance(record, dict) or (missing_keys := [key for key in REQUIRED if key not in record]):
        missing = f": it has no {missing_keys[0]!r}" if isinstance(record, dict) else ""
        raise DataError(f'"replay" is not an audit record{missing}.', f"Give it a line of {FILE}.")
    if record["model"] != digest:
        raise DataError(
            f"The record is of another model ({str(record['model'])[:8]}, this one is {digest[:8]}), which generates other text.",
            "Replay it with the run that recorded it.",
        )
    try:
        sampling = record["sampling"]
        prompt, written, depth = record["prompt"], record["written"], expand_run_lengths(record["depth"])
        request = GenerationRequest(
            prompt, len(written) + record["stopped"], KnownDepths(torch.from_numpy(depth)), record["cap"],
            Sampling(sampling["temperature"], sampling["top_p"]), frozenset(record["stop"]), sampling["seed"],
        )  # fmt: skip
        done = generate(model, request, cache=MoRCache(model, record["kv"]))
    except (TypeError, KeyError, ValueError, IndexError, RuntimeError) as error:
        raise DataError(f'The record in "replay" is damaged: {error}'.replace("\n", " ")) from error
    same = done.tokens == written and done.stopped == record["stopped"]
    return same and np.array_equal(done.depth, depth), done.tokens


# --- compact encodings --------------------------------------------------------------------------------------


def run_lengths(depth: np.ndarray) -> list[list[int]]:
    """Run-length encoding of depths: [depth, how many tokens in a row have it]."""
    return [[int(d), len(list(same))] for d, same in itertools.groupby(depth.tolist())]


def expand_run_lengths(listed: Sequence[Sequence[int]]) -> np.ndarray:
    """The depths (T,) int64 of ``run_lengths``."""
    return np.repeat(*np.array(listed, np.int64).reshape(-1, 2).T)


def quantize(logits: Tensor) -> dict[str, Any]:
    """Logits (N_r, T), NaN where none, in 8 bits: ``low + (byte - 1) step``, byte 0 where none; base64 of each recursion."""
    value = logits.float().cpu().numpy()
    known = np.isfinite(value)
    low, high = (float(f(value[known])) if known.any() else 0.0 for f in (np.min, np.max))
    step = (high - low) / 254 or 1.0
    byte = np.where(known, np.round((np.where(known, value, low) - low) / step) + 1, 0).astype(np.uint8)
    return {"low": low, "step": step, "bytes": [base64.b64encode(row.tobytes()).decode() for row in byte]}


def dequantize(packed: Mapping[str, Any]) -> np.ndarray:
    """(N_r, T) float64, NaN where none: the logits given to ``quantize``, within half a step."""
    byte = np.stack([np.frombuffer(base64.b64decode(row), np.uint8) for row in packed["bytes"]])
    return np.where(byte > 0, packed["low"] + (byte.astype(np.float64) - 1) * packed["step"], np.nan)
