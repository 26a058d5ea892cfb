"""Text without sound: batches of it, its loss by the internal language model, and the perplexity of held-out units.

The internal language model is `Joint.internal`, which `stillhouse decode --ilm-weight` subtracts.

Guarantees: a text trains the prediction network, the joint network's side of it, and transfers with the aligner
predictor. Nothing of the encoder changes in a step of text alone, not even by weight decay.
Try: `stillhouse train CONFIG --set text.split=text --set text.pretrain_steps=200`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...data.batches.loader import Batch, padded_units, prefetch
from ...data.batches.sampler import BatchSampler
from ...data.batches.text import TextLoader
from ...data.errors import ConfigError
from ...data.features.compute import FeatureFile
from ...data.manifest import Corpus
from ...data.units import UNKNOWN, Encoded, Units
from ..config import Config, in_transfer
from ..model.build import store_shards
from ..model.transducer import BLANK, Transducer
from ..run import identity
from ..run.ranks import Ranks
from .batch_share import GlobalBatch
from .objective import Losses, Timed, autocast

LABEL_SIDE = ("model.predictor.", "model.joint.predictor.", "model.joint.output.")  # what a text trains of the model


class TextBatches:
    """The batches of text of a run, and how far it has read them.

    `targets` are the `TargetReader` of each transfer that learns from text. `identity` is a fingerprint of the texts
    and of their order. Raises CorpusError if the splits have no text without audio.
    """

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        features: FeatureFile,
        units: Units,
        targets: Mapping[str, Any],
        on_progress: Callable[[str], None],
    ) -> None:
        text = config.text
        selected = corpus.select(text.split)
        self.loader = TextLoader(selected, features.ids, units, max_units=text.max_units, targets=targets)
        ids = [u.id for u in self.loader.utterances]
        self.sampler = BatchSampler(
            self.loader.lengths[:, None],
            max_frames=text.batch_units,
            max_count=text.lines,
            seed=config.run.seed,
            shards=store_shards(config, ids) if targets else None,
            mix=config.data.mix_shards,
        )
        self.identity = identity.text_identity(self.loader.utterances, self.sampler)
        self.epoch = self.position = 0
        on_progress(f"text: {len(ids)} texts without audio, {self.loader.lengths.sum()} units ({self.loader.without})")

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"epoch": self.epoch, "position": self.position, "data": self.identity}

    def read(self, ranks: Ranks) -> Generator[tuple[int, int, Batch], None, None]:
        """Yield this rank's parts of the next batches, as `prefetch` does."""
        own = self.sampler.shared(ranks.rank, ranks.size)
        return prefetch(own, self.loader.load, epoch=self.epoch, position=self.position)


def text_losses(
    model: Transducer,
    transfers: Mapping[str, Any],
    batch: Batch,
    *,
    precision: str,
    weights: Mapping[str, float],
    whole: GlobalBatch,
    timed: Timed = lambda _: nullcontext(),
) -> Losses:
    """Compute the losses of a batch of text. `transfers` are those that learn from text, `weights` their lambdas.

    `text` is the cross-entropy of a unit, given those before it. Parts of a batch are divided by the sizes of `whole`.
    """
    with timed("text"):
        device = model.joint.output.weight.device
        with autocast(device, precision):
            costs, predicted = internal_costs(model, batch.targets, device)
            costs = costs.sum(1)
        total = costs.sum() / whole.units
        parts = {"text": total.detach()}
        for name, transfer in transfers.items():
            nothing = predicted.new_zeros(len(predicted), 1, 1)  # instead of encoder states
            lengths = torch.zeros(len(predicted), dtype=torch.int64, device=device)
            own = batch.transfer[name]
            result = transfer(nothing, lengths, own, None, predicted.float(), whole.transfer(name))
            parts[in_transfer("text_transfer", name)] = result.loss.detach()
            parts[in_transfer("text_transfer_skipped", name)] = torch.tensor(float(result.skipped))
            total = total + weights[name] * result.loss
        if not batch.share:
            total, parts = total * 0.0, {name: value * 0.0 for name, value in parts.items()}
        return Losses(total, costs.detach(), parts, {})


def internal_costs(model: Transducer, units: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the negative log-probability of each unit [B, U] by the internal language model, and predictor states.

    The units [B, U] are padded with blanks, which no text has.
    """
    units = units.to(device).long()
    predicted = model.predictor(units)
    scores = model.joint.internal(model.joint.predictor(predicted[:, :-1]))
    costs = F.nll_loss(scores.flatten(0, 1), units.flatten(), ignore_index=BLANK, reduction="none")
    return costs.view(units.shape), predicted


@torch.no_grad()
def perplexity(
    model: Transducer, encoded: Sequence[Encoded], config: Config, device: torch.device, ranks: Ranks
) -> float:
    """Return exp of the internal language model's mean cross-entropy over the known units of all ranks, in float32.

    Each rank gives its own texts, perhaps none. Unknown symbols do not count, but they are context. NaN without units.
    """
    model.eval()
    by_length = sorted(encoded, key=lambda e: -len(e.ids))
    cost, count = 0.0, 0
    for first in range(0, len(by_length), config.text.lines):
        units, _ = padded_units([e.ids for e in by_length[first : first + config.text.lines]])
        counted = (units != BLANK) & (units != UNKNOWN)
        cost += float(internal_costs(model, units, device)[0].double()[counted.to(device)].sum())
        count += int(counted.sum())
    costs, counts = zip(*ranks.gather((cost, count)))
    mean = math.fsum(costs) / sum(counts) if sum(counts) else math.nan
    return math.exp(mean) if not mean >= 700 else math.inf


def label_side(name: str, transfers: Mapping[str, Any]) -> bool:
    """Return whether text trains a parameter, by its name with that of its module in front."""
    heads = tuple(f"{in_transfer('transfer', n)}." for n, t in transfers.items() if t.needs_predictor)
    return name.startswith((*LABEL_SIDE, *heads))


def refuse_frozen(config: Config, names: Mapping[Tensor, str], transfers: Mapping[str, Any]) -> None:
    """Raise ConfigError if text has nothing of the model to train. `names` are those of the trained parameters."""
    if not any(label_side(name, transfers) for name in names.values()):
        raise ConfigError(
            f"text.split has no weight to train: init.freeze = {', '.join(config.init.freeze)} holds all of them",
            remedy="freeze the encoder alone, or remove [text]",
        )


@contextmanager
def without_gradients(names: Mapping[Tensor, str], transfers: Mapping[str, Any]) -> Iterator[None]:
    """Take the gradients from the parameters that text does not train, so that the optimiser leaves them as they are.

    Ranks have a gradient of 0 there, and with it the optimiser would decay the weights.
    """
    kept = {p: p.grad for p, name in names.items() if not label_side(name, transfers)}
    for p in kept:
        p.grad = None
    try:
        yield
    finally:
        for p, gradient in kept.items():
            p.grad = gradient
