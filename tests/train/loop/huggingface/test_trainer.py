"""The Trainer of transformers with our losses and transfers: runs, logs, checkpoints, and the folders it leaves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stillhouse.data.errors import CheckpointError
from stillhouse.train import TransferCheckpoints, TransferCollator, attach_transfer

transformers = pytest.importorskip("transformers", minversion="5.24")
pytest.importorskip("accelerate")
HEADS = "stillhouse-transfer.safetensors"


@pytest.fixture
def trainer(
    hf: SimpleNamespace, collate: Callable, settings: dict[str, Any], examples: list, tmp_path: Path
) -> Callable[..., Any]:
    def make(out: str = "out", kind: str = "tdt", resume_from: Any = None, **arguments: Any) -> Any:
        model = hf.student(kind)
        heads = attach_transfer(model, settings, hf.corpus)
        usual = {
            "max_steps": 4, "per_device_train_batch_size": 2, "save_steps": 2, "logging_steps": 2, "report_to": [],
            "remove_unused_columns": False, "use_cpu": True, "learning_rate": 1e-2, "disable_tqdm": True,
        }  # fmt: skip
        made = transformers.Trainer(
            model,
            transformers.TrainingArguments(output_dir=str(tmp_path / out), **usual | arguments),
            data_collator=TransferCollator(heads, hf.tokenizer, collate),
            train_dataset=examples,
            eval_dataset=[{k: v for k, v in e.items() if k != "id"} for e in examples[:3]],
            callbacks=[TransferCheckpoints(heads, resume_from)],
        )
        made.heads = heads
        return made

    return make


@pytest.mark.filterwarnings("ignore")  # of transformers and accelerate
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_interrupted(trainer: Callable, tmp_path: Path) -> None:
    whole = trainer("whole", gradient_accumulation_steps=2)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    again = trainer("whole", gradient_accumulation_steps=2)
    again.train(resume_from_checkpoint=str(checkpoint))
    elsewhere = trainer("elsewhere", gradient_accumulation_steps=2, resume_from=checkpoint)
    elsewhere.train(resume_from_checkpoint=str(checkpoint))
    for other in (again, elsewhere):
        expected = whole.model.state_dict()
        assert expected.keys() == other.model.state_dict().keys()
        assert all(torch.equal(v, expected[k]) for k, v in other.model.state_dict().items())
    assert not torch.equal(
        load_file(checkpoint / HEADS)["modules_by_name.text.heads.0.weight"],
        whole.heads.modules_by_name["text"].heads[0].weight,
    )
    assert int(whole.heads.step) == 3  # the number of the last step, from 0
    lost = trainer("lost")
    with pytest.raises(CheckpointError, match=rf"checkpoint-2/{HEADS}: there are no heads"):
        lost.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["rnnt", "tdt"])
def test_the_folder_loads_in_plain_transformers_without_a_trace(
    hf: SimpleNamespace, trainer: Callable, tmp_path: Path, kind: str
) -> None:
    made = trainer(kind=kind, eval_strategy="steps", eval_steps=2)
    made.train()
    logged = made.state.log_history
    names = {"transducer", "transfer.text", "transfer.predictor", "transfer.text/known/both:8/4"}
    assert names <= logged[0].keys()
    assert [entry["eval_loss"] for entry in logged if "eval_loss" in entry]
    made.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final" / HEADS).exists()
    assert (tmp_path / "out" / "checkpoint-4" / HEADS).exists()
    automatic = {"rnnt": transformers.AutoModelForRNNT, "tdt": transformers.AutoModelForTDT}[kind]
    for folder in (tmp_path / "final", tmp_path / "out" / "checkpoint-4"):
        plain, report = automatic.from_pretrained(folder, output_loading_info=True)
        assert type(plain).__module__ == "transformers.models.parakeet.modeling_parakeet"
        assert not any(report.values())
        own = {k: v for k, v in made.model.state_dict().items() if not k.startswith("stillhouse.")}
        assert plain.state_dict().keys() == own.keys() == load_file(folder / "model.safetensors").keys()
        assert all(torch.equal(v, own[k]) for k, v in plain.state_dict().items())
        assert "stillhouse" not in (folder / "config.json").read_text()
        assert plain.config.architectures == [type(plain).__name__]


@pytest.mark.filterwarnings("ignore")
def test_the_loss_falls_in_a_plain_loop_and_the_heads_can_be_saved(
    hf: SimpleNamespace, collate: Callable, settings: dict[str, Any], examples: list, tmp_path: Path
) -> None:
    model = hf.student("rnnt")
    heads = attach_transfer(model, settings, hf.corpus)
    collator = TransferCollator(heads, hf.tokenizer, collate)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(15):
        output = model(**collator(examples))
        output.loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(output.losses)
    for name in ("transducer", "transfer.text", "transfer.predictor"):
        assert losses[-1][name] < losses[0][name]
    assert heads.save(tmp_path) == tmp_path / HEADS
    other = attach_transfer(hf.student("rnnt"), settings, hf.corpus, seed=3)
    other.load(tmp_path)
    assert all(torch.equal(v, heads.state_dict()[k]) for k, v in other.state_dict().items())
    assert int(other.step) == 15
    fewer = attach_transfer(
        hf.student(), {**settings, "text": settings["text"] | {"views": "known/alone/4"}}, hf.corpus
    )
    with pytest.raises(CheckpointError, match=r"another model's.*heads.1.bias unknown"):
        fewer.load(tmp_path)
    (tmp_path / HEADS).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="cannot be read"):
        other.load(tmp_path)
