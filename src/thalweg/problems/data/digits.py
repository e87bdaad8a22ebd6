"""The data set in the package: small real images, no download.

Licence and attribution are in `digits.LICENSE.txt` beside the data.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydantic import Field

from thalweg.problems.data.dataset import Samples
from thalweg.problems.data.readers.npz import read_npz
from thalweg.registry import datasets
from thalweg.settings import Settings

_FILE = Path(__file__).with_name("digits.npz")


@datasets.register("digits")
class Digits(Settings):
    """1,797 handwritten digits of 8x8 pixels from 0 to 16, shipped with the package.

    The held-out samples are the last `held_out` of a fixed shuffle (stored in the file), the
    training samples the rest in that order: 1,437 and 360 by default. The writers of the two parts
    are the same 13 people. Source: UCI optical recognition of handwritten digits, test part.
    """

    held_out: int = Field(
        default=360, ge=0, lt=1797, description="samples kept for the test accuracy"
    )

    def build(self) -> Samples:
        arrays = read_npz(_FILE, ("images", "labels", "order"))
        order = arrays["order"]
        images = arrays["images"][order][:, None]
        labels = arrays["labels"][order].astype(np.int64)
        cut = len(labels) - self.held_out
        return Samples(
            train_inputs=images[:cut],
            train_labels=labels[:cut],
            num_classes=10,
            test_inputs=images[cut:] if self.held_out else None,
            test_labels=labels[cut:] if self.held_out else None,
            scale=16.0,
        )
