"""What the tests of pages share: one browser."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.analysis.browser import CHROMIUM, Browser


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with Browser() as opened:
        yield opened


@pytest.fixture
def browser(chromium: Browser) -> Browser:
    """The one browser, as if just started: starting it takes longer than most tests."""
    chromium.start_afresh()
    return chromium
