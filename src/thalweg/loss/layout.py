"""Named parameter tensors and one flat vector: which numbers make up theta, in which order.

Operators, solvers and trackers work on one flat vector of P numbers. A `ParameterLayout` fixes
the order once, counts tied parameters once, and leaves frozen ones out.

Example:
    >>> import torch
    >>> layout = ParameterLayout.from_model(torch.nn.Linear(3, 2))
    >>> layout.names, layout.num_parameters
    (('weight', 'bias'), 8)
"""

from __future__ import annotations

import fnmatch
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from thalweg.errors import InvalidInput, invalid
from thalweg.loss.guards.dtypes import refuse_unfit_dtypes, widest
from thalweg.loss.shards import (
    ParameterSharding,
    is_shard,
    own_part,
    sharding_of_parameters,
    write_part,
)


@dataclass(frozen=True)
class ParameterLayout:
    """The names and shapes of the parameters that make up theta, in order.

    Attributes:
        names: as in `model.named_parameters()`.
        shapes: of each parameter.
        sharding: which of theta's numbers each process holds, where parameters are shards. Then a
            flat vector is this process's part, a `ShardedVector`; None where it is all P numbers.

    Dtype and device are those of the tensors that are given. Example: see the module.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    sharding: ParameterSharding | None = None

    @classmethod
    def from_model(
        cls, model: nn.Module, patterns: Sequence[str] | str | None = None
    ) -> ParameterLayout:
        """Lay out all parameters of `model` that require a gradient, or those matching `patterns`.

        Args:
            model: any module; a parameter tied to two places counts once.
            patterns: one or several shell patterns of names, such as `"layers.0.*"`; each must
                match something. The order is that of the model, not of the patterns.

        Raises:
            InvalidInput: a pattern matches no trainable parameter, or none is trainable; one of
                them is complex, or in a dtype of 8 bits.

        Example:
            >>> ParameterLayout.from_model(torch.nn.Linear(3, 2), "b*").names
            ('bias',)
        """
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise InvalidInput(
                "the model has no parameter that requires a gradient; call requires_grad_(True)"
            )
        if isinstance(patterns, str):
            patterns = [patterns]
        chosen = trainable if patterns is None else _matching(trainable, patterns)
        refuse_unfit_dtypes(chosen)
        sharding = sharding_of_parameters([*chosen.values()])
        return cls(tuple(chosen), tuple(p.shape for p in chosen.values()), sharding)

    @property
    def in_one_piece(self) -> ParameterLayout:
        """The same for vectors of all P numbers."""
        return self if self.sharding is None else replace(self, sharding=None)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of elements of each parameter."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def num_parameters(self) -> int:
        """P, the length of theta."""
        return sum(self.sizes)

    def parameters(self, model: nn.Module) -> list[nn.Parameter]:
        """The model's own parameter objects, in the order of this layout.

        Raises:
            InvalidInput: the model has no parameter of such a name.
        """
        found = []
        for name in self.names:
            try:
                # Unlike `get_parameter` also of a TorchScript module.
                parameter: Any = functools.reduce(getattr, name.split("."), model)
            except AttributeError:
                parameter = None
            if not isinstance(parameter, nn.Parameter):
                found_instead = type(parameter).__name__
                hint = "the model was changed since the objective was built: build it anew"
                raise invalid(f"parameter {name!r}", found_instead, "a parameter", hint)
            found.append(parameter)
        return found

    def read(self, model: nn.Module) -> Tensor:
        """Copy the model's current parameters into a flat vector (P,), in the widest of dtypes."""
        return self.flatten([p.detach() for p in self.parameters(model)]).to(self.dtype(model))

    def dtype(self, model: nn.Module) -> torch.dtype:
        """The dtype of theta: the widest of the parameters', at least float32."""
        return widest(p.dtype for p in self.parameters(model))

    def write(self, model: nn.Module, theta: Tensor) -> None:
        """Set the model's parameters to the flat vector `theta` (P,).

        Raises:
            InvalidInput: theta has another length than P.
        """
        with torch.no_grad():
            if self.sharding is not None:
                write_part(self.sharding, self.parameters(model), theta)
                return
            for parameter, value in zip(self.parameters(model), self.unflatten(theta), strict=True):
                parameter.copy_(value)

    def flatten(self, tensors: Iterable[Tensor] | Mapping[str, Tensor]) -> Tensor:
        """Join tensors shaped like the parameters into one new flat vector (P,).

        Args:
            tensors: in the order of this layout; or by name, in any order. Where parameters are
                shards, shards as they are, such as gradients, give this process's part.

        Raises:
            KeyError: a name is missing.
        """
        if isinstance(tensors, Mapping):
            named = cast("Mapping[str, Tensor]", tensors)
            tensors = [named[name] for name in self.names]
        return flat(list(tensors), self.sharding)

    def unflatten(self, vectors: Tensor) -> tuple[Tensor, ...]:
        """Split a vector (P,), or the rows of (k, P), into views shaped like the parameters.

        Of rows each view has a first dimension of k.

        Raises:
            InvalidInput: the last dimension is not P.
        """
        if vectors.shape[-1] != self.num_parameters:
            raise invalid(
                "flat vector", tuple(vectors.shape), f"a last dimension of {self.num_parameters}"
            )
        lead = vectors.shape[:-1]
        parts = vectors.split(self.sizes, dim=-1)
        return tuple(t.reshape(lead + s) for t, s in zip(parts, self.shapes, strict=True))


def flat(tensors: Sequence[Tensor], sharding: ParameterSharding | None) -> Tensor:
    """Tensors shaped like the parameters as one new vector (P,): see `ParameterLayout.flatten`."""
    if sharding is not None and any(map(is_shard, tensors)):
        return own_part(sharding, tensors)
    return torch.cat([t.reshape(-1) for t in tensors])


def _matching(trainable: Mapping[str, Tensor], patterns: Sequence[str]) -> dict[str, Tensor]:
    if not patterns:
        raise invalid("parameters", [], "at least one pattern", "or None for all")
    for pattern in patterns:
        if not fnmatch.filter(trainable, pattern):
            raise invalid(
                "parameters", pattern, "a pattern that matches one of " + ", ".join(trainable)
            )
    return {
        name: parameter
        for name, parameter in trainable.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }
