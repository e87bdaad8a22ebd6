"""Names that the parts of the lab agree on."""

from __future__ import annotations

TRUNK = "trunk"
"""The run that all branches of a seed start from."""

END_PHASE = "end-phase"
"""A file of this name in a run's folder ends its current phase, by hand."""

BASES = "bases"
"""The folder of a run's saved bases."""
