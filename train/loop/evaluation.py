"""The evaluation of a run on its dev split: error rates of the greedy search, the transducer loss, and perplexity.

Guarantees: all ranks return the same numbers. A request to stop on any rank ends the evaluation on all of them.
Try: `stillhouse train CONFIG --set run.eval_every=100`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from ...data.batches.loader import BatchLoader
from ...data.files.stopping import StopRequest
from ..config import Config
from ..decode.decode import transcribe
from ..run.ranks import Ranks
from ..score.hypotheses import write_hypotheses
from ..score.wer import score
from .objective import held_out_cost
from .text import perplexity


def evaluate_dev(
    model: Any,
    dev: BatchLoader,
    config: Config,
    device: torch.device,
    ranks: Ranks,
    stop: StopRequest,
    path: Path,
    *,
    alone: bool = False,
) -> dict[str, float] | None:
    """Return `wer`, `cer` and `rnnt`, the transducer loss per unit, or None after a request to `stop`.

    Each rank decodes its part `dev`, and rank 0 writes the hypotheses to `path`, as `stillhouse decode` does. If the
    run learns text, there is its `text_perplexity`, too. It is `alone` before the encoder learns anything.
    """
    found = {"text_perplexity": perplexity(model, dev.encoded, config, device, ranks)} if config.text.split else {}
    if alone:
        return found
    asked, some = partial(getattr, stop, "requested"), bool(dev.utterances)
    decoded = transcribe(model, dev, device=device, longest=config.data.max_frames) if some and not asked() else ()
    done = takewhile(lambda _: not asked(), decoded)
    hypotheses = [(h.id, h.ref, h.hyp) for h in done]
    own_cost = held_out_cost(model, dev, config, device, asked) if some else (0.0, 0)
    stops, own_costs = zip(*ranks.gather((asked(), own_cost)))
    if any(stops):
        return None
    costs, units = zip(*own_costs)
    triples = [triple for part in ranks.gather(hypotheses) for triple in part]

    def error_rates() -> tuple[float, float]:
        write_hypotheses(path, triples)
        result = score([ref for _, ref, _ in triples], [hyp for _, _, hyp in triples])
        return result.wer.rate, result.cer.rate

    wer, cer = ranks.from_first(error_rates)
    return {"wer": wer, "cer": cer, "rnnt": math.fsum(costs) / sum(units)} | found


def in_words(figures: Mapping[str, float]) -> str:
    """Return what `evaluate_dev` found, as a line for people."""
    rates = [f"{name.upper()} {100 * figures[name]:.1f} %" for name in ("wer", "cer") if name in figures]
    names = {"rnnt": "rnnt {:.3f}", "text_perplexity": "perplexity of a unit {:.2f}"}
    return "  ".join(rates + [text.format(figures[name]) for name, text in names.items() if name in figures])
