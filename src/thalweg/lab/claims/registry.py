"""All claims by name; a plugin adds its own with `add_claim`."""

from __future__ import annotations

from thalweg.lab.claims.claim import Claim
from thalweg.named import Named

CLAIMS: Named[Claim] = Named("claim")
add_claim = CLAIMS.add
