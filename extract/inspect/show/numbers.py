"""Numbers that are computed from states, as text for people.

Guarantees: lines fit the terminal, or 80 columns in a pipe, unless an id or a name is longer.
Try: `stillhouse inspect stats STORE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, takewhile
from typing import TYPE_CHECKING

from ....data.errors import first_few
from .facts import counted
from .terminal import columns, fitted, pad, printable, share, table, tables, width, wrap

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
        first = f"{ratio:.2f}x" if s.first_tokens else ""
        rows.append(
            (s.view, f"{s.norm_mean:.2f} ±{s.norm_std:.2f}", first, f"{s.anisotropy:.3f}",
             f"{s.effective_rank:.0f} of {s.width}", len(s.dead), len(s.outliers), s.not_finite)
        )  # fmt: skip
    header = ("view", "norm", "first", "alike", "rank", "dead", "outliers", "NaN")
    lines = [fitted(rows, header=header, right="lrrrrrrr"), ""]
    for s in listed:
        if s.outliers:
            named = [f"{d.dimension} (mean {d.mean:.2f}, rms {d.rms:.2f})" for d in s.outliers]
            lines.append(wrap(f"{s.view} outliers: {first_few(named, MOST_NAMED)}", indent=2))
        if s.dead:
            lines.append(wrap(f"{s.view} dead: {first_few([str(d) for d in s.dead], MOST_NAMED)}", indent=2))
        pairs = {"int8": (s.int8_error, s.int8_error_standardised), "pq": (s.pq_error, s.pq_error_standardised)}
        for kind, (error, standardised) in pairs.items():
            if error is not None and standardised is not None:
                errors = f"{error:.2%} of the states, {standardised:.2%} standardised"
                lines.append(wrap(f"{s.view} {kind} error: {errors}", indent=2))
    tokens = ", ".join(dict.fromkeys(f"{s.tokens:,}" for s in listed))
    bounded = sorted({f"{s.rank_tokens:,}" for s in listed if s.rank_tokens < s.tokens})
    what = counted(listed)
    rank = f"effective rank of {' or '.join(bounded)} {what}, which bounds it" if bounded else "effective rank"
    legend = f"alike: mean cosine of two {what}; rank: {rank}"
    if any(s.first_tokens for s in listed):
        legend = f"first: norm of first tokens over the others'; {legend}; no other column counts first tokens"
    lines.append(wrap(f"{tokens} {what} of each view; {legend}"))
    return "\n".join(lines)


def similarity(s: Similarity) -> str:
    count, longest = len(s.views), max(map(width, s.views))
    names = [(f"{i}", view) for i, view in enumerate(s.views, start=1)]
    before = longest + len(str(count)) + 2
    drawn = []
    if longest > columns() // 2:  # Only numbers stand beside the numbers.
        drawn.append(table(names, right="r"))
        names, before = [(number, "") for number, _ in names], len(str(count)) + 12
    across = max(1, (columns() - before) // 6)
    for first in range(0, count, across):  # as many columns as fit; values above the diagonal would repeat
        numbers = range(first, min(first + across, count))
        rows = [(*names[i], *(f"{s.cka[i][k]:.2f}" for k in numbers if k <= i)) for i in range(first, count)]
        header = ("", "linear CKA", *(str(k + 1) for k in numbers))
        drawn.append(table(rows, header=header, right="rl" + "r" * count))
    places = "frames" if s.axis == "frame" else "tokens, without first tokens of decoders"
    legend = f"at {s.places:,} {places}; 1: the same up to rotation and scale, "
    return "\n\n".join(drawn) + "\n" + wrap(f"{legend}0: unrelated")


def choice(c: Choice) -> str:
    def row(p: Probed, rank: str) -> tuple[str, ...]:
        here, following = (f"{p.here_r2:.3f}", f"{p.here_accuracy:.1%}"), (f"{p.next_r2:.3f}", f"{p.next_accuracy:.1%}")
        return (p.view, *here, *following, f"{p.score:.3f}", rank)

    ranks = {s.view: str(n) for n, s in enumerate(c.suggested, start=1)}
    rows = [row(p, ranks.get(p.view, "")) for p in [*c.views, *c.static]]
    if len(c.suggested) > 1:
        rows.append(row(c.together, "all"))
    rows.append(("the most frequent unit", "0", f"{c.chance_here:.1%}", "0", f"{c.chance_next:.1%}", "0", ""))
    header = ("view", "unit R²", "correct", "next R²", "correct", "score", "suggested")
    chosen = ", ".join(
        s.view + (f" (CKA {s.most_alike:.2f} with those before)" if n else "") for n, s in enumerate(c.suggested)
    )
    sample = f"at {c.places:,} units of {c.utterances:,} utterances, {c.folds} folds by {c.folds_by}"
    drawn = fitted(rows, header=header, right="lrrrrrr")
    legend = "without first tokens of decoders; TEACHER/static: the teacher's input embeddings"
    advice = f"{wrap(f'suggested  {chosen}', indent=11)}\n{wrap(f'rule       {c.rule}', indent=11)}"
    return f"{drawn}\n{wrap(sample + '; ' + legend)}\n\n{advice}"


def neighbours(n: Neighbours) -> str:
    longest = max((width(x.utterance) for x in n.neighbours), default=0)
    beside = longest <= columns() // 2
    most = columns() - 7 - (longest + 2 if beside else 0)
    sentence = printable(n.sentence) if n.time_s is not None else around(n.sentence, n.begin, n.end, 4 * columns())
    lines = [wrap(f"{n.word!r} in {n.utterance} ({n.view}):", indent=2), wrap(sentence), ""]
    for x in n.neighbours:
        sentence, name = around(x.sentence, x.begin, x.end, most), printable(x.utterance)
        if x.time_s is not None:
            sentence = _first(f"at {x.time_s:.2f} s  {printable(x.sentence)}", most, len(x.sentence) > most)
        place = f"{pad(name, longest)}  {sentence}" if beside else f"{name}\n       {sentence}"
        lines.append(f"{x.cosine:.3f}  {place}")
    legend = f"nearest of {n.searched:,} tokens by cosine"
    if n.time_s is not None:
        legend = f"the nearest frame of each utterance by cosine, of {n.searched:,} frames"
    if n.first_tokens:
        legend += "; the word is a decoder's first token, whose state can be much the same in all texts"
    return "\n".join([*lines, "", wrap(legend)])


def around(sentence: str, begin: int, end: int, most: int) -> str:
    """Return a part of the sentence of `most` columns, or of a longer word, with the word in brackets."""
    word = printable(f"[{sentence[begin:end]}]")
    left, right = printable(sentence[max(0, begin - most) : begin]), printable(sentence[end : end + most])
    rest = max(0, most - width(word))
    left = _first(left[::-1], max(rest // 2, rest - width(right)), begin > most)[::-1]
    return left + word + _first(right, rest - width(left), len(sentence) - end > most)


def _first(text: str, most: int, cut: bool) -> str:
    """The beginning that fits into `most` columns, with an ellipsis if something is left out."""
    if not cut and width(text) <= most:
        return text
    ends = accumulate(map(width, text))
    kept = sum(1 for _ in takewhile(lambda end: end < most, ends))
    return text[:kept] + "…" if text or cut else ""


def compared(listed: Sequence[NeighbourComparison]) -> str:
    first = listed[0]
    rows = [
        (m.token, m.piece, *(cell for x in moved for cell in (f"{x.cosine:.3f}", f"{x.distance:.2f}")))
        for m, *moved in zip(first.tokens, *(c.tokens for c in listed))
    ]
    names = [c.b.split("/", 1)[1] for c in listed]
    kind = "token" if listed[0].axis == "token" else "begins"
    header = ("#", kind, *(name for n in names for name in (f"cos {n}", "moved")))
    drawn = "\n\n".join(tables(rows, header=header, right="rl" + "rr" * len(names), keep=2, most=columns()))
    means = ", ".join(f"{c.b} {c.cosine:.3f}" for c in listed)
    without = ", without a decoder's token 0" if first.axis == "token" else ""
    legend = wrap(f"mean cosine{without}: {means}; moved: norm of the difference over {first.a}'s norm")
    return f"compared with {first.a}\n{drawn}\n{legend}"


def difference(d: StoreDifference) -> str:
    lines = [f"a  {d.a}", f"b  {d.b}"]
    for side, teachers, listed in (("a", d.teachers_only_a, d.views_only_a), ("b", d.teachers_only_b, d.views_only_b)):
        if teachers:
            lines.append(wrap(f"teachers only in {side}: {', '.join(teachers)}", indent=2))
        if listed:
            lines.append(wrap(f"views only in {side}: {', '.join(listed)}", indent=2))
    lines += [wrap(f"{s.teacher}: {s.setting} is {s.a} in a, {s.b} in b", indent=2) for s in d.settings]
    u = d.utterances
    lines.append(f"{u.both:,} utterances in both, {u.only_a:,} only in a, {u.only_b:,} only in b")
    for count, ids, what in (
        (u.only_a, u.only_a_ids, "only in a"),
        (u.only_b, u.only_b_ids, "only in b"),
        (u.changed, u.changed_ids, "with another text"),
        (u.tokenised, u.tokenised_ids, "with other tokens"),
        (u.sounded, u.sounded_ids, "with other audio"),
    ):
        if count:
            more = f" and {count - len(ids):,} more" if count > len(ids) else ""
            lines.append(wrap(f"{count:,} {what}: {', '.join(ids)}{more}", indent=2))
    lines += [wrap(f"{h.view}: states of {h.a:,} {h.axis}s in a, of {h.b:,} in b", indent=2) for h in d.held]
    if d.numbers:
        rows = [
            (n.view, f"{n.tokens:,}", share(round(n.equal * n.tokens), n.tokens), f"{n.largest:.3g}",
             f"{n.largest_share:.2g}", f"{n.cosine:.6f}")
            for n in d.numbers
        ]  # fmt: skip
        header = ("view", counted(d.numbers), "same bits", "largest", "of max |h|", "least cosine")
        lines += ["", fitted(rows, header=header, right="lrrrrr"), ""]
    lines.append("the stores are equal" if d.same else "the stores differ")
    return "\n".join(lines)
