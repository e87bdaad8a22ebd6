"""Thalweg: the dominant Hessian subspace of a neural network, followed at every training step."""

from __future__ import annotations

__version__ = "0.1.0"
