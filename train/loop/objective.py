"""The objective of a training step: transducer loss + c * CTC on the encoder + the sum of lambda * transfer.

With intermediate CTC (Lee and Watanabe 2021, arXiv 2102.03216), one head computes the CTC losses of several layers. The
CTC term is then (1 - w) of the last layer's loss and w of the mean of the others'.

With consistency (Yao et al. 2024, arXiv 2410.05101), the encoder reads two copies of each utterance, with unlike masks.
The transducer and CTC losses are the means of the copies, and `consistency` is how far their CTC outputs differ.
Transfers read the first copy, because the contrastive distance would take the second one's states for negatives.

Guarantees: the transducer and CTC terms are sums over the batch, divided by its units. So a unit has the same weight in
short and in long utterances.
Try: `pytest tests/train/loop/test_trainer.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ...data.batches.loader import Batch, BatchLoader
from ...data.batches.sampler import BatchSampler
from ..config import Config, in_transfer
from ..model.losses import consistency_cost, ctc_cost, transducer_costs
from ..model.transducer import BLANK, Transducer
from ..rnnt import prune_ranges, rnnt_loss_simple
from .batch_share import GlobalBatch, part_sizes
from .specaugment import spec_augment

Timed = Callable[[str], AbstractContextManager]


@dataclass(frozen=True)
class Losses:
    """The losses of a batch: `total` has the graph, `parts` are detached scalars by name.

    `costs` [B] is the transducer loss of each utterance. `transfer_inputs` has the student's states that each transfer
    reads, by its name. Their gradients are those of this transfer alone.
    """

    total: Tensor
    costs: Tensor
    parts: dict[str, Tensor]
    transfer_inputs: dict[str, list[Tensor]]


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Return a context that computes in "float32" or "bfloat16"."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def losses(
    model: Transducer,
    transfers: Mapping[str, Any],
    batch: Batch,
    config: Config,
    *,
    precision: str,
    weights: Mapping[str, float],
    augment: torch.Generator | None,
    timed: Timed = lambda _: nullcontext(),
    whole: GlobalBatch | None = None,
) -> Losses:
    """Compute the losses of one batch. `transfers` are distill.Transfers by name, and `weights` their lambdas.

    `augment` draws SpecAugment's masks and the chunk size, and None applies no mask. `timed` makes a context for each
    part of the step, by name. If `batch` is a part of `whole`, the sums over ranks of the losses and gradients are
    those of the whole.
    """
    device = batch.features.device
    lengths = batch.feature_lengths.to(device)
    whole = whole or GlobalBatch([part_sizes(model, transfers, batch)])
    settings, size = config.loss, len(batch.ids)
    copies = 2 if augment is not None and settings.consistency_weight else 1
    units = whole.units * copies
    with timed("encoder"):
        features = model.encoder.normalise(batch.features, lengths)
        if augment is not None:
            masks = config.specaugment.masks(batch.frame_hz, batch.mel)
            mask = partial(spec_augment, features, batch.feature_lengths, augment, part=batch.part, **masks)
            features = torch.cat([mask() for _ in range(copies)])
            lengths = lengths.repeat(copies)
        layers = {name: config.transfer.transfers[name].layers for name in transfers}
        with autocast(device, precision):
            tapped = [*chain(*layers.values()), *settings.inter_ctc_layers]
            # The chunk is drawn like the masks, so that it is the same on every rank.
            states, state_lengths, taps = model.encoder(features, lengths, taps=tapped, generator=augment)
            e = model.joint.encoder(states)
            predicted = model.predictor(batch.targets.to(device))
            p = model.joint.predictor(predicted).repeat(copies, 1, 1)
    with timed("loss"):
        # These are the numbers of state_lengths, without waiting for the device.
        on_cpu = model.encoder.output_lengths(batch.feature_lengths).to(torch.int32)
        targets, target_lengths = batch.targets.repeat(copies, 1), batch.target_lengths.repeat(copies)
        known = (targets, on_cpu.repeat(copies), target_lengths)
        simple = ranges = None
        if model.simple is not None:
            am, lm = model.simple(states.float(), predicted.float().repeat(copies, 1, 1))
            simple, gamma = rnnt_loss_simple(am, lm, *known, blank=BLANK, reduction="none")
            ranges = prune_ranges(gamma, *known[1:], max(settings.band, whole.band))
        terms = settings.model_dump(include={"eps", "fastemit", "sigma"})
        want = any(transfer.needs_occupancy for transfer in transfers.values())
        costs, occupancy = transducer_costs(model, e, p, *known, **terms, ranges=ranges, want_occupancy=want)
        total = costs.sum() / units
        parts = {"rnnt": total.detach()}
        if simple is not None:
            parts["simple"] = simple.detach().sum() / units
            total = total + settings.simple_weight * simple.sum() / units
        if model.ctc is not None:
            labels = (state_lengths, targets, target_lengths)
            scores = model.ctc(states)
            ctc = ctc_cost(scores, *labels)
            parts["ctc"] = ctc.detach() / units
            if settings.inter_ctc_layers:
                inter = torch.stack([ctc_cost(model.ctc(taps[n]), *labels) for n in settings.inter_ctc_layers]).mean()
                parts["inter_ctc"] = inter.detach() / units
                ctc = torch.lerp(ctc, inter, settings.inter_ctc_weight)
            total = total + settings.ctc_weight * ctc / units
            if copies > 1:
                unlike = consistency_cost(scores, state_lengths) / units
                parts["consistency"] = unlike.detach()
                total = total + settings.consistency_weight * unlike
    inputs: dict[str, list[Tensor]] = {}
    for name, transfer in transfers.items():
        with timed("transfer"):
            of_first = [x[:size] for x in ([taps[n] for n in layers[name]] or [states])]
            states_of = [x.float() for x in (*of_first, predicted)]
            inputs[name] = [x.view_as(x) for x in states_of]  # The gradient of such a view is this transfer's alone.
            *encoded, after = inputs[name]
            first = state_lengths[:size], batch.transfer[name], None if occupancy is None else occupancy[:size]
            result = transfer(encoded, *first, after, whole.transfer(name))
            metric = partial(in_transfer, name=name)
            parts[metric("transfer")] = loss = result.loss.detach()
            parts |= {f"{metric('transfer')}/{view}": value for view, value in result.per_view.items()}
            parts |= {f"{metric('weight')}/{view}": value for view, value in result.weights.items()}
            parts[metric("transfer_positions")] = torch.tensor(float(result.positions))
            parts[metric("transfer_masked")] = torch.tensor(float(result.masked))  # no token or unit overlaps them
            parts[metric("transfer_skipped")] = torch.tensor(float(result.skipped))  # the store lacks these utterances
            if name:  # beside the loss of each, their sum
                parts["transfer"] = parts.get("transfer", torch.zeros_like(loss)) + loss
            total = total + weights[name] * result.loss
    parts["loss"] = total.detach()
    if not batch.share:  # A stand-in does what the other ranks do, and adds nothing.
        total = total * 0.0
        parts = {name: value if name.startswith("weight") else value * 0.0 for name, value in parts.items()}
    return Losses(total, costs.detach().view(copies, size).mean(0), parts, inputs)


@torch.no_grad()
def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Return the Euclidean norm of all gradients as float32.

    The sum is in float64, where heads with a gradient of 0 do not change the last bit. So a transfer of weight 0 trains
    the same weights as no transfer.
    """
    norms = [torch.linalg.vector_norm(p.grad) for p in parameters if p.grad is not None]
    return torch.stack(norms).double().norm().float()


def squared_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Return the squared norm of the tensors' gradients together."""
    return sum((x.grad.square().sum() for x in tensors if x.grad is not None), torch.zeros(()))


def held_out_cost(
    model: Transducer,
    loader: BatchLoader,
    config: Config,
    device: torch.device,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[float, int]:
    """Return the sums of the transducer loss and of the units over all utterances of `loader`.

    There are no masks, no dropout and no transfer, and all is float32. The quotient is what training logs as `rnnt`.
    The sums are of the batches before `stop` returned True.
    """
    model.eval()
    cost, units = 0.0, 0
    for plan in BatchSampler(loader.frames, max_frames=config.data.batch_frames, shuffle=False).epoch(0):
        if stop():
            break
        batch = loader.load(plan).to(device)
        costs = losses(model, {}, batch, config, precision="float32", weights={}, augment=None).costs
        cost += float(costs.double().sum())
        units += int(batch.target_lengths.sum())
    return cost, units
