"""Tiny random models of every text architecture of transformers, and how each goes through `Teacher`.

Guarantees: what is called exact has been compared with transformers alone, one text at a time, in new modules.
Try: `python tests/extract/teacher/test_architectures.py`, which writes docs/reference/teachers.md anew.
"""

from __future__ import annotations

import copy
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stillhouse.data.errors import TeacherError
from stillhouse.extract.teacher.batching import make_batches
from stillhouse.extract.teacher.contexts import Window
from stillhouse.extract.teacher.exact import choose_passes
from stillhouse.extract.teacher.model import Teacher

SIZES = {
    3: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers",
    2: "num_key_value_heads num_experts_per_tok top_k_experts",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads block_size "
    "num_experts num_local_experts n_routed_experts moe_num_experts num_landmarks",
    8: "head_dim d_kv sliding_window attention_window local_attention attention_chunk_size",
    32: "hidden_size d_model n_embd dim emb_dim embedding_size",
    64: "intermediate_size ffn_dim d_ff hidden_dim encoder_ffn_dim decoder_ffn_dim moe_intermediate_size "
    "ffn_hidden_size",
    96: "max_position_embeddings n_positions max_seq_len",
    200: "vocab_size",
}
SMALL: dict[str, Any] = {name: size for size, names in SIZES.items() for name in names.split()}
SMALL |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_random_blocks": 1}
SMALL |= {name: 0.2 for name in ("initializer_range", "init_std", "embed_init_std")}
# What a few architectures need beside these
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    "num_key_value_heads": 4,
    "n_group": 1,
    "topk_group": 1,
}
OWN: dict[str, dict[str, Any]] = {
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT | {"first_k_dense_replace": 1},
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "xmod": {"languages": ["a"], "default_language": "a"},
    "reformer": {
        "axial_pos_shape": [8, 12],
        "axial_pos_embds_dim": [8, 24],
        "attention_head_size": 8,
        "attn_layers": ["local", "lsh", "local"],
        "num_buckets": 2,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "feed_forward_size": 64,
    },
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "chunk_size": 8, "n_groups": 1},
}
LENGTHS = (3, 4, 5, 9, 9, 12, 16, 21, 30, 47)
MOST_PARAMETERS, MOST_SECONDS = 20_000_000, 60


@dataclass(frozen=True)
class Row:
    """How one architecture goes through `Teacher`."""

    kind: str  # the model_type of its configuration
    direction: str  # "encoder", "decoder", or "" if it is refused or not built
    alone: str
    block: str


class _TooSlow(BaseException):
    """Raised in the middle of a model, where no handler of exceptions may stop it."""


class Tokens:
    """The tokenizer of these models: its ids are not used."""

    pad_token_id, model_max_length = 0, 1 << 60


def text_kinds() -> list[str]:
    """Return the model types that transformers lists for text and has a backbone for."""
    from transformers.models.auto import modeling_auto as auto

    lists = ["CAUSAL_LM", "MASKED_LM", "TEXT_ENCODING", "SEQ_TO_SEQ_CAUSAL_LM"]
    known = {k for name in lists for k in getattr(auto, f"MODEL_FOR_{name}_MAPPING_NAMES")}
    return sorted(known & auto.MODEL_MAPPING_NAMES.keys())


def build(kind: str) -> Any:
    """Return a tiny random backbone, the encoder alone of an encoder-decoder. Raises ValueError if it is not tiny."""
    from transformers import CONFIG_MAPPING, AutoModel

    had = CONFIG_MAPPING[kind]().to_dict()
    sizes = {k: v for k, v in SMALL.items() if k in had and not isinstance(had[k], dict | bool | str)}
    config = CONFIG_MAPPING[kind](**sizes | OWN.get(kind, {}))
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModel.from_config(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"it has {count:,} parameters")
    torch.manual_seed(0)
    model = AutoModel.from_config(config)
    with torch.no_grad():
        for p in model.parameters():  # some start as zeros, which would hide what they do
            p.add_(0.02 * torch.randn_like(p))
    if config.is_encoder_decoder:
        model = model.get_encoder()
        model.config = config
    model.config.use_cache = False
    plain_states(model.eval(), np.arange(5, 69, dtype=np.int32))
    return model


def teacher_of(model: Any, kind: str) -> Teacher:
    """Return a teacher whose tokenizer is not read from files."""
    from stillhouse.extract.teacher import model as module

    class Plain:
        prefix, suffix, leading_space, hash = (), (), False, ""

        def __init__(self, *_: Any) -> None: ...

    before = module.Tokeniser, module.check_vocabulary
    module.Tokeniser, module.check_vocabulary = Plain, lambda *_: None  # type: ignore[misc,assignment]
    try:
        return Teacher(
            model.eval().requires_grad_(False), Tokens(), source=kind, device="cpu", dtype="float32", window=None
        )
    finally:
        module.Tokeniser, module.check_vocabulary = before  # type: ignore[misc]


def windows_of(lengths: tuple[int, ...], blocks: bool = False) -> list[Window]:
    generator = np.random.default_rng(0)
    made = []
    for n in lengths:
        ids = generator.integers(5, 100, n).astype(np.int32)
        made.append(Window(ids, (np.arange(n) // 3).astype(np.int32) if blocks else None, []))
    return made


def plain_states(pristine: Any, ids: np.ndarray) -> list[np.ndarray]:
    """What transformers alone gives of one text, in a copy of a model that has run nothing."""
    with torch.inference_mode():
        out = copy.deepcopy(pristine)(input_ids=torch.from_numpy(ids.astype(np.int64))[None], output_hidden_states=True)
    return [h[0, : len(ids)].numpy() for h in out.hidden_states]


def error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-30))


def measure(kind: str) -> Row:
    """Return the row of an architecture. Raises AssertionError where states are taken for exact and are not."""
    try:
        model = build(kind)
    except Exception as e:
        return Row(kind, "", f"not built small: {type(e).__name__}", "")
    pristine = copy.deepcopy(model).eval()
    try:
        teacher = teacher_of(model, kind)
        lengths = tuple(n for n in LENGTHS if n <= teacher.window)
        windows = windows_of(lengths)
        teacher.passes = choose_passes(teacher, windows)
    except TeacherError as e:
        return Row(kind, "", f"refused: {e.what}", "")
    for batch in make_batches(windows, 256, 24, teacher.passes):
        states = teacher.states(batch, range(teacher.depth + 1))
        for b, window in enumerate(batch):
            for k, want in enumerate(plain_states(pristine, window.ids)):
                wrong = error(states[k][b, : len(want)].numpy(), want)
                assert wrong <= 2e-4, f"{kind}: layer {k} of a text of {len(want)} tokens is {wrong:.2g} off"
    return Row(kind, teacher.kind, "exact: " + teacher.passes.words, block(teacher, pristine))


def block(teacher: Teacher, pristine: Any) -> str:
    """How the architecture follows a mask of blocks."""
    if teacher.kind == "decoder":
        return "not needed"
    windows = windows_of((6, 12, 30, 47), blocks=True)
    try:
        passes = choose_passes(teacher, windows)
    except TeacherError as e:
        return f"refused: {e.what}"
    for window in windows:
        assert window.blocks is not None
        n = int((window.blocks == 0).sum())
        whole = Window(window.ids, window.blocks * 0, [])
        for given, count in ((window, n), (whole, len(window.ids))):
            states = teacher.states_by(passes, [given], range(teacher.depth + 1))
            for k, want in enumerate(plain_states(pristine, window.ids[:count])):
                wrong = error(states[k][0, :count].numpy(), want)
                assert wrong <= 2e-4, f"{teacher.source}: +block, layer {k} is {wrong:.2g} off"
        # What comes later changes nothing.
        for cut in range(n, len(window.ids), 3):
            less = teacher.states_by(passes, [Window(window.ids[:cut], window.blocks[:cut], [])], [teacher.depth])
            more = teacher.states_by(passes, [window], [teacher.depth])
            a, b = (s[teacher.depth][0, :cut].numpy() for s in (less, more))
            assert error(a, b) <= 2e-4, f"{teacher.source}: +block shows what is later"
    return "exact"


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def measure_all(kinds: list[str]) -> Iterator[Row]:
    warnings.filterwarnings("ignore")
    for kind in kinds:
        try:
            with at_most(MOST_SECONDS):
                yield measure(kind)
        except _TooSlow:
            yield Row(kind, "", "not built small: too slow", "")
