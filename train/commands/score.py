"""The command `stillhouse score`. Run `stillhouse score --help`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...data.commands.paths import PATH

if TYPE_CHECKING:
    from ..score.scoring import Scored
    from ..score.significance import SystemComparison


@click.command()
@click.argument("hypotheses", type=PATH)
@click.option(
    "--transform",
    default="auto",
    show_default=True,
    help="Apply these to both texts, for example lower+no_punct, or those of a RUN. auto: drop case or "
    "punctuation that only the transcripts of another file have. none: compare as written.",
)
@click.option("--corpus", type=PATH, help="Manifest with the transcripts, and with the groups for --by.")
@click.option("--reference", type=PATH, help="Transcripts in another file than a manifest: stm, trn, text or NeMo's.")
@click.option(
    "--pair",
    "pairing",
    type=click.Choice(["ids", "lines"]),
    help="Pair two text files by the first word of each line, or line by line. [default: as they look]",
)
@click.option("--split", help="Score only this split of --corpus. [default: the splits that have a hypothesis]")
@click.option("--allow-missing", is_flag=True, help="Leave out utterances without a hypothesis. [default: deletions]")
@click.option("--by", help="Also score each speaker, session, split or value of a column of meta.")
@click.option("--against", type=PATH, help="Test the difference to other hypotheses of the same utterances.")
@click.option("--errors", "shown", type=click.IntRange(min=0), default=0, help="Show so many of the worst utterances.")
@click.option("--html", type=PATH, help="Write all errors to this HTML page.")
@click.option("--force", is_flag=True, help="Replace the file of --html, whatever it is.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")  # fmt: skip
def score(
    hypotheses: Path,
    transform: str,
    corpus: Path | None,
    reference: Path | None,
    pairing: str | None,
    split: str | None,
    allow_missing: bool,
    by: str | None,
    against: Path | None,
    shown: int,
    html: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Print WER and CER of HYPOTHESES, the output of `stillhouse decode`, with 95 % bootstrap intervals.

    The command reads JSON lines, trn, ctm, Kaldi's text and NeMo's predictions. The transcripts are those of --corpus
    or --reference, else those in HYPOTHESES. A transcript without a hypothesis counts as deleted.

    --against runs two tests: a paired bootstrap over utterances, and the matched-pairs test that sclite calls MAPSSWE.

    Example: stillhouse score hyp.jsonl --corpus corpus.jsonl --by speaker --html errors.html

    Example: stillhouse score hyp.ctm --reference ref.stm
    """
    from dataclasses import asdict

    from ...data.errors import UsageError
    from ...data.files.outputs import check_file, is_page
    from ..report.score import write_page
    from ..score.alignment import as_text, frequent_errors
    from ..score.groups import group_names, score_groups, worst_utterances
    from ..score.scoring import Scoring
    from ..score.wer import score as compute

    for option, value, needed in (("--by", by, corpus), ("--split", split, corpus), ("--pair", pairing, reference)):
        if value is not None and needed is None:
            expected = "--reference FILE" if option == "--pair" else f"--corpus corpus.jsonl {option} {value}"
            raise UsageError(f"{option} needs --{'reference' if option == '--pair' else 'corpus'}", expected=expected)
    if html is not None:
        check_file(html, (hypotheses, corpus, reference, against), own=is_page, force=force)
    scoring = Scoring(transform, corpus, reference, pairing, split, allow_missing)
    manifest = scoring.manifest
    scored = scoring.read(hypotheses)
    triples = scored.triples
    ids, refs, hyps = ([t[k] for t in triples] for k in range(3))
    for note in scored.notes:
        click.echo(note, err=True)
    result = compute(refs, hyps)
    groups = score_groups(group_names(manifest, ids, by), refs, hyps) if by is not None and manifest is not None else []
    comparison = None
    if against is not None:
        comparison = _compare(scored, scoring.read(against), against)
    wrong = worst_utterances(triples) if shown or html is not None else []
    if html is not None:
        pair = (str(against), comparison) if comparison is not None else None
        values = {"frequent": frequent_errors(u.pairs for u in wrong), "utterances": wrong, "groups": groups, "by": by}
        write_page(html, str(hypotheses), score=result, against=pair, **values)
    if as_json:
        facts: dict[str, Any] = {**asdict(result), "transform": scoring.applied, "missing": len(scored.missing)}
        facts |= {"missing_ids": scored.missing, "missing_scored": not allow_missing, "notes": scored.notes}
        if by is not None:
            facts |= {"by": by, "groups": [asdict(g) for g in groups]}
        if comparison is not None:
            facts |= {"against": str(against), "comparison": asdict(comparison)}
        if shown:
            facts["errors"] = [asdict(u) for u in wrong[:shown]]
            facts["frequent"] = frequent_errors(u.pairs for u in wrong)
        click.echo(json.dumps(facts, ensure_ascii=False))
        return
    for name, r in (("WER", result.wer), ("CER", result.cer)):
        click.echo(
            f"{name} {100 * r.rate:6.2f} %  [{100 * r.low:.2f}, {100 * r.high:.2f}]  "
            f"{r.substitutions} substituted, {r.deletions} deleted, {r.insertions} inserted of {r.reference}"
        )
    same = "as written" if scoring.applied == "none" else f"both texts after {scoring.applied}"
    click.echo(f"{result.utterances} utterances, {same}")
    if groups:
        click.echo(f"\n{by:24} {'utterances':>10} {'words':>8} {'WER %':>8} {'95 %':>16} {'CER %':>8}")
    for g in groups:
        interval = f"{100 * g.wer.low:.2f}–{100 * g.wer.high:.2f}"
        rates = f"{100 * g.wer.rate:8.2f} {interval:>16} {100 * g.cer.rate:8.2f}"
        name = g.name or "(none)"
        if len(name) > 24:  # It would make the line too long.
            click.echo(name)
            name = ""
        click.echo(f"{name:24} {g.utterances:10} {g.wer.reference:8} {rates}")
    if comparison is not None:
        c = comparison
        pairs = "too few" if c.p_matched_pairs is None else f"{c.p_matched_pairs:.4f}"
        click.echo(
            f"\nagainst {against}: WER {100 * c.difference:+.2f} points [{100 * c.low:+.2f}, {100 * c.high:+.2f}], "
            f"better in {c.better} utterances, worse in {c.worse}\n"
            f"p = {c.p_bootstrap:.4f} by paired bootstrap, {pairs} by matched pairs over {c.stretches} segments"
        )
    for u in wrong[:shown]:
        click.echo(f"\n{u.id}: {u.errors} errors, {100 * u.wer:.0f} %\n{as_text(u.pairs)}")
    if shown and wrong:
        names = {"S": "substituted", "D": "deleted", "I": "inserted"}
        click.echo("")
        for kind, rows in frequent_errors((u.pairs for u in wrong), 10).items():
            if rows:
                click.echo(f"{names[kind]}: " + ", ".join(f"{count} × {error}" for error, count in rows))


def _compare(first: Scored, second: Scored, path: Path) -> SystemComparison:
    """Compare two sets of hypotheses of the same references, whose alternatives each may read in its own way."""
    from ..score.significance import compare_systems, same_utterances

    written = [
        [(id, reference, hyp) for (id, _, hyp), reference in zip(scored.triples, scored.written, strict=True)]
        for scored in (first, second)
    ]
    hyps = same_utterances(written[0], written[1], path)
    readings = {id: ref for id, ref, _ in second.triples}
    ids, refs, mine = (list(column) for column in zip(*first.triples, strict=True))
    return compare_systems(refs, mine, hyps, second_references=[readings[id] for id in ids])
