"""Pictures of whole regimes: phase diagrams, curves and verdicts over the points of a sweep."""

from thalweg.analysis.regimes.conclusion import conclude_sweep
from thalweg.analysis.regimes.table import STATISTICS, SweepTable, read_table

__all__ = ["STATISTICS", "SweepTable", "conclude_sweep", "read_table"]
