"""Checkpoints: whole or absent, checked when read, never unpickled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from stillhouse.data.errors import CheckpointError
from stillhouse.train.config.sections import Config, DataSection, OptimSection
from stillhouse.train.model.build import build_optimiser
from stillhouse.train.run import checkpoint


def save(folder: Path, step: int) -> checkpoint.Checkpoint:
    return checkpoint.save(folder, {"step": step}, {"model": {"w": torch.full((3,), float(step))}})


def test_round_trip_and_newest(tmp_path: Path) -> None:
    for step in (5, 20, 100):
        save(tmp_path, step)
    found = checkpoint.load(checkpoint.checkpoints(tmp_path)[-1])
    assert found.step == 100
    assert torch.equal(found.tensors("model")["w"], torch.full((3,), 100.0))


def test_what_a_killed_writer_left_is_swept_and_not_read(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / ".step-00000009.123").mkdir()
    found = checkpoint.load(checkpoint.checkpoints(tmp_path)[-1])
    assert found.step == 5
    checkpoint.sweep(tmp_path, 5)
    assert not list(tmp_path.glob(".step-*")) and checkpoint.checkpoints(tmp_path) == [found.path]


def test_prune_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    for step in range(1, 7):
        save(tmp_path, step)
    checkpoint.prune(tmp_path, 2, best=3)
    assert [int(p.name[5:]) for p in checkpoint.checkpoints(tmp_path)] == [3, 5, 6]


def test_killed_while_it_prunes_no_half_of_a_checkpoint_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(1, 4):
        save(tmp_path, step)

    def killed(path: Path, **_: object) -> None:
        next(path.iterdir()).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.shutil, "rmtree", killed)
        checkpoint.prune(tmp_path, 1, best=None)
    assert [checkpoint.load(p).step for p in checkpoint.checkpoints(tmp_path)] == [2, 3]
    checkpoint.sweep(tmp_path, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_refused_in_words(tmp_path: Path, damage: str) -> None:
    found = save(tmp_path, 1)
    path = found.path / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(raw if damage == "flip" else raw[:20])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*(damaged|cannot be read)"):
        checkpoint.load(found.path).tensors("model")


@pytest.mark.parametrize("state", ["", "[]", '{"format": 99}', "{"])
def test_a_foreign_state_is_refused(tmp_path: Path, state: str) -> None:
    found = save(tmp_path, 1)
    (found.path / "state.json").write_text(state)
    with pytest.raises(CheckpointError):
        checkpoint.load(found.path)


def test_weights_of_another_model_are_named() -> None:
    net = nn.Linear(3, 2)
    with pytest.raises(CheckpointError, match=r"bias missing.*other unknown.*weight is"):
        checkpoint.load_weights(net, {"weight": torch.zeros(2, 4), "other": torch.zeros(1)}, Path("x"))


@pytest.mark.parametrize("fused", [False, True])
def test_optimiser_state_round_trip(fused: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, twin = nn.Linear(4, 3), nn.Linear(4, 3)
    twin.load_state_dict(net.state_dict())
    optimisers = [torch.optim.AdamW(n.parameters(), lr=0.1, fused=fused) for n in (net, twin)]
    x = torch.randn(8, 4)

    def step(n: nn.Module, o: torch.optim.Optimizer) -> None:
        o.zero_grad()
        n(x).square().sum().backward()
        o.step()

    step(net, optimisers[0])
    names = {p: n for n, p in net.named_parameters()}
    saved = {k: v.clone() for k, v in checkpoint.optimiser_tensors(optimisers[0], names).items()}
    twin.load_state_dict(net.state_dict())
    twins = {p: n for n, p in twin.named_parameters()}
    checkpoint.restore_optimiser(optimisers[1], twins, saved, tmp_path)
    for n, o in zip((net, twin), optimisers):
        step(n, o)
    assert torch.equal(net.weight, twin.weight)
    with pytest.raises(CheckpointError, match=r"state is another model.s: (weight|bias) has"):
        checkpoint.restore_optimiser(optimisers[1], {}, saved, tmp_path)
    for wrong in (torch.zeros(0), torch.zeros(3, 4, dtype=torch.float64), torch.tensor(1.0), None):
        changed = {k: v for k, v in saved.items() if k != "weight/exp_avg"}
        with pytest.raises(CheckpointError, match="the optimiser's state "):
            fresh = torch.optim.AdamW(twin.parameters(), fused=fused)
            checkpoint.restore_optimiser(
                fresh, twins, changed if wrong is None else changed | {"weight/exp_avg": wrong}, tmp_path
            )


def test_the_optimiser_is_plain_adamw_in_one_kernel(tmp_path: Path) -> None:
    data = DataSection(corpus=tmp_path, features=tmp_path, units=tmp_path)
    config = Config(data=data, optim=OptimSection(lr=0.01, weight_decay=0.3, betas=(0.8, 0.95)))
    torch.manual_seed(0)
    net, twin = (nn.Sequential(nn.Linear(40, 33), nn.LayerNorm(33), nn.Linear(33, 7)) for _ in range(2))
    twin.load_state_dict(net.state_dict())
    ours = build_optimiser(net.parameters(), config, torch.device("cpu"))
    plain = torch.optim.AdamW(
        [
            {"params": [twin[0].weight, twin[2].weight], "weight_decay": 0.3},
            {"params": [twin[0].bias, *twin[1].parameters(), twin[2].bias], "weight_decay": 0.0},
        ],
        lr=0.01,
        betas=(0.8, 0.95),
        foreach=False,
    )
    x = torch.randn(16, 40)
    for _ in range(30):
        for n, o in ((net, ours), (twin, plain)):
            o.zero_grad()
            n(x).square().sum().backward()
            o.step()
    for a, b in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        ours.step()
    assert sum(e.count for e in seen.key_averages() if "adamw" in e.key.lower() and e.key.startswith("aten::")) == 2


def test_any_changed_bit_of_the_state_is_refused(tmp_path: Path) -> None:
    found = checkpoint.save(tmp_path, {"step": 7, "epoch": 2, "position": 31}, {"model": {"w": torch.ones(3)}})
    path = found.path / "state.json"
    raw = path.read_bytes()
    for at in range(len(raw)):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << at % 8]) + raw[at + 1 :])
        with pytest.raises(CheckpointError, match=r"state\.json"):
            checkpoint.load(found.path)


def test_a_damaged_checkpoint_is_passed_over_and_kept_aside(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        save(tmp_path, step)
    (tmp_path / "step-00000012" / "state.json").unlink()
    (tmp_path / "step-00000008" / "model.safetensors").write_bytes(b"foreign")
    found = checkpoint.newest_whole(tmp_path)
    assert found is not None
    newest, tensors, damaged = found
    assert newest.step == 4 and float(tensors["model"]["w"][0]) == 4
    assert [e.where.parent.name for e in damaged] == ["step-00000012", "step-00000008"]
    checkpoint.sweep(tmp_path, newest.step)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "damaged-step-00000008",
        "damaged-step-00000012",
        "step-00000004",
    ]
    (newest.path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"all checkpoints are damaged: delete .* to start again"):
        checkpoint.newest_whole(tmp_path)


def test_a_checkpoint_by_another_name_and_one_of_a_later_format_are_refused(tmp_path: Path) -> None:
    found = save(tmp_path, 4)
    other = found.path.rename(tmp_path / "step-00000009")
    with pytest.raises(CheckpointError, match="step 4 has another name"):
        checkpoint.load(other)
    state = {k: v for k, v in found.state.items() if k != "digest"} | {"format": 3}
    (other / "state.json").write_text(json.dumps(state | {"digest": checkpoint._digest(state)}))
    with pytest.raises(CheckpointError, match="format is 3"):
        checkpoint.newest_whole(tmp_path)  # not damage: it must not be set aside


def test_checkpoints_of_format_1_are_read(tmp_path: Path) -> None:
    found = save(tmp_path, 4)
    state = {k: v for k, v in found.state.items() if k != "digest"} | {"format": 1}
    (found.path / "state.json").write_text(json.dumps(state))
    assert float(checkpoint.load(found.path).tensors("model")["w"][0]) == 4
