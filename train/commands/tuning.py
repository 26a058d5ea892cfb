"""`stillhouse decode --tune`: choose weights on held-out speech, keep them beside the run, and use them later.

Guarantees: no weights are kept before all points are measured. Weights on the command line come before kept ones.
Try: `stillhouse decode RUN CORPUS FEATURES --split dev --beam 8 --lm words.arpa --tune lm-weight,ilm-weight`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .live import say, write_data

WEIGHTS = ("lm-weight", "ilm-weight", "blank-penalty", "lm-unknown")


def check_request(names: str | None, settings: dict[str, Any], is_corpus: bool) -> list[str]:
    """Return the weights to tune, none without --tune. Raises UsageError if they cannot be tuned so."""
    from ...data.errors import UsageError
    from ..decode.lm.tune import parse_names

    if names is None:
        return []
    chosen = parse_names(names)
    if settings["lm"] is None:
        raise UsageError("--tune needs a language model", expected="--lm words.arpa, and perhaps --beam 8")
    if not is_corpus:
        raise UsageError("--tune needs a corpus with transcripts", expected="CORPUS and FEATURES")
    for name in _given_weights(settings).keys() & set(chosen):
        raise UsageError(f"--tune looks for --{name}", expected=f"no --{name}")
    return chosen


def kept_weights(run: Path, settings: dict[str, Any]) -> dict[str, float]:
    """Return the settings that --tune chose for this run and its --lm, unless the command line has weights."""
    from ..decode.lm.tuned import FILE, tuned_for

    if settings["lm"] is None:
        return {}
    if given := _given_weights(settings):
        if (run / FILE).exists():
            say(f"{run / FILE} is not used, because the command line has --{next(iter(given))}.")
        return {}
    choice = tuned_for(run, settings["lm"], settings["lm_unit"])
    if choice is None:
        return {}
    place = f"split {choice.split} of {choice.corpus}" if choice.split is not None else choice.corpus
    how = f"tuned with --beam {choice.beam} on {place} at step {choice.step} ({run / FILE})"
    say(f"The weights are {choice.words}, {how}.")
    then = {name: getattr(choice, name) for name in ("beam", "max_symbols", "hotwords")}
    here = {name: settings[name] for name in then} | {"hotwords": _name_of(settings["hotwords"])}
    if other := [name for name in then if then[name] != here[name]]:
        found = [f"--{n.replace('_', '-')} {then[n]}" if then[n] else f"no --{n}" for n in other]
        say(f"They were tuned with {' and '.join(found)}. With the options of this call, others may be better.")
    return {_option(name): value for name, value in choice.weights.items()}


def _name_of(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _option(name: str) -> str:
    return name.replace("-", "_")


def _given_weights(settings: dict[str, Any]) -> dict[str, float]:
    """Return the weights of the command line, by the names of their options."""
    source = click.get_current_context().get_parameter_source
    names = [n for n in WEIGHTS if source(_option(n)) == click.core.ParameterSource.COMMANDLINE]
    return {name: settings[_option(name)] for name in names}


def dev_split(corpus: Any, split: str | None, dev: str | None) -> str | None:
    """Return the split to tune on: `split`, else the `dev` split of the run. None for a corpus without splits.

    Raises UsageError if a split is named as a test set, or if no split is named and the corpus has not the run's.
    """
    from ...data.corpus.split import is_test
    from ...data.errors import UsageError

    known = {name for name in corpus.splits() if name is not None}
    chosen = split if split is not None else dev if dev in known else None
    for name in (chosen or "").split(","):
        if is_test(name.strip()):
            what = f"{name.strip()} is named as a split to measure on, whose error rates would be too low after tuning"
            raise UsageError(what, where=corpus.path, expected="a split of its own, such as --split dev")
    if chosen is None and known:
        expected = f"--split with one of {', '.join(sorted(known))}"
        raise UsageError("--tune needs the split of held-out speech", where=corpus.path, expected=expected)
    return chosen


def refuse_learnt(run: Path, loader: Any) -> None:
    """Raise UsageError if the run was trained on some of the transcripts that weights shall be tuned on."""
    from ...data.errors import UsageError, first_few
    from ..run.identity import learnt_texts

    if learnt := learnt_texts(run, loader):
        what = f"the run was trained on {len(learnt)} of the {len(loader.utterances)} utterances: {first_few(learnt)}"
        raise UsageError(what, where=run, expected="speech that it has not learnt, such as --split dev")


def tune_weights(
    run: Path,
    names: list[str],
    search: Callable,
    model: Any,
    loader: Any,
    decoded: Callable,
    settings: dict[str, Any],
    **of: Any,
) -> None:
    """Choose weights as `choose_weights` does, and print each point."""
    from ..decode.lm.choose import choose_weights

    def show(point: Any) -> None:
        values = "".join(f"{value:14g}" for value in point.weights.values())
        write_data(f"{values}{point.wer:9.2%} {point.cer:9.2%}")

    def begin(kept: int, path: Path) -> None:
        if kept:
            say(f"{kept} points were measured by a call that did not end ({path}).")
        write_data("".join(f"{name:>14}" for name in names) + f"{'WER':>10}{'CER':>10}")

    what: dict[str, Any] = {"given": _given_weights(settings), "on_begin": begin, "on_point": show, **of}
    choice, file = choose_weights(run, names, search, model, loader, decoded, settings, **what)
    say(
        f"{choice.words}: WER {choice.wer:.2%}, CER {choice.cer:.2%} of {choice.utterances} utterances, the best of "
        f"{len(choice.points)} points. `decode` takes these weights with the same --lm ({file})."
    )
