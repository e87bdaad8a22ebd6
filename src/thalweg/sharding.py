"""Long vectors of which each process holds a part: theta, gradients and bases of sharded models.

A model that is sharded over N processes has its P parameters in N parts, and a basis of k vectors
beside it has to be as well: (k, P / N) numbers a process. A `Sharding` says who holds what. A
`ShardedVector` is a process's part, and says so by its type, which slices of rows, sums and
multiples keep. Its shape is that of the part; P is `sharding.num_parameters`.

What contracts over the P parameters needs the parts of all. So it is done in `thalweg.linalg`
alone, which gives plain tensors, the same on all processes. Elsewhere a contraction is refused, and
so is arithmetic of a part with a plain tensor of its length: both would be wrong without a word.

Example:
    >>> import torch
    >>> sharding = Sharding(None, [[(0, 2)], [(2, 5)]], rank=1)
    >>> part = sharding.part_of(torch.arange(5.0))
    >>> part
    ShardedVector(3 of P=5 on rank 1 of 2: tensor([2., 3., 4.]))
    >>> (2 * part + part).own.tolist(), sharding.num_parameters
    ([6.0, 9.0, 12.0], 5)
    >>> part.sum()
    Traceback (most recent call last):
    thalweg.errors.InvalidInput: sum of a ShardedVector: it would be of this process's part alone; \
take a function of thalweg.linalg, or part.own for a plain tensor
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from thalweg.errors import InvalidInput, invalid

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Segments = Sequence[tuple[int, int]]
"""Where in theta the numbers of a process stand, one piece after another: (begin, end)."""

SAVED = ("own", "rank", "ranks", "num_parameters")
"""What a saved vector is: its part, and of which division."""

# As many numbers as a plain tensor has, from which on it is told from a basis's few coefficients.
LONG = 64


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What is done number by number, and gives another such vector.
ELEMENTWISE = _names(
    """abs absolute neg negative sign sgn sqrt rsqrt square exp log reciprocal pow float_power
    add sub subtract rsub mul multiply div divide true_divide maximum minimum clamp clamp_min
    clamp_max where lerp addcmul addcdiv isfinite isnan isinf eq ne lt le gt ge logical_not
    logical_and logical_or bitwise_not hypot nan_to_num
    __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__
    __rtruediv__ __itruediv__ __div__ __rdiv__ __idiv__ __pow__ __rpow__ __ipow__ __neg__ __abs__
    __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __and__ __or__ __invert__
    add_ sub_ mul_ div_ neg_ abs_ sqrt_ square_ copy_ zero_ fill_ clamp_ lerp_ addcmul_ addcdiv_
    zeros_like ones_like empty_like full_like randn_like rand_like"""
)
# What moves numbers about, and gives another such vector.
MOVES = _names(
    """__getitem__ __setitem__ T mT t view reshape unsqueeze squeeze expand expand_as
    transpose permute movedim contiguous clone detach detach_ requires_grad_ to double float half
    bfloat16 type type_as cpu cuda stack cat concat concatenate unbind select narrow chunk flip
    index_select repeat_interleave split"""
)
# What is true of the part.
FACTS = _names(
    """shape dtype device layout ndim size dim numel nelement stride __len__ is_contiguous is_cuda
    is_cpu is_floating_point is_complex is_leaf requires_grad grad grad_fn is_sparse is_quantized
    is_mps is_meta is_nested storage_offset untyped_storage element_size itemsize nbytes data_ptr
    _version get_device is_inference is_conj is_neg"""
)
# Slices, as far as they leave the vectors whole.
PIECES = _names("__getitem__ select narrow chunk split unbind index_select")


class Sharding:
    """Which of the P numbers of theta each process of a group holds.

    Args:
        group: the processes; None for none to talk to, as in tests.
        segments: for each of them, in the order of their ranks.
        rank: this process's, in the group.

    Attributes:
        num_parameters: P.
        lengths: how many numbers each process holds.
        around_each: entered around each exchange among the processes.

    Example: see the module.
    """

    def __init__(self, group: ProcessGroup | None, segments: Sequence[Segments], rank: int) -> None:
        self.group = group
        self.segments = tuple(tuple(own) for own in segments)
        self.rank = rank
        self.lengths = tuple(sum(end - begin for begin, end in own) for own in self.segments)
        self.num_parameters = sum(self.lengths)
        self.around_each: Callable[[], AbstractContextManager[object]] = nullcontext
        name, members = ShardedVector.__name__, {"sharding": self, "__doc__": ShardedVector.__doc__}
        self._kind: type[ShardedVector] = type(name, (ShardedVector,), members)

    @property
    def ranks(self) -> int:
        """How many processes share theta."""
        return len(self.segments)

    @property
    def length(self) -> int:
        """How many numbers this process holds."""
        return self.lengths[self.rank]

    def counts_of(self, sizes: Sequence[int]) -> list[int]:
        """How many numbers this process holds of each stretch of theta, of stretches that make P.

        No segment reaches over the end of a stretch.
        """
        ends = [*itertools.accumulate(sizes)]
        counts = [0] * len(ends)
        for begin, end in self.segments[self.rank]:
            counts[bisect.bisect_right(ends, begin)] += end - begin
        return counts

    def vector(self, own: Tensor) -> ShardedVector:
        """A plain tensor (..., P_r), or its transpose, as this process's part; no copy."""
        return own.as_subclass(self._kind)

    def part_of(self, whole: Tensor) -> ShardedVector:
        """This process's part of plain vectors (..., P), a copy."""
        pieces = [whole[..., begin:end] for begin, end in self.segments[self.rank]]
        return self.vector(torch.cat(pieces, dim=-1) if pieces else whole[..., :0].clone())

    def gather(self, part: Tensor) -> Tensor:
        """Plain vectors (..., P), whole, from the parts (..., P_r) of all; all call it at once."""
        own = plain(part)
        rows = own.reshape(math.prod(own.shape[:-1]), self.length)
        sent = self._padded(rows)
        got = sent.new_empty(self.ranks * len(rows), sent.shape[1])
        with self.around_each():
            _all_gather(got, sent, self.group)
        whole = rows.new_empty(len(rows), self.num_parameters)
        for segments, parts in zip(self.segments, got.chunk(self.ranks), strict=True):
            at = 0
            for begin, end in segments:
                whole[:, begin:end] = parts[:, at : at + end - begin]
                at += end - begin
        return whole.reshape(*own.shape[:-1], self.num_parameters)

    def sum_to_parts(self, whole: Tensor) -> ShardedVector:
        """This process's part of the sum of all processes' plain vectors (..., P)."""
        rows = whole.reshape(-1, self.num_parameters)
        sent = rows.new_zeros(self.ranks, len(rows), max(self.lengths))
        for segments, parts in zip(self.segments, sent, strict=True):
            at = 0
            for begin, end in segments:
                parts[:, at : at + end - begin] = rows[:, begin:end]
                at += end - begin
        got = torch.empty_like(sent[0])
        with self.around_each():
            _reduce_scatter(got, sent.flatten(0, 1), self.group)
        own = got[:, : self.length].contiguous()
        return self.vector(own.reshape(*whole.shape[:-1], self.length))

    def total(self, partial: Tensor) -> Tensor:
        """The sum of the processes' small tensors of one shape, the same bits on all of them."""
        there = partial.to(self._where(partial.device), copy=True).contiguous()
        with self.around_each():
            dist.all_reduce(there, group=self.group)
        return there.to(partial.device)

    def each(self, small: Tensor) -> Tensor:
        """The processes' small tensors of one shape, stacked in the order of their ranks."""
        there = small.to(self._where(small.device)).contiguous()
        got = there.new_empty(self.ranks, *there.shape)
        with self.around_each():
            _all_gather(got.flatten(0, 1), there, self.group)
        return got.to(small.device)

    def saved(self, vector: Tensor) -> dict[str, Any]:
        """A vector as a plain tensor with what it is the part of: see `unpacked`."""
        facts = (plain(vector), self.rank, self.ranks, self.num_parameters)
        return dict(zip(SAVED, facts, strict=True))

    def restored(self, saved: Mapping[str, Any]) -> ShardedVector:
        """The vector of which `saved` was made.

        Raises:
            InvalidInput: it was saved by another rank, or of another division.
        """
        given, own = tuple(int(saved[name]) for name in SAVED[1:]), saved["own"]
        here = self.rank, self.ranks, self.num_parameters
        if given != here or self.length not in own.shape:
            raise invalid(
                "saved state",
                f"the part of rank {given[0]} of {given[1]}, of P = {given[2]}",
                f"that of rank {self.rank} of {self.ranks}, of P = {self.num_parameters}",
                "load each rank's own file, with as many processes as saved it",
            )
        return self.vector(own)

    def _padded(self, rows: Tensor) -> Tensor:
        """Rows as long as those of the process that has most."""
        padded = rows.new_zeros(len(rows), max(self.lengths))
        padded[:, : self.length] = rows
        return padded

    def _where(self, device: torch.device) -> torch.device:
        """The device on which the group sums what is on another one."""
        if device.type == "cpu" and dist.get_backend(self.group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return device

    def __repr__(self) -> str:
        return f"Sharding(P={self.num_parameters}, rank {self.rank} of {self.ranks})"


class ShardedVector(Tensor):
    """A process's part of a long vector (P_r,), or of some as rows (k, P_r) or columns (P_r, k).

    Made by a `Sharding`; operations number by number, and moves that leave vectors whole, give
    another one. Example: see the module.

    Raises:
        InvalidInput: another operation, or one with a plain tensor of this length.
    """

    sharding: ClassVar[Sharding]

    @property
    def own(self) -> Tensor:
        """This process's part as a plain tensor, in the same memory."""
        return plain(self)

    def whole(self) -> Tensor:
        """All P numbers, or rows of them (k, P), on each process; all call it at once."""
        return self.sharding.gather(self)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Of torch: called for each operation on such a tensor."""
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = func.__self__.__name__  # type: ignore[attr-defined]
        if name not in ELEMENTWISE and name not in MOVES and name not in FACTS:
            raise InvalidInput(
                f"{name} of a ShardedVector: it would be of this process's part alone; take a"
                " function of thalweg.linalg, or part.own for a plain tensor"
            )
        cls._refuse_plain(name, args)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if name in FACTS:
            return result
        # A plain tensor that is moved to the kind of a part stays what it is.
        if name in ("to", "type_as", "expand_as") and not isinstance(args[0], ShardedVector):
            return result
        return cls._kept(name, result)

    @classmethod
    def _refuse_plain(cls, name: str, args: Sequence[Any]) -> None:
        length = cls.sharding.length
        for given in tensors_in(args):
            if isinstance(given, ShardedVector):
                unfit = given.sharding is not cls.sharding
            else:
                unfit = length >= LONG and length in given.shape
            if unfit:
                raise invalid(
                    f"{name} of a ShardedVector",
                    f"a {type(given).__name__} of shape {tuple(given.shape)}",
                    "another part of the same division",
                    "a plain part becomes one by theta.sharding.vector(part)",
                )

    @classmethod
    def _kept(cls, name: str, result: Any) -> Any:
        if isinstance(result, (tuple, list)):
            return type(result)(cls._kept(name, each) for each in result)
        if not isinstance(result, Tensor) or isinstance(result, cls):
            return result
        if name in PIECES and cls.sharding.length not in result.shape:
            raise InvalidInput(
                f"{name} of a ShardedVector: a piece of shape {tuple(result.shape)} is of this"
                " process alone; take part.own for a plain tensor"
            )
        return result.as_subclass(cls)

    def __iter__(self) -> Iterator[Tensor]:
        """The rows."""
        return iter(self.unbind(0))

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedVector:
        """A copy, as of any tensor."""
        return memo.setdefault(id(self), self.clone())

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused: what comes back would be a plain tensor.

        Raises:
            InvalidInput: always.
        """
        raise InvalidInput(
            "a ShardedVector cannot be pickled: save the state_dict() of what holds it, or part.own"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        sharding = self.sharding
        return (
            f"ShardedVector({sharding.length} of P={sharding.num_parameters} on rank"
            f" {sharding.rank} of {sharding.ranks}: {plain(self)!r})"
        )


def _all_gather(into: Tensor, part: Tensor, group: ProcessGroup | None) -> None:
    # The first name is that of torch from 2.13 on.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(into, part, group=group)


def _reduce_scatter(into: Tensor, parts: Tensor, group: ProcessGroup | None) -> None:
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    scatter(into, parts, group=group)


def plain(tensor: Tensor) -> Tensor:
    """A sharded vector's part as a plain tensor, in the same memory; any other as it is."""
    if not isinstance(tensor, ShardedVector):
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


def whole(vectors: Tensor) -> Tensor:
    """Vectors of all P numbers (..., P): sharded ones gathered, which all call at once."""
    return vectors.whole() if isinstance(vectors, ShardedVector) else vectors


def sharding_of(*values: Any) -> Sharding | None:
    """The sharding of the first that has one: a vector, or an operator or loss on such; or None."""
    for value in values:
        found = getattr(value, "sharding", None)
        if isinstance(found, Sharding):
            return found
    return None


def refuse_sharding(of: Any, what: str) -> None:
    """Refuse a loss or an operator on sharded vectors, for what needs whole ones.

    Raises:
        InvalidInput: it is on such.
    """
    found = sharding_of(of)
    if found is not None:
        raise invalid(what, f"parameters in shards ({found})", "a model in one piece here")


def tensors_in(values: Sequence[Any]) -> Iterator[Tensor]:
    """Tensors among arguments, in lists too."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def packed(state: Any) -> Any:
    """A state of dicts and lists with its sharded vectors as plain tensors and what they are of."""
    if isinstance(state, ShardedVector):
        return state.sharding.saved(state)
    return _mapped(packed, state)


def unpacked(state: Any, sharding: Sharding | None) -> Any:
    """The state that `packed` was given.

    Raises:
        InvalidInput: see `Sharding.restored`; a state of sharded vectors for a loss without.
    """
    if isinstance(state, Mapping) and set(state) == set(SAVED):
        if sharding is None:
            raise invalid(
                "saved state",
                f"the part of rank {int(state['rank'])} of {int(state['ranks'])}",
                "that of a loss in one process",
                "shard the model as it was (fully_shard)",
            )
        return sharding.restored(state)
    return _mapped(lambda value: unpacked(value, sharding), state)


def _mapped(function: Callable[[Any], Any], state: Any) -> Any:
    if isinstance(state, Mapping):
        return {key: function(value) for key, value in state.items()}
    if type(state) in (list, tuple):
        return type(state)(function(value) for value in state)
    return state
