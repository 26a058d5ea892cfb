"""Settings: what is not known or cannot be is an error that names it; what is written reads back equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.data.errors import ConfigError
from stillhouse.train.config import dump_config, load_config, read_toml
from stillhouse.train.model import Encoder
from stillhouse.train.model import build as building
from stillhouse.train.model.build import build_model
from stillhouse.train.study.choice import make_choice
from stillhouse.train.study.definition import load_study

MINIMAL = '[data]\ncorpus = "c.jsonl"\nfeatures = "f.h5"\nunits = "u"\n'


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_set_and_round_trip(tmp_path: Path) -> None:
    changes = ["optim.lr=5e-4", "data.train=train,other", "data.speeds=[0.9, 1.0]", "run.device=cpu"]
    changes.append("transfer.layers=[3]")
    config = load_config(write(tmp_path, MINIMAL), changes)
    assert config.optim.lr == 5e-4 and config.data.train == "train,other" and config.data.speeds == [0.9, 1.0]
    assert load_config(write(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        (MINIMAL, ["optim.learning_rate=1"], "optim.learning_rate: no such setting (expected one of steps, lr,"),
        (MINIMAL, ["steps=1"], "steps: no such setting; did you mean optim.steps?"),
        (MINIMAL, ["optin.steps=1"], "optin: no such section; did you mean optim?"),
        (MINIMAL, ["model.lr=1"], "model.lr: no such setting; did you mean optim.lr?"),
        (MINIMAL, ["optim.steps.first=1"], "optim.steps"),
        (MINIMAL, ["optim=1"], "optim"),
        (MINIMAL, ["data.workers=2"], "data.workers: no such setting"),
        (MINIMAL, ["optim.lr=-1"], "optim.lr"),
        (MINIMAL, ["optim.lr"], "section.name=value"),
        (MINIMAL, ["model.dim=30"], "multiple of 2 x model.heads"),
        (MINIMAL, ["model.kernel=4"], "odd"),
        (MINIMAL, ["model.inner=10000000000000000000"], "model.inner"),
        (MINIMAL, ["run.threads=10000000000000000000"], "run.threads"),
        (MINIMAL, ["run.seed=-1"], "run.seed"),
        (MINIMAL, ["optim.lr=inf"], "optim.lr"),
        (MINIMAL, ["transfer.weight=nan"], "transfer.weight"),
        (MINIMAL, ["optim.betas=[0.9, 1.0]"], "optim.betas"),
        (MINIMAL, ["run.seed=10000000000000000000000"], "run.seed"),
        (MINIMAL, ['transfer.views=["a/alone/1"]'], "transfer.views needs a store"),
        (MINIMAL, ["transfer.layers=[9]"], "with model.layers = 6 it may have 1 to 6"),
        (MINIMAL, ["transfer.mixing=sample"], "go together"),
        (MINIMAL, ["transfer.decay=linear"], "transfer.decay and transfer.decay_steps go together"),
        (MINIMAL, ["optim.steps=lots"], "optim.steps"),
        ("[data]\n", [], "data.corpus"),
        ("[data\n", [], "not a readable TOML"),
    ],
)
def test_what_cannot_be_meant_is_named(tmp_path: Path, text: str, changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text), changes)
    found = str(caught.value)
    assert message in found and ("run.toml" in found or "--set" in found)


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("[optim]\nstepz = 3\n", [], "{file}: optim.stepz: no such setting; did you mean optim.steps?"),
        ("", ["optim.stepz=3"], "--set optim.stepz=3: optim.stepz: no such setting; did you mean optim.steps?"),
        ("[optim]\nsteps = 0\n", ["optim.lr=1"], "{file}: optim.steps: Input should be greater than"),
        ("[optim]\nsteps = 1\n", ["optim.steps=0"], "--set optim.steps=0: optim.steps: Input should be greater than"),
        ("[optim]\nsteps = 0\n", ["optim.steps=1", "optim.lr=0"], "--set optim.lr=0: optim.lr: Input should be"),
        ("", ["optim.betas=[0, 1]"], "--set optim.betas=[0, 1]: optim.betas.1: Input should be"),
        # Settings that contradict each other: the change is named that has one of them
        ("[model]\ndim = 30\n", ["model.dropout=0.2"], "{file}: model.dim = 30 must be a multiple of 2 x model.heads"),
        ("", ["model.dropout=0.2", "model.heads=5"], "--set model.heads=5: model.dim = 176 must be a multiple"),
        ("[transfer]\nlayers = [6]\n", ["model.layers=5"], "--set model.layers=5: transfer.layers has 6"),
    ],
)
def test_the_origin_of_a_wrong_setting_is_named(tmp_path: Path, text: str, changes: list[str], message: str) -> None:
    path = write(tmp_path, MINIMAL + text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, changes)
    assert str(caught.value).startswith(message.format(file=path))


def test_wrong_settings_of_several_origins_are_all_named(tmp_path: Path) -> None:
    path = write(tmp_path, '[data]\ncorpus = "c"\nunits = "u"\n[optim]\nlr = 0\n')
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["optim.steps=0", "run.sead=1"])
    problems = str(caught.value)
    assert f"{path}: data.features is missing; optim.lr: Input" in problems
    assert "--set optim.steps=0: optim.steps: Input" in problems
    assert "--set run.sead=1: run.sead: no such setting; did you mean run.seed?" in problems


def test_the_origin_of_a_wrong_setting_of_a_study_is_named(tmp_path: Path) -> None:
    recipe, study = write(tmp_path, MINIMAL), tmp_path / "study.toml"
    text = f'base = "{recipe.name}"\ntest = ["t"]\n'

    def message(settings: str, arm: str) -> str:
        study.write_text(f"{text}[settings]\n{settings}\n[arms.a]\n{arm}\n")
        with pytest.raises(ConfigError) as caught:
            load_study(study, tmp_path / "out")
        return str(caught.value)

    assert message("optim.stepz = 1", "").startswith(f"{study}: optim.stepz: no such setting; did you mean")
    assert message("", "optim.lr = 0").startswith(f"{study}, arm a: optim.lr: Input should be")
    recipe.write_text(MINIMAL + "[optim]\nstepz = 1\n")
    assert message("", "").startswith(f"{recipe}: optim.stepz: no such setting")
    study.write_text(f"{text}metrik = 'wer'\n[arms.a]\n")
    with pytest.raises(ConfigError, match=r"metrik: no such setting; did you mean metric\?"):
        load_study(study, tmp_path / "out")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.toml"):
        load_config(tmp_path / "gone.toml")


def test_every_recipe_is_valid(root: Path, tmp_path: Path) -> None:
    recipes = [*root.glob("recipes/*.toml"), *root.glob("data/demo/*.toml")]
    assert recipes
    for path in recipes:
        if path.stem.startswith("study-"):
            if "choice" in read_toml(path):
                choosing = load_study(path, tmp_path, choosing=True)
                assert choosing.choosing is not None
                make_choice(dict.fromkeys(choosing.definition.arms, 0.0), choosing.choosing, tmp_path)
            load_study(path, tmp_path)
        else:
            load_config(path)


def test_stores_by_one_name_or_several(tmp_path: Path) -> None:
    for given, found in (("a.zarr", ["a.zarr"]), ('["a.zarr", "b.zarr"]', ["a.zarr", "b.zarr"])):
        config = load_config(write(tmp_path, MINIMAL), [f"transfer.stores={given}", 'transfer.views=["m/alone/1"]'])
        assert [str(p) for p in config.transfer.stores] == found
        assert load_config(write(tmp_path, dump_config(config))) == config


NAMED = (
    MINIMAL
    + """
[transfer]
stores = "teacher.zarr"
[transfer.text]
views = "minilm/*/last"
weight = 0.3
[transfer.predictor]
views = "smollm/past:64/last"
aligner = "predictor"
"""
)


def test_named_transfers_are_read_written_and_changed(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, NAMED), ["transfer.text.weight=0.5", "transfer.third.layers=[1]"])
    transfers = config.transfer.transfers
    assert list(transfers) == ["text", "predictor"]  # the third has no views
    assert [(t.weight, t.aligner) for t in transfers.values()] == [(0.5, "occupancy"), (1.0, "predictor")]
    text = dump_config(config)
    assert load_config(write(tmp_path, text)) == config and "[transfer.predictor]" in text
    flat = config.flat()
    assert flat["transfer.text.weight"] == 0.5 and flat["transfer.on_missing"] == "error"
    assert "transfer.weight" not in flat and "transfer.weight" in load_config(write(tmp_path, MINIMAL)).flat()
    one = load_config(write(tmp_path, MINIMAL), ["transfer.stores=a", "transfer.views=m/alone/1"])
    assert one.transfer.transfers == {"": one.transfer}
    assert load_config(write(tmp_path, NAMED), ["transfer.text.views=[]"]).transfer.transfers.keys() == {"predictor"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "transfer.weight=0.5",
            r"--set transfer.weight=0.5: transfer.weight and the section \[transfer.text\] exclude",
        ),
        ("transfer.wieght=0.5", "--set transfer.wieght=0.5: transfer.wieght: no such setting; did you mean transfer.w"),
        ("transfer.text.wieght=0.5", "transfer.text.wieght: no such setting; did you mean transfer.text.weight"),
        ("transfer.text.stores=b", "transfer.text.stores: no such setting"),
        ("transfer.text.layers=[9]", "transfer.text.layers has 9"),
        ("transfer.predictor.sample=1", "transfer.predictor.sample, the views"),
        ("transfer.text.decay=linear", "transfer.text.decay and transfer.text.decay_steps go together"),
        ("transfer.a b.weight=1", "transfer.a b: the name of a transfer has"),
        ("transfer.stores=[]", "transfer.text.views needs a store"),
        (
            "transfer.text={aligner='frames', position='word'}",
            "transfer.text.position = word is not for",
        ),
        ("transfer.text={aligner='frames', control='static'}", "transfer.text.control = static needs the tokens"),
        ("transfer.text={distance='codes', control='words'}", "set transfer.text.control = shuffled"),
        ("transfer.text={aligner='frames', state_share=0}", "transfer.text.state_share"),
    ],
)
def test_named_transfers_that_cannot_be(tmp_path: Path, change: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, NAMED), [change])


def test_lambda_rises_stays_and_falls(tmp_path: Path) -> None:
    from stillhouse.train.config import transfer_weight

    changes = ["transfer.weight=0.8", "transfer.warmup_steps=4", "transfer.decay_steps=4", "transfer.final_weight=0.2"]

    def curve(*more: str, steps: tuple[int, ...]) -> list[float]:
        config = load_config(write(tmp_path, MINIMAL), more)
        return [transfer_weight(n, config.transfer) for n in steps]

    assert curve("transfer.weight=0.8", steps=(0, 1000)) == [0.8, 0.8]
    assert curve(*changes[:2], steps=(0, 1, 3, 4, 99)) == pytest.approx([0.2, 0.4, 0.8, 0.8, 0.8])
    found = curve(*changes, "transfer.decay=linear", steps=(3, 4, 5, 6, 7, 8, 99))
    assert found == pytest.approx([0.8, 0.8, 0.65, 0.5, 0.35, 0.2, 0.2])
    found = curve(*changes, "transfer.decay=cosine", steps=(4, 5, 6, 7, 8, 9))
    assert found == pytest.approx([0.8, 0.2 + 0.6 * 0.853553, 0.5, 0.2 + 0.6 * 0.146447, 0.2, 0.2], abs=1e-5)


def test_a_model_larger_than_the_memory_is_refused_in_words(tmp_path: Path) -> None:
    vast = ["model.dim=65536", "model.layers=1024", "model.inner=262144"]
    with pytest.raises(ConfigError, match="too little memory for a model of dim = 65536"):
        build_model(load_config(write(tmp_path, MINIMAL), vast), 6)


@pytest.mark.parametrize(("bfloat16", "chosen"), [(1.0, "bfloat16"), (2.0, "bfloat16"), (2.1, "float32")])
def test_precision_is_the_faster_one(monkeypatch: pytest.MonkeyPatch, bfloat16: float, chosen: str) -> None:
    monkeypatch.setattr(building, "_matmul_seconds", lambda dtype: bfloat16 if dtype == torch.bfloat16 else 2.0)
    cpu, encoder = torch.device("cpu"), small_encoder()
    monkeypatch.setattr(building, "_times_as_fast_in_bfloat16", lambda encoder: 1.0)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert building.resolve_precision("auto", cpu, encoder) == chosen
    assert building.resolve_precision("bfloat16", cpu, encoder) == "bfloat16"
    monkeypatch.setattr(building, "_times_as_fast_in_bfloat16", lambda encoder: 0.3)
    assert building.resolve_precision("auto", cpu, encoder) == "float32", "this encoder is slower in bfloat16"
    monkeypatch.setattr(building, "_times_as_fast_in_bfloat16", lambda encoder: 1.0)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False}, raising=False)
    assert building.resolve_precision("auto", cpu, encoder) == "float32", "elsewhere it is emulated"


def small_encoder(**options: Any) -> Encoder:
    return Encoder(bins=12, dim=8, layers=2, heads=2, inner=8, **options)


@pytest.mark.parametrize("options", [{}, {"causal": True, "chunk_frames": 8}, {"subsampling": 1}])
def test_an_encoder_is_measured_in_both_precisions(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that takes long in bfloat16 is found, and neither weights, gradients nor random numbers change."""
    encoder = small_encoder(**options)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    state = torch.get_rng_state()
    assert building._times_as_fast_in_bfloat16(encoder) > 0
    plain = encoder.blocks[0].forward

    def slow(*inputs: Any) -> Any:
        for _ in range(40 if torch.is_autocast_enabled("cpu") else 0):
            plain(*inputs)
        return plain(*inputs)

    monkeypatch.setattr(encoder.blocks[0], "forward", slow)
    assert building._times_as_fast_in_bfloat16(encoder) < building.LEAST
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert all(p.grad is None for p in encoder.parameters())
