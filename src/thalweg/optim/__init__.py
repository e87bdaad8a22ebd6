"""Optimizers: split an update into its dominant and bulk part; SAM; several as one."""

from __future__ import annotations

from thalweg.optim.closure import needs_closure
from thalweg.optim.combined import Combined
from thalweg.optim.grad_power import GradPower
from thalweg.optim.sam import SAM
from thalweg.optim.split import SplitUpdate

__all__ = ["SAM", "Combined", "GradPower", "SplitUpdate", "needs_closure"]
