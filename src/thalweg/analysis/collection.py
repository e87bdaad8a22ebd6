"""All studies at once: which there are on a problem, and one page on what they gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg.lab.config import builtin_studies, load_study
from thalweg.lab.config.studies import has_own_problem, is_of_the_paper
from thalweg.lab.study import reproduction_spec

if TYPE_CHECKING:
    from thalweg.lab.config import Spec
    from thalweg.lab.study import StudyResult

PAGES = {
    False: ("report.html", "Does SGD really happen in tiny subspaces?"),
    True: ("extensions.html", "The methods around the dominant subspace"),
}
"""File and title of the page on the paper's studies, and of that on its extensions."""


def reproductions(
    problem: str | None = None,
    *,
    data_dir: str | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    extensions: bool = False,
) -> list[Spec]:
    """The specs of all studies on a problem, those that bring their own among them.

    Args:
        extensions: those on the methods around the paper instead of the paper's own.
        problem: its name; None for digits.
        data_dir: folder or file with the data, for the studies whose data are read from files.
        overrides: as for `load_spec`; studies with a problem of their own stay as they are.

    Raises:
        InvalidInput: an unknown problem, or a bad value.
    """
    specs: list[Spec] = []
    for name in builtin_studies():
        if is_of_the_paper(name) == extensions:
            continue
        own = has_own_problem(name)
        asked = (name, None, ()) if own else (name, problem, overrides)
        spec = load_study(*asked)
        if data_dir is not None and hasattr(spec.problem.data, "data_dir"):
            spec = reproduction_spec(asked[0], asked[1], data_dir=data_dir, overrides=asked[2])
        specs.append(spec)
    return specs


def conclude_all(
    results: Sequence[StudyResult], root: Path | str, *, extensions: bool = False
) -> Path:
    """Write one page, in the folder of all studies, on the verdicts and figures of each.

    Returns:
        Its path: `report.html`, or `extensions.html` for those.
    """
    from thalweg.analysis.report.collection import write_collection

    name, title = PAGES[extensions]
    return write_collection(Path(root) / name, results, title)
