"""Stand-ins for the classes of other toolkits that docs/reference/python.md builds on: names, arguments and shapes
as theirs, and next to nothing inside.

Invariant: what a method is called with there, it is called with here, by position or by name as there. Used by
tests/docs/test_toolkits.py and tests/docs/test_blocks.py.
"""

from __future__ import annotations

from collections import namedtuple
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

FRAMES = 6  # samples or features a frame of the encoder


class AsrModel(nn.Module):
    """icefall: losses are sums over the batch."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(FRAMES, dim)

    def forward_encoder(self, x: torch.Tensor, x_lens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.encoder(x.unflatten(1, (-1, FRAMES))[..., 0]), x_lens // FRAMES

    def forward(
        self, x: Any, x_lens: Any, y: Any, prune_range: int = 5, am_scale: float = 0.0, lm_scale: float = 0.0
    ) -> tuple[torch.Tensor, ...]:
        encoder_out, _ = self.forward_encoder(x, x_lens)
        return encoder_out.sum(), encoder_out.square().sum(), torch.empty(0)


class ESPnetASRTransducerModel(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(FRAMES, dim)

    def encode(self, speech: torch.Tensor, speech_lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.encoder(speech.unflatten(1, (-1, FRAMES))), speech_lengths // FRAMES

    def forward(self, speech: Any, speech_lengths: Any, text: Any, text_lengths: Any, **kwargs: Any) -> tuple:
        encoder_out, _ = self.encode(speech, speech_lengths)
        loss = encoder_out.square().mean()[None]  # as force_gatherable leaves it
        return loss, {"loss": loss.detach()}, torch.tensor([len(speech)])


class Augmenter:
    """SpeechBrain's, with concat_original: the batch, then its copies."""

    def __init__(self, copies: int) -> None:
        self.copies = copies

    def __call__(self, x: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.cat([x] * self.copies), torch.cat([lengths] * self.copies)

    def replicate_labels(self, labels: torch.Tensor) -> torch.Tensor:
        return torch.cat([labels] * self.copies, dim=0)


class ASR:
    """Of SpeechBrain's recipe, and what it has of Brain."""

    def __init__(self, modules: dict[str, nn.Module], hparams: dict[str, Any]) -> None:
        self.modules, self.hparams = nn.ModuleDict(modules), SimpleNamespace(**hparams)

    def compute_forward(self, batch: Any, stage: str) -> tuple:
        wavs, wav_lens = batch.sig
        if stage == "TRAIN":
            wavs, wav_lens = self.hparams.wav_augment(wavs, wav_lens)
        x = self.modules.enc(wavs.unflatten(1, (-1, FRAMES)), wav_lens, pad_idx=0)
        return (None, None, x, wav_lens) if stage == "TRAIN" else (x, wav_lens, [])

    def compute_objectives(self, predictions: tuple, batch: Any, stage: str) -> torch.Tensor:
        return predictions[2 if stage == "TRAIN" else 0].square().mean()


class Enc(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(FRAMES, dim)

    def forward(self, src: torch.Tensor, wav_lens: torch.Tensor, pad_idx: int = 0) -> torch.Tensor:
        return self.linear(src)


Entry = namedtuple("Entry", "id audio_file duration text_tokens offset text_raw speaker orig_sr lang")


class EncDecRNNTBPEModel(nn.Module):
    """NeMo: `lines` are the manifest's lines that its filters left."""

    def __init__(self, dim: int, lines: list[int]) -> None:
        super().__init__()
        self.encoder = nn.Linear(FRAMES, dim)
        collection = [Entry(n, f"{n}.wav", 1.0, [], None, "", None, None, None) for n in lines]
        dataset = SimpleNamespace(manifest_processor=SimpleNamespace(collection=collection))
        self._train_dl = SimpleNamespace(dataset=dataset)

    def forward(
        self,
        input_signal: Any = None,
        input_signal_length: Any = None,
        processed_signal: Any = None,
        processed_signal_length: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.encoder(input_signal.unflatten(1, (-1, FRAMES))).transpose(1, 2), input_signal_length // FRAMES

    def training_step(self, batch: Any, batch_nb: int) -> dict[str, torch.Tensor]:
        signal, signal_len, _, _ = batch
        encoded, _ = self.forward(input_signal=signal, input_signal_length=signal_len)
        return {"loss": encoded.square().mean()}


def modules() -> dict[str, ModuleType]:
    """By the names under which docs/reference/python.md imports them."""

    def module(name: str, **names: Any) -> ModuleType:
        made = ModuleType(name)
        vars(made).update(names)
        return made

    held = {
        "model": {"AsrModel": AsrModel},
        "espnet2.asr_transducer.espnet_transducer_model": {"ESPnetASRTransducerModel": ESPnetASRTransducerModel},
        "speechbrain": {"Stage": SimpleNamespace(TRAIN="TRAIN", VALID="VALID")},
        "train": {"ASR": ASR},
        "nemo.collections.asr.models": {"EncDecRNNTBPEModel": EncDecRNNTBPEModel},
    }
    above = {name.rsplit(".", n)[0] for name in held for n in range(1, name.count(".") + 1)}
    return {name: module(name) for name in above} | {name: module(name, **names) for name, names in held.items()}
