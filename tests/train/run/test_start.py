"""Runs that start from other runs: the source's loss at the first step, frozen weights, other units, resumed runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from stillhouse.cli import cli
from stillhouse.data.errors import CheckpointError, ConfigError, StaleError, UsageError
from stillhouse.data.features.compute import FeatureSettings, compute_features
from stillhouse.data.features.file import FeatureFile
from stillhouse.data.features.settings import EncoderSettings
from stillhouse.data.files.atomic import sha256_plain
from stillhouse.data.manifest import read_manifest
from stillhouse.data.units import Units, load_units
from stillhouse.train.config import load_config
from stillhouse.train.export.export import export_run
from stillhouse.train.loop.objective import losses
from stillhouse.train.loop.trainer import Trainer
from stillhouse.train.run import start
from stillhouse.train.run.identity import weights_hash
from stillhouse.train.run.load import TrainedOn, load_run
from stillhouse.train.study.definition import load_study
from stillhouse.train.study.runs import check, check_identities

PLAIN = ["run.loggers=['jsonl']", "optim.steps=2", "run.checkpoint_every=2"]
EXACT = ["model.dropout=0", "specaugment.time_masks=0", "specaugment.frequency_masks=0"]

Begin = Callable[..., tuple[Trainer, list[str]]]


@pytest.fixture(scope="module")
def source(tones: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with an evaluation and a checkpoint every second step."""
    out = tmp_path_factory.mktemp("source") / "run"
    changes = ["optim.steps=6", "run.eval_every=2", "run.checkpoint_every=2", "run.keep=3", "run.loggers=['jsonl']"]
    Trainer(load_config(tones / "run.toml", [*changes, *EXACT]), out).run()
    return out


@pytest.fixture
def begin(tones: Path, source: Path, tmp_path: Path) -> Begin:
    """Starts a run from the source, with settings that differ, and returns what it says."""

    def started(*changes: str, out: str = "run", init: Path | None = source) -> tuple[Trainer, list[str]]:
        said: list[str] = []
        options = [] if init is None else [("--init", {"init": {"source": str(init)}})]
        config = load_config(tones / "run.toml", [*PLAIN, *EXACT, *changes], options)
        return Trainer(config, tmp_path / out, said.append), said

    return started


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out: Path, which: str = "last") -> dict[str, torch.Tensor]:
    return load_run(out, which)[0].state_dict()


def in_reverse(units: Path, out: Path, more: str = "") -> Path:
    theirs = load_units(units)
    Units("characters", theirs.transform, [*theirs.pieces[:2], *more, *theirs.pieces[:1:-1]]).save(out)
    return out


def test_it_starts_where_the_source_ended(source: Path, begin: Begin) -> None:
    """The evaluation of step 0 is the source's last one, and the first step has the loss of the source's weights."""
    trainer, said = begin()
    trainer.run()
    first, *rest = metrics(trainer.out)
    best = json.loads((source / "checkpoints/step-00000006/state.json").read_text())["best"]
    last = next(m for m in metrics(source) if m["kind"] == "dev" and m["step"] == best["step"])
    assert first == last | {"step": 0} and any(line.startswith("step 0  dev WER") for line in said)
    started = weights(trainer.out, "0")
    assert all(torch.equal(value, started[name]) for name, value in weights(source, "best").items())
    # The first batch again, by the source's own model
    plan = next(iter(trainer.sampler.epoch(0)))
    batch = trainer.loader.load(plan)
    model = load_run(source, "best")[0]
    expected = losses(model, {}, batch, trainer.config, precision="float32", weights={}, augment=None)
    assert rest[0]["rnnt"] == pytest.approx(float(expected.parts["rnnt"]), rel=1e-6)
    assert rest[0]["loss"] == pytest.approx(float(expected.parts["loss"]), rel=1e-6)
    facts = json.loads((trainer.out / "identity.json").read_text())["init"]
    assert facts["weights"] == weights_hash(model) and facts["step"] == best["step"] and facts["source"] == str(source)


def test_it_starts_from_the_checkpoint_that_is_named(tones: Path, source: Path, begin: Begin, tmp_path: Path) -> None:
    for which in ("4", "average:2", "last"):
        trainer, said = begin(f"init.checkpoint={which}", out=f"run-{which}")
        theirs = weights(source, which)
        assert all(torch.equal(value, theirs[name]) for name, value in trainer.model.state_dict().items())
        assert f"{source}, {which} checkpoint" in said[0]
    averaged = tmp_path / "averaged"
    changes = [*PLAIN, "optim.ema=0.9"]
    Trainer(load_config(tones / "run.toml", changes), averaged).run()
    trainer, _ = begin(init=averaged)
    theirs = weights(averaged, "ema")
    assert any(not torch.equal(value, theirs[name]) for name, value in weights(averaged, "raw").items())
    assert all(torch.equal(value, theirs[name]) for name, value in trainer.model.state_dict().items())


def test_an_export_is_a_source_and_other_exports_are_refused(source: Path, begin: Begin, tmp_path: Path) -> None:
    export_run(source, tmp_path / "weights", "safetensors")
    trainer, said = begin(init=tmp_path / "weights")
    theirs = weights(source, "best")
    assert all(torch.equal(value, theirs[name]) for name, value in trainer.model.state_dict().items())
    assert not any("not taken" in line for line in said)
    with pytest.raises(UsageError, match=r"an export has one model, and init\.checkpoint = last"):
        begin("init.checkpoint=last", init=tmp_path / "weights", out="other")
    pruned, said = begin("loss.kind=pruned", init=tmp_path / "weights", out="pruned")
    assert "init: not taken: simple (the source has none)" in said and pruned.model.simple is not None
    head = tmp_path / "weights/model.json"
    head.write_text(head.read_text().replace('"safetensors"', '"onnx"', 1))
    with pytest.raises(CheckpointError, match="this is an export as onnx"):
        begin(init=tmp_path / "weights", out="other")


def test_a_run_of_an_earlier_version_is_a_source(source: Path, begin: Begin, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(source, old)
    (old / "identity.json").unlink()
    path = old / "checkpoints/step-00000006/state.json"
    state = json.loads(path.read_text())
    state = {k: v for k, v in state.items() if k not in ("digest", "config", "features", "init")} | {"format": 1}
    path.write_text(json.dumps(state))
    trainer, _ = begin("init.checkpoint=6", init=old)
    theirs = weights(old, "6")
    assert all(torch.equal(value, theirs[name]) for name, value in trainer.model.state_dict().items())


def test_what_holds_no_weights_is_refused_in_words(source: Path, begin: Begin, tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/model.safetensors").write_bytes(b"")
    (tmp_path / "pretrained.pt").write_bytes(b"")
    step = source / "checkpoints/step-00000004"
    for given, message in {
        tmp_path / "nowhere": r"there is no such run \(expected a run's folder, or an export as safetensors\)",
        tmp_path / "hub": "weights of other programs cannot be read",
        tmp_path / "pretrained.pt": "weights of other programs cannot be read",
        step: rf"use --init {source} --set init\.checkpoint=4$",
        step / "model.safetensors": rf"use --init {source} --set init\.checkpoint=4$",
        source / "config.toml": rf"this is a part of a run or of an export; use --init {source}$",
        source / "checkpoints": rf"use --init {source}$",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            begin(init=given)
        assert not (tmp_path / "run/config.toml").exists()
    with pytest.raises(UsageError, match="a run cannot start from itself"):
        begin(init=tmp_path / "run")


def test_units_of_the_same_number_keep_their_rows(tones: Path, source: Path, begin: Begin, tmp_path: Path) -> None:
    """In another order they are still the same recogniser, which the evaluation of step 0 shows."""
    units = in_reverse(tones / "units", tmp_path / "units")
    trainer, said = begin(f"data.units={units}")
    assert any("7 of 7 have the same text there" in line for line in said)
    trainer.run()
    ours, theirs = metrics(trainer.out)[0], metrics(source)[-1]
    assert ours["wer"] == theirs["wer"] and ours["rnnt"] == pytest.approx(theirs["rnnt"], rel=1e-5)
    more, said = begin(f"data.units={in_reverse(tones / 'units', tmp_path / 'more-units', 'xy')}", out="more")
    assert any("7 of 9 have the same text there" in line and line.endswith("new: x, y") for line in said)
    rows = (f"{name} (7 of 9 rows)" for name in ("predictor.embedding", "joint.output", "ctc"))
    assert f"init: taken in part: {', '.join(rows)}" in said
    more.run()
    _, said = begin(f"data.units={tmp_path / 'more-units'}", "init.parts=encoder", out="encoder")
    assert not any("units" in line for line in said)  # nothing of them was taken


def test_what_is_frozen_never_changes_and_the_rest_does(source: Path, begin: Begin) -> None:
    trainer, said = begin("init.freeze=encoder:1,predictor", "optim.ema=0.9", "optim.weight_decay=0.5")
    assert "init: frozen: encoder.front, encoder.blocks.0, predictor (0.07 M)" in said
    frozen = ("encoder.feature", "encoder.front", "encoder.blocks.0", "predictor")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.run()
    for after in (weights(trainer.out), weights(trainer.out, "raw")):
        for name, value in after.items():
            assert torch.equal(value, before[name]) == name.startswith(frozen), name
    kept = trainer.out / "checkpoints/step-00000002/optimiser.safetensors"
    assert b"encoder.blocks.1" in kept.read_bytes() and b"encoder.blocks.0" not in kept.read_bytes()
    assert weights_hash(load_run(source, "best")[0]) == trainer.identity["init"]["weights"]


def test_what_cannot_be_frozen_is_refused(begin: Begin, tmp_path: Path) -> None:
    for changes, message in {
        ("init.freeze=encoder,predictor,joint",): "leaves no weight of the model to train",
        ("init.freeze=encoder", "model.dim=64"): "init.freeze has encoder, but none of its weights was taken whole",
        ("init.freeze=encoder:3",): r"init\.freeze has encoder:3, but model\.layers = 2",
        ("init.freeze=ctc",): "init.freeze has 'ctc'; expected encoder, encoder:N, predictor or joint",
        ("init.freeze=joint", "init.parts=encoder"): r"init\.freeze has joint, which init\.parts = encoder does not",
        ("model.dim=64", "model.predictor_dim=48", "model.joint_dim=64"): "nothing of .* fits: encoder, predictor",
    }.items():
        with pytest.raises(ConfigError, match=message):
            begin(*changes)
        assert not (tmp_path / "run/config.toml").exists()


def test_settings_of_init_are_not_ignored_where_no_weights_are_taken(begin: Begin, tmp_path: Path) -> None:
    for change in ("freeze=encoder", "parts=encoder", "lr_factor=0.1", "checkpoint=last"):
        name = change.partition("=")[0]
        expected = rf"init\.{name} is set, but no weights are taken \(expected init\.source, or --init RUN\)"
        with pytest.raises(ConfigError, match=expected):
            begin(f"init.{change}", init=None)
        assert not (tmp_path / "run/config.toml").exists()


def test_parts_have_no_order_and_a_later_stage_may_take_and_train_all(begin: Begin) -> None:
    """The settings of a stage are those of the next one, which may have other parts."""
    first, said = begin("init.parts=predictor,encoder,encoder", "init.freeze=encoder:1,encoder,predictor", out="first")
    assert first.config.init.parts == ["encoder", "predictor"]
    assert first.config.init.freeze == ["encoder", "encoder:1", "predictor"]
    assert any("init: not taken: joint, ctc (not named" in line for line in said)
    first.run()
    assert (
        "resuming"
        in begin("init.parts=encoder,predictor", "init.freeze=predictor,encoder,encoder:1", out="first")[1][0]
    )
    recorded = load_config(first.out / "config.toml", ["init.parts=all", "init.freeze=none"], saved=True)
    assert (recorded.init.parts, recorded.init.freeze) == (["encoder", "predictor", "joint"], [])
    changes = ("init.parts=all", "init.freeze=none", "init.checkpoint=last")
    second, said = begin(*changes, out="second", init=first.out)
    assert not any("not taken" in line or "frozen" in line for line in said)
    assert all(torch.equal(value, weights(first.out)[name]) for name, value in second.model.state_dict().items())


def test_new_blocks_over_a_frozen_encoder_are_trained(begin: Begin) -> None:
    trainer, said = begin("init.freeze=encoder", "model.layers=3", "optim.steps=1")
    assert any(line.endswith("encoder.blocks.2 (the source has none: model.layers is 3 here and 2 in the source)")
               for line in said)  # fmt: skip
    assert "init: trained, because not all of it was taken: encoder.blocks.2" in said
    before = {name: value.clone() for name, value in trainer.model.encoder.state_dict().items()}
    trainer.run()
    for name, value in trainer.model.encoder.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("blocks.2"), name


def test_the_factor_scales_the_first_update_of_what_was_taken(begin: Begin) -> None:
    """The first update of AdamW is the learning rate times the gradient's sign, whatever the gradient's size."""
    moved = {}
    for factor in ("1.0", "0.125"):
        changes = (f"init.lr_factor={factor}", "model.layers=3", "optim.weight_decay=0", "optim.steps=1")
        trainer, _ = begin(*changes, out=factor)
        before = [p.detach().clone() for p in trainer.names]
        trainer.run()
        steps = zip(trainer.names.values(), trainer.names, before, strict=True)
        moved[factor] = {name: float((after.detach() - b).abs().max()) for name, after, b in steps}
    assert any("blocks.2" in name for name in moved["1.0"])
    for name, whole in moved["1.0"].items():
        factor = 1.0 if "blocks.2" in name else 0.125
        assert moved["0.125"][name] == pytest.approx(factor * whole, rel=2e-3), name


def test_features_of_other_settings_get_a_convolution_of_their_own(tones: Path, begin: Begin, tmp_path: Path) -> None:
    """80 bins of 8 kHz audio have the source's shape, and are other frequencies."""
    corpus = read_manifest(tones / "corpus.jsonl")
    cases = {
        "rate": (FeatureSettings(rate_hz=8000), "rate_hz is 8000 here and 16000"),
        "bins": (FeatureSettings(bins=40), "bins is 40"),
    }
    for name, (settings, expected) in cases.items():
        compute_features(corpus, tmp_path / f"{name}.h5", speeds=(1.0, 1.1), workers=0, settings=settings)
        _, said = begin(f"data.features={tmp_path}/{name}.h5", out=name)
        (line,) = [line for line in said if "not taken: encoder.front.convolutions.0 (" in line]
        assert expected in line and "init: features are normalised by this corpus" in said


def test_states_of_another_layer_or_encoder_have_the_same_width(
    source: Path, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = asdict(EncoderSettings(encoder="a/model", architecture="whisper", weights="f00", layer=4))
    for name, (changed, kept) in {
        "moved": ({"encoder": "elsewhere"}, True),
        "layer": ({"layer": 3}, False),
        "weights": ({"weights": "f11"}, False),
    }.items():
        monkeypatch.setattr(start, "trained_on", lambda _: TrainedOn(usual))
        monkeypatch.setattr(FeatureFile, "settings", property(lambda self, c=changed: usual | c))
        _, said = begin(out=name)
        assert kept == (f"init: not taken: encoder.front.convolutions.0 (the features are others: {name} is" not in
                        " ".join(said))  # fmt: skip
        assert kept == any("normalised as in the source" in line for line in said)


def test_weights_that_are_not_finite_are_refused(source: Path, begin: Begin, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    export_run(source, broken, "safetensors")
    tensors = load_file(broken / "model.safetensors")
    tensors["ctc.bias"][1] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    head = json.loads((broken / "model.json").read_text())
    head["files"]["model.safetensors"] = sha256_plain(broken / "model.safetensors")
    (broken / "model.json").write_text(json.dumps(head))
    with pytest.raises(CheckpointError, match=r"broken: weights are not finite: ctc\.bias; choose an earlier one"):
        begin(init=broken)


def test_other_heads_and_joints_mean_other_weights(begin: Begin) -> None:
    """They have the same shapes."""
    _, said = begin("model.heads=4", "model.joint=multiplicative")
    assert "init: not taken: encoder.blocks.0-1.attention (model.heads is 4 here and 2 in the source)" in said
    assert "init: not taken: joint (model.joint is multiplicative here and additive in the source)" in said
    tdt, _ = begin("loss.kind=tdt", "optim.steps=1", out="tdt")
    tdt.run()
    _, said = begin("loss.kind=tdt", "loss.durations=[1,0,8]", init=tdt.out, out="durations")
    assert "init: taken in part: joint.durations (2 of 3 rows)" in said
    _, said = begin("model.predictor=lstm", "model.subsampling=6", "model.causal=true", out="other")
    lstm = "model.predictor is lstm here and stateless in the source"
    assert f"init: not taken: predictor.embedding, joint.predictor ({lstm})" in said
    assert any("encoder.front (model.subsampling is 6" in line for line in said)
    assert any("model.causal" in line for line in said)


def test_a_run_resumes_without_its_source(tones: Path, source: Path, tmp_path: Path) -> None:
    """As a command: with the options, without them, after the source has gone, and never from another one."""
    mine, out = tmp_path / "mine", tmp_path / "run"
    shutil.copytree(source, mine)
    sets = [x for change in [*PLAIN, *EXACT] for x in ("--set", change)]
    command = ["train", str(tones / "run.toml"), "--out", str(out), *sets]

    def run(*options: str) -> tuple[int, str]:
        result = CliRunner().invoke(cli, [*command, *options])
        return result.exit_code, result.output + (str(result.exception) if result.exception else "")

    options = ("--init", str(mine), "--init-parts", "encoder,joint", "--freeze", "encoder")
    code, said = run(*options, "--json")
    assert code == 0 and json.loads(said.splitlines()[-1])["init"]["source"] == str(mine)
    assert "predictor (not named in init.parts)" in said and "frozen: encoder" in said
    assert 'parts = ["encoder", "joint"]' in (out / "config.toml").read_text()
    assert run(*options)[0] == 0 and run()[0] == 0
    code, said = run("--init", str(mine))
    assert code != 0 and "init.freeze: ['encoder'] in the run, [] in the new settings" in said
    code, said = run("--freeze", "joint")
    assert code != 0 and "init.freeze: ['encoder'] in the run, ['joint'] in the new settings" in said
    other = tmp_path / "other"
    Trainer(load_config(tones / "run.toml", [*PLAIN, "run.seed=5"]), other).run()
    for broken in (other, tmp_path / "nowhere"):
        code, said = run("--init", str(broken), *options[2:])
        assert (
            code != 0
            and "the run started from" in said
            and f"leave out --init, or init.source, to resume {out}" in said
        )
    moved = mine.rename(tmp_path / "moved")
    assert run("--init", str(moved), *options[2:])[0] == 0
    assert run(*options)[0] == 0 and run()[0] == 0
    shutil.copytree(other, mine)  # another run in its place
    code, said = run(*options)
    assert code != 0 and "the run started from other weights" in said
    plain = tmp_path / "plain"
    Trainer(load_config(tones / "run.toml", [*PLAIN, *EXACT]), plain).run()
    command[3] = str(plain)
    code, said = run("--init", str(moved))
    assert code != 0 and "init.source: None in the run" in said


def test_a_source_may_train_on(tones: Path, source: Path, begin: Begin, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    config = load_config(tones / "run.toml", [*PLAIN, "run.keep=1"])
    Trainer(config, mine).save()  # before its first step
    _, said = begin("init.checkpoint=last", init=mine)
    assert "step 0 of 2" in said[0]
    Trainer(config, mine).run()
    _, said = begin("init.checkpoint=last", init=mine)
    assert any(f"{mine} has trained on since step 0" in line for line in said)
    assert any("resuming" in line for line in said)
    alike = tmp_path / "alike"  # Its identity is the same, because it differs in a setting of learning.
    Trainer(load_config(tones / "run.toml", [*PLAIN, "optim.lr=0.01"]), alike).run()
    assert (alike / "identity.json").read_bytes() == (mine / "identity.json").read_bytes()
    with pytest.raises(StaleError, match="the run started from other weights"):
        begin("init.checkpoint=last", init=alike)


def test_a_checkpoint_that_goes_while_it_is_read_is_no_failure(
    source: Path, begin: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, calls = tmp_path / "mine", []
    shutil.copytree(source, mine)

    def reading(out: Path, which: str) -> tuple:
        calls.append(which)
        if len(calls) == 1:
            shutil.rmtree(mine / "checkpoints/step-00000002")
            raise CheckpointError("gone")
        return load_run(out, which)

    monkeypatch.setattr(start, "load_run", reading)
    begin(init=mine)
    assert len(calls) == 2


def test_arms_of_a_study_may_start_from_runs(tones: Path, source: Path, tmp_path: Path) -> None:
    path = tones / "init-study.toml"
    path.write_text(f"""
base = "run.toml"
seeds = [1, 2]
test = ["dev"]
[settings]
optim.steps = 1
data.dev = "dev"
[arms.none]
[arms.tuned]
init.source = "{source}"
init.freeze = ["encoder"]
""")
    study = load_study(path, tmp_path / "study")
    for run in study.runs:
        Trainer(run.config, run.folder).run()
    check(study)
    tuned = study.of("tuned")[1].folder / "identity.json"
    facts = json.loads(tuned.read_text())
    assert (
        facts["initialisation"]
        == json.loads((study.of("none")[1].folder / "identity.json").read_text())["initialisation"]
    )
    tuned.write_text(json.dumps(facts | {"init": facts["init"] | {"weights": "f00"}}))
    with pytest.raises(StaleError, match=rf"tuned/1 and tuned/2 cannot be compared: {source} had the weights .* f00"):
        check_identities(study.runs)
