"""How do the metrics of runs come into one data frame: those of a study, or of many?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from thalweg.errors import IntegrityError, InvalidInput, invalid
from thalweg.lab.store.durable import is_folder_name
from thalweg.lab.store.folders import StudyFolder, find_studies, open_study
from thalweg.lab.tables import parse_toml
from thalweg.limits import read_bytes

if TYPE_CHECKING:
    import pandas
    import pyarrow

SWEEP = "sweep.toml"
"""What the folder of a sweep holds: its points, each with the name of its study's folder."""
Which = StudyFolder | Path | str


def load(study: Which | Sequence[Which], root: Path | str = "runs") -> pandas.DataFrame:
    """Read the metrics of all runs of a study, or of many, into one data frame.

    Also while runs continue.

    Args:
        study: a study's folder, its name below `root`, or the beginning of its name. For many
            studies: a list of these; a folder that holds studies, such as "runs"; the folder of a
            sweep.
        root: where studies are.

    Returns:
        One row a measured step, ordered by seed, branch (trunk first) and step; `seed` (int) and
        `branch` (text) stand before the metric columns. What was not measured is NaN or None.

        Of many studies, these before them: `study`, the name of its folder, then a column for each
        setting that differs between the studies, under its short name (`lr`, `batch_size`, `k`),
        or its key path where that is the name of another column. A list is text, "[100, 100]"; a
        setting that a study does not have is NaN or None. The rows are those of one study after
        the other, with every metric that one of them has.

    Raises:
        InvalidInput: there is no such study, or the list is empty.
        IntegrityError: a file of metrics is damaged, or a run that measured has no `run.toml`.

    Example:
        >>> load("runs").groupby(["lr", "batch_size"]).loss.min()  # doctest: +SKIP
    """
    studies = studies_in(study, root)
    if studies is None:
        assert isinstance(study, StudyFolder | Path | str)
        return _metrics(open_study(study, root)).to_pandas()
    return _side_by_side(studies)


def studies_in(
    which: Which | Sequence[Which], root: Path | str = "runs"
) -> list[StudyFolder] | None:
    """The studies that a list, a folder of studies or a sweep's folder names; None for a study.

    Of a sweep that goes on, those that have been begun.

    Raises:
        InvalidInput: an empty list; one of the listed studies does not exist; a damaged sweep.
    """
    if isinstance(which, StudyFolder):
        return None
    if not isinstance(which, Path | str):
        if not which:
            raise invalid("study", which, "a study, or a list of one or more")
        return [open_study(one, root) for one in which]
    places = [Path(which), Path(root) / which]
    if any((place / "spec.toml").is_file() for place in places):
        return None
    for place in places:
        if (place / SWEEP).is_file():
            return studies_of_sweep(place)
        if any(place.glob("*/spec.toml")):
            return find_studies(place)
    return None


def studies_of_sweep(folder: Path) -> list[StudyFolder]:
    """The studies of a sweep that have been begun, in the order of its points.

    They lie beside the sweep's own folder.

    Raises:
        InvalidInput: `sweep.toml` names no points.
        IntegrityError: it is not in UTF-8, or too large.
    """
    file = folder / SWEEP
    try:
        text = read_bytes(file, "spec_bytes", error=IntegrityError).decode("utf-8")
    except UnicodeDecodeError as error:
        raise IntegrityError(f"{file}: damaged, byte {error.start} is not UTF-8") from None
    points = parse_toml(text, str(file)).get("points", [])
    names = [point.get("study") for point in points if isinstance(point, dict)]
    found = [
        folder.parent / name for name in names if isinstance(name, str) and is_folder_name(name)
    ]
    if len(found) < len(points):
        raise InvalidInput(f"{file}: got a point without a study, allowed: the name of its folder")
    return [open_study(path) for path in found if (path / "spec.toml").is_file()]


def _metrics(study: StudyFolder) -> pyarrow.Table:
    """The rows of all runs of one study."""
    import pyarrow

    for file in study.missing_run_tables():
        raise IntegrityError(
            f"{file}: is missing, and rows were measured beside it; restore it from a copy, or:"
            f" thalweg check {study.path} --repair"
        )
    tables = []
    for run in study.runs():
        table = run.read_metrics()
        count = len(table)
        seeds = pyarrow.array([run.seed] * count, pyarrow.int64())
        branches = pyarrow.array([run.branch] * count, pyarrow.string())
        tables.append(
            table.add_column(0, "seed", seeds).add_column(1, "branch", branches),
        )
    if not tables:
        empty = {"seed": pyarrow.int64(), "branch": pyarrow.string(), "step": pyarrow.int64()}
        return pyarrow.schema(list(empty.items())).empty_table()
    return pyarrow.concat_tables(tables, promote_options="default")


def _side_by_side(studies: Sequence[StudyFolder]) -> pandas.DataFrame:
    """The rows of several studies, with what differs between them."""
    import pandas
    import pyarrow

    from thalweg.lab.differing_settings import differences_of, plain_value

    found = differences_of(studies)
    tables = [_metrics(study) for study in studies]
    frame = pyarrow.concat_tables(tables, promote_options="permissive").to_pandas()
    of_row = [number for number, table in enumerate(tables) for _ in range(len(table))]
    names = [study.name for study in studies]
    distinct = len(set(names)) == len(names)
    labels = names if distinct else [str(study.path) for study in studies]
    taken = {"study", *frame.columns}
    columns = {"study": pandas.Series(labels, dtype="str").take(of_row)}
    for name, path in found.paths.items():
        values = [plain_value(own[name]) if name in own else None for own in found.settings]
        columns[path if name in taken else name] = pandas.Series(values).take(of_row)
    own = pandas.DataFrame({name: column.to_numpy() for name, column in columns.items()})
    return pandas.concat([own, frame], axis=1)
