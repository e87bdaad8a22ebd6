"""How long will a study take? From a few measured steps, said before time is spent.

The same measurement chooses how to multiply by the Hessian; the choice is written into the spec, so
that every run of the study, and a resumed one, computes alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from thalweg.lab.schedule import context
from thalweg.lab.spec import PhaseSpec, Spec, dump_spec


@dataclass(frozen=True)
class Estimate:
    """What was measured, in seconds, and what follows from it.

    Attributes:
        gradient: one gradient of the full loss.
        step: a mini-batch gradient.
        tracked: a tracked step, at the tracker's first choice of samples.
        method: the faster way to multiply by the Hessian.
        num_parameters, num_samples, k: P, N, k.
        notes: what a user should know about the data.
    """

    gradient: float
    step: float
    tracked: float
    method: str
    num_parameters: int
    num_samples: int
    k: int
    notes: tuple[str, ...] = ()

    def seconds_per_step(self, spec: Spec, phase: PhaseSpec) -> float:
        """A step of a phase: the optimizer's, the subspace and the gradient when asked for."""
        needs_every_step = phase.until_alignment is not None
        splits = phase.split is not None and (phase.split.dominant, phase.split.bulk) != (1, 1)
        probes = {name: every for name, every in spec.probes.items() if name != "test"}
        probed = 1 / min(probes.values()) if probes else 0.0
        gradients = 1.0 if needs_every_step else probed
        tracked = 1.0 if needs_every_step or splits else probed
        return self.step + gradients * self.gradient + tracked * self.tracked

    def seconds(self, spec: Spec, workers: int) -> float:
        """The whole study with so many processes side by side, at most."""
        one_seed = sum(
            phase.most_steps(self.num_samples) * self.seconds_per_step(spec, phase)
            for phase in (*spec.phases, *(spec.branch_phase(name) for name in spec.branches))
        )
        return len(spec.seeds) * one_seed / min(workers, max(1, len(spec.branches)))


def estimate(spec: Spec, plugins: Sequence[str], device: str) -> Estimate:
    """Measure a few steps in a process of its own, with the threads that a run will have.

    Raises:
        InvalidInput: the problem cannot be built.
    """
    from thalweg.lab.worker import measure

    with ProcessPoolExecutor(1, mp_context=context()) as pool:
        task = pool.submit(measure, dump_spec(spec), device, spec.threads, tuple(plugins))
        measured = task.result()
    return Estimate(**{**measured, "notes": tuple(measured["notes"])})  # type: ignore[arg-type]
