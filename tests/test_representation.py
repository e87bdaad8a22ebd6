"""Tables and curves of results, as text and in a notebook."""

from __future__ import annotations

from xml.etree.ElementTree import fromstring

import pytest
import torch

import thalweg
from thalweg.operators.symmetric import DenseOperator
from thalweg.representation import as_html, as_text, curve_as_svg
from thalweg.spectrum import spectral_density, top_eigenpairs

HOSTILE = "<script>alert('x')</script>&\""


def test_every_text_is_escaped() -> None:
    shown = as_html((HOSTILE, [HOSTILE, ""], [[HOSTILE, "1"]]))
    assert "<script" not in shown
    table = fromstring(shown)
    assert [cell.text for cell in table.iter("td")] == [HOSTILE, "1"]
    curve = fromstring(curve_as_svg([0.0, 1.0], [0.0, 2.0], HOSTILE))
    assert curve.attrib["aria-label"] == HOSTILE


def test_text_is_in_columns() -> None:
    lines = as_text(("title", ["", "value"], [["a", "1"], ["long name", "12345"]])).splitlines()
    assert len({len(line) for line in lines[1:]}) == 1
    assert lines[0] == "title"


def test_a_curve_stays_within_its_frame() -> None:
    curve = fromstring(curve_as_svg([-1.0, 0.0, 3.0], [0.0, 5.0, 1.0], "height"))
    line = curve.find("polyline")
    assert line is not None
    points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    across, up = zip(*points, strict=True)
    assert sorted(across) == list(across)
    assert 0 < min(across) < max(across) < float(curve.attrib["width"])
    assert 0 < min(up) < max(up) < float(curve.attrib["height"])
    assert min(up) == up[1]


def test_a_subspace_shows_its_eigenvalues() -> None:
    space = top_eigenpairs(DenseOperator(torch.diag(torch.tensor([5.0, 3.0, 1.0, 0.5]))), 2)
    cells = [cell.text for cell in fromstring(space._repr_html_()).iter("td")]
    assert [cell for cell in cells if cell and cell.startswith("lambda")] == [
        "lambda_1",
        "lambda_2",
    ]
    assert "5" in cells
    assert "3" in cells


@pytest.mark.parametrize("matrix", [torch.diag(torch.arange(20.0)), torch.eye(4)])
def test_a_density_shows_its_curve_where_there_is_one(matrix: torch.Tensor) -> None:
    density = spectral_density(DenseOperator(matrix), probes=3)
    shown = density._repr_html_()
    page = fromstring(f"<body>{shown}</body>")
    assert (page.find("svg") is not None) == (len(matrix) == 20)
    assert f"{len(matrix)}" in [cell.text for cell in page.iter("td")]


def test_a_watcher_shows_its_last_report_and_gives_a_frame() -> None:
    torch.manual_seed(0)
    model, loss = torch.nn.Linear(3, 1), torch.nn.MSELoss()
    data = (torch.randn(20, 3), torch.randn(20, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with thalweg.watch(model, loss, data, optimizer, k=1, every=2, quiet=True) as watcher:
        assert watcher.frame().empty
        assert "<table>" in watcher._repr_html_()
        for _ in range(5):
            optimizer.zero_grad()
            loss(model(data[0]), data[1]).backward()
            optimizer.step()
    frame = watcher.frame()
    assert frame.index.tolist() == [row["step"] for row in watcher.history]
    assert frame.sharpness.tolist() == [row["sharpness"] for row in watcher.history]
    cells = [cell.text for cell in fromstring(watcher._repr_html_()).iter("td")]
    assert f"{watcher.history[-1]['sharpness']:.5g}" in cells
