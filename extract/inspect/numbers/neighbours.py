"""Which tokens lie nearest to a word within a view: `neighbours`; how a word moves with context: `compare`.

Invariant: exact: every token of the view is compared, block by block, whatever the store's size.
Exercised by: `stillhouse inspect neighbours STORE UTT:WORD`, `stillhouse inspect compare STORE UTT --views A,B`.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ....data.errors import NoStoreError, UsageError
from ...store import Gathered, Store, View, to_float32
from ..facts.utterance import TokenFacts, plain, spelt, tokens_of
from ..sample import BLOCK_TOKENS, cut, sample_rows, states_at_once, unmap


@dataclass(frozen=True)
class Neighbour:
    """A token and where it is; `sentence` is spelt from the tokens, begin and end are the token's place in it."""

    cosine: float
    utterance: str
    token: int
    piece: str
    sentence: str
    begin: int
    end: int


@dataclass(frozen=True)
class Neighbours:
    view: str
    utterance: str
    word: str
    tokens: list[int]  # the word's tokens; their mean is what is looked for
    sentence: str
    searched: int
    neighbours: list[Neighbour]
    begin: int = 0  # of the word in the sentence
    end: int = 0


def words(tokens: Sequence[TokenFacts]) -> list[list[int]]:
    """Tokens by word: those whose spans touch or overlap belong to one."""
    found: list[list[int]] = []
    for i, token in enumerate(tokens):
        if found and token.begin <= tokens[found[-1][-1]].end:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def find_word(tokens: Sequence[TokenFacts], word: str, utterance: str) -> list[int]:
    """The tokens of the first word so spelt, or of the N-th (word#2); or the token of that number (word = "7").

    Errors: NoStoreError listing the words that there are.
    """
    if word.isdigit() and int(word) < len(tokens):
        return [int(word)]
    name, _, number = word.partition("#")
    spelled = {tuple(w): "".join(plain(tokens[i].piece) for i in w) for w in words(tokens)}
    # A token by itself may be meant, too: "staircase's" is one run of touching tokens
    matching = [list(w) for w, text in spelled.items() if text.casefold() == name.casefold()] or [
        [i] for i, t in enumerate(tokens) if plain(t.piece).casefold() == name.casefold()
    ]
    wanted = int(number) if number.isdigit() else 1
    if not 1 <= wanted <= len(matching):
        raise NoStoreError(f"no word {word!r}", where=utterance, expected=" ".join(spelled.values()) or "a word")
    return matching[wanted - 1]


def nearest(
    store: Store,
    view: View,
    utterance: str,
    word: str,
    count: int = 10,
    *,
    standardise: bool = False,
    same_utterance: bool = False,
    tokens: int | None = None,
    report: Callable[[View], None] | None = None,
) -> Neighbours:
    """The `count` tokens of largest cosine to a word, in other utterances (or in all).

    `standardise`: with the view's norms, so that outlier dimensions do not decide alone. `tokens`: look only in a
    sample of utterances that have about so many.
    """
    if not store.has([utterance], view)[0]:
        store.rows([utterance])
        raise NoStoreError(f"{utterance} is not extracted yet", where=view.address)
    own = tokens_of(store, utterance, view.teacher)
    which = find_word(own, word, utterance)
    dtype = store.teacher(view.teacher).dtype
    mean, std = store.norm(view) if standardise else (np.float32(0), np.float32(1))
    query = ((to_float32(store.gather([utterance], [view]).states[view][which], dtype) - mean) / std).mean(0)
    query /= max(float(np.linalg.norm(query)), 1e-30)
    rows = sample_rows(store, [view], tokens)
    if not same_utterance:
        rows = rows[rows != store.rows([utterance])[0]]
    # cosine = (x/s)·q / |x/s| - what of it the mean takes: one matrix product a block
    scaled, offset = query / std, float((mean / std * query).sum())

    def read() -> Iterator[tuple[np.ndarray, Gathered]]:
        for part in cut(store, view.teacher, rows, states_at_once(store, view.teacher, BLOCK_TOKENS)):
            gathered = store.gather([store.index.id(int(r)) for r in part], [view])
            unmap(store)
            yield part, gathered

    def score(block: tuple[np.ndarray, Gathered]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The block's best: cosines, rows of utterances, tokens in them."""
        part, gathered = block
        states = to_float32(gathered.states[view], dtype)
        compared = (states - mean) / std if standardise else states
        length = np.sqrt(np.einsum("nd,nd->n", compared, compared))
        cosine = (states @ scaled - offset) / np.maximum(length, 1e-30)
        best = np.argpartition(-cosine, min(count, len(cosine) - 1))[:count]
        lengths = gathered.lengths[view.teacher].astype(np.int64)
        ends = np.cumsum(lengths)
        of = np.searchsorted(ends, best, side="right")
        return cosine[best], part[of], best - (ends - lengths)[of]

    found: list[tuple[float, int, int]] = []
    for number, (cosine, of, token) in enumerate(_in_threads(score, read())):
        found = sorted([*found, *zip((-cosine).tolist(), of.tolist(), token.tolist())])[:count]
        if report is not None and number % 8 == 0:
            report(view)
    length = store.lengths(view.teacher)
    sentence, begin, end = marked(own, which[0])
    return Neighbours(
        view=view.address,
        utterance=utterance,
        word=" ".join(plain(own[i].piece) for i in which),
        tokens=which,
        sentence=sentence,
        searched=int(length[rows].sum()),
        neighbours=[_neighbour(store, view, -c, row, token) for c, row, token in found],
        begin=begin,
        end=end,
    )


def _in_threads(work: Callable, parts: Iterator) -> Iterator:
    """Results in the order of `parts`, on all cores, with no more than two blocks a core in memory.

    `parts` is read in this thread: a store's handles belong to one.
    """
    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        waiting: deque[Future] = deque()
        for part in parts:
            waiting.append(pool.submit(work, part))
            if len(waiting) >= 2 * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _neighbour(store: Store, view: View, cosine: float, row: int, token: int) -> Neighbour:
    utterance = store.index.id(row)
    tokens = tokens_of(store, utterance, view.teacher)
    sentence, begin, end = marked(tokens, token)
    return Neighbour(round(cosine, 6), utterance, token, tokens[token].piece, sentence, begin, end)


def marked(tokens: Sequence[TokenFacts], token: int) -> tuple[str, int, int]:
    """The sentence spelt from the tokens, and where in it the word of `token` is."""
    before = spelt([t for t in tokens[: _word_of(tokens, token)[0]]])
    word = spelt([tokens[i] for i in _word_of(tokens, token)])
    sentence = spelt(tokens)
    begin = len(before) + 1 if before else 0
    return sentence, begin, begin + len(word)


def _word_of(tokens: Sequence[TokenFacts], token: int) -> list[int]:
    return next(w for w in words(tokens) if token in w)


@dataclass(frozen=True)
class Moved:
    """A token in two views: the cosine of its states, and |a - b| / |a|."""

    token: int
    piece: str
    cosine: float
    distance: float


@dataclass(frozen=True)
class NeighbourComparison:
    a: str
    b: str
    cosine: float  # mean over the tokens
    tokens: list[Moved]


def compare(store: Store, utterance: str, views: Sequence[View]) -> list[NeighbourComparison]:
    """Each other view against the first, token by token. They must be views of one teacher.

    Errors: UsageError for views of several teachers or fewer than two; NoStoreError for what is not there.
    """
    if len(views) < 2:
        raise UsageError(f"{len(views)} views to compare", expected="two at least, as in --views minilm/*/6")
    teachers = {v.teacher for v in views}
    if len(teachers) > 1:
        raise UsageError(
            f"views of several teachers have different axes: {', '.join(sorted(teachers))}",
            remedy="stillhouse inspect similarity compares teachers",
        )
    teacher = views[0].teacher
    gathered, dtype = store.gather([utterance], views), store.teacher(teacher).dtype
    states = [to_float32(gathered.states[v], dtype) for v in views]
    tokens = tokens_of(store, utterance, teacher)
    found = []
    for view, other in zip(views[1:], states[1:]):
        first = states[0]
        lengths = np.linalg.norm(first, axis=1), np.linalg.norm(other, axis=1)
        cosine = (first * other).sum(1) / np.maximum(lengths[0] * lengths[1], 1e-30)
        distance = np.linalg.norm(first - other, axis=1) / np.maximum(lengths[0], 1e-30)
        moved = [Moved(i, t.piece, c, d) for i, (t, c, d) in enumerate(zip(tokens, cosine.tolist(), distance.tolist()))]
        mean = float(cosine.mean()) if len(cosine) else 1.0
        found.append(NeighbourComparison(views[0].address, view.address, mean, moved))
    return found
