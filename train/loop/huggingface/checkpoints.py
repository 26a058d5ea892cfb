"""A callback of the Trainer of transformers that keeps the heads of a transfer beside its checkpoints.

Guarantees: a run that is resumed continues with the heads of its checkpoint, or stops with an error.
Try: `pytest tests/train/loop/huggingface/test_checkpoints.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .heads import TransferHeads


class TransferCheckpoints:
    """Saves the heads into each checkpoint of the Trainer, loads them when it resumes, and logs the losses.

    The model itself is saved without the heads, so they get a file of their own, `stillhouse-transfer.safetensors`, in
    the folder of the checkpoint. What `trainer.save_model` writes has no such file. The callback also tells the heads
    which step it is, for lambdas that change, and adds each loss to the Trainer's log.

    Arguments:
        heads: what `attach_transfer` returned.
        resume_from: the checkpoint that training resumes from, if it is not in the Trainer's output_dir.

    Raises:
        CheckpointError: the checkpoint that training resumes from has no heads, or those of other transfers.
    """

    def __init__(self, heads: TransferHeads, resume_from: Path | str | None = None) -> None:
        self.heads, self.resume_from = heads, resume_from

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Do nothing at the other events of the Trainer."""
        if name.startswith("on_"):
            return lambda *args, **kwargs: None
        raise AttributeError(name)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Load the heads if training resumes."""
        self.heads.counts_steps = False
        if state.global_step:
            self.heads.load(self.resume_from or self._checkpoint(args, state))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the heads the step."""
        self.heads.step.fill_(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the heads into the checkpoint that the Trainer has just written."""
        if state.is_world_process_zero:
            self.heads.save(self._checkpoint(args, state))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Add the mean of each loss since the last log to the log."""
        if logs is not None and "loss" in logs:
            means = self.heads.means.take()
            logs.update(means)
            if state.log_history:
                state.log_history[-1].update(means)

    @staticmethod
    def _checkpoint(args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}"
