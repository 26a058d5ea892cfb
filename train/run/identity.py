"""What makes two runs comparable: their data and its order, their budget, the student's first weights.

Guarantees: if two runs of one seed have equal identities, they differ in settings of learning alone, such as transfer,
learning rate, dropout, masks, text without audio and the run they start from. Every run writes its identity to
RUN/identity.json before the first step.
Try: `pytest tests/train/study/test_study.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ...data.batches.loader import BatchLoader
from ...data.batches.sampler import BatchSampler
from ...data.errors import StaleError, first_few
from ...data.files.atomic import read_plain
from ...data.manifest import Utterance
from ..config import Config, flatten

FILE = "identity.json"
TEXTS = "transcripts.json"  # {id: hash of its text}, so that changed ones can be named; earlier versions lack it
SOUND = "sound"  # what the features were computed from; runs of earlier versions do not have it


def data_identity(loader: BatchLoader, sampler: BatchSampler) -> dict[str, Any]:
    """Return fingerprints of what a run trains on, and in which order. None of it may change when the run resumes."""
    utterances = [[u.id, u.text] for u in loader.utterances]
    ids = [u.id for u in loader.utterances]
    batches = [
        [part.tolist() for part in (b.indices, b.speeds, b.copies) if part is not None] for b in sampler.epoch(0)
    ]
    noise = {"noise": json.dumps(loader.features.noise, sort_keys=True)} if loader.copies else {}
    return noise | {
        "units": loader.units.fingerprint,
        "features": loader.features.fingerprint,
        "utterances": len(loader.utterances),
        "frames": int(loader.frames.sum()),
        SOUND: _hash(b"".join(loader.features.sounds(ids, speed).tobytes() for speed in loader.speeds)),
        "transcripts": _hash(json.dumps(utterances).encode()),
        "order": _hash(json.dumps(batches).encode()),  # in the first epoch, which the seed and the settings decide
    }


def text_identity(utterances: Sequence[Utterance], sampler: BatchSampler) -> dict[str, Any]:
    """Return fingerprints of the texts without audio that a run learns, and of their order, as `data_identity` does."""
    return {
        "texts": len(utterances),
        "units": int(sampler.frames.sum()),
        "transcripts": _hash(json.dumps([[u.id, u.text] for u in utterances]).encode()),
        "order": _hash(json.dumps([b.indices.tolist() for b in sampler.epoch(0)]).encode()),
    }


def text_hashes(utterances: Iterable[Utterance]) -> dict[str, str]:
    """Return a short hash of each text that a run trains on, by utterance id."""
    return {u.id: _hash(u.text.encode("utf-8", "surrogatepass"))[:8] for u in utterances}


def weights_hash(model: nn.Module) -> str:
    """Return a hash of the names, shapes and bits of all weights."""
    digest = hashlib.sha256()
    for name, value in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def read(out: Path) -> dict[str, Any] | None:
    """Return RUN/identity.json, or None if there is none, as in a run that has not begun."""
    try:
        return json.loads(read_plain(out / FILE))
    except (FileNotFoundError, ValueError):
        return None
    except OSError as e:
        raise StaleError(f"cannot be read: {e.strerror}", where=out / FILE) from None


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Return the differences of two identities in words, such as "budget.steps: 400 and 800".

    Where runs start from other runs is a setting of learning, and so is text without audio. `initialisation` is of the
    weights before that.
    """
    left, right = ({k: v for k, v in flatten(x).items() if not k.startswith(("init.", "text."))} for x in (a, b))
    names = (left | right).keys() - ({f"data.{SOUND}"} - (left.keys() & right.keys()))
    return [
        f"{k}: {left.get(k)} and {right.get(k)}" for k in left | right if k in names and left.get(k) != right.get(k)
    ]


def other_settings(old: Config, new: Config) -> list[str]:
    """Return in words which settings of a run changed that change its result.

    Those of the section run may change, the seed excepted, and so may the paths of the data. The source of the first
    weights may have another path, but a run has one or none.
    """
    free = {f"run.{name}" for name in type(new.run).model_fields} - {"run.seed"}
    free |= {"data.corpus", "data.features", "data.units", "transfer.stores"}
    if None not in (old.init.source, new.init.source):
        free.add("init.source")
    a, b = old.flat(), new.flat()
    changed = [k for k in a | b if a.get(k) != b.get(k) and k not in free]
    return [f"{k}: {a.get(k)} in the run, {b.get(k)} in the new settings" for k in changed]


def refuse_other_settings(old: Config, new: Config, where: Path) -> None:
    """Raise StaleError if settings of a run changed, as in `other_settings`."""
    differ = other_settings(old, new)
    _refuse("the run has other settings", differ, where, "choose another --out for the new settings")


def refuse_other_data(
    old: dict[str, Any], new: dict[str, Any], where: Path, out: Path, texts: Mapping[str, str]
) -> None:
    """Raise StaleError if the data of a run in `out`, as in `data_identity` and `text_hashes`, changed."""
    names = [k for k in new if k != SOUND or k in old]
    differ = [f"{k}: {old.get(k)} when the run began, {new[k]} now" for k in names if old.get(k) != new[k]]
    if any(old.get(k) != new[k] for k in names if k.endswith("transcripts")):
        differ += _changed_texts(out, texts)
    _refuse("the run's data changed", differ, where, "restore the data or choose another --out")


def learnt_texts(out: Path, loader: BatchLoader) -> list[str]:
    """Return the ids of a loader with transcripts that a run was trained on, as far as its folder records them."""
    then = _recorded_texts(out)
    return [id for id, digest in text_hashes(loader.utterances).items() if then.get(id) == digest]


def _recorded_texts(out: Path) -> dict[str, str]:
    try:
        then = json.loads(read_plain(out / TEXTS))
    except (OSError, ValueError):
        return {}
    return then if isinstance(then, dict) else {}


def _changed_texts(out: Path, now: Mapping[str, str]) -> list[str]:
    """Return in words which transcripts differ from those that a run began with, as far as that is known."""
    then = _recorded_texts(out)
    if not then:
        return []
    of = {
        "other text": [id for id in now if then.get(id, now[id]) != now[id]],
        "added": [id for id in now if id not in then],
        "missing": [id for id in then if id not in now],
    }
    return [f"{what}: {first_few(ids)}" for what, ids in of.items() if ids]


def _refuse(what: str, differ: list[str], where: Path, remedy: str) -> None:
    if differ:
        raise StaleError(f"{what}: {'; '.join(differ)}", where=where, remedy=remedy)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
