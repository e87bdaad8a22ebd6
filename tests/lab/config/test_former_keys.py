"""Keys of specs as they were called before are read, and their new names are told."""

from __future__ import annotations

import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest

from thalweg.errors import InvalidInput
from thalweg.lab.config import dump_spec, load_spec, parse_spec, spec_hash
from thalweg.lab.config.former_keys import FORMAT, with_former_keys, with_present_keys

RAW: dict[str, Any] = {
    "problem": {"data": "digits", "model": "mlp", "loss": "mse"},
    "phases": [{"optimizer": {"name": "sgd", "lr": 0.1}, "steps": 5, "alignment_average": 0.8}],
    "branches": {"a": {"alignment_average": 0.7}, "b": {"after": "a"}},
}
PRESENT: dict[str, Any] = {
    **RAW,
    "phases": [{"optimizer": {"name": "sgd", "lr": 0.1}, "steps": 5, "alignment_ema": 0.8}],
    "branches": {"a": {"alignment_ema": 0.7}, "b": {"starts_from": "a"}},
}


def test_former_keys_are_read_and_each_warning_names_the_new_one() -> None:
    with pytest.warns(DeprecationWarning, match="is called") as caught:
        spec = parse_spec(RAW, source="my.toml")
    assert spec == parse_spec(PRESENT)
    assert spec_hash(spec) == spec_hash(parse_spec(PRESENT))
    messages = [str(warning.message) for warning in caught]
    assert messages[0] == "my.toml: the key 'alignment_average' is called 'alignment_ema' now"
    assert messages[-1] == "my.toml: the key 'after' is called 'starts_from' now"


def test_former_keys_are_read_on_the_command_line() -> None:
    with pytest.warns(DeprecationWarning, match="command line: the key 'alignment_average'"):
        spec = parse_spec(PRESENT, overrides=["--phases.0.alignment_average", "0.5"])
    assert spec.phases[0].alignment_ema == 0.5


def test_a_file_can_still_be_like_a_built_in_spec(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('like = "digits"\n')
    with pytest.warns(DeprecationWarning, match="'like' is called 'extends' now"):
        assert load_spec(file) == load_spec("digits")


def test_present_keys_warn_of_nothing_and_are_left_as_they_are() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert with_present_keys(PRESENT, "spec") == PRESENT
    table = {"starts_from": "a", "alignment_ema": 0.7, "steps": 3}
    assert with_former_keys(table) == {"after": "a", "alignment_average": 0.7, "steps": 3}


def test_a_written_spec_says_its_format_and_a_later_one_is_refused() -> None:
    written = tomllib.loads(dump_spec(parse_spec(PRESENT)))
    assert next(iter(written)) == "format"
    assert parse_spec({**written, "format": 1}) == parse_spec(written)
    for later in (FORMAT + 1, "2", 0):
        with pytest.raises(InvalidInput, match=r"my.toml: format: got .*, allowed: 1 to 2"):
            parse_spec({**written, "format": later}, source="my.toml")
