"""The loss in other people's training loops: torchaudio's model and calls, mixed precision, several processes."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
import torchaudio
from torchaudio.models.rnnt import emformer_rnnt_model

from stillhouse.train.rnnt import RNNTLoss, precompile, rnnt_loss, rnnt_loss_joint

V, BLANK = 13, 12


def model():
    torch.manual_seed(0)
    return emformer_rnnt_model(
        input_dim=8, encoding_dim=16, num_symbols=V, segment_length=4, right_context_length=2,
        time_reduction_input_dim=8, time_reduction_stride=2, transformer_num_heads=2, transformer_ffn_dim=16,
        transformer_num_layers=1, transformer_dropout=0.0, transformer_activation="gelu",
        transformer_left_context_length=4, transformer_max_memory_size=0,
        transformer_weight_init_scale_strategy="depthwise", transformer_tanh_on_mem=True, symbol_embedding_dim=8,
        num_lstm_layers=1, lstm_layer_norm=True, lstm_layer_norm_epsilon=1e-3, lstm_dropout=0.0,
    )  # fmt: skip


def batches(count=6, B=3):
    """Yield ragged batches; the longest utterance fills each, as torchaudio's loss requires."""
    g = torch.Generator().manual_seed(1)
    for _ in range(count):
        frames, units = torch.randint(16, 33, (B,), generator=g) // 4 * 4, torch.randint(1, 7, (B,), generator=g)
        sources = torch.randn(B, int(frames.max()) + 2, 8, generator=g)  # right context for the last segment
        yield sources, frames.int(), torch.randint(0, BLANK, (B, int(units.max())), generator=g).int(), units.int()


def trained(loss_of, steps=6) -> list[float]:
    """Return the losses of a plain loop: model, loss, backward, clip, step."""
    net = model()
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    losses = []
    for sources, frames, targets, units in batches(steps):
        before = torch.nn.functional.pad(targets, (1, 0), value=BLANK)
        logits, lengths, _, _ = net(sources, frames, before, units + 1)
        loss = loss_of(logits, targets, lengths, units)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("options", [{}, {"clamp": 0.1, "reduction": "sum"}, {"inplace": True}])
def test_torchaudios_model_trains_the_same(options):
    theirs = trained(torchaudio.transforms.RNNTLoss(**{k: v for k, v in options.items() if k != "inplace"}))
    ours = trained(RNNTLoss(**options))
    assert theirs[-1] != pytest.approx(theirs[0], rel=1e-2)
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_it_takes_torchaudios_place(monkeypatch):
    """Code that looks the function up by its name in torchaudio gets ours, by position and by keyword."""
    expected = trained(lambda *args: torchaudio.functional.rnnt_loss(*args, BLANK, -1, "mean", True))
    monkeypatch.setattr(torchaudio.functional, "rnnt_loss", rnnt_loss)
    found = trained(lambda *args: torchaudio.functional.rnnt_loss(*args, BLANK, -1, "mean", True))
    assert found == pytest.approx(expected, rel=1e-4) and found != expected
    names = ("logits", "targets", "logit_lengths", "target_lengths")
    by_name = trained(lambda *args: torchaudio.functional.rnnt_loss(**dict(zip(names, args)), blank=BLANK))
    assert by_name == found


def test_signatures_begin_as_torchaudios():
    for ours, theirs in (
        (rnnt_loss, torchaudio.functional.rnnt_loss),
        (RNNTLoss, torchaudio.transforms.RNNTLoss),
        (RNNTLoss.forward, torchaudio.transforms.RNNTLoss.forward),
    ):
        wanted = [(p.name, p.default) for p in inspect.signature(theirs).parameters.values()]
        found = [(p.name, p.default) for p in inspect.signature(ours).parameters.values()]
        assert found[: len(wanted)] == wanted


def test_the_module_refuses_what_the_function_does_not_take():
    assert "fastemit_lambda=0.1" in repr(RNNTLoss(blank=0, fastemit_lambda=0.1))
    with pytest.raises(TypeError, match="fastemit"):
        RNNTLoss(fastemit=0.1)


def test_mixed_precision():
    """A joint under autocast gives bfloat16 logits; the loss of them is float32 and near the one without autocast."""
    losses = []
    for enabled in (False, True):

        def loss_of(logits, targets, lengths, units, enabled=enabled):
            joint = torch.nn.Linear(V, V)
            torch.nn.init.eye_(joint.weight)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                out = joint(logits)
                assert out.dtype == (torch.bfloat16 if enabled else torch.float32)
                loss = rnnt_loss(out, targets, lengths, units, inplace=True)
            assert loss.dtype == torch.float32
            return loss

        losses.append(trained(loss_of))
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


PROCESS = """
import sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from stillhouse.train.rnnt import rnnt_loss, rnnt_loss_joint

rank, world, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=world)

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.predictor = torch.nn.Linear(5, 8), torch.nn.Embedding(7, 8)
        self.joint = torch.nn.Linear(8, 7)

    def forward(self, x, y, T, U, fused):
        e, p = self.encoder(x), self.predictor(torch.nn.functional.pad(y, (1, 0)))
        if fused:
            return rnnt_loss_joint(e, p, self.joint.weight, self.joint.bias, y, T, U, 0, eps=0)
        return rnnt_loss(self.joint(torch.tanh(e[:, :, None] + p[:, None])), y, T, U, 0, inplace=True)

g = torch.Generator().manual_seed(2)
x, y = torch.randn(4, 9, 5, generator=g), torch.randint(1, 7, (4, 3), generator=g)
T, U = torch.tensor([9, 7, 5, 9]), torch.tensor([3, 2, 0, 1])
mine = slice(rank * 4 // world, (rank + 1) * 4 // world)
found = []
for fused in (False, True):
    net = DistributedDataParallel(Net())
    net(x[mine], y[mine], T[mine], U[mine], fused).backward()
    found += [p.grad for p in net.parameters()]
if rank == 0:
    torch.save(found, out)
dist.destroy_process_group()
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_several_processes(tmp_path):
    """Gradients of two processes with half of a batch each are those of one with all of it."""
    precompile()  # It fills the cache once, not in each process.
    results = []
    for world in (1, 2):
        store, out = tmp_path / f"store{world}", tmp_path / f"gradients{world}"
        runs = [
            subprocess.Popen([sys.executable, "-c", PROCESS, str(rank), str(world), str(store), str(out)])
            for rank in range(world)
        ]
        try:
            assert [run.wait(timeout=170) for run in runs] == [0] * world
        finally:
            for run in runs:
                run.kill()
                run.wait()
        results.append(torch.load(out, weights_only=True))
    assert len(results[0]) == 10 and all(v.abs().max() > 0 for v in results[0])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_fused_joint_in_the_same_place():
    """rnnt_loss_joint on the parts of torchaudio's joiner: linear(relu(source + target))."""
    net = model()
    sources, frames, targets, units = next(batches(1))
    before = torch.nn.functional.pad(targets, (1, 0), value=BLANK)
    logits, lengths, _, _ = net(sources, frames, before, units + 1)
    expected = torchaudio.functional.rnnt_loss(logits, targets, lengths, units)
    encoded, lengths = net.transcribe(sources, frames)
    predicted, _, _ = net.predict(before, units + 1, None)
    joiner = net.joiner.linear
    found = rnnt_loss_joint(
        encoded, predicted, joiner.weight, joiner.bias, targets, lengths, units, activation="relu", eps=0
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(v, list(net.joiner.parameters()), retain_graph=True) for v in (found, expected)]
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
