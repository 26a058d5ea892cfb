"""Find out how texts must go through a model, so that each gets the states that transformers gives it alone.

Guarantees: the model itself stays as it was loaded. What is chosen has been compared with one text at a time through
plain transformers, on the shortest and the longest window and beyond every window size of the configuration.
Try: `pytest tests/extract/teacher/test_exact.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from ...data.errors import StillhouseError, StoreError, TeacherError
from .contexts import Window
from .loading import first_line
from .model import Teacher
from .passes import BlockMask, Passes, Rows, sizes_of

# Largest relative error of a token's state that is rounding, by the dtype of the weights
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1.5e-1}
MOST_TOGETHER = 512  # tokens of the longest window up to which all samples are tried in one batch
_NO_BLOCK = "use past:N, which needs no such mask"


def choose_passes(teacher: Any, windows: Sequence[Window]) -> Passes:
    """Return how windows like these go through a teacher, with `Passes()` where any batch will do.

    Arguments:
        teacher: a `Teacher`. For anything else, such as imported states, the default is returned.
        windows: some windows of the corpus, the shortest and the longest among them, with and without blocks.

    Raises TeacherError if the model cannot run a window, or if no way gives the states of transformers.
    """
    if not isinstance(teacher, Teacher) or not windows:
        return Passes()
    trial = _Trial(teacher)
    plain = [Window(w.ids, None, []) for w in windows]
    samples = _samples(plain, sizes_of(teacher.model.config))
    passes = trial.choose_single(samples)
    passes = trial.choose_rows(passes, samples)
    with_blocks = [w for w in windows if w.blocks is not None]
    if with_blocks:
        passes = trial.choose_blocks(passes, _samples(with_blocks, []))
    return passes


def give_same_states(teacher: Any, windows: Sequence[Window], chosen: Passes) -> bool:
    """Return whether batches with padding, as earlier versions made them, give what `chosen` gives.

    The arguments are those of `choose_passes`, and what it has returned.
    """
    if replace(chosen, blocks="additive") != Passes():
        return False
    with_blocks = [w for w in windows if w.blocks is not None]
    if chosen.blocks == "additive" or not with_blocks:
        return True
    try:
        return _Trial(teacher).choose_blocks(Passes(), _samples(with_blocks, []), ("additive",)) == Passes()
    except TeacherError:
        return False


def _samples(windows: Sequence[Window], sizes: Sequence[int]) -> list[Window]:
    """A few windows of different lengths, ascending, and parts of the longest that exceed one of `sizes` by a token."""
    of = {len(w.ids): w for w in windows}
    lengths = sorted(of)
    longest = of[lengths[-1]]
    if longest.blocks is None:
        for size in [s for s in sizes if lengths[0] < s + 1 < lengths[-1]][:3]:
            of.setdefault(size + 1, Window(longest.ids[: size + 1], None, []))
            lengths.append(size + 1)
    middle = sorted(set(lengths))[len(set(lengths)) // 2]
    chosen = {*sorted(set(lengths))[:2], middle, *lengths[len(lengths) - 3 :], len(longest.ids)}
    return [of[n] for n in sorted(chosen)]


class _Trial:
    """One teacher, and the states that transformers gives of texts alone. A gap is the largest relative error."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher.without_rounding()
        self.layers = range(teacher.depth + 1)
        self.most = TOLERANCE.get(next(teacher.model.parameters()).dtype, 1e-4)
        self._known: dict[bytes, list[torch.Tensor]] = {}

    # --- what is compared with what ---

    def alone(self, ids: np.ndarray) -> list[torch.Tensor]:
        """The states of a text alone, by transformers in new modules. Raises TeacherError if it fails."""
        key = ids.tobytes()
        if key not in self._known:
            try:
                self._known[key] = self.teacher.plain_states(ids)
            except torch.cuda.OutOfMemoryError as e:
                raise too_long(len(ids), self.teacher.source) from e
            except StillhouseError:
                raise
            except Exception as e:
                raise self._cannot(ids, e) from e
        return self._known[key]

    def _cannot(self, ids: np.ndarray, e: Exception) -> TeacherError:
        """The error of a text that the model cannot run, with the longest part of it that it can."""
        runs, fails = 0, len(ids)
        while fails - runs > 1:
            n = (runs + fails) // 2
            try:
                self.teacher.plain_states(ids[:n])
                runs = n
            except Exception:
                fails = n
        what = f"it cannot run a text of {len(ids)} tokens: {first_line(e)}"
        remedy = f"give --window {runs}, or use another teacher" if runs >= 8 else "use another teacher"
        return TeacherError(what, where=self.teacher.source, remedy=remedy)

    def gap(self, states: dict[int, torch.Tensor], row: int, want: list[torch.Tensor]) -> float:
        """The largest relative error over layers and tokens. What is not finite alone is left out."""
        worst = 0.0
        for k in range(len(want)):
            if k not in states or states[k].dim() != 3 or states[k].shape[1] < len(want[k]):
                return float("inf")
            a, b = states[k][row, : len(want[k])].float(), want[k].float()
            norm, error = b.norm(dim=-1), (a - b).norm(dim=-1)
            finite = norm.isfinite()
            if not finite.any():
                continue
            # A state that is nearly zero is compared with the largest, since its own size is rounding.
            relative = error[finite] / norm[finite].clamp_min(1e-3 * float(norm[finite].max()) + 1e-30)
            worst = max(worst, float(relative.nan_to_num(nan=torch.inf).max()))
        return worst

    def run(self, teacher: Teacher, passes: Passes, batch: Sequence[Window]) -> float:
        """The gap of one batch. A batch that the model cannot run counts as infinite."""
        wanted = [self.alone(w.ids) for w in batch]
        try:
            states = teacher.states_by(passes, batch, self.layers)
        except torch.cuda.OutOfMemoryError:
            if len(batch) == 1:
                raise
            half = len(batch) // 2
            return max(self.run(teacher, passes, batch[:half]), self.run(teacher, passes, batch[half:]))
        except Exception:
            return float("inf")
        return max(self.gap(states, b, want) for b, want in enumerate(wanted))

    # --- what is chosen ---

    def choose_single(self, samples: Sequence[Window]) -> Passes:
        """The passes of one text at a time, one after the other through the same modules if that is exact."""
        gaps = []
        for passes in (Passes(), Passes(plain=True), Passes(fresh=True), Passes(plain=True, fresh=True)):
            teacher = self.teacher.clone_model()
            order = [*samples, samples[0]] if len(samples) > 1 else [samples[0], samples[0]]
            gaps.append(max(self.run(teacher, passes, [w]) for w in order))
            if gaps[-1] <= self.most:
                return passes
        what = f"its states of one and the same text differ from pass to pass, by up to {gaps[-1]:.2g} of their size"
        remedy = "use another teacher: nothing that this one yields could be repeated"
        raise TeacherError(what, where=self.teacher.source, expected="states without chance", remedy=remedy)

    def choose_rows(self, passes: Passes, samples: Sequence[Window]) -> Passes:
        """The largest batches that leave every state as it is."""
        longest = samples[-1]
        if len(longest.ids) <= MOST_TOGETHER:
            padded = [list(samples), list(samples[:2])]
        else:
            padded = [[w, longest] for w in samples[:-1]]
        padded = [b for b in padded if len({len(w.ids) for w in b}) > 1]
        equal = [[w, _other(w)] for w in (samples[0], longest)]
        tries: list[tuple[Rows, list[list[Window]]]] = [("padded", padded or equal), ("equal", equal)]
        for rows, batches in tries:
            if all(self.run(self.teacher.clone_model(), passes, b) <= self.most for b in batches):
                return replace(passes, rows=rows)
        return replace(passes, rows="single")

    def choose_blocks(
        self, passes: Passes, samples: Sequence[Window], kinds: Sequence[BlockMask] = ("own", "additive", "binary")
    ) -> Passes:
        """The way of giving a mask of blocks. Raises TeacherError if the model follows none."""
        gaps = []
        for kind in kinds:
            way = replace(passes, blocks=kind)
            gaps.append(max(self._block_gap(way, w.ids) for w in samples))
            if gaps[-1] <= self.most:
                return self.choose_block_rows(way, samples)
        least = min(gaps)
        by = f"states differ by {least:.2g} of their size" if least < float("inf") else "it cannot run with one"
        what = f"it does not follow a mask of blocks, as +block needs: {by}"
        raise TeacherError(what, where=self.teacher.source, remedy=_NO_BLOCK)

    def choose_block_rows(self, passes: Passes, samples: Sequence[Window]) -> Passes:
        """`passes`, with smaller batches if those of windows with blocks are not exact."""
        runner = self.teacher
        pair = [samples[0], samples[-1]]
        tries: tuple[Rows, ...] = ("padded", "equal") if passes.rows == "padded" else (passes.rows,)
        for rows in tries:
            batch = pair if rows == "padded" else [samples[-1], samples[-1]]
            try:
                together = runner.clone_model().states_by(passes, batch, self.layers)
                apart = [runner.clone_model().states_by(passes, [w], self.layers) for w in batch]
            except (RuntimeError, ValueError, TypeError, LookupError, StillhouseError):
                continue
            wanted = [[a[k][0] for k in self.layers] for a in apart]
            if max(self.gap(together, b, want) for b, want in enumerate(wanted)) <= self.most:
                return replace(passes, rows=rows)
        return replace(passes, rows="single")

    def _block_gap(self, passes: Passes, ids: np.ndarray) -> float:
        """How far a mask of one block changes the states of a text, and one of two blocks those of its beginning.

        Infinite if the second block does not see the first.
        """
        half = len(ids) // 2
        blocks = (np.arange(len(ids)) >= half).astype(np.int32)
        changed = ids.copy()
        changed[half - 1] = ids[half] if ids[half] != ids[half - 1] else ids[0]

        def states(ids: np.ndarray, blocks: np.ndarray) -> dict[int, torch.Tensor]:
            return self.teacher.clone_model().states_by(passes, [Window(ids, blocks, [])], self.layers)

        try:
            one, two = states(ids, blocks * 0), states(ids, blocks)
            other = states(changed, blocks)
        except torch.cuda.OutOfMemoryError as e:
            raise too_long(len(ids), self.teacher.source) from e
        except Exception:
            return float("inf")
        top = self.teacher.depth
        unseen = bool(changed[half - 1] != ids[half - 1]) and torch.equal(two[top][0, half], other[top][0, half])
        return (
            float("inf")
            if unseen
            else max(self.gap(one, 0, self.alone(ids)), self.gap(two, 0, self.alone(ids[:half])) if half else 0.0)
        )


def _other(window: Window) -> Window:
    """Another text of the same length and the same tokens."""
    return Window(window.ids[::-1].copy(), None, [])


def too_long(tokens: int, where: object) -> StoreError:
    """Return the error of a window that does not fit into the device's memory."""
    what = f"one window of {tokens} tokens does not fit into the device's memory"
    return StoreError(what, where=where, remedy="give a smaller --window, or --model-dtype bfloat16")
