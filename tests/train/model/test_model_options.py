"""Joints, losses and what goes with them: each against the same thing written out, and all of them together."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.data.batches.loader import Batch
from stillhouse.data.errors import ConfigError
from stillhouse.distill.aligners import ALIGNERS, NEED_EMBEDDINGS
from stillhouse.distill.batch import Positions, TransferBatch
from stillhouse.distill.targets import ViewSpec
from stillhouse.distill.transfer import Transfer
from stillhouse.train.config import Config, load_config
from stillhouse.train.decode.greedy import Greedy, TdtGreedy, greedy_search
from stillhouse.train.loop.objective import losses
from stillhouse.train.loop.specaugment import spec_augment
from stillhouse.train.model import losses as costs
from stillhouse.train.model.build import build_model
from stillhouse.train.model.losses import transducer_costs
from stillhouse.train.model.transducer import BLANK, Transducer
from stillhouse.train.rnnt import rnnt_loss, tdt_loss
from stillhouse.train.rnnt.reference import tdt_reference
from stillhouse.train.run.identity import weights_hash

ENCODER = {"bins": 80, "dim": 16, "layers": 2, "heads": 2, "inner": 24, "kernel": 5}
MINIMAL = '[data]\ncorpus = "c"\nfeatures = "f"\nunits = "u"\n'
SMALL = ["dim=16", "layers=3", "heads=2", "inner=24", "kernel=5", "predictor_dim=12", "joint_dim=20", "dropout=0.0"]


def config(tmp_path: Path, *changes: str) -> Config:
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL)
    return load_config(path, [*(f"model.{c}" for c in SMALL), *changes])


def transducer(**changes: object) -> Transducer:
    torch.manual_seed(1)
    options = {"predictor_dim": 12, "joint_dim": 20, "dropout": 0.0} | changes
    return Transducer(7, ENCODER, **options).double()  # type: ignore[arg-type]


def states(net: Transducer) -> tuple[Tensor, ...]:
    """Encoder states, targets and lengths of three utterances."""
    torch.manual_seed(2)
    targets = torch.randint(1, 7, (3, 5))
    return torch.randn(3, 9, 16).double(), targets, torch.tensor([9, 6, 3]), torch.tensor([5, 0, 4])


@pytest.mark.parametrize("joint", ["additive", "multiplicative"])
def test_costs_and_gradients_are_those_of_all_logits(joint: str) -> None:
    net = transducer(joint=joint).float()
    x, targets, lengths, target_lengths = states(net)
    found, occupancy = {}, {}
    for fused in (True, False):
        net.zero_grad()
        e, p = net.joint.encoder(x.float()), net.joint.predictor(net.predictor(targets))
        if fused:
            costs, seen = transducer_costs(net, e, p, targets, lengths, target_lengths, eps=0, want_occupancy=True)
        else:
            logits = net.joint(e[:, :, None], p[:, None])
            costs, seen = rnnt_loss(
                logits, targets, lengths, target_lengths, blank=BLANK, reduction="none", return_occupancy=True
            )
        costs.sum().backward()
        assert seen is not None
        occupancy[fused] = seen
        found[fused] = [costs.detach(), *(p.grad.clone() for p in net.joint.parameters() if p.grad is not None)]
    assert len(found[True]) == (7 if joint == "multiplicative" else 6)
    for a, b in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(occupancy[True], occupancy[False], atol=1e-5, rtol=0)


@pytest.mark.parametrize("joint", ["additive", "multiplicative"])
def test_token_and_duration_costs_are_the_references(joint: str) -> None:
    net = transducer(joint=joint, durations=(0, 1, 3)).float()
    x, targets, lengths, target_lengths = states(net)
    e, p = net.joint.encoder(x.float()), net.joint.predictor(net.predictor(targets))
    costs, occupancy = transducer_costs(net, e, p, targets, lengths, target_lengths, sigma=0.05, want_occupancy=True)
    hidden = torch.tanh(e[:, :, None] * p[:, None] if joint == "multiplicative" else e[:, :, None] + p[:, None])
    assert net.joint.durations is not None
    tokens, steps = net.joint.output(hidden).detach().double(), net.joint.durations(hidden).detach().double()
    expected = tdt_reference(
        tokens, steps, targets, lengths, target_lengths, blank=BLANK, durations=(0, 1, 3), sigma=0.05
    )
    torch.testing.assert_close(costs.detach().double(), torch.as_tensor(expected.costs), atol=1e-4, rtol=1e-5)
    assert occupancy is not None
    torch.testing.assert_close(occupancy.sum(2), (torch.arange(5) < target_lengths[:, None]).float(), atol=1e-4, rtol=0)
    costs.sum().backward()
    assert net.joint.durations.weight.grad is not None and net.joint.durations.weight.grad.abs().sum() > 0


def test_token_and_duration_logits_come_a_few_utterances_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    net = transducer(durations=(0, 1, 2)).float()
    x, targets, lengths, target_lengths = states(net)
    seen: list[tuple[int, ...]] = []

    def watched(tokens: Tensor, *arguments: Any, **options: Any) -> Any:
        seen.append(tuple(tokens.shape[:3]))
        return tdt_loss(tokens, *arguments, **options)

    monkeypatch.setattr(costs, "tdt_loss", watched)
    found = []
    for room, shapes in (
        (10**6, [(3, 9, 6)]),
        (10 * 60, [(1, 9, 6), (2, 6, 5)]),
        (1, [(1, 9, 6), (1, 6, 1), (1, 3, 5)]),
    ):
        monkeypatch.setattr(costs, "MOST_LOGITS", room)
        net.zero_grad()
        seen.clear()
        e, p = net.joint.encoder(x.float()), net.joint.predictor(net.predictor(targets))
        each, occupancy = transducer_costs(net, e, p, targets, lengths, target_lengths, want_occupancy=True)
        assert seen == shapes and occupancy is not None
        (each * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        found.append([each.detach(), occupancy, *(p.grad for p in net.parameters() if p.grad is not None)])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def plain_tdt(net: Transducer, x: Tensor, most: int) -> tuple[list[int], list[int]]:
    """One utterance, one step at a time: units and frames of states [T, dim]."""
    units: list[int] = []
    frames: list[int] = []
    t = here = 0
    while t < len(x):
        predicted = net.predictor(torch.tensor([units], dtype=torch.int64).reshape(1, -1))[0, -1]
        tokens, steps = net.joint.with_durations(net.joint.encoder(x[t]), net.joint.predictor(predicted))
        unit, ranking = int(tokens.argmax()), steps.argsort(descending=True).tolist()
        here += 1
        moves = [net.durations[k] for k in ranking]
        if unit == BLANK or here == most:
            moves = [d for d in moves if d > 0]
        if unit != BLANK:
            units.append(unit)
            frames.append(t)
        t += moves[0]
        here = 0 if moves[0] else here
    return units, frames


@pytest.mark.parametrize(("predictor", "joint"), [("stateless", "additive"), ("lstm", "multiplicative")])
def test_greedy_steps_over_frames_as_the_plain_loop_does_in_any_pieces(predictor: str, joint: str) -> None:
    net = transducer(predictor=predictor, joint=joint, durations=(0, 1, 2, 5)).eval()
    with torch.no_grad():
        net.joint.output.weight.mul_(8)
        assert net.joint.durations is not None
        net.joint.durations.weight.mul_(8)
        x, lengths = torch.randn(4, 40, 16).double(), torch.tensor([40, 23, 1, 17])
        expected = [plain_tdt(net.float(), x[b, : lengths[b]].float(), 3) for b in range(4)]
        for size in (40, 7, 1):
            search = greedy_search(net, 4, max_symbols=3)
            assert isinstance(search, TdtGreedy)
            for start in range(0, 40, size):
                search.feed(x[:, start : start + size].float(), (lengths - start).clamp(0, size))
            found = [(e.units, e.frames) for (e,) in search.finish()]
            assert found == expected
    assert sum(len(units) for units, _ in expected) > 20
    assert any(b - a > 1 for _, frames in expected for a, b in pairwise(frames))
    assert type(greedy_search(transducer(), 1)) is Greedy


def batch(count: int = 3) -> Batch:
    torch.manual_seed(5)
    lengths, target_lengths = torch.tensor([90, 61, 40])[:count], torch.tensor([6, 3, 2], dtype=torch.int32)[:count]
    targets = torch.randint(1, 9, (count, 6), dtype=torch.int32)
    return Batch(["a", "b", "c"][:count], torch.randn(count, 90, 80), lengths, targets, target_lengths, None, 0, 0)


def test_intermediate_ctc_is_a_share_of_the_ctc_loss(tmp_path: Path) -> None:
    settings = ["loss.ctc_weight=0.4", "loss.inter_ctc_layers=[1, 2]", "loss.inter_ctc_weight=0.25"]
    plain, inter = config(tmp_path, settings[0]), config(tmp_path, *settings)
    one, other = build_model(plain, 9).eval(), build_model(inter, 9).eval()
    assert weights_hash(one) == weights_hash(other)  # no parameter more: the same head
    given = batch()
    found = losses(other, {}, given, inter, precision="float32", weights={}, augment=None)
    features = other.encoder.normalise(given.features, given.feature_lengths)
    top, lengths, taps = other.encoder(features, given.feature_lengths, taps=(1, 2))
    assert other.ctc is not None

    def ctc(x: Tensor) -> Tensor:
        scores = other.ctc(x).log_softmax(-1).transpose(0, 1)  # type: ignore[misc]
        return F.ctc_loss(scores, given.targets.long(), lengths, given.target_lengths.long(), reduction="sum") / 11

    middle = (ctc(taps[1]) + ctc(taps[2])) / 2
    torch.testing.assert_close(found.parts["ctc"], ctc(top).detach())
    torch.testing.assert_close(found.parts["inter_ctc"], middle.detach())
    expected = found.parts["rnnt"] + 0.4 * (0.75 * ctc(top) + 0.25 * middle)
    torch.testing.assert_close(found.total, expected)


@pytest.mark.parametrize("kind", ["full", "pruned", "tdt"])
def test_consistency_trains_on_two_copies_with_masks_of_their_own(tmp_path: Path, kind: str) -> None:
    """All terms and the gradient are those of the copies computed one by one, with the divergence of each frame."""
    settings = [f"loss.kind={kind}", "loss.eps=0", "loss.ctc_weight=0.4", "loss.simple_weight=0.7"]
    alone, both = config(tmp_path, *settings), config(tmp_path, *settings, "loss.consistency_weight=0.3")
    assert weights_hash(build_model(alone, 9)) == weights_hash(build_model(both, 9))
    net = build_model(both, 9).eval()  # without dropout
    given = batch()
    terms: dict[str, Any] = {"precision": "float32", "weights": {}}
    found = losses(net, {}, given, both, augment=torch.Generator().manual_seed(3), **terms)
    found.total.backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()

    generator = torch.Generator().manual_seed(3)
    copies = [losses(net, {}, given, alone, augment=generator, **terms) for _ in range(2)]
    generator = torch.Generator().manual_seed(3)
    outputs = []
    for _ in range(2):
        features = net.encoder.normalise(given.features, given.feature_lengths)
        masks = alone.specaugment.masks(given.frame_hz, given.mel)
        features = spec_augment(features, given.feature_lengths, generator, **masks)
        states, lengths, _ = net.encoder(features, given.feature_lengths)
        assert net.ctc is not None
        outputs.append(net.ctc(states).softmax(-1))
    one, other = outputs
    apart = torch.zeros(())
    for b, frames in enumerate(lengths.tolist()):
        for t in range(frames):
            for own, target in ((one[b, t], other[b, t].detach()), (other[b, t], one[b, t].detach())):
                apart = apart + (target * (target / own).log()).sum() / 2
    assert float(apart.detach()) > 0.01
    expected = (copies[0].total + copies[1].total) / 2 + 0.3 * apart / 11
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(found.parts["consistency"], apart.detach() / 11)
    torch.testing.assert_close(found.costs, (copies[0].costs + copies[1].costs) / 2)
    for name in ("rnnt", "ctc"):
        torch.testing.assert_close(found.parts[name], (copies[0].parts[name] + copies[1].parts[name]) / 2)
    expected.backward()
    for name, p in net.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_new_settings_leave_old_models_as_they_were(tmp_path: Path) -> None:
    """Chunks, intermediate CTC and causality have no weights: a seed makes the same model with and without."""
    first = weights_hash(build_model(config(tmp_path), 9))
    for changes in (
        ["model.chunk_frames=16", "model.chunk_choices=[16, 32, 0]"],
        ["model.causal=true"],
        ["loss.inter_ctc_layers=[1]"],
    ):
        assert weights_hash(build_model(config(tmp_path, *changes), 9)) == first


def test_a_seed_makes_the_weights_that_it_has_always_made(tmp_path: Path) -> None:
    """What runs that are going on, and their studies, rest on."""
    found = {
        kind: weights_hash(build_model(config(tmp_path, f"loss.kind={kind}", f"model.predictor={predictor}"), 9))
        for kind, predictor in (("full", "stateless"), ("pruned", "lstm"))
    }
    assert found == {"full": "46a17964cb41b685", "pruned": "8febf8589967904b"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["loss.inter_ctc_layers=[3]"], "loss.inter_ctc_layers has 3, but with model.layers = 3 it may have 1 to 2"),
        (["loss.inter_ctc_layers=[1]", "loss.ctc_weight=0"], "loss.inter_ctc_layers needs loss.ctc_weight above 0"),
        (["loss.consistency_weight=1", "loss.ctc_weight=0"], "loss.consistency_weight needs loss.ctc_weight above 0"),
        (["loss.durations=[0, 2, 4]"], "include 0 and 1"),
        (["loss.durations=[0, 1, 1]"], "must differ"),
        (["loss.durations=[2]"], "or be [1]: one unit a state"),
        (["model.chunk_frames=10"], "multiple of model.subsampling = 4"),
        (["model.chunk_choices=[8, -4]"], "model.chunk_choices"),
        (["model.joint=concatenated"], "model.joint"),
    ],
)
def test_what_cannot_be_meant_is_named(tmp_path: Path, changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(tmp_path, *changes)
    assert message in str(caught.value)


def test_chunks_imply_causal_convolutions(tmp_path: Path) -> None:
    for changes, causal in (([], False), (["model.chunk_frames=16"], True), (["model.chunk_choices=[16, 0]"], True)):
        assert build_model(config(tmp_path, *changes), 9).encoder.causal is causal


def spoken(targets: Tensor, target_lengths: Tensor, width: int) -> TransferBatch:
    """Positions that are units, whose targets are a code of the unit: what a student can learn from sound."""
    count, longest = targets.shape
    row = torch.cat([b * longest + torch.arange(int(n)) for b, n in enumerate(target_lengths)])
    key = targets.flatten()[row].long()
    codes = torch.randn(10, width, generator=torch.Generator().manual_seed(0))
    inside = (torch.arange(longest) < target_lengths[:, None]).float()
    positions = Positions(
        lengths=target_lengths.long(),
        grid=longest,
        row=row,
        key=key,
        place=torch.cat([(torch.arange(int(n)) + 0.5) / int(n) for n in target_lengths]),
        query_row=key,
        query_start=None,
        query_weight=None,
        unit_weight=torch.diag_embed(inside),
        unit_rows=torch.arange(len(row)),
        masked=0,
    )
    return TransferBatch(count, {"t": positions}, {f"t/alone/{k}": codes[key] for k in (1, 2)}, 0)


COMBINATIONS = list(
    product(["additive", "multiplicative"], ["stateless", "lstm"], ["full", "pruned", "tdt"], [False, True])
)


@pytest.mark.parametrize(
    ("joint", "predictor", "kind", "chunk", "inter", "aligner"),
    [(*c, (n // 2 + n) % 2 == 0, ALIGNERS[(n + n // 6) % len(ALIGNERS)]) for n, c in enumerate(COMBINATIONS)],
)
def test_every_model_learns_with_transfer(
    tmp_path: Path, joint: str, predictor: str, kind: str, chunk: bool, inter: bool, aligner: str
) -> None:
    """A few steps on one batch: all losses are finite, the total and the transfer fall, no parameter is left out."""
    changes = [f"model.joint={joint}", f"model.predictor={predictor}", f"loss.kind={kind}", "loss.eps=0"]
    changes += ["model.chunk_frames=16", "model.left_chunks=1", "model.chunk_choices=[8, 0]"] if chunk else []
    changes += ["loss.inter_ctc_layers=[1, 2]"] if inter else []
    changes += ["transfer.layers=[1, 3]"] if kind != "full" and aligner != "predictor" else []
    settings = config(tmp_path, *changes, "transfer.stores=t.zarr", "transfer.views=t/alone/*")
    given = batch(2)
    given = replace(given, transfer={"": spoken(given.targets, given.target_lengths, 8)})
    zeros, ones = np.zeros(8, np.float32), np.ones(8, np.float32)
    views = [ViewSpec(f"t/alone/{k}", "t", 8, zeros, ones) for k in (1, 2)]
    torch.manual_seed(0)
    net = build_model(settings, 10).train()
    tables = {"t": torch.randn(10, 6)} if aligner in NEED_EMBEDDINGS else None
    taps = len(settings.transfer.layers) or 1
    transfer = Transfer(views, 16, aligner=aligner, embeddings=tables, predictor_dim=12, taps=taps)
    parameters = [*net.named_parameters(), *transfer.named_parameters()]
    optimiser = torch.optim.Adam([p for _, p in parameters], lr=5e-3)
    curve = []
    for _ in range(6):
        found = losses(net, {"": transfer}, given, settings, precision="float32", weights={"": 1.0}, augment=None)
        optimiser.zero_grad(set_to_none=True)
        found.total.backward()
        assert [n for n, p in parameters if p.grad is None] == []
        assert all(bool(torch.isfinite(p.grad).all()) for _, p in parameters if p.grad is not None)
        optimiser.step()
        curve.append({name: float(value) for name, value in found.parts.items()})
    assert all(math.isfinite(v) for parts in curve for v in parts.values())
    assert ("inter_ctc" in curve[0]) == inter
    assert curve[-1]["loss"] < 0.9 * curve[0]["loss"], curve
    assert curve[-1]["transfer"] < curve[0]["transfer"], curve


@pytest.mark.parametrize(("name", "paper"), [("s", 10.3), ("m", 30.7), ("l", 118.8)])
def test_the_conformers_of_the_paper_build_with_as_many_parameters_as_they_say(
    root: Path, name: str, paper: float
) -> None:
    path = root / "recipes" / f"conformer-{name}.toml"
    stated = re.search(r"([\d.]+) M parameters with (\d+)", path.read_text())
    assert stated is not None
    settings = load_config(path)
    for changes in ([], ["model.chunk_frames=64", "model.chunk_choices=[16, 32, 64, 128, 0]"]):
        with torch.device("meta"):
            net = build_model(load_config(path, changes), int(stated[2]))
        millions = sum(p.numel() for p in net.parameters()) / 1e6
        assert f"{millions:.2f}" == stated[1] and abs(millions / paper - 1) < 0.08
    (row,) = [
        line for line in (root / "docs/guide/models.md").read_text().splitlines() if path.name in line and "|" in line
    ]
    assert f" {millions:.1f} M | {paper} M |" in row
    with torch.device("meta"):
        states, lengths = net.eval().encode(torch.zeros(2, 640, 80), torch.tensor([640, 333]))
    assert states.shape == (2, 160, settings.model.dim) and len(lengths) == 2
