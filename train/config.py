"""The settings of a training run: one TOML file, checked by pydantic, changed by --set.

Invariant: a setting that is not known is an error, and a run writes its resolved settings beside its output, so that
`stillhouse train RUN/config.toml` means the same run. Exercised by `stillhouse train CONFIG --set optim.lr=1e-3`.
"""

from __future__ import annotations

import json
import math
import reprlib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..data.errors import ConfigError

Kind = TypeVar("Kind", bound=BaseModel)


class ConfigSection(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class DataSection(ConfigSection):
    """Paths are taken from the folder in which the command runs."""

    corpus: Path = Field(description="corpus.jsonl")
    features: Path = Field(description="features.h5")
    units: Path = Field(description="folder of the ASR units")
    train: str | None = Field(None, description="split to train on; several with commas; none: everything")
    dev: str | None = Field(None, description="split to evaluate on while training; none: no evaluation")
    speeds: list[float] = Field([1.0], min_length=1, description="speeds drawn for each utterance and epoch")
    batch_frames: int = Field(16_000, ge=100, description="padded frames of 10 ms in a batch")
    mix_shards: int = Field(16, ge=0, description="shards of the first store that are mixed at a time; 0: all")
    workers: int = Field(
        0, ge=0, le=1_024, description="processes that read batches; 0: a thread, which is faster as a rule"
    )
    worker_start: Literal["spawn", "fork"] = "spawn"
    max_frames: int = Field(3_000, ge=10, description="longer utterances are left out of training, and counted")


class ModelSection(ConfigSection):
    dim: int = Field(176, ge=8, le=1 << 16)
    layers: int = Field(6, ge=0, le=1_024)
    heads: int = Field(4, ge=1)
    inner: int = Field(704, ge=8, le=1 << 18, description="width inside the feed-forward modules")
    kernel: int = Field(15, ge=1, le=1 << 16, description="frames that a depthwise convolution spans; odd")
    subsampling: Literal[2, 3, 4, 6, 8] = 4
    causal: bool = Field(False, description="convolutions see no later frame; chunks imply it")
    chunk_frames: int = Field(
        0, ge=0, description="frames of 10 ms that are heard at a time, for streaming; 0: the whole utterance"
    )
    left_chunks: int = Field(4, ge=0, description="chunks before its own that a frame attends to")
    chunk_choices: list[Annotated[int, Field(ge=0)]] = Field(
        [], description="chunk_frames drawn for each batch in training, so that one model serves them all"
    )
    predictor: Literal["stateless", "lstm"] = "stateless"
    predictor_dim: int = Field(192, ge=8, le=1 << 16)
    predictor_context: int = Field(2, ge=1, le=1 << 16)
    joint_dim: int = Field(256, ge=8, le=1 << 16)
    joint: Literal["additive", "multiplicative"] = Field(
        "additive", description="how the joint brings encoder and prediction network together"
    )
    dropout: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _fits(self) -> ModelSection:
        if self.dim % (2 * self.heads):
            raise ValueError(f"dim = {self.dim} must be a multiple of 2 x heads = {2 * self.heads}")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel = {self.kernel} must be odd")
        for frames in (self.chunk_frames, *self.chunk_choices):
            if frames % self.subsampling:
                raise ValueError(f"a chunk of {frames} frames must be a multiple of subsampling = {self.subsampling}")
        return self


class LossSection(ConfigSection):
    ctc_weight: float = Field(0.3, ge=0, description="weight of the auxiliary CTC loss on the encoder; 0: no CTC head")
    inter_ctc_layers: list[Annotated[int, Field(ge=1)]] = Field(
        [], description="encoder layers, from 1, that get a CTC loss of their own, through the same head"
    )
    inter_ctc_weight: float = Field(
        0.3, ge=0, le=1, description="their share of the CTC loss: (1 - w) of the last layer's, w of their mean"
    )
    fastemit: float = Field(0.0, ge=0, description="FastEmit's lambda")
    eps: float = Field(1e-6, ge=0, lt=1, description="lattice cells with a smaller occupancy get no gradient")
    kind: Literal["full", "pruned", "tdt"] = Field(
        "full", description="pruned: the joint runs on a band of units a frame; tdt: tokens and durations"
    )
    band: int = Field(5, ge=2, description="units of the pruned loss's band; wider where a transcript needs it")
    simple_weight: float = Field(0.5, gt=0, description="weight of the simple loss that chooses the band")
    durations: list[Annotated[int, Field(ge=0)]] = Field(
        [0, 1, 2, 3, 4], description="encoder frames that a unit or blank may move on by, for kind = tdt"
    )
    sigma: float = Field(0.05, ge=0, description="what every arc's log-probability is lowered by, for kind = tdt")

    @model_validator(mode="after")
    def _whole(self) -> LossSection:
        if self.inter_ctc_layers and not self.ctc_weight:
            raise ValueError("inter_ctc_layers need ctc_weight > 0: theirs is a share of the CTC loss")
        if len(set(self.durations)) < len(self.durations) or not {0, 1} <= set(self.durations):
            raise ValueError(
                f"durations = {self.durations} must differ and hold 0 and 1, or some transcripts fit no frames"
            )
        return self


class OptimSection(ConfigSection):
    steps: int = Field(2_000, ge=1)
    lr: float = Field(1e-3, gt=0)
    warmup_steps: int = Field(200, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_lr: float = Field(0.02, ge=0, le=1, description="learning rate at the end, as a share of lr")
    weight_decay: float = Field(0.01, ge=0)
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.98)
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    ema: float = Field(0.0, ge=0, lt=1, description="decay of a moving average of the weights, 0.999 say; 0: none")


class SpecAugmentSection(ConfigSection):
    frequency_masks: int = Field(2, ge=0, le=1_024)
    frequency_width: int = Field(20, ge=0, description="bins")
    time_masks: int = Field(5, ge=0, le=1_024)
    time_width: int = Field(30, ge=0, description="frames of 10 ms")
    time_share: float = Field(0.25, ge=0, le=1, description="largest share of an utterance that time masks take")


class TransferSection(ConfigSection):
    stores: list[Path] = Field([], description="stores over the corpus; one may go without the brackets")
    views: list[str] = Field([], description="view addresses or globs, over all stores; none: no transfer")
    aligner: Literal["attention", "occupancy", "cif", "predictor"] = "attention"
    position: Literal["token", "word", "unit"] = "token"
    distance: Literal["cosine", "l1", "smooth_l1", "mse", "contrastive"] = "cosine"
    temperature: float = Field(0.1, ge=1e-3, description="of the contrastive distance: the lower, the stricter")
    mixing: Literal["mean", "learned", "sample"] = "mean"
    sample: int | None = Field(None, ge=1, description="views drawn each step, for mixing = sample")
    weight: float = Field(1.0, ge=0, description="lambda")
    warmup_steps: int = Field(0, ge=0, description="steps over which lambda grows from 0")
    decay: Literal["linear", "cosine"] | None = Field(None, description="how lambda falls after the warm-up")
    decay_steps: int | None = Field(None, ge=1, description="steps that the fall takes; it stays at final_weight then")
    final_weight: float = Field(0.0, ge=0, description="lambda at the end of the fall")
    layers: list[int] = Field([], description="encoder layers that are tapped, from 1; none: the last")
    control: Literal["shuffled", "static", "words", "words-shuffled"] | None = Field(
        None,
        description="shuffled: targets of another utterance; static: the teacher's input embeddings; words: one-hot "
        "codes of the words, a planted signal; words-shuffled: such codes of another utterance's words",
    )
    on_missing: Literal["error", "skip"] = "error"

    @field_validator("stores", "views", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return [value] if isinstance(value, (str, Path)) else value

    @model_validator(mode="after")
    def _whole(self) -> TransferSection:
        if self.views and not self.stores:
            raise ValueError("views need a store")
        if (self.decay is None) != (self.decay_steps is None):
            raise ValueError("decay and decay_steps go together")
        if (self.mixing == "sample") != (self.sample is not None):
            raise ValueError("sample (how many views a step) and mixing = sample go together")
        return self


class RunSection(ConfigSection):
    seed: int = Field(0, ge=0, lt=1 << 63)
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="auto: bfloat16 where the device computes it fast, else float32"
    )
    device: str = Field("auto", description="auto: cuda where there is one, else cpu")
    threads: int = Field(0, ge=0, le=1 << 16, description="CPU threads of torch; 0: all cores")
    log_every: int = Field(20, ge=1)
    eval_every: int = Field(500, ge=1)
    checkpoint_every: int = Field(500, ge=1)
    keep: int = Field(2, ge=1, description="checkpoints kept beside the best one")
    backend: Literal["auto", "gloo", "nccl"] = Field("auto", description="under torchrun; auto: nccl where CUDA is")
    timeout_s: float = Field(600.0, gt=0, description="under torchrun: how long a rank waits for the others")
    loggers: list[Literal["jsonl", "tensorboard", "wandb", "mlflow"]] = Field(
        ["jsonl", "tensorboard"], description="where metrics go; JSON lines are always written"
    )
    bad_steps: int = Field(10, ge=1, description="steps in a row without a finite loss or gradient that end the run")


class Config(ConfigSection):
    data: DataSection
    model: ModelSection = ModelSection()
    loss: LossSection = LossSection()
    optim: OptimSection = OptimSection()
    specaugment: SpecAugmentSection = SpecAugmentSection()
    transfer: TransferSection = TransferSection()
    run: RunSection = RunSection()

    @model_validator(mode="after")
    def _tap(self) -> Config:
        outside = [n for n in self.transfer.layers if not 1 <= n <= self.model.layers]
        if outside:
            raise ValueError(f"transfer.layers has {outside[0]}, but the encoder has {self.model.layers} layers")
        late = [n for n in self.loss.inter_ctc_layers if n >= self.model.layers]
        if late:
            raise ValueError(
                f"loss.inter_ctc_layers has {late[0]}, but the layers before the encoder's last are 1 to "
                f"{self.model.layers - 1}"
            )
        return self


def load_config(path: Path, changes: Sequence[str] = ()) -> Config:
    """Read a TOML file and apply `a.b=value` changes (values are TOML; a bare word is a string).

    Raises ConfigError naming the file, the setting and what is expected.
    """
    tree = read_toml(path)
    for change in changes:
        _apply(tree, change)
    return validated(Config, tree, path)


def read_toml(path: Path) -> dict[str, Any]:
    """Raises ConfigError naming the file."""
    path = Path(path)
    try:
        if not path.is_file() and path.exists():
            raise ConfigError("a folder, or no plain file", where=path, expected="a TOML file")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("no such file", where=path) from None
    except (OSError, ValueError, RecursionError) as e:  # ValueError: not UTF-8, not TOML, a number without end
        raise ConfigError(f"not a readable TOML file: {e}", where=path) from None


def validated(kind: type[Kind], tree: Mapping[str, Any], where: object) -> Kind:
    """Settings out of a tree. Raises ConfigError naming every setting that is unknown or cannot be."""
    try:
        return kind.model_validate(tree)
    except ValidationError as e:
        found = "; ".join(
            f"{'.'.join(map(str, d['loc'])) or 'file'}: {d['msg']} (got {_short(d['input'])})" for d in e.errors()
        )
        raise ConfigError(found, where=where) from None


def merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`tree` with `changes` laid over it, section by section; neither is changed."""
    found = dict(tree)
    for key, value in changes.items():
        below = found.get(key)
        found[key] = merged(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    return found


def _apply(tree: dict, change: str) -> None:
    name, equals, text = change.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {change}", expected="section.name=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"--set {change}: {key} is not a section", expected="section.name=value")
    tree[keys[-1]] = value


def _short(value: object) -> str:
    text = reprlib.repr(value)  # bounded in depth
    return text if len(text) <= 60 else text[:57] + "..."


def dump_config(config: Config) -> str:
    """The settings as TOML that load_config reads back to an equal Config."""
    lines = []
    for section, values in config.model_dump(mode="json").items():
        lines.append(f"[{section}]")
        # A JSON scalar or list of scalars is TOML as it stands; TOML has no null, and absent means None here.
        lines += [
            f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items() if value is not None
        ]
        lines.append("")
    return "\n".join(lines)


def learning_rate(step: int, config: Config) -> float:
    """The learning rate of step `step` (from 0): linear warm-up, then the schedule down to final_lr · lr."""
    o = config.optim
    if step < o.warmup_steps:
        return o.lr * (step + 1) / o.warmup_steps
    done = (step - o.warmup_steps) / max(1, o.steps - o.warmup_steps)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[o.schedule]
    return o.lr * (o.final_lr + (1 - o.final_lr) * shape)


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
