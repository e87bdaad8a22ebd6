"""Tiny Shakespeare: plain text, character by character, cut into windows.

A sample is a window of `context` characters, its targets are the characters that follow each of
them. Windows do not overlap; the last part of the text is held out. Token ids are the places of the
characters in the sorted alphabet of the whole text, with nothing kept for padding.

Source: Karpathy 2015, data of char-rnn.

Example:
    >>> windows("abcabcabca", context=3).inputs.tolist()
    [[0, 1, 2], [0, 1, 2], [0, 1, 2]]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field

from thalweg.errors import InvalidInput
from thalweg.problems.data import download
from thalweg.problems.data.data_folder import existing
from thalweg.problems.data.dataset import Samples
from thalweg.problems.data.readers.damage import read_text, unusable
from thalweg.registry import datasets
from thalweg.settings import Settings

_NAMES = ("input.txt", "tinyshakespeare.txt", "tiny-shakespeare.txt", "tiny_shakespeare.txt")


class Windows(NamedTuple):
    """Windows of a text: ids `inputs` and `targets` (n, context), int64; size of the alphabet."""

    inputs: np.ndarray
    targets: np.ndarray
    vocabulary: int


def windows(text: str, context: int) -> Windows:
    """Cut a text into windows that do not overlap; characters that fill no window are left out.

    A window that begins at place i has inputs i to i + context - 1, targets i + 1 to i + context.
    """
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    used = np.zeros(sys.maxunicode + 1, dtype=bool)
    used[points] = True
    # Looked up, not sorted: it takes a tenth of the time and a third of the memory.
    ids = np.cumsum(used, dtype=np.int64) - 1
    count = max(0, len(points) - 1) // context
    kept = ids[points[: count * context + 1]]
    size = int(used.sum())
    return Windows(kept[:-1].reshape(count, context), kept[1:].reshape(count, context), size)


@datasets.register("tinyshakespeare")
class TinyShakespeare(Settings):
    """Plays of Shakespeare, 1,115,394 characters of 65 kinds, to predict each next character.

    The held-out windows are the last tenth (`held_out`) of all. `data_dir` is the text file, any in
    UTF-8, or a folder that holds `input.txt` or `tinyshakespeare.txt`; without it the file of
    char-rnn is downloaded. Needs the model `language-model`.
    """

    data_dir: str | None = Field(
        default=None, description="text file, or its folder; downloaded if not given"
    )
    context: Annotated[int, Field(ge=1)] = Field(default=64, description="characters of a window")
    held_out: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1, description="fraction of the windows, the last ones, kept for the test loss"
    )

    def build(self) -> Samples:
        path = self._file()
        cut = windows(_read(path), self.context)
        number = len(cut.inputs) - round(self.held_out * len(cut.inputs))
        if number == 0:
            expected = f"a window of {self.context} characters and one more to train on"
            raise unusable(path, "less", expected, "give a longer text or a smaller context")
        rest = len(cut.inputs) - number
        return Samples(
            train_inputs=cut.inputs[:number],
            train_labels=cut.targets[:number],
            num_classes=cut.vocabulary,
            test_inputs=cut.inputs[number:] if rest else None,
            test_labels=cut.targets[number:] if rest else None,
            vocabulary=cut.vocabulary,
        )

    def _file(self) -> Path:
        if self.data_dir is None:
            return download.fetch(download.TINY_SHAKESPEARE, self.registered_name)
        place = existing(self.data_dir, "Tiny Shakespeare")
        if place.is_file():
            return place
        found = next((place / name for name in _NAMES if (place / name).is_file()), None)
        if found is None:
            hint = "give the text file itself, or leave data_dir out to download it"
            raise unusable(place, "no text", " or ".join(_NAMES[:2]), hint)
        return found


def _read(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        InvalidInput: it cannot be read, is too large, is not UTF-8, or empty.
    """
    text = read_text(path, "a readable file", "check data_dir")
    if not text:
        raise InvalidInput(f"file {path}: found no text; give a file that holds some")
    return text
