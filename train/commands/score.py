"""The command `stillhouse score`. Run `stillhouse score --help`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ..score.groups import Group
    from ..score.significance import SystemComparison

PATH = click.Path(path_type=Path)


@click.command()
@click.argument("hypotheses", type=PATH)
@click.option("--transform", default="none", show_default=True, help="Of both texts, as in lower+no_punct.")
@click.option(
    "--corpus",
    type=PATH,
    help="Manifest that says who spoke, for --by, and what, for a file without transcripts.",
)
@click.option("--by", help="Rates of parts too: speaker, session, split or a column of meta.")
@click.option("--against", type=PATH, help="Other hypotheses of the same utterances: is the difference chance?")
@click.option("--errors", "shown", type=click.IntRange(min=0), default=0, help="Show that many of the worst, aligned.")
@click.option("--html", type=PATH, help="Write all errors as a page.")
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
    """WER and CER of HYPOTHESES that `stillhouse decode` wrote, with 95 % bootstrap intervals.

    Reads JSON lines, and with --corpus what has no transcripts: trn, ctm, Kaldi's text, results of audio from a pipe.

    --against tests the difference in two ways: paired bootstrap over utterances, and matched pairs (what sclite
    calls MAPSSWE).

    Example: stillhouse score hyp.jsonl --corpus corpus.jsonl --by speaker --html errors.html
    """
    from dataclasses import asdict

    from ...data.errors import UsageError
    from ...data.manifest import read_manifest
    from ...data.text import check_transform
    from ..report.score import write_page
    from ..score.alignment import as_text, frequent
    from ..score.groups import by_group, group_names, worst
    from ..score.significance import compare, same_utterances
    from ..score.wer import read_hypotheses
    from ..score.wer import score as compute

    if by is not None and corpus is None:
        raise UsageError("--by and --corpus go together", expected="--corpus corpus.jsonl --by speaker")
    check_transform(transform)
    manifest = read_manifest(corpus) if corpus is not None else None
    texts = {u.id: u.text for u in manifest.utterances} if manifest is not None else None
    found = _normalised(read_hypotheses(hypotheses, texts), transform)
    refs, hyps = [ref for _, ref, _ in found], [hyp for _, _, hyp in found]
    result = compute(refs, hyps)
    groups: list[Group] = []
    if by is not None and manifest is not None:
        groups = by_group(group_names(manifest, [id for id, _, _ in found], by), refs, hyps)
    difference: SystemComparison | None = None
    if against is not None:
        others = same_utterances(found, _normalised(read_hypotheses(against, texts), transform), against)
        difference = compare(refs, hyps, others)
    wrong = worst(found) if shown or html is not None else []
    if html is not None:
        pair = (str(against), difference) if difference is not None else None
        write_page(html, str(hypotheses), result, frequent(u.pairs for u in wrong), wrong, groups, by, pair)
    if as_json:
        facts: dict[str, Any] = {**asdict(result), "transform": transform}
        if by is not None:
            facts |= {"by": by, "groups": [asdict(g) for g in groups]}
        if difference is not None:
            facts |= {"against": str(against), "comparison": asdict(difference)}
        if shown:
            facts["errors"] = [asdict(u) for u in wrong[:shown]]
            facts["frequent"] = frequent(u.pairs for u in wrong)
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
    if difference is not None:
        _say_difference(difference, against)
    for u in wrong[:shown]:
        click.echo(f"\n{u.id}: {u.errors} errors, {100 * u.wer:.0f} %\n{as_text(u.pairs)}")
    if shown and wrong:
        names = {"S": "substituted", "D": "deleted", "I": "inserted"}
        click.echo("")
        for kind, rows in frequent((u.pairs for u in wrong), 10).items():
            if rows:
                click.echo(f"{names[kind]}: " + ", ".join(f"{count} × {what}" for what, count in rows))


def _say_difference(d: SystemComparison, against: Path | None) -> None:
    click.echo(
        f"\nagainst {against}: WER {100 * d.difference:+.2f} points [{100 * d.low:+.2f}, {100 * d.high:+.2f}], "
        f"better in {d.better} utterances, worse in {d.worse}"
    )
    pairs = "too few" if d.p_matched_pairs is None else f"{d.p_matched_pairs:.4f}"
    click.echo(f"p = {d.p_bootstrap:.4f} by paired bootstrap, {pairs} by matched pairs over {d.stretches} stretches")


def _normalised(found: list[tuple[str, str, str]], name: str) -> list[tuple[str, str, str]]:
    from ...data.text import transform

    if name == "none":
        return found
    return [(id, transform(ref, name).text, transform(hyp, name).text) for id, ref, hyp in found]
