"""Which studies of the paper are there, and what is each on a problem?

A study's file says what is done. Data, model, loss, and what its phases leave open (optimizer,
learning rate, batch size, switch rule, deadline; "unset" leaves one out) are those of the problem's
own spec:

    load_study("noise", "mnist", ["--seeds", "0"])

A table `[on.mnist]` in it holds values by key path that are different on that problem, and
`default_problem` names the one that it is about where none is asked for. A study with a `[problem]`
of its own, such as the toy, has that one alone. "main" is the problem's own spec.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thalweg.errors import InvalidInput, unknown_name
from thalweg.lab.config.layering import laid_over
from thalweg.lab.config.loading import PROBLEM_SPECS, SPECS, parse_spec, read_toml
from thalweg.lab.config.overrides import apply_overrides
from thalweg.lab.config.spec import Spec

MAIN = "main"
STUDIES = SPECS / "studies"
DEFAULT_PROBLEM = "digits"
FIRST_EXTENSION = 10
"""Studies of an order from here on are on methods around the paper."""
OF_THE_MAIN_STUDY = ("description", "claims", "figures", "branches")
"""Keys of a problem's own spec that belong to the main study, not to the problem."""


def builtin_studies() -> dict[str, str]:
    """The names of the studies with their descriptions: the paper's in its order, then others."""
    found = [(path.stem, _read(path)) for path in STUDIES.glob("*.toml")]
    found.sort(key=lambda pair: (pair[1].get("order", 0), pair[0]))
    descriptions = {name: raw.get("description", "") for name, raw in found}
    return {MAIN: "SGD, Dom-SGD and Bulk-SGD from one checkpoint: the main finding", **descriptions}


def is_of_the_paper(study: str) -> bool:
    """Whether a study is on the paper itself, not on one of the methods around it."""
    return study == MAIN or _read(STUDIES / f"{study}.toml").get("order", 0) < FIRST_EXTENSION


def load_study(
    study: str,
    problem: str | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
) -> Spec:
    """The spec of a study on a problem, with values overridden.

    Args:
        study: its name.
        problem: its name; None for the study's default, or the problem that it itself has.
        overrides: as for `load_spec`.

    Raises:
        InvalidInput: an unknown study or problem, a problem that the study does not have, or a bad
            value.
    """
    if study not in builtin_studies():
        raise unknown_name("study", study, builtin_studies())
    if problem is not None and problem not in PROBLEM_SPECS:
        raise unknown_name("problem", problem, PROBLEM_SPECS)
    raw = _composed(study, problem)
    return parse_spec(raw, source=f"study {study}", overrides=overrides)


def has_own_problem(study: str) -> bool:
    """Whether a study brings its problem along."""
    return study != MAIN and "problem" in _read(STUDIES / f"{study}.toml")


def _composed(study: str, problem: str | None) -> dict[str, Any]:
    if study == MAIN:
        return _problem_spec(problem or DEFAULT_PROBLEM)
    raw = _read(STUDIES / f"{study}.toml")
    raw.pop("order", None)
    default: str = raw.pop("default_problem", DEFAULT_PROBLEM)
    special = raw.pop("on", {})
    if "problem" in raw:
        if problem is not None:
            raise InvalidInput(f"problem: got {problem!r}, allowed: none, {study} has its own")
        return {"name": study, **raw}
    problem = problem or default
    base = _problem_spec(problem)
    kept = {key: value for key, value in base.items() if key not in OF_THE_MAIN_STUDY}
    composed = laid_over(kept, {"phases": [{}], **raw})
    changed, _ = apply_overrides({**composed, "name": study}, special.get(problem, {}), Spec)
    return changed


def _problem_spec(problem: str) -> dict[str, Any]:
    return _read(SPECS / f"{PROBLEM_SPECS[problem]}.toml")


def _read(path: Path) -> dict[str, Any]:
    return read_toml(path, f"built-in spec {path.stem}")
