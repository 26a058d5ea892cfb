"""A tokenizer that is not the model's, or does not know the corpus, is named before anything is written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from stillhouse.data.errors import CorpusError, TeacherError
from stillhouse.data.manifest import write_manifest
from stillhouse.extract.pipeline.estimate import size_up
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store
from stillhouse.extract.teacher.model import load_teacher

from ..conftest import loaded, make_corpus

ALONE = Request("t", [1], ["alone"])
MODEL = ("config.json", "model.safetensors")


def copy_of(folder: Path, to: Path, *without: str) -> Path:
    """A copy of a model's folder."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns(*without))
    return to


@pytest.mark.parametrize("which", ["bert", "gpt2", "llama"])
def test_a_folder_without_tokenizer_files(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """transformers makes an empty one out of config.json, which spells everything as one unknown piece or nothing."""
    folder = copy_of(request.getfixturevalue(which), tmp_path / which, "tokenizer*", "vocab*", "special_tokens*")
    for left_over in (None, "tokenizer_config.json"):
        if left_over is not None:
            (folder / left_over).write_text("{}")
        with pytest.raises(TeacherError, match=r"no tokenizer: none of tokenizer\.json.*save_pretrained") as caught:
            load_teacher(str(folder), device="cpu")
        assert caught.value.where == folder


def test_a_saved_tokenizer_that_knows_no_word(bert: Path, tmp_path: Path) -> None:
    folder = copy_of(bert, tmp_path / "bert", "tokenizer*", "vocab*")
    BertTokenizerFast(
        vocab={t: i for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])}
    ).save_pretrained(folder)
    with pytest.raises(TeacherError, match="its tokenizer has 5 pieces, and no words"):
        load_teacher(str(folder), device="cpu")


@pytest.mark.parametrize("size", [40, 2000])
def test_the_tokenizer_of_another_model(bert: Path, tmp_path: Path, size: int) -> None:
    folder = copy_of(bert, tmp_path / "bert", "tokenizer*", "vocab*")
    words = [*("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"), *(f"w{i}" for i in range(size - 5))]
    BertTokenizerFast(vocab={t: i for i, t in enumerate(words)}).save_pretrained(folder)
    with pytest.raises(TeacherError, match=rf"{size:,} pieces and its embedding \d+ rows, so it is another model's"):
        load_teacher(str(folder), device="cpu")


def test_ids_beyond_the_embedding(gpt2: Path, tmp_path: Path) -> None:
    """Added tokens are of no harm while no text has one."""
    folder = copy_of(gpt2, tmp_path / "gpt2")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(["foxtrot"])
    tokenizer.save_pretrained(folder)
    teacher = load_teacher(str(folder), device="cpu")
    extract(tmp_path / "fine", make_corpus(["the old kettle"]), teacher, ALONE)
    corpus = make_corpus(["the old kettle", "a foxtrot"])
    for run in (extract, size_up):
        with pytest.raises(TeacherError, match=r"'foxtrot' \(in u1\) has the id 400, and the embedding has 400 rows"):
            run(tmp_path / "s", corpus, teacher, ALONE)
    with pytest.raises(TeacherError, match="foxtrot"):
        extract(tmp_path / "fine", corpus, teacher, ALONE, refresh=True)
    assert not (tmp_path / "s" / "store.json").exists()
    assert Store.open(tmp_path / "fine").utterance_ids == ["u0"]


def run_extract(corpus: list[str], teacher: Path, store: Path, *more: str) -> subprocess.CompletedProcess[str]:
    path = store.with_suffix(".jsonl")
    write_manifest(path, make_corpus(corpus).utterances)
    command = [sys.executable, "-m", "stillhouse.cli", "extract", str(path), str(store), "--teacher", str(teacher)]
    return subprocess.run([*command, "--device", "cpu", *more], capture_output=True, text=True, timeout=300)


def test_unknown_pieces_are_a_warning_then_an_error(bert: Path, tmp_path: Path) -> None:
    known = ["the old kettle sang", "the rain fell on the roof"]
    done = run_extract([*known, "the ภาษา fell"], bert, tmp_path / "some")
    assert done.returncode == 0
    assert "warning: 1 of " in done.stderr and "unknown to the tokenizer" in done.stderr and "as in u2" in done.stderr
    assert "warning" not in run_extract(known, bert, tmp_path / "none").stderr
    sized = run_extract([*known, "the ภาษา fell"], bert, tmp_path / "new", "--dry-run", "--json")
    assert "as in u2" in json.loads(sized.stdout)["warnings"][0]
    for most in (["ภาษาไทย", "ภาษา", "the old"], ["the old kettle", "ภาษาไทยภาษาไทยภาษาไทย"]):
        done = run_extract(most, bert, tmp_path / "most")
        assert done.returncode == 1 and "most of the text is unknown" in done.stderr, done.stderr
        assert not (tmp_path / "most" / "store.json").exists()


def test_few_new_texts_may_all_be_unknown(bert: Path, tmp_path: Path) -> None:
    extract(tmp_path / "s", make_corpus(["the old kettle"]), loaded(bert), ALONE)
    warned: list[str] = []
    longer = make_corpus(["the old kettle", "ภาษาไทย"])
    extract(
        tmp_path / "s", longer, loaded(bert), ALONE, refresh=True, check=lambda draft: warned.extend(draft.warnings)
    )
    assert len(warned) == 1 and "1 of 1 pieces are unknown" in warned[0] and warned[0].endswith("as in u1")


def test_a_tokenizer_that_makes_nothing_of_a_text_is_blamed_not_the_corpus(gpt2: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(["abcdefgh " * 9, "xyzuvw " * 9], trainers.BpeTrainer(vocab_size=300))
    folder = copy_of(gpt2, tmp_path / "gpt2", "tokenizer*")
    words = [f"<{i}>" for i in range(300 - tokenizer.get_vocab_size())]
    tokenizer.add_tokens(words)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    teacher = load_teacher(str(folder), device="cpu")
    with pytest.raises(TeacherError, match="no token of any text, as of 'u1': '你好'"):
        extract(tmp_path / "s", make_corpus(["", "你好"]), teacher, ALONE)
    with pytest.raises(CorpusError, match="no utterance has any text"):
        extract(tmp_path / "s", make_corpus(["", " "]), teacher, ALONE)
    with pytest.raises(TeacherError, match=r"2 characters are in no piece"):
        extract(tmp_path / "s", make_corpus(["a", "你好"]), teacher, ALONE)
