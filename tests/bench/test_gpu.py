"""`make gpu` without a GPU: floors by hand, parts that crash, hang and run out of memory, table and rehearsal."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
import floors
import runner
from runner import Row, Section

HERE = Path(__file__).parent / "gpu"
RUN = HERE / "run.py"

# --- floors ---

ONE = floors.Card("one", bandwidth=1e9, flops={"float32": 1e9, "bfloat16": 4e9}, launch_s=1e-3)


@pytest.mark.parametrize(
    ("work", "seconds", "bound"),
    [
        (floors.Work(bytes=3e9, flops=2e9, launches=4), 3.0, "bytes"),
        (floors.Work(bytes=3e9, flops=8e9, launches=4), 8.0, "FLOPs"),
        (floors.Work(bytes=3e9, flops=16e9, launches=4, precision="bfloat16"), 4.0, "FLOPs"),
        (floors.Work(bytes=1e6, flops=1e6, launches=5), 0.005, "launches"),
        (floors.Work(bytes=1e6, diagonals=10_000), 0.003, "diagonals"),  # 1 ms of bytes and 2 ms in a chain
    ],
)
def test_the_floor_of_work(work, seconds, bound):
    assert floors.floor(work, ONE) == (pytest.approx(seconds), bound)


def test_work_of_the_loss_by_hand():
    # Cells: 2 * 3 + 4 * 2 = 14, padded 2 * 4 * 3 = 24. Ten logits of 4 bytes: read twice, written once, padding too.
    work = floors.loss_work([2, 4], [2, 1], 10)
    assert work.bytes == 40 * (14 + 14 + 24) + 14 * (14 * 4 + 32)
    assert (work.launches, work.diagonals) == (4, 5)
    packed = floors.loss_work([2, 4], [2, 1], 10, size=2, packed=True)
    assert packed.bytes == 20 * (3 * 14) + 14 * (14 * 4 + 32)  # what is kept is float32


def test_work_of_the_joint_by_hand():
    parts = 4 * 3 * 7 * (2 * (4 + 3) + 10)
    apart = floors.joint_work([2, 4], [2, 1], 10, 7, fused=False)
    assert (apart.flops, apart.bytes) == (6 * 24 * 7 * 10, 24 * 4 * (6 * 10 + 10 * 7) + parts)
    fused = floors.joint_work([2, 4], [2, 1], 10, 7, fused=True, precision="bfloat16")
    assert (fused.flops, fused.bytes, fused.precision) == (8 * 14 * 7 * 10, parts, "bfloat16")


def test_work_of_the_pruned_loss_and_of_durations_by_hand():
    pruned = floors.pruned_work([2, 4], [2, 1], 10, 7, 2)
    assert pruned.flops == 6 * 2 * 4 * 3 * 10 + 8 * (6 * 2) * 7 * 10
    assert pruned.diagonals == 10
    extra = floors.tdt_work([2, 4], [2, 1], 10, 5).bytes - floors.loss_work([2, 4], [2, 1], 10).bytes
    assert extra == 5 * 4 * (14 + 14 + 24) + 6 * 5 * 4 * 14


def test_a_known_rectangle_on_an_h100():
    # 16×250×60×500 in float32 is 488 MB of logits. They go through memory three times, at 3.35 TB/s.
    card = floors.card_named("NVIDIA H100 80GB HBM3")
    seconds, bound = floors.floor(floors.loss_work([250] * 16, [60] * 16, 500), card)
    assert seconds == pytest.approx(3 * 488e6 / 3.35e12 + 16 * 250 * 61 * 88 / 3.35e12 + 310 * 0.2e-6)
    assert bound == "bytes"


@pytest.mark.parametrize(
    ("name", "bandwidth", "bfloat16"),
    [
        ("NVIDIA H200", 4.8e12, 989e12),
        ("NVIDIA GH200 480GB", 4.0e12, 989e12),
        ("NVIDIA H100 80GB HBM3", 3.35e12, 989e12),
        ("NVIDIA H100 PCIe", 2.0e12, 756e12),
        ("NVIDIA A100-SXM4-80GB", 2.039e12, 312e12),
        ("NVIDIA A100 80GB PCIe", 1.935e12, 312e12),
        ("NVIDIA A100-PCIE-40GB", 1.555e12, 312e12),
        ("NVIDIA GeForce RTX 4090", 1.008e12, 165.2e12),
    ],
)
def test_cards_by_the_names_of_their_driver(name, bandwidth, bfloat16):
    card = floors.card_named(name)
    assert card is not None and card.name == name
    assert (card.bandwidth, card.flops["bfloat16"]) == pytest.approx((bandwidth, bfloat16))


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A10G", "NVIDIA GeForce GTX 1080", ""])
def test_a_card_without_an_entry_counts_as_measured(name):
    assert floors.card_named(name) is None


# --- parts ---

PART = """
import os, signal, sys, json
sys.path.insert(0, {here!r})
from runner import Row, Unable, own_channel, work

def crash():
    os.abort()

def exhaust():
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    return bytearray(1 << 40)

def fails():
    raise ValueError("three | bars\\nand a second line")

def unable():
    raise Unable("no such thing here")

def prints():
    print("not for the table")
    return Row(ms=2.0, floor_ms=1.0)

rows = dict(
    first=lambda: None, crash=crash, prints=prints, hang=signal.pause, fails=fails, unable=unable, exhaust=exhaust,
    killed=lambda: os.kill(os.getpid(), signal.SIGKILL), leaves=lambda: os._exit(0), last=lambda: Row(note="fine"),
)
chosen = sys.argv[1].split(",")
work([(n, rows[n]) for n in chosen], json.loads(sys.argv[-1]), own_channel(), advice=dict(crash="look here"))
"""


def run_rows(tmp_path: Path, names: str, row_s: float = 60.0, deadline: float = float("inf"), **options) -> list[Row]:
    (tmp_path / "part.py").write_text(PART.format(here=str(HERE)))
    return runner.run_part([sys.executable, str(tmp_path / "part.py"), names], row_s, deadline, **options)


def states(rows: Sequence[Row]) -> dict[str, str]:
    return {r.what: r.state for r in rows}


def test_each_row_is_reported_whatever_the_others_do(tmp_path):
    seen: list[Row] = []
    names = "first,crash,prints,fails,unable,exhaust,killed,leaves,last"
    rows = run_rows(tmp_path, names, on_row=seen.append)
    assert states(rows) == {
        "first": "ok", "crash": "crashed", "prints": "ok", "fails": "failed", "unable": "not here",
        "exhaust": "out of memory", "killed": "crashed", "leaves": "crashed", "last": "ok",
    }  # fmt: skip
    assert seen == rows
    notes = {r.what: r.note for r in rows}
    assert "SIGABRT" in notes["crash"] and notes["crash"].endswith("→ look here")
    assert notes["fails"] == "ValueError: three | bars"
    assert "memory runs out" in notes["killed"]
    assert (rows[2].ms, rows[2].floor_ms) == (2.0, 1.0)


def test_a_row_that_hangs_is_ended_and_the_next_one_runs(tmp_path):
    rows = run_rows(tmp_path, "first,hang,last", row_s=8)
    assert states(rows) == {"first": "ok", "hang": "too slow", "last": "ok"}
    assert rows[1].note == "no result in 8 s"


def test_rows_that_find_no_time_are_named(tmp_path):
    rows = run_rows(tmp_path, "first,hang,last", deadline=time.monotonic() + 6)
    assert states(rows) == {"first": "ok", "hang": "not run", "last": "not run"}
    assert states(run_rows(tmp_path, "first", deadline=time.monotonic())) == {"start": "not run"}


def test_a_process_that_cannot_begin_is_one_row(tmp_path):
    rows = run_rows(tmp_path, "unknown")
    assert states(rows) == {"start": "crashed"}
    assert "KeyError" in rows[0].note


# --- the table ---


def test_the_report_by_hand(tmp_path):
    path = tmp_path / "docs" / "gpu.md"
    rows = [
        Row("loss", ms=3.0, floor_ms=1.5, bound="bytes", peak_mb=1234.5),
        Row("a | b", "crashed", note="two\nlines"),
        Row("elsewhere", runner.QUOTED, ms=5.0),
        Row("other", runner.ABSENT),
    ]
    sections = [Section("One", "About one.", rows), Section("Two", "About two.")]
    runner.write_report(path, ["# Title"], sections)
    text = path.read_text()
    assert "1 of 3 rows are ok." in text
    assert "Not ok: a \\| b: crashed." in text and "Not run yet: Two." in text and "## Two" not in text
    assert "| what | result | ms | floor, ms | ms / floor | floor by | peak MB | remark |" in text
    assert "| loss | ok | 3 | 1.5 | 2 | bytes | 1,234 |  |" in text
    assert "| a \\| b | **crashed** |  |  |  |  |  | two lines |" in text
    assert [p.name for p in path.parent.iterdir()] == ["gpu.md"]  # no draft is left
    runner.write_report(path, ["# Title"], [Section("Two", "About two.", [Row("x")])])
    assert "| what | result |\n| --- | --- |\n| x | ok |" in path.read_text()


def test_batches_of_the_field_table():
    import losses

    pairs = losses.length_pairs()
    assert len(pairs) == 615
    plain, ordered = (losses.batches(pairs, s) for s in losses.PUBLISHED)
    assert [len(b) for b in plain] == [30] * 20 and plain[1][0] == pairs[30]
    assert len(ordered) == 20 and ordered[0][0] == max((round(t / 0.9), u) for t, u in pairs)
    for batch, after in pairwise(ordered):
        frames = sum(t for t, _ in batch)
        assert frames <= 10_000 < frames + after[0][0]


def test_a_rehearsal_reaches_the_kernels_through_the_losses_themselves(monkeypatch):
    import torch
    import values

    from stillhouse.train.rnnt import rnnt_loss, rnnt_loss_joint, tdt_loss
    from stillhouse.train.rnnt.checks import LossBatch, Options

    made = []
    for where, name in (("launch", "CudaLoss"), ("launch", "CudaTdtLoss"), ("joint", "CudaJointLoss")):

        def init(self, *given, name=name):
            made.append((name, *given))

        members = {"__init__": init, "forward": lambda self, *parts: (torch.zeros(2), None)}
        monkeypatch.setattr(f"stillhouse.train.rnnt.cuda.{where}.{name}", type(name, (), members))
    x, z = torch.zeros(2, 3, 2, 5), torch.zeros(2, 3, 2, 2)
    e, p, w = torch.zeros(2, 3, 4), torch.zeros(2, 2, 4), torch.zeros(5, 4)
    batch = torch.ones(2, 1).int(), torch.tensor([3, 3]).int(), torch.tensor([1, 1]).int()
    with values.simulated():
        rnnt_loss(x, *batch, blank=0)
        tdt_loss(x, z, *batch, 0, (0, 1))
        rnnt_loss_joint(e, p, w, None, *batch, 0)
    assert [name for name, *_ in made] == ["CudaLoss", "CudaTdtLoss", "CudaJointLoss"]
    for (_, *first, own, blank, padded, band, options, occupancy), inputs in zip(made, ([x], [x], [e, w]), strict=True):
        assert all(a is b for a, b in zip(first, inputs, strict=True))
        assert isinstance(own, LossBatch) and isinstance(options, Options)
        assert (blank, tuple(padded), band, occupancy) == (0, (3, 2), None, False)


# --- the command ---


def run_command(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(RUN), *options], capture_output=True, text=True)


def test_without_a_device_it_says_so_and_writes_nothing(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a device")
    done = run_command("--install")
    assert done.returncode == 1 and "no CUDA device here" in done.stderr
    done = run_command("--out", str(tmp_path / "gpu.md"))
    assert done.returncode == 1
    assert "no CUDA device here" in done.stderr and "stillhouse doctor" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_page_of_floors_is_that_of_the_code(tmp_path, root):
    page = (root / "docs" / "bench" / "gpu.md").read_text()
    if "No GPU has been measured yet" not in page:
        pytest.skip("a GPU has been measured")
    import run

    run.paper(tmp_path / "gpu.md")
    assert (tmp_path / "gpu.md").read_text() == page


def test_numba_cuda_is_that_of_torch():
    import run

    assert run.numba_cuda("13.0") == ["--editable", ".[gpu]"]
    assert run.numba_cuda("12.8") == ["numba-cuda[cu12]"]


def test_a_part_that_does_not_exist_is_refused():
    done = run_command("--only", "speed,sound")
    assert done.returncode == 1 and "no part sound" in done.stderr and "extraction" in done.stderr


def test_steps_of_the_recipe_are_rehearsed(tmp_path):
    """Quick, because it calls more of the package than the other parts, with the names of today."""
    done = run_command("--device", "cpu", "--only", "training", "--out", str(tmp_path / "gpu.md"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| a step with six views | ok |" in (tmp_path / "gpu.md").read_text()


@pytest.mark.slow
def test_the_rehearsal_runs_every_part(tmp_path):
    out = tmp_path / "gpu.md"
    done = run_command("--device", "cpu", "--out", str(out))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    text = out.read_text()
    assert text.count("\n## ") == 7 and "Not run yet" not in text and "Not ok" not in text
    assert "numba's simulator" in text
