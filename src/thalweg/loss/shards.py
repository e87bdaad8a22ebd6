"""Models whose parameters are shards, of FSDP2 or tensor parallel: read, written and taken whole.

Each parameter is a `DTensor` of which a process holds a box: some rows (FSDP2, `fully_shard`), or
some rows or columns (tensor parallel, `parallelize_module`). A flat vector of this process is the
numbers of its boxes, one after another, and the `Sharding` says where in theta they stand. Each
number of theta is in one process's vector: a box that several processes hold alike (HSDP, or a
parameter that is not sharded beside others that are) is divided among them, each having a part of
it in its vector, and all of it in its model.

A model of FSDP2 is evaluated without its hooks, on plain tensors in the places of its parameters:
with them there is no second derivative. So nothing is talked about among processes between the
moment when theta is gathered and the sum of what each has computed, whatever happens in one of
them. One that is tensor parallel is evaluated as it trains: see `wrapped_module.py`.

Example:
    >>> import torch
    >>> sharding_of_parameters([torch.nn.Parameter(torch.zeros(2))]) is None
    True
"""

from __future__ import annotations

import copy
import inspect
import itertools
import sys
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from thalweg.errors import invalid
from thalweg.loss.boxes import Boxes, Place
from thalweg.loss.reduce import AcrossProcesses, Reduction, lost_told
from thalweg.sharding import ShardedVector, Sharding

SAME_SAMPLES = "the processes of a tensor parallel model evaluate the same samples together"
FSDP2 = "FSDP2 (torch.distributed.fsdp.fully_shard)"
HYBRID = 2
"""Dimensions of HSDP's mesh: one along which parameters are copied, one along which divided."""
BUNDLED = 2**20
"""Numbers that are exchanged at once, of parameters that several processes hold."""
# One for each division of theta, so that vectors of two losses of one model go together.
_known: list[ParameterSharding] = []


def is_shard(tensor: object) -> bool:
    """Whether a tensor is one of `torch.distributed.tensor`; to import that takes a second."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 takes care of a module."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def is_tensor_parallel(model: nn.Module) -> bool:
    """Whether parameters are shards that no FSDP2 takes care of."""
    within = _within_fsdp(model)
    return any(is_shard(p) and id(p) not in within for p in model.parameters())


def refuse_unfit_shards(model: nn.Module) -> None:
    """Refuse a model that is sharded in another way than by FSDP2, HSDP, or tensor parallel.

    Raises:
        InvalidInput: FSDP1, DeepSpeed, FSDP with tensor parallel, shards that are no rows in FSDP,
            or of another kind than rows and columns.
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
    within = _within_fsdp(model)
    for name, parameter in model.named_parameters():
        if is_shard(parameter):
            refuse = _refuse_unfit if id(parameter) in within else _refuse_unfit_parallel
            refuse(f"parameter {name!r}", parameter, any_fsdp=bool(within))


def _within_fsdp(model: nn.Module) -> set[int]:
    """The parameters that FSDP2 takes care of, by identity."""
    return {
        id(parameter)
        for module in model.modules()
        if is_fully_sharded(module)
        for parameter in module.parameters()
    }


def _refuse_unfit(name: str, parameter: Any, **_: bool) -> None:
    placements, mesh = parameter.placements, parameter.device_mesh
    if mesh.ndim > 1 and not (mesh.ndim == HYBRID and placements[0].is_replicate()):
        given = f"sharded over a mesh of {mesh.ndim} dimensions (FSDP with tensor parallel?)"
        raise invalid(name, given, f"{FSDP2} over a mesh of one, or HSDP, or tensor parallel alone")
    if not placements[-1].is_shard(0):
        given = f"sharded as {tuple(map(str, placements))}"
        raise invalid(name, given, "shards of the first dimension (Shard(0))")


def _refuse_unfit_parallel(name: str, parameter: Any, *, any_fsdp: bool) -> None:
    placements, mesh = parameter.placements, parameter.device_mesh
    if any_fsdp:
        raise invalid(
            name, "a DTensor that FSDP2 knows nothing of", f"all of them, or none, {FSDP2}"
        )
    if mesh.ndim != 1:
        given = f"tensor parallel over a mesh of {mesh.ndim} dimensions"
        raise invalid(name, given, "a mesh of one")
    if not (placements[0].is_replicate() or type(placements[0]).__name__ == "Shard"):
        given = f"a DTensor {tuple(map(str, placements))}"
        raise invalid(name, given, "placements Shard(dim) or Replicate()")


def take_back(model: nn.Module) -> None:
    """Let FSDP put its shards back in place, where a forward pass has left whole parameters."""
    for module in model.modules():
        if is_fully_sharded(module):
            fsdp: Any = module
            fsdp.reshard()


class ParameterSharding(Sharding):
    """Which of a model's numbers each process holds, and where it has them.

    Args:
        group, rank: as for `Sharding`.
        boxes: of each parameter in theta's order.

    Example: see `Sharding`.
    """

    def __init__(self, group: Any, boxes: Sequence[Boxes], rank: int) -> None:
        ranks = range(len(boxes[0].held))
        begins = itertools.accumulate((each.numel for each in boxes), initial=0)
        placed = [*zip(boxes, begins, strict=False)]
        segments = [
            [piece for each, begin in placed for piece in each.segments(other, begin)]
            for other in ranks
        ]
        super().__init__(group, segments, rank)
        self.boxes = tuple(boxes)
        self._own = [each.held[rank].owned for each in boxes]

    @property
    def counts(self) -> list[int]:
        """How many numbers of each parameter this process has in its vector."""
        return [end - begin for begin, end in self._own]

    def owned(self, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
        """Those of tensors shaped like the parameters, flat, in a tensor's own memory if it can."""
        for boxes, tensor, (begin, end) in zip(self.boxes, tensors, self._own, strict=True):
            shard: Any = tensor
            if is_shard(tensor) and shard.placements != boxes.placements:
                with self.around_each():
                    shard = shard.detach().redistribute(placements=boxes.placements)
            yield local(shard).reshape(-1)[begin:end]


def sharding_of_parameters(parameters: Sequence[Tensor]) -> ParameterSharding | None:
    """How theta is divided, of parameters in its order; None where none of them is a shard.

    Raises:
        InvalidInput: they are sharded over different processes.
    """
    meshes = [shard.device_mesh for shard in parameters if is_shard(shard)]  # type: ignore[attr-defined]
    if not meshes:
        return None
    if any(mesh != meshes[0] for mesh in meshes):
        raise invalid("model", "parameters sharded over several meshes", "one mesh for all")
    group = _group_of(meshes[0])
    places = _places(meshes[0], group)
    boxes = tuple(
        Boxes.of(tuple(p.shape), getattr(p, "placements", None), places) for p in parameters
    )
    for known in _known:
        if known.group is group and known.boxes == boxes:
            return known
    _known.append(ParameterSharding(group, boxes, dist.get_rank(group)))
    return _known[-1]


def _group_of(mesh: Any) -> Any:
    """The processes of a mesh as one group.

    Raises:
        InvalidInput: a mesh of several dimensions over a part of all processes.
    """
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() != dist.get_world_size():
        given = f"a mesh of {mesh.ndim} dimensions over {mesh.size()} of {dist.get_world_size()}"
        raise invalid("model", f"{given} processes", "one over all of them")
    return dist.group.WORLD


def _places(mesh: Any, group: Any) -> list[Place]:
    """The place of each process of the group."""
    shape = tuple(mesh.mesh.shape)
    found = {
        int(mesh.mesh[place]): tuple(zip(place, shape, strict=True))
        for place in itertools.product(*map(range, shape))
    }
    return [found[rank] for rank in dist.get_process_group_ranks(group)]


def own_part(sharding: ParameterSharding, tensors: Sequence[Tensor]) -> ShardedVector:
    """This process's part of tensors shaped like the parameters, such as gradients; a copy.

    Shards that are placed otherwise than the parameters, as some gradients are, are placed so
    first; all processes call it at once.
    """
    return sharding.vector(torch.cat([*sharding.owned(tensors)]))


def write_part(sharding: ParameterSharding, parameters: Sequence[Tensor], part: Tensor) -> None:
    """Set parameters to what all processes' parts say, in place; all call it at once.

    Raises:
        InvalidInput: no sharded vector of this division.
    """
    if not isinstance(part, ShardedVector) or part.sharding is not sharding or part.dim() != 1:
        raise invalid("theta", f"{type(part).__name__} {tuple(part.shape)}", f"one of {sharding}")
    values = part.own.split(sharding.counts)
    shared: list[tuple[Boxes, Tensor, Tensor]] = []
    for boxes, parameter, value in zip(sharding.boxes, parameters, values, strict=True):
        if boxes.shared:
            shared.append((boxes, parameter, value))
        else:
            held = local(parameter)
            held.copy_(value.view_as(held))
    for some in _in_bundles(shared):
        _write_shared(sharding, some)


def _in_bundles(shared: list[Any]) -> Iterator[list[Any]]:
    """Small ones together, since each bundle is an exchange."""
    bundle: list[Any] = []
    for each in shared:
        bundle.append(each)
        if sum(boxes.numel for boxes, *_ in bundle) >= BUNDLED:
            yield bundle
            bundle = []
    if bundle:
        yield bundle


def _write_shared(
    sharding: ParameterSharding, shared: Sequence[tuple[Boxes, Tensor, Tensor]]
) -> None:
    """Write what several processes hold, of which each has a part."""
    together = ParameterSharding(sharding.group, [each for each, _, _ in shared], sharding.rank)
    together.around_each = sharding.around_each
    everything = together.gather(torch.cat([value for _, _, value in shared]))
    wholes = everything.split([boxes.numel for boxes, _, _ in shared])
    for (boxes, parameter, _), value in zip(shared, wholes, strict=True):
        box = tuple(slice(*ends) for ends in boxes.held[sharding.rank].box)
        local(parameter).copy_(value.view(boxes.shape)[box])


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a parameter or a shard like it, in the tensor's own memory."""
    if not is_shard(tensor):
        return tensor.detach()
    shard: Any = tensor.detach()
    return shard.to_local()


def whole(parameter: Tensor) -> Tensor:
    """A shard as a plain tensor, whole; all processes call it at once."""
    return whole_of(parameter.detach())


def whole_of(tensor: Tensor) -> Tensor:
    """The same with the graph that it has."""
    shard: Any = tensor
    return shard.full_tensor()


def reduction_to_shards(
    reduction: Reduction, sharding: Sharding, *, same_samples: bool = False
) -> Reduction:
    """The same reduction, that leaves each process its part of long vectors.

    Args:
        same_samples: all processes have the same samples, as in tensor parallel models.

    Raises:
        InvalidInput: it is over other processes than those that share the parameters.
    """
    assert sharding.group is not None
    kind = OfSameSamples if same_samples else ToShards
    hint = "give group=torch.distributed.group.WORLD, or that of the model's mesh"
    allowed = "the group of the processes that hold the shards"
    if type(reduction) is Reduction and sharding.ranks == 1:
        # No other process has a part: no group is this one.
        return kind(sharding.group, sharding)
    if type(reduction) is not AcrossProcesses:
        given = None if type(reduction) is Reduction else type(reduction).__name__
        raise invalid("group", given, allowed, hint)
    ranks = dist.get_process_group_ranks(reduction.group)
    if ranks != dist.get_process_group_ranks(sharding.group):
        raise invalid("group", f"ranks {ranks}", allowed, hint)
    return kind(reduction.group, sharding)


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
        if self.anywhere(failure is not None):
            self.settle(failure)
        return tuple(map(self.close, parts))


class OfSameSamples(ToShards):
    """For processes that evaluate the same samples together: what each has found is the sum.

    Args:
        group, sharding: as for `ToShards`.
    """

    def close(self, partial: Tensor) -> Tensor:
        """A part as it is; a value of the first process, so that all have the same bits."""
        return partial if isinstance(partial, ShardedVector) else self.sum(partial)

    def sum(self, partial: Tensor) -> Tensor:
        """See `Reduction`."""
        self.num_sums += 1
        first = partial.contiguous()
        with lost_told(self.rank):
            dist.broadcast(first, group=self.group, group_src=0)
        return first

    def total(self, partial: float) -> float:
        """See `Reduction`."""
        return partial

    def anywhere(self, here: bool) -> bool:
        """See `Reduction`."""
        return float(AcrossProcesses.sum(self, self._number(float(here), torch.float64))) > 0

    def place(self, count: int) -> tuple[int, int]:
        """See `Reduction`.

        Raises:
            InvalidInput: another process has another number of samples.
        """
        self.require_same("data", lambda: str(count), SAME_SAMPLES)
        return 0, count


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
