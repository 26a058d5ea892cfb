"""Choose the weights of decoding with a language model on held-out speech, and keep them beside the run.

Guarantees: nothing is kept as a choice before all points are measured. A point that was measured before a kill is not
measured again.
Try: `stillhouse decode RUN CORPUS FEATURES --split dev --beam 8 --lm words.arpa --tune lm-weight,ilm-weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ....data.batches.loader import BatchLoader
from ....data.files.atomic import sha256_plain
from ...model.transducer import Transducer
from ...run.identity import weights_hash
from ...score.wer import error_counts
from ..fusion import NGramStates
from .tune import GridPoint, tune
from .tuned import Tuned, TunedPoint, Unfinished, keep_tuned


def choose_weights(
    run: Path,
    names: Sequence[str],
    search: Callable,
    model: Transducer,
    loader: BatchLoader,
    decoded: Callable[[Callable], Iterable[Any]],
    settings: Mapping[str, Any],
    *,
    given: Mapping[str, float],
    on_begin: Callable[[int, Path], None] = lambda kept, path: None,
    on_point: Callable[[GridPoint], None] = lambda point: None,
    **of: Any,
) -> tuple[Tuned, Path]:
    """Measure the points of the grid of `names`, and keep the best one beside the run. Return it and the file.

    Arguments:
        search: a functools.partial that makes the search of a batch, with the fusion in its keywords.
        decoded: returns the hypotheses of `loader` by `model` with a search.
        settings: the search options of `stillhouse decode` by name, all of which decide the error rates.
        given: weights that belong to the choice and are the same for all points.
        on_begin: called with the number of points that an interrupted call has measured, and their file.
        on_point: called with each point.
        of: the fields of `Tuned` that say what was decoded.
    """
    fusion: Any = search.keywords["fusion"]  # type: ignore[attr-defined]
    (words,) = (part for part in getattr(fusion, "parts", [fusion]) if isinstance(part, NGramStates))
    digest, hotwords = sha256_plain(settings["lm"]), settings["hotwords"]
    ids = [u.id for u in loader.utterances]
    fixed = {k: v for k, v in settings.items() if k not in ("lm", "hotwords", "nbest", *map(_option, names))}
    files = [digest, hotwords and sha256_plain(hotwords)]
    data = [loader.units.fingerprint, loader.features.fingerprint, ids, [u.text for u in loader.utterances]]
    unfinished = Unfinished(run, [fixed, files, data, loader.features.sounds(ids).tolist(), weights_hash(model)])
    on_begin(len(unfinished.points), unfinished.path)

    def measure(weights: dict[str, float]) -> tuple[float, float]:
        if (done := unfinished.get(weights)) is not None:
            return done
        options = {_option(name): value for name, value in weights.items()}
        words.weight = options.pop("lm_weight", words.weight)
        pairs = [(h.ref, h.hyp) for h in decoded(partial(search, **options))]
        tables = [error_counts(*zip(*pairs), characters=characters) for characters in (False, True)]
        wer, cer = (float(t[:, :3].sum() / max(1, t[:, 3].sum())) for t in tables)
        unfinished.add(TunedPoint(weights=weights, wer=wer, cer=cer))
        return wer, cer

    points = []
    for point in tune(names, measure):
        points.append(point)
        on_point(point)
    best = min(points, key=lambda point: point.rank)
    choice = Tuned(
        lm=str(settings["lm"]),
        lm_sha256=digest,
        **{name: settings[name] for name in ("lm_unit", "beam", "max_symbols")},
        **vars(best) | {"weights": {**given, **best.weights}},
        hotwords=None if hotwords is None else str(hotwords),
        utterances=len(loader.utterances),
        points=[TunedPoint(**vars(point)) for point in points],
        **of,
    )
    file = keep_tuned(run, choice)
    unfinished.end()
    return choice, file


def _option(name: str) -> str:
    return name.replace("-", "_")
