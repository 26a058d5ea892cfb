"""The two loops that bench_train.py compares: the trainer's own steps, and a loop that one would write with torchaudio.

Beside them is what watches a step: its losses' backward pass, and how many cells of the lattices have a gradient.
"""

from __future__ import annotations

import math
import time
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.data.batches.loader import Batch, prefetch
from stillhouse.train.config import Config, learning_rate
from stillhouse.train.loop.specaugment import spec_augment
from stillhouse.train.loop.step import seed_of
from stillhouse.train.loop.trainer import Trainer
from stillhouse.train.model import layers
from stillhouse.train.rnnt.cpu.joint import CpuJointLoss
from stillhouse.train.run.stopwatch import Stopwatch

WIDTH, SHARPNESS = 1.0, 1.0  # of the planted ridge


class Ours:
    """The trainer's own steps, as its loop takes them."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.trainer = Trainer(config, folder)
        self.batches = prefetch(self.trainer.sampler, self.trainer.loader.load, epoch=0, position=0)
        self.watch: Any = LossWatch()
        self.frames = 0
        self.loss: list[float] = []
        self.trainer.model.encoder.register_forward_hook(lambda module, given, found: self.watch.states(found[0]))

    def step(self, _: int = 0) -> None:
        with self.watch("data"):
            _, _, batch = next(self.batches)
        self.batch = batch
        self.loss.append(self.trainer._update(batch, None, self.watch)["loss"])
        self.trainer.step += 1
        self.frames += int(batch.feature_lengths.sum())


def plant(ours: Ours) -> None:
    """Alignments as training makes them: a unit of the joint's width compares the time with how many units have been
    emitted, and the scores of blank, or of all others, hang on it. All else stays as it was initialised.
    """
    network = ours.trainer.model.joint

    def time_of(module: object, given: object, found: Tensor) -> Tensor:
        frames = (ours.batch.feature_lengths + 3) // 4
        due = torch.arange(1, found.shape[1] + 1) * (ours.batch.target_lengths / frames)[:, None]
        return torch.cat([due[..., None] / WIDTH, found[..., 1:]], -1)

    def place_of(module: object, given: object, found: Tensor) -> Tensor:
        emitted = (torch.arange(found.shape[1]) + 0.5).expand(found.shape[:2])
        return torch.cat([-emitted[..., None] / WIDTH, found[..., 1:]], -1)

    network.encoder.register_forward_hook(time_of)
    network.predictor.register_forward_hook(place_of)
    with torch.no_grad():
        network.output.weight[:, 0] = SHARPNESS
        network.output.weight[0, 0] = -SHARPNESS
        network.output.bias[0] += math.log(network.output.bias.numel() - 1)  # as likely as all others together


class Cells:
    """How many cells of the lattices have been in a backward pass, and how many of them got a gradient."""

    def __init__(self) -> None:
        self.active = self.all = 0
        self.backward: Any = CpuJointLoss.gradients
        CpuJointLoss.gradients = lambda loss, *inputs: self.count(loss, *inputs)

    def count(self, loss, *inputs):
        _, occ_blank, occ_label = loss.kept
        self.active += int((occ_blank + occ_label > loss.options.eps).sum())
        self.all += occ_blank.size
        return self.backward(loss, *inputs)

    def take(self) -> float:
        share, self.active, self.all = self.active / self.all, 0, 0
        return share


class LossWatch(Stopwatch):
    """Tells the backward pass of all losses and the joint network from the encoder's: the former is over when the
    encoder's last states have their gradient. CPU time of this thread, which does all of the arithmetic: what else runs
    on the machine counts less. Waiting for data is by the clock.
    """

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def watch_transfer(self, inputs: object) -> None:
        """The whole of the losses is wanted, not the transfer's part."""

    def states(self, states: Tensor) -> None:
        if states.requires_grad:
            states.register_hook(self.arrived)

    def arrived(self, gradient: Tensor) -> None:
        self.split = time.thread_time()

    def _now(self, device: bool) -> float:
        return time.thread_time() if device else time.perf_counter()


class Plain:
    """The same training as a loop that one would write with torchaudio."""

    def __init__(self, config: Config, folder: Path) -> None:
        like = Trainer(config, folder)  # for its model, its data and its order
        self.config, self.model, self.plans, self.load = config, like.model, like.sampler.epoch(0), like.loader.load
        decay = [p for p in self.model.parameters() if p.dim() > 1]
        rest = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": decay, "weight_decay": config.optim.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=config.optim.lr, betas=config.optim.betas)
        self.number = 0
        self.loss: list[float] = []

    def step(self, _: int = 0) -> None:
        batch = self.load(self.plans[self.number % len(self.plans)])
        seed = self.config.run.seed
        torch.manual_seed(seed_of(seed, self.number))
        self.model.train()
        with mock.patch.object(layers._Depthwise, "apply", layers.depthwise):
            loss = self.losses(batch, torch.Generator().manual_seed(seed_of(seed + 7919, self.number)))
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.number, self.config)
        self.optimiser.step()
        self.loss.append(float(loss.detach()))
        self.number += 1

    def losses(self, batch: Batch, augment: torch.Generator) -> Tensor:
        import torchaudio

        model, config = self.model, self.config
        features = model.encoder.normalise(batch.features, batch.feature_lengths)
        masks = config.specaugment.masks(batch.frame_hz, batch.mel)
        features = spec_augment(features, batch.feature_lengths, augment, **masks)
        states, lengths, _ = model.encoder(features, batch.feature_lengths, generator=augment)
        e, p = model.joint.encoder(states), model.joint.predictor(model.predictor(batch.targets))
        logits = model.joint(e[:, :, None], p[:, None])  # (B, T, U + 1, V)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated
            loss = torchaudio.functional.rnnt_loss(
                logits, batch.targets, lengths.int(), batch.target_lengths, blank=0, reduction="sum"
            )
        scores = model.ctc(states).log_softmax(-1).transpose(0, 1)
        known = (batch.targets.long(), lengths, batch.target_lengths.long())
        ctc = F.ctc_loss(scores, *known, blank=0, reduction="sum", zero_infinity=True)
        return (loss + config.loss.ctc_weight * ctc) / batch.target_lengths.sum()
