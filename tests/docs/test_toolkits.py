"""The classes of docs/reference/python.md for icefall, ESPnet, SpeechBrain and NeMo, over stand-ins with
those toolkits' arguments and shapes: the loss is that of our own call, gradients arrive, validation is left alone.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import known_store
import peers
import pytest
import torch

from stillhouse.distill import TargetReader, Transfer
from stillhouse.extract.adapters import store_ids

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "python.md"
DIM = 8
KEYS = ["s00-0002", "s00-0001_sp0.9", "sp1.1-s01-0003"]
LENGTHS = torch.tensor([7, 5, 4])  # frames


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    store = known_store.build(tmp_path_factory.mktemp("toolkits"))
    reader = TargetReader([(store, store.resolve("known/both:8/4"))], position="word")
    texts = {i: known_store.TEXTS[int(i[-4:])] for i in store.utterance_ids}
    return SimpleNamespace(store=store, reader=reader, texts=texts)


@pytest.fixture
def page(known: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The names that the page's blocks for the toolkits make, and what the transfer alone says of KEYS."""
    monkeypatch.chdir(tmp_path)
    for name, module in peers.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    lines = [{"id": i, "audio_filepath": f"{i}.wav"} for i in sorted(known.texts)]
    (tmp_path / "train_manifest.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    torch.manual_seed(0)
    transfer = Transfer(known.reader.views, DIM, aligner="attention", embeddings=known.reader.embeddings)

    def targets(keys: list[str], device: str = "cpu") -> Any:
        ids = store_ids(known.store, keys)
        return known.reader.read(ids, [known.texts[i] for i in ids])

    names = {"torch": torch, "targets": targets}
    text = PAGE.read_text(encoding="utf-8")
    part = text[text.index("### icefall") : text.index("## Lhotse and icefall")]
    blocks = re.findall(r"```python quick\n(.*?)```", part, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    return SimpleNamespace(**names, transfer=transfer, expected=lambda x, n=LENGTHS: transfer(x, n, targets(KEYS)))


def sound() -> torch.Tensor:
    return torch.randn(3, 7 * peers.FRAMES, generator=torch.manual_seed(1))


def learns(loss: torch.Tensor, *modules: torch.nn.Module) -> None:
    loss.sum().backward()
    for module in modules:
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert modules[0].heads[0].weight.grad.any()


def test_icefall(page: SimpleNamespace) -> None:
    model = page.TransferModel(DIM)
    model.transfer = page.transfer
    x, lengths = sound()[..., None].expand(-1, -1, peers.FRAMES), LENGTHS * peers.FRAMES
    options = {"prune_range": 5, "am_scale": 0.0, "lm_scale": 0.0}
    simple, pruned, _, last = model(x=x, x_lens=lengths, y=None, targets=page.targets(KEYS), **options)
    found = page.expected(model.encoded[0])
    torch.testing.assert_close(last, found.loss * found.positions)
    assert len(model(x=x, x_lens=lengths, y=None, **options)) == 3
    learns(simple + pruned + 0.3 * last, page.transfer, model)


def test_espnet(page: SimpleNamespace) -> None:
    model = page.TransferESPnet(DIM)
    model.transfer = page.transfer
    text_lengths = torch.tensor([3, 9, 6])
    batch = {"speech": sound(), "speech_lengths": LENGTHS * peers.FRAMES, "text": None, "text_lengths": text_lengths}
    loss, stats, weight = model(**batch, utt_id=KEYS)
    found = page.expected(model.encoded[0])
    torch.testing.assert_close(loss[0], model.encoded[0].square().mean() + 0.3 * 6 * found.loss)
    assert stats["loss_transfer"].item() == pytest.approx(found.loss.item()) and weight.item() == 3
    model.eval()
    assert "loss_transfer" not in model(**batch, utt_id=["unknown"] * 3)[1]
    learns(loss, page.transfer, model)


@pytest.mark.parametrize("copies", [1, 2])
def test_speechbrain(page: SimpleNamespace, copies: int) -> None:
    enc = peers.Enc(DIM)
    modules = {"enc": enc, "transfer": page.transfer}
    brain = page.TransferASR(modules=modules, hparams={"wav_augment": peers.Augmenter(copies)})
    tokens = torch.zeros(3, 10), torch.tensor([1.0, 0.5, 0.3])
    batch = SimpleNamespace(id=KEYS, sig=(sound(), LENGTHS / 7), tokens=tokens)
    loss = brain.compute_objectives(brain.compute_forward(batch, "TRAIN"), batch, "TRAIN")
    assert len(brain.encoded) == 3 * copies and not enc._forward_hooks
    found = page.expected(brain.encoded[:3])
    torch.testing.assert_close(loss, brain.encoded.square().mean() + 0.3 * 6 * found.loss)
    batch.id = ["unknown"] * 3
    valid = brain.compute_objectives(brain.compute_forward(batch, "VALID"), batch, "VALID")
    torch.testing.assert_close(valid, brain.encoded.square().mean())
    learns(loss, page.transfer, enc)


def test_nemo(page: SimpleNamespace) -> None:
    """The manifest has six lines; its first has been filtered out, so that entries are not lines."""
    model = page.TransferNeMo(DIM, lines=[1, 2, 3, 4, 5])
    model.transfer = page.transfer
    batch = (sound(), LENGTHS * peers.FRAMES, torch.zeros(3, 9), torch.tensor([3, 9, 6]))
    sample_id = torch.tensor([1, 0, 2], dtype=torch.int32)
    step = model.training_step((*batch, sample_id), 0)
    found = page.expected(model.encoded[0].transpose(1, 2))
    torch.testing.assert_close(step["loss"], model.encoded[0].square().mean() + 0.3 * 6 * found.loss)
    learns(step["loss"], page.transfer, model)
