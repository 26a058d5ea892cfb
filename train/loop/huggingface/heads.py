"""The trained parts of the transfers of a transformers model, which live in the model and are saved apart from it.

Guarantees: `load` takes back exactly what `save` wrote, or raises. Losses are per-batch means over positions, and
lambda follows the settings.
Try: `pytest tests/train/loop/huggingface/test_checkpoints.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ....data.errors import CheckpointError, ConfigError, StillhouseError
from ....data.files.atomic import read_plain, write_atomic
from ....data.files.trouble import not_written
from ...config import Config, in_transfer, transfer_weight
from ...run.checkpoint import load_weights

FILE = "stillhouse-transfer.safetensors"
_UNNAMED = "transfer"  # in a ModuleDict, whose keys cannot be empty


class Means:
    """Means of detached losses by name, which reach the CPU when they are taken."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor | float, int]] = {}

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Add the losses of a batch."""
        for name, value in losses.items():
            before, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (before + value.detach().float(), count + 1)

    def take(self) -> dict[str, float]:
        """Return the mean of each loss since the last call."""
        means = {name: float(total) / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        return means


class TransferHeads(nn.Module):
    """What `attach_transfer` adds to a model: for each transfer its aligner, heads and settings.

    The parameters are the model's, so that optimisers and DistributedDataParallel find them. `save_pretrained` leaves
    them out, and `save` and `load` keep them in a file of their own.

    Attributes:
        readers: the TargetReader of each transfer by name, for a TransferCollator.
        texts: the transcript of each utterance of the corpus, by id.
        paddings: the ids that the model takes for padding of labels.
        step: the step that lambdas depend on, int64 []. It counts training batches, or the Trainer's steps.
    """

    step: Tensor

    def __init__(
        self, config: Config, transfers: Mapping[str, nn.Module], readers: Mapping[str, Any], texts: Mapping[str, str],
        paddings: tuple[int, ...],
    ) -> None:  # fmt: skip
        super().__init__()
        self.modules_by_name = nn.ModuleDict({name or _UNNAMED: module for name, module in transfers.items()})
        # A buffer, so that it is saved with the heads.
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.counts_steps = True  # False once the Trainer's callback says which step it is
        self.reduction = "mean_volume"
        self.fused: str | None = None  # the joint network's activation, if a fused loss knows it
        self._warned: set[str] = set()
        self.means, self.warned = Means(), set[str]()
        self.config, self.readers, self.texts, self.paddings = config, dict(readers), texts, paddings

    @property
    def transfers(self) -> dict[str, Any]:
        """The distill.Transfer of each transfer, by name."""
        return {name: self.modules_by_name[name or _UNNAMED] for name in self.config.transfer.transfers}

    def forward(
        self, encoder: Tensor, tapped: Mapping[int, Tensor], lengths: Tensor, predictor: Tensor,
        occupancy: Tensor | None, targets: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """Return the sum of lambda * loss over the transfers, and each loss by its metric's name, detached.

        Arguments:
            encoder: float [B, T, H], the encoder's output, of lengths int [B].
            tapped: states like it of encoder layers that a transfer reads.
            predictor: float [B, U + 1, W], the prediction network's states.
            occupancy: float [B, U, T] of the transducer loss.
            targets: what a TransferCollator puts into a batch as "transfer".

        Raises:
            ConfigError: the batch has no targets.
            StillhouseError: what the collator met when it read them.
        """
        total, parts = encoder.new_zeros((), dtype=torch.float32), {}
        step = int(self.step) if self._scheduled else 0
        for name, transfer in self.transfers.items():
            batch = targets.get(name) if isinstance(targets, Mapping) else None
            if isinstance(batch, StillhouseError):
                raise batch
            if batch is None:
                raise ConfigError(
                    "a training batch without the targets of the transfer",
                    expected="batches of a stillhouse.train.TransferCollator",
                    remedy="with the Trainer of transformers, also set remove_unused_columns=False",
                )
            settings = self.config.transfer.transfers[name]
            states = [tapped.get(n, encoder) for n in settings.layers] or [encoder]
            # As in our own trainer, the heads compute in their own precision whatever autocast says.
            with torch.autocast(encoder.device.type, enabled=False):
                dtype = next((p.dtype for p in transfer.parameters()), torch.float32)
                result = transfer(
                    [s.to(dtype) for s in states], lengths, batch.to(encoder.device), occupancy, predictor.to(dtype)
                )
            total = total + transfer_weight(step, settings) * result.loss
            metric = in_transfer("transfer", name)
            parts[metric] = result.loss.detach()
            parts |= {f"{metric}/{view}": value for view, value in result.per_view.items()}
        if self.counts_steps:
            self.step += 1
        return total, parts

    @property
    def _scheduled(self) -> bool:
        return any(t.warmup_steps or t.decay for t in self.config.transfer.transfers.values())

    def save(self, folder: Path | str) -> Path:
        """Write the heads into a folder as `stillhouse-transfer.safetensors`, and return the file's path.

        Raises:
            CheckpointError: the file cannot be written.
        """
        path = Path(folder) / FILE
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        metadata = {"format": "stillhouse-transfer", "views": json.dumps(self._views())}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, safetensors.torch.save(tensors, metadata))
        except OSError as e:
            raise not_written(CheckpointError, e, path, "the heads cannot be written") from None
        return path

    def load(self, folder: Path | str) -> None:
        """Read the heads from a folder that `save` or a TransferCheckpoints wrote.

        Raises:
            CheckpointError: the folder has no heads, or those of other transfers.
        """
        path = Path(folder) / FILE
        try:
            tensors = safetensors.torch.load(read_plain(path))
        except FileNotFoundError:
            raise CheckpointError(
                "there are no heads of a transfer", where=path, expected="a folder of a run with TransferCheckpoints"
            ) from None
        except Exception as e:  # safetensors raises errors of its own for a damaged file
            raise CheckpointError(f"the heads cannot be read: {e}", where=path) from None
        load_weights(self, tensors, path)

    def _views(self) -> dict[str, list[str]]:
        return {name: transfer.addresses for name, transfer in self.transfers.items()}
