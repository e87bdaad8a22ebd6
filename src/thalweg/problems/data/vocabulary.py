"""How do texts become token ids: by whole words, or by the pieces of a given vocabulary?

Id 0 is padding and id 1 an unknown word in either case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from thalweg.problems.data.readers.damage import check_size, read_text, unusable

PADDING = 0
UNKNOWN = 1
_RESERVED = 2
_CONTINUATION = "##"
_LONGEST_PIECE = 256
_PADDING_TOKENS = ("[PAD]", "<pad>")
_UNKNOWN_TOKENS = ("[UNK]", "<unk>")


@dataclass(frozen=True)
class WordVocabulary:
    """One id for each word of the training texts, in the order of their first appearance."""

    ids: dict[str, int]

    @classmethod
    def of(cls, texts: Sequence[str]) -> WordVocabulary:
        """The vocabulary of some texts, words separated by blanks."""
        words = dict.fromkeys(word for text in texts for word in text.split())
        return cls({word: number for number, word in enumerate(words, start=_RESERVED)})

    @property
    def size(self) -> int:
        """How many ids there are, padding and unknown included."""
        return len(self.ids) + _RESERVED

    def encode(self, text: str) -> list[int]:
        """The ids of a text; words that are not in the vocabulary share one id."""
        return [self.ids.get(word, UNKNOWN) for word in text.split()]


@dataclass(frozen=True)
class WordPieces:
    """Longest pieces first, as in WordPiece: a word is cut from the left into known pieces.

    Pieces within a word begin with `##`. A word that cannot be cut, and every word when the file
    has no piece for it, is unknown. Text is lowered in case where the vocabulary has no upper case.
    """

    ids: dict[str, int]
    longest: int
    lower_case: bool

    @classmethod
    def from_file(cls, path: Path) -> WordPieces:
        """The pieces of a text file, one a line.

        Ids follow the lines after padding and unknown; lines that stand for these two ([PAD],
        [UNK], <pad>, <unk>) are left out, as are lines that occur again.

        Raises:
            InvalidInput: missing, not UTF-8, larger than the limit "text_bytes", without a piece,
                or with one of more than 256 characters.
        """
        text = read_text(path, "one token a line", "check vocabulary_file")
        special = {"", *_PADDING_TOKENS, *_UNKNOWN_TOKENS}
        pieces = [line.strip() for line in text.splitlines()]
        kept = list(dict.fromkeys(piece for piece in pieces if piece not in special))
        if not kept:
            raise unusable(path, "no token", "one token a line", "check vocabulary_file")
        longest = max(len(piece.removeprefix(_CONTINUATION)) for piece in kept)
        if longest > _LONGEST_PIECE:  # the time to cut a word grows with its square
            found, expected = f"a token of {longest:,} characters", f"at most {_LONGEST_PIECE}"
            raise unusable(path, found, expected, "give one token a line")
        ordinary = [piece for piece in kept if not piece.startswith("[")]  # [CLS], [SEP], [MASK]
        return cls(
            ids={piece: number for number, piece in enumerate(kept, start=_RESERVED)},
            longest=longest,
            lower_case=all(piece == piece.lower() for piece in ordinary),
        )

    @property
    def size(self) -> int:
        """How many ids there are, padding and unknown included."""
        return len(self.ids) + _RESERVED

    def encode(self, text: str) -> list[int]:
        """The ids of a text whose words are separated by blanks."""
        words = (text.lower() if self.lower_case else text).split()
        return [number for word in words for number in self._pieces(word)]

    def _pieces(self, word: str) -> list[int]:
        found: list[int] = []
        start = 0
        while start < len(word):
            for end in range(min(len(word), start + self.longest), start, -1):
                piece = word[start:end] if start == 0 else _CONTINUATION + word[start:end]
                if piece in self.ids:
                    found.append(self.ids[piece])
                    start = end
                    break
            else:
                return [UNKNOWN]
        return found


def padded(sequences: Sequence[list[int]], length: int) -> np.ndarray:
    """Token ids (n, length) int64: cut or filled up with padding; an empty text is one unknown."""
    what = f"{len(sequences):,} phrases of {length:,} tokens"
    check_size(what, 8 * len(sequences) * length)
    ids = np.full((len(sequences), length), PADDING, dtype=np.int64)
    for row, sequence in zip(ids, sequences, strict=True):
        kept = (sequence or [UNKNOWN])[:length]
        row[: len(kept)] = kept
    return ids
