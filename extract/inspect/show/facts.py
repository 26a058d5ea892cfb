"""Facts as text for people.

Guarantees: lines fit the terminal, or 80 columns in a pipe, unless an id or a name is longer.
Try: `stillhouse inspect info STORE`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .terminal import columns, fitted, pad, pairs, share, size, table, tables, width, wrap

if TYPE_CHECKING:
    from ..facts.diff import NumbersDiffer
    from ..facts.export import ExportedStates
    from ..facts.store import StoreFacts, TeacherFacts, UtteranceFacts, Verified, ViewFacts
    from ..facts.tree import Node
    from ..facts.utterance import Shown, ShownTeacher
    from ..numbers.statistics import Statistics


KINDS = {"encoder": "bidirectional encoder", "decoder": "causal decoder", "speech": "speech encoder"}


def counted(listed: Sequence[ViewFacts] | Sequence[Statistics] | Sequence[NumbersDiffer]) -> str:
    """Return what the states of views are of: tokens, frames, or both."""
    return " or ".join(sorted({f"{v.axis}s" for v in listed}, reverse=True)) or "tokens"


def store(s: StoreFacts) -> str:
    complete, planned = sum(t.views for t in s.teachers), sum(t.views_planned for t in s.teachers)
    done, items = sum(t.work_items for t in s.teachers), sum(t.work_items_planned for t in s.teachers)
    state = "complete" if s.complete else f"not finished: {share(done, items)} of the work items"
    rows: list[tuple[str, str]] = [
        ("store", f"{s.path} (format {s.version}, made {s.created})"),
        ("state", f"{state}; {complete} of {planned} views"),
        ("corpus", f"{s.utterances:,} utterances in {s.sessions:,} sessions"),
        ("size", f"{size(s.bytes)}, of which states {size(s.hidden_bytes)}"),
        *(("behind", text) for text in _behind({t.name: t.behind for t in s.teachers})),
        *(("batches", text) for text in _uncompared(s.teachers)),
        ("made with", ", ".join(f"{k} {v}" for k, v in s.versions.items())),
    ]
    return "\n\n".join([pairs(rows), *(_teacher(t) for t in s.teachers)])


def _teacher(t: TeacherFacts) -> str:
    kind = KINDS.get(t.kind, t.kind)
    text = "the transcripts as they are" if t.transform == "none" else f"the transcripts through {t.transform}"
    join = f", utterances joined by {t.join!r}" if t.join else ""
    space = {"no": "", "yes": ", a space before each"}.get(
        t.leading_space, ", a space before each if its script has spaces"
    )
    revision = "" if t.revision is None else f" at {t.revision}"
    error = "" if t.int8_error is None else f" (error {t.int8_error:.2%} at most)"
    if t.pq_error is not None and t.pq_error_standardised is not None:
        error = f" (error {t.pq_error:.1%} of the states, {t.pq_error_standardised:.1%} standardised at most)"
    if t.axis == "frame":
        heard = [("  hears", f"audio at {t.sample_rate_hz:,} Hz; up to {t.window / t.rate_hz:.4g} s a pass")]
        hours = f"{t.tokens / t.rate_hz / 3600:,.2f} h"
        count = ("  frames", f"{t.tokens:,}, {t.rate_hz:g} in a second: {hours}; the first at {t.offset_s:.4g} s")
    else:
        heard = [
            ("  saw", f"{text}{space}{join}; up to {t.window} tokens a pass"),
            ("  contexts", ", ".join(t.contexts)),
        ]
        count = ("  tokens", f"{t.tokens:,}, of a vocabulary of {t.vocabulary:,}")
    rows = [
        ("teacher", t.name),
        ("  model", f"{t.architecture}, {kind}, {t.depth} layers, {t.width} wide"),
        ("  from", f"{t.model}{revision}"),
        *([("  about", t.about)] if t.about else []),
        *heard,
        ("  layers", ", ".join(map(str, sorted(t.layers)))),
        count,
        ("  numbers", f"{t.dtype}{error}, computed in {t.model_dtype}; {size(t.hidden_bytes)}"),
        ("  done", f"{t.work_items:,} of {t.work_items_planned:,} work items; {t.views} of {t.views_planned} views"),
    ]
    return pairs(rows)


def views(listed: Sequence[ViewFacts]) -> str:
    rows = [
        (v.view, share(v.tokens, v.tokens_planned), f"{v.utterances:,}", f"{v.tokens:,}", size(v.bytes),
         "complete" if v.complete else "norms missing" if v.tokens == v.tokens_planned else "not complete")
        for v in listed
    ]  # fmt: skip
    drawn = fitted(rows, header=("view", "done", "utterances", counted(listed), "states", ""), right="lrrrr")
    return "\n".join([drawn, *(wrap(text, indent=2) for text in _behind({v.teacher: v.behind for v in listed}))])


def _uncompared(teachers: Sequence[TeacherFacts]) -> list[str]:
    from ...store.verify.stale import uncompared_text

    return [uncompared_text(t.name) for t in teachers if not t.compared]


def _behind(teachers: dict[str, int]) -> list[str]:
    from ...store.verify.stale import behind_text

    return [behind_text(name, count) for name, count in teachers.items() if count]


def utterances(listed: Sequence[UtteranceFacts]) -> str:
    texts, speech = (list(listed[0].tokens), list(listed[0].frames)) if listed else ([], [])
    rows = [
        (u.utterance, u.session, *(f"{u.tokens[t]:,}" for t in texts), *(f"{u.frames[t]:,}" for t in speech),
         f"{u.views} of {u.views_planned}")
        for u in listed
    ]  # fmt: skip
    header = ("utterance", "session", *(f"{t} tokens" for t in texts), *(f"{t} frames" for t in speech), "views")
    return fitted(rows, header=header, right="l" + "r" * (len(header) - 1))


def shown(s: Shown) -> str:
    place = f"number {s.session_row + 1} of {s.session_utterances} in session {s.session}, row {s.row}"
    source = {
        "tokens": "\n(spelt from the tokens; --corpus shows the transcript itself)",
        "nothing": "(no text teacher has its text; --corpus shows it)",
    }.get(s.text_from, "")
    head = f"{wrap(f'{s.utterance}: {place}', indent=2)}\n{wrap(s.text)}{source}"
    return "\n\n".join([head, *(_shown_teacher(t) for t in s.teachers)])


def _shown_teacher(t: ShownTeacher) -> str:
    if t.behind:
        return wrap(
            f"{t.name}: not from this text; extract CORPUS STORE --refresh, with this teacher, extracts it again"
        )
    parts = [f"{t.name}: {len(t.frames)} frames" if t.frames else f"{t.name}: {len(t.tokens)} tokens"]
    parts += [f"  {c.context} saw {c.left} tokens before and {c.right} after" for c in t.contexts]
    parts += [f"  damaged: {v.view}: {v.problem}" for v in t.views if v.problem is not None]
    missing = [v.view for v in t.views if not v.held and v.problem is None]
    if missing:
        parts.append(wrap(f"  not extracted yet: {', '.join(missing)}", indent=4))
    extracted = [v for v in t.views if v.held]
    with_text = bool(t.tokens) and t.tokens[0].text is not None
    # The teacher's name is above the tables, so the columns have context and layer only.
    names = [v.view.split("/", 1)[1] for v in extracted]
    norms = [[f"{v.norms[i]:.2f}" for v in extracted] for i in range(len(t.frames or t.tokens))]
    if t.frames:
        header: tuple[str, ...] = ("#", "seconds", *names)
        rows = [(i, f"{f.begin_s:.3f}-{f.end_s:.3f}", *norms[i]) for i, f in enumerate(t.frames)]
    else:
        header = ("#", "token", "span", *(["text"] if with_text else []), *names)
        rows = [
            (i, k.piece, f"{k.begin}:{k.end}", *([k.text] if with_text else []), *norms[i])
            for i, k in enumerate(t.tokens)
        ]
    keep = len(header) - len(names)
    sides = "r" + "l" * (keep - 1) + "r" * len(extracted)
    parts += [f"\n{drawn}" for drawn in tables(rows, header=header, right=sides, keep=keep, most=columns())]
    if extracted:
        parts.append("norm of each state, by context/layer")
    for v in extracted:
        if v.values is not None:
            parts.append(f"\n{v.view}")
            parts += [" ".join(f"{x:.5g}" for x in row) for row in v.values]
    return "\n".join(parts)


def verified(v: Verified) -> str:
    lines = [f"{m.how}: {m.unit} ({'; '.join(f.what for f in m.findings)})" for m in v.mended]
    lines += [f"{f.where}: {f.what}; {f.remedy}" for f in v.findings]
    lines += [f"{place}: the copy in the cache was damaged; it has been fetched again" for place in v.renewed]
    read = f", {v.data:.4g} of their utterances read" if v.data else ", states not read (--data reads them)"
    if v.data >= 1:
        read = ", every byte of them read"
    state = "" if v.complete else "; the extraction is not finished"
    count = len(v.findings) or "no"
    if v.unchecked:
        lines.append(f"not checked, because they were written without checksums: {'; '.join(v.unchecked)}")
    lines += [wrap(text, indent=2) for text in _behind(v.behind)]
    committed = f"{v.work_items:,} of {v.work_items_planned:,} work items are committed{read}"
    findings = "finding" if count == 1 else "findings"
    lines.append(wrap(f"{v.path}: {committed}: {count} {findings}{state}", indent=2))
    return "\n".join(lines)


def tree(path: str, nodes: Sequence[Node]) -> str:
    rows, abouts = [], [""]
    for n in nodes:
        name = "  " * (n.depth + 1) + n.path.rsplit("/", 1)[-1] + ("/" if n.kind in ("folder", "group") else "")
        about = n.about or ""
        if n.kind == "array":
            axes = n.dimensions or ["?"] * len(n.shape or [])
            about = f"{n.dtype} [" + ", ".join(f"{a} {s:,}" for a, s in zip(axes, n.shape or [])) + "]"
        rows.append((name, f"{n.files:,}", size(n.bytes)))
        abouts.append(about)
    drawn = table(rows, header=("", "files", "size"), right="lrr").splitlines()
    left = max(map(width, drawn)) + 2
    lines = (wrap(pad(line, left) + about, indent=left).rstrip() for line, about in zip(drawn, abouts))
    return "\n".join([path, *lines])


def exported(e: ExportedStates) -> str:
    counts = [f"{n:,} tokens of {name}" for name, n in e.tokens.items()]
    tokens = ", ".join(counts + [f"{n:,} frames of {name}" for name, n in e.frames.items()])
    left_out = f"; {e.left_out:,} utterances without all these views left out" if e.left_out else ""
    what = f"{e.utterances:,} utterances, {tokens}, {len(e.views)} views, {size(e.bytes)}{left_out}"
    return wrap(f"{e.path}: {what}", indent=2)
