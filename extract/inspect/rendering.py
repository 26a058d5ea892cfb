"""The text that people read for each fact.

Invariant: fits 80 columns where ids and names allow it; the same text on a terminal and in a pipe.
Exercised by: pytest tests/inspect/test_commands.py.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .text import pad, pairs, printable, share, size, table, width, wrap

if TYPE_CHECKING:
    from .choosing import Choice, Probed
    from .differing import Difference
    from .exporting import Exported
    from .facts import StoreFacts, TeacherFacts, UtteranceFacts, Verified, ViewFacts
    from .layout import Node
    from .neighbours import Comparison, Neighbours
    from .showing import Shown, ShownTeacher
    from .similarity import Similarity
    from .statistics import Statistics

MOST_NAMED = 8
NORMS_ACROSS = 6  # views beside each other in a table of tokens


def store(s: StoreFacts) -> str:
    planned = sum(t.views_planned for t in s.teachers)
    complete = sum(t.views for t in s.teachers)
    units, units_planned = sum(t.units for t in s.teachers), sum(t.units_planned for t in s.teachers)
    state = "complete" if s.complete else f"in the making: {share(units, units_planned)} of the units of work"
    rows: list[tuple[str, str]] = [
        ("store", f"{s.path} (format {s.version}, made {s.created})"),
        ("state", f"{state}; {complete} of {planned} views"),
        ("corpus", f"{s.utterances:,} utterances in {s.sessions:,} sessions"),
        ("size", f"{size(s.bytes)}, of which states {size(s.hidden_bytes)}"),
        ("made with", ", ".join(f"{k} {v}" for k, v in s.versions.items())),
    ]
    return "\n\n".join([pairs(rows), *(_teacher(t) for t in s.teachers)])


def _teacher(t: TeacherFacts) -> str:
    kind = "bidirectional encoder" if t.kind == "encoder" else "causal decoder"
    text = "the transcripts as they are" if t.transform == "none" else f"the transcripts through {t.transform}"
    join = f", utterances joined by {t.join!r}" if t.join else ""
    revision = "" if t.revision is None else f" at {t.revision}"
    error = "" if t.int8_error is None else f" (error {t.int8_error:.2%} at most)"
    rows = [
        ("teacher", t.name),
        ("  model", f"{t.architecture}, {kind}, {t.depth} layers, {t.width} wide"),
        ("  from", f"{t.model}{revision}"),
        *([("  about", t.about)] if t.about else []),
        ("  saw", f"{text}{join}; up to {t.window} tokens a pass"),
        ("  contexts", ", ".join(t.contexts)),
        ("  layers", ", ".join(map(str, sorted(t.layers)))),
        ("  tokens", f"{t.tokens:,}, {t.vocabulary:,} different"),
        ("  numbers", f"{t.dtype}{error}, computed in {t.model_dtype}; {size(t.hidden_bytes)}"),
        ("  done", f"{t.units:,} of {t.units_planned:,} units of work; {t.views} of {t.views_planned} views"),
    ]
    return pairs(rows)


def views(listed: Sequence[ViewFacts]) -> str:
    rows = [
        (v.view, share(v.tokens, v.tokens_planned), f"{v.utterances:,}", f"{v.tokens:,}", size(v.bytes),
         "complete" if v.complete else "norms not fixed yet" if v.tokens == v.tokens_planned else "not complete")
        for v in listed
    ]  # fmt: skip
    return table(rows, header=("view", "done", "utterances", "tokens", "states", ""), right="lrrrr")


def utterances(listed: Sequence[UtteranceFacts]) -> str:
    teachers = list(listed[0].tokens) if listed else []
    rows = [
        (u.utterance, u.session, *(f"{u.tokens[t]:,}" for t in teachers), f"{u.views} of {u.views_planned}")
        for u in listed
    ]
    return table(
        rows, header=("utterance", "session", *(f"{t} tokens" for t in teachers), "views"), right="l" + "r" * 9
    )


def shown(s: Shown) -> str:
    where = f"number {s.session_row + 1} of {s.session_utterances} in session {s.session}, row {s.row}"
    source = "" if s.text_from == "corpus" else "\n(spelt from the tokens; --corpus shows the transcript itself)"
    head = f"{s.utterance}: {where}\n{wrap(s.text)}{source}"
    return "\n\n".join([head, *(_shown_teacher(t) for t in s.teachers)])


def _shown_teacher(t: ShownTeacher) -> str:
    parts = [f"{t.name}: {len(t.tokens)} tokens"]
    parts += [f"  {c.context} saw {c.left} tokens before and {c.right} after" for c in t.contexts]
    missing = [v.view for v in t.views if not v.held and v.problem is None]
    parts += [f"  damaged: {v.view}: {v.problem}" for v in t.views if v.problem is not None]
    if missing:
        parts.append(wrap(f"  not extracted yet: {', '.join(missing)}", indent=4))
    held = [v for v in t.views if v.held]
    for first in range(0, max(1, len(held)), NORMS_ACROSS):
        group = held[first : first + NORMS_ACROSS]
        # The teacher's name stands above the table
        names = [v.view.split("/", 1)[1] for v in group]
        rows = []
        for i, token in enumerate(t.tokens):
            text = [] if token.text is None else [token.text]
            norms = [f"{v.norms[i]:.2f}" for v in group]
            rows.append((i, token.piece, f"{token.begin}:{token.end}", *text, *norms))
        text_header = ["text"] if t.tokens and t.tokens[0].text is not None else []
        header = ("#", "token", "span", *text_header, *names)
        parts.append("\n" + table(rows, header=header, right="rll" + "l" * len(text_header) + "r" * len(names)))
        if group:
            parts.append("norm of each state, by context/layer")
    for v in held:
        if v.values is not None:
            parts.append(f"\n{v.view}")
            parts += [" ".join(f"{x:.5g}" for x in row) for row in v.values]
    return "\n".join(parts)


def verified(v: Verified) -> str:
    lines = [f"extracted again: {m.unit} ({'; '.join(f.what for f in m.findings)})" for m in v.mended]
    lines += [f"{f.where}: {f.what}; {f.remedy}" for f in v.findings]
    read = f", {v.data:.4g} of their utterances read" if v.data else ", states not read (--data reads them)"
    if v.data >= 1:
        read = ", every byte of them read"
    state = "" if v.complete else "; its extraction is not finished"
    count = len(v.findings)
    found = "no findings" if not count else "1 finding" if count == 1 else f"{count} findings"
    told = f"{v.path}: {v.units:,} of {v.units_planned:,} units of work are there{read}: {found}{state}"
    lines.append(wrap(told, indent=2))
    return "\n".join(lines)


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
    told = "first: norm of first tokens over the others'; alike: mean cosine of two tokens; rank: effective; "
    lines.append(wrap(f"of {tokens} tokens a view; {told}first tokens are in none of the other columns"))
    return "\n".join(lines)


def _more(count: int) -> str:
    return f" and {count - MOST_NAMED} more" if count > MOST_NAMED else ""


def similarity(s: Similarity) -> str:
    rows = [
        (f"{i + 1}", view, *(f"{x:.2f}" for x in row[: i + 1])) for i, (view, row) in enumerate(zip(s.views, s.cka))
    ]
    header = ("", "linear CKA", *(str(i + 1) for i in range(len(s.views))))
    drawn = table(rows, header=header, right="rl" + "r" * len(s.views))
    return f"{drawn}\nat {s.places:,} tokens; 1: the same up to rotation and scale, 0: unrelated"


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
            f"suggested  {chosen}",
            textwrap.fill(f"rule       {c.rule}", 100, subsequent_indent=" " * 11),
        ]
    )


def neighbours(n: Neighbours, columns: int) -> str:
    room = max(30, columns - 9 - max((width(x.utterance) for x in n.neighbours), default=0))
    rows = [(f"{x.cosine:.3f}", x.utterance, around(x.sentence, x.begin, x.end, room)) for x in n.neighbours]
    head = f"{n.word!r} in {n.utterance} ({n.view}):\n{printable(n.sentence)}\n"
    return f"{head}\n{table(rows)}\n\nnearest of {n.searched:,} tokens by cosine"


def around(sentence: str, begin: int, end: int, columns: int) -> str:
    """A window of the sentence with the word in brackets, no wider than `columns` where the word allows it."""
    word = f"[{sentence[begin:end]}]"
    left, right = sentence[:begin], sentence[end:]
    room = max(0, columns - width(word))
    keep = max(room // 2, room - width(right))
    while width(left) > keep:
        left = "…" + left.removeprefix("…")[1:]
        if left == "…":
            break
    while width(right) > max(0, room - width(left)):
        right = right.removesuffix("…")[:-1] + "…"
        if right == "…":
            break
    return printable(left + word + right)


def compared(listed: Sequence[Comparison]) -> str:
    first = listed[0]
    rows = [
        (m.token, m.piece, *(f"{x.cosine:.3f}" for x in moved), *(f"{x.distance:.2f}" for x in moved))
        for m, *moved in zip(first.tokens, *(c.tokens for c in listed))
    ]
    names = [c.b.split("/", 1)[1] for c in listed]
    header = ("#", "token", *(f"cos {n}" for n in names), *(f"moved {n}" for n in names))
    drawn = table(rows, header=header, right="rl" + "r" * 2 * len(names))
    means = ", ".join(f"{c.b} {c.cosine:.3f}" for c in listed)
    told = wrap(f"mean cosine: {means}; moved: length of the difference over {first.a}'s")
    return f"against {first.a}\n{drawn}\n{told}"


def tree(path: str, nodes: Sequence[Node]) -> str:
    rows, abouts = [], []
    for n in nodes:
        name = "  " * (n.depth + 1) + n.path.rsplit("/", 1)[-1] + ("/" if n.kind in ("folder", "group") else "")
        about = n.about or ""
        if n.kind == "array":
            axes = n.dimensions or ["?"] * len(n.shape or [])
            about = f"{n.dtype} [" + ", ".join(f"{a} {s:,}" for a, s in zip(axes, n.shape or [])) + "]"
        rows.append((name, f"{n.files:,}", size(n.bytes)))
        abouts.append(about)
    drawn = table(rows, header=("", "files", "size"), right="lrr").splitlines()
    room = max(map(width, drawn)) + 2
    told = (wrap(pad(line, room) + about, indent=room).rstrip() for line, about in zip(drawn, ["", *abouts]))
    return "\n".join([path, *told])


def exported(e: Exported) -> str:
    tokens = ", ".join(f"{n:,} tokens of {name}" for name, n in e.tokens.items())
    left = f"; {e.left_out:,} utterances without all these views left out" if e.left_out else ""
    return f"{e.path}: {e.utterances:,} utterances, {tokens}, {len(e.views)} views, {size(e.bytes)}{left}"


def difference(d: Difference) -> str:
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
