"""Converted GGUF files and folders give the states that transformers gives for the source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from stillhouse.cli import main
from stillhouse.data.errors import LockedError, TeacherError, UsageError
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store
from stillhouse.extract.teacher.convert import convert
from stillhouse.extract.teacher.model import load_teacher

from ..conftest import TEXTS, byte_bpe, make_corpus

pytest.importorskip("gguf")
pytest.importorskip("accelerate")
WIDTH, INNER, HEADS, KEYS, BLOCKS = 64, 96, 4, 2, 3


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of random weights, its matrices quantised to 4 bits, with a byte-level BPE and a chat template."""
    import gguf

    path = tmp_path_factory.mktemp("gguf") / "tiny.Q4_1.gguf"
    vocabulary = json.loads(byte_bpe().to_str())["model"]  # type: ignore[attr-defined]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_license("cc0-1.0")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokens))
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in vocabulary["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")

    def matrix(name: str, rows: int, columns: int) -> None:
        values = rng.normal(0, 0.2, (rows, columns)).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    matrix("token_embd.weight", len(tokens), WIDTH)
    head = WIDTH // HEADS
    for k in range(BLOCKS):
        for name, rows, columns in (
            ("attn_q", WIDTH, WIDTH),
            ("attn_k", KEYS * head, WIDTH),
            ("attn_v", KEYS * head, WIDTH),
            ("attn_output", WIDTH, WIDTH),
            ("ffn_gate", INNER, WIDTH),
            ("ffn_up", INNER, WIDTH),
            ("ffn_down", WIDTH, INNER),
        ):
            matrix(f"blk.{k}.{name}.weight", rows, columns)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{k}.{name}.weight", rng.normal(1, 0.1, WIDTH).astype(np.float32))
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def converted(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "tiny"
    convert(gguf_file, out)
    return out


def same_states(source: Path, out: Path) -> None:
    """Every layer, bit for bit, and the ids of texts of many scripts."""
    from transformers import AutoModel, AutoTokenizer

    slow = AutoModel.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    fast = load_teacher(str(out), device="cpu")
    for text in (t for t in TEXTS if t):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert fast.tokeniser._backend.encode(text, add_special_tokens=False).ids == ids
        with torch.inference_mode():
            a = slow(torch.tensor([ids]), output_hidden_states=True).hidden_states
            b = fast.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        assert len(a) == fast.depth + 1 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_gguf_file_gives_the_same_states(gguf_file: Path, converted: Path) -> None:
    same_states(gguf_file, converted)


def test_the_folder_has_the_facts(gguf_file: Path, converted: Path, tmp_path: Path) -> None:
    import hashlib

    card = json.loads((converted / "teacher.json").read_text())
    assert card["schema"] == "stillhouse.teacher/1"
    assert card["about"] == "tiny.Q4_1, instruct-tuned, 4-bit quantised, here as float32"
    assert card["files"] == {gguf_file.name: hashlib.sha256(gguf_file.read_bytes()).hexdigest()}
    assert (card["depth"], card["width"], card["licence"]) == (BLOCKS, WIDTH, "cc0-1.0")
    assert card["tensor_types"] == {"Q4_1": 1 + 7 * BLOCKS, "F32": 2 * BLOCKS + 1}
    teacher = load_teacher(str(converted), device="cpu")
    assert (teacher.kind, teacher.about) == ("decoder", card["about"])
    assert card["weights_hash"] == teacher.weights_hash() and card["tokenizer_hash"] == teacher.tokeniser.hash
    assert card["about"] in (converted / "README.md").read_text()
    extract(tmp_path / "s", make_corpus(TEXTS[:4]), teacher, Request("tiny", [-1], ["alone", "past:8"]))
    assert Store.open(tmp_path / "s").teacher("tiny").settings.about == card["about"]


def test_inspect_info_shows_it(converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = load_teacher(str(converted), device="cpu")
    extract(tmp_path / "s", make_corpus(TEXTS[:4]), teacher, Request("tiny", [-1], ["alone"]))
    with pytest.raises(SystemExit) as stop:
        main(["inspect", "info", str(tmp_path / "s")])
    assert stop.value.code == 0
    assert "about     tiny.Q4_1, instruct-tuned, 4-bit quantised" in capsys.readouterr().out


def test_a_folder_is_converted_too(llama: Path, tmp_path: Path) -> None:
    """Its bfloat16 weights stay what they are."""
    from transformers import AutoModel

    source = shutil.copytree(llama, tmp_path / "source")
    AutoModel.from_pretrained(llama, dtype=torch.bfloat16).save_pretrained(source)
    card = convert(source, tmp_path / "out", note="of random weights")
    assert (card.format, card.dtype, card.quantised_bits) == ("safetensors", "bfloat16", None)
    assert card.about == "source, of random weights"
    a, b = (load_teacher(str(p), device="cpu") for p in (source, tmp_path / "out"))
    assert a.weights_hash() == b.weights_hash() and a.tokeniser.hash == b.tokeniser.hash


def test_the_command(gguf_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["teacher", "convert", str(gguf_file.parent), str(tmp_path / "out"), "--json"])
    assert stop.value.code == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "out" / "teacher.json").read_text())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_existing_folder_stays(gguf_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        convert(gguf_file, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_left_overs_of_a_killed_conversion_go_and_one_at_a_time_works(gguf_file: Path, tmp_path: Path) -> None:
    import fcntl
    import os

    left = tmp_path / ".out.converting"
    left.mkdir()
    (left / "model-00001-of-00009.safetensors").write_bytes(b"half")
    held = os.open(left, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(LockedError):
        convert(gguf_file, tmp_path / "out")
    os.close(held)
    convert(gguf_file, tmp_path / "out")
    assert not left.exists() and not (tmp_path / "out" / "model-00001-of-00009.safetensors").exists()


def test_other_states_are_refused(gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the written model loads with one other number, the conversion leaves nothing behind."""
    from stillhouse.extract.teacher import convert as module

    def off(*args: object, **options: object) -> object:
        teacher = load_teacher(*args, **options)  # type: ignore[arg-type]
        next(teacher.model.parameters())[7, 0] += 1e-3
        next(teacher.model.parameters())[:, 0] += 1e-3
        return teacher

    monkeypatch.setattr(module, "load_teacher", off)
    with pytest.raises(TeacherError, match="differ after the conversion"):
        convert(gguf_file, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_read(gguf_file: Path, bert: Path, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="no model here"):
        convert(tmp_path, tmp_path / "out")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(TeacherError, match="cannot be loaded"):
        convert(tmp_path / "bad.gguf", tmp_path / "out")
    (tmp_path / "two.gguf").write_bytes(b"GGUF")
    with pytest.raises(TeacherError, match=r"several models.*name the file"):
        convert(tmp_path, tmp_path / "out")
    with pytest.raises(TeacherError, match="teacher convert"):
        load_teacher(str(gguf_file.parent))
    with pytest.raises(TeacherError, match="teacher convert"):
        load_teacher(str(gguf_file))


@pytest.mark.slow
def test_the_real_smollm2(smollm2: Path, tmp_path: Path) -> None:
    card = convert(smollm2, tmp_path / "smollm2")
    assert (card.quantised_bits, card.instruct_tuned, card.depth, card.width) == (4, True, 30, 576)
    same_states(smollm2, tmp_path / "smollm2")
