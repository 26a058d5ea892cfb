"""A step of a transducer of transformers with our loss, beside the same step as transformers has it.

A small random Parakeet encoder with the vocabulary, the prediction network and the joint of the published 0.6 B models,
because the lattice is what the two losses treat differently. Both take the same batch, forward and backward, in turns
in one process. CPU seconds of one thread; memory is the growth of the peak resident set in a step.
Run: `make bench-parakeet`; `python tests/bench/bench_parakeet.py [ROUNDS]`.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "lib"))
import parakeets
from loss_cases import extra_memory
from measuring import Row, at_least, beside, rounds, write_table

from stillhouse.train import attach_transfer

OUT = Path(__file__).resolve().parents[2] / "docs" / "bench" / "parakeet.md"
UNITS, WIDTH = 1025, 640  # of parakeet-rnnt-0.6b
UTTERANCES, FRAMES, LABELS = 4, 400, 20  # 4 s each


def step_of(kind: str, ours: bool) -> Callable[[], float]:
    """Return a step that gives its loss: forward, backward, and the gradients dropped."""
    options: dict[str, Any] = {"decoder_hidden_size": WIDTH, "num_decoder_layers": 2}
    model = parakeets.model(kind, size=UNITS, blank=UNITS - 1, pad=2, **options)
    if ours:
        attach_transfer(model)
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_features": torch.randn(UTTERANCES, FRAMES, parakeets.BINS, generator=generator),
        "attention_mask": torch.ones(UTTERANCES, FRAMES, dtype=torch.long),
        "labels": torch.randint(3, UNITS - 1, (UTTERANCES, LABELS), generator=generator),
    }
    if not ours:  # transformers' model does not make the decoder's inputs of the labels
        start = torch.full((UTTERANCES, 1), UNITS - 1)
        batch["decoder_input_ids"] = torch.cat([start, batch["labels"]], 1)

    def step() -> float:
        loss = model(**copy.copy(batch)).loss
        loss.backward()
        model.zero_grad()
        return float(loss.detach())

    return step


def measured(kind: str, count: int) -> list[Row]:
    steps = [step_of(kind, True), step_of(kind, False)]
    difference = abs(steps[0]() - steps[1]())
    own, other = rounds(lambda _: steps[0](), lambda _: steps[1](), count, time.process_time)
    memory = [extra_memory(step) / 2**20 for step in steps]
    name = {"rnnt": "RNN-T", "tdt": "token-and-duration"}[kind]
    times = f"{np.median(own):.2f} s beside {np.median(other):.2f} s; the losses differ by {difference:.1g}"
    sizes = f"{memory[0]:.0f} beside {memory[1]:.0f} MiB"
    return [
        at_least(f"{name}, time of transformers over ours", own, other, 1.0, times),
        beside(f"{name}, memory of transformers over ours", memory[:1], memory[1:], sizes),
    ]


def main() -> None:
    torch.set_num_threads(1)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    rows = [row for kind in ("rnnt", "tdt") for row in measured(kind, count)]
    remarks = [
        f"A batch of {UTTERANCES} utterances of {FRAMES / 100:g} s and {LABELS} labels, with {UNITS} units and a joint "
        f"of {WIDTH}. The encoder is small, so that the table shows the loss and the joint. CPU seconds of one thread, "
        f"medians of {count} rounds."
    ]
    write_table(OUT, "Transducers of transformers", "make bench-parakeet", rows, remarks)


if __name__ == "__main__":
    main()
