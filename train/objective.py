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

from .config import Config
from .costs import ctc_cost, transducer_costs
from .loader import Batch
from .model import BLANK, Transducer
from .rnnt import prune_ranges, rnnt_loss_simple
from .specaugment import spec_augment

Timed = Callable[[str], AbstractContextManager]


@dataclass(frozen=True)
class Losses:
    """`total` has the graph; `parts` are detached scalars by name; `costs` [B] the RNN-T loss of each utterance."""

    total: Tensor
    costs: Tensor
    parts: dict[str, Tensor]


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
) -> Losses:
    """The losses of one batch. `transfer` is a distill.Transfer or None; `augment` None: no SpecAugment."""
    device = batch.features.device
    lengths = batch.feature_lengths.to(device)
    units = int(batch.target_lengths.sum())
    with timed("encoder"):
        features = model.encoder.normalise(batch.features, lengths)
        if augment is not None:
            features = spec_augment(features, batch.feature_lengths, augment, **config.specaugment.model_dump())
        tap = config.transfer.layers if transfer is not None else []
        with autocast(device, precision):
            states, state_lengths, taps = model.encoder(features, lengths, taps=[*tap, *config.loss.inter_ctc_layers])
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
            # T frames of w units get past T * (w - 1) units
            needed = int((-(-batch.target_lengths // on_cpu)).max()) + 1
            ranges = prune_ranges(gamma, on_cpu, batch.target_lengths, max(config.loss.band, needed))
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
    if transfer is not None:
        with timed("transfer"):
            tapped = [taps[n].float() for n in tap] or [states.float()]
            found = transfer(tapped, state_lengths, batch.transfer, occupancy, predicted.float())
            parts["transfer"] = found.loss.detach()
            parts |= {f"transfer/{view}": value for view, value in found.per_view.items()}
            parts |= {f"weight/{view}": value for view, value in found.weights.items()}
            parts["transfer_positions"] = torch.tensor(float(found.positions))
            parts["transfer_masked"] = torch.tensor(float(found.masked))  # positions that no token or unit overlaps
            parts["transfer_skipped"] = torch.tensor(float(found.skipped))  # utterances that the store lacks
            total = total + transfer_weight * found.loss
    parts["loss"] = total.detach()
    return Losses(total, costs.detach(), parts)
