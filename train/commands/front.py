"""The front end of a run whose features are a speech encoder's states: it runs where audio has no features yet.

Guarantees: fbank needs none of it, and imports neither transformers nor a model.
Try: `stillhouse decode RUN talk.wav`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .live import say

MANIFESTS = (".jsonl", ".gz", ".json")


def is_manifest_name(path: Path) -> bool:
    """Return whether a path is meant as a corpus, and not as audio."""
    return path.suffix in MANIFESTS or path.is_dir()


def front_end(run: Path, device: str, source: str | None) -> Any:
    """Load the encoder that computed the features of a run, from `source` if it lies elsewhere now. None for fbank.

    Raises:
        UsageError: there is a `source`, but the run has fbank.
        TeacherError: the encoder cannot be loaded.
        StaleError: it is another one than the run was trained with.
    """
    from ...data.errors import TeacherError, UsageError
    from ..run.load import trained_on

    settings = trained_on(run).encoder
    if settings is None:
        if source is not None:
            raise UsageError("the features of this run are fbank", where=run, expected="no --encoder")
        return None
    from ...extract.speech.rows import recorded_method

    try:
        method = recorded_method(settings, device, source)
    except TeacherError as e:
        remedy = "say where it is now with --encoder MODEL" + (f", or {e.remedy}" if e.remedy else "")
        raise TeacherError(e.what, where=e.where, expected=e.expected, remedy=remedy) from None
    where = method.settings
    say(f"The features are layer {where.layer} of {where.encoder} ({where.architecture}), {where.frame_hz:g} a second.")
    return method


@contextmanager
def given_features(corpus: Any, features: Path | None, method: Any) -> Iterator[tuple[Path, Any]]:
    """Yield the feature file of a corpus, and the corpus. Without `features`, the `method` computes a temporary file.

    Utterances that fail are left out of the corpus. PartialError is raised for them when the others are decoded.
    """
    if features is not None:
        yield features, corpus
        return
    from ...data.errors import PartialError
    from ...data.features.compute import compute_features
    from ...data.features.file import FeatureFile
    from ...data.manifest import Corpus

    failed: PartialError | None = None
    with tempfile.TemporaryDirectory(prefix="stillhouse-") as folder:
        path = Path(folder) / "features.h5"
        workers = 0 if method.on_gpu else None
        try:
            report = compute_features(corpus, path, method=method, upsample=True, workers=workers)
            if report.upsampled:
                low = f"a lower sample rate than the encoder's {report.rate_hz} Hz"
                say(f"{report.upsampled} utterances have {low}: nothing is in their upper band. Expect errors.")
        except PartialError as e:
            if not path.exists():
                raise
            failed = e
            there = set(FeatureFile(path).ids)
            corpus = Corpus(corpus.path, [u for u in corpus.utterances if u.audio is None or u.id in there])
        yield path, corpus
    if failed is not None:
        raise failed
