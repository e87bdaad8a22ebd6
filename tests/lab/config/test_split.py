from __future__ import annotations

from typing import Any

import pytest

from tests.lab.small_study import small_spec
from thalweg.errors import InvalidInput
from thalweg.lab.config import SplitSpec, dump_spec, parse_spec, spec_hash
from thalweg.lab.config.loading import read_toml
from thalweg.lab.study import roles_of

SPLIT = "branches.bulk-sgd.split"
RAMP = {"dominant": 0.0, "bulk": 1.0, "bulk_end": 3.0}
CHEAP = {"dominant": 0.0, "bulk": 1.0, "source": {"name": "updates"}}


def test_factors_go_on_a_line_from_the_first_step_to_the_last() -> None:
    split = SplitSpec(dominant=0.5, bulk=1.0, bulk_end=3.0)
    assert [split.factors(step, 5) for step in range(5)] == [
        (0.5, 1.0),
        (0.5, 1.5),
        (0.5, 2.0),
        (0.5, 2.5),
        (0.5, 3.0),
    ]
    assert split.factors(9, 5) == (0.5, 3.0)
    assert split.factors(0, 1) == (0.5, 1.0)
    assert SplitSpec(dominant=0.5, bulk=2.0).factors(3, 5) == (0.5, 2.0)


@pytest.mark.parametrize(
    ("split", "changes", "scheduled"),
    [
        ({}, False, False),
        ({"bulk": 2.0}, True, False),
        ({"bulk_end": 2.0}, True, True),
        ({"dominant_end": 1.0}, False, False),
        ({"bulk": 2.0, "bulk_end": 2.0}, True, False),
        ({"dominant": 0.0, "dominant_end": 1.0}, True, True),
    ],
)
def test_it_knows_whether_it_changes_anything(
    split: dict[str, Any], changes: bool, scheduled: bool
) -> None:
    assert (SplitSpec(**split).changes, SplitSpec(**split).is_scheduled) == (changes, scheduled)


def test_more_steps_extend_a_branch_unless_its_factors_depend_on_them() -> None:
    def hashed(split: dict[str, Any], steps: int) -> str:
        return spec_hash(small_spec({SPLIT: split, "branches.bulk-sgd.steps": steps}))

    constant = {"dominant": 0.0, "bulk": 1.0}
    assert hashed(constant, 7) == hashed(constant, 9)
    assert hashed(RAMP, 7) != hashed(RAMP, 9)
    assert len({hashed(split, 7) for split in (constant, RAMP, CHEAP)}) == 3
    assert hashed({**RAMP, "bulk_end": 2.0}, 7) != hashed(RAMP, 7)


def test_a_spec_with_it_is_written_and_read_back(tmp_path: Any) -> None:
    spec = small_spec({SPLIT: {**CHEAP, "dominant_end": 1.0}})
    (tmp_path / "spec.toml").write_text(dump_spec(spec))
    again = parse_spec(read_toml(tmp_path / "spec.toml", "spec"))
    assert again == spec
    split = again.branch_phase("bulk-sgd").split
    assert split is not None
    assert split.source is not None
    assert (split.source.k, split.source.blocks) == (4, "tensor")


def test_a_branch_with_changing_factors_or_a_cheap_space_has_no_standard_role() -> None:
    assert roles_of(small_spec())["bulk"] == "bulk-sgd"
    for split in (RAMP, CHEAP):
        assert "bulk" not in roles_of(small_spec({SPLIT: split}))


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({**CHEAP, "basis": "frozen"}, "basis: got 'frozen', allowed: 'live' with a source"),
        ({**CHEAP, "metric": "optimizer"}, "metric: got 'optimizer', allowed: 'euclidean' with"),
        ({"source": {"name": "updates", "k": 9, "window": 8}}, "k: got 9, allowed: at most the w"),
        ({"source": {"name": "hessian"}}, "name"),
    ],
)
def test_what_does_not_fit_together_is_refused(split: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        small_spec({SPLIT: split})
