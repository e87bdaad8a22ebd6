"""`thalweg inspect`, from a saved model to a page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from thalweg.cli import main
from thalweg.lab.config import load_spec
from thalweg.loss.objective import Objective
from thalweg.operators.hessian import Hessian
from thalweg.problems import build_problem
from thalweg.spectrum.eigensolver import eigenpairs

FEW = ["--k", "2"]


def status(words: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["inspect", *words])
    code = ended.value.code
    assert isinstance(code, int)
    return code


def test_weights_of_a_problem_are_told_as_a_table_as_json_and_as_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = build_problem(load_spec("digits").problem, seed=3)
    weights, page = tmp_path / "weights.safetensors", tmp_path / "page.html"
    save_file(problem.model.state_dict(), weights)
    words = [str(weights), "--problem", "digits", *FEW]
    assert status([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    objective = Objective(problem.model, problem.loss, problem.train)
    truth = eigenpairs(Hessian(objective), 3, tolerance=1e-5)
    assert found["eigenvalues"] == pytest.approx(truth.eigenvalues.tolist(), rel=1e-3)
    assert status([*words, "--page", str(page)]) == 0
    assert "sharpness lambda_1" in capsys.readouterr().out
    assert "<caption>by layer</caption>" in page.read_text(encoding="utf-8")


def test_a_model_of_transformers_is_told_over_a_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_embd=8, n_head=2, vocab_size=128, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 10)
    options = ["--data", str(text), "--samples", "6", "--context", "8", "--json", *FEW]
    assert status([str(tmp_path / "model"), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    names = [layer["name"] for layer in found["layers"]]
    assert {"model.transformer.h.0", "model.transformer.h.1"} <= set(names)
    assert found["num_samples"] == 6
    text.write_text("short")
    assert status([str(tmp_path / "model"), *options]) == 2
    assert "at most 0 sequences of 8 tokens" in capsys.readouterr().err
    text.write_bytes("é".encode() * 100)
    assert status([str(tmp_path / "model"), *options]) == 2
    assert "below the vocabulary's 128" in capsys.readouterr().err


def saved_by_transformers(kind: str, folder: Path) -> Path:
    """A causal language model; one with its weights torn; a classifier, which has no such head."""
    transformers = pytest.importorskip("transformers")
    if kind == "BERT":
        config = transformers.BertConfig(
            hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4
        )
        model = transformers.BertForSequenceClassification(config)
    else:
        config = transformers.GPT2Config(
            n_layer=1, n_embd=4, n_head=1, vocab_size=128, n_positions=16
        )
        model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(folder / kind)
    if kind == "TORN":
        weights = folder / kind / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
    return folder / kind


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "a folder of transformers, or a .safetensors file"),
        (["WEIGHTS"], "--problem: a file of weights needs the problem"),
        (["WEIGHTS", "--problem", "digits"], "does not fit digits"),
        (["FOLDER"], "--data: a folder of transformers needs a text"),
        (["FOLDER", "--data", "WEIGHTS"], "a folder with config.json"),
        (["FOLDER", "--data", "nowhere"], "a text file"),
        (["WEIGHTS", "--page", "nowhere/page.html"], "a file in a folder that exists"),
        (["WEIGHTS", "--page", "FOLDER"], "a file in a folder that exists"),
        (["PICKLE", "--problem", "digits"], "allowed: a file of safetensors"),
        (["BERT", "--data", "TEXT", "--context", "4"], "it has no weights cls.predictions"),
        (["GPT", "--data", "TEXT", "--context", "1"], "an integer >= 2"),
        (["GPT", "--data", "TEXT", "--context", "64"], "at most the model's 16 positions"),
        (["GPT", "--data", "EMPTY", "--context", "4"], "the text has 0 tokens"),
        (["TORN", "--data", "TEXT", "--context", "4"], "TORN is no causal language model"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file({"other": torch.ones(2)}, weights)
    places = {"WEIGHTS": str(weights), "FOLDER": str(tmp_path)}
    for name, content in {"PICKLE": b"PK\x03\x04" * 9, "TEXT": b"abc" * 99, "EMPTY": b""}.items():
        places[name] = str(tmp_path / name)
        Path(places[name]).write_bytes(content)
    if "config.json" in said:
        pytest.importorskip("transformers")
    if words[0] in ("BERT", "GPT", "TORN"):
        places[words[0]] = str(saved_by_transformers(words[0], tmp_path))
    assert status([places.get(word, word) for word in words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
