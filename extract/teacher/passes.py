"""How texts go through one model: which share a batch, and how a mask of blocks is given to it.

Guarantees: the choice is plain text in a store's plan, so all writers of a store make the same passes.
Try: `pytest tests/extract/teacher/test_exact.py`.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ...data.errors import StoreError

if TYPE_CHECKING:
    import torch

    from ..store.format.plan import Plan

Rows = Literal["padded", "equal", "single"]
BlockMask = Literal["additive", "own", "binary"]

_ROWS = {
    "padded": "batches with padding",
    "equal": "batches of texts of equal length, because padding changes this model's states",
    "single": "one text at a time, because the other texts of a batch change this model's states",
}
_SIZES = re.compile("window|block|chunk|landmark|local|segment|radius|stride|memory")
_current = threading.local()
_install = threading.Lock()
_installed: list[str] = []


@dataclass(frozen=True)
class Passes:
    """How windows go through a model so that each gets the states that it gets alone.

    rows    which windows share a batch: any ("padded"), those of equal length ("equal"), or none ("single")
    plain   whether the states are transformers' own output, instead of being taken from the blocks
    fresh   whether each batch gets new modules, because what a model ran before would change its states
    blocks  how a mask of blocks is given: 4-D and "additive", within the model's "own" masks, or 3-D and "binary"
    """

    rows: Rows = "padded"
    plain: bool = False
    fresh: bool = False
    blocks: BlockMask = "additive"

    def __str__(self) -> str:
        words = [w for w in (self.rows, self.blocks) if w not in ("padded", "additive")]
        return "+".join([*words, *(w for w in ("plain", "fresh") if getattr(self, w))])

    @classmethod
    def parse(cls, text: str) -> Passes:
        """Return what `str` wrote; "" is the default. Raises ValueError for any other text."""
        words = [w for w in text.split("+") if w]
        rows = next((w for w in words if w in ("equal", "single")), "padded")
        blocks = next((w for w in words if w in ("own", "binary")), "additive")
        passes = cls(rows, "plain" in words, "fresh" in words, blocks)  # type: ignore[arg-type]
        if str(passes) != text:
            raise ValueError(text)
        return passes

    @property
    def words(self) -> str:
        """The passes as a part of a sentence."""
        parts = [_ROWS[self.rows]]
        if self.plain:
            parts.append("every layer runs, because stopping early would change the states")
        if self.fresh:
            parts.append("each batch gets new modules, because earlier texts would change the states")
        return "; ".join(parts)


PADDED = Passes()  # what suits most models
SPEECH_WORDS = "one utterance at a time"  # of a speech teacher


def passes_of(plan: Plan, name: str) -> Passes:
    """Return how windows go through a teacher of a plan. Raises StoreError if the plan is damaged."""
    text = plan.latest(name).passes
    try:
        return Passes.parse(text)
    except ValueError:
        where = plan.paths.plan(plan.latest(name).number)
        raise StoreError(f"the plan is damaged: passes is {text!r:.60}", where=where) from None


def sizes_of(config: Any) -> list[int]:
    """Return the sizes of windows, blocks and chunks that a configuration has, ascending."""

    def walk(name: str, value: Any) -> Iterator[int]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from walk(str(key), inner)
        elif isinstance(value, list | tuple):
            for inner in value:
                yield from walk(name, inner)
        elif isinstance(value, int) and not isinstance(value, bool) and value > 1 and _SIZES.search(name):
            yield value

    return sorted(set(walk("", config.to_dict())))


def additive_mask(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the additive mask [B, 1, T, T] in which a token sees its own block and earlier ones.

    `blocks` is int64 [B, T]. Padding is the last block.
    """
    import torch

    sees = blocks[:, None, :, None] >= blocks[:, None, None, :]
    return torch.zeros(sees.shape, dtype=dtype, device=blocks.device).masked_fill_(~sees, torch.finfo(dtype).min)


def binary_mask(blocks: torch.Tensor) -> torch.Tensor:
    """Return the same mask as int64 [B, T, T] with 1 where a token sees another."""
    return (blocks[:, :, None] >= blocks[:, None, :]).long()


@contextmanager
def within_own_masks(blocks: torch.Tensor) -> Iterator[None]:
    """Combine blocks with every mask that transformers builds in this thread, such as those of sliding windows."""
    from transformers import AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    with _install:
        for name in {"sdpa", "eager"} - set(_installed):
            AttentionMaskInterface.register(name, _combined(ALL_MASK_ATTENTION_FUNCTIONS[name]))
            _installed.append(name)
    _current.blocks = blocks
    try:
        yield
    finally:
        _current.blocks = None


def _combined(build: Callable[..., Any]) -> Callable[..., Any]:
    """A function of transformers that builds masks, which also asks for the blocks of this thread."""

    def masked(*args: Any, **options: Any) -> Any:
        blocks = getattr(_current, "blocks", None)
        if blocks is None or args or not options["q_length"] == options["kv_length"] == blocks.shape[1]:
            return build(*args, **options)
        inner = options["mask_function"]

        def both(b: Any, head: Any, query: Any, key: Any) -> Any:
            return inner(b, head, query, key) & (blocks[b, query] >= blocks[b, key])

        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return build(**options | skips | {"mask_function": both})

    return masked
