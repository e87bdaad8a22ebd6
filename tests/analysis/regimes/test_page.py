"""The page of a sweep: one file that loads nothing, escapes everything, sorts and filters."""

from __future__ import annotations

import base64
import html as html_of
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.analysis.browser import Browser
from tests.analysis.regimes.sweeps import Settings, fill, grid, sweep_of
from thalweg.analysis.regimes import conclude_sweep
from thalweg.lab.sweeps.points import Sweep

HOSTILE = '</script><script>alert("x")</script><img src=x onerror=alert(1)> & {{ 7 * 7 }} $a$'
PLANE = grid(lr=[0.003, 0.01, 0.03, 0.1, 0.3], batch_size=[10, 50, 250, "all"])


def outcome(settings: Settings) -> str:
    return "holds" if settings["lr"] <= 0.03 else "does not hold"


def made(folder: Path) -> Sweep:
    sweep = fill(sweep_of(folder, PLANE), outcome, branches=("trunk", "sgd", "bulk-sgd"))
    (sweep.points[0].study.path / "report.html").write_text("a report")
    return sweep


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conclude_sweep(made(tmp_path_factory.mktemp("sweep")))


@pytest.fixture(scope="module")
def html(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def test_the_page_is_one_file_that_loads_nothing(html: str) -> None:
    assert not re.findall(r"<(?:link|iframe|script[^>]*src)", html)
    assert set(re.findall(r'<img src="([^,"]*)', html)) == {"data:image/png;base64"}
    assert not re.findall(r"https?://(?!www.w3.org)", html)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None
    assert policy[1].count("sha256-") == 1
    assert "default-src &#39;none&#39;" in policy[1]
    assert "script-src &#39;unsafe" not in policy[1]


def test_the_head_counts_points_seeds_and_runs(html: str) -> None:
    assert "<b>20</b> points" in html
    assert "<b>3</b> seeds each" in html
    assert "<b>180</b> of <b>180</b> runs done" in html


def test_what_holds_where_is_said_with_its_picture(html: str) -> None:
    assert "Holds for lr ≤ 0.03 (3 of 5 values), not above." in html
    assert "Holds at 12 of 20 points, does not hold at 8." in html
    assert 'data-figure="claim-bulk-suffices"' in html


def test_the_data_of_each_picture_is_inside(html: str, page: Path) -> None:
    found = re.findall(r'download="([^"]*)" href="data:text/csv;base64,([^"]*)"', html)
    assert len(found) == 4
    for name, encoded in found:
        assert base64.b64decode(encoded) == (page.parent / "figures" / name).read_bytes()


def test_each_point_links_to_its_report_or_else_its_folder(html: str) -> None:
    targets = re.findall(r'<tr data-href="([^"]*)"', html)
    assert targets[:2] == ["./../runs/point-0/report.html", "./../runs/point-1"]
    assert len(targets) == 20


def test_what_people_wrote_is_escaped(quick_path: Path) -> None:
    settings = [{HOSTILE: HOSTILE, "lr": lr, "c": c} for lr in (0.1, 0.2) for c in (HOSTILE, "b")]
    sweep = replace(
        fill(sweep_of(quick_path, settings, (0,)), lambda _: "holds", claims=[HOSTILE]),
        name=HOSTILE,
    )
    run = sweep.points[0].study.run(0, "sgd")
    (run.path / "status.json").write_text(HOSTILE)
    html = conclude_sweep(sweep).read_text(encoding="utf-8")
    assert html.count("<script") == 2
    assert "<img src=x" not in html
    assert "&lt;/script&gt;" in html
    assert "49" not in re.findall(r"<title>(.*?)</title>", html)[0]
    assert html_of.unescape(re.findall(r"<title>(.*?)</title>", html)[0]) == HOSTILE


@pytest.mark.slow
def test_a_thousand_points_make_a_small_page_in_seconds(quick_path: Path) -> None:
    plane = grid(lr=[10 ** (-3 + 3 * n / 49) for n in range(50)], batch_size=list(range(1, 21)))
    claims = [f"claim-{n}" for n in range(6)]
    sweep = fill(sweep_of(quick_path, plane, (0,)), outcome, branches=("sgd",), claims=claims)
    begun = time.process_time()
    page = conclude_sweep(sweep)
    # Measured on one core: 13 s, half of it matplotlib's.
    assert time.process_time() - begun < 60
    assert page.stat().st_size < 3e6


def column(browser: Browser, number: int) -> list[str]:
    """The texts of one column of the rows that are shown."""
    return browser.evaluate(
        "[...document.querySelectorAll('#points-table tbody tr:not([hidden])')]"
        f".map((row) => row.cells[{number}].textContent)"
    )


def filter_by(browser: Browser, text: str) -> list[str]:
    """The first two settings of the rows that a filter leaves."""
    browser.evaluate(
        f"(() => {{ const f = document.getElementById('filter'); f.value = {text!r};"
        "f.dispatchEvent(new Event('input')); })()"
    )
    pairs = zip(column(browser, 0), column(browser, 1), strict=True)
    return [f"{lr} {batch}" for lr, batch in pairs]


@pytest.mark.slow
class TestInChromium:
    def test_nothing_is_complained_of_or_requested(self, browser: Browser, page: Path) -> None:
        browser.open(page)
        assert browser.complaints == []
        assert [r for r in browser.requests if not r.startswith(("file:", "data:"))] == []

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_a_phone_does_not_scroll_sideways(
        self, browser: Browser, page: Path, scheme: str
    ) -> None:
        browser.prefer(scheme)
        browser.resize(400, 800, mobile=True)
        browser.open(page)
        assert browser.evaluate("document.documentElement.scrollWidth") == 400

    def test_a_click_on_a_head_sorts_up_then_down_then_not(
        self, browser: Browser, page: Path
    ) -> None:
        browser.open(page)
        before = column(browser, 1)
        browser.click("#points-table thead th:nth-child(2) button")
        assert column(browser, 1) == ["10"] * 5 + ["50"] * 5 + ["250"] * 5 + ["all"] * 5
        browser.click("#points-table thead th:nth-child(2) button")
        assert column(browser, 1)[0] == "all"
        assert column(browser, 1)[-1] == "10"
        browser.click("#points-table thead th:nth-child(2) button")
        assert column(browser, 1) == before

    def test_the_filter_takes_words_and_comparisons(self, browser: Browser, page: Path) -> None:
        browser.open(page)
        assert len(filter_by(browser, "")) == 20
        assert filter_by(browser, "lr<=0.01 batch_size=all") == ["0.003 all", "0.01 all"]
        assert filter_by(browser, "batch_size>=250 lr=0.1") == ["0.1 250"]
        assert len(filter_by(browser, "bulk-suffices=holds")) == 12
        assert len(filter_by(browser, "NOT hold")) == 8
        assert filter_by(browser, "nowhere") == []
        assert browser.evaluate("document.getElementById('shown').value") == "0 of 20 points"

    def test_cells_of_table_and_pictures_lead_to_the_study(
        self, browser: Browser, page: Path
    ) -> None:
        browser.open(page)
        links = browser.evaluate(
            "[...document.querySelectorAll('.picture a, #points-table tbody a')]"
            ".map((a) => a.getAttribute('href'))"
        )
        # Two diagrams, and each cell of the table.
        cells = browser.evaluate("document.querySelectorAll('#points-table tbody tr > *').length")
        assert len(links) == 2 * 20 + cells
        title = browser.evaluate("document.querySelector('.picture a').title")
        assert title == "lr = 0.003, batch_size = 10: holds, 1.00 [0.900, 1.10]"

    def test_hostile_names_run_nothing(self, browser: Browser, quick_path: Path) -> None:
        settings = [{HOSTILE: HOSTILE, "lr": lr, "b": lr * 2} for lr in (0.1, 0.2)]
        sweep = fill(sweep_of(quick_path, settings, (0,)), lambda _: "holds", claims=[HOSTILE])
        browser.open(conclude_sweep(sweep))
        assert browser.complaints == []
        assert browser.evaluate("document.querySelectorAll('img[src=x]').length") == 0
