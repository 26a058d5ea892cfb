"""Speech teachers beside text teachers: each is refreshed by what it reads, and stores are copied, cut and joined."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
import xarray

from stillhouse.data.errors import CorpusError, StaleError, UsageError
from stillhouse.data.manifest import Utterance, read_manifest, write_manifest
from stillhouse.distill.targets import TargetReader
from stillhouse.extract.adapters.dataset import States
from stillhouse.extract.adapters.labelled import to_xarray
from stillhouse.extract.maintain.combine import copy, merge, subset
from stillhouse.extract.maintain.gc import collect_garbage
from stillhouse.extract.maintain.remove import remove_utterances, remove_views
from stillhouse.extract.maintain.repair import repair_all
from stillhouse.extract.pipeline.estimate import render, size_up
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.speech.encoder import SpeechEncoder, load_encoder
from stillhouse.extract.speech.teacher import AnyTeacher, SpeechTeacher
from stillhouse.extract.store import Store
from stillhouse.extract.store.batches import batches
from stillhouse.extract.store.verify.stale import behind
from stillhouse.extract.store.verify.verify import verify

from ..conftest import loaded
from .test_rows import saved
from .test_teacher import change, noise


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> SpeechEncoder:
    return load_encoder(str(saved("whisper", tmp_path_factory.mktemp("model"))))


def made(folder: Path, names: Sequence[str] = tuple("abcdefgh")) -> Path:
    folder.mkdir()
    utterances = []
    for k, name in enumerate(names):
        soundfile.write(folder / f"{name}.flac", noise(0.3 + 0.1 * k), 16000)
        utterances.append(Utterance(id=name, text=f"the {name} of it", audio=f"{name}.flac", session=f"s{k // 2}"))
    write_manifest(folder / "corpus.jsonl", [*utterances, Utterance(id=f"{names[0]}-text", text="we")])
    return folder / "corpus.jsonl"


def add(manifest: Path, root: Path, teacher: AnyTeacher, refresh: bool = False, layers: Sequence[int] = (1,)) -> int:
    """Extract, and return how many tokens or frames went through the model."""
    corpus = read_manifest(manifest)
    request = Request("w" if teacher.kind == "speech" else "bert", list(layers), ["alone"])
    return extract(root, corpus, teacher, request, refresh=refresh).fed_tokens


def of(encoder: SpeechEncoder, manifest: Path) -> SpeechTeacher:
    return SpeechTeacher(encoder, read_manifest(manifest))


def states(store: Store) -> dict[tuple[str, str], np.ndarray]:
    """{(view, utterance): its states}."""
    ids, found = store.utterance_ids, {}
    for view in store.views:
        for i in ids:
            found[view.address, i] = store.gather([i], [view]).states[view]
    return found


def same(a: dict[tuple[str, str], np.ndarray], b: dict[tuple[str, str], np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_each_teacher_is_refreshed_by_what_it_reads(bert: Path, encoder: SpeechEncoder, tmp_path: Path) -> None:
    corpus, root = made(tmp_path / "c"), tmp_path / "s"
    text, speech = loaded(bert), of(encoder, corpus)
    for teacher in (text, speech):
        assert add(corpus, root, teacher) > 0
    before = states(Store.open(root))
    change(corpus, "b", text="another text of it")
    assert add(corpus, root, speech) == 0 and len(Store.open(root).plan.generations) == 2
    with pytest.raises(StaleError, match="1 utterance has another text than in the store: b"):
        add(corpus, root, text)
    assert add(corpus, root, text, refresh=True) > 0
    store = Store.open(root, checksums=True)
    assert behind(store) == {} and verify(store) == []
    assert add(corpus, root, speech) == 0 == add(corpus, root, speech, refresh=True)
    after = states(store)
    assert {key for key in before if not np.array_equal(before[key], after[key])} == {("bert/alone/1", "b")}
    # The other way round: the audio of c and, later, the text of d.
    soundfile.write(corpus.parent / "c.flac", noise(0.7), 16000)
    assert add(corpus, root, text) == 0
    with pytest.raises(StaleError, match="1 utterance has other audio than in the store: c"):
        add(corpus, root, speech)
    assert add(corpus, root, speech, refresh=True) == encoder.frames(11200)
    assert add(corpus, root, text) == 0 == add(corpus, root, speech)
    change(corpus, "d", text="the other d")
    assert add(corpus, root, text, refresh=True) > 0 and add(corpus, root, speech) == 0
    store = Store.open(root, checksums=True)
    again = states(store)
    assert {key for key in after if not np.array_equal(after[key], again[key])} == {
        ("w/alone/1", "c"), ("bert/alone/1", "d"),
    }  # fmt: skip
    assert behind(store) == {} and verify(store) == []
    ids = store.utterance_ids
    assert store.same_text(ids, ["bert", "w"]).all()
    texts = [read_manifest(corpus).by_id[i].text for i in ids]
    store.check_texts(ids, texts)
    got = [(i, g.lengths["w"].tolist()) for i, g in batches(store, store.resolve("w/*/*"), tokens=40)]
    assert [i for part, _ in got for i in part] == ids and len(got) > 2
    # An utterance that is gone, and a new one.
    utterances = [u for u in read_manifest(corpus).utterances if u.id != "e"]
    write_manifest(corpus, [*utterances, Utterance(id="new", text="n", audio="a.flac", session="s0")])
    assert add(corpus, root, speech, refresh=True) == encoder.frames(4800)
    assert behind(Store.open(root)) == {"bert": 2}
    add(corpus, root, text, refresh=True)
    store = Store.open(root, checksums=True)
    assert behind(store) == {} and verify(store) == [] and "e" not in store.utterance_ids


def test_copied_cut_joined_and_freed(bert: Path, encoder: SpeechEncoder, tmp_path: Path) -> None:
    one, two = made(tmp_path / "one"), made(tmp_path / "two", "pqrs")
    for corpus, name in ((one, "a"), (two, "b")):
        for teacher in (of(encoder, corpus), loaded(bert)):
            add(corpus, tmp_path / name, teacher, layers=(1, 2))
    change(one, "b", text="another text")
    add(one, tmp_path / "a", loaded(bert), refresh=True, layers=(1, 2))  # the teachers are at different tables now
    whole, other = states(Store.open(tmp_path / "a")), states(Store.open(tmp_path / "b"))
    copy(tmp_path / "a", tmp_path / "copy")
    assert same(states(Store.open(tmp_path / "copy", checksums=True)), whole)
    copy(tmp_path / "a", tmp_path / "layer", ["w/*/2"])
    layer = Store.open(tmp_path / "layer", checksums=True)
    assert same(states(layer), {key: v for key, v in whole.items() if key[0] == "w/alone/2"})
    subset(tmp_path / "a", tmp_path / "part", ["a", "d"])
    part = Store.open(tmp_path / "part", checksums=True)
    assert same(states(part), {key: v for key, v in whole.items() if key[1] in ("a", "d")})
    merge(tmp_path / "a", tmp_path / "b", tmp_path / "both")
    both = Store.open(tmp_path / "both", checksums=True)
    assert same(states(both), whole | other)
    assert all(verify(store) == [] for store in (layer, part, both))
    # A copy knows the audio of its rows: nothing is to do, and what changes is found.
    assert add(one, tmp_path / "copy", of(encoder, one), layers=(1, 2)) == 0
    soundfile.write(one.parent / "a.flac", noise(0.3), 16000)
    with pytest.raises(StaleError, match="other audio than in the store: a"):
        add(one, tmp_path / "copy", of(encoder, one), layers=(1, 2))
    add(one, tmp_path / "copy", of(encoder, one), refresh=True, layers=(1, 2))
    with pytest.raises(StaleError, match="a has other audio in each"):
        merge(tmp_path / "a", tmp_path / "copy", tmp_path / "never")
    remove_utterances(tmp_path / "copy", ["c"])
    remove_views(tmp_path / "copy", ["w/*/1"])
    freed = collect_garbage(tmp_path / "copy")
    store = Store.open(tmp_path / "copy", checksums=True)
    assert freed.tokens > 0 and verify(store) == [] and "c" not in store.utterance_ids
    left = {key: v for key, v in whole.items() if key[1] != "c" and key[0] != "w/alone/1" and key != ("w/alone/2", "a")}
    assert same({key: v for key, v in states(store).items() if key != ("w/alone/2", "a")}, left)
    assert add(one, tmp_path / "copy", of(encoder, one), refresh=True, layers=(2,)) > 0  # c is in the corpus
    assert verify(Store.open(tmp_path / "copy")) == []


def test_damage_is_found_and_repaired(encoder: SpeechEncoder, tmp_path: Path) -> None:
    corpus, root = made(tmp_path / "c"), tmp_path / "s"
    teacher = of(encoder, corpus)
    add(corpus, root, teacher)
    before = states(Store.open(root))
    hidden = next((root / "data.zarr/w/hidden/c").rglob("0/0/0/0"))
    data = bytearray(hidden.read_bytes())
    data[1000:1004] = b"\1\2\3\4"
    hidden.write_bytes(data)
    (finding,) = verify(Store.open(root))
    assert "w/alone/1" in str(finding.where)
    with pytest.raises(CorpusError, match=r"states of the speech teacher w are damaged, .*--corpus"):
        repair_all(root, {})
    assert len(repair_all(root, {}, "cpu", corpus=corpus)) == 1
    assert verify(Store.open(root)) == [] and same(states(Store.open(root)), before)
    source = root / "data.zarr/w/audio_source/c/0/0"
    data = bytearray(source.read_bytes())
    data[3] ^= 1
    source.write_bytes(data)
    assert ["audio_source" in str(f.where) for f in verify(Store.open(root))] == [True]
    source.unlink()
    assert any("chunk is missing" in f.what for f in verify(Store.open(root)))


def test_what_needs_tokens_refuses_a_speech_teacher(bert: Path, encoder: SpeechEncoder, tmp_path: Path) -> None:
    corpus, root = made(tmp_path / "c"), tmp_path / "s"
    add(corpus, root, of(encoder, corpus))
    store = Store.open(root)
    for call in (lambda: store.tokens(["a"], "w"), lambda: store.embedding("w"), lambda: store.pieces("w")):
        with pytest.raises(UsageError, match="w is a speech teacher: it has frames, and no tokens"):
            call()
    with pytest.raises(UsageError, match="w/alone/1: the view is of a speech teacher"):
        TargetReader([(store, store.views)])
    head = json.loads((root / "store.json").read_text())
    assert head["version"] == 2  # so that versions that know tokens alone refuse it
    add(corpus, tmp_path / "text", loaded(bert))
    head = json.loads((tmp_path / "text/store.json").read_text())
    assert head["version"] == 1 and not {"axis", "rate_hz", "offset_s", "sample_rate_hz"} & set(
        head["teachers"]["bert"]
    )


def test_other_toolkits(bert: Path, encoder: SpeechEncoder, tmp_path: Path) -> None:
    corpus, root = made(tmp_path / "c"), tmp_path / "s"
    for teacher in (of(encoder, corpus), loaded(bert)):
        add(corpus, root, teacher)
    store = Store.open(root)
    views = store.resolve("w/*/*") + store.resolve("bert/*/*")
    labelled = to_xarray(store, ["b", "a"], views[:1])
    n = [encoder.frames(6400), encoder.frames(4800)]
    assert labelled.hidden.dims == ("view", "frame", "dimension") and labelled.sizes["frame"] == sum(n)
    assert labelled.time.values.tolist() == pytest.approx([k / 50 for count in n for k in range(count)])
    data = States(store, views)
    batch = data.collate([data[i] for i in range(len(data))])
    assert batch["token_id"].keys() == batch["span"].keys() == {"bert"} and batch["lengths"].keys() == {"w", "bert"}
    assert batch["lengths"]["w"].tolist() == store.row_lengths("w", store.rows(data.ids, "w")).tolist()
    plain = xarray.open_zarr(root / "data.zarr", group="w", consolidated=False)
    assert plain.hidden.dims == ("context", "layer", "frame", "dimension") and plain.audio_source.shape[1] == 4


def test_an_estimate_of_what_a_store_lacks(encoder: SpeechEncoder, tmp_path: Path) -> None:
    corpus, root = made(tmp_path / "c"), tmp_path / "s"
    add(corpus, root, of(encoder, corpus))
    soundfile.write(corpus.parent / "c.flac", noise(0.7), 16000)
    teacher = of(encoder, corpus)
    for layers, refresh, frames in (((1,), True, 35), ((1, 2), True, None)):
        sizing = size_up(root, teacher.corpus, teacher, Request("w", list(layers), ["alone"]), refresh=refresh)
        assert sizing.axis == "frame" and sizing.rate_hz == 50 and sizing.seconds is not None and sizing.units_missing
        assert frames in (None, sizing.fed_tokens) and "× real time, one process" in render(sizing)
