"""What a user asks to be extracted, and the teacher as a store records it.

Guarantees: a view's fingerprint covers every setting that decides its numbers. A store never mixes two settings.
Try: `stillhouse extract CORPUS STORE --teacher … --dry-run`.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...data.errors import StaleError, UsageError
from ...data.text import check_transform
from ..speech.teacher import ALONE, AnyTeacher, SpeechTeacher
from ..store.disk.files import StoreFiles
from ..store.disk.layout import check_teacher_name, dtype_of
from ..store.disk.paths import Paths
from ..store.format.plan import Plan, TeacherRecord, read_plan
from ..store.views import parse_context
from ..teacher.contexts import check_context
from ..teacher.tokenizer import Tokeniser


@dataclass(frozen=True)
class Request:
    """What a user asks to be extracted."""

    name: str  # what the store calls the teacher
    layers: Sequence[int]  # negative numbers count from the last layer
    contexts: Sequence[str]  # as in alone or both:64
    transform: str = "none"  # text transforms joined by +
    join: str = ""  # text between two utterances of one window
    dtype: str = "float16"  # of the stored states
    batch_tokens: int | None = None  # most tokens in a batch; None: chosen by device
    core_tokens: int = 256  # text tokens that the utterances of a shared window have together
    seed: int = 0  # of the order of sessions
    leading_space: str = "auto"  # "yes", "no", or "auto": what the store has, or what the vocabulary needs

    def check_speech(self, source: str) -> None:
        """Raise UsageError, with the option, for what is asked of texts and a speech teacher does not have."""
        given = {
            "--transform": self.transform != "none",
            "--join": bool(self.join),
            "--leading-space": self.leading_space != "auto",
            "--batch-tokens": self.batch_tokens is not None,
        }
        for option in (name for name, there in given.items() if there):
            what = f"{option} is for texts, and this teacher hears audio"
            raise UsageError(what, where=source, remedy="give the command without it")
        if others := [c for c in self.contexts if c != ALONE]:
            what = f"a speech teacher hears an utterance alone, and not {', '.join(others)}"
            raise UsageError(what, where=source, expected=f"--context {ALONE}")

    def batch_sizes(self, device: str) -> tuple[int, int]:
        """Return the most tokens in a batch, and the cost of one call of the model in tokens."""
        cuda = device.startswith("cuda")
        return self.batch_tokens or (32768 if cuda else 4096), 1024 if cuda else 24


def view_fingerprint(record: TeacherRecord, context: str, layer: int) -> str:
    """Return the hash of all settings that decide a view's numbers."""
    t = record
    if t.is_speech:
        sound = t.sample_rate_hz, t.rate_hz, t.offset_s, t.window
        audio = t.kind, t.architecture, t.weights_hash, t.tokenizer_hash, *sound, t.dtype, t.model_dtype
        return hashlib.blake2b(repr((*audio, context, layer)).encode(), digest_size=16).hexdigest()
    teacher = t.kind, t.architecture, t.weights_hash, t.tokenizer_hash
    space = "auto" if t.space_by_script else t.leading_space
    text = t.transform, t.join_ids, t.prefix_ids, t.suffix_ids, space, t.window
    settings = *teacher, *text, t.dtype, t.model_dtype, context, layer
    return hashlib.blake2b(repr(settings).encode(), digest_size=16).hexdigest()


def choose_space(teacher: AnyTeacher, request: Request, files: StoreFiles) -> AnyTeacher:
    """Return the teacher with the leading space that is asked for; with "auto", as the store has it already."""
    if isinstance(teacher, SpeechTeacher) or not isinstance(teacher.tokeniser, Tokeniser):
        return teacher
    known = read_plan(files).teachers.get(request.name) if Paths(files).store_json.exists() else None
    choice = request.leading_space
    if choice == "auto" and known is not None:
        choice = known.space_choice
    chosen = copy.copy(teacher)
    chosen.tokeniser = teacher.tokeniser.with_space(choice)
    return chosen


def teacher_record(teacher: AnyTeacher, request: Request) -> TeacherRecord:
    """Return the teacher as the store records it. Raises UsageError if it cannot give a context, a layer or a name."""
    check_transform(request.transform)
    layers = teacher.layer_numbers(request.layers)
    contexts = list(dict.fromkeys(request.contexts))
    if isinstance(teacher, SpeechTeacher):
        request.check_speech(teacher.source)
        reads = _audio_settings(teacher)
    else:
        t = teacher.tokeniser
        text_limit = teacher.window - len(t.prefix) - len(t.suffix)
        for name in contexts:
            check_context(parse_context(name), teacher.kind, text_limit)
        reads = _text_settings(t, request)
    if not layers or not contexts:
        raise UsageError("nothing to extract", expected="at least one layer and one context")
    dtype_of(request.dtype).check_width(teacher.width)
    record = TeacherRecord(
        name=check_teacher_name(request.name),
        kind=teacher.kind,
        model=teacher.source,
        architecture=teacher.architecture,
        revision=teacher.revision,
        weights_hash=teacher.weights_hash(),
        width=teacher.width,
        depth=teacher.depth,
        window=teacher.window,
        dtype=request.dtype,
        model_dtype=teacher.dtype,
        contexts=contexts,
        layers=layers,
        about=teacher.about,
        **reads,
    )
    views = [(c, k) for c in record.contexts for k in record.layers]
    return replace(record, fingerprints={f"{c}/{k}": view_fingerprint(record, c, k) for c, k in views})


def _text_settings(t: Tokeniser, request: Request) -> dict[str, Any]:
    """The fields of a record that say how a language model reads text."""
    return {
        "tokenizer_hash": t.hash,
        "transform": request.transform,
        "join": request.join,
        "join_ids": t.join_ids(request.join),
        "prefix_ids": t.prefix,
        "suffix_ids": t.suffix,
        "leading_space": t.leading_space,
        "space_by_script": isinstance(t, Tokeniser) and t.space_by_script,  # Tests bring tokenisers of their own.
    }


def _audio_settings(teacher: SpeechTeacher) -> dict[str, Any]:
    """The fields of a record that say how a speech encoder reads audio.

    In the place of a tokenizer stands what turns audio into the model's input.
    """
    encoder = teacher.encoder
    return {
        "tokenizer_hash": encoder.input_hash(),
        "transform": "none",
        "join": "",
        "join_ids": [],
        "prefix_ids": [],
        "suffix_ids": [],
        "leading_space": False,
        "axis": "frame",
        "rate_hz": encoder.rate_hz,
        "offset_s": encoder.offset_s,
        "sample_rate_hz": encoder.sample_rate_hz,
    }


_SETTINGS = {
    "kind": "the kind of model",
    "architecture": "the architecture",
    "weights_hash": "the model's weights",
    "tokenizer_hash": "the tokenizer",
    "transform": "the text transform",
    "join": "the join string",
    "space_choice": "the leading space",
    "window": "the longest window",
    "prefix_ids": "the special tokens before a text",
    "suffix_ids": "the special tokens after a text",
    "dtype": "the stored dtype",
    "model_dtype": "the dtype of the model",
    "rate_hz": "the frames in a second",
    "offset_s": "the time of the first frame",
    "sample_rate_hz": "the rate of the samples",
}
_OF_SPEECH = {"tokenizer_hash": "the feature extractor, the silence behind the audio, or the windows over long audio"}


def differences(old: TeacherRecord, new: TeacherRecord) -> list[str]:
    """Return the settings in which two teachers differ, in words."""
    words = []
    for name, setting in (_SETTINGS | (_OF_SPEECH if new.is_speech else {})).items():
        if name == "weights_hash" and old.model_dtype != new.model_dtype:
            continue  # The same weights have another hash in another dtype.
        a, b = getattr(old, name), getattr(new, name)
        if a != b and name.endswith("_hash"):
            words.append(f"{setting} (stored {old.model!r}, {a[:8]}…; now {new.model!r}, {b[:8]}…)")
        elif a != b:
            words.append(f"{setting} (stored {a!r}, now {b!r})")
    return words


def check_settings(plan: Plan, record: TeacherRecord) -> None:
    """Raise StaleError, with the settings that differ, if a store has a teacher of this name with other settings."""
    old = plan.teachers.get(record.name)
    differ = differences(old, record) if old is not None else []
    if differ:
        raise StaleError(
            f"teacher {record.name!r} was extracted with other settings: {'; '.join(differ)}",
            where=plan.paths.root,
            remedy="give the same settings, another --name, or another store",
        )
