"""Train, dev and test by groups: a speaker, a session, a prompt is on one side only.

Invariant: a group's side depends on the seed, its name and the shares alone, so it stays when the corpus grows.
Exercised by `stillhouse corpus split CORPUS --by prompt --dev 5% --test 10%`.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

from ..errors import ConfigError, CorpusError
from ..manifest import Corpus, Utterance

FIELDS = ("speaker", "session", "id", "text")


def parse_share(text: str) -> float:
    """ "5%" or "0.05" as a number from 0 to 1."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise ConfigError(f"a share of {text!r}", expected="something like 5% or 0.05")
    return share


def group_of(utterance: Utterance, by: str) -> str | None:
    """The group of an utterance: a field of FIELDS, else a column of its meta."""
    return getattr(utterance, by) if by in FIELDS else utterance.meta.get(by)


def place(group: str, seed: int) -> float:
    """A number from 0 to 1 that belongs to this group for this seed."""
    return int.from_bytes(blake2b(f"{seed}\0{group}".encode(), digest_size=8).digest(), "big") / 2**64


def split_corpus(
    corpus: Corpus,
    by: str,
    dev: float,
    test: float,
    seed: int = 0,
    only: Sequence[str] | None = None,
    names: tuple[str, str, str] = ("train", "dev", "test"),
) -> list[Utterance]:
    """The utterances with their split set.

    dev, test: shares of the groups, met on average. only: touch the utterances of these splits alone, and leave the
    others as they are. Raises CorpusError where an utterance has no group, or a share that was asked for got none.
    """
    if dev + test >= 1:
        raise ConfigError(f"dev {dev:g} and test {test:g} leave nothing to train on", expected="less than 1 together")
    chosen = corpus.utterances if only is None else corpus.select(",".join(only)).utterances
    without = [u.id for u in chosen if not group_of(u, by)]
    if without:
        columns = sorted({name for u in chosen for name in u.meta})
        raise CorpusError(
            f"{len(without)} utterances have no {by}, {without[0]} for one",
            where=corpus.path,
            expected="one of " + ", ".join([*FIELDS, *columns]),
        )
    sides: dict[str, str] = {}
    for u in chosen:
        group = group_of(u, by) or ""
        at = place(group, seed)
        sides[group] = names[2] if at < test else names[1] if at < test + dev else names[0]
    for name, share in zip(names, (1 - dev - test, dev, test), strict=True):
        if share > 0 and name not in sides.values():
            raise CorpusError(
                f"no {by} fell to {name}: there are {len(sides)} in all",
                where=corpus.path,
                remedy="ask for a larger share, or try another --seed",
            )
    ids = {u.id for u in chosen}
    return [
        u.model_copy(update={"split": sides[group_of(u, by) or ""]}) if u.id in ids else u for u in corpus.utterances
    ]
