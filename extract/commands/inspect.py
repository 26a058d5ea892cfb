"""`stillhouse inspect`: look into a store. The facts come from `extract/inspect`; these commands print them.

Guarantees: `--json` prints the schemas of docs/reference/inspect.md. A command reads states only if it shows them.
Try: `stillhouse inspect info STORE`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..inspect.show import facts as show_facts
from ..inspect.show import numbers as show_numbers
from . import inspect_numbers as numbers
from . import options as opt


@click.group(epilog="STORE is the folder that stillhouse extract wrote. Exit codes: 1 findings, 10 no store.")
def inspect() -> None:
    """Look into a store. These commands load no language model and read only what they show."""


for command in (numbers.stats, numbers.similarity, numbers.neighbours, numbers.compare, numbers.plot, numbers.report):
    inspect.add_command(command)


@inspect.command(epilog="Example: stillhouse inspect info corpus.zarr")
@click.argument("store", type=opt.STORE)
@opt.json_option
def info(store: Path, as_json: bool) -> None:
    """Show the teachers, contexts, layers and sizes of STORE, and whether it is complete."""
    from ..inspect.facts.store import store_facts
    from ..store import Store

    opened = Store.open(store)
    opt.print_fact(store_facts(opened), "info", as_json, show_facts.store)


@inspect.command(epilog="Example: stillhouse inspect ls corpus.zarr --utterances '84-*'")
@click.argument("store", type=opt.STORE)
@click.argument("patterns", nargs=-1)
@opt.flag("--utterances", "List utterances. PATTERNS are then globs on their ids.")
@opt.json_option
@opt.flag("--jsonl", "Print one JSON object on each line.")
def ls(store: Path, patterns: tuple[str, ...], utterances: bool, as_json: bool, jsonl: bool) -> None:
    """List the views of STORE that match PATTERNS, or its utterances."""
    import json

    from ..inspect.facts import store as facts
    from ..store import Store

    opened = Store.open(store)
    listed: list[Any]
    render: Any
    if utterances:
        listed, kind, render = list(facts.utterance_facts(opened, patterns)), "utterance", show_facts.utterances
    else:
        planned = opened.planned_views
        listed = facts.view_facts(opened, opened.resolve(patterns, planned) if patterns else planned)
        kind, render = "view", show_facts.views
    if jsonl:
        for fact in listed:
            click.echo(json.dumps(facts.as_json(fact, kind), ensure_ascii=False))
    else:
        opt.print_fact(listed, kind, as_json, render, ("ls", f"{kind}s"))


@inspect.command(epilog="Example: stillhouse inspect show corpus.zarr 84-121123-0001 --view 'minilm/*/6'")
@click.argument("store", type=opt.STORE)
@click.argument("utterance", shell_complete=opt.complete_utterance)
@opt.views_option("--view")
@opt.flag("--values", "Print the states themselves, too.")
@click.option("--corpus", type=opt.PATH, help="The manifest, to show the transcript itself.")
@opt.json_option
def show(store: Path, utterance: str, views: tuple[str, ...], values: bool, corpus: Path | None, as_json: bool) -> None:
    """Show the tokens of UTTERANCE, the context that each teacher saw, and the norm of each state.

    Of a speech teacher it shows the frames and their times.
    """
    from ..inspect.facts import utterance as facts

    opened, chosen = opt.open_views(store, views, planned=True)
    shown = facts.show(opened, utterance, chosen, values=values, corpus=corpus)
    opt.print_fact(shown, "show", as_json, show_facts.shown)


@inspect.command(epilog="Example: stillhouse inspect verify corpus.zarr --sample 5%")
@click.argument("store", type=opt.STORE)
@opt.flag("--data", "Read all states and compare their checksums.")
@click.option("--sample", type=opt.Share(), help="Do so for this share of the utterances, as in 5%.")
@opt.flag("--repair", "Extract damaged states again, with the teachers that STORE names.")
@click.option(
    "--model", "models", multiple=True, metavar="TEACHER=FOLDER", help="With --repair: the folder of a moved teacher."
)
@click.option("--device", default="auto", show_default=True, help="With --repair: cpu, cuda, cuda:1 or auto.")
@click.option("--corpus", type=opt.EXISTING, help="With --repair: the manifest, for the audio of speech teachers.")
@opt.json_option
def verify(
    store: Path,
    data: bool,
    sample: float | None,
    repair: bool,
    models: tuple[str, ...],
    device: str,
    corpus: Path | None,
    as_json: bool,
) -> None:
    """Check that STORE is undamaged. Its states are checked with --data or --sample only. Exit code 1: findings.

    With --repair, work items with damaged states are extracted again, and nothing else is. Other damaged files have to
    come from a backup. Then STORE is checked again.
    """
    from dataclasses import replace

    from ...data.errors import StoreError
    from ..inspect.facts import store as facts
    from ..store import Store

    share = 1.0 if data else sample or 0.0
    try:
        verified = facts.verified(Store.open(store), share, opt.progress())
    except StoreError as e:
        verified = facts.unopened(store, e)
    if repair and verified.findings:
        from ..maintain.repair import repair_all

        folders = dict(m.split("=", 1) for m in models if "=" in m)
        if len(folders) < len(models):
            raise click.BadParameter("give TEACHER=FOLDER", param_hint="--model")
        repaired = repair_all(store, folders, device, data=share, corpus=corpus)
        verified = replace(facts.verified(Store.open(store), share, opt.progress()), mended=repaired)
    opt.print_fact(verified, "verify", as_json, show_facts.verified)
    if verified.findings:
        raise click.exceptions.Exit(1)


@inspect.command(epilog="Example: stillhouse inspect tree corpus.zarr")
@click.argument("store", type=opt.STORE)
@opt.json_option
def tree(store: Path, as_json: bool) -> None:
    """Show the files, folders and arrays of STORE."""
    from ..inspect.facts import tree as facts
    from ..store import Store

    nodes = facts.tree(Store.open(store))
    opt.print_fact(nodes, "node", as_json, lambda shown: show_facts.tree(str(store), shown), ("tree", "nodes"))


@inspect.command(epilog="Example: stillhouse inspect export corpus.zarr states.npz --view minilm/alone/6 '84-*'")
@click.argument("store", type=opt.STORE)
@click.argument("out", type=opt.NEW_FILE)
@click.argument("patterns", nargs=-1)
@opt.views_option("--view")
@opt.flag("--float32", "Write float32, whatever dtype is stored.")
@opt.force_option
@opt.json_option
def export(
    store: Path, out: Path, patterns: tuple[str, ...], views: tuple[str, ...], float32: bool, force: bool, as_json: bool
) -> None:
    """Write states, token ids and spans to OUT: .h5, .npz, .safetensors or .csv. PATTERNS match utterance ids.

    Frames of a speech teacher have times instead of token ids and spans.
    """
    import numpy as np

    from ..inspect.facts import export as facts
    from ..inspect.facts.store import utterance_facts

    opened, chosen = opt.open_views(store, views)
    rows = np.array([u.row for u in utterance_facts(opened, patterns)]) if patterns else None
    exported = facts.export(opened, chosen, out, rows=rows, float32=float32, force=force)
    opt.print_fact(exported, "export", as_json, show_facts.exported)


@inspect.command(epilog="Example: stillhouse inspect diff old.zarr new.zarr")
@click.argument("a", type=opt.STORE)
@click.argument("b", type=opt.STORE)
@opt.sample_options("20,000")
@opt.full_option
@opt.json_option
def diff(a: Path, b: Path, tokens: int | None, seed: int, full: bool, as_json: bool) -> None:
    """Show how the stores A and B differ in settings, utterances and states. Exit code 1: they differ."""
    from ..inspect.facts import diff as facts
    from ..store import Store

    first, second = Store.open(a), Store.open(b)
    difference = facts.diff(first, second, tokens, seed, opt.progress(), full=full)
    opt.print_fact(difference, "diff", as_json, show_numbers.difference)
    if not difference.same:
        raise click.exceptions.Exit(1)
