"""Studies over problems: each is valid on each problem it can have, and says the paper's things."""

from __future__ import annotations

import tomllib

import pytest

from tests.sampling import few
from thalweg import registry
from thalweg.errors import InvalidInput
from thalweg.lab.config import builtin_studies, dump_spec, load_spec, load_study, parse_spec
from thalweg.lab.config.studies import has_own_problem
from thalweg.lab.study import check_spec, roles_of

STUDIES = tuple(builtin_studies())
OVER_PROBLEMS = tuple(name for name in STUDIES if not has_own_problem(name))


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_is_valid_and_read_back_exactly(name: str) -> None:
    spec = load_study(name)
    check_spec(spec)
    assert spec.name == name
    assert spec.seeds == (0, 1, 2)
    assert parse_spec(tomllib.loads(dump_spec(spec))) == spec


@pytest.mark.parametrize("name", OVER_PROBLEMS)
@pytest.mark.parametrize("problem", few(1, ["mnist", "digits-cross-entropy", "sst2"]))
def test_a_study_is_valid_on_other_problems(name: str, problem: str) -> None:
    spec, of_problem = load_study(name, problem), load_study("main", problem)
    check_spec(spec)
    assert spec.problem == of_problem.problem
    assert spec.seeds == of_problem.seeds


def test_what_a_study_leaves_open_is_the_problems() -> None:
    phase, own = load_study("noise", "mnist").phases[0], load_spec("mnist-mlp").phases[0]
    assert phase == own
    assert load_study("noise", "mnist").branch_phase("gd").optimizer.lr == 0.01
    assert load_study("noise").branch_phase("gd").optimizer.lr == 0.05


def test_a_study_may_have_a_default_problem() -> None:
    usual, named = load_study("threshold"), load_study("threshold", "digits-cross-entropy")
    assert usual == named
    assert usual.problem.loss == load_spec("digits-cross-entropy").problem.loss
    assert load_study("threshold", "digits").problem == load_spec("digits").problem


def test_the_branches_that_a_study_has_on_a_problem_alone_are_valid() -> None:
    spec = load_study("threshold", "tinyshakespeare")
    check_spec(spec)
    assert len(spec.branches) > len(load_study("threshold").branches)
    for use in spec.claim_uses:
        assert set(use.roles.values()) <= set(spec.branches), use


def test_values_on_a_problem_go_before_the_study_and_the_users_before_both() -> None:
    assert load_study("edge").phases[0].steps == 1100
    assert load_study("edge", "mnist").phases[0].steps == 500
    assert load_study("edge", "mnist", ["--phases.0.steps", "9"]).phases[0].steps == 9


def test_every_claim_of_a_study_finds_its_branches() -> None:
    for name in STUDIES:
        spec = load_study(name)
        roles = roles_of(spec)
        for use in spec.claim_uses:
            found = {**roles, **use.roles}
            assert set(registry.claims[use.name].needs_roles) <= set(found), (name, use)


def test_unknown_names_are_told_with_the_nearest() -> None:
    with pytest.raises(InvalidInput, match=r"study.*'nois'.*did you mean 'noise'"):
        load_study("nois")
    with pytest.raises(InvalidInput, match=r"problem.*'minst'.*did you mean 'mnist'"):
        load_study("noise", "minst")


def test_a_study_with_its_own_problem_takes_no_other() -> None:
    own = next(name for name in STUDIES if has_own_problem(name))
    with pytest.raises(InvalidInput, match=rf"problem: got 'mnist', allowed: none, {own} has"):
        load_study(own, "mnist")


@pytest.mark.parametrize("name", STUDIES)
def test_every_claim_and_figure_of_a_study_finds_its_columns(name: str) -> None:
    spec = load_study(name)

    def measured(branch: str) -> set[str]:
        probes = spec.of_branch(branch).probes
        return {
            "step",
            "learning_rate",
            *(c for probe in probes for c in registry.probes[probe].columns),
        }

    for use in spec.claim_uses:
        claim, found = registry.claims[use.name], {**roles_of(spec), **use.roles}
        # A column may be one branch's business, such as the spectrum of the plain one.
        of_roles = set[str]().union(*(measured(found[role]) for role in claim.needs_roles))
        assert set(claim.needs_columns) <= of_roles, use
    by_any = set[str]().union(*(measured(branch) for branch in ("trunk", *spec.branches)))
    for figure in spec.figures or ():
        assert set(registry.figures[figure].needs) <= by_any, figure
