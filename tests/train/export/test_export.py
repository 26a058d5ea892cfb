"""Exports of whole-utterance models: what other programs find in the folder is what the model says."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from stillhouse.data.errors import CheckpointError, ConfigError, ExportError, UsageError
from stillhouse.data.units import Units
from stillhouse.train.decode.greedy import greedy
from stillhouse.train.export.export import export_run
from stillhouse.train.export.graphs import EncoderGraph, offline_graph, repeat_frames, search_graphs, unfit_for_sherpa
from stillhouse.train.export.onnx import run_onnx, tokens_txt, write_onnx
from stillhouse.train.export.torch import traced
from stillhouse.train.model.transducer import Transducer
from stillhouse.train.run.load import load_run

from .exported import LETTERS, our_text, sharpened, sherpa_texts, speech, untrained_run

TINY = {"dim": 16, "layers": 1, "heads": 2, "inner": 32, "kernel": 5}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained_run(tmp_path_factory.mktemp("export") / "run", loss={"kind": "pruned"})


@pytest.fixture(scope="module")
def onnx_folder(run: Path) -> Path:
    found = export_run(run, run.parent / "onnx", "onnx")
    assert found.unfit_for_sherpa is None and found.difference < 1e-5
    return run.parent / "onnx"


def test_encoder_onnx_equals_the_model_for_every_length_in_a_batch(run: Path, onnx_folder: Path) -> None:
    model, *_ = load_run(run)
    torch.manual_seed(2)
    for lengths in ([131, 96, 50, 7, 1], [1], [2, 1], [64]):
        x, x_lens = 3 * torch.randn(len(lengths), lengths[0], 80) - 8, torch.tensor(lengths)
        with torch.no_grad():
            states, expected = model.encode(x, x_lens)
            states = model.joint.encoder(states)
        for b, length in enumerate(lengths):
            x[b, length:] = float("nan")  # what is in the padding does not matter
        found, found_lens = run_onnx(onnx_folder / "encoder.onnx", {"x": x, "x_lens": x_lens})
        torch.testing.assert_close(found[:, ::8], states, atol=1e-4, rtol=0)
        torch.testing.assert_close(found[:, 7::8], states, atol=1e-4, rtol=0)
        assert torch.equal(found_lens, 8 * expected)


def test_copies_of_a_state_let_a_search_of_one_unit_a_frame_find_several() -> None:
    torch.manual_seed(1)
    model = sharpened(Transducer(30, TINY, predictor_dim=16, joint_dim=16))
    states, lengths = 3 * torch.randn(4, 40, 16), torch.tensor([40, 31, 2, 17])
    for symbols in (1, 2, 5, 8):
        expected = greedy(model, states, lengths, max_symbols=symbols)
        assert greedy(model, repeat_frames(states, symbols), lengths * symbols, max_symbols=1) == expected
    assert sum(map(len, expected)) > 2 * int(lengths.sum())  # it does speak in bursts


@pytest.mark.parametrize("source", ["kathleen", "librispeech"])
def test_sherpa_onnx_says_what_decode_says(run: Path, onnx_folder: Path, corpora: Path, source: str) -> None:
    pytest.importorskip("sherpa_onnx")
    model, units, *_ = load_run(run)
    audio = speech(corpora, source, 3)
    expected = [our_text(model, units, samples) for samples in audio]
    assert sherpa_texts(onnx_folder, audio) == expected
    assert all(len(text) > 30 for text in expected) and len(set(expected)) == len(expected)


def test_an_export_holds_no_head_of_training_and_no_path_of_this_machine(run: Path, onnx_folder: Path) -> None:
    import onnx

    assert any(name.startswith("simple.") for name in load_run(run)[0].state_dict())
    for path in onnx_folder.glob("*.onnx"):
        proto = onnx.load(path)
        names = [tensor.name for tensor in proto.graph.initializer]
        assert names and not [n for n in names if any(w in n for w in ("ctc", "simple", "heads", "transfer"))]
        text = path.read_bytes()
        assert b"/train/" not in text and b".py" not in text and str(run.parent).encode() not in text
    x = onnx.load(onnx_folder / "encoder.onnx").graph.input[0]
    assert [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] == ["N", "T", 80]


def test_model_json_says_what_is_in_the_folder(onnx_folder: Path) -> None:
    head = json.loads((onnx_folder / "model.json").read_text())
    assert (head["kind"], head["step"], head["subsampling"], head["symbols_per_frame"]) == ("onnx", 7, 4, 8)
    assert set(head["files"]) | {"model.json"} == {p.name for p in onnx_folder.iterdir()}


@pytest.mark.parametrize("context", [1, 2, 4])
def test_the_decoder_takes_minus_one_for_nothing_yet(tmp_path: Path, context: int) -> None:
    model = Transducer(9, TINY, predictor_dim=16, predictor_context=context, joint_dim=16).eval()
    decoder = search_graphs(model)[0]
    assert decoder.metadata == {"context_size": str(context), "vocab_size": "9"}
    targets = torch.tensor([[3, 1, 8, 8, 2]])
    with torch.no_grad():
        whole = model.joint.predictor(model.predictor(targets))[0]
        history = [-1] * context + targets[0].tolist()
        for u in range(6):
            last = torch.tensor([history[u : u + context]])
            torch.testing.assert_close(decoder.module(last)[0], whole[u])


def test_an_lstm_goes_to_onnx_with_its_state_and_sherpa_onnx_is_refused_in_words(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Transducer(9, TINY, predictor="lstm", predictor_dim=12, joint_dim=16).eval()
    assert "LSTM" in (unfit_for_sherpa(model) or "")
    graph = search_graphs(model)[0]
    write_onnx(graph, tmp_path / "decoder.onnx")
    targets = torch.tensor([[3, 1, 8], [2, 2, 5]])
    with torch.no_grad():
        whole = model.joint.predictor(model.predictor(targets))
    y, h, c = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 12), torch.zeros(2, 12)
    for u in range(4):
        out, h, c = run_onnx(tmp_path / "decoder.onnx", {"y": y, "h": h, "c": c})
        torch.testing.assert_close(out, whole[:, u], atol=1e-5, rtol=0)
        y = targets[:, min(u, 2)]
    run = untrained_run(tmp_path / "run", predictor="lstm")
    with pytest.raises(UsageError, match="stateless prediction network"):
        export_run(run, tmp_path / "out", "onnx", symbols=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("joint", "durations"),
    [
        ("multiplicative", (0, 1, 2, 4)),
        pytest.param("multiplicative", (), marks=pytest.mark.slow),
        pytest.param("additive", (), marks=pytest.mark.slow),
    ],
)
def test_the_joiner_is_the_models_joint(tmp_path: Path, joint: str, durations: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = Transducer(9, TINY, predictor_dim=16, joint_dim=20, joint=joint, durations=durations).eval()
    graph = search_graphs(model)[1]
    assert not [n for n, _ in graph.module.named_parameters() if "encoder" in n or "predictor" in n]
    write_onnx(graph, tmp_path / "joiner.onnx")
    a, b = torch.randn(3, 20), torch.randn(3, 20)
    found = run_onnx(tmp_path / "joiner.onnx", {"encoder_out": a, "decoder_out": b})
    with torch.no_grad():
        expected = model.joint.with_durations(a, b) if durations else (model.joint(a, b),)
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    assert (unfit_for_sherpa(model) is None) == (not durations)
    assert model.joint.encoder is not None  # the graph did not take the model apart


@pytest.mark.parametrize("subsampling", [4, *(pytest.param(s, marks=pytest.mark.slow) for s in (2, 3, 6, 8))])
def test_the_program_of_torch_takes_any_batch_and_length(subsampling: int) -> None:
    torch.manual_seed(0)
    model = Transducer(9, {**TINY, "subsampling": subsampling}, predictor_dim=16, joint_dim=16).eval()
    program = traced(offline_graph(model, symbols=1)).module()
    for n, t in ((1, 97), (4, subsampling + 1), (2, 64)):
        x, x_lens = torch.randn(n, t, 80), torch.randint(1, t + 1, (n,)).index_fill(0, torch.tensor([0]), t)
        # Without gradients, the module itself would use kernels that no program has.
        for mine, theirs in zip(program(x, x_lens), EncoderGraph(model, 1)(x, x_lens), strict=True):
            assert torch.equal(mine, theirs)


def test_safetensors_load_as_a_run_does(run: Path, tmp_path: Path, corpora: Path) -> None:
    model, units, config, step = load_run(run)
    export_run(run, tmp_path / "out", "safetensors")
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    again, again_units, again_config, again_step = load_run(tmp_path / "elsewhere")
    assert (again_step, again_units.fingerprint, again_config) == (step, units.fingerprint, config)
    theirs = again.state_dict()
    assert {n for n in model.state_dict() if not n.startswith("simple.")} == set(theirs)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in theirs.items())
    (samples,) = speech(corpora, "kathleen", 1)
    assert our_text(again, again_units, samples) == our_text(model, units, samples)
    twice = export_run(tmp_path / "elsewhere", tmp_path / "twice", "safetensors")
    first, second = ((tmp_path / f / "model.json").read_text() for f in ("elsewhere", "twice"))
    assert first == second and twice.step == step


@pytest.mark.parametrize("name", ["model.safetensors", "units/units.json", "config.toml", "model.json"])
def test_a_damaged_export_is_refused(run: Path, tmp_path: Path, name: str) -> None:
    export_run(run, tmp_path / "out", "safetensors")
    path = tmp_path / "out" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="export"):
        load_run(tmp_path / "out")
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="export"):
        load_run(tmp_path / "out")


def test_graphs_are_no_run(onnx_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="export as onnx"):
        load_run(onnx_folder)


def test_what_a_format_cannot_do(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="--format onnx"):
        export_run(run, out, "torch", int8=True)
    with pytest.raises(UsageError, match="--streaming"):
        export_run(run, out, "onnx", left_chunks=0)
    with pytest.raises(UsageError, match="weights"):
        export_run(run, out, "safetensors", streaming=True)
    with pytest.raises(ConfigError, match="not trained to stream"):
        export_run(run, out, "onnx", streaming=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named_with_its_extra(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf"{package}.*pip install 'stillhouse\[onnx\]'"):
        export_run(run, tmp_path / "out", "onnx")


def test_tokens_of_characters_and_pieces() -> None:
    said = tokens_txt(LETTERS).splitlines()
    assert said[:4] == ["<blk> 0", "\u2047 1", "\u2581 2", "a 3"] and len(said) == LETTERS.size
    units = Units("characters", "none", ["<blank>", "<unk>", "\u2581", "5", "#", "é", "語", "\u00a0"])
    assert tokens_txt(units).split("\n")[3:8] == ["5 3", "# 4", "é 5", "語 6", "\u00a0 7"]
    with pytest.raises(ExportError, match="white space"):
        tokens_txt(Units("characters", "none", ["<blank>", "<unk>", "\x0b"]))


def test_sherpa_onnx_spells_every_unit_as_decode_does(tmp_path: Path, run: Path, onnx_folder: Path) -> None:
    """With a joiner that says one unit after the other, whatever it hears."""
    pytest.importorskip("sherpa_onnx")
    from onnx import TensorProto, helper, numpy_helper, save

    units = load_run(run)[1]
    folder = tmp_path / "spells"
    shutil.copytree(onnx_folder, folder)
    after = np.eye(units.size, dtype=np.float32)[np.arange(1, units.size + 1) % units.size]  # blank after the last
    constants = [("last", np.array(-1)), ("zero", np.array(0)), ("after", after)]
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", units.size])
    last_unit = [
        helper.make_node("Gather", ["y", "last"], ["unit"], axis=1),
        helper.make_node("Max", ["unit", "zero"], ["known"]),
        helper.make_node("Gather", ["after", "known"], ["logits"]),
    ]
    y = helper.make_tensor_value_info("y", TensorProto.INT64, ["N", 2])
    states = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", w]) for n, w in (("e", 16), ("d", units.size))]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants]
    for name, nodes, inputs, held in (
        ("decoder", last_unit, [y], tensors),
        ("joiner", [helper.make_node("Identity", ["d"], ["logits"])], states, []),
    ):
        graph = helper.make_graph(nodes, name, inputs, [logits], held)
        proto = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
        helper.set_model_props(proto, {"context_size": "2", "vocab_size": str(units.size)})
        save(proto, folder / f"{name}.onnx")
    (text,) = sherpa_texts(folder, [np.zeros(16_000, np.float32)])
    assert text == units.decode(range(1, units.size))
