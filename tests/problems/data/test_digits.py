from __future__ import annotations

from importlib import resources

import numpy as np
import pytest

from thalweg.problems.data.digits import Digits


def by_content(images: np.ndarray, labels: np.ndarray) -> list[bytes]:
    flat = images.reshape(len(images), 64).astype(np.uint8)
    return sorted(
        bytes([label]) + image.tobytes() for image, label in zip(flat, labels, strict=True)
    )


@pytest.mark.slow
def test_the_images_are_those_that_scikit_learn_bundles() -> None:
    reference = pytest.importorskip("sklearn.datasets").load_digits()
    samples = Digits(held_out=0).build()
    assert samples.test_inputs is None
    ours = by_content(np.asarray(samples.train_inputs), samples.train_labels)
    assert ours == by_content(reference.images, reference.target)


def test_the_two_parts_are_disjoint_and_fixed() -> None:
    samples = Digits().build()
    assert samples.train_labels.shape == (1437,)
    assert samples.test_labels is not None
    assert samples.test_labels.shape == (360,)
    assert samples.train_labels[:8].tolist() == [2, 8, 2, 6, 6, 7, 1, 9]
    whole = Digits(held_out=0).build()
    np.testing.assert_array_equal(whole.train_inputs[:1437], samples.train_inputs)
    np.testing.assert_array_equal(whole.train_labels[1437:], samples.test_labels)


def test_every_class_is_held_out() -> None:
    labels = Digits().build().test_labels
    assert labels is not None
    assert np.bincount(labels, minlength=10).min() >= 25


def test_the_attribution_is_shipped_beside_the_data() -> None:
    text = (resources.files("thalweg.problems.data") / "digits.LICENSE.txt").read_text("utf-8")
    for phrase in ("Alpaydin", "CC BY 4.0", "10.24432/C50P49", "BSD 3-Clause"):
        assert phrase in text
