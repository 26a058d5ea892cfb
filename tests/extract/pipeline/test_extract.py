"""Whole runs: resume, refuse other settings, norms, estimates, status, repair, and the command itself."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from stillhouse.data.errors import CorpusError, StaleError, StoreError, UsageError
from stillhouse.data.manifest import write_manifest
from stillhouse.extract.commands.extract import default_name, parse_layers
from stillhouse.extract.commands.extract import extract as command
from stillhouse.extract.maintain.repair import repair
from stillhouse.extract.pipeline.estimate import check_disk_space, size_up
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.layout import cut_shards, order_sessions
from stillhouse.extract.pipeline.norms import sample_rows
from stillhouse.extract.pipeline.progress import status
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store
from stillhouse.extract.store.disk.files import StoreFiles
from stillhouse.extract.store.disk.paths import Paths
from stillhouse.extract.store.verify.verify import verify
from stillhouse.extract.teacher.model import Teacher, load_teacher

from ..conftest import TEXTS, loaded, make_corpus, sentences
from .test_crash import tree

REQUEST = Request("t", [0, 2], ["alone", "both:4"])


def long_corpus(times: int = 4):
    return make_corpus([t for t in sentences() if t.isascii()] * times, per_session=5)


def test_again_does_nothing(bert: Path, tmp_path: Path) -> None:
    first = extract(tmp_path / "s", make_corpus(), loaded(bert), REQUEST)
    before = tree(tmp_path / "s")
    again = extract(tmp_path / "s", make_corpus(), loaded(bert), REQUEST)
    assert (first.units_done_now, again.units_done_now, again.fed_tokens) == (2, 0, 0)
    assert tree(tmp_path / "s") == before and verify(Store.open(tmp_path / "s")) == []


def test_two_planners_write_the_same_bytes(bert: Path, tmp_path: Path) -> None:
    for name in "ab":
        extract(tmp_path / name, make_corpus(), loaded(bert), REQUEST)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


@pytest.mark.parametrize(
    "change,words",
    [
        ({"transform": "upper"}, "the text transform"),
        ({"dtype": "bfloat16"}, "the stored dtype"),
        ({"join": "."}, "the join string"),
    ],
)
def test_other_settings_are_named(bert: Path, tmp_path: Path, change: dict, words: str) -> None:
    extract(tmp_path / "s", make_corpus(), loaded(bert), REQUEST)
    other = Request("t", [0, 2], ["alone", "both:4"], **change)
    with pytest.raises(StaleError, match=words):
        extract(tmp_path / "s", make_corpus(), loaded(bert), other)


def test_other_weights_are_named(bert: Path, minilm: Path, tmp_path: Path) -> None:
    extract(tmp_path / "s", make_corpus(), loaded(bert), REQUEST)
    with pytest.raises(StaleError, match=r"the model.s weights .* the tokenizer"):
        extract(tmp_path / "s", make_corpus(), loaded(minilm), REQUEST)


def test_changed_texts_are_named(bert: Path, tmp_path: Path) -> None:
    extract(tmp_path / "s", make_corpus(TEXTS), loaded(bert), REQUEST)
    edited = [*TEXTS[:3], "she wore it", *TEXTS[4:]]
    with pytest.raises(StaleError, match="1 utterance has another text than in the store: u3"):
        extract(tmp_path / "s", make_corpus(edited), loaded(bert), REQUEST)


def test_no_text_at_all(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no utterance has any text"):
        extract(tmp_path / "s", make_corpus(["", " "]), loaded(bert), REQUEST)


def test_values_that_float16_cannot_hold(bert: Path, tmp_path: Path) -> None:
    """The error names view and utterance. bfloat16 can store the same states."""
    teacher = load_teacher(str(bert), device="cpu")
    teacher.model.embeddings.word_embeddings.weight[5:] *= 1e7
    teacher.model.embeddings.LayerNorm.weight.mul_(1e6)
    with pytest.raises(StoreError, match=r"u\d+: a value of t/alone/0 is not finite in float16.*--dtype bfloat16"):
        extract(tmp_path / "s", make_corpus(), teacher, REQUEST)
    extract(tmp_path / "b", make_corpus(), teacher, Request("t", [0], ["alone"], dtype="bfloat16"))
    assert verify(Store.open(tmp_path / "b")) == []


def test_sessions_stay_whole_and_keep_their_place() -> None:
    corpus = make_corpus(["we"] * 40, per_session=4)
    order = order_sessions(corpus, 0)
    assert sorted(order) == [list(range(i, i + 4)) for i in range(0, 40, 4)] and order != sorted(order)
    assert order_sessions(corpus, 1) != order
    less = order_sessions(make_corpus(["we"] * 36, per_session=4), 0)
    assert less == [s for s in order if s[0] < 36]


def test_shards_hold_whole_utterances() -> None:
    shards, start = cut_shards(np.array([30, 30, 10, 0, 60, 4]), 64)
    assert [(s.first, s.last, s.rows) for s in shards] == [(0, 2, 60), (2, 4, 10), (4, 6, 64)]
    assert start.tolist() == [0, 30, 64, 74, 128, 188]


def test_the_sample_is_spread() -> None:
    lengths = np.ones(10_000)
    lengths[:10] = 0
    rows = sample_rows(lengths)
    assert len(rows) == 2000 and rows[0] == 10 and rows[-1] == 9_999 and np.diff(rows).max() <= 6
    assert sample_rows(np.array([0, 3, 0, 2])).tolist() == [1, 3]


def test_an_estimate_is_what_it_takes(bert: Path, tmp_path: Path) -> None:
    corpus = long_corpus()
    plan = size_up(tmp_path / "s", corpus, loaded(bert), REQUEST)
    assert not (tmp_path / "s").exists() and plan.units_missing == plan.units > 4 and plan.seconds
    done = extract(tmp_path / "s", corpus, loaded(bert), REQUEST)
    metadata = (tmp_path / "s" / "data.zarr" / "t" / "hidden" / "zarr.json").stat().st_size
    assert sum(plan.bytes_per_view.values()) == done.hidden_bytes - metadata
    assert (plan.tokens, plan.units) == (done.tokens, done.units)
    assert done.store_bytes - done.hidden_bytes <= plan.other_bytes
    after = size_up(tmp_path / "s", corpus, loaded(bert), REQUEST)
    assert after.units_missing == 0 and after.bytes == 0 and after.fits


def test_a_disk_that_is_too_small(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StoreFiles, "free_bytes", lambda self: 1000)
    with pytest.raises(StoreError, match="are free"):
        extract(tmp_path / "s", make_corpus(), loaded(bert), REQUEST, check=check_disk_space)
    assert not (tmp_path / "s" / "store.json").exists()
    extract(tmp_path / "s", make_corpus(), loaded(bert), REQUEST)


def test_status_and_parts_of_an_array(bert: Path, tmp_path: Path) -> None:
    from stillhouse.data.files.lock import FileLock

    corpus, root = long_corpus(), tmp_path / "s"
    total = extract(root, corpus, loaded(bert), REQUEST, part=(0, 3))
    s = status(root)
    assert not s.complete and total.views == [] and Store.open(root).views == []
    assert sum(c.done for c in s.contexts) == total.units_done_now
    assert sum(c.done + c.missing for c in s.contexts) == sum(c.units for c in s.contexts) > total.units_done_now
    with FileLock(Paths(root).lock("t", "alone", 1)):
        assert [c.running for c in status(root).contexts] == [1, 0]
    extract(root, corpus, loaded(bert), REQUEST, part=(2, 3))
    extract(root, corpus, loaded(bert), REQUEST, part=(1, 3))
    assert status(root).complete
    extract(tmp_path / "one", corpus, loaded(bert), REQUEST)
    assert tree(root) == tree(tmp_path / "one")


def test_a_flipped_bit_is_found_and_repaired(bert: Path, tmp_path: Path) -> None:
    root = tmp_path / "s"
    extract(root, long_corpus(), loaded(bert), REQUEST)
    good = tree(root)
    path = Paths(root).hidden("t", 1, 1, 2)
    data = bytearray(path.read_bytes())
    data[1001] ^= 8
    path.write_bytes(data)
    Paths(root).hidden("t", 0, 0, 0).unlink()
    found = verify(Store.open(root))
    assert [f.where.split(" utterance")[0].split(":")[0] for f in found] == ["t/alone/0 shard 0", "t/both"]
    repaired = repair(root, loaded(bert), "t")
    assert [str(u) for u, _ in repaired] == ["t/alone shard 0", "t/both:4 shard 2"]
    assert tree(root) == good and verify(Store.open(root)) == []
    assert Paths(root).commit("t", "both:4", 2, 1).exists()
    assert repair(root, loaded(bert), "t") == []


def test_repair_refuses_another_teacher(bert: Path, minilm: Path, tmp_path: Path) -> None:
    extract(tmp_path / "s", make_corpus(), loaded(bert), REQUEST)
    with pytest.raises((StaleError, UsageError)):
        repair(tmp_path / "s", loaded(minilm), "t")


def test_out_of_memory_halves_the_batch(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device with memory for two windows at a time gives the same states."""
    import torch

    extract(tmp_path / "a", make_corpus(), loaded(bert), REQUEST)
    states = Teacher.states

    def narrow(self, windows, layers):
        if len(windows) > 2:
            raise torch.cuda.OutOfMemoryError("no room")
        return states(self, windows, layers)

    monkeypatch.setattr(Teacher, "states", narrow)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    extract(tmp_path / "b", make_corpus(), loaded(bert), REQUEST)
    a, b = Store.open(tmp_path / "a"), Store.open(tmp_path / "b")
    for view in a.views:
        left, right = (s.gather(a.utterance_ids, [view]).states[view].astype(np.float32) for s in (a, b))
        np.testing.assert_allclose(left, right, atol=2e-3, rtol=2e-3)
    monkeypatch.setattr(Teacher, "states", lambda *_: (_ for _ in ()).throw(torch.cuda.OutOfMemoryError("none")))
    with pytest.raises(StoreError, match="does not fit into the device's memory"):
        extract(tmp_path / "c", make_corpus(), loaded(bert), REQUEST)


def test_a_full_disk(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full at a later work item: a clear error, a valid store, and the same command resumes."""
    import errno

    root, allocate, calls = tmp_path / "s", os.posix_fallocate, 0

    def full(fd: int, offset: int, size: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(fd, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StoreError, match="the disk is full; everything committed so far is safe"):
        extract(root, long_corpus(), loaded(bert), REQUEST)
    monkeypatch.undo()
    assert verify(Store.open(root)) == [] and sum(c.done for c in status(root).contexts) > 0
    assert not list((root / "tmp").iterdir())
    extract(root, long_corpus(), loaded(bert), REQUEST)
    extract(tmp_path / "calm", long_corpus(), loaded(bert), REQUEST)
    assert tree(root) == tree(tmp_path / "calm")


def invoke(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(command, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done.stdout


def test_the_command(bert: Path, tmp_path: Path) -> None:
    corpus = make_corpus()
    write_manifest(tmp_path / "corpus.jsonl", corpus.utterances)
    asked = [tmp_path / "corpus.jsonl", tmp_path / "s", "--teacher", bert, "--name", "t", "--layers", "0,-1"]
    asked += ["--context", "alone", "--context", "past:4", "--device", "cpu", "--transform", "sentence_case"]
    size = json.loads(invoke(*asked, "--dry-run", "--json"))
    assert size["utterances"] == 30 and size["fits"] and not (tmp_path / "s").exists()
    assert "not enough" not in invoke(*asked, "--dry-run").lower()
    done = json.loads(invoke(*asked, "--json"))
    assert done["views"] == ["t/alone/0", "t/alone/2", "t/past:4/0", "t/past:4/2"]
    assert 0 < done["padding_share"] < 0.5 and done["tokens"] == size["tokens"]
    assert "30 utterances" in invoke(*asked)
    assert json.loads(invoke(tmp_path / "corpus.jsonl", tmp_path / "s", "--status", "--json"))["complete"]
    assert "complete" in invoke(tmp_path / "corpus.jsonl", tmp_path / "s", "--status")
    with pytest.raises(UsageError, match="no teacher"):
        invoke(tmp_path / "corpus.jsonl", tmp_path / "s")


def test_layers_and_names_of_the_command() -> None:
    assert parse_layers(None, None, "0-3, 6,-1,last") == [0, 1, 2, 3, 6, -1, -1]  # type: ignore[arg-type]
    assert default_name("org/My Model-v2") == "My-Model-v2"
    assert "no layer" in CliRunner().invoke(command, [".", "s", "--layers", "x"]).output
