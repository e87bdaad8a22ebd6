"""The pages on what studies gave: one HTML file each, which opens offline."""

from __future__ import annotations

from thalweg.analysis.report.panels import Panel
from thalweg.analysis.report.study_page import write_report

__all__ = ["Panel", "write_report"]
