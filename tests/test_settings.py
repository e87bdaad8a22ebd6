from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field, ValidationError, model_validator

from thalweg.errors import InvalidInput
from thalweg.registry import Registry, load_plugin
from thalweg.settings import Choice, Settings, SpecModel, bad_value

models: Registry[Any] = Registry("model", fit="thalweg.settings:registered")


@models.register("mlp")
class MLP(Settings):
    hidden: tuple[int, ...] = (200, 200)
    bias: bool = True
    scale: float | None = None

    def build(self) -> int:
        return sum(self.hidden)


@models.register("linear")
class Linear(Settings):
    def build(self) -> int:
        return 0


class Holder(SpecModel):
    model: Annotated[Settings, Choice(models)]


def read(value: Any) -> Settings:
    return Holder.model_validate({"model": value}).model


def errors_of(value: Any) -> list[tuple[str, tuple[str | int, ...]]]:
    with pytest.raises(ValidationError) as caught:
        read(value)
    return [(error["type"], error["loc"]) for error in caught.value.errors()]


def test_a_table_with_a_name_becomes_an_instance_that_builds():
    assert read({"name": "mlp", "hidden": [3, 4]}) == MLP(hidden=(3, 4))
    assert read({"name": "mlp", "hidden": [3, 4]}).build() == 7


def test_a_bare_name_stands_for_the_defaults():
    assert read("mlp") == MLP()


def test_an_instance_is_taken_as_it_is():
    instance = MLP(hidden=(1,))
    assert read(instance) is instance


def test_an_instance_of_another_registry_is_refused():
    class Stranger(Settings):
        pass

    assert errors_of(Stranger()) == [("choice_type", ("model",))]


def test_a_choice_is_written_as_a_table_with_its_name_first():
    written = Holder(model=MLP(hidden=(5,))).model_dump(mode="json", exclude_none=True)
    assert list(written["model"].items()) == [("name", "mlp"), ("hidden", [5]), ("bias", True)]


def test_errors_of_a_choice_have_the_users_key_path():
    assert errors_of("mpl") == [("choice_unknown", ("model",))]
    assert errors_of({"name": "mpl"}) == [("choice_unknown", ("model", "name"))]
    assert errors_of({"hidden": [3]}) == [("choice_missing", ("model", "name"))]
    assert errors_of(3) == [("choice_type", ("model",))]
    assert errors_of({"name": "mlp", "hidden": ["x"]}) == [("int_type", ("model", "hidden", 0))]
    assert errors_of({"name": "mlp", "widht": 1}) == [("extra_forbidden", ("model", "widht"))]


@pytest.mark.parametrize("value", ["true", 1, "1"])
def test_text_and_numbers_are_not_taken_for_truth_values(value: Any):
    assert errors_of({"name": "mlp", "bias": value}) == [("bool_type", ("model", "bias"))]


@pytest.mark.parametrize("value", [True, "3", 3.0])
def test_only_integers_are_integers(value: Any):
    assert errors_of({"name": "mlp", "hidden": [value]}) == [("int_type", ("model", "hidden", 0))]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_are_finite(value: float):
    assert errors_of({"name": "mlp", "scale": value}) == [("finite_number", ("model", "scale"))]


def test_settings_are_frozen():
    with pytest.raises(ValidationError):
        MLP().hidden = (1,)  # type: ignore[misc]


def test_a_name_is_registered_once():
    with pytest.raises(
        InvalidInput, match=r"^model name: got 'mlp', .* already by .*\.MLP; choose another"
    ):
        models.register("mlp")(Linear)


@pytest.mark.parametrize("name", ["", ".hidden", "../up", "a/b", "a b", "mlp\n"])
def test_a_name_that_leaves_its_folder_is_refused(name: str):
    with pytest.raises(InvalidInput, match="name of a model"):
        models.register(name)(Linear)


def test_a_class_without_the_builders_method_is_refused():
    class Empty(Settings):
        pass

    with pytest.raises(InvalidInput, match=r"^model 'empty': class Empty has no method build$"):
        models.register("empty")(Empty)


def test_a_field_called_name_is_refused():
    class Named(Settings):
        name: str = ""

        def build(self) -> None: ...

    with pytest.raises(InvalidInput, match="a field cannot be called 'name'"):
        models.register("named")(Named)


def test_a_class_that_is_no_settings_is_refused():
    with pytest.raises(InvalidInput, match=r"is not a subclass of thalweg\.settings\.Settings"):
        models.register("int")(int)  # type: ignore[type-var]


def test_the_names_are_sorted_and_looked_up():
    assert models.names() == ("linear", "mlp")
    assert "mlp" in models
    assert "nothing" not in models
    assert len(models) == 2
    assert models.find("mlp") is MLP


def test_an_unknown_name_gives_the_nearest_known_one():
    with pytest.raises(InvalidInput) as caught:
        models.find("linaer")
    assert str(caught.value) == (
        "model: got 'linaer', allowed: one of linear, mlp; did you mean 'linear'?"
    )


def test_a_check_across_fields_names_the_field_at_fault():
    class Pair(SpecModel):
        low: int = 0
        high: Annotated[int, Field(ge=0)] = 1

        @model_validator(mode="after")
        def _ordered(self) -> Pair:
            if self.low >= self.high:
                raise bad_value("low", self.low, "less than high")
            return self

    class Outer(SpecModel):
        pairs: tuple[Pair, ...]

    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"pairs": [{}, {"low": 3, "high": 2}]})
    (error,) = caught.value.errors()
    assert error["loc"] == ("pairs", 1, "low")
    assert error["type"] == "bad_value"


PLUGIN = """
from thalweg.settings import Settings
from thalweg.registry import models

@models.register({name!r})
class Mine(Settings):
    def build(self):
        return "mine"
"""


@pytest.fixture
def built_in_models(monkeypatch: pytest.MonkeyPatch) -> Registry[Settings]:
    from thalweg import registry

    monkeypatch.setattr(registry.models, "_entries", dict(registry.models._entries))
    return registry.models


def test_a_plugin_file_registers_its_classes_once(
    tmp_path: Path, built_in_models: Registry[Settings]
):
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN.format(name="from-file"))
    load_plugin(str(path))
    load_plugin(str(path))
    assert built_in_models.get("from-file")().build() == "mine"


def test_a_plugin_module_is_found_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built_in_models: Registry[Settings]
):
    (tmp_path / "thalweg_test_plugin.py").write_text(PLUGIN.format(name="from-module"))
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    load_plugin("thalweg_test_plugin")
    assert "from-module" in built_in_models
    assert sys.path == before


def test_a_plugin_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(InvalidInput, match=r"^plugin 'no_such_module': ModuleNotFoundError: No "):
        load_plugin("no_such_module")
    with pytest.raises(InvalidInput, match=r"none\.py': no such file; give a \.py file or the"):
        load_plugin(str(tmp_path / "none.py"))


def test_a_plugin_that_fails_says_in_which_line_and_can_be_loaded_once_mended(
    tmp_path: Path, built_in_models: Registry[Settings]
):
    path = tmp_path / "broken.py"
    path.write_text("import math\n\nmath.sqrt('x')\n")
    with pytest.raises(InvalidInput, match=r": TypeError: .* \(line 3 of broken\.py\)$"):
        load_plugin(str(path))
    path.write_text("x = (\n")
    with pytest.raises(InvalidInput, match=r": SyntaxError in .*broken\.py, line 1: '\(' was"):
        load_plugin(str(path))
    path.write_text(PLUGIN.format(name="mended"))
    load_plugin(str(path))
    assert "mended" in built_in_models


def test_a_plugin_that_takes_a_name_again_says_so(
    tmp_path: Path, built_in_models: Registry[Settings]
):
    for name in ("first.py", "second.py"):
        (tmp_path / name).write_text(PLUGIN.format(name="twice"))
    load_plugin(str(tmp_path / "first.py"))
    with pytest.raises(InvalidInput, match=r"second\.py': model name: got 'twice', .* already"):
        load_plugin(str(tmp_path / "second.py"))


def test_reading_a_spec_imports_no_torch():
    code = (
        "import sys; from thalweg.lab.config import load_spec; load_spec('digits'); "
        "heavy = {'torch', 'pandas', 'matplotlib', 'plotly'} & set(sys.modules); "
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.returncode == 0
