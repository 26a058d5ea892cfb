"""Speech teachers: frames against a slow loop over times, draws, neighbours, codes, and what is refused."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stillhouse.data.errors import ConfigError, NoStoreError, StaleError, StoreError
from stillhouse.distill import TargetReader, Transfer
from stillhouse.distill.controls import shuffled_partners
from stillhouse.distill.distances import distance_named
from stillhouse.distill.frames import StudentTimes, drawn, frame_keys, reach
from stillhouse.extract.store import Gathered, View

IDS = ["a", "b", "c", "d"]
SECONDS = {"a": 2.0, "b": 0.35, "c": 1.0, "d": 1.3}
VIEW, CODED = View("ear", "alone", 4), View("ear", "alone", 2)
D, C = 5, 3


class SpeechStore:
    """A store in memory with one speech teacher, whose states and codes are random."""

    def __init__(self, hz: float = 50.0, offset_s: float = 0.0, dtype: str = "float16", views=(VIEW,)) -> None:
        rng = np.random.default_rng(0)
        self.views, self.address = list(views), "memory"
        self.record = SimpleNamespace(dtype=dtype, is_speech=True, rate_hz=hz, offset_s=offset_s, width=D)
        self.frames = {i: math.floor(s * hz) for i, s in SECONDS.items()}
        self.states = {
            (v, i): rng.normal(1, 2, (n, D)).astype(np.float16) for v in views for i, n in self.frames.items()
        }
        self.codes = {k: rng.integers(0, 256, (len(h), C)).astype(np.uint8) for k, h in self.states.items()}
        self.norms = {
            v: (rng.normal(size=D).astype(np.float32), rng.uniform(0.5, 2, D).astype(np.float32)) for v in views
        }
        self.index = SimpleNamespace(id=lambda row: IDS[row], text_hash=np.arange(4, dtype=np.uint64))

    def teacher(self, name):
        return self.record

    def norm(self, view):
        return self.norms[view]

    def has(self, ids, view):
        return np.array([i in self.frames for i in ids])

    def rows(self, ids, teacher=None):
        return np.array([IDS.index(i) for i in ids], np.int64)

    def lengths(self, teacher):
        return np.array([self.frames[i] for i in IDS], np.int32)

    def gather(self, ids, views, dtype=None):
        values = self.codes if dtype == "codes" else self.states
        states = {v: np.concatenate([values[v, "a"][:0], *(values[v, i] for i in ids)]) for v in views}
        return Gathered({"ear": np.array([self.frames[i] for i in ids], np.int32)}, states, {}, {})


def rows_of(student: StudentTimes, ids=IDS, speeds=(1.0,) * 4) -> np.ndarray:
    """The rows of features of each utterance, at the speed that it is heard at."""
    return np.array([math.ceil(SECONDS[i] / s * student.row_hz) for i, s in zip(ids, speeds)])


def reader_of(store: SpeechStore, student: StudentTimes, **options) -> TargetReader:
    return TargetReader([(store, store.views)], "state", student=student, **options)


def shares(store: SpeechStore, student: StudentTimes, i: str, speed: float, state: int) -> dict[int, float]:
    """The slow loop: how much of a state's time in the original each frame of the teacher covers, by frame."""
    middle, half = student.middle_s + state / student.hz, 0.5 / student.hz
    begin, end = (middle - half) * speed, (middle + half) * speed
    found = {}
    for frame in range(store.frames[i]):
        at, wide = store.record.offset_s + frame / store.record.rate_hz, 0.5 / store.record.rate_hz
        if (shared := min(end, at + wide) - max(begin, at - wide)) > 2e-6:
            found[frame] = shared
    return {frame: value / sum(found.values()) for frame, value in found.items()}


STUDENTS = [
    StudentTimes(1),
    StudentTimes(2, shift=-1),
    StudentTimes(3),
    StudentTimes(4, shift=-3),
    StudentTimes(6, 100.0),
    StudentTimes(8, shift=-7),
    StudentTimes(1, 50.0, -0.01),
    StudentTimes(2, 12.5, 0.03),
]
TEACHERS = [(50.0, 0.0), (50.0, 0.0125), (12.5, 0.04), (100 / 3, 0.0), (93.75, 0.004)]


@pytest.mark.parametrize("student", STUDENTS, ids=str)
def test_targets_are_those_of_a_slow_loop_over_times(student):
    for number, (hz, offset_s) in enumerate(TEACHERS):
        store = SpeechStore(hz, offset_s)
        speeds = [(0.9, 1.0, 1.1)[(number + k) % 3] for k in range(4)]
        texts = [""] * 4
        batch = reader_of(store, student).read(IDS, texts, rows=rows_of(student, speeds=speeds), speeds=speeds)
        positions, [target] = batch.positions["ear"], batch.targets.values()
        mean, std = store.norms[VIEW]
        at, masked = 0, 0
        for b, (i, speed) in enumerate(zip(IDS, speeds)):
            for state in range(math.ceil(rows_of(student, [i], [speed])[0] / student.rows)):
                weights = shares(store, student, i, speed, state)
                if not weights:
                    masked += 1
                    continue
                expected = sum(w * store.states[VIEW, i][frame].astype(float) for frame, w in weights.items())
                assert positions.row[at] == b * positions.grid + state
                np.testing.assert_allclose(target[at], (expected - mean) / std, rtol=1e-3, atol=2e-3)
                at += 1
        assert at == len(target) == positions.kept and masked == positions.masked
        assert positions.lengths.tolist() == student.states(rows_of(student, speeds=speeds)).tolist()


@pytest.mark.parametrize("student", [StudentTimes(4), StudentTimes(2, 50.0), StudentTimes(1, 25.0)], ids=str)
def test_codes_are_those_of_a_slow_loop(student):
    """The mean of the cross-entropies of the frames behind a state, by their shares, and over the codebooks."""
    store, speeds = SpeechStore(dtype="pq:3"), [1.1, 1.0, 0.9, 1.0]
    reader = reader_of(store, student, codes=True)
    [spec] = reader.views
    assert (spec.width, spec.codebooks) == (C * 256, C)
    batch = reader.read(IDS, [""] * 4, rows=rows_of(student, speeds=speeds), speeds=speeds)
    transfer = Transfer(reader.views, 6, aligner="frames", distance="codes")
    encoder = torch.randn(4, 200, 6, generator=torch.manual_seed(0))
    found = transfer(encoder, batch.positions["ear"].lengths, batch)
    losses = []
    for b, (i, speed) in enumerate(zip(IDS, speeds)):
        for state in range(int(batch.positions["ear"].lengths[b])):
            logits = transfer.heads[0](encoder[b, state]).view(C, 256).log_softmax(-1)
            weights = shares(store, student, i, speed, state)
            own = [
                sum(-w * logits[c, int(store.codes[VIEW, i][frame, c])] for frame, w in weights.items())
                for c in range(C)
                if weights
            ]
            losses += [float(sum(own).detach()) / C] if weights else []
    assert found.positions == len(losses)
    assert found.loss.item() == pytest.approx(np.mean(losses), rel=1e-4)
    found.loss.backward()
    assert transfer.heads[0].weight.grad.abs().max() > 0


def test_each_draw_is_an_utterances_own():
    student, share = StudentTimes(4), 0.3
    lengths = student.states(rows_of(student))
    index, counts = drawn(lengths, share, IDS, 7, 3)
    again = [drawn(lengths[b : b + 1], share, [i], 7, 3)[0] for b, i in enumerate(IDS)]
    np.testing.assert_array_equal(index, np.concatenate(again))
    assert counts.tolist() == [len(found) for found in again]
    assert not np.array_equal(index, drawn(lengths, share, IDS, 7, 4)[0])
    assert not np.array_equal(index, drawn(lengths, share, IDS, 8, 3)[0])
    seen = np.zeros(int(lengths[0]))
    for step in range(2000):
        found, [count] = drawn(lengths[:1], share, IDS[:1], 7, step)
        assert len(set(found.tolist())) == count == len(found) and abs(count - share * lengths[0]) < 1
        seen[found] += 1
    # each state is drawn as often as any other
    assert abs(seen / 2000 - share).max() < 0.05
    assert drawn(lengths, 1.0, IDS, 7, 3)[0].tolist() == [k for n in lengths for k in range(n)]


def test_a_share_of_the_states_has_the_targets_that_they_have_among_all():
    student, store = StudentTimes(4), SpeechStore()
    rows = rows_of(student)
    every = reader_of(store, student).read(IDS, [""] * 4, rows=rows)
    some = reader_of(store, student, share=0.4).read(IDS, [""] * 4, rows=rows, step=5)
    of = {int(row): k for k, row in enumerate(every.positions["ear"].row)}
    kept = [of[int(row)] for row in some.positions["ear"].row]
    assert 0 < len(kept) < 0.5 * every.positions["ear"].kept
    torch.testing.assert_close(some.targets[VIEW.address], every.targets[VIEW.address][kept])
    assert torch.equal(some.positions["ear"].key, every.positions["ear"].key[kept])


@pytest.mark.parametrize(("student", "teacher", "states"), [(25.0, 50.0, 2), (50.0, 50.0, 2), (50.0, 12.5, 11)])
def test_neighbours_of_a_frame_are_no_contrasts(student, teacher, states):
    """Two frames on each side: with four states a frame, states up to 2 * 4 + 3 apart may have such frames."""
    assert reach(student, teacher) == states
    lengths = np.array([30, 20])
    index = np.concatenate([np.arange(30), np.arange(20)])
    key = torch.from_numpy(frame_keys(["a", "b"], lengths, index))
    generator = torch.manual_seed(0)
    prediction, target = torch.randn(50, D, generator=generator), torch.randn(50, D, generator=generator)
    found = distance_named("contrastive", temperature=0.5)(prediction, target, key, states)
    for k in range(50):
        score = torch.cosine_similarity(prediction[k], target, dim=-1) / 0.5
        own = (k >= 30) == (torch.arange(50) >= 30)
        near = own & ((torch.arange(50) - k).abs() <= states) & (torch.arange(50) != k)
        assert float(found[k]) == pytest.approx(float(score[~near].logsumexp(0) - score[k]), rel=1e-4)


def test_an_utterance_gives_what_it_gives_alone_and_padding_gives_nothing():
    student, store = StudentTimes(4), SpeechStore()
    reader = reader_of(store, student, share=0.6)
    transfer = Transfer(reader.views, 6, aligner="frames", distance="mse")
    rows = rows_of(student)
    batch = reader.read(IDS, [""] * 4, rows=rows, step=2)
    lengths = batch.positions["ear"].lengths
    encoder = torch.randn(4, int(lengths.max()) + 3, 6, generator=torch.manual_seed(1))
    encoder[torch.arange(encoder.shape[1]) >= lengths[:, None]] = float("nan")
    encoder.requires_grad_()
    whole = transfer(encoder, lengths, batch)
    whole.loss.backward()
    total, count = 0.0, 0
    for b, i in enumerate(IDS):
        own = reader.read([i], [""], rows=rows[b : b + 1], step=2)
        alone = transfer(encoder[b : b + 1, : int(lengths[b])], lengths[b : b + 1], own)
        total, count = total + alone.loss.item() * alone.positions, count + alone.positions
    assert count == whole.positions
    assert whole.loss.item() == pytest.approx(total / count, rel=1e-5)
    used = encoder.grad.abs().sum(-1) > 0
    expected = torch.zeros_like(used).flatten()
    row = batch.positions["ear"].row
    expected[row // batch.positions["ear"].grid * used.shape[1] + row % batch.positions["ear"].grid] = True
    assert torch.equal(used.flatten(), expected)
    with pytest.raises(ValueError, match=r"states in the positions, 5 in the encoder"):
        transfer(encoder[:, :5].detach(), lengths.clamp(max=5), batch)


def test_shuffled_frames_are_those_of_another_utterance():
    student, store = StudentTimes(4), SpeechStore()
    plain, shuffled = (reader_of(store, student, control=c, seed=3) for c in (None, "shuffled"))
    partner = shuffled_partners(store.lengths("ear"), 3, store.index.text_hash)
    ids = [i for row, i in enumerate(IDS) if partner[row] >= 0]
    assert 0 < len(ids) < 4
    rows = rows_of(student, ids)
    own, given = (reader.read(ids, [""] * len(ids), rows=rows) for reader in (plain, shuffled))
    assert torch.equal(own.positions["ear"].key, given.positions["ear"].key)
    lent = SpeechStore()
    for row, i in enumerate(IDS):
        if partner[row] >= 0:
            lent.states[VIEW, i] = store.states[VIEW, IDS[partner[row]]][: store.frames[i]]
    expected = reader_of(lent, student).read(ids, [""] * len(ids), rows=rows)
    torch.testing.assert_close(given.targets[VIEW.address], expected.targets[VIEW.address])
    assert not torch.equal(given.targets[VIEW.address], own.targets[VIEW.address])
    assert shuffled.read(IDS, [""] * 4, rows=rows_of(student)).skipped == 4 - len(ids)


def test_audio_of_another_length_is_an_error_that_names_it():
    student, store = StudentTimes(4), SpeechStore()
    rows = rows_of(student)
    reader_of(store, student).read(IDS, [""] * 4, rows=rows + np.array([3, -3, 0, 2]))
    longer = rows + np.array([0, 0, 0, 50])
    with pytest.raises(StaleError, match=r"ear: .* have 1\.80 s of audio and the store 1\.29 s for d; .*skip"):
        reader_of(store, student).read(IDS, [""] * 4, rows=longer)
    # at another speed, so many rows would be right
    with pytest.raises(StaleError, match=r"1\.80 s of audio and the store 1\.99 s for a"):
        reader_of(store, student).read(IDS, [""] * 4, rows=rows, speeds=[0.9, 1.0, 1.0, 1.0])
    found = reader_of(store, student, on_missing="skip").read(IDS, [""] * 4, rows=longer)
    assert found.skipped == 1 and set((found.positions["ear"].row // found.positions["ear"].grid).tolist()) == {0, 1, 2}


def test_an_utterance_that_the_teacher_lacks():
    student, store = StudentTimes(4), SpeechStore()
    rows = rows_of(student)
    del store.frames["b"]
    store.lengths = lambda teacher: np.array([store.frames.get(i, 0) for i in IDS])
    with pytest.raises(NoStoreError, match="no states of b"):
        reader_of(store, student).read(IDS, [""] * 4, rows=rows)
    skipping = reader_of(store, student, on_missing="skip")
    found = skipping.read(IDS, [""] * 4, rows=rows)
    assert found.skipped == 1 and found.positions["ear"].lengths[1] == 0
    transfer = Transfer(skipping.views, 6, aligner="frames")
    nothing = skipping.read(["b"], [""], rows=rows[1:2])
    loss = transfer(torch.randn(1, 9, 6), torch.tensor([9]), nothing).loss
    loss.backward()
    assert float(loss.detach()) == 0 and all(p.grad is not None for p in transfer.parameters())


def test_damaged_frames_are_an_error_that_names_the_utterance():
    student, store = StudentTimes(4), SpeechStore()
    store.states[VIEW, "c"][3] = np.nan
    with pytest.raises(StoreError, match=r"not finite for c; .*verify"):
        reader_of(store, student).read(IDS, [""] * 4, rows=rows_of(student))
    assert reader_of(store, student, on_missing="skip").read(IDS, [""] * 4, rows=rows_of(student)).skipped == 1


def test_what_does_not_go_together_is_refused_by_name(store):
    student, speech = StudentTimes(4), SpeechStore()
    with pytest.raises(ConfigError, match=r'ear/alone/4: .*speech teacher.*expected a text teacher.*"frames"'):
        TargetReader([(speech, speech.views)])
    with pytest.raises(ConfigError, match=r"pieces/alone/3: .*text teacher.*expected a speech teacher.*occupancy"):
        TargetReader([(store, store.views)], "state", student=student)
    for control in ("static", "words", "words-shuffled"):
        with pytest.raises(ConfigError, match=rf"ear/alone/4: the control {control} needs a text"):
            reader_of(speech, student, control=control)
    with pytest.raises(ConfigError, match=r"states of ear/alone/4 are float16 \(expected .*pq:M\); .*--dtype pq:32"):
        reader_of(speech, student, codes=True)
    with pytest.raises(ConfigError, match="needs the times of the encoder states"):
        TargetReader([(speech, speech.views)], "state")
    with pytest.raises(ConfigError, match="needs the rows of features"):
        reader_of(speech, student).read(IDS, [""] * 4)
    states, codes = reader_of(speech, student).views, reader_of(SpeechStore(dtype="pq:3"), student, codes=True).views
    with pytest.raises(ConfigError, match=r"distance codes: the targets of ear/alone/4 are states"):
        Transfer(states, 6, aligner="frames", distance="codes")
    with pytest.raises(ConfigError, match=r"distance mse: the targets of ear/alone/4 are codes"):
        Transfer(codes, 6, aligner="frames", distance="mse")


def test_several_views_of_one_speech_teacher_share_their_states():
    store, student = SpeechStore(views=(CODED, VIEW)), StudentTimes(4)
    reader = reader_of(store, student, sample=1)
    rows = rows_of(student)
    transfer = Transfer(reader.views, 6, aligner="frames", distance="contrastive", mixing="sample")
    seen = set()
    for step in range(6):
        batch = reader.read(IDS, [""] * 4, rows=rows, step=step)
        seen |= batch.targets.keys()
        assert transfer(torch.randn(4, 50, 6), batch.positions["ear"].lengths, batch).positions == 117
    assert seen == {VIEW.address, CODED.address}
