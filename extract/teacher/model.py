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
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...data.errors import TeacherError, UsageError
from .contexts import Window
from .cpu_matmul import CpuMatmul, bfloat16_products, float32_products
from .text.judge import check_vocabulary, require_tokenizer
from .tokenizer import Tokeniser

LONGEST_WINDOW = 4096  # decoders allow more, but attention would cost too much
FACTS = "teacher.json"  # facts about a converted model, in its folder; see convert.py
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PICKLED = "load and save_pretrained it on a machine where you trust the file: pickled weights are never read here"
_CONVERT = "stillhouse teacher convert SOURCE OUT makes such a folder"
_NO_BLOCK = "use past:N, which needs no such mask"
_TRUST = "read that code, then allow it by name: --trust-remote-code MODEL"
_PROBE = torch.tensor([[5, 7, 6, 8, 5]])  # ids that any vocabulary has


class _Stop(Exception):
    """Raised by a hook after the last block that is needed."""


class Teacher:
    """A loaded language model.

    kind    "encoder" or "decoder"
    depth   number of layers L; layer 0 is the input embedding
    width   size D of a state
    window  most tokens of a pass, special ones included
    """

    def __init__(self, model: Any, tokenizer: Any, *, source: str, device: str, dtype: str, window: int | None) -> None:
        self.model, self.source, self.device, self.dtype = model, source, device, dtype
        self.architecture = type(model).__name__
        self.revision: str | None = getattr(model.config, "_commit_hash", None)
        model.config.use_cache = False
        self._blocks: list[torch.nn.Module] | None = None
        # Float32 weights with a smaller dtype: only matrix products are rounded, for half the error at the same speed.
        self._autocast = dtype != "float32" and next(model.parameters()).dtype == torch.float32
        self._products = self._find_products()
        plain = self._plain(_PROBE)
        self.depth, self.width = len(plain) - 1, int(plain[-1].shape[-1])
        if len({p.shape[-1] for p in plain}) > 1:
            raise TeacherError("its layers have different widths", where=source)
        self.kind = self._find_kind(plain)
        self._last_is_normed = True
        self._blocks = self._find_blocks(plain)
        self.tokeniser = Tokeniser(tokenizer, self.kind)
        check_vocabulary(tokenizer, source, self.embedding_rows)
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.window = self._find_window(tokenizer, window)
        self.about = _about(source)

    # --- what kind of model it is, found by trying ---

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
        self._products = float32_products() if self.dtype == "float32" else bfloat16_products()
        try:
            self._plain(_PROBE)
        except (RuntimeError, ValueError, TypeError):
            return None
        return self._products

    def _run(self, ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> Any:
        with self._mode():
            return self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device), **options)

    def _plain(self, ids: torch.Tensor) -> list[torch.Tensor]:
        return list(self._run(ids, torch.ones_like(ids), output_hidden_states=True).hidden_states)

    def _find_kind(self, plain: list[torch.Tensor]) -> str:
        """A model is causal if a change of the last token leaves the other states as they were."""
        changed = _PROBE.clone()
        changed[0, -1] = 9
        difference = (self._plain(changed)[-1] - plain[-1])[0, :-1].abs().max()
        return "decoder" if float(difference) <= 1e-5 * float(plain[-1].abs().max()) else "encoder"

    def _find_blocks(self, plain: list[torch.Tensor]) -> list[torch.nn.Module] | None:
        """The stack whose outputs are the hidden states, or None where no stack reproduces them."""
        for module in self.model.modules():
            if isinstance(module, torch.nn.ModuleList) and len(module) == self.depth:
                self._blocks = list(module)
                for normed in (True, False):
                    self._last_is_normed = normed
                    hooked = self._hooked(_PROBE, torch.ones_like(_PROBE), range(self.depth + 1))
                    if len(hooked) == len(plain) and all(torch.equal(hooked[k], p) for k, p in enumerate(plain)):
                        return self._blocks
        return None

    def _find_window(self, tokenizer: Any, asked: int | None) -> int:
        config, limits = self.model.config, [LONGEST_WINDOW]
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
        shared = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        clone = copy.copy(self)
        clone.model, clone._blocks = copy.deepcopy((self.model, self._blocks), shared)
        return clone

    def states(self, windows: Sequence[Window], layers: Sequence[int]) -> dict[int, torch.Tensor]:
        """Return the hidden states of B windows: {layer: [B, T, D] on the device}. Rows are padded at their ends."""
        ids = _padded([w.ids for w in windows], self._pad)
        if windows[0].blocks is None:
            mask = _padded([np.ones(len(w.ids)) for w in windows], 0)
        else:
            mask = self._block_mask(_padded([w.blocks for w in windows if w.blocks is not None], 2**30))
        return self._hooked(ids, mask, layers)

    def _block_mask(self, block: torch.Tensor) -> torch.Tensor:
        """Additive mask [B, 1, T, T]: a token sees its own block and earlier ones. Padding is the last block."""
        sees = block[:, None, :, None] >= block[:, None, None, :]
        dtype = DTYPES[self.dtype]
        return torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)

    def check_blocks(self) -> None:
        """Check that `+block` shows a token nothing later. Raises TeacherError if the model ignores such a mask."""
        blocks, ids = np.array([0, 0, 1, 2, 2], dtype=np.int32), _PROBE[0].numpy().astype(np.int32)
        rows = (ids, np.where(blocks == 2, 9, ids).astype(np.int32))
        try:
            one, other = (self.states([Window(row, blocks, [])], [self.depth])[self.depth][0] for row in rows)
        except (ValueError, RuntimeError, IndexError) as e:
            raise TeacherError(f"it accepts no mask of blocks: {e}", where=self.source, remedy=_NO_BLOCK) from e
        change = (one - other).abs().amax(dim=-1)
        if float(change[:3].max()) > 1e-5 * float(one.abs().max()) or float(change[3:].min()) == 0:
            raise TeacherError("it ignores a mask of blocks", where=self.source, remedy=_NO_BLOCK)

    def _hooked(self, ids: torch.Tensor, mask: torch.Tensor, layers: Sequence[int]) -> dict[int, torch.Tensor]:
        """One pass up to the highest of `layers`; the states are taken from hooks on the blocks."""
        if self._blocks is None:
            hidden = self._run(ids, mask, output_hidden_states=True).hidden_states
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

        hooks = [self._blocks[0].register_forward_pre_hook(before_first, with_kwargs=True)]
        hooks += [self._blocks[k - 1].register_forward_hook(after(k)) for k in set(layers) if 0 < k <= self.depth]
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
        weight = self.model.get_input_embeddings().weight
        with torch.inference_mode():
            return weight[torch.from_numpy(ids.astype(np.int64)).to(weight.device)].float().cpu().numpy()

    @property
    def embedding_rows(self) -> int:
        """The number of token ids that the model has an embedding for."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def layer_numbers(self, asked: Sequence[int]) -> list[int]:
        """Return layers as ascending numbers; negative ones count from the end. Raises UsageError out of range."""
        for k in asked:
            if not -self.depth - 1 <= k <= self.depth:
                expected = f"0 to {self.depth}, or -{self.depth + 1} to -1"
                raise UsageError(f"no layer {k}", where=self.source, expected=expected)
        return sorted({k if k >= 0 else self.depth + 1 + k for k in asked})

    def weights_hash(self) -> str:
        """Return the hash of the model's weights, by `hash_weights`."""
        return hash_weights(self.model)


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
    folder, options = Path(source), {"trust_remote_code": trust_remote_code, "revision": revision}
    if folder.is_file():
        raise TeacherError("this is a file", where=source, expected="a folder with safetensors", remedy=_CONVERT)
    if folder.is_dir():
        options.pop("revision")
        if not any(folder.glob("*.safetensors")):
            remedy = _CONVERT if any(folder.glob("*.gguf")) else PICKLED
            raise TeacherError("this folder has no weights", where=source, expected="*.safetensors", remedy=remedy)
    device = pick_device(device)
    # On a CPU bfloat16 rounds matrix products only, see Teacher.
    loaded = torch.float32 if device == "cpu" and dtype == "bfloat16" else DTYPES[dtype]
    model, tokenizer = read_pretrained(source, use_safetensors=True, dtype=loaded, **options)
    return Teacher(model.to(device), tokenizer, source=source, device=device, dtype=dtype, window=window)


def read_pretrained(source: str, *, dtype: Any, use_safetensors: bool | None = None, **options: Any) -> Any:
    """Return (backbone, tokenizer) as transformers reads them, without progress bars and advice on stderr.

    `source` is a local path or a hub name. Raises TeacherError as `load_teacher` does.
    """
    gguf = "gguf_file" in options
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers import AutoConfig, AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(source, **options)
        if config.is_encoder_decoder:
            raise TeacherError("it is an encoder-decoder", where=source, expected="an encoder or a causal decoder")
        if Path(source).is_dir() and not gguf:
            require_tokenizer(Path(source))
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model, info = AutoModel.from_pretrained(
            source, config=config, use_safetensors=use_safetensors, dtype=dtype, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, ImportError) as e:
        where, reason = Path(source) / options["gguf_file"] if gguf else source, str(e).strip().split("\n")[0]
        if "trust_remote_code" in str(e):
            remedy = _TRUST if "trust_remote_code" in options else None
            raise TeacherError("it needs its own code to run", where=where, remedy=remedy) from e
        remedy = PICKLED if "safetensors" in str(e) else "give a folder with config.json, or a name on the hub"
        raise TeacherError(f"cannot be loaded: {reason}", where=where, remedy=None if gguf else remedy) from e
    missing = sorted(k for k in info["missing_keys"] if "pooler" not in k)
    if missing:
        names = f"{', '.join(missing[:3])} ({len(missing)} in all)"
        raise TeacherError(f"its file lacks weights of the model: {names}", where=source)
    return model.eval().requires_grad_(False), tokenizer
