"""How large may data be, and what is said about a file that cannot be used?"""

from __future__ import annotations

from pathlib import Path

from thalweg.errors import InvalidInput

LARGEST_ARRAY = 1024**3
"""Bytes of the largest array read; all of CIFAR-10 takes 0.2 GB. A file may claim any size."""

LARGEST_TEXT = 256 * 1024**2
"""Bytes of the largest text read; the training phrases of SST-2 take 4 MB."""


def unusable(file: Path | str, found: str, expected: str, hint: str) -> InvalidInput:
    """Build the error for a file: its name, what was found, what was expected, a hint."""
    return InvalidInput(f"file {file}: found {found}, expected {expected}; {hint}")


def check_size(file: Path | str, claimed: int, limit: int = LARGEST_ARRAY) -> None:
    """Refuse data before memory is allocated for them.

    Raises:
        InvalidInput: `claimed`, in bytes, is above `limit`.
    """
    if claimed > limit:
        raise unusable(
            file,
            f"{claimed:,} bytes of data",
            f"at most {limit:,}",
            "check where the file comes from, or cut it to the samples that you need",
        )
