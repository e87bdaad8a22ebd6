"""How much disk the runs of a study take, from above."""

from __future__ import annotations

from tests.lab.small_study import small_spec
from tests.lab.test_progress import FACTS
from thalweg.lab.execution.schedule import tasks_of
from thalweg.lab.preparing import disk_of


def test_disk_grows_with_checkpoints_and_saved_bases() -> None:
    spec = small_spec()
    plain = disk_of(spec, tasks_of(spec), FACTS)
    with_bases = small_spec({"checkpoint.save_bases": True})
    # 12 steps, every 4: 3 regular and the last.
    more = disk_of(with_bases, tasks_of(with_bases), FACTS) - plain
    assert more == 4 * 4 * FACTS.k * FACTS.num_parameters * 4
    assert disk_of(small_spec({"checkpoint.keep": 5}), tasks_of(spec), FACTS) > plain


def test_the_vectors_of_a_split_on_updates_take_room_in_checkpoints() -> None:
    split = {"bulk": 2.0, "source": {"name": "updates", "window": 16}}
    cheap = small_spec({"branches.bulk-sgd.split": split})
    plain = disk_of(small_spec(), tasks_of(cheap), FACTS)
    more = disk_of(cheap, tasks_of(cheap), FACTS) - plain
    # 16 vectors and 4 directions of float32 numbers in each of three checkpoints.
    assert more >= 3 * 20 * 4 * FACTS.num_parameters
