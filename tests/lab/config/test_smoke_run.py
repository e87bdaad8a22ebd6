from __future__ import annotations

import tomllib
from typing import Any

import pytest

from tests.lab.small_study import RAW, small_spec
from thalweg.lab.config import (
    builtin_specs,
    builtin_studies,
    dump_spec,
    load_spec,
    load_study,
    parse_spec,
    smoke,
    spec_hash,
)
from thalweg.lab.config.smoke_run import SAMPLES, STEPS


@pytest.mark.parametrize("name", builtin_studies())
def test_a_built_in_study_is_tiny_valid_and_as_written(name: str) -> None:
    spec = load_study(name, None, ["--smoke"])
    assert spec.smoke
    assert smoke(spec) == spec
    assert parse_spec(tomllib.loads(dump_spec(spec))) == spec
    for phase in (*spec.phases, *spec.branches.values()):
        assert phase.steps is not None
        assert phase.steps <= STEPS
        assert (phase.epochs, phase.until_alignment, phase.until_loss) == (None, None, None)
    assert spec.problem.samples == SAMPLES
    assert all(every <= STEPS for every in spec.probes.values())


def test_built_in_specs_keep_their_seeds_where_these_are_given() -> None:
    for name in builtin_specs():
        assert load_spec(name, ["--smoke"]).seeds == load_spec(name).seeds[:1]
        assert load_spec(name, ["--smoke", "--seeds", "3..4"]).seeds == (3, 4)


def test_a_file_keeps_its_seeds() -> None:
    assert parse_spec({**RAW, "smoke": True, "seeds": [0, 5]}).seeds == (0, 5)


def test_what_is_smaller_already_stays() -> None:
    spec = smoke(small_spec({"phases.0.steps": 2, "problem.samples": 30, "probes": {"loss": 1}}))
    assert (spec.phases[0].steps, spec.problem.samples, spec.probes) == (2, 30, {"loss": 1})
    assert spec.phases[0].batch_size == 20


def test_batches_and_subsets_fit_the_samples() -> None:
    changes: dict[str, Any] = {
        "subspace.samples": 150,
        "branches.dom-sgd.subspace": {"samples": 180},
        "branches.sgd.noise": {"part": "all", "batch_size": 150},
        "branches.bulk-sgd": {"batch_size": 100, "local": {"workers": 4, "period": 2}},
    }
    spec = smoke(small_spec(changes))
    noise, local = spec.branches["sgd"].noise, spec.branches["bulk-sgd"]
    own = spec.branches["dom-sgd"].subspace
    assert noise is not None
    assert own is not None
    assert (spec.subspace.samples, own.samples, noise.batch_size) == (60, 60, 60)
    assert local.batch_size == 15


def test_a_smoke_run_has_a_folder_of_its_own() -> None:
    tiny = smoke(small_spec())
    assert spec_hash(tiny) != spec_hash(small_spec())
    # Also where nothing is left to make smaller.
    assert spec_hash(tiny) != spec_hash(tiny.model_copy(update={"smoke": False}))
