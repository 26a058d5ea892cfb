"""The tokens nearest to a word, `inspect neighbours`, and how a word moves with context, `inspect compare`.

Guarantees: the search is exact. Every token of the view that is `counted`, or every frame, is compared, block by block,
whatever the store's size.
Try: `stillhouse inspect neighbours STORE UTT:WORD`, `stillhouse inspect compare STORE UTT --views A,B`.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ....data.errors import NoStoreError, UsageError
from ...store import Gathered, Store, View, to_float32
from ..facts.utterance import TokenFacts, newest_text, plain, spelt, tokens_of
from ..frames import count_frames, find_frame, frames_of, is_speech, middles
from ..sample import OnProgress, blocks, counted, ids_of, ignore, locate, read_states, sample_rows


@dataclass(frozen=True)
class Neighbour:
    cosine: float
    utterance: str
    token: int  # or frame
    piece: str
    sentence: str  # spelt from the tokens
    begin: int  # place of the token in the sentence
    end: int
    time_s: float | None = None  # the middle of a frame, which has no piece and no place in the sentence


@dataclass(frozen=True)
class Neighbours:
    view: str
    utterance: str
    word: str
    tokens: list[int]  # the word's tokens; the search is for the mean of their states, without a decoder's first token
    sentence: str
    searched: int
    neighbours: list[Neighbour]
    begin: int = 0  # place of the word in the sentence
    end: int = 0
    first_tokens: bool = False  # whether a decoder's first tokens are compared, too: only if the word is one
    time_s: float | None = None  # the middle of the frame that is searched for


def words(tokens: Sequence[TokenFacts]) -> list[list[int]]:
    """Group tokens into words: those whose spans touch or overlap."""
    grouped: list[list[int]] = []
    for i, token in enumerate(tokens):
        if grouped and token.begin <= tokens[grouped[-1][-1]].end:
            grouped[-1].append(i)
        else:
            grouped.append([i])
    return grouped


def find_word(tokens: Sequence[TokenFacts], word: str, utterance: str) -> list[int]:
    """Return the tokens of a word: "bank", "bank#2" for the second one, or "7" for the token of that number."""
    if word.isdigit() and int(word) < len(tokens):
        return [int(word)]
    name, _, number = word.partition("#")
    spelled = {tuple(w): "".join(plain(tokens[i].piece) for i in w) for w in words(tokens)}
    # "staircase" may also name a single token, because "staircase's" is one word of touching tokens.
    matching = [list(w) for w, text in spelled.items() if text.casefold() == name.casefold()] or [
        [i] for i, t in enumerate(tokens) if plain(t.piece).casefold() == name.casefold()
    ]
    ordinal = int(number) if number.isdigit() else 1
    if not 1 <= ordinal <= len(matching):
        raise NoStoreError(f"no word {word!r}", where=utterance, expected=" ".join(spelled.values()) or "a word")
    return matching[ordinal - 1]


def nearest(
    store: Store,
    view: View,
    utterance: str,
    word: str | float,
    count: int = 10,
    *,
    standardise: bool = False,
    same_utterance: bool = False,
    tokens: int | None = None,
    on_progress: OnProgress = ignore,
) -> Neighbours:
    """Find the `count` tokens whose states have the largest cosine with the mean state of a word (see `find_word`).

    For a speech teacher, `word` is a time in seconds, and of each utterance the frame nearest to that frame is found.
    With `standardise`, outlier dimensions do not decide alone. `tokens` limits the search to a sample of that size.
    Raises NoStoreError if the utterance is unknown or not extracted yet, or has no such word or time.
    """
    if not store.has([utterance], view)[0]:
        store.rows([utterance])
        raise NoStoreError(f"{utterance} is not extracted yet", where=view.address)
    speech = is_speech(store, view.teacher)
    own: list[TokenFacts] = []
    if isinstance(word, float):
        own_tokens = [find_frame(store, utterance, view.teacher, word)]
        length = count_frames(store, utterance, view.teacher)
    else:
        own = tokens_of(store, utterance, view.teacher)
        own_tokens, length = find_word(own, word, utterance), len(own)
    dtype = store.teacher(view.teacher).dtype
    mean, std = store.norm(view) if standardise else (np.float32(0), np.float32(1))
    # A word that is a decoder's first token alone is compared with all tokens.
    counts = counted(store, view.teacher, np.array([length]))
    every = not counts[own_tokens].any()
    of_query = [i for i in own_tokens if every or counts[i]]
    query = to_float32(store.gather([utterance], [view]).states[view][of_query], dtype)
    query = ((query - mean) / std).mean(0)
    query /= max(float(np.linalg.norm(query)), 1e-30)
    rows = sample_rows(store, [view], tokens)
    if not same_utterance:
        rows = rows[rows != store.rows([utterance], view.teacher)[0]]
    # With q the query and z = (x - mean) / std, z·q = x·(q/std) - mean·(q/std): one matrix product for each block.
    scaled, offset = query / std, float((mean / std * query).sum())

    def score(block: tuple[np.ndarray, Gathered]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cosines of the block's best tokens, the rows of their utterances, and their numbers there."""
        block_rows, gathered = block
        states = to_float32(gathered.states[view], dtype)
        compared = (states - mean) / std if standardise else states
        norm = np.sqrt(np.einsum("nd,nd->n", compared, compared))
        cosine = (states @ scaled - offset) / np.maximum(norm, 1e-30)
        if not every:
            cosine[~counted(store, view.teacher, gathered.lengths[view.teacher])] = -np.inf
        if speech:  # Neighbouring frames are much alike, so each utterance has one place in the list.
            ends = np.cumsum(gathered.lengths[view.teacher], dtype=np.int64)
            places = [a + int(cosine[a:b].argmax()) for a, b in pairwise([0, *ends.tolist()])]
        else:
            places = np.argpartition(-cosine, min(count, len(cosine) - 1))[:count].tolist()
        best = np.array(places)[np.argsort(-cosine[places], kind="stable")][:count]
        best = best[cosine[best] > -np.inf]
        return cosine[best], *locate(block_rows, gathered.lengths[view.teacher], best)

    best: list[tuple[float, int, int]] = []
    read = ((part, read_states(store, view, ids_of(store, part))) for part in blocks(store, view.teacher, rows))
    for number, (cosine, of, token) in enumerate(_in_threads(score, read)):
        best = sorted([*best, *zip((-cosine).tolist(), of.tolist(), token.tolist())])[:count]
        if number % 8 == 0:
            on_progress(view)
    sentence, begin, end = marked(own, own_tokens[0]) if own else (newest_text(store, utterance) or "", 0, 0)
    lengths = store.lengths(view.teacher)[rows]
    return Neighbours(
        view=view.address,
        utterance=utterance,
        word=" ".join(plain(own[i].piece) for i in own_tokens) if own else f"{word:g} s",
        tokens=own_tokens,
        sentence=sentence,
        searched=int(lengths.sum() if every else counted(store, view.teacher, lengths).sum()),
        neighbours=[_neighbour(store, view, -c, row, token) for c, row, token in best],
        begin=begin,
        end=end,
        first_tokens=every,
        time_s=_time(store, view, own_tokens[0]),
    )


def _in_threads(work: Callable, parts: Iterator) -> Iterator:
    """Results in the order of `parts`, with two parts per core in memory. A store's handles stay in this thread."""
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
    if is_speech(store, view.teacher):
        text, time_s = newest_text(store, utterance) or "", _time(store, view, token)
        return Neighbour(round(cosine, 6), utterance, token, "", text, 0, 0, time_s)
    tokens = tokens_of(store, utterance, view.teacher)
    return Neighbour(round(cosine, 6), utterance, token, tokens[token].piece, *marked(tokens, token))


def _time(store: Store, view: View, frame: int) -> float | None:
    """The middle of a frame in seconds; None for a token."""
    record = store.plan.teachers[view.teacher]
    return round(float(middles(record, frame)), 6) if record.is_speech else None


def marked(tokens: Sequence[TokenFacts], token: int) -> tuple[str, int, int]:
    """Return the sentence spelt from the tokens, and the begin and end of the word of `token` in it."""
    word = next(w for w in words(tokens) if token in w)
    before = spelt(tokens[: word[0]])
    begin = len(before) + 1 if before else 0
    return spelt(tokens), begin, begin + len(spelt([tokens[i] for i in word]))


@dataclass(frozen=True)
class Moved:
    token: int
    piece: str  # or the time at which a frame begins
    cosine: float  # of the token's states in a and b
    distance: float  # norm of their difference over the norm in a


@dataclass(frozen=True)
class NeighbourComparison:
    a: str
    b: str
    cosine: float  # mean over the tokens, without a decoder's first if there are others
    tokens: list[Moved]
    axis: str = "token"  # or "frame"


def compare(store: Store, utterance: str, views: Sequence[View]) -> list[NeighbourComparison]:
    """Compare each other view with the first, token by token. Raises UsageError unless one teacher has two views."""
    if len(views) < 2:
        raise UsageError(f"{len(views)} views to compare", expected="two at least, as in --views minilm/*/6")
    teacher, *others = dict.fromkeys(v.teacher for v in views)
    if others:
        what = f"views of several teachers have different axes: {', '.join([teacher, *others])}"
        raise UsageError(what, remedy="stillhouse inspect similarity compares teachers")
    gathered, dtype = store.gather([utterance], views), store.teacher(teacher).dtype
    first, *rest = (to_float32(gathered.states[v], dtype) for v in views)
    if is_speech(store, teacher):
        pieces = [f"{f.begin_s:.2f} s" for f in frames_of(store, utterance, teacher)]
    else:
        pieces = [t.piece for t in tokens_of(store, utterance, teacher)]
    norm = np.linalg.norm(first, axis=1)
    counts, comparisons = counted(store, teacher, np.array([len(pieces)])), []
    for view, other in zip(views[1:], rest):
        cosine = (first * other).sum(1) / np.maximum(norm * np.linalg.norm(other, axis=1), 1e-30)
        distance = np.linalg.norm(first - other, axis=1) / np.maximum(norm, 1e-30)
        moved = [Moved(i, *m) for i, m in enumerate(zip(pieces, cosine.tolist(), distance.tolist()))]
        kept = cosine[counts] if counts.any() else cosine
        mean = float(kept.mean()) if len(kept) else 1.0
        axis = store.plan.teachers[teacher].axis
        comparisons.append(NeighbourComparison(views[0].address, view.address, mean, moved, axis))
    return comparisons
