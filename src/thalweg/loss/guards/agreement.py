"""Is the loss of a union of samples the mean of its parts' losses? If not, by which weights is it?

Data are evaluated in chunks, and trackers follow a part of them, so that a loss has to be a mean
over samples, or over something that can be counted in each batch. That is tried on a few samples,
once, before the first result that depends on it: the loss of all of them against that of two parts,
for two uneven cuts, near theta (where all losses are equal, any weights do), in a float64 copy of
the model where there can be one. The price is five evaluations, without gradient, of up to twelve
samples.

Samples are chosen whose targets differ in how much is ignored: all of them are searched where they
are in memory, else 64.

Random numbers that a seed fixes are the same for all samples meanwhile, see `constant_draws.py`.

Not seen: what depends on samples that were not looked at; a difference below 1e-5 of the loss (1e-4
in float32, where no copy can be made); a model that takes no batch of few samples; random numbers
of NumPy or Python.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from thalweg.loss.copies import few_of
from thalweg.loss.guards.differences import random_like, scales
from thalweg.loss.guards.failures import said
from thalweg.loss.guards.generators import generators_kept
from thalweg.loss.samples import Batch, BatchSamples, Samples, TensorSamples

COMPARED, SEARCHED = 8, 64
# Relative to the largest loss; and, for a loss that is all but zero, its rounding.
TOLERANCE = {torch.float64: (1e-5, 1e-9), torch.float32: (1e-4, 1e-5)}
ROUGH = (1e-2, 1e-2)
NEARBY = 0.01


class Draws(Protocol):
    """What draws a loss's random numbers, if any."""

    drawn: set[str]

    def draw_alike(self) -> None: ...


class Evaluated(Protocol):
    """What is compared: an `Objective`, without checks of its own."""

    samples: Samples
    batch_weight: Callable[[Batch], Any] | None
    chunk_size: int | None

    @property
    def device(self) -> torch.device: ...
    def theta(self) -> Tensor: ...
    def parameters(self) -> Sequence[Tensor]: ...
    def value(self, theta: Tensor | None = None, samples: Tensor | None = None) -> Tensor: ...
    def copied(self, dtype: torch.dtype) -> Self: ...
    @property
    def is_rough(self) -> bool: ...
    @property
    def evaluator(self) -> Draws: ...


@dataclass(frozen=True)
class Cut:
    """Losses of a union of samples and of its two parts, and the weights of each candidate."""

    losses: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]

    def apart(self, candidate: int, rounding: float) -> float:
        """How far the mean of the parts is from the union, relative to the largest loss.

        Args:
            rounding: what counts for nothing.
        """
        weights = self.weights[candidate]
        # Nothing to average is 0/0, and counts for nothing.
        terms = [x * w if w else 0.0 for x, w in zip(self.losses, weights, strict=True)]
        if not weights[0]:
            return math.inf
        apart = abs(terms[0] - terms[1] - terms[2]) / weights[0]
        scale = max((abs(x) for x in self.losses if math.isfinite(x)), default=1.0)
        if math.isnan(apart):
            return math.inf
        return 0.0 if apart <= rounding else apart / scale

    @property
    def adds_up(self) -> bool:
        """Whether the parts' losses add up to the union's."""
        whole, first, second = self.losses
        return abs(whole - first - second) <= 1e-3 * abs(whole)


@dataclass(frozen=True)
class Agreement:
    """Whether the mean of parts is the loss of their union.

    Attributes:
        fits: the numbers of the candidates by which it is.
        apart: how far it is from it by the first candidate, relative.
        samples: how many were compared; 0 where nothing can be said.
        is_sum: whether the parts' losses add up instead.
        ambiguous: several candidates fit, and would give other results.
        note: why nothing can be said, if so.
    """

    fits: tuple[int, ...]
    apart: float = 0.0
    samples: int = 0
    is_sum: bool = False
    ambiguous: bool = False
    note: str = ""


def agreement(
    loss: Evaluated, candidates: Sequence[Callable[[Batch], Any]], at_once: int
) -> Agreement:
    """Which of some weights of batches makes the loss a mean of those of its parts.

    Args:
        loss: without checks of its own.
        candidates: weights of a batch, the likeliest first. Those with a method `of_each`, which
            gives the weights (n,) of a batch's samples, help to choose samples.
        at_once: the most samples in a union; two at least.
    """
    note = ""
    with generators_kept(loss.device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for copied in (True, False):
            try:
                tried = loss.copied(torch.float64) if copied else loss
                tried.batch_weight = tried.chunk_size = None
                tried.evaluator.draw_alike()
                return _agreement(tried, candidates, max(2, at_once))
            except Exception as error:  # what stands in the way is no fault of the mean
                note = said(error)
    return Agreement((0,), note=note)


def _agreement(
    loss: Evaluated, candidates: Sequence[Callable[[Batch], Any]], at_once: int
) -> Agreement:
    searched = _search(loss.samples, candidates)
    chosen = searched.chosen
    if len(chosen) < 2:
        return Agreement((0,), note="no batch has two samples")
    theta, sizes = loss.theta(), [parameter.numel() for parameter in loss.parameters()]
    near = theta + NEARBY * scales(theta, sizes) * random_like(theta, 3)

    def seen(indices: Tensor) -> tuple[float, list[float]]:
        ((batch, _),) = loss.samples.chunks(indices, None)
        return _value(loss, near, indices), [float(weigh(batch)) for weigh in candidates]

    cuts = []
    groups = math.ceil(len(chosen) / at_once)
    for union in (chosen[group::groups] for group in range(groups)):
        whole = seen(union)
        for at in sorted({1, len(union) // 2 + 1} - {len(union)}):
            parts = whole, seen(union[:at]), seen(union[at:])
            weights = zip(*(weights for _, weights in parts), strict=True)
            cuts.append(Cut(tuple(value for value, _ in parts), tuple(weights)))
    if not all(math.isfinite(cut.losses[0]) for cut in cuts if cut.weights[0][0]):
        # That is to be told where the loss is evaluated, and is no fault of the mean.
        return Agreement((0,), note="the loss is NaN or infinite")
    if not any(any(weights) for cut in cuts for weights in cut.weights):
        return Agreement((0,), note="no target counts")
    tolerance, rounding = ROUGH if loss.is_rough else TOLERANCE.get(theta.dtype, ROUGH)
    apart = [max(cut.apart(i, rounding) for cut in cuts) for i in range(len(candidates))]
    fits = tuple(i for i, far in enumerate(apart) if far <= tolerance)
    if not fits and (elsewhere := loss.evaluator.drawn - {"torch"}):
        return Agreement((0,), note=f"random numbers of {', '.join(elsewhere)}")
    return Agreement(
        fits,
        apart[0],
        len(chosen),
        all(cut.adds_up for cut in cuts),
        any(i in searched.otherwise for i in fits) and 0 in fits,
    )


def _value(loss: Evaluated, theta: Tensor, indices: Tensor) -> float:
    try:
        return float(loss.value(theta, indices))
    except ArithmeticError:
        return math.nan


@dataclass(frozen=True)
class _Search:
    """Samples that share a batch, lightest first, in which weights differ as far as they do.

    Attributes:
        otherwise: the candidates that weigh batches otherwise than by their samples, though in
            each batch all samples weigh the same.
    """

    chosen: Tensor
    otherwise: frozenset[int] = frozenset()


def _search(samples: Samples, candidates: Sequence[Callable[[Batch], Any]]) -> _Search:
    count = len(samples)
    counted = [i for i, weigh in enumerate(candidates) if hasattr(weigh, "of_each")]
    in_memory = isinstance(getattr(samples, "samples", samples), (TensorSamples, BatchSamples))
    searched = (
        torch.arange(count, device="cpu")
        if in_memory
        else few_of(count, SEARCHED if counted else COMPARED)
    )
    groups, at = [], 0
    for batch, size in samples.chunks(None if in_memory else searched, None):
        each = [candidates[i].of_each(batch).double().cpu() for i in counted]  # type: ignore
        groups.append(
            (
                searched[at : at + size],
                torch.stack(each) if each else torch.empty(0, size, device="cpu"),
            )
        )
        at += size
    spreads = [weights.amax(1) > weights.amin(1) for _, weights in groups]
    best = max(range(len(groups)), key=lambda i: (int(spreads[i].sum()), len(groups[i][0])))
    indices, weights = groups[best]
    picked = set(few_of(len(indices), COMPARED).tolist())
    for row in weights:
        picked |= {int(row.argmin()), int(row.argmax())}
    order = weights.sum(0) if len(weights) else torch.zeros(len(indices), device="cpu")
    lightest_first = sorted(picked, key=lambda i: (float(order[i]), i))
    otherwise = (
        number
        for row, number in enumerate(counted)
        if not any(bool(spread[row]) for spread in spreads)
        and len({float(weights[row, 0]) for _, weights in groups}) > 1
    )
    return _Search(indices[torch.tensor(lightest_first, device="cpu")], frozenset(otherwise))
