"""What makes two runs comparable: their data and its order, their budget, the student's first weights.

Invariant: equal identities mean that two runs of one seed differ in settings of learning alone (transfer, learning
rate, dropout, masks). Every run writes its own to RUN/identity.json before the first step.
Exercised by: `stillhouse study STUDY`; pytest tests/train/study/test_study.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ...data.batches.loader import BatchLoader
from ...data.batches.sampler import BatchSampler
from ...data.errors import StaleError
from ...data.files.atomic import read_plain, write_atomic
from ..config import Config

FILE = "identity.json"


def data_identity(loader: BatchLoader, sampler: BatchSampler) -> dict[str, Any]:
    """Of what a run hears, and in which order: all that must still be so when it goes on."""
    utterances = [[u.id, u.text] for u in loader.utterances]
    batches = [[b.indices.tolist(), b.speeds.tolist()] for b in sampler.epoch(0)]
    return {
        "units": loader.units.fingerprint,
        "features": loader.features.fingerprint,
        "utterances": len(loader.utterances),
        "frames": int(loader.frames.sum()),
        "transcripts": _hash(json.dumps(utterances).encode()),
        "order": _hash(json.dumps(batches).encode()),  # of the first epoch, which the seed and the settings decide
    }


def budget(config: Config, precision: str) -> dict[str, Any]:
    return {"steps": config.optim.steps, "batch_frames": config.data.batch_frames, "precision": precision}


def initialisation(model: nn.Module) -> str:
    """Hash of the names, shapes and bits of all weights as the seed made them."""
    found = hashlib.sha256()
    for name, value in sorted(model.named_parameters()):
        found.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def write(out: Path, identity: Mapping[str, Any]) -> None:
    write_atomic(out / FILE, json.dumps(identity, indent=1) + "\n")


def read(out: Path) -> dict[str, Any] | None:
    """None where a run has none: it has not begun, or was begun before runs had one."""
    try:
        return json.loads(read_plain(out / FILE))
    except (FileNotFoundError, ValueError):
        return None
    except OSError as e:
        raise StaleError(f"cannot be read: {e.strerror}", where=out / FILE) from None


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What two identities differ in, in words: "budget.steps: 400 and 800"."""
    left, right = _flat(a), _flat(b)
    return [f"{k}: {left.get(k)} and {right.get(k)}" for k in left | right if left.get(k) != right.get(k)]


def refuse_other_settings(old: Config, new: Config, where: Path) -> None:
    """Settings that change the result may not change under a run; those of `run` may, the seed excepted."""
    a, b = (
        {f"{s}.{k}": v for s, values in c.model_dump(mode="json").items() for k, v in values.items()}
        for c in (old, new)
    )
    free = {f"run.{k}" for k in type(new.run).model_fields} - {"run.seed"} | {
        "data.corpus",
        "data.features",
        "data.units",
    }
    differ = [
        f"{k}: {a[k]} in the run, {b[k]} asked for" for k in a if a[k] != b[k] and k not in free | {"transfer.stores"}
    ]
    if differ:
        raise StaleError(
            f"the run has other settings: {'; '.join(differ)}",
            where=where,
            remedy="choose another --out for the new settings",
        )


def refuse_other_data(old: dict[str, Any], new: dict[str, Any], where: Path) -> None:
    differ = [f"{k}: {old.get(k)} when the run began, {new[k]} now" for k in new if old.get(k) != new[k]]
    if differ:
        raise StaleError(
            f"the run's data changed: {'; '.join(differ)}",
            where=where,
            remedy="restore the data or choose another --out",
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
