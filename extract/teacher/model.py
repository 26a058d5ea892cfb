"""The teacher: a Hugging Face encoder or causal decoder that gives the hidden states of chosen layers.

Invariant: the state of layer k equals plain transformers' `hidden_states[k]`, although the model stops at the highest
layer asked for: at loading, both ways run on a short probe, and where they differ the plain way is taken.
No code of a model's repository runs unless that is allowed by name, and no pickle is read.
Run: `pytest tests/extract/teacher/test_model.py`.
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
from .tokenizer import Tokeniser

LONGEST_WINDOW = 4096  # decoders allow more; attention's cost does not
CARD = "teacher.json"  # what a converted folder says of itself, see convert.py
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Stop(Exception):
    """Raised by a hook behind the last block that is needed."""


class Teacher:
    """A loaded language model. `kind` is "encoder" or "decoder"; `depth` is L; `width` is D; `window` is the most
    tokens of a pass, special ones included.
    """

    def __init__(self, model: Any, tokenizer: Any, *, source: str, device: str, dtype: str, window: int | None) -> None:
        self.model, self.source, self.device, self.dtype = model, source, device, dtype
        self.architecture = type(model).__name__
        self.revision: str | None = getattr(model.config, "_commit_hash", None)
        model.config.use_cache = False
        self._blocks: list[torch.nn.Module] | None = None
        # float32 weights under a smaller dtype: matrix products alone are rounded (half the error, the same speed).
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
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.window = self._find_window(tokenizer, window)
        self.about = _about(source)

    # --- what kind of model it is, found by trying ---

    @contextlib.contextmanager
    def _mode(self) -> Iterator[None]:
        kind, dtype = self.device.split(":")[0], DTYPES[self.dtype]
        with torch.inference_mode():
            if self._products is not None:
                with self._products:
                    yield
            else:
                with torch.autocast(kind, dtype=dtype, enabled=self._autocast):
                    yield

    def _find_products(self) -> CpuMatmul | None:
        """The faster products of this processor, if this model runs with them."""
        self._products = None
        if self.device != "cpu" or next(self.model.parameters()).dtype != torch.float32:
            return None
        if self.dtype not in ("float32", "bfloat16"):
            return None
        self._products = float32_products() if self.dtype == "float32" else bfloat16_products()
        try:
            self._plain(_PROBE)
        except (RuntimeError, ValueError, TypeError):
            return None
        return self._products

    def _plain(self, ids: torch.Tensor) -> list[torch.Tensor]:
        mask = torch.ones_like(ids)
        with self._mode():
            out = self.model(
                input_ids=ids.to(self.device), attention_mask=mask.to(self.device), output_hidden_states=True
            )
        return list(out.hidden_states)

    def _find_kind(self, plain: list[torch.Tensor]) -> str:
        """A model is causal when changing the last token leaves the others' states alone."""
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
                    found = self._hooked(_PROBE, torch.ones_like(_PROBE), range(self.depth + 1))
                    if len(found) == len(plain) and all(torch.equal(found[k], p) for k, p in enumerate(plain)):
                        return self._blocks
        return None

    def _find_window(self, tokenizer: Any, asked: int | None) -> int:
        config, limits = self.model.config, [LONGEST_WINDOW]
        positions = getattr(config, "max_position_embeddings", None)
        if isinstance(positions, int) and positions > 0:
            # RoBERTa counts positions from padding_idx + 1, so its table is longer than its window.
            table = [
                m
                for name, m in self.model.named_modules()
                if isinstance(m, torch.nn.Embedding) and name.rsplit(".", 1)[-1] == "position_embeddings"
            ]
            offset = table[0].padding_idx + 1 if table and table[0].padding_idx is not None else 0
            limits.append(positions - offset)
        if 0 < tokenizer.model_max_length < 1_000_000:
            limits.append(tokenizer.model_max_length)
        most = min(limits)
        if asked is None:
            return most
        if not 8 <= asked <= most:
            raise UsageError(f"a window of {asked} tokens", where=self.source, expected=f"8 to {most}")
        return asked

    # --- running it ---

    def clone_model(self) -> Teacher:
        """The same weights for another thread, in modules of its own: `states` puts hooks on them."""
        shared = {id(t): t for t in (*self.model.parameters(), *self.model.buffers())}
        twin = copy.copy(self)
        twin.model, twin._blocks = copy.deepcopy((self.model, self._blocks), shared)
        return twin

    def states(self, windows: Sequence[Window], layers: Sequence[int]) -> dict[int, torch.Tensor]:
        """Hidden states of a batch of windows: {layer: [B, T, D] on the device}; rows are padded at their ends."""
        longest = max(len(w.ids) for w in windows)
        ids = torch.full((len(windows), longest), self._pad, dtype=torch.long)
        mask = torch.zeros((len(windows), longest), dtype=torch.long)
        for row, w in enumerate(windows):
            ids[row, : len(w.ids)] = torch.from_numpy(w.ids.astype(np.int64))
            mask[row, : len(w.ids)] = 1
        if windows[0].blocks is not None:
            mask = self._block_mask(windows, longest)
        return self._hooked(ids, mask, layers)

    def _block_mask(self, windows: Sequence[Window], longest: int) -> torch.Tensor:
        """Additive mask [B, 1, T, T]: a token sees its own block and earlier ones; padding is its own last block."""
        block = torch.full((len(windows), longest), 2**30, dtype=torch.long)
        for row, w in enumerate(windows):
            block[row, : len(w.ids)] = torch.from_numpy(np.asarray(w.blocks, dtype=np.int64))
        sees = block[:, None, :, None] >= block[:, None, None, :]
        dtype = DTYPES[self.dtype]
        return torch.zeros(sees.shape, dtype=dtype).masked_fill_(~sees, torch.finfo(dtype).min)

    def check_blocks(self) -> None:
        """Errors: TeacherError where the model does not obey a mask of blocks, so that `+block` would leak."""
        blocks = np.array([0, 0, 1, 2, 2], dtype=np.int32)
        ids = _PROBE[0].numpy().astype(np.int32)
        other = np.where(blocks == 2, 9, ids).astype(np.int32)
        both = []
        for row in (ids, other):
            try:
                both.append(self.states([Window(row, blocks, [])], [self.depth])[self.depth][0])
            except (ValueError, RuntimeError, IndexError) as e:
                raise TeacherError(f"it takes no mask of blocks: {e}", where=self.source, remedy=_NO_BLOCK) from e
        change = (both[0] - both[1]).abs().amax(dim=-1)
        if float(change[:3].max()) > 1e-5 * float(both[0].abs().max()) or float(change[3:].min()) == 0:
            raise TeacherError("it does not obey a mask of blocks", where=self.source, remedy=_NO_BLOCK)

    def _hooked(self, ids: torch.Tensor, mask: torch.Tensor, layers: Sequence[int] | range) -> dict[int, torch.Tensor]:
        """One pass up to the highest of `layers`; the states are taken from hooks on the blocks."""
        wanted, top = set(layers), max(layers)
        found: dict[int, torch.Tensor] = {}
        if self._blocks is None:
            with self._mode():
                out = self.model(
                    input_ids=ids.to(self.device), attention_mask=mask.to(self.device), output_hidden_states=True
                )
            return {k: out.hidden_states[k] for k in wanted}

        def before_first(module: Any, args: tuple, kwargs: dict) -> None:
            found[0] = args[0] if args else kwargs["hidden_states"]
            if top == 0:
                raise _Stop

        def behind(number: int) -> Any:
            def hook(module: Any, args: tuple, output: Any) -> None:
                if number in wanted:
                    found[number] = output[0] if isinstance(output, tuple) else output
                if number == top and not (number == self.depth and self._last_is_normed):
                    raise _Stop

            return hook

        hooks = [self._blocks[0].register_forward_pre_hook(before_first, with_kwargs=True)]
        hooks += [self._blocks[k - 1].register_forward_hook(behind(k)) for k in wanted if k > 0 and k <= self.depth]
        try:
            with self._mode():
                out = self.model(input_ids=ids.to(self.device), attention_mask=mask.to(self.device))
            if self.depth in wanted:
                found[self.depth] = out.last_hidden_state
        except _Stop:
            pass
        finally:
            for h in hooks:
                h.remove()
        return {k: v for k, v in found.items() if k in wanted}

    def embedding(self, ids: np.ndarray) -> np.ndarray:
        """Input-embedding rows float32 [K, D'] of token ids (D' differs from D in factorised models)."""
        weight = self.model.get_input_embeddings().weight
        with torch.inference_mode():
            return weight[torch.from_numpy(ids.astype(np.int64)).to(weight.device)].float().cpu().numpy()

    def layer_numbers(self, asked: Sequence[int]) -> list[int]:
        """Layers by number, negative ones from the end, ascending and unique. Errors: UsageError out of range."""
        out = set()
        for k in asked:
            number = k if k >= 0 else self.depth + 1 + k
            if not 0 <= number <= self.depth:
                raise UsageError(
                    f"no layer {k}", where=self.source, expected=f"0 to {self.depth}, or -{self.depth + 1} to -1"
                )
            out.add(number)
        return sorted(out)

    def weights_hash(self) -> str:
        """BLAKE2b of all weights in the order of their names: the same whatever files they came in."""
        digest = hashlib.blake2b(digest_size=16)
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
            flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(flat.numpy().data)
        return digest.hexdigest()


def _about(source: str) -> str:
    """The line that a converted folder has about itself; "" for others."""
    try:
        card = json.loads((Path(source) / CARD).read_bytes())
    except OSError:
        return ""
    except ValueError as e:
        raise TeacherError(f"{CARD} is no JSON: {e}", where=source, remedy="convert it again") from e
    return str(card.get("about", "")) if isinstance(card, dict) else ""


_PROBE = torch.tensor([[5, 7, 6, 8, 5]])  # ids that any vocabulary has


def pick_device(name: str) -> str:
    """ "auto" → "cuda" where there is one, else "cpu". Errors: UsageError for CUDA that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("no CUDA device here", expected="--device cpu or auto")
    return name


def quiet_transformers() -> None:
    """No progress bars and no advice on stderr; tokenizers may use threads."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


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

    Errors: TeacherError where it cannot be had, has only pickled weights, lacks weights of its backbone, needs its
    own code, or is an encoder-decoder.
    """
    quiet_transformers()
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    if Path(source).is_file():
        raise TeacherError("this is a file", where=source, expected="a folder with safetensors", remedy=_CONVERT)
    if Path(source).is_dir():
        options.pop("revision")
        if not any(Path(source).glob("*.safetensors")):
            raise TeacherError(
                "there are no safetensors weights here",
                where=source,
                expected="*.safetensors",
                remedy=_CONVERT if any(Path(source).glob("*.gguf")) else PICKLED,
            )
    device = pick_device(device)
    loaded = dtype
    try:
        config = AutoConfig.from_pretrained(source, **options)
        if config.is_encoder_decoder:
            raise TeacherError("it is an encoder-decoder", where=source, expected="an encoder or a causal decoder")
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if device == "cpu" and dtype == "bfloat16":
            loaded = "float32"  # and rounded in matrix products only, see Teacher
        model, info = AutoModel.from_pretrained(
            source, config=config, use_safetensors=True, dtype=DTYPES[loaded], output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, ImportError) as e:
        reason = str(e).strip().split("\n")[0]
        if "trust_remote_code" in str(e):
            raise TeacherError("it needs its own code to run", where=source, remedy=_TRUST) from e
        remedy = PICKLED if "safetensors" in str(e) else "give a folder with config.json, or a name on the hub"
        raise TeacherError(f"cannot be loaded: {reason}", where=source, remedy=remedy) from e
    missing = [k for k in info["missing_keys"] if "pooler" not in k]
    if missing:
        raise TeacherError(
            f"its file lacks weights of the model: {', '.join(sorted(missing)[:3])} ({len(missing)} in all)",
            where=source,
        )
    model.eval().requires_grad_(False).to(device)
    return Teacher(model, tokenizer, source=source, device=device, dtype=dtype, window=window)


_NO_BLOCK = "use past:N, which needs no such mask"
_CONVERT = "stillhouse teacher convert SOURCE OUT makes a folder of it"
PICKLED = "load and save_pretrained it on a machine where you trust the file: pickled weights are never read here"
_TRUST = "read that code, then allow it by name: --trust-remote-code MODEL"
