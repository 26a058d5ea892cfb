"""Convert a CTranslate2 Whisper, as faster-whisper uses, to a folder that transformers loads.

Guarantees: OUT appears whole or not at all. Before it appears, transformers reads it, and every weight is compared with
the number of the source.
Try: `stillhouse teacher convert FOLDER OUT`.
"""

from __future__ import annotations

import shutil
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from ...data.errors import TeacherError
from ...data.files.atomic import sha256_plain
from ..teacher.convert import LIBRARIES, ConvertedTeacher, new_folder, write_facts
from .ctranslate2 import FILE, Whisper, read_whisper
from .encoder import load_encoder

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocabulary.txt", "vocabulary.json")


def is_ctranslate2(source: Path) -> bool:
    """Return whether `source` is a folder with a CTranslate2 model, or the file of one."""
    return (source.is_file() and source.name == FILE) or (source / FILE).is_file()


def convert_whisper(source: Path, out: Path, note: str = "") -> ConvertedTeacher:
    """Read a CTranslate2 Whisper and write it to a new folder, with the feature extractor that belongs to it.

    Arguments:
        source: the folder, or its model.bin.
        note: words about the model for its `about` line.

    Raises LockedError, UsageError if `out` exists, or TeacherError if the source cannot be read or the result differs.
    """
    folder = source.parent if source.is_file() else source
    whisper = read_whisper(folder)
    with new_folder(out) as draft:
        return _write(whisper, folder, draft, note)


def _write(whisper: Whisper, source: Path, folder: Path, note: str) -> ConvertedTeacher:
    from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

    dtypes = {t.dtype for t in whisper.weights.values()}
    dtype = torch.float16 if dtypes == {torch.float16} else torch.float32
    model = WhisperForConditionalGeneration(WhisperConfig(**whisper.config))
    model = model.half() if dtype == torch.float16 else model
    missing, unexpected = model.load_state_dict({k: t.to(dtype) for k, t in whisper.weights.items()}, strict=False)
    if unexpected or set(missing) - {"proj_out.weight"}:  # the output is the embedding
        raise TeacherError(f"weights are missing or unknown: {[*missing, *unexpected][:5]}", where=source)
    model.tie_weights()
    model.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=model.config.num_mel_bins).save_pretrained(folder)
    for name in TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    written = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).state_dict()
    if any(not torch.equal(written[name], t.float()) for name, t in whisper.weights.items()):
        raise TeacherError("its weights differ after the conversion", where=source)
    encoder = load_encoder(str(folder))
    bits = 8 if "int8" in whisper.types else 16 if "int16" in whisper.types else None
    name = source.name
    quantisation = "" if bits is None else f"{bits}-bit quantised, here as float32"
    facts = ConvertedTeacher(
        about=", ".join(filter(None, [name, quantisation, note])),
        name=name,
        source=f"{name}/{FILE}",
        files={FILE: sha256_plain(source / FILE)},
        source_bytes=(source / FILE).stat().st_size,
        format="ctranslate2",
        tensor_types=whisper.types,
        quantised_bits=bits,
        instruct_tuned=False,
        architecture=type(model).__name__,
        parameters=sum(p.numel() for p in model.parameters()),
        depth=encoder.depth,
        width=encoder.width,
        dtype=str(dtype).removeprefix("torch."),
        licence=None,
        weights_hash=encoder.weights_hash(),
        tokenizer_hash=None,
        versions={library: version(library) for library in LIBRARIES if find_spec(library)},
    )
    write_facts(facts, folder)
    return facts
