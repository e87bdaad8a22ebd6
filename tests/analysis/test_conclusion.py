from __future__ import annotations

from tests.lab.small_study import small_spec
from thalweg import registry
from thalweg.analysis.conclusion import branches_on_subspace
from thalweg.lab.study import roles_of


def test_a_claim_rests_on_the_subspace_by_what_it_measures_or_by_a_split() -> None:
    spec = small_spec({"branches.dom-sgd.subspace": {"source": "threshold", "threshold": 0.1}})
    roles = {"plain": "sgd", "dominant": "dom-sgd", "bulk": "bulk-sgd"}
    assert roles_of(small_spec()) == roles

    def resting(claim: str) -> set[str]:
        return branches_on_subspace(registry.claims[claim], roles, spec)

    assert resting("bulk-suffices") == {"bulk-sgd"}
    assert resting("dominant-stalls") == set()
    assert resting("gradient-aligns") == {"sgd"}
    assert resting("bulk-travels") == {"dom-sgd", "bulk-sgd"}
