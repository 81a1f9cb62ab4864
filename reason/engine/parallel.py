"""One process or many: who am I, what do we sum, how is the model shared.

All training goes through ``Objective``, one module whose forward *is* the method's loss: DDP and
FSDP2 wrap that, so nothing can slip past the wrapper and train unsynchronised.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from reason.errors import ConfigError
from reason.methods.base import Losses, Method, Step


class Objective(nn.Module):
    """Method and network as one module; ``forward(batch, step)`` is the method's loss."""

    def __init__(self, method: Method, network: nn.Module):
        super().__init__()
        self.method = method
        self.network = network

    def forward(self, batch: dict[str, Tensor], step: Step) -> Losses:
        return self.method.loss(self.network, batch, step)


@dataclass(frozen=True)
class World:
    """This process among its equals."""

    rank: int
    size: int
    device: torch.device
    mode: str = "none"  # "none" | "ddp" | "fsdp2"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over ranks (a copy; float64 so that counts stay exact)."""
        exact = torch.float32 if self.device.type == "mps" else torch.float64
        values = values.detach().to(self.device, exact)
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The picklable ``value`` of every rank, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def same(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def broadcast(self, tensor: Tensor) -> None:
        """Rank 0's values, in place, on every rank."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def wrap(self, objective: Objective) -> nn.Module:
        """The objective as this world trains it. Asserts what was asked for is what there is."""
        objective.to(self.device)
        if self.size == 1:
            assert self.mode == "none", f"mode {self.mode!r} in a world of one"
            return objective
        assert dist.get_world_size() == self.size, "the process group is not the world that was planned"
        if self.mode == "ddp":
            ids = [self.device] if self.device.type == "cuda" else None
            return nn.parallel.DistributedDataParallel(objective, device_ids=ids)
        assert self.mode == "fsdp2", f"unknown mode {self.mode!r}"
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.size,))
        # One unit: methods reach into their network by other doors than forward, and only a unit's
        # own forward gathers it. Parameters, gradients and optimiser states are sharded all the same.
        fully_shard(objective, mesh=mesh)  # in place
        return objective


@contextmanager
def whole(wrapped: nn.Module):
    """Within, the network's parameters are whole tensors on every rank (FSDP2 gathers them)."""
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(wrapped, FSDPModule):
        yield
        return
    wrapped.unshard()
    try:
        yield
    finally:
        wrapped.reshard()


def without_sync(wrapped: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Gradients stay local during all but the last micro-batch of an optimiser step."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return nullcontext() if last else wrapped.no_sync()
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(last)
    return nullcontext()


def choose_device(hardware: Any) -> tuple[str, int]:
    """(device type, number of processes) for the hardware section of a configuration.

    Raises:
        ConfigError: devices were asked for that are not here. Never a silent CPU run.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind, wanted = hardware.device, hardware.gpus
    if kind == "auto":
        if wanted and not found:
            raise ConfigError(
                f"{wanted} GPU{'s' if wanted > 1 else ''} requested, but CUDA finds none on this machine.",
                f"Use --device cpu --gpus {wanted} for {wanted} CPU process{'es' if wanted > 1 else ''}, or omit --gpus for one.",
            )
        kind = "cuda" if found else "cpu"
    if kind == "cuda" and not found:
        raise ConfigError(
            "--device cuda was requested, but CUDA finds no GPU on this machine.",
            "Use --device cpu, or run `reason doctor` to see why.",
        )
    if kind == "cuda" and wanted > found:
        raise ConfigError(f"{wanted} GPUs requested, but this machine has {found}.", f"Use --gpus {found}.")
    if kind == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError(
                "--device mps was requested, but torch finds no Apple GPU on this machine.",
                "Use --device cpu.",
            )
        if wanted > 1:
            raise ConfigError("mps is a single device.", "Omit --gpus.")
    return kind, max(wanted, 1)


@contextmanager
def world(kind: str, hardware: Any):
    """Enter the world this process was launched into (torchrun's variables), or a world of one."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
    before = torch.get_num_threads()
    torch.set_num_threads(threads_of(hardware, size))
    if kind == "cuda":
        torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield World(rank, size, device, hardware.parallel if size > 1 else "none")
    finally:
        torch.set_num_threads(before)
        if size > 1:
            dist.destroy_process_group()


def threads_of(hardware: Any, processes: int) -> int:
    """CPU threads of each process."""
    return hardware.threads or max(1, (os.cpu_count() or 1) // processes)


def totals(world: World, counts: Mapping[str, float]) -> dict[str, float]:
    """Counts summed over ranks; every rank must name the same terms."""
    names = sorted(counts)
    summed = world.sum(torch.tensor([float(counts[n]) for n in names]))
    return dict(zip(names, summed.tolist(), strict=True))
