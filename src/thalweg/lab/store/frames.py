"""How do the metrics of runs come into one data frame: those of a study, or of many?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg.errors import IntegrityError, invalid
from thalweg.lab.store.folders import StudyFolder, find_studies, open_study

if TYPE_CHECKING:
    import pandas
    import pyarrow

SWEEP_FILE = "sweep.json"
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
        or its key path where that is the name of another column; of a sweep, one for each of its
        keys. A list is text, "[100, 100]"; a
        setting that a study does not have is NaN or None. The rows are those of one study after
        the other, with every metric that one of them has.

    Raises:
        InvalidInput: there is no such study, or the list is empty.
        IntegrityError: a file of metrics is damaged, or a run that measured has no `run.toml`.

    Example:
        >>> load("runs").groupby(["lr", "batch_size"]).loss.min()  # doctest: +SKIP
    """
    if isinstance(study, StudyFolder):
        return _metrics(study).to_pandas()
    if isinstance(study, Path | str):
        several = _several(study, root)
        if several is None:
            return _metrics(open_study(study, root)).to_pandas()
        return _side_by_side(*several)
    if not study:
        raise invalid("study", study, "a study, or a list of one or more")
    return _side_by_side([open_study(one, root) for one in study])


def _several(
    which: Path | str, root: Path | str
) -> tuple[list[StudyFolder], list[Mapping[str, Any]] | None] | None:
    """The studies in a folder, or in a sweep: those that have been begun; None for a study.

    With the settings of each point of a sweep; None in their place for any other folder.

    Raises:
        IntegrityError: a damaged sweep.
    """
    from thalweg.lab.sweeps.folder import read_sweep

    places = [Path(which), Path(root) / which]
    if any(StudyFolder(place).exists for place in places):
        return None
    for place in places:
        if (place / SWEEP_FILE).is_file():
            begun = [point for point in read_sweep(place).points if point.study.exists]
            return [open_study(p.study.path) for p in begun], [p.settings for p in begun]
        if any(place.glob("*/spec.toml")):
            return find_studies(place), None
    return None


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


def _side_by_side(
    studies: Sequence[StudyFolder], settings: Sequence[Mapping[str, Any]] | None = None
) -> pandas.DataFrame:
    """The rows of several studies, with their settings; None: what differs between them."""
    import pandas
    import pyarrow

    from thalweg.lab.differing_settings import differences_of, plain_value

    if settings is None:
        found = differences_of(studies)
        given: Sequence[Mapping[str, Any]] = found.settings
        paths = found.paths
    else:
        given, paths = settings, {key: key for own in settings for key in own}
    tables = [_metrics(study) for study in studies]
    frame = pyarrow.concat_tables(tables, promote_options="permissive").to_pandas()
    of_row = [number for number, table in enumerate(tables) for _ in range(len(table))]
    names = [study.name for study in studies]
    distinct = len(set(names)) == len(names)
    labels = names if distinct else [str(study.path) for study in studies]
    taken = {"study", *frame.columns}
    columns = {"study": pandas.Series(labels, dtype="str").take(of_row)}
    for name, path in paths.items():
        values = [plain_value(own[name]) if name in own else None for own in given]
        columns[path if name in taken else name] = pandas.Series(values).take(of_row)
    own = pandas.DataFrame({name: column.to_numpy() for name, column in columns.items()})
    return pandas.concat([own, frame], axis=1)
