"""The live plot of a notebook: drawn in one place, as reports come."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from thalweg.errors import MissingExtra
from thalweg.measure.sinks import Sinks

ROW = {"loss": 1.0, "sharpness": 2.0, "stability_threshold": 20.0, "alignment_update": 0.5}
PNG = b"\x89PNG"


class Shown:
    """IPython's display, as far as it is used: what was shown in each place."""

    def __init__(self) -> None:
        self.places: list[list[bytes]] = []

    def display(self, image: Any, *, display_id: bool) -> Shown:
        assert display_id
        self.places.append([image.data])
        return self

    def update(self, image: Any) -> None:
        self.places[-1].append(image.data)


class Image:
    def __init__(self, data: bytes, format: str) -> None:
        self.data, self.format = data, format


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    found, package, module = Shown(), ModuleType("IPython"), ModuleType("IPython.display")
    vars(package).update(version_info=(99, 0))  # matplotlib asks for it
    vars(module).update(display=found.display, Image=Image)
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr("thalweg.integrations.notebook.require_extra", lambda *names: None)
    return found


def test_it_is_drawn_in_one_place_and_whole_in_the_end(shown: Shown) -> None:
    rows = Sinks(["notebook"])
    for step in range(4):
        rows.log({"step": step, **ROW}, step)
    assert len(shown.places) == 1
    assert len(shown.places[0]) == 1  # the others came within the two seconds
    rows.close()
    first, last = shown.places[0]
    assert first.startswith(PNG)
    assert last.startswith(PNG)
    assert first != last


def test_nothing_is_drawn_twice(shown: Shown) -> None:
    from thalweg.integrations.notebook import Notebook

    sink = Notebook(seconds=0.0)
    for step in range(3):
        sink.log(ROW, step)
    sink.close()
    assert [len(place) for place in shown.places] == [3]


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from thalweg.integrations.notebook import Notebook

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"thalweg\[notebook\]"):
        Notebook()


@pytest.mark.slow
def test_ipython_shows_it() -> None:
    pytest.importorskip("IPython", reason="pip install 'thalweg[notebook]'")
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    from thalweg.integrations.notebook import Notebook

    InteractiveShell.instance()
    with capture_output() as captured:
        sink = Notebook(seconds=0.0)
        sink.log(ROW, 0)
        sink.log(ROW, 1)
        sink.close()
    assert [set(output.data) for output in captured.outputs] == [{"image/png", "text/plain"}] * 2
