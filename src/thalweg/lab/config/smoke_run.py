"""What is a study when it is made tiny, to see in seconds whether all of it runs?

`smoke = true` in a spec, or `--smoke`: each phase and branch makes a few steps, whatever rules it
could end by; a few samples are used; each probe measures at the start of a phase at the least. Its
folder is its own, its report says what it is, and no verdict on it is to be believed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from thalweg.lab.config.phases import PhaseSpec

if TYPE_CHECKING:
    from thalweg.lab.config.spec import Spec, SubspaceSpec

STEPS = 4
"""Of a phase or branch, at most."""
SAMPLES = 60
"""To train on, at most: equally many of each of 2, 3, 4, 5, 6 or 10 classes."""
WARNING = "a smoke run: everything is tiny, and no verdict is to be believed"

Phase = TypeVar("Phase", bound=PhaseSpec)


def smoke(spec: Spec) -> Spec:
    """The same study with everything tiny but its model; its seeds stay. Twice is as once.

    Held-out samples are cut where the spec names their number, as no data set has to have them.
    Data that were given as Python objects stay whole.
    """
    brings_data = spec.holds_objects
    problem, most = spec.problem, SAMPLES
    if not brings_data:
        most = min(problem.samples or SAMPLES, SAMPLES)
        held_out = problem.test_samples and min(problem.test_samples, SAMPLES)
        problem = problem.model_copy(update={"samples": most, "test_samples": held_out})
    return spec.model_copy(
        update={
            "smoke": True,
            "problem": problem,
            "subspace": _subspace(spec.subspace, most),
            "phases": tuple(_phase(phase, most) for phase in spec.phases),
            "branches": {
                name: _phase(branch, most).model_copy(
                    update={
                        "subspace": branch.subspace and _subspace(branch.subspace, most),
                        "probes": branch.probes and _often(branch.probes),
                    }
                )
                for name, branch in spec.branches.items()
            },
            "probes": _often(spec.probes),
        }
    )


def _phase(phase: Phase, samples: int) -> Phase:
    steps = STEPS if phase.steps is None else min(phase.steps, STEPS)
    changed: dict[str, object] = {
        "steps": steps,
        "epochs": None,
        "warmup_steps": min(phase.warmup_steps, steps),
        "until_alignment": None,
        "until_loss": None,
    }
    workers = 1 if phase.local is None else phase.local.workers
    if phase.batch_size != "all":
        changed["batch_size"] = min(phase.batch_size, max(1, samples // workers))
    if phase.noise is not None:
        batch = min(phase.noise.batch_size, samples)
        changed["noise"] = phase.noise.model_copy(update={"batch_size": batch})
    return phase.model_copy(update=changed)


def _subspace(subspace: SubspaceSpec, samples: int) -> SubspaceSpec:
    if not isinstance(subspace.samples, int):
        return subspace
    return subspace.model_copy(update={"samples": min(subspace.samples, samples)})


def _often(probes: Mapping[str, Any]) -> dict[str, Any]:
    """Each at every step that a phase begins with, at the least."""
    return {
        name: min(every, STEPS) if isinstance(every, int) else every
        for name, every in probes.items()
    }
