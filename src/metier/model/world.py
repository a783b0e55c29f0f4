"""The processes that train one model together, as torchrun starts them; one alone without it.

All processes read the same data and run the same steps; each computes its share of a step's
micro-batches, and gradients are added up over all of them. How a step is cut into micro-batches
does not know how many processes there are: with more or fewer of them a run goes on with the same
steps.

The weights of a base that is too large for one device can be sharded: FSDP2 keeps a part of every
decoder layer in each process and puts a layer together while it is computed (Zhao et al. 2023,
arXiv 2304.11277). What lies outside the layers is small and stays whole.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from metier.errors import ConfigError, RunError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from transformers import PreTrainedModel

# While the first process evaluates, the others wait; where it dies, torchrun ends them.
_PATIENCE = timedelta(days=7)
# Numbers that are added up over the processes at once.
_BUCKET = 1 << 24


class Work(Protocol):
    """What can be shared among processes."""

    @property
    def tokens(self) -> int:
        """How much it is."""
        ...


W = TypeVar("W", bound=Work)


class World(NamedTuple):
    """How many processes there are, and which of them this one is.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.

    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks with the person."""
        return self.rank == 0

    def share(self, parts: Sequence[W]) -> list[tuple[int, W, float]]:
        """The parts of this process, of what all have to do: about equally much for each.

        All processes get equally many parts, as they meet in every one where layers are sharded.
        Where that does not come out even, some repeat a part of another for nothing.

        Returns:
            for each part its place among all, itself, and how much it counts: 1 or 0.

        """
        order = sorted(range(len(parts)), key=lambda place: -parts[place].tokens)
        own, loads = [], [0] * self.size
        for start in range(0, len(order), self.size):
            by_load = sorted(range(self.size), key=lambda rank: loads[rank])
            for rank, place in zip_longest(by_load, order[start : start + self.size]):
                chosen = order[-1] if place is None else place
                loads[rank] += parts[chosen].tokens
                if rank == self.rank:
                    own.append((chosen, parts[chosen], float(place is not None)))
        return own

    def total(self, *values: float) -> list[float]:
        """Sums of numbers over all processes."""
        if self.size == 1:
            return list(values)
        found = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(found)
        return found.tolist()

    def agree(self, text: str = "") -> str:
        """What the first process says; the others wait for it."""
        if self.size == 1:
            return text
        said = torch.frombuffer(bytearray(text.encode()) or bytearray(1), dtype=torch.uint8)
        length = torch.tensor([len(text.encode())])
        dist.broadcast(length, 0)
        if not self.first:
            said = torch.empty(max(1, int(length)), dtype=torch.uint8)
        dist.broadcast(said, 0)
        return bytes(said.tolist()[: int(length)]).decode()

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up gradients over all processes, in place; those of sharded ones are it already."""
        if self.size == 1:
            return
        whole = [parameter for parameter in parameters if not is_sharded(parameter)]
        # A parameter may be without a gradient in some processes only.
        there = torch.tensor([float(parameter.grad is not None) for parameter in whole])
        dist.all_reduce(there)
        for bucket in _buckets([p for p, count in zip(whole, there, strict=True) if count]):
            flat = torch.cat([_gradient(parameter).reshape(-1) for parameter in bucket])
            dist.all_reduce(flat)
            pieces = torch.split(flat, [parameter.numel() for parameter in bucket])
            for parameter, piece in zip(bucket, pieces, strict=True):
                parameter.grad = piece.view_as(parameter)

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> float:
        """Scale all gradients so that their norm is at most a limit (0: none); returns the norm.

        Pascanu et al. 2013 (arXiv 1211.5063).
        """
        found = [p.grad for p in parameters if p.grad is not None]
        sharded = [local(gradient) for gradient in found if is_sharded(gradient)]
        whole = [gradient for gradient in found if not is_sharded(gradient)]
        squares = (float(nn.utils.get_total_norm(part)) ** 2 for part in (sharded, whole))
        in_parts, together = squares
        if sharded:
            (in_parts,) = self.total(in_parts)
        norm = math.sqrt(in_parts + together)
        if limit and norm > limit:
            for gradient in (*sharded, *whole):
                gradient.mul_(limit / norm)
        return norm


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """Meet the other processes that torchrun has started; alone without it.

    Raises:
        RunError: another process has gone.

    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        yield World()
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield World(dist.get_rank(), size)
    except RuntimeError as error:
        if "peer" not in str(error):
            raise
        raise RunError(
            f"process {dist.get_rank()}",
            "has lost another process",
            "see what that one said; the same command goes on from the last checkpoint",
        ) from None
    # Not after an error: the others may never come.
    dist.barrier()
    dist.destroy_process_group()


def shard(model: PreTrainedModel, world: World) -> None:
    """Keep only a part of every decoder layer in each process, from now on (in place).

    Args:
        model: with its adapter's layers, if it has one; it may lie on the processor, and comes to
            each process's device one layer after the other.
        world: who keeps the parts.

    Raises:
        ConfigError: the model does not say what its layers are.

    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    names = set(model._no_split_modules or ())
    layers: list[Any] = [part for part in model.modules() if type(part).__name__ in names]
    if not layers:
        raise ConfigError(
            "training.shard",
            f"does not know the layers of {type(model).__name__}",
            "leave it out, or choose another base",
        )
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world.size,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    backbone: Any = model.base_model
    own = {id(parameter) for layer in layers for parameter in layer.parameters()}
    outside = {p for p in backbone.parameters() if id(p) not in own}
    fully_shard(backbone, mesh=mesh, ignored_params=outside)
    for part in (*layers, backbone):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    model.to(mesh.device_type)  # type: ignore[arg-type]


def is_sharded(value: Any) -> TypeGuard[DTensor]:
    """Whether it is a tensor of which a process holds only a part."""
    return hasattr(value, "full_tensor")


def is_in_parts(model: nn.Module) -> bool:
    """Whether a model's layers are sharded: processes that read with it must read equally often."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def gathered(values: Mapping[str, Any], world: World) -> dict[str, Any]:
    """All of every sharded tensor among some values, for the first process; nothing for others.

    Every process must ask.
    """
    found = {}
    for name, value in values.items():
        if is_sharded(value):
            value = value.full_tensor().cpu()
        if world.first:
            found[name] = value
    return found


def part_like(target: Tensor, value: Any) -> Any:
    """Of a value with a sharded target's shape, the part that this process is to hold."""
    if not (is_sharded(target) and getattr(value, "shape", None) == target.shape):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one number format and device, together or one alone above the limit."""
    kinds: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for alike in kinds.values():
        bucket: list[nn.Parameter] = []
        for parameter in alike:
            if bucket and sum(p.numel() for p in bucket) + parameter.numel() > _BUCKET:
                yield bucket
                bucket = []
            bucket.append(parameter)
        yield bucket
