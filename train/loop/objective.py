"""What a training step minimises: transducer loss + c · CTC on the encoder + λ · transfer.

With intermediate CTC (Lee and Watanabe 2021, arXiv 2102.03216) the CTC term is (1 - w) of the last layer's loss and w
of the mean of the others', all through one head.

Invariant: the RNN-T and CTC terms are sums over the batch divided by its units, so that short and long utterances
weigh alike a unit, in whatever batch they land. Exercised by `stillhouse train`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...data.batches.loader import Batch, BatchLoader
from ...data.batches.sampler import BatchSampler
from ..config import Config
from ..model.losses import ctc_cost, transducer_costs
from ..model.transducer import BLANK, Transducer
from ..rnnt import prune_ranges, rnnt_loss_simple
from .batch_share import GlobalBatch, part_sizes
from .specaugment import spec_augment

Timed = Callable[[str], AbstractContextManager]


@dataclass(frozen=True)
class Losses:
    """`total` has the graph; `parts` are detached scalars by name; `costs` [B] the RNN-T loss of each utterance;
    `transfer_inputs` what the transfer was given of the transducer, for nothing but to time its backward pass.
    """

    total: Tensor
    costs: Tensor
    parts: dict[str, Tensor]
    transfer_inputs: tuple[Tensor, ...] = ()


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def losses(
    model: Transducer,
    transfer: Any,
    batch: Batch,
    config: Config,
    *,
    precision: str,
    transfer_weight: float,
    augment: torch.Generator | None,
    timed: Timed = lambda _: nullcontext(),
    whole: GlobalBatch | None = None,
) -> Losses:
    """The losses of one batch. `transfer` is a distill.Transfer or None; `augment` None: no SpecAugment; `whole`: what
    `batch` is a part of. Then totals, parts and gradients are those of the part, whose sum over ranks is the whole's.
    """
    device = batch.features.device
    lengths = batch.feature_lengths.to(device)
    whole = whole or GlobalBatch([part_sizes(model, transfer, batch)])
    units = whole.units
    with timed("encoder"):
        features = model.encoder.normalise(batch.features, lengths)
        if augment is not None:
            masks = config.specaugment.model_dump()
            features = spec_augment(features, batch.feature_lengths, augment, part=batch.part, **masks)
        tap = config.transfer.layers if transfer is not None else []
        with autocast(device, precision):
            tapped = [*tap, *config.loss.inter_ctc_layers]
            # Drawn as the masks are: the same on every rank
            states, state_lengths, taps = model.encoder(features, lengths, taps=tapped, generator=augment)
            e = model.joint.encoder(states)
            predicted = model.predictor(batch.targets.to(device))
            p = model.joint.predictor(predicted)
    with timed("loss"):
        needs_occupancy = transfer is not None and transfer.needs_occupancy
        # The same numbers as state_lengths, without waiting for the device
        on_cpu = model.encoder.output_lengths(batch.feature_lengths).to(torch.int32)
        simple, ranges = None, None
        if model.simple is not None:
            am, lm = model.simple(states.float(), predicted.float())
            simple, gamma = rnnt_loss_simple(
                am,
                lm,
                batch.targets,
                on_cpu,
                batch.target_lengths,
                blank=BLANK,
                reduction="none",
            )
            band = max(config.loss.band, whole.band)
            ranges = prune_ranges(gamma, on_cpu, batch.target_lengths, band)
        costs, occupancy = transducer_costs(
            model,
            e,
            p,
            batch.targets,
            on_cpu,
            batch.target_lengths,
            eps=config.loss.eps,
            fastemit=config.loss.fastemit,
            sigma=config.loss.sigma,
            ranges=ranges,
            want_occupancy=needs_occupancy,
        )
        total = costs.sum() / units
        parts = {"rnnt": total.detach()}
        if simple is not None:
            parts["simple"] = simple.detach().sum() / units
            total = total + config.loss.simple_weight * simple.sum() / units
        if model.ctc is not None:
            known = (state_lengths, batch.targets, batch.target_lengths)
            ctc = ctc_cost(model.ctc(states), *known)
            parts["ctc"] = ctc.detach() / units
            if config.loss.inter_ctc_layers:
                inter = torch.stack([ctc_cost(model.ctc(taps[n]), *known) for n in config.loss.inter_ctc_layers]).mean()
                parts["inter_ctc"] = inter.detach() / units
                ctc = torch.lerp(ctc, inter, config.loss.inter_ctc_weight)
            total = total + config.loss.ctc_weight * ctc / units
    inputs: list[Tensor] = []
    if transfer is not None:
        with timed("transfer"):
            inputs = [*([taps[n].float() for n in tap] or [states.float()]), predicted.float()]
            inputs = [x.view_as(x) for x in inputs]  # views have gradients of their own: the transfer's alone
            found = transfer(inputs[:-1], state_lengths, batch.transfer, occupancy, inputs[-1], whole.transfer)
            parts["transfer"] = found.loss.detach()
            parts |= {f"transfer/{view}": value for view, value in found.per_view.items()}
            parts |= {f"weight/{view}": value for view, value in found.weights.items()}
            parts["transfer_positions"] = torch.tensor(float(found.positions))
            parts["transfer_masked"] = torch.tensor(float(found.masked))  # positions that no token or unit overlaps
            parts["transfer_skipped"] = torch.tensor(float(found.skipped))  # utterances that the store lacks
            total = total + transfer_weight * found.loss
    parts["loss"] = total.detach()
    if not batch.share:  # a stand-in: it only keeps step with the other ranks
        total = total * 0.0
        parts = {name: value if name.startswith("weight/") else value * 0.0 for name, value in parts.items()}
    return Losses(total, costs.detach(), parts, tuple(inputs))


@torch.no_grad()
def held_out_cost(model: Transducer, loader: BatchLoader, config: Config, device: torch.device) -> tuple[float, int]:
    """The RNN-T loss of every utterance of `loader` and its units, both summed: nothing masked or dropped out, float32,
    no transfer. The quotient is what training calls `rnnt`.
    """
    model.eval()
    cost, units = 0.0, 0
    for plan in BatchSampler(loader.frames, max_frames=config.data.batch_frames, shuffle=False).epoch(0):
        batch = loader.load(plan).to(device)
        found = losses(model, None, batch, config, precision="float32", transfer_weight=0.0, augment=None)
        cost += float(found.costs.double().sum())
        units += int(batch.target_lengths.sum())
    return cost, units
