"""How are inputs scaled before training?

Constants are computed from the training subset alone and applied to the held-out samples as they
are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from thalweg.errors import invalid
from thalweg.problems.data.dataset import Samples

Preprocess = Literal["none", "unit", "standardize", "standardize-channel"]

_CHUNK = 1000
"""Samples held in float64 at a time: all of CIFAR-10 at once would take a gigabyte."""


@dataclass(frozen=True, eq=False)
class Scaling:
    """x -> (x - shift) / divisor; both broadcast against a batch of inputs."""

    shift: np.ndarray
    divisor: np.ndarray

    def chunks(self, inputs: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """The scaled inputs in float64, a chunk of samples at a time with its place."""
        for part, values in _chunks(inputs):
            yield part, (values - self.shift) / self.divisor


def scaling(samples: Samples, how: Preprocess) -> Scaling:
    """The scaling that the training samples give.

    - "none": the values as stored (pixels from 0 to 255, or to 16 for digits);
    - "unit": divided by the largest value possible, so from 0 to 1;
    - "standardize": (x - mean) / std for each pixel or feature, the mean and the standard deviation
      (of the population) over the training samples. A pixel that is constant over them is centred
      and divided by the largest value possible;
    - "standardize-channel": the same with one mean and deviation for each channel, over its pixels.

    Raises:
        InvalidInput: anything but "none" for tokens.
    """
    if samples.vocabulary is not None and how != "none":
        raise invalid("preprocess", how, "'none' for a data set of texts")
    if how == "none":
        return Scaling(np.array(0.0), np.array(1.0))
    if how == "unit":
        return Scaling(np.array(0.0), np.array(samples.scale))
    mean, deviation = _moments(np.asarray(samples.train_inputs), how == "standardize-channel")
    # Rounding can leave a constant value with a deviation near, not at, zero.
    constant = deviation <= 1e-9 * samples.scale
    return Scaling(mean, np.where(constant, samples.scale, deviation))


def _moments(inputs: np.ndarray, by_channel: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over samples, by channel also over pixels, in float64."""
    axes = tuple(range(2, inputs.ndim)) if by_channel else ()

    def average(chunks: Iterator[np.ndarray]) -> np.ndarray:
        total = sum(values.mean(axis=axes, keepdims=True).sum(axis=0) for values in chunks)
        return np.asarray(total) / len(inputs)

    mean = average(values for _, values in _chunks(inputs))
    variance = average((values - mean) ** 2 for _, values in _chunks(inputs))
    return mean, np.sqrt(variance)


def _chunks(inputs: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    for start in range(0, len(inputs), _CHUNK):
        part = slice(start, start + _CHUNK)
        yield part, np.asarray(inputs[part], dtype=np.float64)
