"""The transducer: encoder, prediction network and joint network, from plain fbank to unit logits. Blank is unit 0.

Guarantees: the model holds all that inference needs, feature normalisation included, and nothing of the transfer. A
streaming encoder computes the same states chunk by chunk as from the whole utterance.
Try: `pytest tests/train/model`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...data.errors import ConfigError
from .layers import ConformerBlock, Dropout, Subsampling, chunk_mask, length_mask, rotary

BLANK = 0
Combine = Literal["add", "mul"]
PAST = ("keys", "values", "convolution")  # what the state of `stream` holds for each block


class Encoder(nn.Module):
    """A Conformer encoder: fbank [B, T, bins] -> states [B, T', dim], with T' = ceil(T / subsampling).

    Arguments:
        causal: convolutions see no later frame.
        chunk_frames: frames of 10 ms in a chunk, a multiple of `subsampling`. A frame attends to its own chunk and to
            the `left_chunks` before it. 0 means the whole utterance. Both may be changed on a trained model.
        chunk_choices: values of chunk_frames, of which each training batch draws one (Zhang et al. 2020,
            arXiv 2012.05481). Empty means `chunk_frames` alone.
    """

    feature_mean: Tensor
    feature_std: Tensor

    def __init__(
        self,
        *,
        bins: int = 80,
        dim: int = 176,
        layers: int = 6,
        heads: int = 4,
        inner: int = 704,
        kernel: int = 15,
        subsampling: int = 4,
        causal: bool = False,
        chunk_frames: int = 0,
        left_chunks: int = 4,
        chunk_choices: Sequence[int] = (),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.dim, self.subsampling, self.head_dim, self.kernel = dim, subsampling, dim // heads, kernel
        self.causal = causal
        self.chunk_frames, self.left_chunks, self.chunk_choices = chunk_frames, left_chunks, tuple(chunk_choices)
        self.register_buffer("feature_mean", torch.zeros(bins))
        self.register_buffer("feature_std", torch.ones(bins))
        self.front = Subsampling(bins, dim, subsampling, dropout, causal)
        self.blocks = nn.ModuleList(ConformerBlock(dim, heads, inner, kernel, dropout, causal) for _ in range(layers))

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Return the numbers of states of utterances of `lengths` frames."""
        return (lengths + self.subsampling - 1) // self.subsampling

    def normalise(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Normalise plain fbank by the training set's mean and deviation. Padding becomes 0."""
        mask = length_mask(lengths, features.shape[1])[:, :, None]
        return torch.where(mask, (features - self.feature_mean) / self.feature_std, 0.0)

    def forward(
        self, features: Tensor, lengths: Tensor, taps: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, dict]:
        """Encode whole utterances: normalised features [B, T, bins] of lengths [B] in frames.

        This returns states [B, T', dim], their lengths [B], and {layer: states} of the layers `taps`, where 1 is the
        first block. The generator of the CPU draws one of `chunk_choices`.
        """
        chunk_frames = self.chunk_frames
        if self.training and self.chunk_choices:
            chunk_frames = self.chunk_choices[int(torch.randint(len(self.chunk_choices), (), generator=generator))]
        chunk = chunk_frames // self.subsampling
        x, lengths, _ = self.front(features, lengths)
        inside = length_mask(lengths, x.shape[1])
        mask = inside[:, :, None].to(x.dtype)
        seen = inside[:, None, None, :]
        if chunk:
            near = chunk_mask(x.shape[1], chunk, self.left_chunks, x.device)
            # Each frame of the padding sees itself, because a softmax over no key is NaN.
            seen = (seen & near) | torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        bias = torch.zeros(seen.shape, device=x.device).masked_fill_(~seen, float("-inf"))
        positions = rotary(x.shape[1], self.head_dim, x.device)
        tapped = {}
        for number, block in enumerate(self.blocks, 1):
            x, _ = block(x, mask, bias, positions)
            if number in taps:
                tapped[number] = x * mask
        return x * mask, lengths, tapped

    def stream_state(
        self, batch: int = 1, *, chunk_frames: int | None = None, left_chunks: int | None = None
    ) -> dict[str, Tensor]:
        """Return the state of `stream` at the beginning of an utterance: zeros, of fixed shapes, batch first.

        None takes the model's own chunks. Raises ConfigError if the model cannot stream with these chunks.

        Returns:
            processed: int64 [B], the number of states so far.
            keys, values: [B, layers, left, dim] of the attention, left = left_chunks * states of a chunk.
            convolution: [B, layers, kernel - 1, dim].
            front0, …: [B, frames, width], one for each convolution of the subsampling.
        """
        chunk = self.chunk_frames if chunk_frames is None else chunk_frames
        left_chunks = self.left_chunks if left_chunks is None else left_chunks
        if not self.causal:
            raise ConfigError(
                "this model was not trained to stream, so it needs whole utterances",
                remedy="train one with model.chunk_frames, and with model.chunk_choices for several chunk sizes",
            )
        if chunk <= 0 or chunk % self.subsampling:
            raise ConfigError(
                f"chunk_frames = {chunk}", expected=f"a multiple of {self.subsampling}, the frames of a state"
            )
        if left_chunks < 0:
            raise ConfigError(f"left_chunks = {left_chunks}", expected="0 or more")
        zeros = self.feature_mean.new_zeros
        left, layers = left_chunks * (chunk // self.subsampling), len(self.blocks)
        state = {"processed": torch.zeros(batch, dtype=torch.int64, device=self.feature_mean.device)}
        state |= {name: zeros(batch, layers, left, self.dim) for name in ("keys", "values")}
        state["convolution"] = zeros(batch, layers, self.kernel - 1, self.dim)
        state |= {f"front{n}": zeros(batch, *shape) for n, shape in enumerate(self.front.past_shapes)}
        return state

    def stream(
        self, features: Tensor, state: Mapping[str, Tensor], lengths: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Encode one chunk of each utterance. The operations depend on shapes alone, so that this can be traced.

        The features are plain fbank [B, t, bins], where t is the chunk_frames that the first state was made for. The
        lengths [B] are fewer than t once an utterance has ended, and None means t.
        This returns states [B, t / subsampling, dim], which are 0 past an utterance's end, and the next chunk's state.
        """
        batch, frames, _ = features.shape
        if lengths is None:
            lengths = torch.full((batch,), frames, dtype=torch.int64, device=features.device)
        past = [state[f"front{n}"] for n in range(len(self.front.past_shapes))]
        x, lengths, front = self.front(self.normalise(features, lengths), lengths, past)
        size, left = x.shape[1], state["keys"].shape[2]
        inside = length_mask(lengths, size)
        mask = inside[:, :, None].to(x.dtype)
        behind = torch.arange(left, 0, -1, device=x.device) <= state["processed"][:, None]
        place = torch.arange(left + size, device=x.device)
        itself = place[left:, None] == place
        seen = torch.cat([behind, inside], dim=1)[:, None, None, :] | itself
        bias = torch.zeros(seen.shape, device=x.device).masked_fill(~seen, float("-inf"))
        positions = rotary(left + size, self.head_dim, x.device)
        kept = []
        for number, block in enumerate(self.blocks):
            x, new = block(x, mask, bias, positions, tuple(state[k][:, number] for k in PAST))
            kept.append(new)
        next_state = {"processed": state["processed"] + lengths}
        next_state |= {name: torch.stack(t, 1) for name, t in zip(PAST, zip(*kept))}
        next_state |= {f"front{n}": value for n, value in enumerate(front)}
        return x * mask, {name: next_state.get(name, value) for name, value in state.items()}


class StatelessPredictor(nn.Module):
    """The last `context` units, embedded and mixed by a depthwise convolution (Ghodsi et al. 2020, ICASSP).

    The state of a decoding is int64 [B, context], the last units, with blanks where there is none yet.
    """

    def __init__(self, size: int, dim: int, context: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.dim, self.context = dim, context
        self.embedding = nn.Embedding(size, dim)
        self.mix = nn.Conv1d(dim, dim, context, groups=dim, bias=False)
        self.drop = Dropout(dropout)

    def _states(self, units: Tensor) -> Tensor:
        x = self.drop(self.embedding(units)).transpose(1, 2)
        return F.relu(self.mix(x).transpose(1, 2))

    def forward(self, targets: Tensor) -> Tensor:
        """Return states [B, U + 1, dim] of targets [B, U]. State u has seen the first u units."""
        return self._states(F.pad(targets.long(), (self.context, 0), value=BLANK))

    def initial(self, batch: int, device: torch.device) -> Any:
        return torch.full((batch, self.context), BLANK, dtype=torch.int64, device=device)

    def step(self, state: Any) -> Tensor:
        """Return [B, dim] for the units in `state`."""
        # A sum of products, because a convolution of one frame takes five times as long to set up as to compute.
        return F.relu((self.drop(self.embedding(state)) * self.mix.weight[:, 0].t()).sum(1))

    def advance(self, state: Any, units: Tensor, where: Tensor) -> Any:
        """Return `state` after `units` [B], changed only where `where` [B] is true."""
        moved = torch.cat([state[:, 1:], units[:, None]], dim=1)
        return torch.where(where[:, None], moved, state)


class LstmPredictor(nn.Module):
    """An embedding and one LSTM layer over all units so far. The state is (output, h, c), each [B, dim]."""

    def __init__(self, size: int, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dim = dim
        self.embedding = nn.Embedding(size, dim)
        self.lstm = nn.LSTM(dim, dim, batch_first=True)
        self.drop = Dropout(dropout)

    def forward(self, targets: Tensor) -> Tensor:
        """Return states [B, U + 1, dim] of targets [B, U]. State u has seen the first u units."""
        x = self.drop(self.embedding(F.pad(targets.long(), (1, 0), value=BLANK)))
        # Autocast is an error on processors without bfloat16, because oneDNN has no bfloat16 LSTM there.
        with torch.autocast("cpu", enabled=False):
            return self.lstm(x)[0]

    def initial(self, batch: int, device: torch.device) -> Any:
        zero = torch.zeros(batch, self.dim, device=device)
        blank = torch.full((batch,), BLANK, dtype=torch.int64, device=device)
        return self.advance((zero, zero, zero), blank, torch.ones(batch, dtype=torch.bool, device=device))

    def step(self, state: Any) -> Tensor:
        return state[0]

    def advance(self, state: Any, units: Tensor, where: Tensor) -> Any:
        x = self.embedding(units)[:, None]
        output, (h, c) = self.lstm(x, (state[1][None].contiguous(), state[2][None].contiguous()))
        new = (output[:, 0], h[0], c[0])
        return tuple(torch.where(where[:, None], n, s) for n, s in zip(new, state))


class Joint(nn.Module):
    """The joint network: out(tanh(encoder(e) + predictor(p))), or of the product.

    The projections are modules of their own, so that the loss can be fused with the rest. A token-and-duration
    transducer chooses from `durations` durations, by logits of their own.
    """

    activation: Literal["tanh"] = "tanh"

    def __init__(
        self, encoder_dim: int, predictor_dim: int, dim: int, size: int, combine: Combine = "add", durations: int = 0
    ) -> None:
        super().__init__()
        self.combine: Combine = combine
        self.encoder = nn.Linear(encoder_dim, dim)
        # In a sum, the encoder's bias serves both.
        self.predictor = nn.Linear(predictor_dim, dim, bias=combine == "mul")
        self.output = nn.Linear(dim, size)
        self.durations = nn.Linear(dim, durations) if durations else None

    def hidden(self, encoder: Tensor, predictor: Tensor) -> Tensor:
        return torch.tanh(encoder + predictor if self.combine == "add" else encoder * predictor)

    def forward(self, encoder: Tensor, predictor: Tensor) -> Tensor:
        """Return logits [..., V] of projected encoder and predictor states, which broadcast against each other."""
        return self.output(self.hidden(encoder, predictor))

    def internal(self, predictor: Tensor) -> Tensor:
        """Return log-probabilities [..., V] of the next unit by the internal language model, -inf for the blank.

        That model is the joint without its encoder, over units that are not blank (Meng et al. 2021,
        arXiv 2011.01991). The predictor's states are projected. A multiplicative joint has no such model.
        """
        logits = self(torch.zeros_like(predictor), predictor).float()
        blank = torch.arange(logits.shape[-1], device=logits.device) == BLANK
        return logits.masked_fill(blank, -torch.inf).log_softmax(-1)

    def with_durations(self, encoder: Tensor, predictor: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits of the units [..., V] and of the durations [..., D]. Raises ValueError without durations."""
        if self.durations is None:
            raise ValueError("this joint has no durations")
        hidden = self.hidden(encoder, predictor)
        return self.output(hidden), self.durations(hidden)


class SimpleJoint(nn.Module):
    """Unit scores of encoder and predictor, whose sum chooses the pruned loss's band. Training alone uses it."""

    def __init__(self, encoder_dim: int, predictor_dim: int, size: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(encoder_dim, size)
        self.predictor = nn.Linear(predictor_dim, size, bias=False)

    def forward(self, encoder: Tensor, predictor: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores [B, T, V] and [B, U + 1, V] of states [B, T, dim] and [B, U + 1, dim]."""
        return self.encoder(encoder), self.predictor(predictor)


class Transducer(nn.Module):
    """Encoder, prediction network and joint network over `size` units, blank included, and an optional CTC head.

    Arguments:
        encoder: the arguments of `Encoder`.
        predictor: "stateless" or "lstm".
        joint: "additive" or "multiplicative".
        durations: states that an arc may move on by, for a token-and-duration transducer. Empty makes an RNN-T.
        pruned: add the simple joint of the pruned loss.
    """

    def __init__(
        self,
        size: int,
        encoder: dict,
        *,
        predictor: str = "stateless",
        predictor_dim: int = 192,
        predictor_context: int = 2,
        joint_dim: int = 256,
        joint: str = "additive",
        durations: Sequence[int] = (),
        ctc: bool = True,
        pruned: bool = False,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.size = size
        self.encoder = Encoder(**encoder, dropout=dropout)
        self.predictor: StatelessPredictor | LstmPredictor
        if predictor == "stateless":
            self.predictor = StatelessPredictor(size, predictor_dim, predictor_context, dropout)
        else:
            self.predictor = LstmPredictor(size, predictor_dim, dropout)
        self.durations = tuple(durations)
        combine: Combine = "mul" if joint == "multiplicative" else "add"
        self.joint = Joint(self.encoder.dim, predictor_dim, joint_dim, size, combine, len(self.durations))
        self.ctc = nn.Linear(self.encoder.dim, size) if ctc else None
        self.simple = SimpleJoint(self.encoder.dim, predictor_dim, size) if pruned else None

    @property
    def one_unit(self) -> bool:
        """Whether an encoder state emits one unit at most, because each arc moves on by one state."""
        return self.durations == (1,)

    def encode(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return encoder states [B, T', dim] and lengths [B] of plain fbank [B, T, bins], for inference."""
        states, lengths, _ = self.encoder(self.encoder.normalise(features, lengths), lengths)
        return states, lengths
