"""N-gram models of a text: interpolated Kneser-Ney smoothing with three discounts an order, as KenLM's lmplz.

Chen and Goodman 1998, "An Empirical Study of Smoothing Techniques for Language Modeling", modified Kneser-Ney. N-grams
of the highest order, and those at the beginning of a sentence, count as often as they occur. Shorter ones count as many
different words as they follow.

Guarantees: the probabilities of all words, the end and the unknown word sum to 1 in every context, pruned or not.
Try: `stillhouse corpus ngram corpus.jsonl words.arpa --order 3`.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ....data.errors import CorpusError, UsageError
from ..ngram import NEVER, NGram

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
# The discounts of an order that has too few n-grams to estimate them, those of `lmplz --discount_fallback`.
USUAL = (0.5, 1.0, 1.5)


@dataclass(frozen=True)
class OrderCounts:
    """The distinct n-grams of one order, by ascending key: prefix * V + last word, as in `NGram`."""

    keys: np.ndarray  # int64 [G]
    counts: np.ndarray  # int64 [G], how often each occurs
    suffix: np.ndarray  # int64 [G], the row of its last n - 1 words in the order below
    first: np.ndarray  # int64 [G], its first word


@dataclass(frozen=True)
class Counts:
    """The n-grams of some sentences. `words` begins with <s>, </s> and <unk>."""

    words: dict[str, int]
    orders: list[OrderCounts]
    sentences: int
    tokens: int  # words without the ends of sentences


@dataclass(frozen=True)
class Smoothed:
    """A model, and for each order its discounts of n-grams that occur once, twice and more often.

    `usual` names the orders whose discounts are USUAL.
    """

    lm: NGram
    discounts: list[tuple[float, float, float]]
    usual: list[int]


def count_ngrams(sentences: Iterable[Sequence[str]], order: int, where: object = None) -> Counts:
    """Count the n-grams of 1 to `order` words in sentences, with their begin and end. Empty sentences are left out.

    The word <unk> is the unknown word. Raises CorpusError for the words <s> and </s>, or if there is no word. It names
    the source `where`.
    """
    if order < 1:
        raise UsageError(f"an order of {order}", expected="1 or more")
    words = {BEGIN: 0, END: 1, UNKNOWN: 2}
    tokens, lengths = array("i"), array("i")
    for sentence in sentences:
        if not sentence:
            continue
        if BEGIN in sentence or END in sentence:
            what = f"a sentence has the word {BEGIN if BEGIN in sentence else END}, which marks where sentences are cut"
            remedy = "drop it with a transform such as --transform drop_marks+lower+no_punct+squeeze"
            raise CorpusError(what, where=" ".join(sentence)[:60], remedy=remedy)
        tokens.append(0)
        tokens.extend([words.setdefault(word, len(words)) for word in sentence])
        tokens.append(1)
        lengths.append(len(sentence) + 2)
    if not lengths:
        raise CorpusError("there is no word to count", where=where, expected="transcripts that are not empty")
    text, size = np.frombuffer(tokens, np.int32), len(words)
    ends = np.cumsum(np.frombuffer(lengths, np.int32), dtype=np.int64)
    behind = np.repeat(ends, np.frombuffer(lengths, np.int32)) - np.arange(1, len(text) + 1)  # tokens of the sentence
    orders = [
        OrderCounts(np.arange(size), np.bincount(text, minlength=size), np.zeros(size, np.int64), np.arange(size))
    ]
    rows = text.astype(np.int64)  # of the n-gram that begins at each token
    for n in range(2, order + 1):
        at = np.flatnonzero(behind >= n - 1)
        keys, inverse, counts = np.unique(rows[at] * size + text[at + n - 1], return_inverse=True, return_counts=True)
        suffix = np.zeros(len(keys), np.int64)
        suffix[inverse] = rows[at + 1]
        orders.append(OrderCounts(keys, counts, suffix, orders[-1].first[keys // size]))
        rows[at] = inverse
    return Counts(words, orders, len(lengths), len(text) - 2 * len(lengths))


def kneser_ney(counts: Counts, prune: Sequence[int] = ()) -> Smoothed:
    """Return the smoothed model of some counts.

    `prune` has a number for each order. N-grams that occur so often or less are dropped, and their probability goes to
    the shorter ones. The last number holds for all higher orders. Raises UsageError for numbers that fall, or if the
    first, that of words, is not 0.
    """
    limits = _limits(prune, len(counts.orders))
    size, discounts, usual = len(counts.words), [], []
    below = np.zeros(0)  # the probabilities of the order below, pruned n-grams included
    tables: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    rows = np.zeros(0, np.int64)  # of the n-grams of the order below in its table
    for n, order in enumerate(counts.orders, start=1):
        own = _adjusted(counts, n)
        three = estimated_discounts(own)
        if three is None:
            usual.append(n)
        discounts.append(three or USUAL)
        taken = np.array([0.0, *discounts[-1]])[np.minimum(own, 3)]
        kept = order.counts > limits[n - 1]
        kept[own == 0] = n == 1  # <s>, and <unk> where it does not occur
        context = order.keys // size if n > 1 else np.zeros(size, np.int64)
        taken = np.where(kept, taken, own)
        total = np.bincount(context, own)
        with np.errstate(divide="ignore", invalid="ignore"):
            rest = np.bincount(context, taken) / total  # what a context gives to the order below
        shorter = below[order.suffix] if n > 1 else np.full(size, 1 / (size - 1))
        below = (own - taken) / total[context] + rest[context] * shorter
        keys = order.keys
        if n == 1:
            below[0] = 0.0  # <s> is only ever a context.
        else:
            _set_backoff(tables[-1][2], rows, rest)
            keys = rows[context] * size + keys % size
        logp = np.log(below, out=np.full(len(below), NEVER), where=below > 0)
        tables.append((keys[kept], logp[kept], np.zeros(int(kept.sum()))))
        rows = np.where(kept, np.cumsum(kept) - 1, -1)
    return Smoothed(NGram(dict(counts.words), tables), discounts, usual)


def _limits(prune: Sequence[int], orders: int) -> list[int]:
    limits = [*(prune or [0])]
    if len(limits) > orders:
        what = f"--prune {','.join(map(str, prune))} has numbers for {len(limits)} orders, and the model has {orders}"
        raise UsageError(what, expected=f"{orders} numbers or fewer")
    limits += limits[-1:] * (orders - len(limits))
    if limits[0] != 0 or sorted(limits) != limits:
        given = ",".join(map(str, prune))
        raise UsageError(f"--prune {given}", expected="0 for single words, then numbers that do not fall, as in 0,0,1")
    return limits


def _adjusted(counts: Counts, n: int) -> np.ndarray:
    """Return int64 [G]: how often each n-gram counts. <s> is predicted nowhere, so that it counts 0."""
    order = counts.orders[n - 1]
    own = order.counts
    if n < len(counts.orders):
        before = np.bincount(counts.orders[n].suffix, minlength=len(own))  # different words in front of each
        own = np.where(order.first == 0, own, before)
    if n == 1:
        own = own.copy()
        own[0] = 0
    return own


def estimated_discounts(own: np.ndarray) -> tuple[float, float, float] | None:
    """Return the discounts of n-grams that count 1, 2, and 3 or more, from how many count 1 to 4.

    None if these are too few for discounts above 0 and of at most 1, 2 and 3.
    """
    one, two, three, four = (int((own == k).sum()) for k in (1, 2, 3, 4))
    if not (one and two and three):
        return None
    y = one / (one + 2 * two)
    found = 1 - 2 * y * two / one, 2 - 3 * y * three / two, 3 - 4 * y * four / three
    return found if all(0 < d <= k for k, d in enumerate(found, start=1)) else None


def _set_backoff(backoff: np.ndarray, rows: np.ndarray, rest: np.ndarray) -> None:
    """Set the back-off weights of contexts, in logarithms, from the share of each that goes to shorter n-grams."""
    context = np.flatnonzero(np.nan_to_num(rest) > 0)
    kept = rows[context] >= 0
    backoff[rows[context][kept]] = np.log(rest[context][kept])


def perplexity(lm: NGram, sentences: Iterable[Sequence[str]]) -> tuple[float, int, int]:
    """Return the perplexity of sentences, with their ends, and how many words they have and the model does not know.

    Unknown words do not count, but they are context. Empty sentences are left out.
    """
    total, scored, words, unknown = 0.0, 0, 0, 0
    for sentence in sentences:
        context = lm.start
        for word in [*sentence, END] if sentence else []:
            id = lm.words.get(word, lm.unknown)
            words += word != END
            if id is None or id == lm.unknown:
                unknown += 1
            else:
                total += lm.score(context, id)
                scored += 1
            context = () if id is None else lm.shortened((*context, id))
    return math.exp(-total / max(1, scored)), words, unknown
