"""Collation of training batches: ours (one gather per batch) against a plain loop over rows.

    python benchmarks/data_loading.py PATH [--quick]

PATH is what ``dataset.path`` takes: a file of interactions, or a folder that holds one. Both sides make the same
batches of one epoch, in the same order, and the results are compared before anything is timed. The two are timed
alternately; the ratio is the median over pairs of (loop seconds / our seconds). Also shown: seconds from the file
to the first batch, imports aside. The last line is one JSON object; the exit code is 0 where the target holds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import numpy as np
import torch

from reason.datasets.config import InteractionsConfig
from reason.datasets.histories import Interactions, load
from reason.datasets.sequences import IGNORE, SequenceSplits

TARGET = 5.0  # times as fast as the loop
FIRST_BATCH = 3.0  # seconds from the file to the first batch, for a file of a million lines
LENGTH, BATCH = 50, 256


class Loop:
    """The collation one writes first: Python lists, padded row by row, made a tensor at the end."""

    def __init__(self, data: Interactions, splits: SequenceSplits):
        train, offsets = splits.train, data.offsets.tolist()
        self.histories = [data.history(u).tolist() for u in range(len(data.user_ids))]
        self.user, self.length = train.user.tolist(), train.length.tolist()
        self.first = [
            start - offsets[user] for start, user in zip(train.start.tolist(), self.user, strict=True)
        ]
        self.pad = splits.pad

    def batch(self, index: np.ndarray) -> dict[str, torch.Tensor]:
        rows = index.tolist()
        width = max(self.length[i] for i in rows)
        items, targets = [], []
        for i in rows:
            first, size = self.first[i], self.length[i]
            window = self.histories[self.user[i]][first : first + size + 1]
            items.append(window[:-1] + [self.pad] * (width - size))
            targets.append(window[1:] + [IGNORE] * (width - size))
        return {
            "items": torch.tensor(items),
            "targets": torch.tensor(targets),
            "length": torch.tensor([self.length[i] for i in rows]),
            "user": torch.tensor([self.user[i] for i in rows]),
        }


def first_batch(path: str) -> tuple[float, Interactions, SequenceSplits]:
    start = time.perf_counter()
    data = load(InteractionsConfig(path=path))
    splits = data.sequences(LENGTH)
    splits.train.batch(splits.train.order(np.random.default_rng(0), BATCH)[:BATCH])
    return time.perf_counter() - start, data, splits


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path")
    parser.add_argument("--quick", action="store_true", help="fewer pairs and batches")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    loads = []
    for _ in range(2 if arguments.quick else 5):
        seconds, data, splits = first_batch(arguments.path)
        loads.append(seconds)
    plain = Loop(data, splits)
    order = splits.train.order(np.random.default_rng(0), BATCH)
    batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)][: 20 if arguments.quick else 80]
    for index in batches:
        ours, theirs = splits.train.batch(index), plain.batch(index)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), "the two do not agree"

    rows = []
    for _ in range(20 if arguments.quick else 40):
        marks = [time.perf_counter()]
        for index in batches:
            splits.train.batch(index)
        marks.append(time.perf_counter())
        for index in batches:
            plain.batch(index)
        marks.append(time.perf_counter())
        rows.append((marks[1] - marks[0], marks[2] - marks[1]))
    ratios = sorted(theirs / ours for ours, theirs in rows)
    ratio, loaded = statistics.median(ratios), statistics.median(loads)
    spread = [ratios[len(ratios) // 4], ratios[-len(ratios) // 4]]

    print(f"{data.info['interactions']:,} interactions, {len(splits.train):,} windows of up to {LENGTH}")
    print(f"file to first batch      {loaded:8.3f} s   (target {FIRST_BATCH:.0f} s)")
    for name, column in (("ours", 0), ("loop over rows", 1)):
        each = statistics.median(row[column] for row in rows) / len(batches)
        print(f"{name:<22} {each * 1e3:8.3f} ms per batch of {BATCH}")
    print(
        f"ratio                  {ratio:8.1f}     (target {TARGET:.0f}; quartiles {spread[0]:.1f} to {spread[1]:.1f})"
    )
    holds = ratio >= TARGET and loaded <= FIRST_BATCH
    answer = {
        "benchmark": "data_loading",
        "ratio": round(ratio, 2),
        "target": TARGET,
        "holds": holds,
        "spread": [round(value, 2) for value in spread],
        "first_batch_s": round(loaded, 3),
        "interactions": data.info["interactions"],
        "pairs": len(rows),
    }
    print(json.dumps(answer))
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
