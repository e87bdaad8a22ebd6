"""What did the user give as `data_dir`: is it there, and which of its files is meant?"""

from __future__ import annotations

from pathlib import Path

from thalweg.errors import InvalidInput
from thalweg.problems.data.readers.damage import unusable


def existing(data_dir: str, title: str) -> Path:
    """The path that the user gave.

    Raises:
        InvalidInput: there is nothing there, or it cannot be read.
    """
    try:
        place = Path(data_dir).expanduser()
        found = place.exists()
    except (OSError, RuntimeError) as error:  # no permission, a name too long, no such user
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidInput(f"data_dir: {data_dir[:200]!r} cannot be read ({reason})") from error
    if not found:
        raise InvalidInput(
            f"data_dir: {data_dir!r} does not exist; give the folder or file of {title}"
        )
    return place


def only_match(folder: Path, patterns: tuple[str, ...]) -> Path | None:
    """The one file of `folder` whose name fits a pattern; None when there is none.

    Raises:
        InvalidInput: more than one fits.
    """
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise unusable(folder, names, "one of them", "give the file itself as data_dir")
    return found[0] if found else None
