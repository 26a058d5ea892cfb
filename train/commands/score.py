"""The command `stillhouse score`. Run `stillhouse score --help`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

PATH = click.Path(path_type=Path)


@click.command()
@click.argument("hypotheses", type=PATH)
@click.option(
    "--transform", default="none", show_default=True, help="Apply these to both texts, for example lower+no_punct."
)
@click.option("--corpus", type=PATH, help="Manifest. It has the groups for --by, and transcripts for files without.")
@click.option("--by", help="Also score each speaker, session, split or value of a column of meta.")
@click.option("--against", type=PATH, help="Test the difference to other hypotheses of the same utterances.")
@click.option("--errors", "shown", type=click.IntRange(min=0), default=0, help="Show so many of the worst utterances.")
@click.option("--html", type=PATH, help="Write all errors to this HTML page.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def score(
    hypotheses: Path,
    transform: str,
    corpus: Path | None,
    by: str | None,
    against: Path | None,
    shown: int,
    html: Path | None,
    as_json: bool,
) -> None:
    """Print WER and CER of HYPOTHESES, the output of `stillhouse decode`, with 95 % bootstrap intervals.

    The command reads JSON lines. With --corpus it also reads files without transcripts: trn, ctm, Kaldi's text and
    the results of audio from a pipe.

    --against runs two tests: a paired bootstrap over utterances, and the matched-pairs test that sclite calls MAPSSWE.

    Example: stillhouse score hyp.jsonl --corpus corpus.jsonl --by speaker --html errors.html
    """
    from dataclasses import asdict

    from ...data.errors import UsageError
    from ...data.manifest import read_manifest
    from ...data.text import check_transform
    from ...data.text import transform as transformed
    from ..report.score import write_page
    from ..score.alignment import as_text, frequent_errors
    from ..score.groups import group_names, score_groups, worst_utterances
    from ..score.hypotheses import read_hypotheses
    from ..score.significance import compare_systems, same_utterances
    from ..score.wer import score as compute

    if by is not None and corpus is None:
        raise UsageError("--by needs --corpus", expected="--corpus corpus.jsonl --by speaker")
    check_transform(transform)
    manifest = read_manifest(corpus) if corpus is not None else None
    texts = {u.id: u.text for u in manifest.utterances} if manifest is not None else None

    def read(path: Path) -> list[tuple[str, str, str]]:
        triples = read_hypotheses(path, texts)
        return [(id, transformed(ref, transform).text, transformed(hyp, transform).text) for id, ref, hyp in triples]

    triples = read(hypotheses)
    ids, refs, hyps = ([t[k] for t in triples] for k in range(3))
    result = compute(refs, hyps)
    groups = score_groups(group_names(manifest, ids, by), refs, hyps) if by is not None and manifest is not None else []
    comparison = None
    if against is not None:
        comparison = compare_systems(refs, hyps, same_utterances(triples, read(against), against))
    wrong = worst_utterances(triples) if shown or html is not None else []
    if html is not None:
        pair = (str(against), comparison) if comparison is not None else None
        values = {"frequent": frequent_errors(u.pairs for u in wrong), "utterances": wrong, "groups": groups, "by": by}
        write_page(html, str(hypotheses), score=result, against=pair, **values)
    if as_json:
        facts: dict[str, Any] = {**asdict(result), "transform": transform}
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
    click.echo(f"{result.utterances} utterances")
    if groups:
        click.echo(f"\n{by:24} {'utterances':>10} {'words':>8} {'WER %':>8} {'95 %':>16} {'CER %':>8}")
    for g in groups:
        interval = f"{100 * g.wer.low:.2f}–{100 * g.wer.high:.2f}"
        rates = f"{100 * g.wer.rate:8.2f} {interval:>16} {100 * g.cer.rate:8.2f}"
        click.echo(f"{g.name or '(none)':24} {g.utterances:10} {g.wer.reference:8} {rates}")
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
