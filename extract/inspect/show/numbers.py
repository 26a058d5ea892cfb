"""The text that people read for what is computed from states: the other half of rendering.py.

Invariant: fits the terminal, or 80 columns in a pipe, where ids and names allow it.
Exercised by: pytest tests/extract/inspect/test_numbers.py tests/extract/inspect/test_first_look.py -k columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .terminal import columns, pad, printable, share, table, tables, width, wrap

if TYPE_CHECKING:
    from ..facts.diff import StoreDifference
    from ..numbers.choose_views import Choice, Probed
    from ..numbers.neighbours import NeighbourComparison, Neighbours
    from ..numbers.similarity import Similarity
    from ..numbers.statistics import Statistics

MOST_NAMED = 8


def statistics(listed: Sequence[Statistics]) -> str:
    rows = []
    for s in listed:
        ratio = s.first_norm_mean / s.norm_mean if s.norm_mean else 0.0
        rows.append(
            (s.view, f"{s.norm_mean:.2f} ±{s.norm_std:.2f}", f"{ratio:.2f}x", f"{s.anisotropy:.3f}",
             f"{s.effective_rank:.0f} of {s.width}", len(s.dead), len(s.outliers), s.not_finite)
        )  # fmt: skip
    header = ("view", "norm", "first", "alike", "rank", "dead", "outliers", "NaN")
    lines = [table(rows, header=header, right="lrrrrrrr"), ""]
    for s in listed:
        if s.outliers:
            named = ", ".join(f"{d.dimension} (mean {d.mean:.2f}, rms {d.rms:.2f})" for d in s.outliers[:MOST_NAMED])
            lines.append(wrap(f"{s.view} outliers: {named}{_more(len(s.outliers))}", indent=2))
        if s.dead:
            lines.append(f"{s.view} dead: {', '.join(map(str, s.dead[:MOST_NAMED]))}{_more(len(s.dead))}")
        if s.int8_error is not None and s.int8_error_standardised is not None:
            lines.append(
                f"{s.view} int8 error: {s.int8_error:.2%} of the states, {s.int8_error_standardised:.2%} standardised"
            )
    tokens = ", ".join(dict.fromkeys(f"{s.tokens:,}" for s in listed))
    bounded = sorted({f"{s.rank_tokens:,}" for s in listed if s.rank_tokens < s.tokens})
    rank = f"effective, of {' or '.join(bounded)} tokens, which bounds it" if bounded else "effective"
    told = f"first: norm of first tokens over the others'; alike: mean cosine of two tokens; rank: {rank}; "
    lines.append(wrap(f"of {tokens} tokens a view; {told}first tokens are in none of the other columns"))
    return "\n".join(lines)


def _more(count: int) -> str:
    return f" and {count - MOST_NAMED} more" if count > MOST_NAMED else ""


def similarity(s: Similarity) -> str:
    count = len(s.views)
    names = [(f"{i}", view) for i, view in enumerate(s.views, start=1)]
    before = max(width(view) for view in s.views) + len(str(count)) + 2
    across = max(1, (columns() - before) // 6)
    drawn = []
    for first in range(0, count, across):  # below the diagonal, as many columns at a time as fit
        numbers = range(first, min(first + across, count))
        rows = [(*names[i], *(f"{s.cka[i][k]:.2f}" for k in numbers if k <= i)) for i in range(first, count)]
        header = ("", "linear CKA", *(str(k + 1) for k in numbers))
        drawn.append(table(rows, header=header, right="rl" + "r" * count))
    tables_ = "\n\n".join(drawn)
    return f"{tables_}\nat {s.places:,} tokens; 1: the same up to rotation and scale, 0: unrelated"


def choice(c: Choice) -> str:
    def row(p: Probed, rank: str) -> tuple[str, ...]:
        told = (f"{p.here_r2:.3f}", f"{p.here_accuracy:.1%}", f"{p.next_r2:.3f}", f"{p.next_accuracy:.1%}")
        return (p.view, *told, f"{p.score:.3f}", rank)

    ranks = {s.view: str(n) for n, s in enumerate(c.suggested, start=1)}
    rows = [row(p, ranks.get(p.view, "")) for p in [*c.views, *c.static]]
    if len(c.suggested) > 1:
        rows.append(row(c.together, "all"))
    rows.append(("the most frequent unit", "0", f"{c.chance_here:.1%}", "0", f"{c.chance_next:.1%}", "0", ""))
    header = ("view", "unit R²", "right", "next R²", "right", "score", "suggested")
    chosen = ", ".join(
        s.view + (f" (CKA {s.most_alike:.2f} with those before)" if n else "") for n, s in enumerate(c.suggested)
    )
    return "\n".join(
        [
            table(rows, header=header, right="lrrrrrr"),
            f"at {c.places:,} units of {c.utterances:,} utterances, {c.folds} folds by {c.folds_by}; TEACHER/static: "
            "the teacher's input embeddings",
            "",
            wrap(f"suggested  {chosen}", indent=11),
            wrap(f"rule       {c.rule}", indent=11),
        ]
    )


def neighbours(n: Neighbours) -> str:
    longest = max((width(x.utterance) for x in n.neighbours), default=0)
    beside = longest <= columns() // 2
    room = columns() - 7 - (longest + 2 if beside else 0)
    rows: list[str] = []
    for x in n.neighbours:
        sentence = around(x.sentence, x.begin, x.end, room)
        name = printable(x.utterance)
        told = f"{pad(name, longest)}  {sentence}" if beside else f"{name}\n       {sentence}"
        rows.append(f"{x.cosine:.3f}  {told}")
    sentence = around(n.sentence, n.begin, n.end, 4 * columns())
    head = f"{n.word!r} in {n.utterance} ({n.view}):\n{wrap(sentence)}\n"
    drawn = "\n".join(rows)
    return f"{head}\n{drawn}\n\nnearest of {n.searched:,} tokens by cosine"


def around(sentence: str, begin: int, end: int, most: int) -> str:
    """A window of the sentence with the word in brackets, no wider than `most` where the word allows it."""
    word = printable(f"[{sentence[begin:end]}]")
    left, right = printable(sentence[max(0, begin - most) : begin]), printable(sentence[end : end + most])
    room = max(0, most - width(word))
    cut = begin > most, len(sentence) - end > most
    left = _first(left[::-1], max(room // 2, room - width(right)), cut[0])[::-1]
    return left + word + _first(right, room - width(left), cut[1])


def _first(text: str, room: int, cut: bool) -> str:
    """As much of the beginning as fits, an ellipsis where something is left out."""
    if not cut and width(text) <= room:
        return text
    kept = ""
    left = room - 1
    for c in text:
        left -= width(c)
        if left < 0:
            break
        kept += c
    return kept + "…" if text or cut else ""


def compared(listed: Sequence[NeighbourComparison]) -> str:
    first = listed[0]
    rows = [
        (m.token, m.piece, *(cell for x in moved for cell in (f"{x.cosine:.3f}", f"{x.distance:.2f}")))
        for m, *moved in zip(first.tokens, *(c.tokens for c in listed))
    ]
    names = [c.b.split("/", 1)[1] for c in listed]
    header = ("#", "token", *(name for n in names for name in (f"cos {n}", "moved")))
    drawn = "\n\n".join(tables(rows, header=header, right="rl" + "rr" * len(names), keep=2, room=columns()))
    means = ", ".join(f"{c.b} {c.cosine:.3f}" for c in listed)
    told = wrap(f"mean cosine: {means}; moved: length of the difference over {first.a}'s")
    return f"against {first.a}\n{drawn}\n{told}"


def difference(d: StoreDifference) -> str:
    lines = [f"a  {d.a}", f"b  {d.b}"]
    for side, teachers, listed in (("a", d.teachers_only_a, d.views_only_a), ("b", d.teachers_only_b, d.views_only_b)):
        if teachers:
            lines.append(f"teachers only in {side}: {', '.join(teachers)}")
        if listed:
            lines.append(f"views only in {side}: {', '.join(listed)}")
    lines += [f"{s.teacher}: {s.setting} is {s.a} in a, {s.b} in b" for s in d.settings]
    u = d.utterances
    lines.append(f"{u.both:,} utterances in both, {u.only_a:,} only in a, {u.only_b:,} only in b")
    for count, ids, what in (
        (u.only_a, u.only_a_ids, "only in a"),
        (u.only_b, u.only_b_ids, "only in b"),
        (u.changed, u.changed_ids, "with another text"),
        (u.tokenised, u.tokenised_ids, "cut into other tokens"),
    ):
        if count:
            more = f" and {count - len(ids):,} more" if count > len(ids) else ""
            lines.append(f"{count:,} {what}: {', '.join(ids)}{more}")
    lines += [f"{h.view}: states of {h.a:,} tokens in a, of {h.b:,} in b" for h in d.held]
    if d.numbers:
        rows = [
            (n.view, f"{n.tokens:,}", share(round(n.equal * n.tokens), n.tokens), f"{n.largest:.3g}",
             f"{n.largest_share:.2g}", f"{n.cosine:.6f}")
            for n in d.numbers
        ]  # fmt: skip
        header = ("view", "tokens", "same bits", "largest", "of max |h|", "least cosine")
        lines += ["", table(rows, header=header, right="lrrrrr"), ""]
    lines.append("the same" if d.same else "they differ")
    return "\n".join(lines)
