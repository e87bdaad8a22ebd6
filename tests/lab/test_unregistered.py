from __future__ import annotations

from pathlib import Path

import pytest

from tests.lab.small_study import RAW
from thalweg.errors import InvalidInput
from thalweg.lab.config import dump_spec, parse_spec
from thalweg.lab.preparing import read_spec
from thalweg.lab.sharing import plugins_in, this_maker
from thalweg.lab.store import StudyFolder
from thalweg.lab.study import resume
from thalweg.lab.unregistered import require_registered

FOREIGN = """
figures = ["my-figure", "training-loss"]
claims = ["my-claim", { name = "gradient-aligns" }]
[problem]
loss = "mse"
[problem.data]
name = "my-data"
[problem.model]
name = "mlp"
[[phases]]
optimizer = "my-optimizer"
[branches.a]
schedule = { name = "my-schedule" }
[branches.a.probes]
my-probe = 3
loss = "off"
"""


@pytest.fixture
def study(tmp_path: Path) -> StudyFolder:
    return StudyFolder.create(tmp_path, "foreign", FOREIGN)


def test_every_name_that_nothing_registers_is_told(study: StudyFolder) -> None:
    with pytest.raises(InvalidInput) as caught:
        require_registered(study)
    assert str(caught.value) == (
        f"{study.path}: data set 'my-data', optimizer 'my-optimizer', schedule 'my-schedule', probe"
        " 'my-probe', claim 'my-claim', figure 'my-figure': not registered; give the plugin that"
        " registers it with --plugin FILE"
    )


def test_a_plugin_that_made_the_runs_is_named(study: StudyFolder, tmp_path: Path) -> None:
    plugin = tmp_path / "my plugin.py"
    plugin.write_text("", encoding="utf-8")
    maker = f"{this_maker('cpu')}, then {this_maker('cpu', [str(plugin)])}"
    study.run(0, "trunk").create(f'maker = "{maker}"\n')
    assert plugins_in(study) == ["my plugin.py"]
    for refused in (lambda: resume("foreign", root=tmp_path), lambda: read_spec(study)):
        with pytest.raises(InvalidInput, match=r"its runs were made with: my plugin\.py$"):
            refused()


def test_a_study_of_built_in_things_lacks_nothing(tmp_path: Path) -> None:
    spec = parse_spec({**RAW, "branches": {"a": {"probes": {"loss": "off"}}}})
    require_registered(StudyFolder.create(tmp_path, "plain", dump_spec(spec)))


def test_another_mistake_is_told_as_what_it_is(tmp_path: Path) -> None:
    text = dump_spec(parse_spec(RAW)).replace("batch_size = 20", "batch_size = 0")
    with pytest.raises(InvalidInput, match="batch_size: got 0"):
        read_spec(StudyFolder.create(tmp_path, "wrong", text))
