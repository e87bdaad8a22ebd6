"""The folder of a sweep: written, read, found, extended, and damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from thalweg.errors import IntegrityError, InvalidInput
from thalweg.lab.store import StudyFolder
from thalweg.lab.sweeps.folder import find_sweep, is_sweep, read_sweep, united, write_sweep
from thalweg.lab.sweeps.points import Point, Sweep


def sweep(root: Path, *rates: float, seeds: tuple[int, ...] = (0,)) -> Sweep:
    points = [Point({"lr": rate}, StudyFolder(root / f"study-lr-{rate}")) for rate in rates]
    return Sweep(root / "sweep-rates", "rates", seeds, tuple(points))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = sweep(tmp_path, 0.1, 0.2, seeds=(0, 3))
    write_sweep(written)
    assert read_sweep(written.path) == written
    assert find_sweep("sweep-r", tmp_path) == written
    assert is_sweep("sweep-rates", tmp_path)
    assert is_sweep(written.path)
    assert not is_sweep("study-lr-0.1", tmp_path)


def test_a_sweep_is_found_from_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path.resolve()
    written = sweep(root, 0.1, 0.2)
    write_sweep(written)
    monkeypatch.chdir(written.path)
    assert find_sweep(".") == written
    (written.path / "figures").mkdir()
    monkeypatch.chdir(written.path / "figures")
    assert find_sweep("..") == written


def test_points_and_seeds_are_added(tmp_path: Path) -> None:
    known = sweep(tmp_path, 0.1, 0.2, seeds=(0, 1))
    both = united(known, sweep(tmp_path, 0.2, 0.3, seeds=(2,)))
    assert [point.settings["lr"] for point in both.points] == [0.1, 0.2, 0.3]
    assert both.seeds == (0, 1, 2)


def test_values_are_in_order() -> None:
    given = [{"b": "all", "lr": 0.1}, {"b": 50, "lr": 0.3}, {"b": 7, "lr": 0.2}]
    points = [Point(one, StudyFolder(Path(str(number)))) for number, one in enumerate(given)]
    found = Sweep(Path("s"), "s", (0,), tuple(points))
    assert found.keys == ("b", "lr")
    assert found.values("b") == (7, 50, "all")
    assert found.values("lr") == (0.1, 0.2, 0.3)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        {"format": 1, "name": "s", "seeds": [0], "points": [{"study": "../out", "settings": {}}]},
        {"format": 1, "name": "s", "seeds": [0], "points": [{"study": "", "settings": {}}]},
        {"format": 1, "name": "s", "seeds": [0], "points": [{"settings": {}}]},
        {"format": 1, "name": "s", "seeds": [0], "points": [{"study": "a", "settings": 1}]},
        {"format": 1, "name": "s", "seeds": 3, "points": []},
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, content: Any) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"sweep\.json"):
        read_sweep(tmp_path)


def test_there_is_no_such_sweep(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="there is none"):
        find_sweep("rates", tmp_path)
    write_sweep(sweep(tmp_path, 0.1))
    with pytest.raises(InvalidInput, match="sweep-rates"):
        find_sweep("sweeps", tmp_path)
