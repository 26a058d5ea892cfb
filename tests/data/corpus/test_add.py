"""Text without audio beside speech in one manifest: adding it, splitting, features, batches and counts."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import stillhouse

from stillhouse.data.batches.loader import BatchLoader
from stillhouse.data.batches.sampler import BatchSampler
from stillhouse.data.corpus.split import is_held_out, is_test
from stillhouse.data.errors import CorpusError, LockedError, UsageError
from stillhouse.data.features.compute import FeatureFile
from stillhouse.data.files.lock import FileLock
from stillhouse.data.manifest import Corpus, Utterance, read_manifest, write_manifest
from stillhouse.data.units import train_units
from stillhouse.train.run.identity import data_identity


def texts(tmp_path: Path, *lines: str, name: str = "novel.txt") -> Path:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


@pytest.fixture
def mixed(make_corpus: Callable[..., Corpus], tmp_path: Path) -> Corpus:
    """Four tones of two speakers, and two lines of text."""
    path = make_corpus(4).path
    spoken = [u.model_copy(update={"speaker": f"s{k % 2}"}) for k, u in enumerate(read_manifest(path).utterances)]
    write_manifest(path, spoken)
    stillhouse("corpus", "import", "text", texts(tmp_path, "a novel", "of two lines"), path, "--add", "--split", "text")
    return read_manifest(path)


def test_text_is_added_behind_what_is_there(mixed: Corpus, tmp_path: Path) -> None:
    assert [u.id for u in mixed.utterances] == ["u000", "u001", "u002", "u003", "novel-1", "novel-2"]
    assert [(u.audio, u.split) for u in mixed.utterances[4:]] == [(None, "text")] * 2
    before = mixed.path.read_bytes()
    again = stillhouse("corpus", "import", "text", tmp_path / "novel.txt", mixed.path, "--add", "--json")
    assert "0 utterances added, 2 were there already, 6 in all" in again.stderr
    assert json.loads(again.stdout)["added"] == 0 and mixed.path.read_bytes() == before
    # A file that grows gives its new lines alone, also when its lines get numbers of more digits.
    longer = texts(tmp_path, "a novel", "of two lines", "and a third")
    assert "1 utterances added, 2 were" in stillhouse("corpus", "import", "text", longer, mixed.path, "--add").stderr
    longest = texts(tmp_path, "a novel", "of two lines", "and a third", *map(str, range(4, 12)))
    assert "8 utterances added, 3 were" in stillhouse("corpus", "import", "text", longest, mixed.path, "--add").stderr
    assert [u.id for u in read_manifest(mixed.path).utterances[6:9]] == ["novel-3", "novel-04", "novel-05"]


def test_ids_and_texts_that_are_there_are_refused_by_name(mixed: Corpus, tmp_path: Path) -> None:
    before = mixed.path.read_bytes()
    add = ("corpus", "import", "text")
    other = texts(tmp_path, "a novel", "of other lines")
    stillhouse(*add, other, mixed.path, "--add", error=CorpusError, match="another text: novel-2; nothing was added")
    copied = texts(tmp_path, "of two lines", "a novel", name="copy.txt")
    stillhouse(*add, copied, mixed.path, "--add", error=CorpusError, match="other ids, such as novel-2 for copy-1")
    stillhouse(*add, other, tmp_path / "no.jsonl", "--add", error=UsageError, match="no manifest to add to")
    stillhouse(*add, other, mixed.path, "--add", "--force", error=UsageError, match="one of them")
    stillhouse(*add, other, mixed.path, error=UsageError, match="--add adds to it")
    with FileLock(mixed.path):
        stillhouse(*add, texts(tmp_path, "new", name="n.txt"), mixed.path, "--add", error=LockedError, match="manifest")
    assert mixed.path.read_bytes() == before


def test_what_a_corpus_has_with_audio_is_there_already(mixed: Corpus, tmp_path: Path) -> None:
    known = texts(tmp_path, "u001\ttone 1", "v001\ttone 9", name="t.tsv")
    said = stillhouse("corpus", "import", "text", known, mixed.path, "--add").stderr
    assert "1 utterances added, 1 were there already" in said
    assert read_manifest(mixed.path).by_id["u001"].audio is not None
    # Speech does not take the place of a text without audio.
    table = texts(tmp_path, "id,audio,text", f"novel-1,{mixed.path.parent}/audio/ton 0.wav,a novel", name="t.csv")
    stillhouse("corpus", "import", "csv", table, mixed.path, "--add", error=CorpusError, match="another audio: novel-1")


def test_a_session_that_goes_on_is_told(make_corpus: Callable[..., Corpus], tmp_path: Path) -> None:
    corpus = make_corpus(2)
    write_manifest(corpus.path, [u.model_copy(update={"session": "u"}) for u in corpus.utterances])
    known = texts(tmp_path, "u-7\tmore of it", name="t.tsv")
    pattern = ("--session-pattern", r"(?P<session>\w+)-(?P<order>\d+)")
    said = stillhouse("corpus", "import", "text", known, corpus.path, "--add", *pattern).stderr
    assert "behind those of 1 sessions" in said and "--refresh" in said


def test_transcripts_of_librispeech_without_audio(tmp_path: Path, mixed: Corpus) -> None:
    folder = tmp_path / "LS" / "train-other-500" / "20" / "205"
    folder.mkdir(parents=True)
    (folder / "20-205.trans.txt").write_text("20-205-0000 SO IT WENT\n20-205-0001 ON\n")
    (folder / "20-205-0001.flac").write_bytes(b"not looked at")
    said = stillhouse("corpus", "import", "librispeech", tmp_path / "LS", mixed.path, "--text-only", "--add").stderr
    assert "2 utterances added" in said
    found = read_manifest(mixed.path).utterances[-2:]
    assert [(u.id, u.text, u.audio, u.session, u.split) for u in found] == [
        ("20-205-0000", "SO IT WENT", None, "20-205", "train-other-500"),
        ("20-205-0001", "ON", None, "20-205", "train-other-500"),
    ]
    new = tmp_path / "new.jsonl"
    stillhouse("corpus", "import", "librispeech", tmp_path / "LS", new, "--text-only", "--split", "text")
    assert read_manifest(new).splits() == {"text": 2}


def test_a_gzipped_text(tmp_path: Path) -> None:
    stillhouse("corpus", "import", "text", texts(tmp_path, "one", "", "two", name="t.txt.gz"), tmp_path / "c.jsonl")
    found = read_manifest(tmp_path / "c.jsonl")
    assert [u.text for u in found.utterances] == ["one", "two"] and len(found.sessions()) == 2
    (tmp_path / "t.txt.gz").write_bytes((tmp_path / "t.txt.gz").read_bytes()[:-9])
    stillhouse("corpus", "import", "text", tmp_path / "t.txt.gz", tmp_path / "d.jsonl", error=CorpusError, match="read")


def test_split_names_text_and_asks_it_for_no_group(mixed: Corpus) -> None:
    shares = ("--by", "speaker", "--dev", "0", "--test", "50%", "--seed", 3)
    stillhouse("corpus", "split", mixed.path, *shares, error=CorpusError, match="2 of them are text without audio")
    stillhouse("corpus", "split", mixed.path, *shares, "--text", "lm")
    found = read_manifest(mixed.path)
    assert [u.split for u in found.utterances[4:]] == ["lm", "lm"]
    assert found.splits() == {"train": 2, "test": 2, "lm": 2}
    stillhouse("corpus", "split", mixed.path, *shares, "--only", "lm", "--text", "x", error=CorpusError, match="audio")


def test_names_of_splits_that_no_model_learns_from() -> None:
    assert [is_test(s) for s in ("test", "test-clean", "Test", "dev-test", "eval2000", "latest", "train", None)] == [
        *(True, True, True, True, True, False, False, False)
    ]
    held_out = ("dev", "dev-clean", "dev2", "DEVELOPMENT", "valid", "cv_validation", "held-out", "test")
    assert all(map(is_held_out, held_out))
    assert not any(map(is_held_out, ("train", "text", "device", "validated", "other", "", None)))


def test_features_skip_text_and_say_how_much(mixed: Corpus, tmp_path: Path) -> None:
    out = tmp_path / "f.h5"
    assert "2 utterances have no audio and are skipped" in stillhouse("corpus", "features", mixed.path, out).stderr
    assert FeatureFile(out).ids == ["u000", "u001", "u002", "u003"]
    units = train_units([u.text for u in mixed.utterances], "characters")
    loader = BatchLoader(mixed, FeatureFile(out), units)
    assert [u.id for u in loader.utterances] == ["u000", "u001", "u002", "u003"]
    assert loader.left_out["without audio"] == 2
    # A run goes on when its corpus gets text: its data and their order stay the same.
    alone = BatchLoader(Corpus(mixed.path, mixed.utterances[:4]), FeatureFile(out), units)
    one, other = (data_identity(x, BatchSampler(x.frames, max_frames=300)) for x in (alone, loader))
    assert one == other
    with pytest.raises(CorpusError, match="none of the 2 utterances of split text has audio, for example novel-1"):
        BatchLoader(mixed.select("text"), FeatureFile(out), units)
    # Units that need frames of their own, and one more, for a model of one unit in a state
    most = max(len(e.ids) / frames for e, frames in zip(loader.encoded, loader.frames[:, 0]))
    assert BatchLoader(mixed, FeatureFile(out), units, unit_frames=int(0.9 / most)).left_out == loader.left_out
    with pytest.raises(CorpusError, match="all transcripts have more units than encoder states"):
        BatchLoader(mixed, FeatureFile(out), units, unit_frames=1_000)
    some = BatchLoader(mixed, FeatureFile(out), units, unit_frames=int(1 / most) + 1)
    assert some.left_out["with more units than encoder states"] == 4 - len(some.utterances) > 0
    # Speech whose features are missing is no text.
    more = Corpus(mixed.path, [*mixed.utterances, Utterance(id="x", text="tone", audio="audio/ton 0.wav")])
    with pytest.raises(Exception, match="no features of x"):
        BatchLoader(more, FeatureFile(out), units)
