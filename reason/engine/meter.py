"""The clock. Synchronises, warms up, and says nothing where it has too little to say it from.

Latency: single requests at batch 1, one by one, the device synchronised before and after.
Throughput: batched calls at a stated size. The two are never mixed.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from reason.engine.parallel import World
from reason.tracking.provenance import cpu

WARM_UP = 3  # calls that are made and not counted
LEAST_FOR_P95 = 20


class Stopwatch:
    """A ``Meter`` for one evaluation on one rank. Only rank 0 times requests: one device, no neighbours' noise."""

    def __init__(self, device: torch.device, samples: int, seed: int = 0, times_requests: bool = True):
        self.device = device
        self.samples = samples if times_requests else 0
        self.seed = seed
        self._latencies_ms: dict[str, list[float]] = {}  # by name; the first WARM_UP of each do not count
        self._batches: list[tuple[float, int]] = []  # (seconds, units)

    def requests(self, examples: int) -> Iterator[int]:
        if not self.samples or not examples:
            return
        rng = np.random.default_rng(self.seed)
        chosen = rng.permutation(examples)[: self.samples].tolist()
        yield from (chosen * WARM_UP)[:WARM_UP]
        yield from chosen

    @contextmanager
    def request(self, name: str = "") -> Iterator[None]:
        start = self.now()
        yield
        self._latencies_ms.setdefault(name, []).append(1e3 * (self.now() - start))

    @contextmanager
    def batch(self, units: int | Callable[[], int]) -> Iterator[None]:
        start = self.now()
        yield
        self._batches.append((self.now() - start, units if isinstance(units, int) else units()))

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    def latency(self, name: str = "") -> dict[str, Any]:
        """p50, p95 (None below 20 samples) and n of the requests called ``name``, in ms."""
        counted = self._latencies_ms.get(name, [])[WARM_UP:]
        n = len(counted)
        return {
            "latency_p50_ms": float(np.percentile(counted, 50)) if n else None,
            "latency_p95_ms": float(np.percentile(counted, 95)) if n >= LEAST_FOR_P95 else None,
            "latency_n": n,
        }

    def rate(self) -> tuple[float, float]:
        """(units, seconds) of the batched calls, the first one left out where there are several."""
        counted = self._batches[1:] or self._batches
        return float(sum(u for _, u in counted)), float(sum(s for s, _ in counted))


def silent(device: torch.device) -> Stopwatch:
    """A meter that times nothing: for validation in the middle of training."""
    return Stopwatch(device, samples=0)


def peak_memory_gb(world: World) -> float:
    """Most memory that any rank has held so far: by torch on a GPU, by the process (resident set) otherwise."""
    if world.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(world.device)
    else:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return max(world.gather(peak / 1e9))


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU"
    return cpu() or platform.machine()
