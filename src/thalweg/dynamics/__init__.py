"""What is measured along a training trajectory."""

from __future__ import annotations

from thalweg.dynamics.moment import BranchPoint, Moment
from thalweg.dynamics.probes import PROBES, Probe, probe

__all__ = ["PROBES", "BranchPoint", "Moment", "Probe", "probe"]
