"""How do arrays of images and labels become samples, and do they fit together?"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from thalweg.errors import InvalidInput
from thalweg.problems.data.readers.damage import unusable
from thalweg.problems.data.readers.npz import read_npz
from thalweg.problems.data.tensors import Samples

Part = tuple[np.ndarray, np.ndarray]
"""Images (n, channels, height, width) uint8 and labels (n,) integers."""


def image_samples(
    train: Part, test: Part | None, num_classes: int, notes: tuple[str, ...] = ()
) -> Samples:
    """Samples of images whose values go from 0 to 255.

    Raises:
        InvalidInput: training and held-out images differ in shape.
    """
    if test is not None and test[0].shape[1:] != train[0].shape[1:]:
        raise InvalidInput(
            f"training images of shape {train[0].shape[1:]} and held-out ones of "
            f"{test[0].shape[1:]}; they must agree"
        )
    return Samples(
        train_inputs=train[0],
        train_labels=train[1].astype(np.int64),
        num_classes=num_classes,
        test_inputs=None if test is None else test[0],
        test_labels=None if test is None else test[1].astype(np.int64),
        scale=255.0,
        notes=notes,
    )


def from_npz(path: Path, channels: int, num_classes: int) -> Samples:
    """Samples from x_train, y_train and maybe x_test, y_test; images channel last or first.

    Raises:
        InvalidInput: as `read_npz`, or the arrays do not fit together.
    """
    arrays = read_npz(path, ("x_train", "y_train"), ("x_test", "y_test"))
    train = _part(path, "train", arrays["x_train"], arrays["y_train"], channels, num_classes)
    if "x_test" not in arrays or "y_test" not in arrays:
        return image_samples(train, None, num_classes)
    test = _part(path, "test", arrays["x_test"], arrays["y_test"], channels, num_classes)
    return image_samples(train, test, num_classes)


def _part(
    path: Path, part: str, images: np.ndarray, labels: np.ndarray, channels: int, num_classes: int
) -> Part:
    where = f"{path}, array x_{part}"
    if images.dtype != np.uint8:
        raise unusable(where, f"values of type {images.dtype}", "uint8", "save pixels 0 to 255")
    if labels.shape == (len(images), 1):  # as some programs save them
        labels = labels[:, 0]
    images = _channel_first(where, images, channels)
    check_labels(f"{path}, array y_{part}", labels, len(images), num_classes)
    return images, labels


def _channel_first(where: str, images: np.ndarray, channels: int) -> np.ndarray:
    if images.ndim == 3 and channels == 1:
        return images[:, None]
    if images.ndim == 4 and images.shape[1] == channels:
        return images
    if images.ndim == 4 and images.shape[3] == channels:
        return images.transpose(0, 3, 1, 2)
    expected = f"(n, height, width, {channels}) or (n, {channels}, height, width)"
    raise unusable(where, f"shape {images.shape}", expected, "give an array of images")


def check_labels(where: Path | str, labels: np.ndarray, number: int, num_classes: int) -> None:
    """Refuse labels that are not one class number for each of `number` samples.

    Raises:
        InvalidInput: another shape or type, or a number outside 0 to num_classes - 1.
    """
    if labels.shape != (number,) or labels.dtype.kind not in "iu":
        found = f"shape {labels.shape} of {labels.dtype}"
        raise unusable(where, found, f"{number} integers", "give one label for each image")
    if number and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        found = f"labels from {labels.min()} to {labels.max()}"
        raise unusable(where, found, f"0 to {num_classes - 1}", "is it the right data set?")
