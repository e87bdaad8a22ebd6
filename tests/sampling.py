"""Which of many cases of one guard the default suite runs; `make slow` runs the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def few(count: int, cases: Iterable[Any]) -> list[Any]:
    """Cases for `pytest.mark.parametrize`; those after the first `count` are marked slow."""
    cases = list(cases)
    return [*cases[:count], *map(slow, cases[count:])]


def slow(case: Any) -> Any:
    """A case for `pytest.mark.parametrize`, marked slow: a value, a tuple, or a `pytest.param`."""
    if isinstance(case, type(pytest.param())):
        return pytest.param(*case.values, marks=[*case.marks, pytest.mark.slow], id=case.id)
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
