"""What does a step of a study cost on this machine? Measured on a few steps, before time is spent.

Everything that a run needs is built here first: data that cannot be read or a k that is too large
is found out before there is a folder. The measurement also chooses how to multiply by the Hessian
and in which chunks; the choice is written into the spec, so that every run of the study, and a
resumed one, computes alike.

What no probe, rule or split asks for is not measured. What would take longer than the budget is
not either, but estimated from counted products with the Hessian.
"""

from __future__ import annotations

import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from thalweg.lab.asking import asks_for_subspace
from thalweg.lab.run_names import TRUNK
from thalweg.lab.spec import Spec, dump_spec, parse_spec

if TYPE_CHECKING:
    from thalweg.curvature import Objective
    from thalweg.dynamics import Moment
    from thalweg.lab.run import Setup
    from thalweg.lab.subspace_costs import SubspaceCosts
    from thalweg.lab.timing import Clock

BUDGET_SECONDS = 20.0
"""For what is measured. A part that would take longer than what is left of it is counted."""
FEWEST = 8
QUICK_SECONDS = 0.05
"""A call that takes so long is timed well enough by one."""
LONG_SECONDS = 2.0
"""What would take longer over all samples is measured on fewer, and scaled."""
STEPS = 8
MOST_STEPS = 100
"""Of the phase, as far as its schedule is concerned: more than are made."""
QUIET_SECONDS = 2.0
"""Before that, nothing is said on what is being measured."""


@dataclass(frozen=True)
class Measurement:
    """Costs in seconds, and what else was learned.

    Attributes:
        start: building a run's problem, once a run.
        gradient: one gradient of the full loss.
        step: a step of the last phase's optimizer alone.
        subspace: what finding S_k and following it cost.
        test: loss on the held-out data.
        probes: what each probe takes itself.
        gradient_probes, subspace_probes: those that ask for the full gradient, and for S_k.
        vectorize_up_to, chunk_size: the fastest way to multiply by the Hessian.
        num_parameters, num_samples, k: P, N, k.
        optimizer_vectors: vectors of length P that the optimizer keeps.
        fingerprint: SHA-256 of the samples.
        notes: what a user should know about the data.
    """

    start: float
    gradient: float
    step: float
    subspace: SubspaceCosts
    test: float
    vectorize_up_to: int
    chunk_size: int
    num_parameters: int
    num_samples: int
    k: int
    optimizer_vectors: int
    fingerprint: str
    probes: Mapping[str, float] = field(default_factory=dict)
    gradient_probes: tuple[str, ...] = ()
    subspace_probes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def measure(
    spec: Spec, plugins: Sequence[str], device: str, say: Callable[[str], None] | None = None
) -> Measurement:
    """Measure in a process of its own, with the threads that a run will have.

    Args:
        say: takes a line on what is being measured, where that takes a while.

    Raises:
        InvalidInput: the problem cannot be built.
    """
    from thalweg.lab.processes import call

    arguments = (dump_spec(spec), device, spec.threads, tuple(plugins))
    return Measurement(**call(_measure, arguments, say))


def _measure(
    spec_text: str,
    device: str,
    threads: int,
    plugins: Sequence[str],
    say: Callable[[str], None] = lambda part: None,
) -> dict[str, Any]:
    import torch

    from thalweg.lab.machine import compute_repeatably
    from thalweg.lab.multiplying import choose_way_to_multiply
    from thalweg.lab.registry import load_plugin
    from thalweg.lab.rehearsal import ask_probes
    from thalweg.lab.run.building import build_setup
    from thalweg.lab.subspace_costs import subspace_costs
    from thalweg.lab.timing import Clock

    torch.set_num_threads(threads)
    compute_repeatably(device)
    for plugin in plugins:
        load_plugin(plugin)
    spec = parse_spec(tomllib.loads(spec_text), source="spec.toml")
    seed = spec.seeds[0]
    say = _only_if_slow(say)
    say("building the problem")
    begin = time.perf_counter()
    setup = build_setup(spec, seed, device)
    start = time.perf_counter() - begin
    objective = setup.objective
    clock = Clock(objective.device, BUDGET_SECONDS)
    say("how to multiply by the Hessian")
    block = choose_way_to_multiply(spec, setup, Clock(objective.device, BUDGET_SECONDS / 2))
    say("gradients and steps")
    training = _Training(spec, setup, seed)
    step = training.seconds(clock)
    gradient, few = _gradient(spec, setup, training.batch_size, clock)
    say("probes")
    names, size = spec.all_probes, training.batch_size
    probes = ask_probes(names, training.moment, setup.k, few, size, clock)
    asking = tuple(name for name, asked in probes.items() if asked.subspace)
    test = _test_seconds(setup, gradient, clock)
    say("the subspace")
    followed = _followed(spec, asking)
    return {
        "start": start,
        "gradient": gradient,
        "step": step,
        "subspace": subspace_costs(
            followed or spec,
            setup,
            seed,
            block / setup.k,
            training.step,
            clock,
            follows=followed is not None,
            solves="solved_eigenvalues" in names,
        ),
        "test": test,
        "probes": {name: asked.seconds for name, asked in probes.items()},
        "gradient_probes": tuple(name for name, asked in probes.items() if asked.gradient),
        "subspace_probes": asking,
        "vectorize_up_to": objective.products.vectorize_up_to,
        "chunk_size": objective.chunk_size,
        "num_parameters": objective.num_parameters,
        "num_samples": objective.num_samples,
        "k": setup.k,
        "optimizer_vectors": training.optimizer_vectors,
        "fingerprint": setup.problem.fingerprint(),
        "notes": tuple(setup.problem.notes),
    }


class _Training:
    """Training by the last phase, without split, noise and workers: these are counted apart."""

    def __init__(self, spec: Spec, setup: Setup, seed: int) -> None:
        from thalweg.lab.run.building import make_optimizer, make_source

        last = spec.phases[-1]
        noise, self._setup, self._seed = last.noise, setup, seed
        size = last.batch_size if noise is None else noise.batch_size
        self.batch_size = None if size in ("all", setup.problem.num_samples) else size
        self._phase = last.model_copy(update={"split": None, "noise": None, "local": None})
        self._source = make_source(spec, setup, seed)  # never asked
        self._optimizer = make_optimizer(spec, self._phase, setup, seed, self._source)
        self._number = 0
        self.moment = self.step()

    def step(self) -> Moment:
        """Make the next step."""
        from thalweg.dynamics import Moment
        from thalweg.lab.run.step import train_one_step

        objective = self._setup.objective
        moment = Moment(
            step=self._number,
            theta=objective.theta(),
            objective=objective,
            source=self._source,
            learning_rate=self._phase.learning_rate(self._number, MOST_STEPS),
            optimizer=self._optimizer,
            k=self._setup.k,
        )
        train_one_step(moment, self._setup, self._optimizer, self._phase, self._seed)
        self._number += 1
        return moment

    def seconds(self, clock: Clock) -> float:
        """What a step takes; the one made already has warmed up."""
        first = clock.seconds(self.step)
        times = int(min(STEPS, QUICK_SECONDS / first))
        return clock.seconds(self.step, times) if times > 1 else first

    @property
    def optimizer_vectors(self) -> int:
        """Vectors of length P that the optimizer keeps."""
        kept = sum(
            value.numel()
            for state in self._optimizer.state.values()
            for value in state.values()
            if hasattr(value, "numel")
        )
        return round(kept / self._setup.objective.num_parameters)


def _followed(spec: Spec, asking: Sequence[str]) -> Spec | None:
    """The spec of the trunk, or of the first branch, that follows or solves a subspace.

    None where none of them asks for one, beside random directions.
    """
    for name in (TRUNK, *spec.branches):
        own = spec.of_branch(name)
        if own.subspace.source != "random" and asks_for_subspace(spec, name, asking):
            return own
    return None


def _gradient(
    spec: Spec, setup: Setup, batch_size: int | None, clock: Clock
) -> tuple[float, Objective]:
    """Seconds of a gradient of the full loss, and the loss of few samples, long enough to time.

    So many, unless they take too long, that a mini-batch shrunk likewise has a sample left.
    """
    import torch

    from thalweg.lab.run.building import make_objective

    total, size = setup.objective.num_samples, FEWEST
    least = FEWEST if batch_size is None else total / batch_size
    while True:
        size = min(size, total)
        few = make_objective(spec, setup.problem, torch.arange(size))
        few.chunk_size, few.products = setup.objective.chunk_size, setup.objective.products
        few.gradient()  # warms up
        # The least of three: what else the machine did meanwhile would be scaled up too.
        seconds = min(clock.seconds(few.gradient) for _ in range(3))
        is_enough = size >= least or seconds >= LONG_SECONDS / 16
        if (seconds >= QUICK_SECONDS and is_enough) or size == total:
            break
        size *= 4
    times = max(1, int(QUICK_SECONDS / seconds))
    full = seconds * total / size
    if full <= LONG_SECONDS:
        full = clock.seconds(setup.objective.gradient, times)
    return full, few


def _test_seconds(setup: Setup, gradient: float, clock: Clock) -> float:
    from thalweg.lab.run.step import evaluate_test

    if setup.problem.test is None:
        return 0.0
    theta, held_out = setup.objective.theta(), len(setup.problem.test[0])
    # A pass forward, where a gradient is one forward and one backward, which takes twice as long.
    expected = gradient / 3 * held_out / setup.objective.num_samples
    if expected > LONG_SECONDS:
        return expected
    return clock.seconds(lambda: evaluate_test(setup, theta))


def _only_if_slow(say: Callable[[str], None]) -> Callable[[str], None]:
    """Say what is being measured once it has taken a while."""
    begin = time.perf_counter()

    def say_if_slow(part: str) -> None:
        if time.perf_counter() - begin >= QUIET_SECONDS:
            say(f"measuring {part} ...")

    return say_if_slow
