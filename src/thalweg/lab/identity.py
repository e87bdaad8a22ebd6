"""Which run is it? A hash of spec, seed and branch, which every file of the run carries.

It holds what determines the run's numbers, as `content_hash` does, without what may change while
the run goes on: a bound that can be raised, threads, versions. So it is the same before and after a
run is extended, and wherever its folder is copied or moved. Two branches of other names that do the
same have one hash, since their numbers are the same.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from thalweg.lab.config import TRUNK, PhaseSpec, Spec
from thalweg.lab.config.former_keys import with_former_keys
from thalweg.lab.config.loading import MEASURED, can_be_extended


def run_hash(spec: Spec, seed: int, branch: str, fingerprint: str) -> str:
    """16 hexadecimal digits of what determines the numbers of a run, but for how long it goes on.

    Args:
        spec: of the study.
        seed, branch: of the run; "trunk" for what branches start from.
        fingerprint: of the data, as in `run.toml`.
    """
    chain: list[dict[str, Any]] = []
    above: str | None = branch
    while above is not None and above != TRUNK:
        phase = spec.branch_phase(above)
        bounded = above != branch or not can_be_extended(phase)
        chain.append(_content(spec, above, [phase], bounded=bounded))
        above = spec.before(above)
    chain.append(_content(spec, TRUNK, spec.phases, bounded=True))
    kept = {"problem", "device", "dtype", "initial_checkpoint"}
    if spec.processes != 1:
        kept.add("processes")
    common = spec.model_dump(mode="json", exclude_none=True, include=kept)
    common["problem"]["data"].pop("data_dir", None)
    for key in MEASURED:
        common["problem"].pop(key, None)
    text = json.dumps([seed, fingerprint, common, chain], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def bound_of(phase: PhaseSpec) -> str:
    """How long a run's last phase may last, as text: "12 steps"."""
    return bound_text(phase.steps, phase.epochs)


def bound_text(steps: int | None, epochs: int | None) -> str:
    """The same of the values of a phase's table."""
    return f"{epochs} epochs" if steps is None else f"{steps} steps"


def _content(
    spec: Spec, branch: str, phases: tuple[PhaseSpec, ...] | list[PhaseSpec], *, bounded: bool
) -> dict[str, Any]:
    own = spec.of_branch(branch).model_dump(
        mode="json", exclude_none=True, include={"subspace", "probes"}
    )
    left_out = {"name"} if bounded else {"name", "steps", "epochs"}
    tables = [p.model_dump(mode="json", exclude_none=True, exclude=left_out) for p in phases]
    return {"phases": [with_former_keys(table) for table in tables], **own}
