"""Tests of thalweg.problems.data.dataset."""

from __future__ import annotations

import numpy as np
import pytest

from thalweg.errors import InvalidInput
from thalweg.problems.data.dataset import Samples, choose

LABELS = np.array([2, 0, 0, 1, 2, 0, 1, 1, 2, 0])


def samples(**changes: object) -> Samples:
    given = {
        "train_inputs": np.arange(10.0)[:, None],
        "train_labels": LABELS,
        "num_classes": 3,
        "test_inputs": np.arange(4.0)[:, None],
        "test_labels": LABELS[:4],
    }
    return Samples(**(given | changes))  # type: ignore[arg-type]


def test_the_first_samples_are_taken_in_order() -> None:
    chosen = choose(samples(), "toy", 4, False, 2)
    assert np.ravel(chosen.train_inputs).tolist() == [0, 1, 2, 3]
    assert chosen.train_labels.tolist() == [2, 0, 0, 1]
    assert chosen.test_labels is not None
    assert chosen.test_labels.tolist() == [2, 0]


def test_a_balanced_subset_has_the_first_of_each_class_in_the_data_sets_order() -> None:
    chosen = choose(samples(), "toy", 6, True, None)
    assert np.ravel(chosen.train_inputs).tolist() == [0, 1, 2, 3, 4, 6]
    assert np.bincount(chosen.train_labels).tolist() == [2, 2, 2]


def test_all_are_taken_when_no_number_is_given() -> None:
    chosen = choose(samples(), "toy", None, False, None)
    assert len(chosen.train_labels) == 10
    assert chosen.test_labels is not None
    assert len(chosen.test_labels) == 4


def test_texts_are_chosen_like_arrays() -> None:
    texts = [f"text {i}" for i in range(10)]
    chosen = choose(samples(train_inputs=texts), "toy", 3, True, None)
    assert chosen.train_inputs == ("text 0", "text 1", "text 3")


@pytest.mark.parametrize(
    ("number", "balanced", "test_number", "message"),
    [
        (11, False, None, "samples of toy: got 11, allowed: an integer from 1 to 10"),
        (0, False, None, "got 0"),
        (7, True, None, "a multiple of its 3 classes"),
        (None, True, None, "a multiple of its 3 classes"),
        (12, True, None, "an integer from 1 to 10"),
        (9, True, None, None),
        (3, False, 5, "test_samples of toy: got 5, allowed: an integer from 0 to 4"),
    ],
)
def test_an_impossible_number_is_refused_with_what_is_possible(
    number: int | None, balanced: bool, test_number: int | None, message: str | None
) -> None:
    if message is None:
        choose(samples(), "toy", number, balanced, test_number)
        return
    with pytest.raises(InvalidInput, match=message):
        choose(samples(), "toy", number, balanced, test_number)


def test_a_class_with_too_few_samples_is_named() -> None:
    labels = np.array([0, 0, 0, 0, 0, 1, 1, 1, 2, 0])
    with pytest.raises(InvalidInput, match="3 samples of each class; class 2 has 1"):
        choose(samples(train_labels=labels), "toy", 9, True, None)


def test_no_balance_without_classes() -> None:
    regression = samples(num_classes=None, train_labels=np.ones(10), test_labels=np.ones(4))
    with pytest.raises(InvalidInput, match="no classes"):
        choose(regression, "toy", 6, True, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_labels": LABELS[:9]}, "10 training inputs and 9 labels"),
        ({"test_labels": LABELS}, "4 held-out inputs and 10 labels"),
        ({"train_labels": LABELS + 1}, "got 3, allowed: classes 0 to 2"),
        ({"train_labels": LABELS.astype(float)}, "one integer a sample"),
        ({"train_labels": LABELS.tolist()}, "training labels are a list; give a NumPy array"),
        ({"test_inputs": range(4)}, "held-out inputs are a range"),
        ({"train_inputs": list(range(10))}, "training inputs are a list"),
        ({"train_inputs": np.full((10, 1), np.nan)}, "training inputs hold NaN"),
        ({"train_inputs": np.ones((0, 1)), "train_labels": LABELS[:0]}, "no training samples"),
    ],
)
def test_samples_that_do_not_fit_together_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        choose(samples(**changes), "toy", None, False, None)


def test_held_out_samples_cannot_be_asked_of_a_set_without_them() -> None:
    without = samples(test_inputs=None, test_labels=None)
    assert choose(without, "toy", None, False, None).test_inputs is None
    with pytest.raises(InvalidInput, match="no held-out samples"):
        choose(without, "toy", None, False, 1)
