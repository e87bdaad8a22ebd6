"""Specs that are hostile or wrong: refused in one line, in little memory and time."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.bounded import in_bounded_memory
from thalweg.errors import InvalidInput, without_controls
from thalweg.lab.config import load_spec, parse_spec
from thalweg.lab.tables import parse_toml
from thalweg.limits import limit

MINIMAL: dict[str, Any] = {
    "problem": {"data": "digits", "model": "mlp", "loss": "mse"},
    "phases": [{"optimizer": {"name": "sgd", "lr": 0.1}, "steps": 1}],
}
TEXT = """
[problem]
data = "digits"
model = "mlp"
loss = "mse"
[[phases]]
optimizer = { name = "sgd", lr = 0.1 }
steps = 1
"""


def refused(text: str | bytes, folder: Path, *overrides: str) -> str:
    """The message about a spec with that text, which is one line."""
    path = folder / "given.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(InvalidInput) as caught:
        load_spec(path, overrides)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 2000
    return message


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a" + ".a" * 20_000 + " = 1", "at most 32"),
        ("[a" + ".a" * 20_000 + "]", "at most 32"),
        ("x = " + "[" * 5000 + "]" * 5000, "at most 32"),
        ("x = " + "{a=" * 5000 + "1" + "}" * 5000, "at most 32"),
        ('x = ["""a"""", {a' + ".a" * 20_000 + ' = ""}]', "at most 32"),
        ("seeds = [" + "0," * 600_000 + "]", "spec_bytes"),
        ("seeds = [" + "0," * 110_000 + "]", "spec_values"),
        ("k = " + "9" * 5000, "64 bits"),
        ("k = 0x" + "f" * 5000, "64 bits"),
        ("k = 9223372036854775808", "64 bits"),
        ("d = 2020-02-31", "Invalid date"),
        ('like = ["digits"]', "extends"),
        ('extends = { a = "digits" }', "extends"),
        (b'name = "\xff"', "UTF-8"),
        ('description = "\\u001b[31m"', "control characters"),
        ('"\\u001b[31m" = 1', "control characters"),
        ('description = "\\u202e"', "control characters"),
        ("".join(f"[[phases]]\nsteps = {n}\n" for n in range(1001)), "1,001 phases"),
    ],
    ids=lambda given: str(given)[:24],
)
def test_hostile_text_is_refused_in_one_line(text: str | bytes, said: str, tmp_path: Path) -> None:
    begun = time.process_time()
    assert said in refused(text, tmp_path)
    assert time.process_time() - begun < 2


def test_a_key_of_a_hundred_thousand_dots_takes_little_memory(tmp_path: Path) -> None:
    (tmp_path / "deep.toml").write_text("a" + ".a" * 100_000 + " = 1")
    said = in_bounded_memory(
        "from thalweg.lab.config import load_spec; load_spec(PATH)", tmp_path / "deep.toml"
    )
    assert "InvalidInput" in said
    assert "dots of a key" in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--subspace.k", "9" * 5000), "integer"),
        (("--subspace.k", str(2**64)), "64 bits"),
        (("--subspace.k", "0x" + "f" * 5000), "64 bits"),
        (("--seeds", str(10**30)), "64 bits"),
        (("--" + "a." * 20_000 + "a", "1"), "20000 dots"),
        (("--subspace", "{" + "a." * 20_000 + "a = 1}"), "at most 32"),
        (("--seeds", "[" * 5000), "at most 32"),
        (("--phases.0." + "9" * 5000, "1"), "no such key"),
        (("--threads", "100000"), "1024"),
        (("--description", "\x1b[31m"), "control characters"),
        (("--name", "\udcff"), "control characters"),
    ],
    ids=lambda given: str(given)[:24],
)
def test_hostile_words_of_the_command_line_are_refused_in_one_line(
    words: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    assert said in refused(TEXT, tmp_path, *words)


def test_a_spec_from_python_is_held_to_the_same() -> None:
    endless: dict[str, Any] = {}
    endless["a"] = endless
    for raw in (endless, {1: 2}, {"threads": 2**70}, {"seeds": [[[]]]}, [], None):
        with pytest.raises(InvalidInput):
            parse_spec(raw)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="64 bits"):
        parse_spec(MINIMAL, overrides={"subspace.k": 10**5000})


def chained(number: int) -> dict[str, Any]:
    branches = {f"b{n}": {"steps": 1, "starts_from": f"b{n - 1}"} for n in range(number)}
    branches["b0"].pop("starts_from")
    return {**MINIMAL, "branches": dict(reversed(branches.items()))}


def test_chained_branches_are_laid_over_each_other_in_time_that_grows_with_their_number() -> None:
    begun = time.process_time()
    with pytest.raises(InvalidInput, match="less than 100 before it"):
        parse_spec(chained(1000))
    assert time.process_time() - begun < 5
    assert list(parse_spec(chained(100)).branches) == [f"b{n}" for n in reversed(range(100))]


def test_a_file_of_mistakes_is_told_in_few_lines() -> None:
    raw = {**MINIMAL, "seeds": ["a"] * 50_000, **{f"key{n}": n for n in range(500)}}
    begun = time.process_time()
    with pytest.raises(InvalidInput) as caught:
        parse_spec(raw)
    lines = str(caught.value).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "spec: more mistakes than these 20"
    assert time.process_time() - begun < 5


@pytest.mark.parametrize(
    "name",
    [
        *("con", "CON", "nul.txt", "com1", "lpt9", "aux"),
        *("a.", "a ", ".a", "_a", "-a", "..", "a/b", "a\\b", "a:b", "a|b", "a?", "a*", "<a>", 'a"'),
        "é",
        "",
    ],
)
def test_a_name_that_no_folder_can_have_everywhere_is_refused_where_the_spec_is_read(
    name: str,
) -> None:
    for raw in ({"branches": {name: {"steps": 1}}}, {"name": name}):
        with pytest.raises(InvalidInput, match="name") as caught:
            parse_spec({**MINIMAL, **raw})
        assert "Windows" in str(caught.value)


def test_names_of_folders_that_are_fine_stay_fine() -> None:
    for name in ("console", "com", "bulk-sgd", "0.1", "lr0.1_b", "nul-1"):
        assert name in parse_spec({**MINIMAL, "branches": {name: {"steps": 1}}}).branches


def test_a_limit_can_be_raised_and_its_setting_is_read_strictly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    deep = "a" + ".a" * 40 + " = 1"
    with pytest.raises(InvalidInput, match="THALWEG_LIMITS=spec_depth=40"):
        parse_toml(deep, "given")
    monkeypatch.setenv("THALWEG_LIMITS", "spec_depth=40, json_bytes=1e9")
    assert "a" in parse_toml(deep, "given")
    assert limit("json_bytes") == 10**9
    for setting in (
        "spec_dept=40",
        "spec_depth=4000",
        "spec_depth=x",
        "spec_depth",
        "json_bytes=nan",
    ):
        monkeypatch.setenv("THALWEG_LIMITS", setting)
        with pytest.raises(InvalidInput, match="THALWEG_LIMITS"):
            limit("spec_bytes")


def test_controls_are_written_out_and_other_text_is_left_alone() -> None:
    assert without_controls("a\x1b[31m\x9b\u202e\udcff") == "a\\x1b[31m\\x9b\\u202e\\udcff"
    assert without_controls("é ∞\n\t漢") == "é ∞\n\t漢"
