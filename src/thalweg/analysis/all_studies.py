"""All studies at once: which there are on a problem, and one page on what they gave.

The page is self-contained, without scripts: the figures are inside. Each study's own page, with
interactive curves, is linked relative to it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from thalweg import __version__
from thalweg.analysis.report.pages import (
    embedded_figure,
    read,
    template,
    trusted,
    verdict_rows,
    write_page,
)
from thalweg.lab.config import builtin_studies, load_study
from thalweg.lab.config.smoke_run import WARNING
from thalweg.lab.config.studies import has_own_problem, is_of_the_paper
from thalweg.lab.preparing import read_spec
from thalweg.lab.study import reproduction_spec

if TYPE_CHECKING:
    from thalweg.lab.config import Spec
    from thalweg.lab.study import StudyResult

PAGES = {
    False: ("report.html", "Does SGD really happen in tiny subspaces?"),
    True: ("extensions.html", "The methods around the dominant subspace"),
}
"""File and title of the page on the paper's studies, and of that on its extensions."""

OUTCOMES = ("holds", "does not hold", "undecided")


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
        problem: its name; None for each study's default.
        data_dir: folder or file with the data, for the studies whose data are read from files.
        overrides: as for `load_spec`; studies with a problem of their own stay as they are, unless
            they are to be a smoke run.

    Raises:
        InvalidInput: an unknown problem, or a bad value.
    """
    specs: list[Spec] = []
    smoke = ["--smoke"] if {"smoke", "--smoke"}.intersection(overrides) else []
    for name in builtin_studies():
        if is_of_the_paper(name) == extensions:
            continue
        own = has_own_problem(name)
        asked = (name, None, smoke) if own else (name, problem, overrides)
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
    name, title = PAGES[extensions]
    path = Path(root) / name
    found = Counter(verdict.outcome for result in results for verdict in result.verdicts)
    html = template("all_studies.html.jinja").render(
        title=title,
        version=__version__,
        style=trusted(read("page.css") + read("all_studies.css")),
        counts={outcome: found[outcome] for outcome in OUTCOMES},
        studies=[_section(path.parent, result) for result in results],
    )
    write_page(path, html)
    return path


def _section(root: Path, result: StudyResult) -> dict[str, Any]:
    spec = read_spec(result.study)
    report, made = result.report, result.conclusions.get("figures")
    saved = () if made is None else made.saved
    return {
        "anchor": result.study.name,
        "name": f"{spec.name} on {spec.problem.data.registered_name}",
        "description": spec.description,
        "warning": WARNING if spec.smoke else "",
        "report": report and quote(Path(os.path.relpath(report, root)).as_posix()),
        "verdicts": verdict_rows(result.verdicts, saved, result.study.name),
        "figures": [embedded_figure(figure, root, result.study.name) for figure in saved],
    }
