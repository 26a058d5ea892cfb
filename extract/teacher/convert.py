"""Convert a language model that loads slowly (GGUF), or lacks a fast tokenizer, to a folder that loads at once.

Guarantees: OUT appears whole or not at all. Before it appears, its hidden states and its tokenizer are compared, bit by
bit, with those that transformers reads from the source. No code of a model's repository runs.
Try: `stillhouse teacher convert SOURCE OUT`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ...data.errors import TeacherError, UsageError
from ...data.files.atomic import sha256_plain, sync
from ...data.files.lock import FileLock
from .loading import PICKLED, read_pretrained
from .model import FACTS, load_teacher

SCHEMA = "stillhouse.teacher/1"
_PROBE_TEXTS = ("the cat sat on the mat, in 1984", "naïve Ünïcode 你好 😀")
LIBRARIES = ("torch", "transformers", "tokenizers", "gguf", "accelerate")


@dataclass(frozen=True)
class ConvertedTeacher:
    """The facts in teacher.json of a converted folder."""

    about: str  # one line for people
    name: str
    source: str
    files: dict[str, str]  # SHA-256 of each file of the source
    source_bytes: int
    format: str  # "gguf", "safetensors" or "ctranslate2"
    tensor_types: dict[str, int]  # number of the source's tensors of each type
    quantised_bits: int | None
    instruct_tuned: bool
    architecture: str
    parameters: int
    depth: int
    width: int
    dtype: str
    licence: str | None
    weights_hash: str
    tokenizer_hash: str | None  # None for a speech encoder, which needs no tokenizer
    versions: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}


@dataclass(frozen=True)
class _Source:
    """A model's folder, and the name of the GGUF file in it if the model is one."""

    folder: Path
    gguf: str | None

    @property
    def name(self) -> str:
        return self.gguf or self.folder.name

    @property
    def files(self) -> list[Path]:
        if self.gguf is not None:
            return [self.folder / self.gguf]
        return sorted(p for ending in ("safetensors", "json", "model") for p in self.folder.glob(f"*.{ending}"))


def convert(source: Path, out: Path, note: str = "") -> ConvertedTeacher:
    """Read the backbone and the tokenizer of a model and write them to a new folder.

    Quantised weights are written as the float32 numbers that they stand for.

    Arguments:
        source: a GGUF file or a model's folder.
        note: words about the model for its `about` line.

    Raises LockedError, UsageError if `out` exists, or TeacherError if the source cannot be read or the result differs.
    """
    model = _find(source)
    with new_folder(out) as draft:
        return _write(model, draft, note)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to write into, which becomes `out` at the end if nothing is raised.

    Raises LockedError, or UsageError if `out` exists.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError("it exists already", where=out, expected="the name of a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.parent / f".{out.name}.converting"
    draft.mkdir(exist_ok=True)
    with FileLock(draft, "converted model"):
        try:
            for left in draft.iterdir():  # by a conversion that was killed
                _remove(left)
            yield draft
            sync(*draft.iterdir(), draft)
            os.rename(draft, out)
        except BaseException:
            _remove(draft)
            raise
    sync(out.parent)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _find(source: Path) -> _Source:
    """The one model at `source`. Raises TeacherError for none that can be read, or several."""
    if source.is_file():
        if source.suffix != ".gguf":
            raise TeacherError("this is not a model", where=source, expected="a .gguf file or a model's folder")
        return _Source(source.parent, source.name)
    if any(source.glob("*.safetensors")) and (source / "config.json").is_file():
        return _Source(source, None)
    names = [f.name for f in sorted(source.glob("*.gguf"))]
    if len(names) == 1:
        return _Source(source, names[0])
    if names:
        raise TeacherError(f"several models are here: {', '.join(names[:5])}", where=source, remedy="name the file")
    remedy, expected = PICKLED if any(source.glob("*.bin")) else None, "*.gguf, or config.json and *.safetensors"
    raise TeacherError("there is no model here that can be read", where=source, expected=expected, remedy=remedy)


def _write(source: _Source, folder: Path, note: str) -> ConvertedTeacher:
    from transformers import AutoModel

    model, tokenizer = _load(source)
    config = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    # transformers refuses to save a model that it took from a quantised file, but saves one made of its numbers.
    plain = AutoModel.from_config(type(model.config).from_dict(config), dtype=model.dtype)
    plain.load_state_dict(model.state_dict(), strict=True)
    plain.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        path.chmod((folder / "config.json").stat().st_mode & 0o777)  # safetensors writes for this user alone
    tokenizer.save_pretrained(folder)
    parameters = sum(p.numel() for p in plain.parameters())
    del plain
    dtype = str(model.dtype).removeprefix("torch.")
    written = load_teacher(str(folder), device="cpu", dtype="float32")
    if model.dtype != torch.float32:  # a quantised model is float32, and raises ValueError here
        model.float()
    for text in _PROBE_TEXTS:
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.inference_mode():
            read, saved = (m(input_ids=ids, output_hidden_states=True).hidden_states for m in (model, written.model))
        if not all(torch.equal(a, b) for a, b in zip(read, saved, strict=True)):
            raise TeacherError("its hidden states differ after the conversion", where=source.folder)
    if written.tokeniser.settings() != json.loads(tokenizer.backend_tokenizer.to_str()):
        raise TeacherError("its tokenizer differs after the conversion", where=source.folder)
    types, name, licence = _metadata(source)
    # Bits of the most frequent type of tensor, if that is a quantised one (Q4_1, IQ3_XXS, TQ2_0)
    quantised = re.match(r"[IT]?Q(\d+)", next(iter(types), ""))
    bits = int(quantised[1]) if quantised else None
    instruct = re.search(r"(?i)instruct|chat|[-_ ]it\b", f"{name} {source.name}") is not None
    instruct = instruct or tokenizer.chat_template is not None
    quantisation = "" if bits is None else f"{bits}-bit quantised, here as {dtype}"
    facts = ConvertedTeacher(
        about=", ".join(filter(None, [name, "instruct-tuned" if instruct else "", quantisation, note])),
        name=name,
        source=source.name,
        files={p.name: sha256_plain(p) for p in source.files},
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
        versions={library: version(library) for library in LIBRARIES if find_spec(library)},
    )
    write_facts(facts, folder)
    return facts


def _load(source: _Source) -> tuple[Any, Any]:
    """Model and tokenizer as transformers reads them."""
    if source.gguf is not None and (find_spec("gguf") is None or find_spec("accelerate") is None):
        remedy = "pip install 'stillhouse[gguf]'"
        raise TeacherError("a GGUF file needs packages that are not installed", where=source.gguf, remedy=remedy)
    if source.gguf is None:
        model, tokenizer = read_pretrained(str(source.folder), dtype="auto", use_safetensors=True)
    else:
        model, tokenizer = read_pretrained(str(source.folder), dtype=torch.float32, gguf_file=source.gguf)
    if model.config.is_encoder_decoder or type(model).__name__.endswith("EncoderModel"):
        what, remedy = "this is an encoder-decoder, which is used as it is", "give --teacher this folder"
        raise TeacherError(what, where=source.folder, remedy=remedy)
    if not getattr(tokenizer, "is_fast", False):
        what, expected = "its tokenizer does not tell which characters a token came from", "a fast tokenizer"
        raise TeacherError(what, where=source.folder, expected=f"{expected} (tokenizer.json)")
    return model, tokenizer


def _metadata(source: _Source) -> tuple[dict[str, int], str, str | None]:
    """(tensors by type, the model's name, its licence) from the source's own header."""
    types: Counter[str] = Counter()
    if source.gguf is None:
        from safetensors import safe_open

        for path in source.folder.glob("*.safetensors"):
            with safe_open(path, "pt") as f:
                types.update(f.get_slice(key).get_dtype() for key in f.keys())  # noqa: SIM118, f is not a mapping
        return dict(types.most_common()), source.name, None
    import gguf

    reader = gguf.GGUFReader(source.folder / source.gguf)
    types.update(t.tensor_type.name for t in reader.tensors)
    licence = reader.get_field("general.license")
    # Quantisers leave general.name as the training run called it, so the file's name is more useful.
    name = Path(source.gguf).stem
    return dict(types.most_common()), name, None if licence is None else str(licence.contents())


def render(facts: ConvertedTeacher) -> str:
    """Return the facts as text for people."""
    tensors = ", ".join(f"{n} {t}" for t, n in facts.tensor_types.items())
    return (
        f"teacher      {facts.about}\n"
        f"model        {facts.architecture}, {facts.depth} layers, {facts.width} wide, "
        f"{facts.parameters / 1e6:,.1f} M parameters in {facts.dtype}\n"
        f"from         {facts.source}, {facts.source_bytes / 1e6:,.1f} MB, tensors: {tensors}\n"
        f"checked      {_checked(facts)} equal the source's, bit by bit"
    )


def _checked(facts: ConvertedTeacher) -> str:
    return "all weights" if facts.tokenizer_hash is None else "hidden states and tokenizer"


def write_facts(facts: ConvertedTeacher, folder: Path) -> None:
    """Write teacher.json and README.md."""
    (folder / FACTS).write_text(json.dumps(facts.as_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_readme(facts), encoding="utf-8")


def _readme(facts: ConvertedTeacher) -> str:
    licence = f" Licence, as the source states it: {facts.licence}." if facts.licence else ""
    files = "".join(f"- `{name}`: SHA-256 `{value}`\n" for name, value in facts.files.items())
    kept = (
        "a whole Whisper"
        if facts.tokenizer_hash is None
        else "the backbone and the tokenizer, but no language-modelling head"
    )
    return f"""# {facts.name}

{facts.about}.

`stillhouse teacher convert` made this folder from {facts.source}. It has {kept}.
Its {_checked(facts)} equal, bit by bit, those of the source. teacher.json has all facts.{licence}

{files}"""
