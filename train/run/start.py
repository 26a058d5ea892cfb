"""What a run starts from: the normalisation of its features, the weights of another run or of an export, and what of
them never changes.

Guarantees: what was not taken is named with its reason before the first step. A run keeps what it took in its own first
checkpoint, so it never needs the source again.
Try: `stillhouse train CONFIG --init RUN --freeze encoder --out OTHER`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...data.batches.loader import BatchLoader
from ...data.errors import (
    CheckpointError,
    ConfigError,
    FeatureError,
    StaleError,
    StillhouseError,
    UsageError,
    first_few,
)
from ...data.features.file import FeatureFile
from ...data.features.settings import differing
from ...data.files.atomic import read_plain
from ...data.units import UNKNOWN, Units
from ..config import Config, InitSection, load_config
from ..model.taking import ABSENT, FRONT, UNLIKE, Taken, duration_rows, groups, part_of, take, unit_rows
from ..model.transducer import Transducer
from . import checkpoint, identity
from .folder import SETTINGS
from .load import EXPORT_HEAD, TrainedOn, load_run, trained_on

Say = Callable[[str], None]
ATTEMPTS = 3  # A source that still trains deletes checkpoints.


@dataclass(frozen=True)
class Origin:
    """Where the first weights of a run are from: what its identity and its checkpoints record.

    `weights` is the hash of all of the source's weights, and `run` that of its identity and settings, or None for an
    export. `taken` names the weights that were taken whole.
    """

    source: str
    checkpoint: str
    step: int
    weights: str
    run: str | None
    taken: list[str]

    @property
    def facts(self) -> dict[str, Any]:
        """All but the names of the weights."""
        return {k: v for k, v in asdict(self).items() if k != "taken"}


def noisy_copies(features: FeatureFile, noise: float) -> int:
    """Return how many noisy copies of each utterance a run reads. Raises FeatureError if it needs some and has none."""
    if noise and not features.copies:
        what = f"data.noise = {noise:g}, but there are no noisy copies"
        remedy = "add them with `stillhouse corpus features CORPUS FEATURES --noise FOLDER --copies N`"
        raise FeatureError(what, where=features.path, expected="copies, or data.noise = 0", remedy=remedy)
    return features.copies if noise else 0


def fit_normalisation(model: Transducer, loader: BatchLoader, speed: float) -> None:
    """Set the mean and deviation of each bin, over up to 500 training utterances, spread evenly."""
    count = len(loader.utterances)
    chosen = np.unique(np.linspace(0, count - 1, min(count, 500)).astype(int))
    ids = [loader.utterances[i].id for i in chosen]
    packed = loader.features.gather(ids, [speed] * len(ids))[0]
    packed = packed[np.isfinite(packed).all(axis=1)]  # a bad step names the others
    mean = _sum_rows(packed, lambda rows: rows) / len(packed)
    variance = _sum_rows(packed, lambda rows: np.square(rows - mean)) / len(packed)
    model.encoder.feature_mean.copy_(torch.from_numpy(mean))
    model.encoder.feature_std.copy_(torch.from_numpy(np.sqrt(variance).clip(min=1e-3)))


def _sum_rows(packed: np.ndarray, of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return the sum of `of(rows)` in float64, over pieces of `packed` that stay in the processor's cache."""
    pieces = (packed[start : start + 1024].astype(np.float64) for start in range(0, len(packed), 1024))
    return sum((of(rows).sum(axis=0) for rows in pieces), start=np.zeros(packed.shape[1]))


def with_recorded(out: Path, init: InitSection) -> InitSection:
    """Return the settings of init, those of the run in `out` if none name a source, so that the run can resume."""
    settings = out / SETTINGS
    if init.source is not None or not settings.exists():
        return init
    given = {name: getattr(init, name) for name in init.model_fields_set}
    return load_config(settings, saved=True).init.model_copy(update=given)


def take_weights(
    model: Transducer, config: Config, out: Path, units: Units, features: FeatureFile, say: Say
) -> Origin | None:
    """Take the weights that the settings of init name, and report what was taken and what was not.

    Raises CheckpointError if the source has no weights, ConfigError if nothing of it fits or if other settings of init
    have no source, and UsageError if it is the run itself.
    """
    init = config.init
    if init.source is None:
        usual = InitSection()
        if given := [n for n in type(usual).model_fields if getattr(init, n) != getattr(usual, n)]:
            raise ConfigError(
                f"init.{given[0]} is set, but no weights are taken", expected="init.source, or --init RUN"
            )
        return None
    if init.source.resolve() == out.resolve():
        raise UsageError("a run cannot start from itself", where=out, remedy="choose another --out")
    source, their_units, theirs, step = _load(init.source, init.checkpoint)
    if bad := [name for name, p in source.named_parameters() if not bool(torch.isfinite(p).all())]:
        remedy = "choose an earlier one with --set init.checkpoint=STEP"
        raise CheckpointError(f"weights are not finite: {first_few(bad)}", where=init.source, remedy=remedy)
    rows = unit_rows(config, len(model.encoder.feature_mean), units, their_units)
    rows |= duration_rows(model.durations, source.durations)
    fitted, trained = model.encoder.feature_mean.clone(), trained_on(init.source)
    taken = take(model, source, init.parts, rows, _barred(config, theirs, trained, features))
    of = f" of {theirs.steps}" if step < theirs.steps else ""
    weights = identity.weights_hash(source)
    say(f"init: {init.source}, {init.checkpoint} checkpoint, step {step}{of}, weights {weights}")
    if trained.settings is None:
        say("init: the source does not record the settings of its features, so they were not compared with these")
    left = _not_taken(taken, config, theirs)
    _report(model, taken, left, fitted, say)
    if units.pieces != their_units.pieces and rows.keys() & {*taken.rows, *taken.whole}:
        _report_units(units, their_units, say)
    if _causal(config) != _causal(theirs):
        say("init: the convolutions are taken, although they were trained with other neighbours (model.causal)")
    if not taken.whole and not taken.rows:
        raise ConfigError(
            f"nothing of {init.source} fits: {'; '.join(left)}",
            expected="a source that has some of the same units, widths or depth",
            remedy="set model.dim, model.predictor and the others as in its config.toml, or train without --init",
        )
    return Origin(str(init.source), init.checkpoint, step, weights, _run_hash(init.source), taken.whole)


def _load(source: Path, which: str) -> tuple[Transducer, Units, Config, int]:
    """`load_run`, for a folder that a user may have mistaken, or that still changes."""
    expected = "a run's folder, or an export as safetensors"
    if not source.exists():
        raise CheckpointError("there is no such run", where=source, expected=expected)
    run = next((p for p in source.parents[:3] if (p / SETTINGS).is_file()), None)
    if run is not None and not (source / SETTINGS).is_file():
        remedy, of = f"use --init {run}", source.relative_to(run).parts[:2]
        if len(of) == 2 and of[1].removeprefix("step-").isdigit():
            remedy += f" --set init.checkpoint={checkpoint.step_of(Path(of[1]))}"
        raise CheckpointError("this is a part of a run or of an export", where=source, remedy=remedy)
    if not any((source / name).is_file() for name in (EXPORT_HEAD, SETTINGS)):
        what = "this holds no weights of Stillhouse, and weights of other programs cannot be read"
        raise CheckpointError(what, where=source, expected=expected)
    if (source / EXPORT_HEAD).is_file() and which != "best":
        what = f"an export has one model, and init.checkpoint = {which} chooses among those of a run"
        raise UsageError(what, where=source, remedy="remove init.checkpoint")
    for _ in range(ATTEMPTS - 1):
        before = checkpoint.checkpoints(source / "checkpoints")
        try:
            return load_run(source, which)
        except CheckpointError:
            if checkpoint.checkpoints(source / "checkpoints") == before:
                raise
    return load_run(source, which)


def _run_hash(source: Path) -> str | None:
    """A hash that stays the same while a run trains, or None for an export and for runs that recorded no identity.

    Runs of one identity may differ in settings of learning, so these count, too.
    """
    try:
        facts = json.loads(read_plain(source / identity.FILE))
        settings = load_config(source / SETTINGS, saved=True).flat()
    except (OSError, ValueError, ConfigError):
        return None
    facts["settings"] = {k: v for k, v in settings.items() if not k.startswith("run.")}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _barred(config: Config, theirs: Config, trained: TrainedOn, features: FeatureFile) -> dict[str, str]:
    """The modules that mean something else in the source, although they may have the same shapes."""
    barred: dict[str, str] = {}
    if trained.settings is not None:
        there = {name: features.settings.get(name) for name in trained.settings}
        if differ := differing(there, trained.settings, "in the source's"):
            barred[rf"{FRONT}\."] = f"the features are others: {', '.join(differ)}".replace(" there ", " here ")
    for name, pattern in {
        "heads": r"encoder\.blocks\.\d+\.attention\.",
        "subsampling": r"encoder\.front\.",
        "predictor": r"(joint\.|simple\.|)predictor\.",
        "joint": r"joint\.",
    }.items():
        own, other = getattr(config.model, name), getattr(theirs.model, name)
        if own != other:
            barred[pattern] = f"model.{name} is {own} here and {other} in the source"
    return barred


def _causal(config: Config) -> bool:
    return config.model.causal or config.model.chunk_frames > 0 or bool(config.model.chunk_choices)


def _not_taken(taken: Taken, config: Config, theirs: Config) -> list[str]:
    """Return in words which modules were not taken, and why."""
    names = ("dim", "layers", "inner", "kernel", "subsampling", "predictor_dim", "predictor_context", "joint_dim")
    own, other = (c.model.model_dump(include=set(names)) for c in (config, theirs))
    differ = [f"model.{n} is {own[n]} here and {other[n]} in the source" for n in names if own[n] != other[n]]
    depth = [text for text in differ if text.startswith("model.layers")]
    details = {UNLIKE: [text for text in differ if text not in depth], ABSENT: depth}
    lines = []
    for why, modules in taken.left.items():
        reason = ": ".join([why, ", ".join(details[why])]) if details.get(why) else why
        lines.append(f"{', '.join(modules)} ({reason})")
    return lines


def _report(model: Transducer, taken: Taken, left: Sequence[str], fitted: torch.Tensor, say: Say) -> None:
    """Say what was taken and what was not. `fitted` is the mean of the features of this corpus."""
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    some = sum(sizes[name] * n // len(model.get_parameter(name)) for name, n in taken.rows.items())
    count = some + sum(sizes.get(name, 0) for name in taken.whole)
    say(f"init: taken: {count / 1e6:.2f} of {sum(sizes.values()) / 1e6:.2f} M parameters")
    if taken.rows:
        parts = {n.rpartition(".")[0]: f"{k} of {len(model.get_parameter(n))} rows" for n, k in taken.rows.items()}
        say(f"init: taken in part: {', '.join(f'{module} ({rows})' for module, rows in parts.items())}")
    for line in left:
        say(f"init: not taken: {line}")
    if taken.unused:
        say(f"init: not used of the source: {', '.join(taken.unused)}")
    if "encoder.feature_mean" in taken.whole:
        away = float(((fitted - model.encoder.feature_mean) / model.encoder.feature_std).abs().max())
        say(f"init: features are normalised as in the source, whose means lie up to {away:.1f} deviations from these")
    else:
        say("init: features are normalised by this corpus")


def _report_units(units: Units, theirs: Units, say: Say) -> None:
    new, gone = (
        [piece for piece in a.pieces[UNKNOWN + 1 :] if piece not in set(b.pieces[UNKNOWN + 1 :])]
        for a, b in ((units, theirs), (theirs, units))
    )
    kinds = f" ({units.kind} here, {theirs.kind} there)" if units.kind != theirs.kind else ""
    say(
        f"init: other units than in the source{kinds}: {units.size - len(new)} of {units.size} have the same text "
        "there, and the rows of those are taken by it"
        + (f"; new: {first_few(new)}" if new else "")
        + (f"; not here: {first_few(gone)}" if gone else "")
    )


def refuse_other_source(given: InitSection, origin: Mapping[str, Any] | None, out: Path, say: Say) -> None:
    """Raise StaleError if a run that resumes did not start from the source that is given.

    `origin` is what the run recorded. A source that is gone is not compared, because the run does not need it. A source
    that has trained on since the run began is reported.
    """
    if given.source is None:
        return
    remedy = f"leave out --init, or init.source, to resume {out}, or choose another --out"
    if origin is None:
        raise StaleError("the run did not start from another run's weights", where=out, remedy=remedy)
    began = Path(origin["source"])
    try:
        weights = identity.weights_hash(_load(given.source, given.checkpoint)[0])
    except StillhouseError as e:
        if began.resolve() == given.source.resolve() and not given.source.exists():
            return
        raise StaleError(
            f"the run started from {began}, and {given.source} cannot be compared with it: {e.what}",
            where=out,
            remedy=remedy,
        ) from None
    if weights == origin["weights"]:
        return
    if origin["run"] is not None and origin["run"] == _run_hash(given.source):
        say(f"init: {given.source} has trained on since step {origin['step']}, from which this run started")
        return
    raise StaleError(
        f"the run started from other weights: {origin['weights']} of {began}, and {given.source} has {weights}",
        where=out,
        remedy=remedy,
    )


def freeze(model: Transducer, transfers: Mapping[str, Any], config: Config, origin: Origin | None, say: Say) -> None:
    """Exclude from training what init.freeze names of the weights that were taken whole, and say what that is.

    Raises ConfigError if there is nothing to freeze, or nothing left to train.
    """
    init, taken = config.init, set(origin.taken if origin else ())
    if not init.freeze or origin is None:
        return
    parameters = dict(model.named_parameters())
    frozen: list[str] = []
    for part in init.freeze:
        own = [name for name in parameters if name in taken and _is_in(name, part)]
        if not own:
            what = f"init.freeze has {part}, but none of its weights was taken whole, so there is nothing to freeze"
            raise ConfigError(what, expected=f"the same units, widths and depth as {origin.source}")
        frozen += own
    for name in frozen:
        parameters[name].requires_grad_(False)
    left = [name for name, p in parameters.items() if p.requires_grad]
    if not left:
        raise ConfigError("init.freeze leaves no weight of the model to train", expected="fewer parts")
    modules = dict.fromkeys(name.rpartition(".")[0] for name in parameters)
    still = dict.fromkeys(name.rpartition(".")[0] for name in left)
    count = sum(parameters[name].numel() for name in set(frozen))
    say(f"init: frozen: {', '.join(groups([m for m in modules if m not in still], modules))} ({count / 1e6:.2f} M)")
    whole = {part.partition(":")[0] for part in init.freeze if ":" not in part}
    if new := [m for m in still if part_of(m) in whole]:
        say(f"init: trained, because not all of it was taken: {', '.join(groups(new, modules))}")
    for name, transfer in transfers.items():
        layers = config.transfer.transfers[name].layers or [config.model.layers]
        part = "predictor" if transfer.needs_predictor else f"encoder:{max(layers)}"
        if not any(_is_in(n, part) for n in left):
            what = f"transfer {name}" if name else "the transfer"
            say(f"init: {what} reads frozen weights alone, so it trains its heads and changes nothing of the model")


def _is_in(name: str, part: str) -> bool:
    """Whether a weight belongs to a part, or to the front and the first N blocks of encoder:N."""
    part, _, blocks = part.partition(":")
    if part_of(name) != part or not blocks:
        return part_of(name) == part
    _, below, number, *_ = name.split(".")
    return below != "blocks" or int(number) < int(blocks)
