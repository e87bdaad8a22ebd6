"""Where is a sweep? In a folder beside its studies: `sweep.json`, its report and its figures.

    runs/main-digits-lr-0.1-batch_size-10-0123abcd/   a study, one for each point
    runs/sweep-main-digits-4567cdef/                  sweep.json  points.csv  report.html  figures/

The studies are ordinary ones, which other sweeps share.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from thalweg.errors import IntegrityError, invalid, unknown_name
from thalweg.lab.config import Spec, spec_hash
from thalweg.lab.store import StudyFolder, durable
from thalweg.lab.store.belonging import FORMAT, check_format
from thalweg.lab.store.frames import SWEEP_FILE
from thalweg.lab.sweeps.points import Point, Sweep
from thalweg.lab.tables import parse_toml


def sweep_name(base: Spec, keys: Sequence[str]) -> str:
    """The name of a sweep's folder, where the user gives none: of the base spec and the keys.

    More values of a key, or more seeds, extend the same sweep.
    """
    text = json.dumps([spec_hash(base), sorted(keys)])
    digits = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"sweep-{base.name}-{base.problem.data.registered_name}-{digits}"


def write_sweep(sweep: Sweep) -> None:
    """Replace the sweep's `sweep.json`, making its folder where it is not there."""
    durable.make_folder(sweep.path)
    points = [{"settings": dict(p.settings), "study": p.study.name} for p in sweep.points]
    content = {"format": FORMAT, "name": sweep.name, "seeds": sweep.seeds, "points": points}
    durable.write_file(sweep.path / SWEEP_FILE, durable.to_json(content))


def read_sweep(path: Path) -> Sweep:
    """The sweep in a folder.

    Raises:
        IntegrityError: its file is not what was written.
    """
    file = path / SWEEP_FILE
    content = durable.read_json(file)
    try:
        check_format(file, content["format"])
        points = tuple(_point(path.parent, point) for point in content["points"])
        seeds = tuple(int(seed) for seed in content["seeds"])
        return Sweep(path, str(content["name"]), seeds, points)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(f"{file}: damaged, not a list of points ({error})") from error


def is_sweep(name: Path | str, root: Path | str = "runs") -> bool:
    """Whether a name is that of a sweep, and not of a study: its folder, name, or beginning."""
    places = (Path(name), Path(root) / name)
    if any((path / SWEEP_FILE).is_file() for path in places):
        return True
    start = str(name)
    studies = any(file.parent.name.startswith(start) for file in Path(root).glob("*/spec.toml"))
    return not studies and any(path.name.startswith(start) for path in _sweeps_below(root))


def _sweeps_below(root: Path | str) -> list[Path]:
    return [file.parent for file in sorted(Path(root).glob(f"*/{SWEEP_FILE}"))]


def find_sweep(name: Path | str, root: Path | str = "runs") -> Sweep:
    """A sweep by its folder, its name below `root`, or the beginning of its name.

    Raises:
        InvalidInput: there is none, or the beginning fits several.
        IntegrityError: its file is damaged.
    """
    for path in (Path(name), Path(root) / name):
        if (path / SWEEP_FILE).is_file():
            # `.` does not say what is beside it.
            return read_sweep(path if path.name and ".." not in path.parts else path.resolve())
    known = _sweeps_below(root)
    fitting = [path for path in known if path.name.startswith(str(name))]
    if len(fitting) == 1:
        return read_sweep(fitting[0])
    names = [path.name for path in fitting or known]
    if fitting:
        raise invalid("sweep", str(name), f"one of {', '.join(names)}", "write more of its name")
    if not known:
        raise invalid("sweep", str(name), f"a sweep's folder; there is none in {root}")
    raise unknown_name("sweep", str(name), names)


def is_smoke(sweep: Sweep) -> bool:
    """Whether everything was made tiny, so that no verdict is to be believed."""
    file = next((p.study.spec_file for p in sweep.points if p.study.path.is_dir()), None)
    try:
        return file is not None and parse_toml(file.read_text("utf-8"), str(file))["smoke"] is True
    except (OSError, ValueError, LookupError):  # not there yet, or damaged: told elsewhere
        return False


def united(known: Sweep, asked: Sweep) -> Sweep:
    """The sweep with the points and seeds that it had before, and those that are new."""
    points = {point.study.name: point for point in (*known.points, *asked.points)}
    seeds = tuple(sorted({*known.seeds, *asked.seeds}))
    return Sweep(known.path, known.name, seeds, tuple(points.values()))


def _point(root: Path, point: Any) -> Point:
    study = durable.check_name("study", point["study"])
    return Point(dict(point["settings"]), StudyFolder(root / study))
