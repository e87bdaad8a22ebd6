"""The pictures, the table and the page of a sweep, at any time: also while its runs continue."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from thalweg import registry
from thalweg.analysis.claims.judgement import DEFAULT_ROLES
from thalweg.analysis.figures.figure import NotDrawableError, SavedFigure
from thalweg.analysis.quantities import quantities
from thalweg.analysis.regimes.boundary import judge_plane
from thalweg.analysis.regimes.curves_along import draw_by_branch, draw_by_setting
from thalweg.analysis.regimes.page import write_sweep_page
from thalweg.analysis.regimes.phase_diagram import Picture, draw_claim, draw_statistic
from thalweg.analysis.regimes.plane import Plane, plane_of
from thalweg.analysis.regimes.table import STATISTICS, SweepTable, read_table
from thalweg.errors import ThalwegError, unknown_name
from thalweg.lab.config.smoke_run import WARNING
from thalweg.lab.preparing import read_spec
from thalweg.lab.store.durable import make_folder, write_file
from thalweg.lab.store.folders import TRUNK
from thalweg.lab.study import roles_of
from thalweg.lab.sweeps.folder import is_smoke
from thalweg.lab.sweeps.points import Sweep

_OF_CELLS = "White: not run, or not done."
_OF_SEEDS = (
    "Of the runs that are done; from three seeds on the band is the 95 % t-interval of their mean,"
    " with two their range. Cross above: a seed diverged."
)


@dataclass(frozen=True)
class Pictures:
    """The figures of a sweep.

    Attributes:
        of_statistic: phase diagram and curves of the statistic.
        of_claims: the phase diagram of each claim, by label.
        skipped: why others are not there, by name.
    """

    of_statistic: list[Picture]
    of_claims: dict[str, Picture]
    skipped: dict[str, str]


@registry.sweep_conclusions.register("report")
def conclude_sweep(
    sweep: Sweep,
    *,
    axes: Sequence[str] | None = None,
    statistic: str | None = None,
    branch: str | None = None,
) -> Path:
    """Write `report.html`, `points.csv`, `verdicts.csv` and the figures into the sweep's folder.

    Args:
        axes: the keys of the horizontal and the vertical axis, or of the horizontal one alone;
            None: the two settings with the most values.
        statistic: the quantity that is drawn, one of `STATISTICS`; None: the last training loss.
        branch: whose quantity it is; None: the plain branch.

    Returns:
        The page's path.

    Raises:
        InvalidInput: one of these is no name of the sweep; the message has the nearest one.
        DiskFull: there is no room for a file.
    """
    plane = plane_of(sweep, axes)
    if statistic is not None and statistic not in STATISTICS:
        raise unknown_name("statistic", statistic, STATISTICS)
    table = read_table(sweep)
    branch = _branch(table, branch)
    make_folder(sweep.path / "figures")
    write_file(sweep.path / "points.csv", table.runs.to_csv(index=False), flush=False)
    write_file(sweep.path / "verdicts.csv", table.verdicts.to_csv(index=False), flush=False)
    pictures = draw_all(table, plane, statistic or "loss", branch)
    return write_sweep_page(
        table,
        pictures.of_statistic,
        [
            (judge_plane(table, label, branch), pictures.of_claims.get(label))
            for label in table.labels
        ],
        pictures.skipped,
        statistic=statistic or "loss",
        branch=branch,
        warning=WARNING if is_smoke(sweep) else "",
    )


def draw_all(table: SweepTable, plane: Plane, statistic: str, branch: str) -> Pictures:
    """Draw the phase diagrams and curves of a sweep into its folder `figures`."""
    quantity = quantities[statistic]
    of_branch = f"{quantity.label} of {branch}" if branch else quantity.label
    found = Pictures([], {}, {})

    def files(name: str, title: str, caption: str) -> SavedFigure:
        return SavedFigure.inside(table.sweep.path / "figures", name, title, caption)

    def attempt(name: str, draw: Callable[[], Picture]) -> Picture | None:
        try:
            return draw()
        except NotDrawableError as error:
            found.skipped[name] = str(error)
            return None

    in_plane = files(
        f"phase-{statistic}",
        f"Last {of_branch}",
        f"{'Geometric mean' if quantity.logarithmic else 'Mean'} over the seeds whose run is done."
        f" Hatched: a seed diverged (grey: all did). {_OF_CELLS}",
    )
    against = plane.horizontal.key if plane.horizontal else "no setting"
    by_setting = files(f"curves-{statistic}", f"Last {of_branch} against {against}", _OF_SEEDS)
    by_branch = files(
        f"branches-{statistic}",
        f"Last {quantity.label} of each branch against {against}",
        _OF_SEEDS,
    )
    attempts: dict[str, Callable[[], Picture]] = {}
    if plane.vertical is not None:
        attempts[in_plane.name] = lambda: draw_statistic(table, plane, statistic, branch, in_plane)
        attempts[by_setting.name] = lambda: Picture(
            draw_by_setting(table, plane, statistic, branch, by_setting)
        )
    if plane.vertical is None or len({*table.branches} - {TRUNK}) > 1:
        attempts[by_branch.name] = lambda: Picture(
            draw_by_branch(table, plane, statistic, by_branch)
        )
    drawn = [attempt(name, draw) for name, draw in attempts.items()]
    found.of_statistic.extend(picture for picture in drawn if picture is not None)
    for label, name in _file_names(table.labels).items():
        own = files(
            name,
            f"Where {label} holds",
            f"Outcome at each point. Hatched: undecided (grey: a run diverged). {_OF_CELLS}",
        )
        picture = attempt(name, lambda: draw_claim(table, plane, label, own))  # noqa: B023
        if picture is not None:
            found.of_claims[label] = picture
    return found


def _branch(table: SweepTable, given: str | None) -> str:
    """The branch to look at: the one given, the plain one, or the first there is."""
    branches = table.branches
    if given is not None:
        # Before any point has begun, nothing is known of its branches.
        if branches and given not in branches:
            raise unknown_name("branch", given, branches)
        return given
    plain = [_roles(table).get("plain"), DEFAULT_ROLES["plain"]]
    own = [name for name in branches if name != TRUNK]
    return next((name for name in (*plain, *own, *branches) if name in branches), "")


def _roles(table: SweepTable) -> dict[str, str]:
    """The roles of the branches, as the first point says whose spec can be read."""
    for point in table.sweep.points:
        try:
            return roles_of(read_spec(point.study))
        except (ThalwegError, OSError):
            continue
    return {}


def _file_names(labels: Sequence[str]) -> dict[str, str]:
    """A file name for each claim label, each another one."""
    names: dict[str, str] = {}
    for label in labels:
        name = "claim-" + re.sub(r"[^A-Za-z0-9]+", "-", label).strip("-")[:80]
        taken = sum(other == name or other.startswith(f"{name}~") for other in names.values())
        names[label] = f"{name}~{taken + 1}" if taken else name
    return names
