"""A speech teacher for a transducer of transformers: the times of its encoder states, and targets by time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers
from click.testing import CliRunner

from stillhouse.cli import cli
from stillhouse.data.errors import StaleError
from stillhouse.data.manifest import Utterance, write_manifest
from stillhouse.distill import TargetReader
from stillhouse.distill.frames import StudentTimes
from stillhouse.extract.store import Store
from stillhouse.train import TransferCollator, attach_transfer
from stillhouse.train.loop.huggingface.parts import state_times

SECONDS = (0.9, 0.6, 0.75)


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize("causal", [False, True])
def test_the_times_of_states_are_the_middles_of_what_the_subsampling_sees(
    hf: SimpleNamespace, factor: int, causal: bool
) -> None:
    if causal:
        kind = transformers.NemotronAsrStreamingEncoderConfig
        config = kind(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_mel_bins=16,
            subsampling_factor=factor, subsampling_conv_channels=4,
        )  # fmt: skip
        encoder = transformers.AutoModel.from_config(config)
    else:
        encoder = hf.model(encoder_subsampling_factor=factor).encoder
    times = state_times(SimpleNamespace(encoder=encoder), 100.0)
    assert times.rows == factor and times.start_s == -0.005
    rows = torch.ones(1, 80, 16, requires_grad=True)
    for weight in encoder.subsampling.parameters():
        torch.nn.init.constant_(weight, 0.1)  # so that no ReLU hides a row
    states = encoder.subsampling(rows)
    for number in range(3, states.shape[1] - 3):
        (gradient,) = torch.autograd.grad(states[0, number].sum(), rows, retain_graph=True)
        seen = gradient[0].sum(1).nonzero()[:, 0]
        assert (int(seen.min()) + int(seen.max())) / 2 == factor * number + times.shift
    assert times.middle_s == pytest.approx(times.shift / 100)  # a row is centred on its number times 10 ms


@pytest.fixture
def heard(hf: SimpleNamespace, tmp_path: Path) -> SimpleNamespace:
    """A corpus of noise, a store of a random wav2vec 2.0 over it, and examples with features of 100 rows a second."""
    rng = np.random.default_rng(0)
    utterances, examples = [], []
    for k, seconds in enumerate(SECONDS):
        soundfile.write(tmp_path / f"{k}.wav", 0.1 * rng.standard_normal(int(16_000 * seconds)), 16_000)
        utterances.append(Utterance(id=f"u{k}", text=hf.TEXTS[k], audio=f"{k}.wav"))
        features = torch.from_numpy(rng.standard_normal((round(100 * seconds), 16)).astype(np.float32))
        labels = hf.tokenizer(hf.normal(hf.TEXTS[k]), add_special_tokens=False).input_ids
        examples.append({"id": f"u{k}", "input_features": features, "labels": labels})
    write_manifest(tmp_path / "corpus.jsonl", utterances)
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, conv_dim=(8,) * 7,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    transformers.Wav2Vec2Model(config).save_pretrained(tmp_path / "ear")
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "ear")
    arguments = ["extract", tmp_path / "corpus.jsonl", tmp_path / "ear.zarr", "--teacher", tmp_path / "ear"]
    result = CliRunner().invoke(cli, [*map(str, arguments), "--name", "ear", "--layers", "1,2"])
    assert result.exit_code == 0, result.output
    settings = {
        "stores": [str(hf.zarr), str(tmp_path / "ear.zarr")],
        "speech": {"views": "ear/alone/2", "aligner": "frames", "layers": [2], "state_share": 1, "weight": 0.2},
    }
    return SimpleNamespace(folder=tmp_path, examples=examples, settings=settings, utterances=utterances)


def test_a_speech_teacher_gives_each_state_the_frames_of_its_time(
    hf: SimpleNamespace, heard: SimpleNamespace, collate: Callable
) -> None:
    model = hf.student("rnnt")
    heads = attach_transfer(model, heard.settings, heard.folder / "corpus.jsonl")
    collator = TransferCollator(heads, hf.tokenizer, collate)
    batch = collator(heard.examples)
    store = Store.open(heard.folder / "ear.zarr")
    sources = [(store, store.resolve("ear/alone/2"))]
    reader = TargetReader(sources, "state", student=StudentTimes(4, 100.0, -0.005))
    ids, rows = [u.id for u in heard.utterances], np.array([90, 60, 75])
    expected = reader.read(ids, [u.text for u in heard.utterances], rows=rows)
    found = batch["transfer"]["speech"]
    assert torch.equal(found.positions["ear"].row, expected.positions["ear"].row)
    assert torch.equal(found.targets["ear/alone/2"], expected.targets["ear/alone/2"])
    output = model(**batch)
    output.loss.backward()
    assert output.losses["transfer.speech"] > 0
    assert model.encoder.layers[1].feed_forward1.linear1.weight.grad.abs().sum() > 0


def test_a_copy_at_another_speed_learns_what_lies_at_its_times(
    hf: SimpleNamespace, heard: SimpleNamespace, collate: Callable
) -> None:
    model = hf.student("rnnt")
    heads = attach_transfer(model, heard.settings, heard.folder / "corpus.jsonl")
    collator = TransferCollator(heads, hf.tokenizer, collate)

    def at(speed: float) -> dict[str, Any]:
        example = heard.examples[0]
        return example | {"speed": speed, "input_features": example["input_features"][: round(90 / speed)]}

    fast, plain = (collator([at(s)])["transfer"]["speech"] for s in (1.5, 1.0))
    assert fast.positions["ear"].kept == 15 and plain.positions["ear"].kept in (22, 23)
    wrong = collator([heard.examples[0] | {"speed": 1.5}])
    with pytest.raises(StaleError, match="u0"):
        model(**wrong)
