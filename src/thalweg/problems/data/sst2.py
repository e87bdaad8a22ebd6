"""SST-2: phrases of film reviews, positive or negative.

The paper used a subword vocabulary of 30,522 tokens, which is that of a published tokenizer; give
its token list as `vocabulary_file`. Without one each word of the chosen training phrases is a token
(the phrases come with their tokens separated by blanks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from thalweg.problems.data import download
from thalweg.problems.data.data_folder import existing
from thalweg.problems.data.dataset import Samples
from thalweg.problems.data.readers.damage import unusable
from thalweg.problems.data.readers.phrases import read_phrases, read_phrases_from_archive
from thalweg.problems.data.vocabulary import WordPieces, WordVocabulary, padded
from thalweg.registry import datasets
from thalweg.settings import Settings

Phrases = tuple[list[str], list[int]]

_NUM_CLASSES = 2
_TRAIN_NAMES = ("train.tsv", "sst2_train.tsv", "SST-2/train.tsv")
_TEST_NAMES = ("dev.tsv", "sst2_dev.tsv", "SST-2/dev.tsv")


@datasets.register("sst2")
class SST2(Settings):
    """Stanford Sentiment Treebank in two classes: 67,349 training phrases, 872 held-out sentences.

    The held-out part is the development set, as the test set has no public labels. `data_dir` is a
    folder with `train.tsv` and maybe `dev.tsv` (a header line with the columns `label` and
    `sentence`, in any order), with `sst2_train.tsv` and `sst2_dev.tsv`, or with `SST-2.zip`; or one
    of these files itself, the training phrases of which it then holds. Without it the GLUE archive
    is downloaded.

    Token ids: 0 is padding, 1 an unknown word. Every phrase has the length of the longest training
    phrase; `max_length` cuts all phrases to that many tokens.
    """

    data_dir: str | None = Field(
        default=None, description="folder or file of the data; downloaded if not given"
    )
    vocabulary_file: str | None = Field(
        default=None,
        description="text file of subword tokens, one a line, '##' before those within a word; "
        "the words of the training phrases if not given",
    )
    max_length: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="tokens of a phrase that are kept; all if not given"
    )

    def build(self) -> Samples:
        """All phrases, as text."""
        train, test = self._read()
        return Samples(
            train_inputs=train[0],
            train_labels=np.array(train[1], dtype=np.int64),
            num_classes=_NUM_CLASSES,
            test_inputs=None if test is None else test[0],
            test_labels=None if test is None else np.array(test[1], dtype=np.int64),
            notes=() if test is not None else ("no dev.tsv was found: no held-out phrases",),
        )

    def encode(self, samples: Samples) -> Samples:
        """The chosen phrases as token ids; the vocabulary is that of the training ones."""
        texts = _texts(samples.train_inputs)
        if self.vocabulary_file is None:
            vocabulary = WordVocabulary.of(texts)
        else:
            vocabulary = WordPieces.from_file(Path(self.vocabulary_file).expanduser())
        train = [vocabulary.encode(text) for text in texts]
        length = max(1, max(len(sequence) for sequence in train))
        length = min(length, self.max_length or length)
        test = samples.test_inputs
        if test is not None:
            test = padded([vocabulary.encode(text) for text in _texts(test)], length)
        return replace(
            samples,
            train_inputs=padded(train, length),
            test_inputs=test,
            vocabulary=vocabulary.size,
        )

    def _read(self) -> tuple[Phrases, Phrases | None]:
        if self.data_dir is None:
            return _from_archive(download.fetch(download.SST2, self.registered_name))
        place = existing(self.data_dir, "SST-2")
        if place.is_file():
            if place.suffix == ".zip":
                return _from_archive(place)
            return read_phrases(place, _NUM_CLASSES), None
        train, test = _first(place, _TRAIN_NAMES), _first(place, _TEST_NAMES)
        if train is not None:
            held_out = None if test is None else read_phrases(test, _NUM_CLASSES)
            return read_phrases(train, _NUM_CLASSES), held_out
        if (place / download.SST2.name).is_file():
            return _from_archive(place / download.SST2.name)
        raise unusable(
            place,
            "no training phrases",
            f"{', '.join(_TRAIN_NAMES)} or {download.SST2.name}",
            "give the folder of SST-2, or leave data_dir out to download it",
        )


def _from_archive(path: Path) -> tuple[Phrases, Phrases]:
    train = read_phrases_from_archive(path, "SST-2/train.tsv", _NUM_CLASSES)
    return train, read_phrases_from_archive(path, "SST-2/dev.tsv", _NUM_CLASSES)


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _texts(inputs: np.ndarray | Sequence[str]) -> Sequence[str]:
    return [str(text) for text in inputs]
