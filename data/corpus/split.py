"""Train, dev and test splits by group: all utterances of a speaker, a session or a prompt are in one split.

Guarantees: the split of a group depends on the seed, its name and the shares alone. It stays when the corpus grows.
Try: `stillhouse corpus split corpus.jsonl --by prompt --dev 5% --test 10%`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import blake2b

from ..errors import ConfigError, CorpusError
from ..manifest import Corpus, Utterance

FIELDS = ("speaker", "session", "id", "text")


def is_test(split: str | None) -> bool:
    """Return whether a split is named as one to measure on, such as test, test-clean, dev_test or eval2000."""
    return re.search(r"(?<![a-z])(test|eval)", (split or "").casefold()) is not None


def is_held_out(split: str | None) -> bool:
    """Return whether a split is named as one that no model learns from: those of `is_test`, and dev or validation."""
    name = (split or "").casefold()
    return (
        is_test(split)
        or re.search(r"(?<![a-z])(dev|development|valid|validation)(?![a-z])|held.?out", name) is not None
    )


def parse_share(text: str) -> float:
    """Return "5%" or "0.05" as a number from 0 to 1. Raises ConfigError for another text."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise ConfigError(f"the share is {text!r}", expected="something like 5% or 0.05")
    return share


def group_of(utterance: Utterance, by: str) -> str | None:
    """Return the group of an utterance: a field of FIELDS, else a column of its meta."""
    return getattr(utterance, by) if by in FIELDS else utterance.meta.get(by)


def split_corpus(
    corpus: Corpus,
    by: str,
    dev: float,
    test: float,
    seed: int = 0,
    only: Sequence[str] | None = None,
    names: tuple[str, str, str] = ("train", "dev", "test"),
    text: str | None = None,
) -> list[Utterance]:
    """Return all utterances with their split set. `by` makes the groups, see `group_of`.

    `dev` and `test` are shares of the groups, met on average. With `only`, the utterances of these splits alone change.
    `text` is the split of all utterances without audio, which then need no group.
    Raises CorpusError if an utterance has no group, or if no group is in a split with a share above 0.
    """
    if dev + test >= 1:
        raise ConfigError(f"dev {dev:g} and test {test:g} leave nothing to train on", expected="less than 1 together")
    chosen = corpus.utterances if only is None else corpus.select(",".join(only)).utterances
    silent = {u.id for u in chosen if u.audio is None} if text is not None else set()
    chosen = [u for u in chosen if u.id not in silent]
    if not chosen:
        what = "no utterance has audio, so there is nothing to split"
        raise CorpusError(what, where=corpus.path, expected="no --text, which names the split of text without audio")
    without = [u for u in chosen if not group_of(u, by)]
    if without:
        columns = sorted({name for u in chosen for name in u.meta})
        what = f"{len(without)} utterances have no {by}, for example {without[0].id}"
        mute = sum(u.audio is None for u in without)
        remedy = f"{mute} of them are text without audio. Name their split with --text NAME" if mute else None
        expected = "one of " + ", ".join([*FIELDS, *columns])
        raise CorpusError(what, where=corpus.path, expected=expected, remedy=remedy)
    splits: dict[str, str] = {}
    for u in chosen:
        group = group_of(u, by) or ""
        # A number from 0 to 1 that depends on the group and the seed alone.
        at = int.from_bytes(blake2b(f"{seed}\0{group}".encode(), digest_size=8).digest(), "big") / 2**64
        splits[group] = names[2] if at < test else names[1] if at < test + dev else names[0]
    for name, share in zip(names, (1 - dev - test, dev, test), strict=True):
        if share > 0 and name not in splits.values():
            what = f"no {by} is in {name}: there are {len(splits)} in all"
            raise CorpusError(what, where=corpus.path, remedy="ask for a larger share, or try another --seed")
    split_of: dict[str, str | None] = {u.id: splits[group_of(u, by) or ""] for u in chosen}
    split_of |= dict.fromkeys(silent, text)
    return [u.model_copy(update={"split": split_of[u.id]}) if u.id in split_of else u for u in corpus.utterances]
