from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest

from tests.analysis import synthetic
from tests.analysis.browser import Browser
from tests.analysis.claims.branches import MAIN_NAMES
from tests.sampling import few
from thalweg import registry
from thalweg.analysis.claims import Verdict, judge_all
from thalweg.analysis.figures import SavedFigures, save_figures
from thalweg.analysis.report import study_page, write_report
from thalweg.analysis.report.pages import WIDTH, figure_of, interval_plot
from thalweg.analysis.report.panels import MOST_POINTS, page_data
from thalweg.errors import InvalidInput

SPEC = '[problem]\ndata = "digits"\nlearning_rate = 0.05\n'
NO_FIGURES = SavedFigures((), {})
ROLES = {"plain": "sgd", "dominant": "dom-sgd", "bulk": "bulk-sgd"}


@pytest.fixture(scope="module")
def study() -> pd.DataFrame:
    return synthetic.with_later_probes(synthetic.study())


@pytest.fixture(scope="module")
def verdicts(study: pd.DataFrame) -> list[Verdict]:
    return judge_all([registry.claims[name] for name in MAIN_NAMES], study)


@pytest.fixture(scope="module")
def page(
    study: pd.DataFrame, verdicts: list[Verdict], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("main-digits-0123abcd")
    figures = save_figures(study, folder / "figures", figures=[registry.figures["training-loss"]])
    return write_report(
        folder,
        study,
        verdicts,
        SPEC,
        {"thalweg": "0.1.0", "threads": 1, "packages": {"torch": "2.13.0"}},
        figures,
        "main on digits",
        command="thalweg reproduce --seeds 0 1 2",
    )


def without_plotly(html: str) -> str:
    """The page less its largest script, for quick searches."""
    scripts = re.findall(r"<script>(.*?)</script>", html, flags=re.DOTALL)
    return html.replace(max(scripts, key=len), "")


def embedded(html: str) -> dict[str, Any]:
    """The data that the page's script draws."""
    found = re.search(r'<script type="application/json" id="study-data">(.*?)</script>', html)
    assert found is not None
    return json.loads(found.group(1))


# The page as text.


def test_the_page_is_one_file_that_loads_nothing(page: Path) -> None:
    html = without_plotly(page.read_text(encoding="utf-8"))
    assert not re.findall(r"<(?:link|iframe|script[^>]*src)", html)
    assert all(source.startswith("data:") for source in re.findall(r'src="([^"]*)"', html))
    assert set(re.findall(r'href="([^"]*)"', html)) == {"#figure-training-loss"}
    assert "http://" not in html.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in html


def test_the_page_can_be_sent_alone(page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    picture = page.with_name("figures") / "training-loss.png"
    assert base64.b64encode(picture.read_bytes()).decode() in html
    assert "figures/training-loss.png, .pdf, .csv" in html
    assert len(html) < 3_000_000


def test_each_claim_leads_to_the_figure_that_shows_it(study: pd.DataFrame, tmp_path: Path) -> None:
    names = ["training-loss", "alignment", "eigenvalues", "distance", "test-accuracy"]
    figures = save_figures(study, tmp_path / "figures", figures=names).saved
    claims = [*MAIN_NAMES, "bulk-travels", "bulk-generalizes"]
    found = {name: figure_of(name, figures) for name in claims}
    assert {name: figure and figure.name for name, figure in found.items()} == {
        "gradient-aligns": "alignment",
        "dominant-stalls": "training-loss",
        "bulk-suffices": "training-loss",
        "spectrum-gap": "eigenvalues",
        "bulk-travels": "distance",
        "bulk-generalizes": "test-accuracy",
    }
    assert figure_of("noise-is-dominant", figures) is None
    assert figure_of("a claim of another plugin", figures) is None


def test_a_warning_stands_at_the_head(study: pd.DataFrame, page: Path, tmp_path: Path) -> None:
    assert 'class="warning"' not in page.read_text(encoding="utf-8")
    one_seed = study[study["seed"] == 0]
    page = write_report(tmp_path, one_seed, [], SPEC, {}, NO_FIGURES, "t", warning="a <smoke> run")
    html = without_plotly(page.read_text(encoding="utf-8"))
    assert html.index("This is a &lt;smoke&gt; run.") < html.index("Verdicts")


def test_plotly_is_the_published_file() -> None:
    folder = Path(study_page.__file__).with_name("plotly")
    said = (folder / "README.md").read_text(encoding="utf-8")
    script = (folder / "plotly-basic.min.js").read_bytes()
    assert hashlib.sha256(script).hexdigest() in said
    version = re.search(rb"plotly.js \(basic - minified\) v([0-9.]+)", script)
    assert version is not None
    assert f"plotly.js {version[1].decode()}" in said
    assert "MIT" in (folder / "LICENSE").read_text(encoding="utf-8")


def test_the_policy_allows_two_scripts_by_hash_and_no_load(page: Path) -> None:
    html = page.read_text(encoding="utf-8")
    found = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert found is not None
    policy = found.group(1).replace("&#39;", "'")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert policy.count("sha256-") == 2
    assert "script-src 'unsafe" not in policy
    assert "http" not in policy


def test_verdicts_come_first_with_word_symbol_and_interval(
    page: Path, verdicts: list[Verdict]
) -> None:
    html = without_plotly(page.read_text(encoding="utf-8"))
    assert html.index('id="verdicts"') < html.index('id="curves"') < html.index("Specification")
    assert html.count("✓ holds") == 4
    assert "[0.960, 0.960]" in html
    for verdict in verdicts:
        assert verdict.statement in html
        assert verdict.rule.text in html


def test_spec_environment_cost_and_command_are_there(page: Path) -> None:
    html = without_plotly(page.read_text(encoding="utf-8"))
    assert "learning_rate = 0.05" in html
    assert "packages.torch" in html
    assert "2.13.0" in html
    assert "What tracking cost" in html
    assert "thalweg reproduce --seeds 0 1 2" in html


def test_a_report_is_written_anew_and_leaves_no_other_file(
    study: pd.DataFrame, tmp_path: Path
) -> None:
    one_seed = study[study["seed"] == 0]
    for title in ("first", "second"):
        path = write_report(tmp_path, one_seed, [], SPEC, {}, NO_FIGURES, title)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    assert "<title>second</title>" in path.read_text(encoding="utf-8")


HOSTILE = "</script></title><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>"


def hostile_report(study: pd.DataFrame, verdicts: list[Verdict], folder: Path) -> Path:
    """A report in which every text that comes from outside tries to become part of the page."""
    broken = replace(
        verdicts[0],
        claim=HOSTILE,
        statement=HOSTILE,
        source=HOSTILE,
        statistic=HOSTILE,
        refuted_by=HOSTILE,
        note=HOSTILE,
        beside={HOSTILE: 1.0},
    )
    data = study.replace({"branch": {"dom-sgd": HOSTILE}})
    figures = SavedFigures((), {HOSTILE: HOSTILE})
    environment = {HOSTILE: HOSTILE, "nested": {HOSTILE: [HOSTILE]}}
    return write_report(
        folder, data, [broken], HOSTILE, environment, figures, HOSTILE, command=HOSTILE
    )


def test_hostile_texts_are_escaped(
    study: pd.DataFrame, verdicts: list[Verdict], tmp_path: Path
) -> None:
    html = without_plotly(hostile_report(study, verdicts, tmp_path).read_text(encoding="utf-8"))
    assert "<script>window.hacked" not in html
    assert "<img" not in html
    assert html.count("</script>") == 3
    assert HOSTILE in embedded(html)["branches"]


# The data behind the curves.


def test_embedded_numbers_are_those_of_the_study(study: pd.DataFrame) -> None:
    drawn = page_data(study, ROLES)
    assert [panel["name"] for panel in drawn["panels"]] == list(registry.panels)
    assert drawn["branchPoint"] == 500
    loss = drawn["panels"][0]["quantities"][0]["lines"]
    assert [line["style"] for line in loss] == ["trunk", "sgd", "dom-sgd", "bulk-sgd"]
    last = study[(study["branch"] == "sgd") & (study["step"] == 1100)]["loss"]
    assert loss[1]["high"][-1] == pytest.approx(last.max(), rel=1e-4)
    assert [loss[1]["seeds"][seed][-1] for seed in "012"] == pytest.approx(last, rel=1e-4)


def test_unmeasured_quantities_and_empty_panels_are_left_out(study: pd.DataFrame) -> None:
    reduced = study.drop(columns=["test_loss", "solved_eigenvalues", "eigenvalues"])
    drawn = page_data(reduced.assign(test_accuracy=np.nan), ROLES)
    names = [panel["name"] for panel in drawn["panels"]]
    assert "eigenvalues" not in names
    assert "test-accuracy" not in names
    assert [quantity["label"] for quantity in drawn["panels"][0]["quantities"]] == ["training"]


def test_a_panel_whose_columns_no_probe_measured_is_left_out(study: pd.DataFrame) -> None:
    drawn = page_data(synthetic.study(1), ROLES)
    names = [panel["name"] for panel in drawn["panels"]]
    assert set(registry.panels) - set(names) == {
        "critical-learning-rates",
        "curvature-along",
        "curvature-shares",
        "noise",
    }
    sharpness = drawn["panels"][names.index("sharpness")]
    assert [quantity["label"] for quantity in sharpness["quantities"]] == ["lr · λ₁", "λ₁"]


def test_lists_of_shares_are_a_line_an_entry_along_the_unsplit_run(study: pd.DataFrame) -> None:
    shares = [0.1, 0.2, 0.3, 0.4, 0.5]
    drawn = page_data(study.assign(gradient_shares=[shares] * len(study)), ROLES)
    (panel,) = (panel for panel in drawn["panels"] if panel["name"] == "curvature-shares")
    quantity = panel["quantities"][0]
    assert quantity["label"] == "full gradient"
    of_trunk, of_plain = quantity["lines"][::2], quantity["lines"][1::2]
    for lines in (of_trunk, of_plain):
        assert [line["mean"][0] for line in lines] == shares
        assert len({line["name"] for line in lines}) == 5
        assert {line["style"] for line in lines} <= drawn["styles"].keys()


def test_long_curves_are_thinned_and_keep_their_last_point() -> None:
    steps = np.arange(0, 10_001)
    data = pd.DataFrame({"seed": 0, "branch": "sgd", "step": steps, "loss": 1 / (1 + steps)})
    line = page_data(data, ROLES)["panels"][0]["quantities"][0]["lines"][0]
    assert len(line["x"]) <= MOST_POINTS
    assert line["x"][-1] == 10_000
    assert line["mean"][-1] == pytest.approx(1 / 10_001, rel=1e-4)


def test_infinite_and_missing_values_are_null_in_the_page(
    study: pd.DataFrame, tmp_path: Path
) -> None:
    data = study[study["seed"] == 0].copy()
    data.loc[data["step"] > 900, ["loss", "sharpness"]] = [np.inf, np.nan]
    path = write_report(tmp_path, data, [], SPEC, {}, NO_FIGURES, "diverged")
    assert embedded(path.read_text(encoding="utf-8"))["panels"]


@pytest.mark.parametrize("branches", few(1, [["trunk"], ["sgd"]]))
def test_a_study_of_one_run_has_a_report(
    branches: list[str], study: pd.DataFrame, tmp_path: Path
) -> None:
    data = study[study["branch"].isin(branches) & (study["seed"] == 0)]
    path = write_report(
        tmp_path, data, judge_all(registry.claims.values(), data), SPEC, {}, NO_FIGURES, "one run"
    )
    html = without_plotly(path.read_text(encoding="utf-8"))
    assert "? undecided" in html
    assert "1</b> seed<" in html


def test_a_panel_is_added_once(study: pd.DataFrame) -> None:
    loss = registry.panels["loss"]
    with patch.dict(registry.panels, clear=True):
        registry.panels.add(loss.name, loss)
        assert [panel["name"] for panel in page_data(study, ROLES)["panels"]] == ["loss"]
        with pytest.raises(InvalidInput, match="not used yet"):
            registry.panels.add(loss.name, loss)


# The small drawings beside the verdicts.


def test_the_drawing_shows_the_side_on_which_the_claim_holds(verdicts: list[Verdict]) -> None:
    aligned, stalls = (interval_plot(verdict) for verdict in verdicts[:2])
    assert aligned is not None
    assert stalls is not None
    assert aligned.allowed == (aligned.threshold, WIDTH - aligned.threshold)
    assert stalls.allowed == (0.0, stalls.threshold)
    assert aligned.mean > aligned.threshold
    assert stalls.mean < stalls.threshold
    assert len(stalls.seeds) == 3


def test_nothing_is_drawn_where_nothing_is_known(verdicts: list[Verdict]) -> None:
    assert interval_plot(replace(verdicts[0], values={}, mean=float("nan"))) is None
    assert interval_plot(replace(verdicts[2], values={0: float("inf")}, mean=float("inf"))) is None


# The page in a browser.


@pytest.mark.slow
class TestInChromium:
    def test_it_renders_without_complaint_and_without_a_request(
        self, browser: Browser, page: Path
    ) -> None:
        browser.open(page)
        assert browser.evaluate("document.querySelectorAll('.panel').length") == len(
            registry.panels
        )
        curves = browser.evaluate("document.querySelectorAll('#panel-loss .trace path').length")
        # Two edges of the band and a line for each of trunk, SGD, Dom-SGD, Bulk-SGD.
        assert curves >= 12
        assert browser.complaints == []
        asked = [request for request in browser.requests if not request.startswith("data:")]
        assert asked == [page.resolve().as_uri()]

    def test_hover_shows_the_values_of_all_branches(self, browser: Browser, page: Path) -> None:
        browser.open(page)
        x, y = browser.middle("#panel-loss .nsewdrag")
        for shift in (0, 40):
            browser.move_mouse(x + shift, y)
        browser.wait("document.querySelector('#panel-loss .hoverlayer').textContent.length > 0")
        shown = browser.evaluate("document.querySelector('#panel-loss .hoverlayer').textContent")
        for text in ("SGD : 0.11", "Dom-SGD : 0.12", "Bulk-SGD : 0.11", "["):
            assert text in shown

    def test_buttons_switch_quantity_scale_seeds_and_branches(
        self, browser: Browser, page: Path
    ) -> None:
        browser.open(page)
        traces = "document.querySelector('#panel-loss .plot').data.length"
        assert browser.evaluate(traces) == 12
        browser.click("#toolbar .switch button:nth-child(2)")
        browser.wait("document.querySelector('#panel-loss .plot').data[1].name.includes('seed 1')")
        browser.click("#toolbar .chip:nth-child(3)")
        browser.wait(f"{traces} === 9")
        scale = "document.querySelector('#panel-loss .plot')._fullLayout.yaxis.type"
        assert browser.evaluate(scale) == "log"
        browser.click("#panel-loss .controls .switch:nth-child(2) button:nth-child(1)")
        browser.wait(f"{scale} === 'linear'")
        browser.click("#panel-loss .controls .switch:nth-child(1) button:nth-child(2)")
        browser.wait("document.querySelector('#panel-loss .ytitle').textContent === 'test loss'")
        assert browser.complaints == []

    def test_many_branches_are_switched_family_by_family(
        self, browser: Browser, tmp_path: Path
    ) -> None:
        data = synthetic.optimizers(1)
        browser.open(write_report(tmp_path, data, [], SPEC, {}, NO_FIGURES, "optimizers"))
        shown = "new Set(document.querySelector('#panel-loss .plot').data.map(t => t.name))"
        names = f"[...{shown}].sort()"
        assert browser.evaluate(names) == ["Adam", "Bulk-SGD", "Dom-SGD", "SGD"]
        button = "[...document.querySelectorAll('#toolbar .group')].find(b => b.textContent === "
        browser.evaluate(f"{button}'all').click()")
        browser.wait(f"{shown}.size === {data['branch'].nunique()}")
        browser.evaluate(f"{button}'Dom').click()")
        browser.evaluate(f"{button}'Adam').click()")
        browser.wait(f"{names}.includes('Dom-Adam') && !{names}.includes('Dom-Muon')")
        assert browser.evaluate(f"{button}'Muon').getAttribute('aria-pressed')") == "mixed"
        browser.evaluate(f"{button}'Adam').click()")
        browser.wait(f"!{names}.includes('Bulk-Adam, frozen')")
        assert browser.evaluate("document.documentElement.scrollWidth") <= 1200
        assert browser.complaints == []

    def test_no_button_sends_the_chart_away(self, browser: Browser, page: Path) -> None:
        browser.open(page)
        titles = browser.evaluate(
            "[...document.querySelectorAll('#panel-loss .modebar-btn')].map(b => b.dataset.title)"
        )
        assert titles == ["Download plot as a PNG", "Zoom", "Pan", "Reset axes"]

    def test_dark_and_light_follow_the_reader(self, browser: Browser, page: Path) -> None:
        browser.open(page)
        line = "document.querySelector('#panel-loss .plot').data.at(-1).line.color"
        light = browser.evaluate(line)
        browser.prefer("dark")
        browser.wait(f"{line} !== '{light}'")
        assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == (
            "rgb(20, 23, 26)"
        )

    def test_a_narrow_window_needs_no_sideways_scrolling(
        self, browser: Browser, page: Path
    ) -> None:
        for mobile in (True, False):
            browser.resize(400, 900, mobile=mobile)
            browser.open(page)
            browser.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
            assert browser.evaluate("document.documentElement.scrollWidth") <= 400

    def test_the_page_prints(self, browser: Browser, page: Path) -> None:
        browser.open(page)
        assert browser.print_to_pdf().startswith(b"%PDF")
        assert browser.complaints == []

    def test_hostile_texts_stay_texts(
        self, browser: Browser, study: pd.DataFrame, verdicts: list[Verdict], tmp_path: Path
    ) -> None:
        browser.open(hostile_report(study, verdicts, tmp_path))
        x, y = browser.middle("#panel-loss .nsewdrag")
        for shift in (0, 40):
            browser.move_mouse(x + shift, y)
        browser.wait("document.querySelector('#panel-loss .hoverlayer').textContent.length > 0")
        assert browser.evaluate("window.hacked === undefined")
        assert browser.evaluate("document.title") == HOSTILE
        assert browser.evaluate("document.querySelectorAll('img').length") == 0
        assert browser.complaints == []

    def test_the_policy_stops_a_script_and_a_request(self, browser: Browser, page: Path) -> None:
        browser.open(page)
        browser.evaluate(
            "document.body.append(Object.assign(document.createElement('script'),"
            "{textContent: 'window.hacked = 1'}))"
        )
        assert browser.evaluate("window.hacked === undefined")
        assert browser.evaluate(
            "fetch('https://example.org/').then(() => 'sent', () => 'stopped')"
        ) == ("stopped")
        assert any("Content Security Policy" in text for text in browser.complaints)
