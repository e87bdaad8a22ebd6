"""A weighted sum of losses over data of their own: equations and boundaries, tasks, penalties.

    L(theta) = sum_j w_j L_j(theta)

Each term is a mean over its own samples, of whatever number, and any `Loss`: an `Objective`, a
`FunctionLoss`, a class of one's own. Terms may have parameters in common, or some of their own:
theta is made of all that any of them has, each once.

Example:
    >>> import torch
    >>> from thalweg.loss.objective import Objective
    >>> model, loss = torch.nn.Linear(3, 2), torch.nn.MSELoss()
    >>> inside = Objective(model, loss, (torch.randn(50, 3), torch.randn(50, 2)))
    >>> boundary = Objective(model, loss, (torch.randn(8, 3), torch.randn(8, 2)))
    >>> total = WeightedSum([inside, boundary], [1.0, 10.0])
    >>> total
    WeightedSum(terms=2, P=8, N=58)
    >>> torch.allclose(total.gradient(), inside.gradient() + 10 * boundary.gradient())
    True
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thalweg.errors import invalid
from thalweg.loss.protocol import Linearization, Loss, multiplied, value_of
from thalweg.loss.samples import refuse_unfit_indices
from thalweg.sharding import refuse_sharding


@dataclass(frozen=True)
class Term:
    """A loss of the sum.

    Attributes:
        weight: w_j.
        loss: L_j.
        places: where each of its parameters stands in the sum's theta.
        begin: how many samples of other terms come before its own.
    """

    weight: float
    loss: Loss
    places: tuple[slice, ...]
    begin: int

    def own(self, rows: Tensor) -> Tensor:
        """The part of its own parameters (..., P_j) of what is of all, (..., P)."""
        return torch.cat([rows[..., place] for place in self.places], dim=-1)

    def add(self, whole: Tensor, own: Tensor) -> None:
        """Add what is of its parameters (..., P_j), weighted, to what is of all, (..., P)."""
        at = 0
        for place in self.places:
            size = place.stop - place.start
            whole[..., place].add_(own[..., at : at + size], alpha=self.weight)
            at += size

    def samples_among(self, samples: Tensor | None) -> Tensor | None:
        """The indices of its own samples among those of the sum; None for all, or for none."""
        if samples is None:
            return None
        end = self.begin + self.loss.num_samples
        own = samples[(samples >= self.begin) & (samples < end)] - self.begin
        return own if len(own) else None


class WeightedSum:
    """L = sum_j w_j L_j, as a `Loss`.

    Its samples are those of the first term, then those of the second, and so on. A loss over some
    of them has each term over its own among them; a term of which there is none is taken over all
    of its samples. So each term keeps its weight, and over random samples L is right on average.

    Args:
        losses: L_j.
        weights: w_j, finite numbers; None for 1 each.

    Attributes:
        terms: what is known of each loss: `Term`.

    Raises:
        InvalidInput: no loss, other than one weight each, an infinite weight; losses on several
            devices or of several dtypes; theta or indices that do not fit.

    In units of w_j L_j; dtype and device are those of the losses. Example: see the module.
    """

    def __init__(self, losses: Sequence[Loss], weights: Sequence[float] | None = None) -> None:
        losses = list(losses)
        if not losses:
            raise invalid("losses", [], "one at least")
        for loss in losses:
            refuse_sharding(loss, "WeightedSum")
        weights = [1.0] * len(losses) if weights is None else list(map(float, weights))
        if len(weights) != len(losses) or not all(map(math.isfinite, weights)):
            raise invalid("weights", weights, f"{len(losses)} finite numbers, one for each loss")
        for what in ("dtype", "device"):
            found = sorted({str(getattr(loss, what)) for loss in losses})
            if len(found) > 1:
                raise invalid("losses", f"{what}s {', '.join(found)}", f"one {what}")
        self._parameters: dict[int, Tensor] = {}
        places: dict[int, slice] = {}
        self._num_parameters = self._num_samples = 0
        self.terms: list[Term] = []
        for weight, loss in zip(weights, losses, strict=True):
            for parameter in loss.parameters():
                if id(parameter) not in places:
                    end = self._num_parameters + parameter.numel()
                    places[id(parameter)] = slice(self._num_parameters, end)
                    self._parameters[id(parameter)] = parameter
                    self._num_parameters = end
            own = tuple(places[id(parameter)] for parameter in loss.parameters())
            self.terms.append(Term(weight, loss, own, self._num_samples))
            self._num_samples += loss.num_samples

    @property
    def num_parameters(self) -> int:
        """P, the number of all parameters, each counted once."""
        return self._num_parameters

    @property
    def num_samples(self) -> int:
        """N, the sum of the terms' numbers of samples."""
        return self._num_samples

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of theta."""
        return self.terms[0].loss.dtype

    @property
    def device(self) -> torch.device:
        """The device of theta."""
        return self.terms[0].loss.device

    def parameters(self) -> list[Tensor]:
        """The parameters of all terms, in the order in which they first come."""
        return list(self._parameters.values())

    def theta(self) -> Tensor:
        """A copy of the parameters as they are now, (P,)."""
        whole = torch.empty(self.num_parameters, dtype=self.dtype, device=self.device)
        for term in self.terms:
            parts = term.loss.theta().split([place.stop - place.start for place in term.places])
            for place, part in zip(term.places, parts, strict=True):
                whole[place] = part
        return whole

    def write(self, theta: Tensor) -> None:
        """Set the parameters to theta (P,)."""
        for term, own, _ in self.parts(theta, None):
            term.loss.write(own)

    def value(self, theta: Tensor | None = None, samples: Tensor | None = None) -> Tensor:
        """The sum, a scalar tensor; errors are those of the terms."""
        parts = self.parts(theta, samples)
        return _sum(term.weight * value_of(term.loss, *own) for term, *own in parts)

    def gradient(self, theta: Tensor | None = None, samples: Tensor | None = None) -> Tensor:
        """The gradient (P,)."""
        return self.value_and_gradient(theta, samples)[1]

    def value_and_gradient(
        self, theta: Tensor | None = None, samples: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The sum, a scalar tensor, and its gradient (P,)."""
        gradient = torch.zeros(self.num_parameters, dtype=self.dtype, device=self.device)
        values = []
        for term, *own in self.parts(theta, samples):
            value, part = term.loss.value_and_gradient(*own)
            values.append(term.weight * value)
            term.add(gradient, part)
        return _sum(values), gradient

    def linearize(
        self,
        theta: Tensor | None = None,
        samples: Tensor | None = None,
        *,
        keep_graph: bool = False,
    ) -> SumOfLinearizations:
        """The gradient and products with the Hessian at theta, sums of the terms' own."""
        parts = [
            (term, term.loss.linearize(*own, keep_graph=keep_graph))
            for term, *own in self.parts(theta, samples)
        ]
        return SumOfLinearizations(parts, self.num_parameters)

    def state_dict(self) -> dict[str, Any]:
        """What each term has chosen while running, by its number."""
        return {str(j): dict(term.loss.state_dict()) for j, term in enumerate(self.terms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        for j, term in enumerate(self.terms):
            term.loss.load_state_dict(state[str(j)])

    def parts(
        self, theta: Tensor | None, samples: Tensor | None
    ) -> Iterator[tuple[Term, Tensor, Tensor | None]]:
        """Each term, with what of theta and of the samples is its own."""
        theta = self.theta() if theta is None else theta
        if theta.shape != (self.num_parameters,):
            raise invalid("theta", tuple(theta.shape), f"({self.num_parameters},)")
        if samples is not None:
            refuse_unfit_indices(samples, self.num_samples)
        for term in self.terms:
            yield term, term.own(theta), term.samples_among(samples)

    def __repr__(self) -> str:
        return (
            f"WeightedSum(terms={len(self.terms)}, P={self.num_parameters}, N={self.num_samples})"
        )


class SumOfLinearizations:
    """The gradient and products with the Hessian of a `WeightedSum` at one point.

    Args:
        parts: each term, and its own linearization.
        num_parameters: P.
    """

    def __init__(self, parts: Sequence[tuple[Term, Linearization]], num_parameters: int) -> None:
        self._parts = parts
        self._num_parameters = num_parameters

    def gradient(self) -> Tensor:
        """The gradient (P,)."""
        parts = [(term, at.gradient()) for term, at in self._parts]
        whole = parts[0][1].new_zeros(self._num_parameters)
        for term, own in parts:
            term.add(whole, own)
        return whole

    def multiply(self, rows: Tensor) -> Tensor:
        """H times each row of (k, P), as rows."""
        return self.multiply_with_error(rows)[0]

    def multiply_with_error(
        self, rows: Tensor, *, measured: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """See `Linearization`."""
        whole, squares = torch.zeros_like(rows), None
        for term, at in self._parts:
            images, errors = multiplied(at, term.own(rows), measured=measured)
            term.add(whole, images)
            if errors is not None:
                square = (term.weight * errors).square()
                squares = square if squares is None else squares + square
        return whole, None if squares is None else squares.sqrt()


def _sum(values: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum()
