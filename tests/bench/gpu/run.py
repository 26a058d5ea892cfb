"""Run all that a GPU has been waiting for, and write docs/bench/gpu.md after each part: `make gpu`.

Each part is a process of its own (runner.py), and beside each time is the least on paper (floors.py). It takes eight
minutes at most. With --device cpu it is rehearsed on small sizes, with the kernels in numba's simulator.
Try: `python tests/bench/gpu/run.py --device cpu --out gpu.md`, or `--only first,values` on a GPU.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from floors import Card, card_named
from runner import Row, Section, own_channel, report_line, run_part, work, write_report

from stillhouse.data.doctor.probes import ask
from stillhouse.data.files.atomic import write_atomic

ROOT = Path(__file__).resolve().parents[3]
OUT = ROOT / "docs" / "bench" / "gpu.md"
SECONDS = 480.0
FLOOR = (
    "The floor is the least time on paper: the bytes, products or launches that the method needs, whichever takes "
    "longest by the card's data sheet, and 0.2 µs for each diagonal of the longest lattice. MB are 2²⁰ bytes."
)
# In `facts`: what torch says of the device, or why there is none. A process of its own, since it may crash or hang.
PROBE = """
import platform, torch
from importlib import metadata
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"
facts["versions"] = {n: version(n) for n in ("torch", "torchaudio", "numba", "numba-cuda", "transformers")}
facts["built"] = torch.version.cuda
facts["python"] = platform.python_version()
try:
    torch.cuda.init()
    facts["name"] = torch.cuda.get_device_name()
    facts["memory"] = torch.cuda.get_device_properties(0).total_memory / 1e9
    facts["count"] = torch.cuda.device_count()
except Exception as e:
    facts["why"] = str(e).strip().splitlines()[0]
"""


@dataclass(frozen=True)
class Part:
    """A part: its rows are what `function` of `module` returns, and each may take `row_s` seconds."""

    title: str
    module: str
    function: str
    row_s: float
    about: str
    simulated: bool = False  # in a rehearsal, in numba's simulator


PARTS = {
    "speed": Part(
        "The card", "card", "speed", 60,
        "What the card does at best, beside its data sheet. A loss waits for the host that launches its kernels.",
    ),
    "first": Part(
        "First lines that can fail", "card", "first_lines", 90,
        "Each is one thing that a device may refuse. The first that fails is the one to look at.",
        simulated=True,
    ),
    "values": Part(
        "Values against the CPU", "values", "values", 90,
        "Costs and gradients of the kernels on the device against those of the CPU, for the same numbers.",
        simulated=True,
    ),
    "loss": Part(
        "The loss of given logits", "losses", "rectangles", 90,
        "B×T×U×V, float32 if nothing else is said. Forward and backward, median of ten, lengths on the CPU.",
    ),
    "table": Part(
        "Joint and loss, on lengths of LibriSpeech", "losses", "field_table", 90,
        "The setting of the field's table: random states of 512, tanh, a linear layer to 500 units, loss, backward. "
        "The mean of 20 batches of train-clean-100, in float32 without TF32. Batches of the published table have 680 "
        "and 547 M padded logits. Sorted ones have the three speeds of its data. A band is made on the CPU, for which "
        "the device waits.",
    ),
    "training": Part(
        "A training step of recipes/librispeech-100.toml", "models", "training", 120,
        "Random features and targets, lengths of train-clean-100. Times of parts are those of the device's events.",
    ),
    "extraction": Part(
        "Extraction", "models", "extraction", 120,
        "From text to files, without the hash of the weights. The card's product is that of 8192 × 8192 above.",
    ),
}  # fmt: skip


def machine(facts: dict[str, Any], device: str) -> str:
    """Return the machine line: card, driver, versions and commit."""

    def said(*command: str) -> str:
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return run.stdout.strip().splitlines()[0] if run.returncode == 0 and run.stdout.strip() else ""

    commit = said("git", "rev-parse", "--short", "HEAD") or "unknown"
    if said("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs/bench/gpu.md"):
        commit += " with changes"
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    if device == "cpu":
        card = "A rehearsal on the CPU, on small sizes: its times mean nothing"
    else:
        driver = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "unknown"
        card = f"{facts['name']}, {facts['memory']:.0f} GB, driver {driver}, CUDA {facts['built']}"
    return f"{card}. Python {facts['python']}, {versions}, commit {commit}."


def card_of(facts: dict[str, Any], rates: dict[str, Any]) -> Card:
    """Return the card of the data sheet, or as measured in `rates`."""
    known = card_named(facts.get("name", ""))
    launch = rates.get("launch_s", Card.launch_s)
    if known is not None:
        return Card(known.name, known.bandwidth, known.flops, launch)
    flops = {"float32": 1e12} | rates.get("flops", {})
    return Card(facts.get("name", "CPU"), rates.get("bandwidth", 1e11), flops, launch, "measured")


def numba_cuda(built: str | None) -> list[str]:
    """Return what pip is to install for a torch that is built for this CUDA: the extra `gpu`, which is for CUDA 13."""
    major = (built or "13").split(".")[0]
    return ["--editable", ".[gpu]"] if major == "13" else [f"numba-cuda[cu{major}]"]


def paper(out: Path) -> None:
    """Write the floors of known cards, for as long as none has been measured."""
    from losses import mean_floor, on_paper

    cards = [card_named(name) for name in ("H100", "H200", "A100 80GB", "RTX 4090")]
    lines = [
        "# On a GPU",
        "",
        "**No GPU has been measured yet.** `make gpu` on a machine with one replaces this page.",
        "",
    ]
    lines += ["Made by `python tests/bench/gpu/run.py --paper`. " + FLOOR, ""]
    lines += ["Least milliseconds of a step, and what they are made of:", ""]
    lines += ["| | " + " | ".join(card.name for card in cards) + " |", "|---|" + "---|" * len(cards)]
    for name, works in on_paper().items():
        of_cards = (mean_floor(works, card) for card in cards)
        lines.append(f"| {name} | " + " | ".join(f"{1e3 * s:.3g} ({bound})" for s, bound in of_cards) + " |")
    lines += ["", "The rows are those of the two parts of the report that are about losses:", ""]
    lines += [f"- {PARTS[name].title}. {PARTS[name].about}" for name in ("loss", "table")]
    write_atomic(out, "\n".join(lines) + "\n")


def child(part: str, given: str, done: str) -> None:
    """Run the rows of a part, in its process."""
    out = own_channel()
    import torch
    from context import Context

    facts, p = json.loads(given), PARTS[part]
    device, rates = facts["device"], facts["rates"]

    def alive() -> bool:
        if device == "cpu":
            return True
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            return False
        return True

    with tempfile.TemporaryDirectory(prefix="stillhouse-gpu-") as folder:
        context = Context(device, card_of(facts, rates), Path(folder), rates)
        module = import_module(p.module)
        work(getattr(module, p.function)(context), json.loads(done), out, alive, getattr(module, "ADVICE", {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu rehearses on small sizes")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, joined by commas")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="no row runs longer than to this time")
    parser.add_argument("--paper", action="store_true", help="only write the floors of known cards")
    parser.add_argument("--install", action="store_true", help="only install numba-cuda, if there is a device")
    parser.add_argument("--out", type=Path, help=f"default: {OUT.relative_to(ROOT)}, or build/gpu-rehearsal.md")
    options = parser.parse_args()
    if options.paper:
        return paper(options.out or OUT)
    chosen = options.only.split(",")
    if unknown := [name for name in chosen if name not in PARTS]:
        sys.exit(f"gpu: no part {', '.join(unknown)}. Expected some of {', '.join(PARTS)}.")
    answer = ask(PROBE)
    if answer.error is not None:
        sys.exit(f"gpu: torch does not work: {answer.error}. Run stillhouse doctor.")
    facts = answer.facts | {"device": "cuda:0" if options.device == "cuda" else "cpu", "rates": {"flops": {}}}
    if options.device == "cuda" and "name" not in facts:
        sys.exit(
            f"gpu: no CUDA device here, so nothing was measured: {facts['why']} (torch is built for "
            f"{'CUDA ' + facts['built'] if facts['built'] else 'the CPU'}). Run stillhouse doctor, which says what to "
            "install, or rehearse with: python tests/bench/gpu/run.py --device cpu"
        )
    if options.install:
        print(machine(facts, options.device))
        command = [sys.executable, "-m", "pip", "install", "--quiet", *numba_cuda(facts["built"])]
        if subprocess.run(command, cwd=ROOT).returncode:
            print(f"gpu: {shlex.join(command[1:])} failed. Without numba-cuda the rows of kernels will fail.")
        return
    began = time.monotonic()
    small = options.device == "cpu"
    out = options.out or (ROOT / "build" / "gpu-rehearsal.md" if small else OUT)
    title = "# On a GPU" + (", rehearsed on the CPU" if small else "")
    command = shlex.join(["python", "tests/bench/gpu/run.py", *sys.argv[1:]]) if sys.argv[1:] else "make gpu"
    head = [title, "", f"Made by `{command}` on {datetime.now(UTC):%Y-%m-%d}.", "", machine(facts, options.device), ""]
    head.append(FLOOR)
    sections = {name: Section(PARTS[name].title, PARTS[name].about) for name in chosen}
    for name in chosen:
        part = PARTS[name]
        print(f"\n{part.title}", flush=True)
        environment = {"NUMBA_ENABLE_CUDASIM": "1", "OMP_NUM_THREADS": "1"} if small and part.simulated else {}
        command_line = [sys.executable, "-X", "faulthandler", __file__, "child", name, json.dumps(facts)]
        rows = run_part(command_line, part.row_s, began + options.seconds, environment, on_row=show)
        for row in rows:
            flops = row.facts.pop("flops", {})
            facts["rates"] |= row.facts
            facts["rates"]["flops"] |= flops
        sections[name].rows = rows
        write_report(out, head, list(sections.values()))
    bad = [r for s in sections.values() for r in s.rows if not r.holds]
    print(f"\n{out} is written, after {time.monotonic() - began:.0f} s. {len(bad)} rows are not ok.")
    sys.exit(1 if bad else 0)


def show(row: Row) -> None:
    print(report_line(row), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:])
    else:
        main()
