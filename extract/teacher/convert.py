"""A language model that loads slowly (GGUF), or that lacks a fast tokenizer, into a folder that loads at once.

Invariant: OUT appears whole or not at all, and only after its hidden states and its tokenizer were found equal, bit by
bit, to those of the model as transformers reads it from the source. No code of a model's repository runs.
Run: `stillhouse teacher convert SOURCE OUT`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ...data.errors import LockedError, TeacherError, UsageError
from ..store.disk.durable import fsync_all
from .model import CARD, PICKLED, load_teacher, quiet_transformers

SCHEMA = "stillhouse.teacher/1"
_PROBE_TEXTS = ("the cat sat on the mat, in 1984", "naïve Ünïcode 你好 😀")
_LIBRARIES = ("torch", "transformers", "tokenizers", "gguf", "accelerate")


@dataclass(frozen=True)
class Card:
    """What a converted folder says of itself, in its teacher.json. `files`: name → SHA-256 of the source's files that
    were read; `tensor_types`: how many of the source's tensors had which type; `about` is one line for people.
    """

    about: str
    name: str
    source: str
    files: dict[str, str]
    source_bytes: int
    format: str  # "gguf" or "safetensors"
    tensor_types: dict[str, int]
    quantised_bits: int | None
    instruct_tuned: bool
    architecture: str
    parameters: int
    depth: int
    width: int
    dtype: str
    licence: str | None
    weights_hash: str
    tokenizer_hash: str
    versions: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}


@dataclass(frozen=True)
class _Source:
    """Where transformers finds the model: its folder, and the GGUF file in it if that is what it is."""

    folder: Path
    gguf: str | None

    @property
    def options(self) -> dict[str, Any]:
        return {} if self.gguf is None else {"gguf_file": self.gguf}

    @property
    def files(self) -> list[Path]:
        if self.gguf is not None:
            return [self.folder / self.gguf]
        return sorted([*self.folder.glob("*.safetensors"), *self.folder.glob("*.json"), *self.folder.glob("*.model")])


def convert(source: Path, out: Path, note: str = "") -> Card:
    """Read the backbone and the tokenizer of a GGUF file or a folder, and write them to the new folder `out`.

    Quantised weights are written as the float32 numbers that they stand for. Errors: UsageError where `out` exists,
    TeacherError where transformers cannot read the source or what was written is not what was read.
    """
    found = _find(source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError("it exists already", where=out, expected="a folder that is yet to be made")
    out.parent.mkdir(parents=True, exist_ok=True)
    making = out.parent / f".{out.name}.converting"
    making.mkdir(exist_ok=True)
    held = os.open(making, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise LockedError("another command is converting to it", where=out) from e
        _empty(making)
        try:
            card = _write(found, making, note)
            fsync_all([*making.iterdir(), making])
            os.rename(making, out)
        except BaseException:
            shutil.rmtree(making, ignore_errors=True)
            raise
        fsync_all([out.parent])
    finally:
        os.close(held)
    return card


def _empty(folder: Path) -> None:
    for left in folder.iterdir():
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def _find(source: Path) -> _Source:
    """Errors: TeacherError for a source without weights that can be read, or with several."""
    if source.is_file():
        if source.suffix != ".gguf":
            raise TeacherError("this is no model", where=source, expected="a .gguf file or a model's folder")
        return _Source(source.parent, source.name)
    if any(source.glob("*.safetensors")) and (source / "config.json").is_file():
        return _Source(source, None)
    files = sorted(source.glob("*.gguf"))
    if len(files) == 1:
        return _Source(source, files[0].name)
    if files:
        raise TeacherError(
            f"several models are here: {', '.join(f.name for f in files[:5])}", where=source, remedy="name the file"
        )
    remedy = PICKLED if any(source.glob("*.bin")) else None
    raise TeacherError(
        "there is no model here that can be read",
        where=source,
        expected="*.gguf, or config.json and *.safetensors",
        remedy=remedy,
    )


def _write(source: _Source, folder: Path, note: str) -> Card:
    from transformers import AutoModel

    model, tokenizer = _load(source)
    config = type(model.config).from_dict(
        {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    )
    # A model that transformers took from a quantised file refuses to be saved; one made of its numbers does not.
    plain = AutoModel.from_config(config, dtype=model.dtype)
    plain.load_state_dict(model.state_dict(), strict=True)
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    parameters = sum(p.numel() for p in plain.parameters())
    del plain
    dtype = str(model.dtype).removeprefix("torch.")
    written = load_teacher(str(folder), device="cpu", dtype="float32")
    model.eval()
    if model.dtype != torch.float32:
        model.float()
    for text in _PROBE_TEXTS:
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.inference_mode():
            want, got = (m(input_ids=ids, output_hidden_states=True).hidden_states for m in (model, written.model))
        if not all(torch.equal(a, b) for a, b in zip(want, got, strict=True)):
            raise TeacherError("its hidden states are other ones after the conversion", where=source.folder)
    if written.tokeniser.settings() != json.loads(tokenizer.backend_tokenizer.to_str()):
        raise TeacherError("its tokenizer is another one after the conversion", where=source.folder)
    types, name, licence = _metadata(source)
    bits = _bits(types)
    chat = tokenizer.chat_template is not None
    names = f"{name} {source.gguf or source.folder.name}"
    instruct = chat or re.search(r"(?i)instruct|chat|[-_ ]it\b", names) is not None
    said = (
        ["instruct-tuned"] * instruct
        + [f"{bits}-bit quantised, here as {dtype}"] * (bits is not None)
        + [note] * bool(note)
    )
    card = Card(
        about=", ".join([name, *said]),
        name=name,
        source=source.gguf or source.folder.name,
        files={p.name: _sha256(p) for p in source.files},
        source_bytes=sum(p.stat().st_size for p in source.files),
        format="safetensors" if source.gguf is None else "gguf",
        tensor_types=types,
        quantised_bits=bits,
        instruct_tuned=instruct,
        architecture=written.architecture,
        parameters=parameters,
        depth=written.depth,
        width=written.width,
        dtype=dtype,
        licence=licence,
        weights_hash=written.weights_hash(),
        tokenizer_hash=written.tokeniser.hash,
        versions=_versions(),
    )
    (folder / CARD).write_text(json.dumps(card.as_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_readme(card), encoding="utf-8")
    return card


def _load(source: _Source) -> tuple[Any, Any]:
    """Model and tokenizer as transformers reads them. Errors: TeacherError."""
    if source.gguf is not None and (find_spec("gguf") is None or find_spec("accelerate") is None):
        raise TeacherError(
            "a GGUF file needs packages that are not here", where=source.gguf, remedy="pip install 'stillhouse[gguf]'"
        )
    quiet_transformers()
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(source.folder, **source.options)
        if config.is_encoder_decoder:
            raise TeacherError(
                "it is an encoder-decoder", where=source.folder, expected="an encoder or a causal decoder"
            )
        tokenizer = AutoTokenizer.from_pretrained(source.folder, **source.options)
        options = source.options | (
            {"dtype": torch.float32} if source.gguf is not None else {"dtype": "auto", "use_safetensors": True}
        )
        model = AutoModel.from_pretrained(source.folder, **options)
    except (OSError, ValueError, KeyError, ImportError) as e:
        reason = str(e).strip().split("\n")[0]
        raise TeacherError(f"transformers cannot read it: {reason}", where=source.folder / (source.gguf or "")) from e
    if not getattr(tokenizer, "is_fast", False):
        raise TeacherError(
            "its tokenizer cannot say which characters a token came from",
            where=source.folder,
            expected="a tokenizer that transformers can turn into a fast one (tokenizer.json)",
        )
    return model.requires_grad_(False), tokenizer


def _metadata(source: _Source) -> tuple[dict[str, int], str, str | None]:
    """(tensors by type, the model's name, its licence) from the source's own header."""
    if source.gguf is None:
        from safetensors import safe_open

        types: Counter[str] = Counter()
        for path in source.folder.glob("*.safetensors"):
            with safe_open(path, "pt") as f:
                types.update(f.get_slice(key).get_dtype() for key in f.keys())  # noqa: SIM118, it is no mapping
        return dict(types.most_common()), source.folder.name, None
    import gguf

    reader = gguf.GGUFReader(source.folder / source.gguf)
    types = Counter(t.tensor_type.name for t in reader.tensors)

    def text(key: str) -> str | None:
        field = reader.get_field(key)
        return None if field is None else str(field.contents())

    # The file's name says more than general.name, which quantisers leave as the training run called it
    return dict(types.most_common()), Path(source.gguf).stem, text("general.license")


def _bits(types: dict[str, int]) -> int | None:
    """Bits of the most frequent type of tensor, where that is a quantised one (Q4_1, IQ3_XXS, TQ2_0)."""
    match = re.match(r"[IT]?Q(\d+)", next(iter(types), ""))
    return int(match[1]) if match else None


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def render(card: Card) -> str:
    """For people."""
    return "\n".join(
        [
            f"teacher      {card.about}",
            f"model        {card.architecture}, {card.depth} layers, {card.width} wide, {card.parameters / 1e6:,.1f} M "
            f"numbers in {card.dtype}",
            f"from         {card.source}, {card.source_bytes / 1e6:,.1f} MB, tensors: "
            + ", ".join(f"{n} {t}" for t, n in card.tensor_types.items()),
            "checked      hidden states and tokenizer equal the source's, bit by bit",
        ]
    )


def _readme(card: Card) -> str:
    hashes = "\n".join(f"- `{name}`: SHA-256 `{value}`" for name, value in card.files.items())
    licence = f" Licence, as the source states it: {card.licence}." if card.licence else ""
    return (
        f"# {card.name}\n\n{card.about}.\n\nMade by `stillhouse teacher convert` from {card.source}: backbone and "
        f"tokenizer, without a language-modelling head of its own.{licence} Hidden states and tokenizer equal, bit by "
        f"bit, what transformers gives for the source. All facts: teacher.json.\n\n{hashes}\n"
    )
