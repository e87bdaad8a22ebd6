"""Models whose parameters are shards: FSDP2's (`fully_shard`), read, written and taken whole.

Each parameter is a `DTensor` of which a process holds some rows. A flat vector of this process is
the rows of all parameters, one after another, and the `Sharding` says where in theta they stand. A
parameter that is not sharded, beside others that are, is divided likewise: each process has a part
of it in its vector, and all of it in its model.

A model is evaluated without FSDP's hooks, on plain tensors in the places of its parameters: with
them there is no second derivative. So nothing is talked about among processes between the moment
when theta is gathered and the sum of what each has computed, whatever happens in one of them.

Example:
    >>> import torch
    >>> sharding_of_parameters([torch.nn.Parameter(torch.zeros(2))]) is None
    True
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import sys
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from thalweg.errors import invalid
from thalweg.loss.reduce import AcrossProcesses, Reduction, lost_told
from thalweg.sharding import ShardedVector, Sharding

FSDP2 = "FSDP2 (torch.distributed.fsdp.fully_shard)"
# One for each division of theta, so that vectors of two losses of one model go together.
_known: list[Sharding] = []


def is_shard(tensor: object) -> bool:
    """Whether a tensor is one of `torch.distributed.tensor`; to import that takes a second."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 takes care of a module."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def refuse_unfit_shards(model: nn.Module) -> None:
    """Refuse a model that is sharded in another way than by FSDP2 over one dimension.

    Raises:
        InvalidInput: FSDP1, DeepSpeed, tensor parallel, a mesh of two dimensions, shards that are
            no rows.
    """
    # By their names: DeepSpeed need not be installed. ZeRO 3 leaves empty parameters in the model.
    if any(kind.__name__ == "DeepSpeedEngine" for kind in type(model).__mro__) or any(
        hasattr(parameter, "ds_id") for parameter in model.parameters()
    ):
        raise invalid("model", f"{type(model).__name__} of DeepSpeed (ZeRO)", f"{FSDP2}, DDP")
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(
        isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()
    ):
        raise invalid("model", "FullyShardedDataParallel (FSDP1)", FSDP2)
    within = {
        id(parameter)
        for module in model.modules()
        if is_fully_sharded(module)
        for parameter in module.parameters()
    }
    for name, parameter in model.named_parameters():
        if is_shard(parameter):
            _refuse_unfit(f"parameter {name!r}", parameter, within)


def _refuse_unfit(name: str, parameter: Any, within: set[int]) -> None:
    placements, mesh = tuple(map(str, parameter.placements)), parameter.device_mesh
    if id(parameter) not in within:
        hint = "second derivatives through tensor parallel layers are wrong, without an error"
        raise invalid(name, f"a DTensor {placements}", f"one of {FSDP2}", hint)
    if mesh.ndim != 1:
        given = f"sharded over a mesh of {mesh.ndim} dimensions (HSDP, or tensor parallel)"
        raise invalid(name, given, f"{FSDP2} over a mesh of one")
    if not parameter.placements[0].is_shard(0):
        raise invalid(name, f"sharded as {placements}", "shards of the first dimension (Shard(0))")


def take_back(model: nn.Module) -> None:
    """Let FSDP put its shards back in place, where a forward pass has left whole parameters."""
    for module in model.modules():
        if is_fully_sharded(module):
            fsdp: Any = module
            fsdp.reshard()


def sharding_of_parameters(parameters: Sequence[Tensor]) -> Sharding | None:
    """How theta is divided, of parameters in its order; None where none of them is a shard.

    Raises:
        InvalidInput: they are sharded over different processes.
    """
    meshes = [shard.device_mesh for shard in parameters if is_shard(shard)]  # type: ignore[attr-defined]
    if not meshes:
        return None
    if any(mesh != meshes[0] for mesh in meshes):
        raise invalid("model", "parameters sharded over several meshes", "one mesh for all")
    group = meshes[0].get_group()
    ranks = dist.get_world_size(group)
    begins = [0, *itertools.accumulate(parameter.numel() for parameter in parameters)]
    segments = tuple(
        tuple(
            (begin + first, begin + last)
            for parameter, begin in zip(parameters, begins, strict=False)
            for first, last in [_rows_of(parameter, rank, ranks)]
            if first < last
        )
        for rank in range(ranks)
    )
    for known in _known:
        if known.group is group and known.segments == segments:
            return known
    _known.append(Sharding(group, segments, dist.get_rank(group)))
    return _known[-1]


def _rows_of(parameter: Tensor, rank: int, ranks: int) -> tuple[int, int]:
    """Which of a parameter's numbers are a process's: of a shard whole rows, as torch has them."""
    rows = parameter.shape[0] if is_shard(parameter) else parameter.numel()
    each = math.ceil(rows / ranks)
    width = parameter.numel() // rows if rows else 0
    return min(rank * each, rows) * width, min((rank + 1) * each, rows) * width


def own_part(sharding: Sharding, tensors: Sequence[Tensor]) -> ShardedVector:
    """This process's part of tensors shaped like the parameters, such as gradients; a copy."""
    return sharding.vector(torch.cat([own.reshape(-1) for own in _owned(sharding, tensors)]))


def write_part(sharding: Sharding, parameters: Sequence[Tensor], part: Tensor) -> None:
    """Set parameters to what all processes' parts say, in place; all call it at once.

    Raises:
        InvalidInput: no sharded vector of this division.
    """
    if not isinstance(part, ShardedVector) or part.sharding is not sharding or part.dim() != 1:
        raise invalid("theta", f"{type(part).__name__} {tuple(part.shape)}", f"one of {sharding}")
    owned = list(_owned(sharding, parameters))
    values = part.own.split([own.numel() for own in owned])
    for own, value in zip(owned, values, strict=True):
        own.copy_(value.view_as(own))
    for parameter in parameters:
        # Of a whole one each process has written its own part.
        if not is_shard(parameter):
            parts = [_rows_of(parameter, rank, sharding.ranks) for rank in range(sharding.ranks)]
            whole = Sharding(sharding.group, [[one] for one in parts], sharding.rank)
            flat = parameter.detach().reshape(-1)
            flat.copy_(whole.gather(flat[slice(*parts[sharding.rank])]))


def _owned(sharding: Sharding, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """This process's numbers of each tensor, in the tensor's own memory."""
    for tensor in tensors:
        if is_shard(tensor):
            shard: Any = tensor.detach()
            yield shard.to_local()
        else:
            first, last = _rows_of(tensor, sharding.rank, sharding.ranks)
            yield tensor.detach().reshape(-1)[first:last]


def whole(parameter: Tensor) -> Tensor:
    """A shard as a plain tensor, whole; all processes call it at once."""
    shard: Any = parameter.detach()
    return shard.full_tensor()


def reduction_to_shards(reduction: Reduction, sharding: Sharding) -> Reduction:
    """The same reduction, that leaves each process its part of long vectors.

    Raises:
        InvalidInput: it is over other processes than those that share the parameters.
    """
    assert sharding.group is not None
    hint = "give group=torch.distributed.group.WORLD, or that of the model's mesh"
    allowed = "the group of the processes that hold the shards"
    if type(reduction) is Reduction and sharding.ranks == 1:
        # No other process has a part: no group is this one.
        return ToShards(sharding.group, sharding)
    if type(reduction) is not AcrossProcesses:
        given = None if type(reduction) is Reduction else type(reduction).__name__
        raise invalid("group", given, allowed, hint)
    ranks = dist.get_process_group_ranks(reduction.group)
    if ranks != dist.get_process_group_ranks(sharding.group):
        raise invalid("group", f"ranks {ranks}", allowed, hint)
    return ToShards(reduction.group, sharding)


class ToShards(AcrossProcesses):
    """Closes sums over processes that share the parameters too: each gets its part.

    Args:
        group: the processes.
        sharding: who holds what.
    """

    def __init__(self, group: Any, sharding: Sharding) -> None:
        super().__init__(group)
        self.sharding = sharding
        sharding.around_each = lambda: lost_told(self.rank)

    def close(self, partial: Tensor) -> Tensor:
        """See `Reduction`."""
        return self.sharding.sum_to_parts(partial) if partial.dim() else self.sum(partial)

    def sums(self, compute: Callable[[], tuple[Tensor, ...]], like: Tensor) -> tuple[Tensor, ...]:
        """See `Reduction`."""
        failure, parts = None, ()
        try:
            parts = compute()
        except Exception as error:
            # What it has held: memory may be what is missing.
            traceback.clear_frames(error.__traceback__)
            failure = error
        # A part does not show what has happened elsewhere.
        if self.total(float(failure is not None)) > 0:
            self.settle(failure)
        return tuple(map(self.close, parts))


def without_hooks(module: nn.Module) -> None:
    """Take FSDP's hooks off a module's attributes; the caller puts those back."""
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        hooks: Mapping[int, Any] = vars(module)[name]
        if any(map(_is_of_fsdp, hooks.values())):
            kept = ((key, hook) for key, hook in hooks.items() if not _is_of_fsdp(hook))
            setattr(module, name, OrderedDict(kept))


def _is_of_fsdp(hook: Callable[..., Any]) -> bool:
    return str(getattr(inspect.unwrap(hook), "__module__", "")).startswith("torch.distributed.fsdp")


def copies_of(model: nn.Module, wholes: Mapping[int, Tensor]) -> dict[int, Any]:
    """For `copy.deepcopy(model, ...)`: of FSDP2's modules copies without FSDP, which it refuses.

    Args:
        model: as it is.
        wholes: what shards are in the copy, by their identity.
    """
    memo: dict[int, Any] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in wholes:
            value = wholes[id(parameter)].detach().clone()
            memo[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    # The innermost first: those around them find them here.
    for module in reversed([m for m in model.modules() if is_fully_sharded(m)]):
        attributes: dict[Any, Any] = vars(module).copy()
        for name in [*attributes]:
            # What the decorator of `fully_shard` keeps.
            if not isinstance(name, str) or name.startswith("_fsdp") or "composable" in name:
                del attributes[name]
        original: Any = type(module).__mro__[2]
        memo[id(module)] = bare = original.__new__(original)
        bare.__dict__.update(attributes)
        without_hooks(bare)
        bare.__dict__.update(copy.deepcopy(bare.__dict__, memo))
    return memo
