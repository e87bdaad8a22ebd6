"""How large may data be, and what is said about a file that cannot be used?"""

from __future__ import annotations

from pathlib import Path

from thalweg.errors import InvalidInput

LARGEST_ARRAY = 4 * 1024**3
"""Bytes of the largest array read; all of CIFAR-10 takes 0.2 GB. A file may claim any size."""


def unusable(file: Path | str, found: str, expected: str, mend: str) -> InvalidInput:
    """Build the error for a file: its name, what was found, what was expected, the mend."""
    return InvalidInput(f"file {file}: found {found}, expected {expected}; {mend}")


def check_size(file: Path | str, claimed: int) -> None:
    """Refuse an array before memory is allocated for it.

    Raises:
        InvalidInput: `claimed`, in bytes, is above `LARGEST_ARRAY`.
    """
    if claimed > LARGEST_ARRAY:
        raise unusable(
            file,
            f"an array of {claimed:,} bytes",
            f"at most {LARGEST_ARRAY:,} bytes",
            "check where the file comes from, or cut it to the samples that you need",
        )
