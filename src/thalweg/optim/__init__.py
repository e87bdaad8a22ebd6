"""Optimizers that split an update into its dominant and its bulk part."""

from __future__ import annotations

from thalweg.optim.split import SplitUpdate

__all__ = ["SplitUpdate"]
