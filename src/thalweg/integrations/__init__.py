"""Thalweg in other libraries' worlds. Each module imports its library when it is used."""

from __future__ import annotations

from thalweg.integrations.parquet import Parquet
from thalweg.integrations.scipy import as_linear_operator

__all__ = ["Parquet", "as_linear_operator"]
