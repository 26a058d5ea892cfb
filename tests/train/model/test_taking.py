"""What one transducer takes from another: equal bits where weights mean the same, and a reason where they do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.data.units import Units
from stillhouse.train.config import Config
from stillhouse.train.model.build import build_model
from stillhouse.train.model.taking import ABSENT, NOT_A_PART, UNLIKE, duration_rows, groups, take, unit_rows
from stillhouse.train.model.transducer import Transducer

PARTS = ("encoder", "predictor", "joint")
SMALL: dict[str, Any] = {"dim": 16, "layers": 2, "heads": 2, "inner": 24, "kernel": 3, "predictor_dim": 12}
SMALL |= {"joint_dim": 20}


def recipe(seed: int = 0, loss: dict | None = None, **model: Any) -> Config:
    data = {name: Path(name) for name in ("corpus", "features", "units")}
    sections = {"model": SMALL | model, "loss": loss or {}, "run": {"seed": seed}}
    return Config.model_validate({"data": data} | sections)


def spelled(text: str) -> Units:
    return Units("characters", "lower", ["<blank>", "<unk>", *text])


def models(
    own: Config, theirs: Config, units: str = "abcd", their_units: str = "abcd"
) -> tuple[Transducer, Transducer]:
    return build_model(own, len(units) + 2, 8), build_model(theirs, len(their_units) + 2, 8)


def test_the_same_model_is_taken_whole_bit_by_bit() -> None:
    for options in ({}, {"predictor": "lstm", "joint": "multiplicative"}, {"loss": {"kind": "tdt"}}):
        model, source = models(recipe(0, **options), recipe(1, **options))
        source.encoder.feature_mean.normal_()
        taken = take(model, source, PARTS, {}, {})
        assert not (taken.left or taken.rows or taken.unused)
        assert sorted(taken.whole) == sorted(model.state_dict())
        theirs = source.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("loss", [{}, {"kind": "pruned"}, {"kind": "tdt"}])
def test_rows_follow_the_text_of_their_unit(loss: dict) -> None:
    """A tokenizer of the same size is the trap: nothing but the texts tells that its units are others."""
    for text, new in (("dcba", set()), ("xbaycd", {"x", "y"}), ("db", set()), ("bxda", {"x"})):
        units, theirs = spelled(text), spelled("abcd")
        model, source = models(recipe(0, loss), recipe(1, loss), text)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        rows = unit_rows(recipe(0, loss), 8, units, theirs)
        heads = {"simple.encoder", "simple.predictor"} if loss.get("kind") == "pruned" else set()
        expected = {"predictor.embedding", "joint.output", "ctc"} | heads
        assert {name.rpartition(".")[0] for name in rows} == expected
        taken = take(model, source, PARTS, rows, {})
        assert not taken.left and bool(taken.rows) == bool(new)
        assert {name: len(text) + 2 - len(new) for name in rows} == taken.rows or not new
        for name in rows:
            own, other = model.state_dict()[name], source.state_dict()[name]
            assert torch.equal(own[:2], other[:2])  # blank and unknown
            for k, piece in enumerate(units.pieces[2:], 2):
                known = other[theirs.pieces.index(piece)] if piece not in new else before[name][k]
                assert torch.equal(own[k], known), (name, piece)


def test_blank_and_unknown_are_the_same_whatever_they_are_called() -> None:
    units = Units("characters", "lower", ["<blank-unit>", "⁇", "a", "<blank>"], None, ["<blank>"])
    rows = unit_rows(recipe(), 8, units, spelled("ab"))
    assert rows["ctc.bias"] == [0, 1, 2, -1]


def test_rows_of_durations_follow_their_number() -> None:
    own, theirs = recipe(0, {"kind": "tdt", "durations": [0, 2, 1, 8]}), recipe(1, {"kind": "tdt"})
    model, source = models(own, theirs)
    taken = take(model, source, PARTS, duration_rows(model.durations, source.durations), {})
    assert taken.rows == {"joint.durations.weight": 3, "joint.durations.bias": 3}
    assert model.joint.durations is not None and source.joint.durations is not None
    ours, others = model.joint.durations.weight, source.joint.durations.weight
    assert torch.equal(ours[:3], others[[0, 2, 1]]) and not torch.isin(ours[3], others).any()


CASES: list[tuple[dict, dict[str, list[str]], list[str]]] = [
    ({"layers": 4}, {ABSENT: ["encoder.blocks.2-3"]}, []),
    ({"layers": 1}, {}, ["encoder.blocks.1"]),
    ({"dim": 24}, {UNLIKE: ["encoder", "joint.encoder", "ctc"]}, []),
    ({"inner": 32}, {UNLIKE: ["encoder.blocks.0-1.first", "encoder.blocks.0-1.second"]}, []),
    ({"kernel": 5}, {UNLIKE: ["encoder.blocks.0-1.convolution.depthwise"]}, []),
    ({"predictor_dim": 16}, {UNLIKE: ["predictor", "joint.predictor"]}, []),
    ({"predictor_context": 3}, {UNLIKE: ["predictor.mix"]}, []),
    ({"joint_dim": 24}, {UNLIKE: ["joint"]}, []),
    ({"predictor": "lstm"}, {ABSENT: ["predictor.lstm"]}, ["predictor.mix"]),
    ({"joint": "multiplicative"}, {UNLIKE: ["joint.predictor"]}, []),  # its projection has a bias
    ({"subsampling": 2}, {}, ["encoder.front.convolutions.1"]),
    ({"loss": {"ctc_weight": 0}}, {}, ["ctc"]),
    ({"loss": {"kind": "pruned"}}, {ABSENT: ["simple"]}, []),
]


@pytest.mark.parametrize(("options", "left", "unused"), CASES, ids=[str(c[0]) for c in CASES])
def test_what_does_not_fit_is_named_and_keeps_its_first_weights(
    options: dict, left: dict[str, list[str]], unused: list[str]
) -> None:
    model, source = models(recipe(0, **options), recipe(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    taken = take(model, source, PARTS, {}, {})
    assert (taken.left, taken.unused, taken.rows) == (left, unused, {})
    whole, theirs = set(taken.whole), source.state_dict()
    assert len(whole) < len(before) or not left
    for name, value in model.state_dict().items():
        assert torch.equal(value, theirs[name] if name in whole else before[name]), name


def test_other_widths_leave_no_bias_without_its_matrix() -> None:
    """The feed-forward's bias has the same shape at another width of the encoder, and means nothing alone."""
    model, source = models(recipe(0, dim=24), recipe(1))
    assert model.encoder.blocks[0].first.inputs.bias.shape == source.encoder.blocks[0].first.inputs.bias.shape
    taken = take(model, source, PARTS, {}, {})
    modules = {name.rpartition(".")[0] for name in taken.whole}
    assert modules == {"predictor.embedding", "predictor.mix", "joint.predictor", "joint.output"}


def test_parts_and_barred_modules_are_left_out() -> None:
    model, source = models(recipe(0), recipe(1))
    taken = take(model, source, ("encoder",), {}, {r"encoder\.blocks\.\d+\.attention\.": "other heads"})
    assert taken.left == {NOT_A_PART: ["predictor", "joint", "ctc"], "other heads": ["encoder.blocks.0-1.attention"]}
    assert {name.partition(".")[0] for name in taken.whole} == {"encoder"}


def test_the_normalisation_goes_with_the_convolution_that_reads_the_features() -> None:
    own, source = models(recipe(0), recipe(1))
    for options, same in ((recipe(0), True), (recipe(0, dim=24), False)):
        model = build_model(options, 6, 8)
        source.encoder.feature_mean.fill_(3.0)
        taken = take(model, source, PARTS, {}, {})
        assert ("encoder.feature_mean" in taken.whole) == same
        assert torch.equal(model.encoder.feature_mean, torch.full((8,), 3.0 if same else 0.0))
    wider = build_model(recipe(0), 6, 9)  # features of nine bins
    assert take(wider, source, PARTS, {}, {}).left == {UNLIKE: ["encoder.front.convolutions.0"]}
    assert own.size == 6


def test_groups_name_whole_modules_and_ranges_of_blocks() -> None:
    every = ["e.blocks.0.a", "e.blocks.0.b", "e.blocks.1.a", "e.blocks.1.b", "e.blocks.2.a", "e.blocks.2.b", "e.x", "j"]
    assert groups(every[:-1], every) == ["e"]
    assert groups(every[:6], every) == ["e.blocks"]
    assert groups(every[2:6], every) == ["e.blocks.1-2"]
    assert groups([*every[:2], *every[4:6], "j"], every) == ["e.blocks.0", "e.blocks.2", "j"]
    assert groups([every[0], every[2], every[4]], every) == ["e.blocks.0-2.a"]
    assert groups([every[0], every[1], every[2]], every) == ["e.blocks.0", "e.blocks.1.a"]
