"""The training loop, with all of its state in one checkpoint.

Invariant: a step depends on the weights, the optimiser's state and the step's number alone: the batches follow from
(seed, epoch, position) and every random draw is seeded by (seed, step). So a run that was killed goes on exactly as
it would have gone. Exercised by `stillhouse train CONFIG --out RUN`, killed and started again.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.features import FeatureFile
from ..data.lock import held
from ..data.manifest import read_manifest
from ..data.sampler import BatchSampler
from ..data.units import load_units
from . import checkpoint, identity
from .bad_steps import BadSteps
from .building import build_model, build_transfer, resolve_device, resolve_precision, store_shards
from .config import Config, dump_config, load_config
from .decode import transcribe
from .loader import Batch, BatchLoader, prefetch, with_workers
from .monitor import Monitor, Report
from .objective import losses
from .schedule import learning_rate, transfer_weight
from .score import score
from .stopwatch import Stopwatch


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all gradients, float32, summed in float64: heads whose gradient is 0 do not change its last
    bit, so a transfer of weight 0 is none, bit by bit.
    """
    norms = torch._foreach_norm([p.grad for p in parameters if p.grad is not None])
    return torch.stack(norms).double().norm().float()


class Trainer:
    """Trains into the folder `out`; goes on from its newest checkpoint if there is one.

    Raises ConfigError, CorpusError, StoreError and the like before the first step, StaleError where `out` holds a run
    with other settings, StillhouseError when the loss stays without a finite value.
    """

    def __init__(self, config: Config, out: Path, report: Report = lambda _: None) -> None:
        self.config, self.out, self.report = config, out, report
        self.device = resolve_device(config.run.device)
        self.precision = resolve_precision(config.run.precision, self.device)
        torch.set_num_threads(config.run.threads or os.cpu_count() or 1)
        corpus = read_manifest(config.data.corpus)
        self.units = load_units(config.data.units)
        self.features = FeatureFile(config.data.features)
        self.model = build_model(config, self.units.size)
        self.transfer, targets = build_transfer(config, self.model.encoder.dim)
        self.loader = BatchLoader(
            corpus.select(config.data.train),
            self.features,
            self.units,
            speeds=config.data.speeds,
            max_frames=config.data.max_frames,
            targets=targets,
        )
        self.dev = None
        if config.data.dev is not None:
            self.dev = BatchLoader(corpus.select(config.data.dev), self.features, self.units)
        self.sampler = BatchSampler(
            self.loader.frames,
            max_frames=config.data.batch_frames,
            seed=config.run.seed,
            shards=store_shards(config, [u.id for u in self.loader.utterances]),
            mix=config.data.mix_shards,
        )
        self.identity: dict[str, Any] = {
            "data": identity.data_identity(self.loader, self.sampler),
            "budget": identity.budget(config, self.precision),
            "initialisation": identity.initialisation(self.model),
        }
        self.step = self.epoch = self.position = 0
        self.bad = BadSteps(out, config.run.bad_steps, config.run.seed, report)
        self.best: dict[str, float] = {}
        self._begin()

    # -- state

    def _begin(self) -> None:
        """Create the run's folder or take up what it holds."""
        self.out.mkdir(parents=True, exist_ok=True)
        settings = self.out / "config.toml"
        if settings.exists():
            identity.refuse_other_settings(load_config(settings), self.config, settings)
        found = checkpoint.latest(self.out / "checkpoints")
        if found is None:
            self._fit_normalisation()
            identity.write(self.out, self.identity)
        else:
            checkpoint.load_weights(self.model, found.tensors("model"), found.path)
            if self.transfer is not None:
                checkpoint.load_weights(self.transfer, found.tensors("transfer"), found.path)
            state = found.state
            identity.refuse_other_data(state["data"], self.identity["data"], found.path)
            self.step, self.epoch, self.position = state["step"], state["epoch"], state["position"]
            self.best, self.precision = state["best"], state["precision"]
            self.report(f"resuming {self.out} at step {self.step}")
        self.model.to(self.device)
        modules = {"model": self.model} | ({"transfer": self.transfer.to(self.device)} if self.transfer else {})
        self.names: dict[torch.Tensor, str] = {
            p: f"{m}.{n}" for m, module in modules.items() for n, p in module.named_parameters()
        }
        self.optimiser = torch.optim.AdamW(
            [
                {
                    "params": [p for p in self.names if p.dim() > 1],
                    "weight_decay": self.config.optim.weight_decay,
                },
                {"params": [p for p in self.names if p.dim() <= 1], "weight_decay": 0.0},
            ],
            lr=self.config.optim.lr,
            betas=self.config.optim.betas,
        )
        if found is not None:
            checkpoint.restore_optimiser(self.optimiser, self.names, found.tensors("optimiser"))
        draft = settings.with_suffix(".draft")
        draft.write_text(dump_config(self.config))
        draft.replace(settings)  # whole or not there: a run that is killed here goes on
        self.units.save(self.out / "units")

    def _fit_normalisation(self) -> None:
        """Mean and deviation of each bin over up to 500 training utterances, spread evenly."""
        count = len(self.loader.utterances)
        chosen = np.unique(np.linspace(0, count - 1, min(count, 500)).astype(int))
        ids = [self.loader.utterances[i].id for i in chosen]
        packed = self.features.gather(ids, [self.config.data.speeds[0]] * len(ids))[0].astype(np.float64)
        packed = packed[np.isfinite(packed).all(axis=1)]  # an utterance with others is met, and named, as a bad step
        self.model.encoder.feature_mean.copy_(torch.from_numpy(packed.mean(axis=0)))
        self.model.encoder.feature_std.copy_(torch.from_numpy(packed.std(axis=0).clip(min=1e-3)))

    def save(self) -> None:
        tensors = {
            "model": self.model.state_dict(),
            "optimiser": checkpoint.optimiser_tensors(self.optimiser, self.names),
        }
        if self.transfer is not None:
            tensors["transfer"] = self.transfer.state_dict()
        state = {
            "step": self.step,
            "epoch": self.epoch,
            "position": self.position,
            "best": self.best,
            "precision": self.precision,
            "data": self.identity["data"],
            "versions": {"torch": torch.__version__},
        }
        checkpoint.save(self.out / "checkpoints", state, tensors)
        best = self.best.get("step")
        checkpoint.prune(self.out / "checkpoints", self.config.run.keep, None if best is None else int(best))

    # -- the loop

    def run(self) -> None:
        """Train to the last step; on return the last checkpoint is on disk. LockedError: another process does."""
        with held(self.out / ".lock", "run"):
            self._run()

    def _batches(self) -> Generator[tuple[int, int, Batch], None, None]:
        data, where = self.config.data, {"epoch": self.epoch, "position": self.position}
        if data.workers:
            start = data.worker_start
            if self.loader.targets is not None:
                self.loader.targets.pin = False  # other processes have no device
            return with_workers(self.sampler, self.loader.load, **where, workers=data.workers, start=start)
        return prefetch(self.sampler, self.loader.load, **where)

    def _run(self) -> None:
        config = self.config
        if self.step >= config.optim.steps:
            self.report(f"{self.out} is done: step {self.step}")
            return
        parameters = sum(p.numel() for p in self.model.parameters())
        hours = self.loader.frames[:, 0].sum() / 360_000
        left_out = ", ".join(f"{n} {why}" for why, n in self.loader.left_out.items() if n) or "none"
        self.report(
            f"{parameters / 1e6:.2f} M parameters, {self.units.size} units, {len(self.loader.utterances)} utterances "
            f"({hours:.2f} h; left out: {left_out}), {self.precision} on {self.device}"
        )
        steps = config.optim.steps
        with (
            Monitor(config, self.out, self.step, self.report, device=self.device) as monitor,
            closing(self._batches()) as batches,
        ):
            while self.step < steps:
                with monitor.watch("data"):
                    epoch, position, batch = next(batches)
                found = self._update(batch.to(self.device), monitor.watch)
                self.step, self.epoch, self.position = self.step + 1, epoch, position
                monitor.step(self.step, epoch, batch, found)
                if self.dev is not None and (self.step % config.run.eval_every == 0 or self.step == steps):
                    with monitor.aside("dev"):
                        monitor.log(self.evaluate())
                if self.step % config.run.checkpoint_every == 0 or self.step == steps:
                    with monitor.aside("checkpoint"):
                        monitor.flush()
                        self.save()

    def _update(self, batch: Batch, watch: Stopwatch) -> dict[str, float]:
        """One step of the optimiser. A step whose loss or gradient is not finite changes nothing."""
        config, step = self.config, self.step
        torch.manual_seed(_mix(config.run.seed, step))
        augment = torch.Generator().manual_seed(_mix(config.run.seed + 7919, step))
        self.model.train()
        found = losses(
            self.model,
            self.transfer,
            batch,
            config,
            precision=self.precision,
            transfer_weight=transfer_weight(step, config),
            augment=augment,
            timed=watch,
        )
        watch.watch_transfer(found.transfer_inputs)
        with watch("backward"):
            self.optimiser.zero_grad(set_to_none=True)
            found.total.backward()
        with watch("optimiser"):
            norm = gradient_norm(self.names)
            torch.nn.utils.clip_grads_with_norm_(self.names, config.optim.clip, norm)
            finite = bool(torch.isfinite(norm) & torch.isfinite(found.total.detach()))
            if finite:
                for group in self.optimiser.param_groups:
                    group["lr"] = learning_rate(step, config)
                self.optimiser.step()
        if not finite:
            self.bad.skip(step, batch, found.costs)
            return {"skipped": 1.0}
        self.bad.count = 0
        return {"grad_norm": float(norm)} | {name: float(v) for name, v in found.parts.items()}

    def evaluate(self) -> dict[str, Any]:
        """WER and CER of greedy decoding on the dev split."""
        assert self.dev is not None
        found = list(transcribe(self.model, self.dev, device=self.device))
        result = score([h.ref for h in found], [h.hyp for h in found])
        record = {"kind": "dev", "step": self.step, "wer": result.wer.rate, "cer": result.cer.rate}
        if not self.best or result.wer.rate < self.best["wer"]:
            self.best = {"step": self.step, "wer": result.wer.rate}
        self.report(f"step {self.step}  dev WER {100 * result.wer.rate:.1f} %  CER {100 * result.cer.rate:.1f} %")
        return record


def _mix(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))
