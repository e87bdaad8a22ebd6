from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from thalweg.errors import InvalidInput
from thalweg.problems.data.dataset import Samples
from thalweg.problems.data.preprocess import Preprocess, scaling
from thalweg.problems.problem_spec import ProblemSpec


def images(number: int = 2500) -> np.ndarray:
    generator = np.random.default_rng(3)
    values = generator.integers(0, 256, size=(number, 3, 4, 4), dtype=np.uint8)
    values[:, 1, 2, 3] = 200  # constant
    return values


def applied(inputs: np.ndarray, how: Preprocess, train: np.ndarray | None = None) -> np.ndarray:
    train = inputs if train is None else train
    given = Samples(train, np.zeros(len(train), dtype=int), 1, scale=255.0)
    return np.concatenate([values for _, values in scaling(given, how).chunks(inputs)])


def test_none_keeps_the_values() -> None:
    np.testing.assert_array_equal(applied(images(), "none"), images())


def test_unit_divides_by_the_largest_possible_value() -> None:
    np.testing.assert_array_equal(applied(images(), "unit"), images() / 255.0)


def test_standardized_pixels_agree_with_the_closed_form() -> None:
    values = images().astype(np.float64)
    deviation = values.std(axis=0)
    expected = (values - values.mean(axis=0)) / np.where(deviation == 0, 255, deviation)
    np.testing.assert_allclose(applied(images(), "standardize"), expected, rtol=0, atol=1e-12)


def test_a_constant_pixel_is_centred_and_not_blown_up() -> None:
    scaled = applied(images(), "standardize")
    np.testing.assert_array_equal(scaled[:, 1, 2, 3], 0)
    other = np.full((1, 3, 4, 4), 251, dtype=np.uint8)
    assert applied(other, "standardize", train=images())[0, 1, 2, 3] == pytest.approx(51 / 255)


def test_standardized_channels_have_mean_0_and_variance_1() -> None:
    scaled = applied(images(), "standardize-channel")
    np.testing.assert_allclose(scaled.mean(axis=(0, 2, 3)), 0, atol=1e-12)
    np.testing.assert_allclose(scaled.var(axis=(0, 2, 3)), 1, atol=1e-12)
    pixel = images().astype(float)[:, 0]
    np.testing.assert_allclose(scaled[:, 0], (pixel - pixel.mean()) / pixel.std(), atol=1e-12)


def test_constants_come_from_the_training_samples_alone() -> None:
    train, test = images(2000), images(2500)[2000:]
    together = applied(np.concatenate([train, test]), "standardize", train=train)
    np.testing.assert_array_equal(together[:2000], applied(train, "standardize"))


@pytest.mark.parametrize("how", ["standardize", "standardize-channel"])
def test_features_without_pixels_are_standardized_one_by_one(how: Preprocess) -> None:
    scaled = applied(np.random.default_rng(0).normal(size=(50, 4)), how)
    np.testing.assert_allclose(scaled.std(axis=0), 1, atol=1e-12)


def test_tokens_are_not_scaled() -> None:
    tokens = Samples(np.ones((5, 3), dtype=int), np.zeros(5, dtype=int), 2, vocabulary=9)
    with pytest.raises(InvalidInput, match="'unit', allowed: 'none' for a data set of texts"):
        scaling(tokens, "unit")


def test_a_spec_knows_the_same_ways() -> None:
    allowed = ProblemSpec.model_fields["preprocess"].annotation
    assert get_args(allowed) == get_args(Preprocess)
