"""The training loop, with all of its state in one checkpoint.

Invariant: a step depends on the weights, the optimiser's state and the step's number alone: the batches follow from
(seed, epoch, position) and every random draw is seeded by (seed, step). So a run that was killed goes on exactly as
it would have gone. Exercised by `stillhouse train CONFIG --out RUN`, killed and started again.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ..data.errors import StaleError, StillhouseError
from ..data.features import FeatureFile
from ..data.lock import held
from ..data.manifest import read_manifest
from ..data.sampler import BatchSampler
from ..data.units import load_units
from . import checkpoint
from .building import build_model, build_transfer, resolve_device, resolve_precision, store_shards
from .config import Config, dump_config, load_config
from .decode import transcribe
from .identity import budget, data_identity, initialisation
from .identity import write as write_identity
from .loader import Batch, BatchLoader, prefetch, with_workers
from .objective import losses
from .score import score

Report = Callable[[str], None]


def learning_rate(step: int, config: Config) -> float:
    """The learning rate of step `step` (from 0): linear warm-up, then the schedule down to final_lr · lr."""
    o = config.optim
    if step < o.warmup_steps:
        return o.lr * (step + 1) / o.warmup_steps
    done = (step - o.warmup_steps) / max(1, o.steps - o.warmup_steps)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[o.schedule]
    return o.lr * (o.final_lr + (1 - o.final_lr) * shape)


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all gradients, float32, summed in float64: heads whose gradient is 0 do not change its last
    bit, so a transfer of weight 0 is none, bit by bit.
    """
    norms = torch._foreach_norm([p.grad for p in parameters if p.grad is not None])
    return torch.stack(norms).double().norm().float()


def transfer_weight(step: int, config: Config) -> float:
    """λ of step `step` (from 0): linear warm-up to `weight`, then the decay, if any, to `final_weight`."""
    t = config.transfer
    if step < t.warmup_steps:
        return t.weight * (step + 1) / t.warmup_steps
    if t.decay is None or t.decay_steps is None:
        return t.weight
    done = min(1.0, (step - t.warmup_steps) / t.decay_steps)
    fallen = done if t.decay == "linear" else 0.5 * (1 - math.cos(math.pi * done))
    return t.weight + (t.final_weight - t.weight) * fallen


class Stopwatch:
    """Seconds by part since the last `take`. On CUDA the parts are times of launching, not of computing."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - began

    def take(self) -> dict[str, float]:
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken


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
            "data": data_identity(self.loader, self.sampler),
            "budget": budget(config, self.precision),
            "initialisation": initialisation(self.model),
        }
        self.step = self.epoch = self.position = 0
        self.bad_steps = 0
        self.best: dict[str, float] = {}
        self._begin()

    # -- state

    def _begin(self) -> None:
        """Create the run's folder or take up what it holds."""
        self.out.mkdir(parents=True, exist_ok=True)
        settings = self.out / "config.toml"
        if settings.exists():
            refuse_other_settings(load_config(settings), self.config, settings)
        found = checkpoint.latest(self.out / "checkpoints")
        if found is None:
            self._fit_normalisation()
            write_identity(self.out, self.identity)
        else:
            checkpoint.load_weights(self.model, found.tensors("model"), found.path)
            if self.transfer is not None:
                checkpoint.load_weights(self.transfer, found.tensors("transfer"), found.path)
            state = found.state
            _refuse_other_data(state["data"], self.identity["data"], found.path)
            self.step, self.epoch, self.position = state["step"], state["epoch"], state["position"]
            self.best, self.precision = state["best"], state["precision"]
            self.report(f"resuming {self.out} at step {self.step}")
        self._trim_metrics()
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
        watch = Stopwatch()
        window: dict[str, float] = defaultdict(float)
        began, frames = time.perf_counter(), 0
        with (
            SummaryWriter(self.out / "tb", purge_step=self.step or None) as board,
            (self.out / "metrics.jsonl").open("a", encoding="utf-8") as log,
            closing(self._batches()) as batches,
        ):

            def write(record: dict[str, Any]) -> None:
                log.write(json.dumps(record) + "\n")
                log.flush()
                for name, value in record.items():
                    if isinstance(value, float):
                        board.add_scalar(f"{record['kind']}/{name}", value, record["step"])
                for name, value in record.get("time", {}).items():
                    board.add_scalar(f"time/{name}", value, record["step"])

            while self.step < config.optim.steps:
                with watch("data"):
                    epoch, position, batch = next(batches)
                found = self._update(batch.to(self.device), watch)
                self.step, self.epoch, self.position = self.step + 1, epoch, position
                frames += int(batch.feature_lengths.sum())
                watch.seconds["teacher"] += batch.teacher_s
                for name, value in found.items():
                    window[name] += value
                last = self.step == config.optim.steps
                if self.step % config.run.log_every == 0 or last:
                    steps = window.pop("steps")
                    elapsed = time.perf_counter() - began
                    record = {"kind": "train", "step": self.step, "epoch": self.epoch}
                    record |= {name: value / steps for name, value in window.items()}
                    record |= {"lr": learning_rate(self.step - 1, config), "seconds": elapsed}
                    if self.transfer is not None:
                        record["lambda"] = transfer_weight(self.step - 1, config)
                    record |= {"realtime": frames / 100 / elapsed, "batch": len(batch.ids)}
                    # Parts are seconds a step. The teacher is read in the prefetch thread, beside the others.
                    record["time"] = {part: s / steps for part, s in watch.take().items()}
                    write(record)
                    self.report(self._line(record))
                    window.clear()
                    began, frames = time.perf_counter(), 0
                if self.dev is not None and (self.step % config.run.eval_every == 0 or last):
                    write(self.evaluate())
                    began, frames = time.perf_counter(), 0
                if self.step % config.run.checkpoint_every == 0 or last:
                    os.fsync(log.fileno())
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
        self.bad_steps = 0 if finite else self.bad_steps + 1
        if not finite:
            bad = [id for id, cost in zip(batch.ids, found.costs.tolist()) if not math.isfinite(cost)]
            self.report(f"step {step}: the loss or its gradient is not finite; skipped {', '.join(bad or batch.ids)}")
            if self.bad_steps >= 10:
                raise StillhouseError(
                    "ten steps in a row without a finite loss",
                    where=self.out,
                    remedy="lower optim.lr, or set run.precision=float32",
                )
            return {"steps": 1.0, "skipped": 1.0}
        return {"steps": 1.0, "grad_norm": float(norm)} | {name: float(v) for name, v in found.parts.items()}

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

    def _line(self, record: dict[str, Any]) -> str:
        names = [n for n in ("loss", "rnnt", "ctc", "transfer") if n in record]
        seconds = sum(v for k, v in record["time"].items() if k != "teacher")
        left = (self.config.optim.steps - self.step) * seconds / 60
        return (
            f"step {self.step}/{self.config.optim.steps}  epoch {self.epoch}  "
            + "  ".join(f"{n} {record[n]:.3f}" for n in names)
            + f"  {record['realtime']:.0f}x real time  {left:.1f} min left"
        )

    def _trim_metrics(self) -> None:
        """Drop lines of steps after the checkpoint: they will be written again."""
        path = self.out / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= self.step:
                    kept.append(line + "\n")
            except (ValueError, KeyError):
                continue  # half a line, written when the run was killed
        draft = path.with_suffix(".draft")
        draft.write_text("".join(kept), encoding="utf-8")
        draft.replace(path)


def _mix(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def refuse_other_settings(old: Config, new: Config, where: Path) -> None:
    """Settings that change the result may not change under a run; those of `run` may, the seed excepted."""
    a, b = (
        {f"{s}.{k}": v for s, values in c.model_dump(mode="json").items() for k, v in values.items()}
        for c in (old, new)
    )
    free = {f"run.{k}" for k in type(new.run).model_fields} - {"run.seed"} | {
        "data.corpus",
        "data.features",
        "data.units",
    }
    differ = [
        f"{k}: {a[k]} in the run, {b[k]} asked for" for k in a if a[k] != b[k] and k not in free | {"transfer.stores"}
    ]
    if differ:
        raise StaleError(
            f"the run has other settings: {'; '.join(differ)}",
            where=where,
            remedy="choose another --out for the new settings",
        )


def _refuse_other_data(old: dict[str, Any], new: dict[str, Any], where: Path) -> None:
    differ = [f"{k}: {old.get(k)} when the run began, {new[k]} now" for k in new if old.get(k) != new[k]]
    if differ:
        raise StaleError(
            f"the run's data changed: {'; '.join(differ)}",
            where=where,
            remedy="restore the data or choose another --out",
        )
