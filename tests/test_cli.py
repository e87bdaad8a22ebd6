"""The command line from end to end: every command, what goes where, exit statuses, mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import thalweg
from tests.lab.small_study import PLUGIN, RAW, begin, in_a_process
from tests.sampling import few
from thalweg.cli import build_parser, main
from thalweg.lab.config import parse_spec
from thalweg.lab.store import StudyFolder, find_studies
from thalweg.lab.store.lock import locked
from thalweg.lab.store.status import Status

VERBS = ["reproduce", "run", "resume", "report", "stop-phase", "list", "show", "compare", "claims"]
VERBS += ["check", "inspect", "spec", "env", "completion", "sweep", "work"]
TINY: dict[str, Any] = {
    **RAW,
    "name": "tiny",
    "figures": ["training-loss"],
    "claims": ["gradient-aligns"],
    "phases": [{"optimizer": {"name": "sgd", "lr": 0.05}, "batch_size": 20, "steps": 4}],
    "branches": {"sgd": {"steps": 4}, "bulk-sgd": {"steps": 4, "split": {"dominant": 0.0}}},
    "probes": {"loss": 1, "alignment_gradient": 2, "sharpness": 2},
}


@dataclass
class Answer:
    """What a command said, and its exit status."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a mistake."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        assert self.out == ""
        return lines[0]


class Command:
    """Calls `thalweg` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: str | Path) -> Answer:
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        said = self._capsys.readouterr()
        return Answer(int(ended.value.code or 0), said.out, said.err)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """The folder of a finished small study, and how the process that made it ended."""
    root = tmp_path_factory.mktemp("cli")
    spec = write_spec(root / "tiny.toml")
    words = ["run", str(spec), "--root", str(root / "runs"), "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "thalweg", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
    )
    process.wait(timeout=100)
    yield root / "runs", process
    for stream in (process.stdout, process.stderr):
        assert stream is not None
        stream.close()


def write_spec(path: Path, **changes: Any) -> Path:
    path.write_text(tomli_w.dumps({**TINY, **changes}), encoding="utf-8")
    return path


def study_in(root: Path) -> StudyFolder:
    (study,) = find_studies(root)
    return study


def test_a_run_gives_verdicts_as_json_on_stdout_and_words_on_stderr(
    done: tuple[Path, subprocess.Popen[str]],
) -> None:
    root, process = done
    assert process.stdout is not None
    assert process.stderr is not None
    result, words = json.loads(process.stdout.read()), process.stderr.read()
    assert process.returncode == result["exit_code"] == 0, words
    assert [verdict["claim"] for verdict in result["verdicts"]] == ["gradient-aligns"]
    assert Path(result["report"]).is_file()
    assert list((study_in(root).path / "figures").glob("*.png"))
    assert "3 runs, " in words
    assert "seed 0 bulk-sgd: done at step 8, loss " in words
    assert "\x1b" not in words, "no terminal, so no control codes"


def test_the_report_can_be_made_anew_and_its_table_fits_a_narrow_terminal(
    done: tuple[Path, object], command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    answer = command("report", "tiny", "--root", done[0])
    assert answer.status == 0, answer.err
    assert "undecided" in answer.out
    table = [line for line in answer.out.splitlines() if not line.startswith(("figures", "report"))]
    assert max(map(len, table)) <= 50


def test_a_study_that_is_done_is_not_run_again(done: tuple[Path, object], command: Command) -> None:
    root = done[0]
    log = study_in(root).run(0, "sgd").path / "log.txt"
    before = log.read_text(encoding="utf-8")
    answer = command("run", root.parent / "tiny.toml", "--root", root)
    assert answer.status == 0
    assert "all runs are done" in answer.err
    assert log.read_text(encoding="utf-8") == before
    assert command("resume", "tiny", "--root", root, "-q").err == ""


def test_list_show_compare_and_claims_show_what_is_there(
    done: tuple[Path, object], command: Command
) -> None:
    root = done[0]
    name = study_in(root).name
    listed = command("list", "--root", root)
    assert listed.out.splitlines()[0].startswith(f"{name}/seed-0/trunk  done  step 4, loss ")
    rows = json.loads(command("list", "--root", root, "--json").out)
    assert [row["run"].rpartition("/")[2] for row in rows] == ["trunk", "bulk-sgd", "sgd"]
    assert "done at step 8" in command("show", "tiny", "--root", root).out
    shown = json.loads(command("show", f"{name}/seed-0/sgd", "--root", root, "--json").out)
    assert (shown["state"], shown["step"], len(shown["eigenvalues"])) == ("done", 8, 3)
    runs = [f"{name}/seed-0/{branch}" for branch in ("sgd", "bulk-sgd")]
    assert "loss" in command("compare", *runs, "--root", root).out
    table = json.loads(command("compare", *runs, "--root", root, "--json").out)
    assert table["step"] == dict.fromkeys(runs, 8)
    assert f"last verdict in {name}: " in command("claims", "--root", root).out
    claims = json.loads(command("claims", "--root", root, "--json").out)
    assert {"claim", "rule", "source", "verdicts"} <= claims[0].keys()


def test_spec_list_env_version_and_completion_answer_on_stdout(command: Command) -> None:
    assert "digits" in command("spec", "list").out
    shown = tomllib.loads(command("spec", "show", "digits", "--lr", "0.2").out)
    assert shown["phases"][0]["optimizer"]["lr"] == 0.2
    assert "torch: " in command("env").out
    assert json.loads(command("env", "--json").out)["thalweg"] == thalweg.__version__
    assert command("--version").out == f"thalweg {thalweg.__version__}\n"
    assert "reproduce" in command("completion", "bash").out


def test_a_dry_run_prints_the_resolved_spec_and_makes_nothing(
    command: Command, tmp_path: Path
) -> None:
    root = tmp_path / "runs"
    answer = command("reproduce", "--steps", "7", "--dry-run", "--root", root)
    assert answer.status == 0
    assert answer.err == ""
    assert tomllib.loads(answer.out)["branches"]["bulk-sgd"]["steps"] == 7
    assert not root.exists()


@pytest.mark.parametrize("which", few(1, ["--all", "--extensions"]))
@pytest.mark.parametrize(
    ("key", "what"), [("claims", "claim"), ("figures", "figure"), ("probes", "probe")]
)
def test_a_dry_run_of_all_studies_refuses_an_unknown_name(
    command: Command, which: str, key: str, what: str
) -> None:
    words = ["--probes.no-such", "5"] if key == "probes" else [f"--{key}", "no-such"]
    answer = command("reproduce", which, *words, "--dry-run")
    assert answer.status == 2
    assert f"no {what} 'no-such'" in answer.err
    assert answer.out == ""


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_has_an_example_in_its_help(verb: str, command: Command) -> None:
    answer = command(verb, "--help")
    assert answer.status == 0
    assert f"example:\n  thalweg {verb}" in answer.out
    assert f"  thalweg {verb}" in command("--help").out


def test_the_list_of_commands_is_complete() -> None:
    assert sorted(build_parser()[1]) == sorted(VERBS)


@pytest.mark.parametrize("words", [["--help"], ["reproduce", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys\nfrom thalweg.cli import main\ntry:\n    main(sys.argv[1:])\nfinally:\n"
        "    heavy = {'torch', 'numpy', 'pandas', 'pyarrow', 'matplotlib', 'plotly', 'rich'}\n"
        "    print(sorted(heavy & sys.modules.keys()), file=sys.stderr)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )
    assert found.stderr == "[]\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["frobnicate"], "command: got 'frobnicate', allowed: one of check, claims, compare"),
        (["reproduse"], "did you mean 'reproduce'?"),
        (["list", "--jsn"], "thalweg list: no option '--jsn'; did you mean --json?"),
        (["list", "more"], "thalweg list: no option 'more'; see thalweg list --help"),
        (["run", "digits", "--wrokers", "2"], "'--wrokers'; did you mean --workers?"),
        (["run", "digits", "--dryrun"], "'--dryrun'; did you mean --dry-run?"),
        (
            ["reproduce", "--problem", "mnist", "--data-dir", "nowhere", "--dry-run"],
            "problem.data.data_dir: got 'nowhere', allowed: a file or folder that exists",
        ),
        (
            ["run", "digits", "--initial-checkpoint", "nowhere", "--dry-run"],
            "initial_checkpoint: got 'nowhere'",
        ),
        (["run", "digits", "--learning-rate", "0.1"], "did you mean --lr?"),
        (["run", "digits", "--branches.bulk-sdg.steps", "5"], "did you mean 'bulk-sgd'?"),
        (["run", "digits", "--lr", "-1"], "lr: got -1, allowed: a number > 0"),
        (["run", "digits", "--phases.0.batch", "5"], "did you mean 'batch_size'?"),
        (["run", "digits", "--probes.los", "5"], "did you mean 'loss'?"),
        (["run", "digits", "--claims", "gradient-alings"], "did you mean 'gradient-aligns'?"),
        (["run", "digit"], "did you mean 'digits'?"),
        (["run", "missing.toml"], "missing.toml: no such file"),
        (["reproduce", "mian"], "did you mean 'main'?"),
        (["reproduce", "--problem", "minst"], "did you mean 'mnist'?"),
        (["reproduce", "noise", "--all"], "give one of: a study's name, --all, --extensions"),
        (["reproduce", "valley", "--problem", "mnist"], "allowed: none, valley has its own"),
        (["reproduce", "--workers", "0"], "--workers: got '0', allowed: an integer >= 1"),
        (["reproduce", "--workers", "two"], "--workers: got 'two', allowed: an integer >= 1"),
        (["run", "digits", "--k", "0"], "subspace.k: got 0"),
        (["run", "digits", "--device", "tpu"], "device: got 'tpu'"),
        (["run", "digits", "--seeds", "0", "0"], "seeds: got [0, 0], allowed: each seed once"),
        (["run", "digits", "--plugin", "no_such_plugin"], "plugin 'no_such_plugin'"),
        (["resume", "nothing"], "there is none in"),
        (["show", "nothing"], "there is none in"),
        (["report", "nothing"], "there is none in"),
        (["stop-phase", "nothing"], "run: got 'nothing', allowed: STUDY/seed-N/BRANCH"),
        (["compare", "nothing/seed-0/sgd"], "there is none in"),
        (["spec", "show"], "allowed: one of "),
        (["run"], "the following arguments are required: spec"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_gets_one_line_and_status_2(
    words: list[str], said: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = command(*words)
    assert said in answer.error
    assert answer.error.startswith("thalweg: ")
    assert answer.status == 2
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_built_is_said_before_there_is_a_folder(
    command: Command, tmp_path: Path
) -> None:
    spec = write_spec(tmp_path / "tiny.toml")
    damaged = tmp_path / "t10k-images-idx3-ubyte"
    damaged.write_bytes(b"not images")
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"not labels")
    bad_plugin = tmp_path / "bad.py"
    bad_plugin.write_text("1 / 0\n")
    root = tmp_path / "runs"
    for words, said in [
        (["--k", "100000"], "subspace.k: got 100000, allowed: at most the number of parameters"),
        (["--batch-size", "1000"], "batch_size: got 1000"),
        (["--initial-checkpoint", "none.safetensors"], "allowed: an existing file"),
        (["--problem.data", "mnist", "--data-dir", str(tmp_path / "none")], "none"),
        (["--problem.data", "mnist", "--data-dir", str(damaged.parent)], str(damaged)),
        (["--plugin", str(bad_plugin)], "ZeroDivisionError: division by zero (line 1 of bad.py)"),
    ]:
        answer = command("run", spec, "--root", root, "-q", *words)
        assert said in answer.error, words
        assert answer.status in (2, 4), answer.err
        assert not root.exists(), words


def test_a_root_that_cannot_be_written_to_is_named(command: Command, tmp_path: Path) -> None:
    spec = write_spec(tmp_path / "tiny.toml")
    file = tmp_path / "file"
    file.touch()
    answer = command("run", spec, "--root", file, "-q")
    assert f"{file} is a file where a folder is needed" in answer.error
    assert answer.status == 2


def test_a_disk_without_room_is_found_before_the_first_step(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from thalweg.lab.store import diskspace

    monkeypatch.setattr(diskspace, "free_bytes", lambda folder: 1000)
    answer = command("run", write_spec(tmp_path / "tiny.toml"), "--root", tmp_path / "runs", "-q")
    assert "will be written, 1.0 kB free; make room" in answer.error
    assert answer.status == 1


def test_a_study_at_which_another_process_works_is_refused(
    done: tuple[Path, object], command: Command
) -> None:
    root = done[0]
    study = study_in(root)
    with locked(study.path):
        answer = command("run", root.parent / "tiny.toml", "--root", root, "-q")
    assert f"study {study.path}: in use by process {os.getpid()}" in answer.error
    assert answer.status == 2
    assert {run.status().state for run in study.runs() if run.status()} == {"done"}  # type: ignore[union-attr]


def test_a_branch_that_diverges_ends_with_status_3_and_leaves_the_others_alone(
    command: Command, quick_path: Path
) -> None:
    branches = {"sgd": {"steps": 4}, "wild": {"steps": 40, "optimizer": {"lr": 1e30}}}
    spec = write_spec(quick_path / "wild.toml", branches=branches)
    answer = command("run", spec, "--root", quick_path / "runs", "-q")
    assert answer.status == 3
    first, *_ = answer.err.splitlines()
    study = study_in(quick_path / "runs")
    log = study.run(0, "wild").path / "log.txt"
    assert first.startswith("seed 0 wild: diverged: ")
    assert first.endswith(f"; see {log}")
    assert "Traceback" not in answer.err + log.read_text(encoding="utf-8")
    states = {run.branch: run.status().state for run in study.runs()}  # type: ignore[union-attr]
    assert states == {"trunk": "done", "sgd": "done", "wild": "diverged"}
    wild = thalweg.load(study).query("branch == 'wild'")
    assert wild.loss.isna().tolist()[-1]
    assert len(wild) >= 2, "what was measured before is kept"


def test_a_failing_trunk_is_said_with_its_reason_and_its_branches_are_not_begun(
    command: Command, quick_path: Path
) -> None:
    spec = write_spec(
        quick_path / "broken.toml",
        probes={"loss": 1, "broken": 1},
        phases=[{"optimizer": {"name": "sgd", "lr": 0.05}, "batch_size": 20, "steps": 9}],
    )
    answer = command("run", spec, "--root", quick_path / "runs", "--plugin", PLUGIN, "-q")
    assert answer.status == 1
    study = study_in(quick_path / "runs")
    trunk = study.run(0, "trunk")
    first, *left_out, last = answer.err.splitlines()
    # In the order of their measured costs.
    assert [first, *sorted(left_out), last] == [
        f"seed 0 trunk: failed: ZeroDivisionError: division by zero; see {trunk.path / 'log.txt'}",
        "seed 0 bulk-sgd: not begun, trunk did not end well",
        "seed 0 sgd: not begun, trunk did not end well",
        f"to continue: thalweg resume {study.path} --plugin {PLUGIN}",
    ]
    status = trunk.status()
    assert status is not None
    assert (status.state, status.message) == ("failed", "ZeroDivisionError: division by zero")
    assert "probe 'broken' failed at step 4" in (trunk.path / "log.txt").read_text(encoding="utf-8")


def test_ctrl_c_saves_says_how_to_go_on_and_ends_with_status_75(
    command: Command, quick_path: Path
) -> None:
    spec = write_spec(
        quick_path / "long.toml",
        phases=[{"optimizer": {"name": "sgd", "lr": 0.01}, "batch_size": 20, "steps": 20_000}],
        probes={"loss": 100},
        branches={},
        claims=[],
    )
    root = quick_path / "runs"
    words = [sys.executable, "-m", "thalweg", "run", str(spec), "--root", str(root)]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 90
    while not list(root.glob("*/seed-0/trunk/checkpoints/step-*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: every process of the group
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert out == ""
    assert "Traceback" not in err
    study = study_in(root)
    assert f"to continue: thalweg resume {study.path}" in err
    status = study.run(0, "trunk").status()
    assert status is not None
    assert status.state == "interrupted"
    assert "interrupted" in command("list", "--root", root).out


def test_a_phase_is_ended_by_hand(command: Command, quick_path: Path) -> None:
    phase = {"optimizer": {"name": "sgd", "lr": 0.01}, "batch_size": 20, "steps": 1_000_000}
    raw = {
        **TINY,
        "phases": [{**phase, "name": "first"}, {**phase, "name": "second", "steps": 5}],
        "branches": {},
        "claims": [],
        "probes": {"loss": 100},
    }
    root = quick_path / "runs"
    study = begin(root / "by-hand", parse_spec(raw))
    child = in_a_process(study, "trunk")
    deadline = time.monotonic() + 90
    while "running" not in command("list", "--root", root).out:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    name = "by-hand/seed-0/trunk"
    answer = command("stop-phase", name, "--root", root)
    assert answer.status == 0, answer.err
    ending = child.ending()
    assert ending.exit_code == 0, ending.message
    log = (study.run(0, "trunk").path / "log.txt").read_text(encoding="utf-8")
    assert log.count("by hand") == 1
    assert "it is done; only a running run" in command("stop-phase", name, "--root", root).error


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["end-phase", "nothing"], "end-phase is called stop-phase now"),
        (["reproduce", "noise", "--neighbours"], "--neighbours is called --extensions now"),
    ],
)
def test_former_words_are_understood_and_the_new_ones_told(
    command: Command, words: list[str], told: str
) -> None:
    answer = command(*words)
    assert answer.status == 2
    assert answer.err.splitlines()[0] == f"thalweg: {told}"


def test_a_former_key_is_told_in_one_line(command: Command, tmp_path: Path) -> None:
    spec = tmp_path / "mine.toml"
    spec.write_text('like = "digits"\n')
    answer = command("run", spec, "--dry-run")
    assert answer.err == f"thalweg: {spec}: the key 'like' is called 'extends' now\n"


ESCAPE = "\x1b]0;owned\x07"


def test_no_control_character_of_a_file_or_word_reaches_the_terminal(
    command: Command, tmp_path: Path
) -> None:
    study = StudyFolder.create(tmp_path, "tiny-0", "")
    run = study.run(0, "trunk").create("seed = 0\n")
    run.write_status(Status("failed", message=f"it {ESCAPE} fell \r over \x9b2J"))
    for words in (
        ("show", "tiny-0"),
        ("show", "tiny-0/seed-0/trunk"),
        ("list",),
        ("show", f"tiny{ESCAPE}"),
        ("resume", ESCAPE),
        (ESCAPE,),
    ):
        answer = command(*words, "--root", str(tmp_path))
        assert not set(answer.out + answer.err) & set("\x1b\x07\r\x9b"), words
    assert command("run", f"{ESCAPE}.toml").error.startswith("thalweg: \\x1b")


@pytest.mark.parametrize(
    "words",
    [
        ("--threads", "100000"),
        ("--workers", "9" * 5000),
        ("--workers", "0"),
        ("--subspace.k", "9" * 5000),
        ("--description", ESCAPE),
        ("--seeds", "\0"),
        ("--branches.con.steps", "3"),
    ],
    ids=lambda words: words[0],
)
def test_words_that_no_setting_can_have_are_refused_before_a_folder_is_made(
    command: Command, tmp_path: Path, words: tuple[str, str]
) -> None:
    answer = command("run", "digits", *words, "--root", str(tmp_path / "runs"))
    assert answer.status == 2
    assert len(answer.error) < 2000
    assert not (tmp_path / "runs").exists()


def test_a_folder_of_data_that_is_not_needed_is_told_and_left_aside(command: Command) -> None:
    answer = command("reproduce", "--data-dir", "somewhere", "--dry-run")
    assert answer.status == 0
    assert answer.err == "thalweg: data_dir: not needed, the data set digits reads no files\n"
    assert answer.out == command("reproduce", "--dry-run").out


def test_a_smoke_run_says_what_it_is(command: Command, quick_path: Path) -> None:
    file = quick_path / "tiny.toml"
    file.write_text(tomli_w.dumps(TINY), encoding="utf-8")
    root = str(quick_path / "runs")
    answer = command("run", str(file), "--smoke", "-q", "--root", root)
    assert answer.status == 0, answer.err
    assert "thalweg: a smoke run: everything is tiny, and no verdict" in answer.err
    (study,) = find_studies(root)
    page = (study.path / "report.html").read_text(encoding="utf-8")
    assert "This is a smoke run: everything is tiny, and no verdict is to be believed." in page
    again = command("report", study.name, "--root", root)
    assert "a smoke run" in again.err
