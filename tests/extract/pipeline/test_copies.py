"""Views that would be copies of others are named before anything is written, and refused without --force."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from stillhouse.data.errors import UsageError
from stillhouse.data.manifest import Corpus, Utterance, write_manifest
from stillhouse.extract.pipeline.estimate import check_draft, size_up
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store

from ..conftest import TEXTS, loaded, make_corpus

LONE = Corpus(Path("lone.jsonl"), [Utterance(id=f"u{i}", text=t) for i, t in enumerate(TEXTS)])


def run(store: Path, corpus: Corpus, teacher: Path, name: str, *contexts: str, force: bool = False) -> list[str]:
    """Extract layer 1 as the command does, and return its warnings."""
    warnings: list[str] = []
    check = partial(check_draft, on_warning=warnings.append, force=force)
    extract(store, corpus, loaded(teacher), Request(name, [1], contexts), check=check)
    return warnings


@pytest.mark.parametrize("context", ["past:8", "future:8", "both:8", "past:8+block"])
def test_contexts_need_sessions(bert: Path, tmp_path: Path, context: str) -> None:
    with pytest.raises(UsageError, match=rf"{context.split('+')[0]}.* would be a copy of alone.*--session-pattern"):
        run(tmp_path / "s", LONE, bert, "t", "alone", context)
    assert not (tmp_path / "s" / "store.json").exists()
    sizing = size_up(tmp_path / "s", LONE, loaded(bert), Request("t", [1], ["alone", context]), measure=False)
    assert any(f"{context} would be a copy of alone" in w for w in sizing.warnings)
    assert any("copy of alone" in w for w in run(tmp_path / "s", LONE, bert, "t", "alone", context, force=True))
    store = Store.open(tmp_path / "s")
    assert not store.inputs_seen(store.resolve(f"t/{context}/1")[0])[1].any()


def test_utterances_without_text_are_no_context(bert: Path, tmp_path: Path) -> None:
    corpus = make_corpus(["the old kettle", "", "she would not wear it there", " "], per_session=2)
    with pytest.raises(UsageError, match="both:8 would be a copy of alone"):
        run(tmp_path / "s", corpus, bert, "t", "alone", "both:8")


def test_mostly_without_sessions_is_a_warning(bert: Path, tmp_path: Path) -> None:
    lone = [Utterance(id=f"v{i}", text=t) for i, t in enumerate(TEXTS) if t]
    together = [Utterance(id=f"u{i}", text=t, session="s") for i, t in enumerate(TEXTS[:3])]
    corpus = Corpus(Path("mixed.jsonl"), [*together, *lone])
    (warning,) = run(tmp_path / "s", corpus, bert, "t", "alone", "past:8")
    assert "past:8 is the same as alone for most of the corpus: 83% of the utterances have none before" in warning
    assert run(tmp_path / "all", make_corpus(), bert, "t", "alone", "past:8", "both:8", "future:8") == []


def test_contexts_that_reach_beyond_all_sessions(bert: Path, tmp_path: Path) -> None:
    corpus = make_corpus(["the old kettle", "she would", "we"] * 3, per_session=3)
    longest = max(run_lengths(corpus, bert))
    short, long = f"past:{longest}", f"past:{longest + 2}"
    with pytest.raises(
        UsageError, match=rf"{long} would be a copy of {short}: no session has more than {longest} tokens"
    ):
        run(tmp_path / "s", corpus, bert, "t", short, long)
    assert run(tmp_path / "s", corpus, bert, "t", "alone", short, f"past:{longest - 1}", f"both:{longest}") == []
    with pytest.raises(UsageError, match=rf"{long} would be a copy of {short}"):
        run(tmp_path / "s", corpus, bert, "t", long)  # the store has the other one already
    assert len(run(tmp_path / "s", corpus, bert, "t", long, force=True)) == 1
    store = Store.open(tmp_path / "s")
    a, b = (store.gather(store.utterance_ids, store.resolve(f"t/{c}/1")) for c in (short, long))
    assert np.array_equal(*(next(iter(g.states.values())) for g in (a, b)))  # they are copies indeed


def run_lengths(corpus: Corpus, teacher: Path) -> list[int]:
    """Tokens before the last utterance of each session of three."""
    length = loaded(teacher).tokeniser.encode([u.text for u in corpus.utterances], "none").length
    return [int(length[i : i + 2].sum()) for i in range(0, len(length), 3)]


def test_one_teacher_under_two_names(bert: Path, gpt2: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "s", make_corpus(), bert, "one", "alone") == []
    with pytest.raises(UsageError, match="two/alone/1 would be copies of one: the same model"):
        run(tmp_path / "s", make_corpus(), bert, "two", "alone")
    assert run(tmp_path / "s", make_corpus(), bert, "two", "past:8") == []
    assert run(tmp_path / "s", make_corpus(), gpt2, "three", "alone") == []


def test_the_command_refuses_and_names_what_is_asked_for_twice(bert: Path, tmp_path: Path) -> None:
    write_manifest(tmp_path / "corpus.jsonl", LONE.utterances)
    command = [sys.executable, "-m", "stillhouse.cli", "extract", str(tmp_path / "corpus.jsonl"), str(tmp_path / "s")]
    command += ["--teacher", str(bert), "--device", "cpu", "--layers", "1,-2,0", "--context", "both:8", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "both:8 would be a copy of alone" in done.stderr, done.stderr
    assert "warning: layer 1 is asked for more than once" in done.stderr
    done = subprocess.run([*command, "--force"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "warning: both:8 would be a copy" in done.stderr
    assert len(json.loads(done.stdout)["views"]) == 2
