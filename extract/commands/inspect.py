"""`stillhouse inspect`: look into a store. Facts come from the modules beside this one; here they are printed.

Invariant: data goes to stdout, everything else to stderr; `--json` prints what docs/reference/inspect.md describes;
what can be told without reading states is told without reading them. Run: `stillhouse inspect info STORE`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from .inspect_numbers import compare, neighbours, plot, report, similarity, stats
from .options import (
    STORE,
    Share,
    chosen_views,
    complete_utterance,
    dump,
    json_option,
    print_fact,
    progress,
    sample_options,
    views_option,
)


@click.group(epilog="STORE is the folder that stillhouse extract wrote. Exit codes: 1 findings, 10 no store.")
def inspect() -> None:
    """Look into a store, without a language model and without reading more than is shown."""


for command in (stats, similarity, neighbours, compare, plot, report):
    inspect.add_command(command)


@inspect.command(epilog="Example: stillhouse inspect info corpus.zarr")
@click.argument("store", type=STORE)
@json_option
def info(store: Path, as_json: bool) -> None:
    """What STORE holds: teachers, contexts, layers, sizes, and whether it is complete."""
    from ..inspect.facts import store as facts
    from ..inspect.show import facts as rendering
    from ..store import Store

    found = facts.store_facts(Store.open(store))
    print_fact(found, "info", as_json, rendering.store)


@inspect.command(epilog="Example: stillhouse inspect ls corpus.zarr --utterances '84-*'")
@click.argument("store", type=STORE)
@click.argument("patterns", nargs=-1)
@click.option("--utterances", is_flag=True, help="List utterances; PATTERNS are globs on their ids.")
@json_option
@click.option("--jsonl", is_flag=True, help="One JSON object a line.")
def ls(store: Path, patterns: tuple[str, ...], utterances: bool, as_json: bool, jsonl: bool) -> None:
    """The views of STORE, those that match PATTERNS; or its utterances."""
    from ..inspect.facts import store as facts
    from ..inspect.show import facts as rendering
    from ..store import Store

    opened = Store.open(store)
    if utterances:
        listed: list[Any] = list(facts.utterance_facts(opened, patterns))
        kind, text = "utterance", rendering.utterances(listed)
    else:
        planned = opened.planned_views
        views = opened.resolve(patterns, planned) if patterns else planned
        listed = facts.view_facts(opened, views)
        kind, text = "view", rendering.views(listed)
    if jsonl:
        for fact in listed:
            click.echo(json.dumps(facts.as_json(fact, kind), ensure_ascii=False))
    elif as_json:
        entries = [facts.as_json(fact, kind) for fact in listed]
        name = "utterances" if utterances else "views"
        dump({"schema": "stillhouse.inspect.ls/1", name: entries})
    else:
        click.echo(text)


@inspect.command(epilog="Example: stillhouse inspect show corpus.zarr 84-121123-0001 --view 'minilm/*/6'")
@click.argument("store", type=STORE)
@click.argument("utterance", shell_complete=complete_utterance)
@views_option
@click.option("--values", is_flag=True, help="The states themselves, too.")
@click.option("--corpus", type=click.Path(path_type=Path), help="The manifest, to show the transcript as it is there.")
@json_option
def show(store: Path, utterance: str, views: tuple[str, ...], values: bool, corpus: Path | None, as_json: bool) -> None:
    """Tokens of UTTERANCE in its transcript, the context that was seen, and how long the states are."""
    from ..inspect.facts import utterance as showing
    from ..inspect.show import facts as rendering
    from ..store import Store

    opened = Store.open(store)
    chosen = chosen_views(opened, views, planned=True)
    found = showing.show(opened, utterance, chosen, values=values, corpus=corpus)
    print_fact(found, "show", as_json, rendering.shown)


@inspect.command(epilog="Example: stillhouse inspect verify corpus.zarr --sample 5%")
@click.argument("store", type=STORE)
@click.option("--data", is_flag=True, help="Read all states and compare checksums.")
@click.option("--sample", type=Share(), help="Read this share of the utterances, as in 5%.")
@click.option("--repair", is_flag=True, help="Put right what is damaged; states by the teachers that STORE names.")
@click.option(
    "--model", "models", multiple=True, metavar="TEACHER=FOLDER", help="For --repair: where a teacher's model lies now."
)
@click.option("--device", default="auto", show_default=True, help="For --repair: cpu, cuda, cuda:1 or auto.")
@json_option
@click.pass_context
def verify(
    ctx: click.Context,
    store: Path,
    data: bool,
    sample: float | None,
    repair: bool,
    models: tuple[str, ...],
    device: str,
    as_json: bool,
) -> None:
    """Check that STORE is whole: all but its states, and with --data or --sample these. Exit code 1: findings.

    With --repair, units of work whose states are damaged are extracted again, and nothing else; one wrong bit of
    anything else is put right. Then it is checked anew.
    """
    from dataclasses import replace

    from ...data.errors import StoreError
    from ..inspect.facts import store as facts
    from ..inspect.show import facts as rendering
    from ..store import Store

    share = 1.0 if data else sample or 0.0
    try:
        found = facts.verified(Store.open(store), share, progress())
    except StoreError as e:
        found = facts.unopened(store, e)
    if repair and found.findings:
        from ..maintain.repair import repair_all

        named = dict(m.split("=", 1) for m in models if "=" in m)
        if len(named) < len(models):
            raise click.BadParameter("give TEACHER=FOLDER", param_hint="--model")
        mended = repair_all(store, named, device, data=share)
        found = replace(facts.verified(Store.open(store), share, progress()), mended=mended)
    print_fact(found, "verify", as_json, rendering.verified)
    if found.findings:
        ctx.exit(1)


@inspect.command(epilog="Example: stillhouse inspect tree corpus.zarr")
@click.argument("store", type=STORE)
@json_option
def tree(store: Path, as_json: bool) -> None:
    """What lies where in STORE's folder."""
    from ..inspect.facts import store as facts
    from ..inspect.facts import tree as layout
    from ..inspect.show import facts as rendering
    from ..store import Store

    opened = Store.open(store)
    found = layout.tree(opened)
    if as_json:
        entries = [facts.as_json(f, "node") for f in found]
        dump({"schema": "stillhouse.inspect.tree/1", "nodes": entries})
    else:
        click.echo(rendering.tree(str(store), found))


@inspect.command(epilog="Example: stillhouse inspect export corpus.zarr states.npz --view minilm/alone/6 '84-*'")
@click.argument("store", type=STORE)
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("patterns", nargs=-1)
@views_option
@click.option("--float32", is_flag=True, help="As float32 whatever is stored.")
@click.option("--force", is_flag=True, help="Replace OUT.")
@json_option
def export(
    store: Path, out: Path, patterns: tuple[str, ...], views: tuple[str, ...], float32: bool, force: bool, as_json: bool
) -> None:
    """States, token ids and spans into OUT: .h5, .npz, .safetensors or .csv. PATTERNS are globs on utterance ids."""
    import numpy as np

    from ..inspect.facts import export as exporting
    from ..inspect.facts import store as facts
    from ..inspect.show import facts as rendering
    from ..store import Store

    opened = Store.open(store)
    rows = np.array([u.row for u in facts.utterance_facts(opened, patterns)]) if patterns else None
    chosen = chosen_views(opened, views)
    found = exporting.export(opened, chosen, out, rows=rows, float32=float32, force=force)
    print_fact(found, "export", as_json, rendering.exported)


@inspect.command(epilog="Example: stillhouse inspect diff old.zarr new.zarr")
@click.argument("a", type=STORE)
@click.argument("b", type=STORE)
@sample_options("20,000")
@click.option("--full", is_flag=True, help="All tokens instead of a sample.")
@json_option
@click.pass_context
def diff(ctx: click.Context, a: Path, b: Path, tokens: int | None, seed: int, full: bool, as_json: bool) -> None:
    """In what the stores A and B differ: settings, utterances, numbers. Exit code 1: they do."""
    from ..inspect.facts import diff as differing
    from ..inspect.show import numbers as rendering_numbers
    from ..store import Store

    found = differing.diff(Store.open(a), Store.open(b), tokens, seed, progress(), full=full)
    print_fact(found, "diff", as_json, rendering_numbers.difference)
    if not found.same:
        ctx.exit(1)
