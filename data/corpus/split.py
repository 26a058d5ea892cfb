"""Train, dev and test splits by group: all utterances of a speaker, a session or a prompt are in one split.

Guarantees: the split of a group depends on the seed, its name and the shares alone. It stays when the corpus grows.
Try: `stillhouse corpus split corpus.jsonl --by prompt --dev 5% --test 10%`.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from ..errors import ConfigError, CorpusError
from ..manifest import Corpus, Utterance

FIELDS = ("speaker", "session", "id", "text")


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
) -> list[Utterance]:
    """Return all utterances with their split set. `by` makes the groups, see `group_of`.

    `dev` and `test` are shares of the groups, met on average. With `only`, the utterances of these splits alone change.
    Raises CorpusError if an utterance has no group, or if no group is in a split with a share above 0.
    """
    if dev + test >= 1:
        raise ConfigError(f"dev {dev:g} and test {test:g} leave nothing to train on", expected="less than 1 together")
    chosen = corpus.utterances if only is None else corpus.select(",".join(only)).utterances
    without = [u.id for u in chosen if not group_of(u, by)]
    if without:
        columns = sorted({name for u in chosen for name in u.meta})
        what = f"{len(without)} utterances have no {by}, for example {without[0]}"
        raise CorpusError(what, where=corpus.path, expected="one of " + ", ".join([*FIELDS, *columns]))
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
    ids = {u.id for u in chosen}
    return [
        u.model_copy(update={"split": splits[group_of(u, by) or ""]}) if u.id in ids else u for u in corpus.utterances
    ]
