"""The transfer loss as a whole: shapes, padding, a gradient in every head, real RNN-T occupancies."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from stillhouse.data.errors import ConfigError
from stillhouse.distill import TargetReader, Transfer
from stillhouse.train.rnnt import rnnt_loss

IDS = ["b", "d", "a", "c"]
H, W = 8, 6
# "a" has 4 positions of one teacher and 2 frames: more positions than frames
FRAMES = [5, 1, 2, 7]
COMBINATIONS = [(a, p) for a in ("attention", "occupancy", "cif", "predictor") for p in ("token", "word", "unit")]


@pytest.fixture
def make(store, fakes):
    texts = [store.texts[i] for i in IDS]
    units = [fakes.characters(t) for t in texts]

    def build(position="token", seed=0, reader=None, **options):
        reader = TargetReader([(store, store.views)], position=position, **(reader or {}))
        torch.manual_seed(seed)
        transfer = Transfer(reader.views, H, embeddings=reader.embeddings, predictor_dim=W, **options)
        return reader, transfer, texts, units

    return build


def speech(units, seed=0):
    """Encoder [B, T, H], lengths and an occupancy of random rows that sum to 1 over an utterance's frames."""
    generator = torch.manual_seed(seed)
    lengths = torch.tensor(FRAMES)
    encoder = torch.randn(4, max(FRAMES), H, generator=generator)
    occupancy = torch.rand(4, max(map(len, units)), max(FRAMES), generator=generator)
    occupancy *= torch.arange(max(FRAMES)) < lengths[:, None, None]
    occupancy /= occupancy.sum(-1, keepdim=True)
    for b, u in enumerate(units):
        occupancy[b, len(u) :] = 0
    return encoder, lengths, occupancy


def predictions(units, seed=1):
    """States of a prediction network [B, U + 1, W], NaN where an utterance has no more units."""
    states = torch.randn(len(units), max(map(len, units)) + 1, W, generator=torch.manual_seed(seed))
    for b, u in enumerate(units):
        states[b, len(u) + 1 :] = float("nan")
    return states


@pytest.mark.parametrize(("aligner", "position"), COMBINATIONS)
@pytest.mark.parametrize("distance", ["cosine", "l1", "smooth_l1", "mse", "contrastive"])
def test_every_parameter_gets_a_gradient_and_so_does_the_encoder(make, aligner, position, distance):
    reader, transfer, texts, units = make(position, aligner=aligner, distance=distance, mixing="learned")
    encoder, lengths, occupancy = speech(units)
    encoder.requires_grad_()
    predictor = predictions(units).requires_grad_()
    found = transfer(encoder, lengths, reader.read(IDS, texts, units), occupancy, predictor)
    found.loss.backward()
    for name, parameter in transfer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # The key's bias shifts all scores alike, which a softmax ignores
        if name != "aligner.key.bias":
            assert parameter.grad.abs().max() > 0, name
    student = predictor if aligner == "predictor" else encoder
    assert student.grad[0].abs().sum() > 0 and student.grad.isfinite().all()
    assert transfer.needs_occupancy == (aligner == "occupancy") and transfer.needs_predictor == (student is predictor)
    assert list(found.per_view) == [v.address for v in reader.views]
    assert all(value.ndim == 0 and not value.requires_grad for value in found.per_view.values())
    assert found.loss.item() == pytest.approx(sum(v.item() for v in found.per_view.values()) / 4, rel=1e-5)
    if position == "token":
        assert found.positions == 8 + 6 and found.masked == 0


@pytest.mark.parametrize(("aligner", "position"), COMBINATIONS)
def test_padding_of_any_kind_changes_nothing(make, aligner, position):
    """Each utterance alone, its frames cut to length, against the batch with NaN beyond every utterance's end."""
    reader, transfer, texts, units = make(position, aligner=aligner, distance="l1")
    encoder, lengths, occupancy = speech(units)
    whole = encoder.masked_fill(torch.arange(max(FRAMES))[:, None] >= lengths[:, None, None], float("nan"))
    predictor = predictions(units)
    batch = transfer(whole, lengths, reader.read(IDS, texts, units), occupancy, predictor)
    totals = dict.fromkeys(batch.per_view, 0.0)
    counts = dict.fromkeys(batch.per_view, 0)
    positions = masked = 0
    for b, i in enumerate(IDS):
        target = reader.read([i], [texts[b]], [units[b]])
        part = slice(b, b + 1)
        alone = transfer(
            encoder[part, : FRAMES[b]],
            lengths[part],
            target,
            occupancy[part, : len(units[b]), : FRAMES[b]],
            predictor[part, : len(units[b]) + 1],
        )
        positions, masked = positions + alone.positions, masked + alone.masked
        for address, value in alone.per_view.items():
            count = len(target.targets[address])
            totals[address] += value.item() * count
            counts[address] += count
    assert (positions, masked) == (batch.positions, batch.masked)
    for address, value in batch.per_view.items():
        assert value.item() == pytest.approx(totals[address] / counts[address], rel=1e-5)


def test_positions_without_units_leave_the_occupancy_and_are_counted(make):
    reader, transfer, texts, units = make("token", aligner="occupancy")
    units[3] = units[3][:0]  # the full stops of "..." are no units
    encoder, lengths, occupancy = speech(units)
    found = transfer(encoder, lengths, reader.read(IDS, texts, units), occupancy)
    assert found.masked == 2 and found.positions == 12


@pytest.mark.parametrize("aligner", ["attention", "occupancy", "cif", "predictor"])
@pytest.mark.parametrize("mixing", ["mean", "learned"])
def test_a_batch_with_nothing_gives_zero_and_gradients_of_zero(make, aligner, mixing):
    reader, transfer, _, _ = make("word", aligner=aligner, mixing=mixing)
    batch = reader.read(["d", "c"], ["", "..."], [torch.zeros(0, 2).int().numpy()] * 2)
    encoder = torch.randn(2, 3, H)
    found = transfer(encoder, torch.tensor([3, 1]), batch, torch.zeros(2, 0, 3), torch.zeros(2, 1, W))
    assert found.loss.item() == 0 and found.per_view == {} and found.positions == 0
    found.loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in transfer.parameters())


@pytest.mark.parametrize("aligner", ["attention", "occupancy", "cif"])
def test_sampling_views_leaves_no_head_without_a_gradient(make, aligner):
    reader, transfer, texts, units = make(aligner=aligner, mixing="sample", reader={"sample": 1})
    encoder, lengths, occupancy = speech(units)
    found = transfer(encoder, lengths, reader.read(IDS, texts, units, step=4), occupancy)
    assert len(found.per_view) == 1
    found.loss.backward()
    assert all(p.grad is not None for p in transfer.parameters())
    assert sum(bool(head.weight.grad.any()) for head in transfer.heads) == 1


def test_with_the_occupancies_of_the_rnnt_loss(make):
    """Units and frames of the real loss; what reaches the encoder is finite, the occupancy rows sum to 1."""
    reader, transfer, texts, units = make("token", aligner="occupancy")
    assert transfer.needs_occupancy
    lengths = torch.tensor([9, 8, 12, 10], dtype=torch.int32)
    generator = torch.manual_seed(0)
    encoder = torch.randn(4, 12, H, generator=generator, requires_grad=True)
    counts = torch.tensor([len(u) for u in units], dtype=torch.int32)
    targets = torch.randint(1, 5, (4, int(counts.max())), generator=generator, dtype=torch.int32)
    joint = torch.randn(int(counts.max()) + 1, 5, H, generator=generator)
    logits = torch.einsum("bth,uvh->btuv", encoder, joint)
    loss, occupancy = rnnt_loss(logits, targets, lengths, counts, blank=0, reduction="sum", return_occupancy=True)
    sums = occupancy.sum(-1)
    assert all(torch.allclose(sums[b, :n], torch.ones(n), atol=1e-4) for b, n in enumerate(counts.tolist()))
    found = transfer(encoder, lengths, reader.read(IDS, texts, units), occupancy)
    (loss + found.loss).backward()
    assert encoder.grad.isfinite().all() and found.positions == 14


@pytest.mark.parametrize("aligner", ["attention", "occupancy", "cif"])
def test_under_autocast(make, aligner):
    reader, transfer, texts, units = make(aligner=aligner)
    encoder, lengths, occupancy = speech(units)
    batch = reader.read(IDS, texts, units)
    expected = transfer(encoder, lengths, batch, occupancy)
    with torch.autocast("cpu", torch.bfloat16):
        found = transfer(encoder, lengths, batch, occupancy)
    assert found.loss.dtype == torch.float32
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=0.02)


def test_a_student_can_learn_what_a_teacher_holds(make):
    """Random frames, one fixed batch: the heads overfit it, or gradients do not arrive."""
    reader, transfer, texts, units = make("token", aligner="occupancy", distance="cosine")
    encoder, lengths, occupancy = speech(units)
    encoder.requires_grad_()
    batch = reader.read(IDS, texts, units)
    optimiser = torch.optim.Adam([encoder, *transfer.parameters()], lr=0.02)
    first = transfer(encoder, lengths, batch, occupancy).loss.item()
    for _ in range(150):
        optimiser.zero_grad()
        transfer(encoder, lengths, batch, occupancy).loss.backward()
        optimiser.step()
    assert first > 0.8 and transfer(encoder, lengths, batch, occupancy).loss.item() < 0.2


def test_what_does_not_fit_is_refused(make):
    reader, transfer, texts, units = make(aligner="occupancy")
    encoder, lengths, occupancy = speech(units)
    batch = reader.read(IDS, texts, units)
    with pytest.raises(ValueError, match="needs the loss's occupancy"):
        transfer(encoder, lengths, batch)
    with pytest.raises(ValueError, match="3 utterances in the encoder's output, 4 in the targets"):
        transfer(encoder[:3], lengths[:3], batch, occupancy)
    with pytest.raises(ValueError, match="needs the prediction network's states"):
        make(aligner="predictor")[1](encoder, lengths, batch, occupancy)
    with pytest.raises(ConfigError, match="taps no encoder layer"):
        make(aligner="predictor", taps=2)
    with pytest.raises(ValueError, match="needs unit_spans"):
        transfer(encoder, lengths, reader.read(IDS, texts), occupancy)
    with pytest.raises(ConfigError, match="no input embeddings of pieces, words"):
        Transfer(reader.views, H, aligner="attention")
    with pytest.raises(ConfigError, match="no aligner 'ctc'"):
        Transfer(reader.views, H, aligner="ctc")
    with pytest.raises(ConfigError, match="without views"):
        Transfer([], H, aligner="occupancy")


def test_padding_changes_nothing_with_several_taps_either(make):
    reader, transfer, texts, units = make("word", aligner="attention", taps=3)
    encoder, lengths, _ = speech(units)
    torch.nn.init.normal_(transfer.tap_logits, generator=torch.manual_seed(3))
    padding = (torch.arange(max(FRAMES)) >= lengths[:, None])[..., None]
    found = []
    for filling in (0.0, float("nan")):
        taps = [(scale * encoder).masked_fill(padding, filling).requires_grad_() for scale in (1, -2, 0.5)]
        transfer.zero_grad()
        loss = transfer(taps, lengths, reader.read(IDS, texts, units)).loss
        loss.backward()
        found.append([loss.detach(), transfer.tap_logits.grad, *(tap.grad for tap in taps)])
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*found, strict=True))
    assert found[0][1].abs().min() > 0


@pytest.mark.parametrize("aligner", ["attention", "cif", "predictor"])
def test_the_mean_over_all_draws_is_the_mean_over_all_views(make, aligner):
    """`sample` k = 1: each view is as likely, so the expected loss and gradient are those of mixing `mean`."""
    reader, transfer, texts, units = make("word", aligner=aligner)
    encoder, lengths, _ = speech(units)

    def step(reader, number):
        student = (predictions(units) if aligner == "predictor" else encoder).clone().requires_grad_()
        speaks = (encoder, None, student) if aligner == "predictor" else (student, None, None)
        found = transfer(speaks[0], lengths, reader.read(IDS, texts, units, step=number), *speaks[1:])
        found.loss.backward()
        return next(iter(found.per_view)), found.loss.detach(), student.grad

    _, expected, gradient = step(reader, 0)
    sampled, drawn = make("word", aligner=aligner, reader={"sample": 1})[0], {}
    for number in range(60):
        address, loss, grad = step(sampled, number)
        drawn[address] = (loss, grad)
    assert drawn.keys() == {view.address for view in reader.views}
    torch.testing.assert_close(torch.stack([loss for loss, _ in drawn.values()]).mean(), expected)
    torch.testing.assert_close(torch.stack([grad for _, grad in drawn.values()]).mean(0), gradient)


@pytest.mark.parametrize("aligner", ["attention", "occupancy", "cif", "predictor"])
@pytest.mark.parametrize("mixing", ["mean", "learned", "sample"])
def test_data_parallel_training_needs_no_search_for_unused_parameters(make, tmp_path, aligner, mixing):
    """DDP refuses the next step if a parameter had no gradient in the one before: sampled views, empty batches."""
    sample = {"sample": 1} if mixing == "sample" else {}
    taps = 1 if aligner == "predictor" else 2
    reader, transfer, texts, units = make("word", aligner=aligner, mixing=mixing, taps=taps, reader=sample)
    encoder, lengths, occupancy = speech(units)
    taps = [encoder.clone().requires_grad_() for _ in range(taps)]
    nothing = [torch.zeros(0, 2).int().numpy()] * 2
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(transfer, find_unused_parameters=False)
        for step in range(6):
            batch = reader.read(IDS, texts, units, step=step)
            parallel(taps, lengths, batch, occupancy, predictions(units)).loss.backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in transfer.parameters())
            batch = reader.read(["d", "c"], ["", "..."], nothing, step=step)
            parallel(
                [t[:2] for t in taps], lengths[:2], batch, torch.zeros(2, 0, 7), torch.zeros(2, 1, W)
            ).loss.backward()
    finally:
        torch.distributed.destroy_process_group()


def test_several_taps_are_mixed_and_weighed_by_the_gradient(make):
    reader, transfer, texts, units = make(aligner="cif", taps=2)
    encoder, lengths, _ = speech(units)
    batch = reader.read(IDS, texts, units)
    found = transfer([encoder, encoder], lengths, batch)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(make(aligner="cif")[1](encoder, lengths, batch).loss.item())
    assert transfer.tap_logits.grad is not None
    transfer([encoder, 2 * encoder], lengths, batch).loss.backward()
    assert transfer.tap_logits.grad.abs().max() > 0
    with pytest.raises(ValueError, match="1 taps of the encoder, 2 expected"):
        transfer(encoder, lengths, batch)


def test_distill_imports_no_language_model():
    code = "import sys, stillhouse.distill; sys.exit(any(m in sys.modules for m in ('transformers', 'zarr')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
