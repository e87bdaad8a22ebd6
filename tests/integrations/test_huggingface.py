from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import Dataset, IterableDataset

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from thalweg.errors import InvalidInput
from thalweg.integrations.huggingface import CurvatureCallback, _dashboards
from thalweg.loss.objective import Objective
from thalweg.measure.sinks import WatchWarning
from thalweg.operators.hessian import Hessian
from thalweg.spectrum.eigensolver import eigenpairs

pytestmark = pytest.mark.filterwarnings("ignore")
CONTEXT = 12


class Tokens(Dataset[Any]):
    """Sequences that a small model can learn."""

    def __init__(self, count: int = 80) -> None:
        generator = torch.Generator().manual_seed(0)
        start = torch.randint(0, 16, (count, 1), generator=generator)
        self.tokens = (start + torch.arange(CONTEXT) * 3) % 16

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[number], "labels": self.tokens[number]}


def model(dropout: float = 0.1) -> GPT2LMHeadModel:
    set_seed(0)
    off = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(
        n_layer=1, n_embd=8, n_head=2, vocab_size=16, n_positions=CONTEXT, **off, **ends
    )
    return GPT2LMHeadModel(config)


def trained(
    folder: Path,
    watched: dict[str, Any] | None,
    *,
    steps: int = 6,
    resume: str | None = None,
    network: nn.Module | None = None,
    loss: Any = None,
    kind: type[Trainer] = Trainer,
    **arguments: Any,
) -> tuple[Tensor, CurvatureCallback | None, Trainer]:
    defaults: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
        "report_to": "none",
        "save_steps": 3,
        "logging_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    arguments = {"output_dir": str(folder), **defaults, **arguments}
    trainer = kind(
        model=network or model(),
        args=TrainingArguments(**arguments),
        train_dataset=Tokens(),
        eval_dataset=Tokens(8),
        compute_loss_func=loss,
    )
    callback = None
    if watched is not None:
        callback = CurvatureCallback(trainer, **{"samples": 8, "every": 2, "k": 2} | watched)
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    flat = torch.cat([p.detach().reshape(-1) for p in trainer.model.parameters()])
    return flat, callback, trainer


def test_one_line_reports_and_leaves_the_training_bit_for_bit(tmp_path: Path) -> None:
    options = {"gradient_accumulation_steps": 2, "bf16": True}
    alone, _, _ = trained(tmp_path / "alone", None, **options)
    watched, callback, _ = trained(tmp_path / "watched", {}, **options)
    assert torch.equal(alone, watched)
    assert callback is not None
    assert callback.watcher is not None
    rows = callback.watcher.history
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert all(row["failure"] is None for row in rows)
    assert rows[-1]["stability_margin"] < 1
    # Two batches of four are a step.
    assert rows[0]["overhead"] == pytest.approx(rows[0]["report_gradients"] * 8 / 8)


@pytest.mark.slow
def test_batches_of_a_compiled_model_are_counted(tmp_path: Path) -> None:
    compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
    options = {"gradient_accumulation_steps": 3, **compiled}
    alone, _, _ = trained(tmp_path / "alone", None, **options)
    watched, callback, _ = trained(tmp_path / "watched", {}, **options)
    assert torch.equal(alone, watched)
    assert callback is not None
    assert callback.watcher is not None
    row = callback.watcher.history[0]
    assert row["overhead"] == pytest.approx(row["report_gradients"] * 8 / 12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"max_grad_norm": 0.1, "gradient_accumulation_steps": 3},
        {"label_smoothing_factor": 0.1},
        {"optim": "adafactor"},
        {"optim": "sgd"},
        {"gradient_checkpointing": True},
        {"eval_strategy": "steps", "eval_steps": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_setting_of_the_trainer_is_left_alone(
    options: dict[str, Any], tmp_path: Path
) -> None:
    alone, _, _ = trained(tmp_path / "alone", None, **options)
    watched, callback, _ = trained(tmp_path / "watched", {}, **options)
    assert torch.equal(alone, watched)
    assert callback is not None
    assert callback.watcher is not None
    assert [row["failure"] for row in callback.watcher.history] == [None] * 3


@pytest.mark.slow
def test_a_resumed_run_reports_as_if_it_had_not_been_stopped(tmp_path: Path) -> None:
    whole, first, _ = trained(tmp_path / "run", {})
    assert first is not None
    assert first.watcher is not None
    shutil.rmtree(tmp_path / "run" / "checkpoint-6")
    folder = str(tmp_path / "run" / "checkpoint-3")
    again, second, _ = trained(tmp_path / "run", {}, resume=folder)
    assert torch.equal(whole, again)
    assert second is not None
    assert second.watcher is not None
    expected = [row for row in first.watcher.history if row["step"] >= 3]
    hidden = {"seconds"}
    for row, other in zip(second.watcher.history, expected, strict=True):
        assert {k: v for k, v in row.items() if k not in hidden} == {
            k: v for k, v in other.items() if k not in hidden
        }


def test_a_checkpoint_elsewhere_is_gone_on_from_or_said_to_have_no_state(tmp_path: Path) -> None:
    _, whole, _ = trained(tmp_path / "first", {}, steps=5)
    saved = tmp_path / "first" / "checkpoint-3"
    _, resumed, _ = trained(tmp_path / "second", {}, steps=5, resume=str(saved))
    assert whole is not None
    assert resumed is not None
    assert whole.watcher is not None
    assert resumed.watcher is not None
    (row,) = resumed.watcher.history
    assert row["step"] == 4
    assert row["sharpness"] == whole.watcher.history[-1]["sharpness"]

    (saved / "thalweg-0.pt").unlink()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", WatchWarning)
        trained(tmp_path / "third", {}, steps=4, resume=str(saved))
    (said,) = [str(each.message) for each in caught if each.category is WatchWarning]
    assert "its subspace is new" in said
    assert f"{saved} has none" in said


class Counting(Trainer):
    """Counts and logs in its loss, as TRL's trainers do."""

    calls = 0

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        self.calls += 1
        self.seen: dict[str, list[int]] = getattr(self, "seen", {})
        self.seen.setdefault("train", []).append(self.calls)
        return super().compute_loss(*arguments, **options)


def test_what_a_trainer_counts_in_its_loss_is_what_it_was(tmp_path: Path) -> None:
    plain, _, without = trained(tmp_path / "plain", None, kind=Counting, steps=1)
    flat, callback, trainer = trained(tmp_path / "watched", {}, kind=Counting, steps=1)
    assert torch.equal(plain, flat)
    assert callback is not None
    assert callback.watcher is not None
    assert len(callback.watcher.history) == 1
    assert trainer.calls == without.calls == 1  # type: ignore[attr-defined]
    assert trainer.seen == without.seen == {"train": [1]}  # type: ignore[attr-defined]


def test_a_training_that_fails_ends_the_watch(tmp_path: Path) -> None:
    callbacks: list[CurvatureCallback] = []

    class Failing(Trainer):
        def training_step(self, *arguments: Any, **options: Any) -> Tensor:
            callbacks.extend(
                each
                for each in self.callback_handler.callbacks
                if isinstance(each, CurvatureCallback)
            )
            raise ValueError("of the user")

    with pytest.raises(ValueError, match="of the user"):
        trained(tmp_path, {}, kind=Failing)
    watcher = callbacks[0].watcher
    assert watcher is not None
    assert watcher.closed


def test_the_sharpness_is_that_of_the_trainers_own_loss(tmp_path: Path) -> None:
    network = model(dropout=0.0)
    start = {name: value.clone() for name, value in network.state_dict().items()}
    _, callback, _ = trained(
        tmp_path, {"exact": True}, steps=1, network=network, label_smoothing_factor=0.2
    )
    assert callback is not None
    assert callback.watcher is not None
    network.load_state_dict(start)
    drawn = torch.randperm(80, generator=torch.Generator().manual_seed(0))[:8].sort().values
    tokens = Tokens().tokens[drawn]

    def smoothed(output: Any, _: object) -> Tensor:
        logits = output.logits[:, :-1].reshape(-1, 16)
        return nn.functional.cross_entropy(logits, tokens[:, 1:].reshape(-1), label_smoothing=0.2)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, ids: Tensor) -> Any:
            return self.network(input_ids=ids)

    objective = Objective(Whole().eval(), smoothed, (tokens, tokens), chunk_size=None)
    truth = eigenpairs(Hessian(objective), 1, tolerance=1e-5)
    found = callback.watcher.history[0]["sharpness"]
    assert found == pytest.approx(float(truth.eigenvalues[0]), rel=1e-3)
    assert callback.watcher.history[0]["loss"] == pytest.approx(float(objective.value()), rel=1e-4)


def test_the_sharpness_is_in_the_precision_of_the_parameters(tmp_path: Path) -> None:
    rows = []
    for name, settings in (("full", {}), ("mixed", {"bf16": True})):
        network = model(dropout=0.0)
        watched = {"exact": True}
        _, callback, _ = trained(tmp_path / name, watched, steps=1, network=network, **settings)
        assert callback is not None
        assert callback.watcher is not None
        rows += callback.watcher.history
    assert rows[0]["sharpness"] == rows[1]["sharpness"]
    assert rows[0]["loss"] == rows[1]["loss"]


def test_a_classifier_has_its_number_of_labels(tmp_path: Path) -> None:
    from thalweg.integrations.huggingface import EIGENVECTORS, _dimension

    class BertForSequenceClassification(nn.Module):
        config = type("Config", (), {"num_labels": 7})

    assert _dimension(BertForSequenceClassification()) == 7
    assert _dimension(model()) == EIGENVECTORS


def test_the_dashboards_are_those_of_the_trainer(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    assert _dashboards(arguments) == []
    arguments.report_to = ["wandb", "tensorboard", "mlflow", "codecarbon"]
    names = [sink.partition(":")[0] for sink in _dashboards(arguments)]
    assert names == ["wandb", "mlflow", "tensorboard"]


class FSDP1(FullyShardedDataParallel):
    """Its class is all that is looked at; to be built it wants an accelerator."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.layer = nn.Linear(2, 2)


def zero_3() -> nn.Module:
    network: Any = nn.Linear(2, 2)
    network.weight.ds_id = 0
    return network


@pytest.mark.parametrize(
    ("attributes", "network", "named"),
    [
        ({"deepspeed": {"stage": 3}}, nn.Linear(2, 2), "DeepSpeed ZeRO"),
        ({"deepspeed_plugin": object()}, nn.Linear(2, 2), "DeepSpeed ZeRO"),
        ({}, type("DeepSpeedEngine", (nn.Linear,), {})(2, 2), "DeepSpeedEngine of DeepSpeed"),
        ({}, zero_3(), r"Linear of DeepSpeed \(ZeRO\)"),
        ({}, nn.Sequential(FSDP1()), r"FSDP1\)', allowed: FSDP2"),
    ],
    ids=["ZeRO by arguments", "ZeRO by accelerate", "ZeRO engine", "ZeRO 3", "FSDP 1"],
)
def test_layouts_that_cannot_be_right_are_refused_by_name(
    attributes: dict[str, Any], network: nn.Module, named: str, tmp_path: Path
) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    for name, value in attributes.items():
        setattr(arguments, name, value)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    callback = CurvatureCallback(data=[torch.zeros(2, 2)])
    with pytest.raises(InvalidInput, match=named):
        callback.on_train_begin(arguments, TrainerState(), None, model=network, optimizer=optimizer)


def test_a_stream_is_refused_with_a_mend(tmp_path: Path) -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield from Tokens()

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        report_to="none",
        use_cpu=True,
        max_steps=2,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model(), args=arguments, train_dataset=Stream())
    trainer.add_callback(CurvatureCallback(trainer))
    with pytest.raises(InvalidInput, match=r"data set with a length.*data="):
        trainer.train()
