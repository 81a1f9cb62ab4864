"""When the memory is not enough: what to lower, as a hint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from reason.engine.plan import Plan
from reason.errors import RunError

# What a CPU allocator says in a RuntimeError of no type of its own, and Arrow in an error of its own.
_SAYS = (
    "can't allocate memory",
    "not enough memory",
    "cannot allocate memory",
    "malloc of size",
    "out of memory",
)
_SIZES = (
    "backbone.context",
    "backbone.max_length",
    "backbone.hidden",
    "backbone.vocab",
    "train_depth",
    "depth",
)


@contextmanager
def enough_memory(plan: Plan) -> Iterator[None]:
    """Errors of a memory that is too small say which keys of the plan to lower.

    Raises:
        RunError: in place of such an error. Other errors pass.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # CUDA's is a RuntimeError too
        if not out_of_memory(error):
            raise
        where = "GPU memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
        said = (str(error).splitlines() or [""])[0]
        raise RunError(
            f"There is not enough {where}" + (f": {said.rstrip('.')}." if said else "."), lower(plan)
        ) from error


def out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _SAYS)


def lower(plan: Plan) -> str:
    """What takes memory in a plan, with its values, the gentlest measure first."""
    train, keys = plan.config.train, plan.flat
    words = []
    if plan.trains and train.batch_size > train.accumulate:
        words.append(f"raise train.accumulate (now {train.accumulate}), which changes no result")
    batch = ["train.batch_size"] if plan.trains else []
    sizes = [
        key
        for key in (*batch, "eval.batch_size", *_SIZES)
        if isinstance(keys.get(key), int) and keys[key] > 1
    ]
    words.append("lower " + ", ".join(f"{key} (now {keys[key]})" for key in sizes))
    hint = ", or ".join(words)
    return f"{hint[0].upper()}{hint[1:]}."
