"""All studies at once: which there are on a problem, and one page on what they gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg.lab.spec import builtin_studies, load_study
from thalweg.lab.spec.studies import has_own_problem
from thalweg.lab.study import reproduction_spec

if TYPE_CHECKING:
    from thalweg.lab.spec import Spec
    from thalweg.lab.study import StudyResult


def reproductions(
    problem: str | None = None,
    *,
    data_dir: str | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
) -> list[Spec]:
    """The specs of all studies on a problem, those that bring their own among them.

    Args:
        problem: its name; None for digits.
        data_dir: folder or file with the data.
        overrides: as for `load_spec`; of a study with its own problem, only seeds are changed.

    Raises:
        InvalidInput: an unknown problem, or a bad value.
    """
    specs = []
    for name in builtin_studies():
        if has_own_problem(name):
            specs.append(load_study(name))
        else:
            found = reproduction_spec(name, problem, data_dir=data_dir, overrides=overrides)
            specs.append(found)
    return specs


def conclude_all(results: Sequence[StudyResult], root: Path | str) -> Path:
    """Write `report.html` in the folder of all studies: verdicts and figures of each.

    Returns:
        Its path.
    """
    from thalweg.lab.report.collection import write_collection

    return write_collection(Path(root), results)
