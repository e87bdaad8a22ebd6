"""What measurements say: claims, figures, report."""

from __future__ import annotations

from thalweg.errors import require_extra

require_extra("lab", "pandas", "scipy", "matplotlib", "jinja2")
