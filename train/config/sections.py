"""The settings of a training run: one TOML file, checked by pydantic, changed by `--set`.

Guarantees: an unknown setting is an error, and `stillhouse train RUN/config.toml` repeats the run of the folder RUN.
Try: `stillhouse train CONFIG --set optim.lr=1e-3`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from .fields import ConfigSection, Natural, Positive, Share
from .init import InitSection
from .loss import LossSection
from .text import TextSection, refuse_no_steps


def in_transfer(what: str, name: str) -> str:
    """Return the name of a metric, a file or a section in the transfer `name`. The unnamed transfer adds nothing."""
    return f"{what}.{name}" if name else what


class DataSection(ConfigSection):
    """The corpus, and how it makes batches. Paths start from the folder of the command.

    A frame is a row of the feature file: 10 ms of fbank, and 20 ms of most speech encoders.
    """

    corpus: Path = Field(description="Corpus file, such as corpus.jsonl.")
    features: Path = Field(description="Feature file, such as features.h5.")
    units: Path = Field(description="Folder of the ASR units.")
    train: str | None = Field(None, description="Splits to train on, with commas between. Without it, all utterances.")
    dev: str | None = Field(None, description="Split to evaluate on during training. Without it, no evaluation.")
    speeds: list[float] = Field([1.0], min_length=1, description="Speeds. Each utterance draws one in each epoch.")
    noise: float = Field(
        0.0, ge=0, le=1, description="Share of an epoch's utterances that are a noisy copy, if features has some."
    )
    batch_frames: int = Field(16_000, ge=100, description="Largest batch, in frames, padding included.")
    mix_shards: Natural = Field(16, description="Shards of the first store to mix at a time. 0 mixes all.")
    max_frames: int = Field(3_000, ge=10, description="Longest utterance of training. Longer ones are left out.")


class ModelSection(ConfigSection):
    """The encoder, the prediction network and the joint network."""

    dim: int = Field(176, ge=8, le=1 << 16, description="Width of the encoder, a multiple of 2 × heads.")
    layers: int = Field(6, ge=0, le=1_024, description="Conformer blocks of the encoder.")
    heads: Positive = Field(4, description="Attention heads of a block.")
    inner: int = Field(704, ge=8, le=1 << 18, description="Width inside the feed-forward modules.")
    kernel: int = Field(15, ge=1, le=1 << 16, description="Encoder states that a convolution spans, odd.")
    subsampling: Literal[1, 2, 3, 4, 6, 8] = Field(4, description="Frames in one encoder state.")
    causal: bool = Field(False, description="Convolutions see no later frame. Chunks imply it.")
    chunk_frames: Natural = Field(0, description="Frames of a streaming chunk. 0 means the whole utterance.")
    left_chunks: Natural = Field(4, description="Earlier chunks that a frame attends to, beside its own.")
    chunk_choices: list[Natural] = Field([], description="Values of chunk_frames. Each training batch draws one.")
    predictor: Literal["stateless", "lstm"] = Field(
        "stateless", description="Prediction network over the last predictor_context units, or an LSTM over all units."
    )
    predictor_dim: int = Field(192, ge=8, le=1 << 16, description="Width of the prediction network.")
    predictor_context: int = Field(2, ge=1, le=1 << 16, description="Units that the stateless predictor sees.")
    joint_dim: int = Field(256, ge=8, le=1 << 16, description="Width of the joint network.")
    joint: Literal["additive", "multiplicative"] = Field("additive", description="How encoder and predictor combine.")
    dropout: Share = Field(0.1, description="Probability of dropout.")

    @model_validator(mode="after")
    def _widths_agree(self) -> ModelSection:
        if self.dim % (2 * self.heads):
            raise ValueError(f"model.dim = {self.dim} must be a multiple of 2 x model.heads = {2 * self.heads}")
        if self.kernel % 2 == 0:
            raise ValueError(f"model.kernel = {self.kernel} must be odd")
        for name, chunks in (("chunk_frames", [self.chunk_frames]), ("chunk_choices", self.chunk_choices)):
            for frames in chunks:
                if frames % self.subsampling:
                    raise ValueError(
                        f"model.{name} has {frames}, which is no multiple of model.subsampling = {self.subsampling}"
                    )
        return self


class OptimSection(ConfigSection):
    """AdamW and its learning rate."""

    steps: Natural = Field(2_000, description="Training steps, those of text.pretrain_steps apart.")
    lr: float = Field(1e-3, gt=0, description="Highest learning rate.")
    warmup_steps: int = Field(200, ge=0, description="Steps over which the learning rate rises from 0 to lr.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="How lr falls after the warm-up.")
    final_lr: float = Field(0.02, ge=0, le=1, description="Learning rate at the end, as a share of lr.")
    weight_decay: float = Field(0.01, ge=0, description="Weight decay of matrices. Biases and norms have none.")
    betas: tuple[Share, Share] = Field((0.9, 0.98), description="Decay of the gradient's mean and of its square's.")
    clip: float = Field(1.0, gt=0, description="Largest norm of the gradient. Larger gradients are scaled down to it.")
    ema: Share = Field(0.0, description="Decay of a moving average of the weights, such as 0.999. 0 keeps none.")


class SpecAugmentSection(ConfigSection):
    """Masks over the features of a training batch (Park et al. 2019, arXiv 1904.08779).

    The states of a speech encoder have no masks of frequencies, because their numbers are not in the order of any.
    """

    frequency_masks: int = Field(2, ge=0, le=1_024, description="Masked bands of frequencies in an utterance.")
    frequency_width: Natural = Field(20, description="Widest band, in bins.")
    time_masks: int = Field(5, ge=0, le=1_024, description="Masked stretches of time in an utterance.")
    time_width: Natural = Field(30, description="Longest stretch, in steps of 10 ms.")
    time_width_s: float | None = Field(None, ge=0, description="Longest stretch in seconds, instead of time_width.")
    time_share: float = Field(0.25, ge=0, le=1, description="Largest share of an utterance that time masks cover.")

    def masks(self, frame_hz: float, mel: bool) -> dict[str, Any]:
        """Return the arguments of `spec_augment` for features of `frame_hz` frames in a second, of mel bins or not."""
        masks = self.model_dump(exclude={"time_width_s"})
        longest_s = self.time_width / 100 if self.time_width_s is None else self.time_width_s
        masks["time_width"] = round(longest_s * frame_hz)
        return masks if mel else masks | {"frequency_masks": 0}


class TransferSettings(ConfigSection):
    """One transfer from teachers: its views, and how the student learns them. Lambda is the weight of its loss."""

    views: list[str] = Field([], description="View addresses or patterns. Without views there is no transfer.")
    aligner: Literal["occupancy", "attention", "transport", "cif", "predictor", "frames"] = Field(
        "occupancy",
        description="How encoder states are brought to the positions that have a target. frames: for speech teachers.",
    )
    position: Literal["token", "word", "unit"] = Field(
        "token", description="What has a target: token, word or ASR unit. With frames, each encoder state has one."
    )
    distance: Literal["cosine", "l1", "smooth_l1", "mse", "contrastive", "codes"] = Field(
        "cosine",
        description="Distance between predicted and teacher states. codes predicts the codes of views of dtype pq:M.",
    )
    state_share: float = Field(
        0.2,
        gt=0,
        le=1,
        description="For frames: share of the encoder states in the loss. Each step draws others.",
    )
    temperature: float = Field(0.1, ge=1e-3, description="Temperature of contrastive. A lower one is stricter.")
    mixing: Literal["mean", "sum", "learned", "sample"] = Field(
        "mean",
        description="What the views' losses become: their mean, their sum, a mean by learned weights, or the mean of "
        "some that each step draws.",
    )
    sample: int | None = Field(None, ge=1, description="Views drawn in each step, for mixing = sample.")
    weight: float = Field(1.0, ge=0, description="Lambda after the warm-up.")
    warmup_steps: int = Field(0, ge=0, description="Steps over which lambda rises from 0.")
    decay: Literal["linear", "cosine"] | None = Field(None, description="How lambda falls. Without it, lambda stays.")
    decay_steps: int | None = Field(None, ge=1, description="Steps over which lambda falls.")
    final_weight: float = Field(0.0, ge=0, description="Lambda at the end of the fall and after it.")
    layers: list[int] = Field([], description="Encoder layers that predict states, from 1. Empty means the last.")
    control: Literal["shuffled", "static", "words", "words-shuffled"] | None = Field(
        None,
        description="Control experiment: another utterance's states, the teacher's input embeddings, one-hot codes of "
        "the words, or codes of another utterance's words.",
    )

    @field_validator("views", mode="before")
    @classmethod
    def _one_view(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class TransferSection(TransferSettings):
    """The transfer from teachers. Several transfers have a section each, [transfer.NAME], with the settings below."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, TransferSettings]

    stores: list[Path] = Field([], description="Stores over the corpus. A single one needs no brackets.")
    on_missing: Literal["error", "skip"] = Field(
        "error", description="If a store lacks an utterance: stop, or skip it."
    )

    @field_validator("stores", mode="before")
    @classmethod
    def _one_store(cls, value: Any) -> Any:
        return [value] if isinstance(value, (str, Path)) else value

    @model_validator(mode="before")
    @classmethod
    def _names(cls, values: Any) -> Any:
        """Refuse a setting that does not exist, which the name of a transfer cannot be."""
        for name, value in values.items() if isinstance(values, Mapping) else ():
            if name in cls.model_fields or isinstance(value, TransferSettings):
                continue
            if not isinstance(value, Mapping):
                near = [f"transfer.{n}" for n in get_close_matches(name, cls.model_fields)]
                hint = f"did you mean {' or '.join(near)}?" if near else f"expected {', '.join(cls.model_fields)}"
                raise ValueError(f"transfer.{name}: no such setting; {hint}")
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(f"transfer.{name}: the name of a transfer has letters, digits, _ and - alone")
        return values

    @model_validator(mode="after")
    def _complete(self) -> Self:
        named = list(self.model_extra or {})
        shared = type(self).model_fields.keys() - TransferSettings.model_fields.keys()
        if own := sorted(self.model_fields_set - shared - set(named)) if named else []:
            raise ValueError(
                f"transfer.{own[0]} and the section [transfer.{named[0]}] exclude each other: set "
                f"transfer.{named[0]}.{own[0]} (beside named transfers, [transfer] has {' and '.join(sorted(shared))})"
            )
        for name, t in self.settings.items():
            section = in_transfer("transfer", name)
            if t.views and not self.stores:
                raise ValueError(f"{section}.views needs a store in transfer.stores")
            if (t.decay is None) != (t.decay_steps is None):
                raise ValueError(f"{section}.decay and {section}.decay_steps go together")
            if t.aligner == "frames" and t.position != "token":
                raise ValueError(
                    f"{section}.position = {t.position} is not for {section}.aligner = frames, with which each encoder "
                    f"state has a target: leave {section}.position out"
                )
            needs_text = t.control in ("static", "words", "words-shuffled")
            for name, needs in (("aligner", t.aligner == "frames"), ("distance", t.distance == "codes")):
                if needs and needs_text:
                    raise ValueError(
                        f"{section}.control = {t.control} needs the tokens and the states of a text, which "
                        f"{section}.{name} = {getattr(t, name)} does not learn: set {section}.control = shuffled"
                    )
            if (t.mixing == "sample") != (t.sample is not None):
                raise ValueError(
                    f"{section}.sample, the views drawn in a step, and {section}.mixing = sample go together"
                )
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the settings of the one unnamed transfer where there are named ones."""
        left_out = TransferSettings.model_fields if self.model_extra else {}
        return {name: value for name, value in handler(self).items() if name not in left_out}

    @property
    def settings(self) -> dict[str, TransferSettings]:
        """The settings of each transfer by name. Without named transfers, the section is itself the transfer ""."""
        return self.model_extra or {"": self}

    @property
    def transfers(self) -> dict[str, TransferSettings]:
        """The settings of the transfers that have views, by name."""
        return {name: t for name, t in self.settings.items() if t.views}


class RunSection(ConfigSection):
    """The process: device, evaluations, checkpoints and logs. All but the seed may change when a run is resumed."""

    seed: int = Field(0, ge=0, lt=1 << 63, description="Seed of the first weights and of every random draw.")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Precision of the model. auto: bfloat16 if the device computes it fast, else float32."
    )
    device: str = Field("auto", description="Device of torch, such as cuda:1. auto: CUDA if there is one, else cpu.")
    threads: int = Field(0, ge=0, le=1 << 16, description="CPU threads of torch. 0 uses all cores.")
    log_every: Positive = Field(20, description="Steps between two lines of the log.")
    eval_every: Positive = Field(500, description="Steps between two evaluations.")
    checkpoint_every: Positive = Field(500, description="Steps between two checkpoints.")
    keep: Positive = Field(2, description="Newest checkpoints to keep, beside the best one.")
    backend: Literal["auto", "gloo", "nccl"] = Field(
        "auto", description="For torchrun. auto: NCCL with CUDA, else gloo."
    )
    timeout_s: float = Field(600.0, gt=0, description="Seconds that a rank waits for the others under torchrun.")
    loggers: list[Literal["jsonl", "tensorboard", "wandb", "mlflow"]] = Field(
        ["jsonl", "tensorboard"], description="Where metrics go. JSON Lines are always written."
    )
    bad_steps: Positive = Field(10, description="Steps in a row without a finite loss or gradient that end the run.")


class Config(ConfigSection):
    """All settings of a run."""

    data: DataSection
    model: ModelSection = ModelSection()
    loss: LossSection = LossSection()
    optim: OptimSection = OptimSection()
    specaugment: SpecAugmentSection = SpecAugmentSection()
    transfer: TransferSection = TransferSection()
    text: TextSection = TextSection()
    init: InitSection = InitSection()
    run: RunSection = RunSection()

    @property
    def steps(self) -> int:
        """All steps of the run: those of text alone, and then those with speech."""
        return self.text.pretrain_steps + self.optim.steps

    @model_validator(mode="wrap")
    @classmethod
    def _has_steps(cls, values: Any, handler: Any) -> Any:
        return refuse_no_steps(values, handler)

    @model_validator(mode="after")
    def _text_fits(self) -> Config:
        if self.text.split is not None and self.model.joint != "additive":
            raise ValueError(
                f"text.split needs model.joint = additive, because a {self.model.joint} joint network has no internal "
                "language model"
            )
        return self

    @model_validator(mode="after")
    def _layers_exist(self) -> Config:
        depth = self.model.layers
        taps = [(in_transfer("transfer", n) + ".layers", t.layers, depth) for n, t in self.transfer.settings.items()]
        deep = [int(name.partition(":")[2]) for name in self.init.freeze if ":" in name]
        if deep and max(deep) > depth:
            raise ValueError(f"init.freeze has encoder:{max(deep)}, but model.layers = {depth}")
        for name, layers, last in [*taps, ("loss.inter_ctc_layers", self.loss.inter_ctc_layers, depth - 1)]:
            for layer in layers:
                if not 1 <= layer <= last:
                    raise ValueError(f"{name} has {layer}, but with model.layers = {depth} it may have 1 to {last}")
        return self

    def flat(self) -> dict[str, Any]:
        """Return all settings as {"section.name": JSON value}. Those of a transfer may be "transfer.NAME.name"."""
        return flatten(self.model_dump(mode="json"))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as {"outer.inner": value}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
