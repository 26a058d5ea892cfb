"""Training with transfer from a store that the real extraction wrote, with a real teacher."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import stores
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from stillhouse.data.errors import StillhouseError
from stillhouse.data.manifest import read_manifest, write_manifest
from stillhouse.extract.store import Store
from stillhouse.train.config import load_config
from stillhouse.train.loop.trainer import Trainer
from stillhouse.train.model.build import build_model
from stillhouse.train.run.load import load_run


def run(tones: Path, out: Path, *changes: str) -> list[dict]:
    quiet = ["run.eval_every=1000", "run.checkpoint_every=1000", "run.log_every=10"]
    Trainer(load_config(tones / "run.toml", [*quiet, *changes]), out).run()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize(
    ("aligner", "distance"),
    [
        ("attention", "cosine"),
        ("occupancy", "contrastive"),
        ("cif", "l1"),
        ("predictor", "cosine"),
        ("transport", "contrastive"),
    ],
)
def test_the_transfer_loss_falls_and_every_view_is_logged(
    tones: Path, store: Path, tmp_path: Path, aligner: str, distance: str
) -> None:
    transfer = [f"transfer.stores={store}", 'transfer.views=["minilm/*/3,6"]', f"transfer.aligner={aligner}"]
    lines = run(tones, tmp_path / "run", *transfer, f"transfer.distance={distance}", "optim.steps=80")
    views = {f"transfer/minilm/{context}/{layer}" for context in ("alone", "both:8") for layer in (3, 6)}
    assert views <= set(lines[0])
    assert lines[-1]["transfer"] < lines[0]["transfer"]
    assert lines[0]["time"]["teacher"] > 0


def test_transfer_leaves_nothing_in_the_model_and_with_weight_0_changes_nothing(
    tones: Path, store: Path, tmp_path: Path
) -> None:
    transfer = [f"transfer.stores={store}", 'transfer.views=["minilm/both:8/6"]', "transfer.weight=0"]
    run(tones, tmp_path / "none")
    run(tones, tmp_path / "zero", *transfer)
    none, zero = (load_run(tmp_path / name, "last")[0].state_dict() for name in ("none", "zero"))
    assert none.keys() == zero.keys()
    assert all(torch.equal(none[k], zero[k]) for k in none)


def several(store: Path) -> list[str]:
    """Settings of three transfers: two of text by different aligners and taps, one into the prediction network."""
    text = ["text.views=minilm/alone/3,6", "text.layers=[1]", "text.distance=contrastive", "text.mixing=sum"]
    predictor = ["predictor.views=minilm/both:8/6", "predictor.aligner=predictor", "predictor.position=word"]
    other = ["other.views=minilm/both:8/3", "other.aligner=attention", "other.control=shuffled", "other.mixing=learned"]
    shares = ["text.weight=0.5", "predictor.weight=0.2", "other.weight=0.1", "other.warmup_steps=9"]
    return [f"transfer.stores={store}", *(f"transfer.{s}" for s in (*text, *predictor, *other, *shares))]


def test_three_transfers_are_what_each_is_alone_added_up(tones: Path, store: Path, tmp_path: Path) -> None:
    """The first step of three, against a run of each alone: the same first weights, losses and gradients."""
    short = ["optim.steps=1", "run.log_every=1", "specaugment.time_masks=0", "model.dropout=0"]
    (together,) = run(tones, tmp_path / "three", *several(store), *short)
    total = together["rnnt"] + 0.3 * together["ctc"]
    for name in ("text", "predictor", "other"):
        own = [s for s in several(store) if s.startswith((f"transfer.{name}.", "transfer.stores"))]
        (alone,) = run(tones, tmp_path / name, *own, *short)
        names = [k for k in alone if k.startswith(("transfer", "lambda"))]
        assert {f"transfer.{name}", f"transfer_grad_norm.{name}", f"lambda.{name}"} <= set(names)
        assert {k: together[k] for k in names if k != "transfer"} == {k: alone[k] for k in names if k != "transfer"}
        assert alone["transfer"] == alone[f"transfer.{name}"] and alone[f"transfer_grad_norm.{name}"] > 0
        total += alone[f"lambda.{name}"] * alone["transfer"]
    assert together["loss"] == pytest.approx(total, rel=1e-5)
    assert together["transfer"] == pytest.approx(sum(together[f"transfer.{n}"] for n in ("text", "predictor", "other")))
    views = [together[f"transfer.text/minilm/alone/{layer}"] for layer in (3, 6)]
    assert together["transfer.text"] == pytest.approx(sum(views))


def test_a_named_transfer_trains_what_the_unnamed_one_does(tones: Path, store: Path, tmp_path: Path) -> None:
    own = ["views=minilm/*/3,6", "aligner=occupancy", "weight=0.5"]
    stores = f"transfer.stores={store}"
    unnamed = run(tones, tmp_path / "unnamed", stores, *(f"transfer.{s}" for s in own), "optim.steps=1")
    named = run(tones, tmp_path / "named", stores, *(f"transfer.a.{s}" for s in own), "optim.steps=1")
    assert named[0]["rnnt"] == unnamed[0]["rnnt"]
    weights = ("model.safetensors", "transfer.a.safetensors", "transfer.safetensors")
    there = [
        [(tmp_path / n / "checkpoints" / "step-00000001" / w).exists() for w in weights] for n in ("named", "unnamed")
    ]
    assert there == [[True, True, False], [True, False, True]]


def test_transfers_of_weight_0_change_nothing_and_a_resumed_run_ends_with_the_same_bits(
    tones: Path, store: Path, tmp_path: Path
) -> None:
    run(tones, tmp_path / "none")
    run(tones, tmp_path / "zero", *several(store), *(f"transfer.{n}.weight=0" for n in ("text", "predictor", "other")))
    none, zero = (load_run(tmp_path / name, "last")[0].state_dict() for name in ("none", "zero"))
    assert all(torch.equal(none[k], zero[k]) for k in none)
    settings = ["run.eval_every=1000", "run.checkpoint_every=7", *several(store)]
    Trainer(load_config(tones / "run.toml", settings), tmp_path / "whole").run()
    begun = Trainer(load_config(tones / "run.toml", settings), tmp_path / "resumed")

    class Stop(Exception):
        pass

    def stop(*_: object) -> None:
        if begun.step == 17:
            raise Stop

    update = begun._update
    begun._update = lambda *a: (stop(), update(*a))[1]  # type: ignore[method-assign]
    with pytest.raises(Stop):
        begun.run()
    Trainer(load_config(tones / "run.toml", settings), tmp_path / "resumed").run()
    whole, resumed = (sorted((tmp_path / n / "checkpoints").iterdir())[-1] for n in ("whole", "resumed"))
    files = sorted(p.name for p in whole.glob("*.safetensors"))
    assert files == sorted(p.name for p in resumed.glob("*.safetensors")) and len(files) == 5
    assert all((whole / f).read_bytes() == (resumed / f).read_bytes() for f in files)


def test_what_is_decoded_holds_nothing_of_the_transfer_and_hears_the_same_without_it(
    tones: Path, store: Path, tmp_path: Path
) -> None:
    """The weights that `decode` loads, against the model beside its heads in the trainer, bit by bit."""
    changes = [f"transfer.stores={store}", 'transfer.views=["minilm/*/3,6"]', "transfer.layers=[1, 2]"]
    changes += ["transfer.mixing=learned", "transfer.aligner=attention"]
    changes += ["run.eval_every=1000", "run.checkpoint_every=1000"]
    trainer = Trainer(load_config(tones / "run.toml", changes), tmp_path / "run")
    trainer.run()
    (folder,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    with safe_open(folder / "model.safetensors", "pt") as saved:
        names = set(saved.keys())
    assert names == set(build_model(load_config(tones / "run.toml"), trainer.units.size).state_dict())
    heads = {name for name, _ in trainer.transfers[""].named_parameters()}
    assert {"heads.0.weight", "tap_logits", "mixing.logits", "aligner.key.weight"} <= heads
    assert not [n for n in names if any(n.endswith(h) for h in heads)]
    (folder / "transfer.safetensors").unlink()
    model = load_run(tmp_path / "run", "last")[0]
    batch = trainer.loader.load(trainer.sampler.epoch(0)[0])
    trainer.model.eval()
    with torch.no_grad():
        ours, theirs = (m.encode(batch.features, batch.feature_lengths)[0] for m in (model, trainer.model))
        tapped, _, taps = trainer.model.encoder(
            trainer.model.encoder.normalise(batch.features, batch.feature_lengths), batch.feature_lengths, taps=[1, 2]
        )
        assert len(taps) == 2 and torch.equal(ours, theirs) and torch.equal(ours, tapped)
        assert torch.equal(model.predictor(batch.targets), trainer.model.predictor(batch.targets))
        joint = [
            m.joint(m.joint.encoder(ours[:, :1]), m.joint.predictor(m.predictor(batch.targets)))
            for m in (model, trainer.model)
        ]
        assert torch.equal(*joint)


def test_several_taps_and_learned_weights(tones: Path, store: Path, tmp_path: Path) -> None:
    transfer = [f"transfer.stores={store}", 'transfer.views=["minilm/*/3,6"]', "transfer.layers=[1, 2]"]
    lines = run(tones, tmp_path / "run", *transfer, "transfer.mixing=learned", "run.log_every=2")
    assert len({line["weight/minilm/alone/3"] for line in lines}) > 1
    assert sum(v for k, v in lines[-1].items() if k.startswith("weight/")) == pytest.approx(1)


def test_the_temperature_of_the_contrastive_distance(tones: Path, store: Path, tmp_path: Path) -> None:
    """So hot that all targets are alike, every view is at the logarithm of their number; else none is."""
    transfer = [f"transfer.stores={store}", 'transfer.views=["minilm/*/3,6"]', "transfer.distance=contrastive"]
    spread = {}
    for temperature in ("0.1", "1e6"):
        changes = [*transfer, f"transfer.temperature={temperature}", "optim.steps=1", "run.log_every=1"]
        (line,) = run(tones, tmp_path / temperature, *changes)
        found = [v for k, v in line.items() if k.startswith("transfer/")]
        spread[temperature] = max(found) - min(found)
    assert spread["1e6"] < 1e-4 < spread["0.1"]


def test_sampled_views_change_from_step_to_step(tones: Path, store: Path, tmp_path: Path) -> None:
    transfer = [f"transfer.stores={store}", 'transfer.views=["minilm/*/3,6"]', "transfer.mixing=sample"]
    lines = run(tones, tmp_path / "run", *transfer, "transfer.sample=1", "run.log_every=1")
    drawn = [next(k for k in line if k.startswith("transfer/")) for line in lines]
    assert len(set(drawn)) == 4 and all(sum(k.startswith("transfer/") for k in line) == 1 for line in lines)


def test_views_of_two_stores_and_a_falling_lambda(tones: Path, store: Path, minilm: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.zarr"
    command = [sys.executable, "-m", "stillhouse.cli", "extract", str(tones / "corpus.jsonl"), str(other)]
    command += ["--teacher", str(minilm), "--name", "second", "--layers", "6", "--context", "past:4", "--device", "cpu"]
    subprocess.run(command, check=True, capture_output=True)
    changes = [f'transfer.stores=["{store}", "{other}"]', 'transfer.views=["minilm/alone/3,6", "*/past:4/last"]']
    changes += ["transfer.decay=linear", "transfer.decay_steps=20", "run.log_every=1"]
    lines = run(tones, tmp_path / "run", *changes)
    views = {k for k in lines[0] if k.startswith("transfer/")}
    assert views == {"transfer/minilm/alone/3", "transfer/minilm/alone/6", "transfer/second/past:4/6"}
    assert [line["lambda"] for line in lines[:3]] == pytest.approx([1, 0.95, 0.9]) and lines[-1]["lambda"] == 0
    with pytest.raises(StillhouseError, match="both hold minilm/alone/3"):
        run(tones, tmp_path / "twice", f'transfer.stores=["{store}", "{store}"]', 'transfer.views=["minilm/alone/3"]')


def test_a_changed_transcript_is_refused_by_name(tones: Path, store: Path, tmp_path: Path) -> None:
    corpus = read_manifest(tones / "corpus.jsonl")
    changed = [u.model_copy(update={"text": "abba"}) if u.id == "u7" else u for u in corpus.utterances]
    changed = [u.model_copy(update={"audio": str(corpus.audio_path(u))}) for u in changed]
    write_manifest(tmp_path / "corpus.jsonl", changed)
    transfer = [f"transfer.stores={store}", 'transfer.views=["minilm/alone/6"]', f"data.corpus={tmp_path}/corpus.jsonl"]
    with pytest.raises(StillhouseError, match="u7"):
        run(tones, tmp_path / "run", *transfer)


def test_a_number_that_no_longer_is_what_was_written_is_refused_by_name(
    tones: Path, store: Path, tmp_path: Path
) -> None:
    """A flipped bit that leaves the number finite: training compares what it reads with the store's checksums."""
    shutil.copytree(store, tmp_path / "torn.zarr")
    torn = Store.open(tmp_path / "torn.zarr")
    (view,) = torn.resolve("minilm/alone/6")
    stores.flip(torn.path, torn.gather(["u7"], [view]).states[view].tobytes())
    transfer = [f"transfer.stores={tmp_path}/torn.zarr", f'transfer.views=["{view.address}"]']
    with pytest.raises(StillhouseError, match="u7"):
        run(tones, tmp_path / "run", *transfer)
    lines = run(tones, tmp_path / "skip", *transfer, "transfer.on_missing=skip", "run.log_every=1")
    assert {line["transfer_skipped"] for line in lines} == {0, 1}


def test_a_view_that_is_not_there_is_refused_before_the_first_step(tones: Path, store: Path, tmp_path: Path) -> None:
    with pytest.raises(StillhouseError, match="minilm/alone/3"):  # it lists what there is
        run(tones, tmp_path / "run", f"transfer.stores={store}", 'transfer.views=["minilm/past:64/6"]')


@pytest.mark.slow
@pytest.mark.parametrize("size", ["s", "m", "l"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_recipes_of_all_sizes_step_with_a_transfer(
    tones: Path, store: Path, tmp_path: Path, root: Path, size: str, precision: str
) -> None:
    recipe = tmp_path / "run.toml"
    text = (root / "recipes" / f"conformer-{size}.toml").read_text()
    recipe.write_text("".join(line for line in text.splitlines(True) if not line.startswith(("dev =", "train ="))))
    changes = [f"data.{k}={tones}/{name}" for k, name in
               {"corpus": "corpus.jsonl", "features": "features.h5", "units": "units"}.items()]  # fmt: skip
    changes += [f"transfer.stores={store}", "transfer.views=minilm/*/3,6", "transfer.weight=0.3"]
    changes += ["data.speeds=[1.0]", "data.batch_frames=400", f"run.precision={precision}", "run.device=cpu"]
    changes += ["optim.steps=2", "run.log_every=1"]
    Trainer(load_config(recipe, changes), tmp_path / "run").run()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(
        line["transfer"] > 0 and line["rnnt"] > 0 and "skipped" not in line for line in lines
    )


def test_stages_are_runs_that_start_from_each_other(tones: Path, store: Path, tmp_path: Path) -> None:
    """Transfer first and fine-tuning without it, or the other way round, and heads alone over frozen weights."""
    transfer = [f"transfer.stores={store}", 'transfer.views=["minilm/alone/6"]', "optim.steps=4"]
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    run(tones, first, *transfer)
    (line,) = run(tones, second, f"init.source={first}", "optim.steps=4", "run.log_every=4")
    assert "transfer" not in line and not (second / "checkpoints/step-00000004/transfer.safetensors").exists()
    began, ended = (load_run(second, which)[0].state_dict() for which in ("0", "4"))
    assert all(torch.equal(value, began[name]) for name, value in load_run(first, "last")[0].state_dict().items())
    assert not all(torch.equal(value, began[name]) for name, value in ended.items())
    said: list[str] = []
    frozen = [f"init.source={second}", "init.freeze=encoder", "transfer.aligner=cif", "run.log_every=4"]
    Trainer(load_config(tones / "run.toml", [*transfer, *frozen, "data.dev=dev"]), third, said.append).run()
    assert any("the transfer reads frozen weights alone" in line for line in said)
    heads = [checkpoint_tensors(third, step, "transfer") for step in (0, 4)]
    assert all(not torch.equal(heads[0][name], heads[1][name]) for name in heads[0] if "heads" in name)
    encoders = [checkpoint_tensors(third, step, "model") for step in (0, 4)]
    assert all(torch.equal(encoders[0][n], encoders[1][n]) == n.startswith("encoder.") for n in encoders[0])
    for changes, reads in {("transfer.aligner=predictor",): False, ("transfer.layers=[1]",): True}.items():
        said.clear()
        deep = [*transfer, f"init.source={second}", "init.freeze=encoder:1", *changes]
        Trainer(load_config(tones / "run.toml", deep), tmp_path / changes[0], said.append)
        assert any("reads frozen weights alone" in line for line in said) == reads


def checkpoint_tensors(out: Path, step: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(out / f"checkpoints/step-{step:08d}/{name}.safetensors")
