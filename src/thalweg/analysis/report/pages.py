"""What do all pages share? Templates, escaping, the table of verdicts, and writing in one go."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from thalweg.analysis.claims.judgement import Verdict
from thalweg.analysis.claims.verdicts import verdict_text
from thalweg.analysis.report.interval_drawing import interval_plot


def template(name: str) -> Any:
    """A template of this package; all that is put into it is escaped."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(read),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def read(name: str) -> str:
    """The text of a file beside this one."""
    return resources.files("thalweg.analysis.report").joinpath(name).read_text(encoding="utf-8")


def trusted(text: str) -> Any:
    """Mark text of our own, or escaped by us, as not to be escaped again."""
    from markupsafe import Markup

    return Markup(text)


def verdict_rows(verdicts: Iterable[Verdict]) -> list[dict[str, Any]]:
    """What the table of verdicts shows of each."""
    return [
        {"verdict": verdict, "text": verdict_text(verdict), "plot": interval_plot(verdict)}
        for verdict in verdicts
    ]


def write_page(path: Path, html: str) -> None:
    """Write a page, replacing an earlier one: a reader must never load half of it."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(html, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
