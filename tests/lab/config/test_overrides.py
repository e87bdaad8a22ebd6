from __future__ import annotations

from typing import Any

import pytest

from tests.lab.stand_ins import RAW, stand_ins
from thalweg.errors import InvalidInput, NotNeeded
from thalweg.lab.config.loading import Spec, parse_spec
from thalweg.lab.config.overrides import Words, apply_overrides, parse_overrides
from thalweg.registry import datasets
from thalweg.settings import Settings

__all__ = ["stand_ins"]

pytestmark = pytest.mark.usefixtures("stand_ins")

BRANCHED: dict[str, Any] = {
    **RAW,
    "phases": [{**RAW["phases"][0], "name": "warm-up"}, {**RAW["phases"][0], "name": "main"}],
    "branches": {"bulk-sgd": {"steps": 50}, "lr0.1": {"steps": 50}},
    "probes": {"test": 10},
}


def changed(*words: str) -> dict[str, Any]:
    return apply_overrides(BRANCHED, parse_overrides(words), Spec)[0]


def spec(*words: str) -> Spec:
    return parse_spec(BRANCHED, overrides=words)


def error_of(*words: str) -> str:
    with pytest.raises(InvalidInput) as caught:
        spec(*words)
    return str(caught.value)


def test_an_option_has_its_words_up_to_the_next_one():
    assert parse_overrides(["--seeds", "0", "-1", "--lr=0.1", "--flag", "--x=a=b", "c"]) == {
        "seeds": Words(("0", "-1")),
        "lr": Words(("0.1",)),
        "flag": Words(()),
        "x": Words(("a=b", "c")),
    }


def test_the_last_of_two_equal_options_holds():
    assert parse_overrides(["--lr", "1", "--k", "2", "--lr", "3"])["lr"] == ("3",)


def test_a_word_without_an_option_is_refused():
    assert error_of("0.1") == "command line: got '0.1', allowed: --KEY VALUE; put its key first"


@pytest.mark.parametrize(
    "words",
    [
        ("--phases.0.optimizer.lr", "0.1"),
        ("--phases.0.optimizer.lr=0.1",),
        ("--phases.0.optimizer.lr=1e-1",),
        ("--phases.warm-up.optimizer.lr", "0.1"),
        ("--phases.warm_up.optimizer.lr", "0.1"),
    ],
)
def test_a_phase_goes_by_number_or_by_name(words: tuple[str, ...]):
    assert [phase.optimizer.lr for phase in spec(*words).phases] == [0.1, 0.05]


@pytest.mark.parametrize(
    "words",
    [
        ("--seeds", "0", "1", "2"),
        ("--seeds", "0,1,2"),
        ("--seeds=0,1,2",),
        ("--seeds", "[0, 1, 2]"),
        ("--seed", "0", "1", "2"),
    ],
)
def test_an_array_is_given_in_words_with_commas_or_in_brackets(words: tuple[str, ...]):
    assert spec(*words).seeds == (0, 1, 2)


def test_one_word_makes_an_array_of_one_where_an_array_is_due():
    assert spec("--seeds", "7").seeds == (7,)
    assert spec("--claims", "gradient-aligns").claims == ("gradient-aligns",)
    assert spec("--problem.model.hidden", "30").problem.model.hidden == (30,)  # type: ignore[attr-defined]


def test_words_are_text_where_text_is_due():
    assert spec("--name", "123").name == "123"
    assert spec("--description", "true, or 1,2").description == "true, or 1,2"
    assert spec("--data-dir", "a,b").problem.data.data_dir == "a,b"  # type: ignore[attr-defined]


def test_words_are_values_of_toml_elsewhere():
    assert spec("--subspace.k", "gap").subspace.k == "gap"
    assert spec("--subspace.k", "3").subspace.k == 3
    assert spec("--batch-size", "all").phases[0].batch_size == "all"
    assert spec("--phases.0.steps", "1_000").phases[0].steps == 1000
    split = spec("--branches.bulk-sgd.split", "{ dominant = 0.5 }").branch_phase("bulk-sgd").split
    assert split is not None
    assert split.dominant == 0.5


def test_a_word_cannot_smuggle_in_another_key():
    assert error_of("--threads", "1\nseeds = [9]").startswith("command line: threads: got '1\\n")


def test_an_option_without_words_is_true_where_that_can_be():
    assert spec("--problem.balanced").problem.balanced
    assert spec("--checkpoint.save-bases").checkpoint.save_bases
    assert error_of("--lr") == "command line: --lr: no value, allowed: a number > 0"


def test_dashes_and_underscores_are_the_same_in_keys_and_known_names():
    assert spec("--phases.0.until-loss", "0.1").phases[0].until_loss == 0.1
    assert set(changed("--branches.bulk_sgd.batch-size", "9")["branches"]) == {"bulk-sgd", "lr0.1"}


def test_a_known_name_may_have_dots():
    assert spec("--branches.lr0.1.optimizer.lr", "0.1").branch_phase("lr0.1").optimizer.lr == 0.1


def test_a_new_branch_is_a_whole_table_and_a_new_probe_is_a_registered_one():
    words = ("--branches.dom-sgd", "{ split = { bulk = 0 } }", "--branches.dom-sgd.steps", "5")
    made = spec(*words, "--probes.loss", "5")
    branch = made.branch_phase("dom-sgd")
    assert branch.split is not None
    assert (branch.split.bulk, branch.steps) == (0, 5)
    assert made.probes == {"test": 10, "loss": 5}


def test_a_misspelt_branch_or_probe_is_refused_with_the_nearest_name():
    assert error_of("--branches.bulk-sdg.steps", "5") == (
        "command line: --branches.bulk-sdg.steps: no branch 'bulk-sdg', allowed: one of the spec's"
        " branches bulk-sgd, lr0.1; did you mean 'bulk-sgd'?"
    )
    assert error_of("--branches.other.steps", "5").endswith(
        'lr0.1; a new branch is a whole table: --branches.NAME "{ split = { bulk = 0 } }"'
    )
    assert error_of("--probes.sharpnes", "5").endswith("; did you mean 'sharpness'?")
    with pytest.raises(InvalidInput, match="no branch 'sgd', allowed: none"):
        parse_spec(RAW, overrides={"branches.sgd.steps": 5})


@pytest.mark.parametrize("words", ["0..4", "0..2,3,4", "0,1,2..4", "0..4,"])
def test_seeds_can_be_a_range_with_both_ends(words: str):
    assert spec("--seeds", words).seeds == (0, 1, 2, 3, 4)
    assert spec("--seeds", words, "9").seeds == (0, 1, 2, 3, 4, 9)


def test_a_range_that_is_none_is_refused():
    assert error_of("--seeds", "4..2").endswith("allowed: the smaller seed first, 2..4")
    assert "100,000" in error_of("--seeds", "0..99999999999")
    assert error_of("--seeds", "1..").startswith("command line: seeds.0: got '1..'")
    assert error_of("--problem.model.hidden", "1..2").startswith("command line: problem.model")


def test_a_key_of_a_phase_is_that_of_every_phase():
    made = spec("--optimizer.momentum", "0.5", "--clip-norm", "3", "--split.bulk", "0.1")
    assert [phase.optimizer.momentum for phase in made.phases] == [0.5, 0.5]  # type: ignore[attr-defined]
    assert [phase.clip_norm for phase in made.phases] == [3, 3]
    splits = [phase.split for phase in made.phases]
    assert [split.bulk for split in splits if split is not None] == [0.1, 0.1]


def test_a_key_of_one_phase_holds_against_that_of_every_phase():
    for words in (("--phases.0.clip-norm", "1", "--clip-norm", "2"),):
        assert [phase.clip_norm for phase in spec(*words).phases] == [1, 2]
    assert spec("--name", "mine").name == "mine"


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("learning-rate", "--lr"),
        ("learning_rate", "--lr"),
        ("optimizer.learning-rate", "'lr'"),
        ("phases.0.learning-rate", "--lr"),
        ("optimiser.lr", "--optimizer"),
        ("momentum", "--optimizer.momentum"),
        ("bs", "--batch_size"),
        ("iterations", "--steps"),
        ("num-samples", "--samples"),
        ("random-seed", "'seeds'"),
    ],
)
def test_other_words_for_a_key_lead_to_it(word: str, meant: str):
    assert error_of(f"--{word}", "1").endswith(f"; did you mean {meant}?")


def test_a_folder_of_data_is_left_aside_where_none_is_read():
    @datasets.register("bare")
    class Bare(Settings):
        def build(self) -> str:
            return "bare"

    words = ["--problem.data", "bare"]
    with pytest.warns(NotNeeded, match="data_dir: not needed, the data set bare reads no files"):
        made = spec(*words, "--data-dir", "somewhere")
    assert made == spec(*words)
    assert error_of(*words, "--problem.data.data_dir", "x").startswith(
        "command line: problem.data.data_dir: no such key"
    )
    assert spec("--data-dir", "x").problem.data.data_dir == "x"  # type: ignore[attr-defined]


def test_unset_takes_back_what_the_file_says():
    made = spec("--probes.test", "unset", "--problem.samples=unset", "--branches.lr0.1", "unset")
    assert made.probes == {}
    assert made.problem.samples is None
    assert list(made.branches) == ["bulk-sgd"]


def test_steps_on_the_command_line_replace_the_files_epochs_and_the_reverse():
    epochs = spec("--phases.0.epochs", "3").phases[0]
    assert (epochs.steps, epochs.epochs) == (None, 3)
    both = error_of("--phases.0.epochs", "3", "--phases.0.steps", "4")
    assert both.startswith("command line: phases.0.epochs: got 3, allowed: either steps or epochs")


def test_short_forms_stand_for_every_phase_or_every_branch():
    made = spec("--lr", "0.2", "--batch-size", "9", "--steps", "7", "--samples", "90", "--k", "2")
    assert [phase.optimizer.lr for phase in made.phases] == [0.2, 0.2]
    assert [phase.batch_size for phase in made.phases] == [9, 9]
    assert [branch.steps for branch in made.branches.values()] == [7, 7]
    assert (made.problem.samples, made.subspace.k) == (90, 2)


def test_the_more_precise_option_holds_whatever_the_order():
    first = ("--phases.0.optimizer.lr", "0.3")
    for words in ((*first, "--lr", "0.2"), ("--lr", "0.2", *first)):
        assert [phase.optimizer.lr for phase in spec(*words).phases] == [0.3, 0.2]
    table = ("--phases.0.optimizer", "adam", "--phases.0.optimizer.lr", "0.01")
    for words in (table, table[2:] + table[:2]):
        optimizer = spec(*words).phases[0].optimizer
        assert (optimizer.registered_name, optimizer.lr) == ("adam", 0.01)


def test_a_setting_can_be_added_to_a_choice_that_is_a_bare_name():
    assert spec("--problem.loss.factor", "1.0").problem.loss.factor == 1.0  # type: ignore[attr-defined]


def test_values_from_python_are_taken_as_they_are():
    made = parse_spec(BRANCHED, overrides={"seeds": [3], "phases.main.optimizer.lr": 0.5})
    assert made.seeds == (3,)
    assert made.phases[1].optimizer.lr == 0.5


def test_an_unknown_phase_names_the_known_ones():
    assert error_of("--phases.mian.steps", "3") == (
        "command line: --phases.mian.steps: no phase 'mian', allowed: one of 0, 1, warm-up, main; "
        "did you mean 'main'?"
    )
    assert error_of("--phases.2.steps", "3").startswith("command line: --phases.2.steps: no phase")


def test_a_path_that_leads_nowhere_is_told():
    assert error_of("--phases..steps", "3").startswith("command line: --phases..steps: a key path")
    no_branches = "command line: --steps: the spec has no branches"
    with pytest.raises(InvalidInput, match=no_branches):
        parse_spec(RAW, overrides=["--steps", "5"])
    assert error_of("--problem.model.hidden.7", "1") == (
        "command line: --problem.model.hidden.7: got '7', allowed: a number below 2 after "
        "problem.model.hidden"
    )


def test_an_item_of_an_array_can_be_changed():
    assert spec("--problem.model.hidden.1", "7").problem.model.hidden == (20, 7)  # type: ignore[attr-defined]
