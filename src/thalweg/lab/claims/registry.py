"""All claims by name; a plugin adds its own with `add_claim`."""

from __future__ import annotations

from thalweg.errors import invalid
from thalweg.lab.claims.claim import Claim

CLAIMS: dict[str, Claim] = {}


def add_claim(claim: Claim) -> Claim:
    """Register a claim under its name; raises InvalidInput if the name is taken."""
    if claim.name in CLAIMS:
        raise invalid("claim name", claim.name, "a name not used yet", "choose another name")
    CLAIMS[claim.name] = claim
    return claim
