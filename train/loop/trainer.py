"""The training loop, with all of its state in one checkpoint.

Guarantees: a run that was killed and resumed ends with the same bits as one that was not. A step depends on the
weights, the optimiser's state and its number alone: batches follow from (seed, epoch, position) and random draws from
(seed, step). Ranks share each batch, and every rank has all of that state.
Try: `stillhouse train CONFIG --out RUN`, killed and started again.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...data.batches.loader import Batch, BatchLoader, prefetch
from ...data.batches.sampler import BatchSampler
from ...data.errors import StoppedError
from ...data.features.compute import FeatureFile
from ...data.features.provenance import refuse_changed_rows, refuse_other_settings
from ...data.files.lock import FileLock
from ...data.files.stopping import StopNow, StopRequest
from ...data.manifest import Corpus, read_manifest
from ...data.units import load_units
from ..config import Config, flatten, in_transfer, learning_rate
from ..model.build import (
    build_model,
    build_optimiser,
    build_transfers,
    resolve_device,
    resolve_precision,
    store_shards,
    student_times,
)
from ..run import checkpoint, folder, identity, start
from ..run.averaging import moving_average
from ..run.monitor import Monitor, OnProgress
from ..run.profile import Profile
from ..run.ranks import ALONE, GradientSum, Ranks
from ..run.stopwatch import Stopwatch
from .bad_steps import BadSteps
from .batch_share import refuse_unlike_ranks
from .evaluation import evaluate_dev, in_words
from .objective import gradient_norm, squared_norm
from .step import StepLosses
from .text import TextBatches, refuse_frozen, without_gradients


class Trainer:
    """Trains a run in the folder `out`, from its newest checkpoint if it has one.

    `on_progress` gets each line for people, on the first of the `ranks` only. `stop` asks the run to stop after a step,
    with a checkpoint. The constructor raises the errors of settings, corpus, features and stores, and StaleError if
    `out` holds a run with other settings or other data.
    """

    def __init__(
        self,
        config: Config,
        out: Path,
        on_progress: OnProgress = lambda _: None,
        ranks: Ranks = ALONE,
        stop: StopRequest | None = None,
    ) -> None:
        self.given, self.out, self.ranks = config.init, out, ranks
        init = ranks.from_first(lambda: start.with_recorded(out, config.init))
        self.config = config = config.model_copy(update={"init": init})
        self.stop, self.stopping = stop or StopRequest(), False
        self.on_progress: OnProgress = on_progress if ranks.first else lambda _: None
        self.device = resolve_device(config.run.device, ranks.local if ranks.size > 1 else None)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        torch.set_num_threads(config.run.threads or max(1, (os.cpu_count() or 1) // ranks.local_size))
        data = config.data
        corpus = read_manifest(data.corpus)
        self.units = load_units(data.units)
        self.features = FeatureFile(data.features)
        self.model = build_model(config, self.units.size, self.features.open().width)
        precision, encoder = config.run.precision, self.model.encoder
        self.precision = ranks.from_first(lambda: resolve_precision(precision, self.device, encoder))
        times = student_times(encoder, self.features.frame_times)
        self.transfers, targets = build_transfers(config, encoder.dim, times)
        of_transfers = {in_transfer("transfer", name): module for name, module in self.transfers.items()}
        self.modules: dict[str, torch.nn.Module] = {"model": self.model} | of_transfers  # by file of a checkpoint

        def loader(split: str | None, **options: Any) -> BatchLoader:
            return BatchLoader(corpus.select(split), self.features, self.units, **options)

        copies = start.noisy_copies(self.features, data.noise)
        own = {"speeds": data.speeds, "copies": copies, "max_frames": data.max_frames, "targets": targets}
        self.loader = loader(data.train, **own, unit_frames=self.model.encoder.subsampling * self.model.one_unit)
        self.dev = None if data.dev is None else loader(data.dev).shared(ranks.rank, ranks.size)
        ranks.from_first(lambda: self._refuse_other_features(corpus))
        shards = store_shards(config, [u.id for u in self.loader.utterances])
        mixing: dict[str, Any] = {"shards": shards, "mix": data.mix_shards, "noise": data.noise, "copies": copies}
        sampler = BatchSampler(self.loader.frames, max_frames=data.batch_frames, seed=config.run.seed, **mixing)
        budget = {"steps": config.optim.steps, "batch_frames": data.batch_frames, "precision": self.precision}
        self.identity: dict[str, Any] = {
            "data": identity.data_identity(self.loader, sampler),
            "budget": budget,  # what the run may spend on learning
            "initialisation": identity.weights_hash(self.model),
        }
        self.text: TextBatches | None = None
        if config.text.split is not None:
            readers = {name: reader for name, reader in targets.items() if self.transfers[name].needs_predictor}
            self.text = TextBatches(config, corpus, self.features, self.units, readers, self.on_progress)
            self.identity["text"] = self.text.identity
        refuse_unlike_ranks(ranks, config, self.identity, self.modules, sampler, self.on_progress)
        self.sampler = sampler.shared(ranks.rank, ranks.size)
        self.step = self.epoch = self.position = 0
        self.dev_due = False  # whether an evaluation at this step was interrupted
        self.bad = BadSteps(out, config.run.bad_steps, config.run.seed, self.on_progress, ranks)
        self.best: dict[str, Any] = {}
        self.saved = self._version()
        self.window: dict[str, Any] = {}
        ranks.from_first(lambda: folder.refuse_other_folder(out))
        with self._locked():
            self._begin()

    def _refuse_other_features(self, corpus: Corpus) -> None:
        """Check that the features are of this corpus as it is now."""
        used = [*self.loader.utterances, *(self.dev.utterances if self.dev is not None else [])]
        if absent := refuse_changed_rows(corpus, self.features, used):
            self.on_progress(f"the audio of {absent} utterances is not here, so it was not compared with the features")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the run's lock, which rank 0 holds for all ranks."""
        with ExitStack() as stack:
            self.ranks.from_first(lambda: stack.enter_context(FileLock(self.out / ".lock", "run")))
            yield

    def _begin(self) -> None:
        """Create the run's folder, or resume the run that is in it."""
        progress = folder.resume(self.out, self.config, self.ranks, self.on_progress)
        texts = identity.text_hashes(self.loader.utterances + (self.text.loader.utterances if self.text else []))
        if progress is None:
            start.fit_normalisation(self.model, self.loader, self.config.data.speeds[0])
            self.origin = self.ranks.from_first(self._take_weights)
            if self.ranks.size > 1:  # Every rank gets the same bits.
                first = self.model.state_dict() if self.ranks.first else None
                checkpoint.load_weights(self.model, self.ranks.tensors_from_first(first), self.out)
        else:
            state, where = progress.state, progress.where
            refuse_other_settings(self.features, state.features, None)
            for name, module in self.modules.items():
                checkpoint.load_weights(module, progress.of(name), where)
            read = state.text if self.text is not None else None
            then = state.data | flatten(read.data if read else {}, "text.")
            now = self.identity["data"] | flatten(self.identity.get("text", {}), "text.")
            identity.refuse_other_data(then, now, where, self.out, texts)
            if self.text is not None and read is not None:
                self.text.epoch, self.text.position = read.epoch, read.position
            self.ranks.from_first(lambda: start.refuse_other_source(self.given, state.init, self.out, self.on_progress))
            self.origin = None if state.init is None else start.Origin(**state.init)
            self.step, self.epoch, self.position = state.step, state.epoch, state.position
            self.best = {} if state.best is None else state.best.model_dump()
            self.dev_due = state.dev_due
            self.saved = self._version()
            self.precision, self.bad.count, self.window = state.precision, state.bad_steps, state.window.model_dump()
            self.on_progress(f"resuming {self.out} at step {self.step}")
        if self.origin is not None:
            self.identity["init"] = self.origin.facts
        start.freeze(self.model, self.transfers, self.config, self.origin, self.on_progress)
        self.names: dict[Tensor, str] = {}  # of what is trained
        for name, module in self.modules.items():
            trained = ((n, p) for n, p in module.to(self.device).named_parameters() if p.requires_grad)
            self.names |= {p: f"{name}.{n}" for n, p in trained}
        if self.text is not None:
            refuse_frozen(self.config, self.names, self.transfers)
        taken = {f"model.{name}" for name in (self.origin.taken if self.origin else ())}
        slow = {p for p, name in self.names.items() if name in taken}
        self.optimiser = build_optimiser(self.names, self.config, self.device, slow)
        self.sum = GradientSum(list(self.names)) if self.ranks.size > 1 else None
        self.average = moving_average(self.model, self.config.optim.ema) if self.config.optim.ema else None
        if progress is not None:
            checkpoint.restore_optimiser(self.optimiser, self.names, progress.of("optimiser"), where)
            if self.average is not None:
                checkpoint.load_weights(self.average.module, progress.of("ema"), where)
                self.average.n_averaged.fill_(state.averaged)
        self.ranks.from_first(lambda: folder.create(self.out, self.config, self.units, self.identity, texts, self.step))
        if progress is None and self.origin is not None:
            self.save()  # Then the run never needs its source again.

    def _take_weights(self) -> start.Origin | None:
        return start.take_weights(self.model, self.config, self.out, self.units, self.features, self.on_progress)

    def save(self) -> None:
        """Write a checkpoint, which is on disk on return. Raises RankError if the weights of the ranks differ."""
        if self.ranks.size > 1:
            self.ranks.refuse_unlike({"their weights": identity.weights_hash(self.model)})
        self.ranks.from_first(self._save)
        self.saved = self._version()
        self._note_saved()

    def _version(self) -> tuple[int, int | None, bool]:
        """Return what a checkpoint of this moment differs by from earlier ones."""
        return self.step, self.best.get("step"), self.dev_due

    def _note_saved(self) -> None:
        step = self.saved[0]
        last = f"the last checkpoint, of step {step}" if step else "the beginning"
        self.stop.after = f"Repeat the command to resume {self.out} from {last}."

    def _save(self) -> None:
        tensors = {name: module.state_dict() for name, module in self.modules.items()}
        tensors["optimiser"] = checkpoint.optimiser_tensors(self.optimiser, self.names)
        if self.average is not None:
            tensors["ema"] = self.average.module.state_dict()
        state = {
            "step": self.step,
            "epoch": self.epoch,
            "position": self.position,
            "best": self.best,
            "dev_due": self.dev_due,
            "bad_steps": self.bad.count,
            "window": self.window,
            "averaged": 0 if self.average is None else int(self.average.n_averaged),
            "precision": self.precision,
            "data": self.identity["data"],
            "features": self.features.settings,
            "config": self.config.model_dump(mode="json"),
            "init": None if self.origin is None else asdict(self.origin),
            "text": None if self.text is None else self.text.state,
            "ranks": self.ranks.size,
            "versions": {"torch": torch.__version__},
        }
        checkpoint.save(self.out / "checkpoints", state, tensors)
        checkpoint.prune(self.out / "checkpoints", self.config.run.keep, self.best.get("step"))

    def run(self, profile: Profile | None = None) -> None:
        """Train to the last step. On return the last checkpoint is on disk.

        Raises LockedError if another process trains in the same folder, StillhouseError after too many bad steps, and
        StoppedError after a request to `stop`, with a checkpoint of the last step on disk.
        """
        with self._locked(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "rnnt loss: row", RuntimeWarning)  # `bad` names the utterances
            self.ranks.from_first(lambda: folder.refuse_moved(self.out, self.step))
            self._note_saved()
            with self.stop.deferred():
                self._run(profile)

    def _run(self, profile: Profile | None) -> None:
        config, ranks, steps = self.config, self.ranks, self.config.steps
        if self.step >= steps and not self.dev_due:
            self.on_progress(f"{self.out} is done, at step {self.step}")
            return
        parameters = sum(p.numel() for p in self.model.parameters())
        hours = self.loader.frames[:, 0].sum() * self.loader.speeds[0] / self.features.frame_times.hz / 3600
        self.on_progress(
            f"{parameters / 1e6:.2f} M parameters, {self.units.size} units, {len(self.loader.utterances)} utterances "
            f"({hours:.2f} h; {self.loader.without}), {self.precision} on {self.device}"
            + (f", {ranks.size} ranks" if ranks.size > 1 else "")
        )
        with (
            Monitor(config, self.out, self.step, self.on_progress, self.device, profile, on=ranks.first) as monitor,
            closing(prefetch(self.sampler, self.loader.load, epoch=self.epoch, position=self.position)) as spoken,
            nullcontext() if self.text is None else closing(self.text.read(ranks)) as texts,
        ):
            monitor.resume(self.window)
            # What a run starts from is evaluated, so that it can be seen whether it fits.
            if self.dev_due or (not self.step and self.origin is not None and self.dev is not None):
                self._evaluate(monitor)
                self._checkpoint(monitor)
            while self.step < steps and not self.stopping:
                try:
                    # A single process may stop while it waits. With others it must take part in the next exchange.
                    with monitor.watch("data"), self.stop.deferred(ranks.size > 1):
                        alone = self.step < config.text.pretrain_steps
                        speech = None if alone else next(spoken)
                        text = next(texts) if texts and (alone or config.text.weight) else None
                except StopNow:
                    self.stopping = True
                    break
                own, other = (b and b[2].to(self.device) for b in (speech, text))
                figures = self._update(own, other, monitor.watch)
                self.step += 1
                if speech is not None:
                    self.epoch, self.position = speech[:2]
                if text is not None and self.text is not None:
                    self.text.epoch, self.text.position = text[:2]
                first, *beside = (batch for batch in (own, other) if batch is not None)
                monitor.step(self.step, self.epoch, first, figures, *beside)
                due = self.step % config.run.eval_every == 0 or self.step in (config.text.pretrain_steps, steps)
                if self.dev is not None and due:
                    self._evaluate(monitor)
                if self.step % config.run.checkpoint_every == 0 or self.step == steps:
                    self._checkpoint(monitor)
            if self.stopping:
                self._stop(monitor)
            if self.best.get("step") == 0:
                self.on_progress("no evaluation was better than that of step 0, which is therefore the best checkpoint")

    def _evaluate(self, monitor: Monitor) -> None:
        """Evaluate, unless the run is to stop first. A checkpoint of a new best model is on disk on return."""
        with monitor.aside("dev"):
            record = None if self.stopping else self.evaluate()
        self.dev_due, self.stopping = record is None, self.stopping or record is None
        if record is not None:
            monitor.loggers.log(record)
            if self.best.get("step") == self.step:
                self._checkpoint(monitor)

    def _checkpoint(self, monitor: Monitor) -> None:
        if self.saved != self._version():
            with monitor.aside("checkpoint"):
                monitor.loggers.flush()
                self.window = monitor.state()
                self.save()

    def _stop(self, monitor: Monitor) -> None:
        """End the run with a checkpoint of this step, which all ranks have agreed on."""
        self._checkpoint(monitor)
        signals = self.ranks.gather(self.stop.signal)
        rank = next(r for r, name in enumerate(signals) if name is not None)  # of several, the first
        by = f"by {signals[rank]}" + (f" (rank {rank})" if rank else "")
        place = self.out / "checkpoints" / f"step-{self.step:08d}"
        kept = f"{place} is on disk" if self.step else "nothing was computed yet"
        self.on_progress(
            f"stopped {by} at step {self.step} of {self.config.steps}: {kept}. Repeat the command to resume. "
            "No step is lost."
        )
        raise StoppedError(f"stopped {by}", where=self.out, remedy="repeat the command to resume")

    def _update(self, speech: Batch | None, text: Batch | None, watch: Stopwatch) -> dict[str, float]:
        """Make one step of the optimiser. A step whose loss or gradient is not finite changes nothing."""
        config, step = self.config, self.step
        self.model.train()
        losses = StepLosses(self.model, self.transfers, config, self.ranks, self.precision)
        # Every rank learns with the sizes of the parts whether any of them is to stop.
        stops, sizes = zip(*self.ranks.gather((self.stop.requested, losses.sizes(speech, text))))
        self.stopping = any(stops)
        result, blamed = losses(step, speech, text, sizes, watch)
        inputs = [x for of_transfer in result.transfer_inputs.values() for x in of_transfer if x.requires_grad]
        for x in inputs:
            x.retain_grad()  # The norm of each transfer's gradient is logged.
        watch.watch_transfer(inputs)
        with watch("backward"):
            if self.sum is None:
                self.optimiser.zero_grad(set_to_none=True)
            else:
                self.sum.zero()
            result.total.backward()
            if self.sum is not None:
                self.sum.finish()
        with watch("optimiser"):
            norm = gradient_norm(self.names)
            torch.nn.utils.clip_grads_with_norm_(self.names, config.optim.clip, norm)
            squares = {
                in_transfer("transfer_grad_norm", n): squared_norm(xs) for n, xs in result.transfer_inputs.items()
            }
            parts = losses.over_ranks(result.parts | squares)
            parts |= {name: math.sqrt(parts[name]) for name in squares}
            finite = math.isfinite(norm) and math.isfinite(parts["loss"])  # This is the same on every rank.
            if finite:
                for group in self.optimiser.param_groups:
                    group["lr"] = learning_rate(step, config) * group["lr_factor"]
                with nullcontext() if speech is not None else without_gradients(self.names, self.transfers):
                    self.optimiser.step()
                if self.average is not None:
                    self.average.update_parameters(self.model)
        if not finite:
            self.bad.skip(step, *blamed)
            return {"skipped": 1.0}
        self.bad.count = 0
        return {"grad_norm": float(norm)} | parts

    def _is_better(self, wer: float, loss: float) -> bool:
        """Whether an evaluation is better than the best so far, by the loss if the error rates are equal."""
        other = self.best.get("rnnt")
        return wer < self.best["wer"] or (wer == self.best["wer"] and other is not None and loss < other)

    def evaluate(self) -> dict[str, Any] | None:
        """Return a record of WER, CER and transducer loss on the dev split, by the averaged weights if there are any.

        With text there is the perplexity of a unit, too, and it is alone as long as text alone was learned.
        A request to stop ends the evaluation after a batch, and the record is None.
        """
        assert self.dev is not None
        model = self.model if self.average is None else self.average.module
        alone = 0 < self.step <= self.config.text.pretrain_steps
        parts = model, self.dev, self.config, self.device, self.ranks, self.stop, self.out / folder.HYPOTHESES
        figures = evaluate_dev(*parts, alone=alone)
        if figures is None:
            return None
        if not alone and (not self.best or self._is_better(figures["wer"], figures["rnnt"])):
            loss = figures["rnnt"] if math.isfinite(figures["rnnt"]) else None
            self.best = {"step": self.step, "wer": figures["wer"], "rnnt": loss}
        self.on_progress(f"step {self.step}  dev {in_words(figures)}")
        # A loss is infinite if a transcript fits no alignment.
        return {"kind": "dev", "step": self.step} | {k: v for k, v in figures.items() if math.isfinite(v)}
