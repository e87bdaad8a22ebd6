"""Figures and pages are there whole or not at all, and a full disk is told by the file's name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.analysis import synthetic
from thalweg.analysis.figures import save_figures
from thalweg.analysis.report.pages import write_page
from thalweg.errors import DiskFull


@pytest.fixture
def limited() -> Iterator[Any]:
    """Set the most bytes of a file that this process may write."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda most: resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_figure_that_has_no_room_is_named_and_the_earlier_one_is_kept(
    tmp_path: Path, limited: Any
) -> None:
    data = synthetic.study(seeds=1)
    save_figures(data, tmp_path, figures=["training-loss"])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / ".writing-training-loss.png-1-1").write_bytes(b"half")
    limited(1000)
    with pytest.raises(DiskFull, match=f"{tmp_path / 'training-loss.png'}: .* needed, .*ulimit"):
        save_figures(data, tmp_path, figures=["training-loss"])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_so_is_a_page(tmp_path: Path, limited: Any) -> None:
    page = tmp_path / "report.html"
    write_page(page, "old")
    limited(10)
    with pytest.raises(DiskFull, match=f"{page}: 20 bytes needed"):
        write_page(page, "n" * 20)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
