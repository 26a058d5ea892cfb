"""The teacher: a Hugging Face encoder or causal decoder that gives the hidden states of chosen layers.

Guarantees: the state of layer k equals plain transformers' `hidden_states[k]`, although the model stops at the highest
layer asked for. At loading both ways run on a short probe, and if they differ the plain way is used.
No code of a model's repository runs unless it is allowed by name, and no pickle is read.
Try: `pytest tests/extract/teacher/test_model.py`.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from ...data.errors import TeacherError, UsageError
from ..cpu_matmul import CpuMatmul, bfloat16_products, float32_products
from .contexts import Window
from .loading import DTYPES, check_folder, commit_of, first_line, read_pretrained
from .passes import Passes, additive_mask, binary_mask, sizes_of, within_own_masks
from .text.judge import check_vocabulary
from .tokenizer import Tokeniser

LONGEST_WINDOW = 4096  # decoders allow more, but attention would cost too much
FACTS = "teacher.json"  # facts about a converted model, in its folder; see convert.py
_LANGUAGE = "copy the model to a folder and set default_language in its config.json"
_PROBE = torch.tensor([[5, 7, 6, 8, 5]])  # ids that any vocabulary has


class _Stop(Exception):
    """Raised by a hook after the last block that is needed."""


class Teacher:
    """A loaded language model.

    kind    "encoder" or "decoder"
    depth   number of layers L; layer 0 is the input embedding
    width   size D of a state
    window  most tokens of a pass, special ones included
    passes  how windows go through it; `exact.choose_passes` finds out
    """

    def __init__(self, model: Any, tokenizer: Any, *, source: str, device: str, dtype: str, window: int | None) -> None:
        self.model, self.source, self.device, self.dtype = model, source, device, dtype
        self.architecture = type(model).__name__
        self.revision: str | None = None  # the commit of a model of the hub
        model.config.use_cache = model.config.get_text_config().use_cache = False
        self.passes = Passes()
        self._stack: str | None = None
        self._last_is_normed = True
        # Float32 weights with a smaller dtype: only matrix products are rounded, for half the error at the same speed.
        self._autocast = dtype != "float32" and next(model.parameters()).dtype == torch.float32
        self._products = self._find_products()
        try:
            plain = self.clone_model()._plain(_PROBE)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as e:
            raise TeacherError(
                f"it cannot run a text of {_PROBE.shape[1]} tokens: {first_line(e)}",
                where=source,
                remedy=_LANGUAGE if "language" in str(e) else "use another teacher",
            ) from e
        self.depth, self.width = len(plain) - 1, int(plain[-1].shape[-1])
        if len({p.shape[-1] for p in plain}) > 1:
            raise TeacherError("its layers have different widths", where=source)
        self._table = self._find_table()
        self.kind = self._find_kind(plain)
        self._stack = self._find_stack(plain)
        self.tokeniser = Tokeniser(tokenizer, self.kind)
        check_vocabulary(tokenizer, source, self.embedding_rows)
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.window = self._find_window(tokenizer, window)
        self.about = _about(source)

    @property
    def _blocks(self) -> list[torch.nn.Module] | None:
        """The modules whose outputs are the hidden states, or None where no stack reproduces them."""
        return None if self._stack is None else list(cast(torch.nn.ModuleList, self.model.get_submodule(self._stack)))

    # --- what kind of model it is, found by trying; each trial has a clone, because it may change a model for good ---

    @contextlib.contextmanager
    def _mode(self) -> Iterator[None]:
        autocast = torch.autocast(self.device.split(":")[0], dtype=DTYPES[self.dtype], enabled=self._autocast)
        with torch.inference_mode(), self._products or autocast:
            yield

    def _find_products(self) -> CpuMatmul | None:
        """The faster products of this processor, if this model runs with them."""
        self._products = None
        stored = next(self.model.parameters()).dtype
        if self.device != "cpu" or stored != torch.float32 or self.dtype not in ("float32", "bfloat16"):
            return None
        self._products = float32_products(fixed=True) if self.dtype == "float32" else bfloat16_products()
        try:
            first, again = (self.clone_model()._plain(_PROBE) for _ in range(2))  # The first one learns activations.
            if not all(float((a - b).norm()) <= 0.02 * float(a.norm()) for a, b in zip(first, again, strict=True)):
                return None
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, TeacherError):
            return None
        return self._products

    def _run(self, ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> Any:
        with self._mode():
            return self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device), **options)

    def _plain(self, ids: torch.Tensor) -> list[torch.Tensor]:
        """Return transformers' own hidden states of ids [B, T]: L + 1 tensors [B, T, D]."""
        return self._checked(self._run(ids, torch.ones_like(ids), output_hidden_states=True), ids)

    def _checked(self, output: Any, ids: torch.Tensor) -> list[torch.Tensor]:
        """Return the hidden states of an output, without what a model pads a text with by itself.

        Raises TeacherError unless each layer has one state a token.
        """
        hidden, expected = getattr(output, "hidden_states", None), "one state a token"
        if not isinstance(hidden, tuple | list) or len(hidden) < 2:
            raise TeacherError("it gives no hidden states of its layers", where=self.source, expected=expected)
        (rows, n), shapes = ids.shape, [tuple(getattr(states, "shape", ())) for states in hidden]
        inner = shapes[0][1] if len(shapes[0]) == 3 else n
        # BigBird and its like fill a text up to whole blocks, and cut that off the last state only.
        filled = any(inner % size == 0 and n < inner < n + size for size in sizes_of(self.model.config))
        if filled and all(len(s) == 3 and s[:2] in ((rows, inner), (rows, n)) for s in shapes):
            return [states[:, :n] for states in hidden]
        for k, shape in enumerate(shapes):
            if len(shape) != 3 or shape[:2] != (rows, n):
                what = f"layer {k} has states of shape {list(shape)} for input ids of shape {[rows, n]}"
                raise TeacherError(what, where=self.source, expected=expected, remedy="use another teacher")
        return list(hidden)

    def _find_table(self) -> torch.Tensor:
        """The input embeddings of all token ids."""
        try:
            weight = self.model.get_input_embeddings().weight
        except (AttributeError, NotImplementedError, TypeError) as e:
            weight = getattr(getattr(self.model, "embed_tokens", None), "weight", None)  # FSMT's encoder
            if weight is None:
                what = "it has no table of input embeddings, one row for each token"
                raise TeacherError(what, where=self.source, remedy="use another teacher") from e
        return weight

    def _find_kind(self, plain: list[torch.Tensor]) -> str:
        """A model is causal if a change of the last token leaves the other states as they were.

        Raises TeacherError if a state depends on no other token, as where a model's attention needs a missing kernel.
        """

        def spreads(place: int, to: slice) -> bool:
            for other in (9, 4, 3):
                changed = _PROBE.clone()
                changed[0, place] = other
                difference = (self.clone_model()._plain(changed)[-1] - plain[-1])[0, to].abs().max()
                if not float(difference) <= 1e-6 * float(plain[-1].abs().max()):
                    return True
            return False

        if spreads(-1, slice(0, -1)):
            return "encoder"
        if not spreads(-2, slice(-1, None)):
            what = "its states are those of single words: no token changes the state of another"
            remedy = f"use another teacher, or run it where its own kernels are installed (not on {self.device})"
            raise TeacherError(what, where=self.source, expected="states that depend on the text", remedy=remedy)
        return "decoder"

    def _find_stack(self, plain: list[torch.Tensor]) -> str | None:
        """The name of the stack whose outputs are the hidden states."""
        for name, module in self.model.named_modules():
            if isinstance(module, torch.nn.ModuleList) and len(module) == self.depth:
                self._stack = name
                for normed in (True, False):
                    self._last_is_normed = normed
                    with contextlib.suppress(RuntimeError, ValueError, TypeError, LookupError, AttributeError):
                        layers = range(self.depth + 1)
                        hooked = self.clone_model()._hooked(_PROBE, torch.ones_like(_PROBE), layers)
                        if len(hooked) == len(plain) and all(torch.equal(hooked[k], p) for k, p in enumerate(plain)):
                            return name
        return None

    def _find_window(self, tokenizer: Any, asked: int | None) -> int:
        config, limits = self.model.config.get_text_config(), [LONGEST_WINDOW]
        positions = getattr(config, "max_position_embeddings", None)
        if isinstance(positions, int) and positions > 0:
            # RoBERTa counts positions from padding_idx + 1, so its table is longer than its window.
            tables = [m for name, m in self.model.named_modules() if f".{name}".endswith(".position_embeddings")]
            padding = getattr(tables[0], "padding_idx", None) if tables else None
            limits.append(positions if padding is None else positions - padding - 1)
        if 0 < tokenizer.model_max_length < 1_000_000:
            limits.append(tokenizer.model_max_length)
        most = min(limits)
        if asked is not None and not 8 <= asked <= most:
            raise UsageError(f"a window of {asked} tokens", where=self.source, expected=f"8 to {most}")
        return most if asked is None else asked

    # --- running it ---

    def clone_model(self) -> Teacher:
        """Return a teacher for another thread: the same weights in its own modules, because `states` hooks them."""
        clone = copy.copy(self)
        shared: dict[int, Any] = {id(t): t for t in self.model.parameters()}
        # A module has ten dictionaries of hooks, nearly all of them empty. Copying these would take most of the time.
        empty = (d for m in self.model.modules() for d in vars(m).values() if type(d) is OrderedDict and not d)
        clone.model = copy.deepcopy(self.model, shared | {id(d): OrderedDict() for d in empty})
        return clone

    def without_rounding(self) -> Teacher:
        """Return this teacher with products in the dtype of its weights, to compare ways of running it."""
        exact = copy.copy(self)
        exact._products, exact._autocast = self._products and float32_products(), False
        return exact

    def states(self, windows: Sequence[Window], layers: Sequence[int]) -> dict[int, torch.Tensor]:
        """Return the hidden states of B windows: {layer: [B, T, D] on the device}. Rows are padded at their ends."""
        return self.states_by(self.passes, windows, layers)

    def states_by(self, passes: Passes, windows: Sequence[Window], layers: Sequence[int]) -> dict[int, torch.Tensor]:
        """Return what `states` returns, from passes of another way."""
        runner = self.clone_model() if passes.fresh else self
        ids = _padded([w.ids for w in windows], self._pad)
        mask = _padded([np.ones(len(w.ids)) for w in windows], 0)
        if windows[0].blocks is None:
            return runner._hooked(ids, mask, layers, passes.plain)
        blocks = _padded([w.blocks for w in windows if w.blocks is not None], 2**30)
        if passes.blocks == "own":
            with within_own_masks(blocks.to(self.device)):
                return runner._hooked(ids, mask, layers, passes.plain)
        wide = binary_mask(blocks) if passes.blocks == "binary" else additive_mask(blocks, DTYPES[self.dtype])
        return runner._hooked(ids, wide, layers, passes.plain)

    def plain_states(self, ids: np.ndarray) -> list[torch.Tensor]:
        """Return the hidden states of one text alone by transformers itself, in new modules: L + 1 tensors [T, D]."""
        return [h[0] for h in self.clone_model()._plain(torch.from_numpy(ids.astype(np.int64))[None])]

    def _hooked(
        self, ids: torch.Tensor, mask: torch.Tensor, layers: Sequence[int], plain: bool = False
    ) -> dict[int, torch.Tensor]:
        """One pass up to the highest of `layers`; the states are taken from hooks on the blocks, unless `plain`."""
        blocks = None if plain else self._blocks
        if blocks is None:
            hidden = self._checked(self._run(ids, mask, output_hidden_states=True), ids)
            return {k: hidden[k] for k in set(layers)}
        top = max(layers)
        states: dict[int, torch.Tensor] = {}

        def before_first(module: Any, args: tuple, kwargs: dict) -> None:
            states[0] = args[0] if args else kwargs["hidden_states"]
            if top == 0:
                raise _Stop

        def after(number: int) -> Any:
            def hook(module: Any, args: tuple, output: Any) -> None:
                states[number] = output[0] if isinstance(output, tuple) else output
                if number == top and not (number == self.depth and self._last_is_normed):
                    raise _Stop

            return hook

        hooks = [blocks[0].register_forward_pre_hook(before_first, with_kwargs=True)]
        hooks += [blocks[k - 1].register_forward_hook(after(k)) for k in set(layers) if 0 < k <= self.depth]
        try:
            out = self._run(ids, mask)
            if self.depth in layers:
                states[self.depth] = out.last_hidden_state
        except _Stop:
            pass
        finally:
            for h in hooks:
                h.remove()
        return {k: v for k, v in states.items() if k in layers}

    def embedding(self, ids: np.ndarray) -> np.ndarray:
        """Return the input embeddings of K token ids: float32 [K, D'], where factorised models have D' ≠ D."""
        with torch.inference_mode():
            return self._table[torch.from_numpy(ids.astype(np.int64)).to(self._table.device)].float().cpu().numpy()

    @property
    def embedding_rows(self) -> int:
        """The number of token ids that the model has an embedding for."""
        return int(self._table.shape[0])

    def layer_numbers(self, asked: Sequence[int]) -> list[int]:
        """Return layers as ascending numbers; negative ones count from the end. Raises UsageError out of range."""
        return numbers_of_layers(asked, self.depth, self.source)

    def weights_hash(self) -> str:
        """Return the hash of the model's weights, by `hash_weights`."""
        return hash_weights(self.model)


def numbers_of_layers(asked: Sequence[int], depth: int, source: str) -> list[int]:
    """Return layers of a model of `depth` as ascending numbers. Raises UsageError out of range."""
    for k in asked:
        if not -depth - 1 <= k <= depth:
            raise UsageError(f"no layer {k}", where=source, expected=f"0 to {depth}, or -{depth + 1} to -1")
    return sorted({k if k >= 0 else depth + 1 + k for k in asked})


def hash_weights(model: torch.nn.Module) -> str:
    """Return the BLAKE2b of all weights in the order of their names. It does not depend on the files' layout."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _padded(rows: Sequence[np.ndarray], value: int) -> torch.Tensor:
    """int64 [B, T]: rows padded at their ends."""
    return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(r.astype(np.int64)) for r in rows], True, value)


def _about(source: str) -> str:
    """What a converted folder says of its model in one line; "" for others."""
    try:
        facts = json.loads((Path(source) / FACTS).read_bytes())
    except OSError:
        return ""
    except ValueError as e:
        raise TeacherError(f"{FACTS} is not JSON: {e}", where=source, remedy="convert it again") from e
    return str(facts.get("about", "")) if isinstance(facts, dict) else ""


def pick_device(name: str) -> str:
    """Return "cuda" or "cpu" for "auto", and any other name as it is. Raises UsageError if CUDA is missing."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("this machine has no CUDA device", expected="--device cpu or auto")
    return name


def load_teacher(
    source: str,
    *,
    device: str = "auto",
    dtype: str = "float32",
    window: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Teacher:
    """Load a model by local path or hub name.

    Arguments:
        device: "cpu", "cuda", "cuda:1" or "auto".
        dtype: the dtype that the model runs in: "float32", "bfloat16" or "float16".
        window: most tokens of a pass. None: what the model allows, up to 4,096.
        revision: of a model on the hub.
        trust_remote_code: run the code of the model's repository.

    Raises TeacherError for an unusable model, and UsageError for a device that is missing or an impossible window.
    """
    check_folder(source)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if not Path(source).is_dir():
        options["revision"] = revision
    device = pick_device(device)
    # On a CPU bfloat16 rounds matrix products only, see Teacher.
    loaded = torch.float32 if device == "cpu" and dtype == "bfloat16" else DTYPES[dtype]
    model, tokenizer = read_pretrained(source, use_safetensors=True, dtype=loaded, **options)
    try:
        model = model.to(device)
    except torch.cuda.OutOfMemoryError as e:
        remedy = "give --model-dtype bfloat16, --device cpu, or a smaller model"
        raise TeacherError("it does not fit into the device's memory", where=source, remedy=remedy) from e
    teacher = Teacher(model, tokenizer, source=source, device=device, dtype=dtype, window=window)
    teacher.revision = commit_of(source, revision)
    return teacher
