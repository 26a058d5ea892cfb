"""Time the RNN-T loss and its peers in one run, interleaved, and write the medians to docs/bench/loss.md.

Each time is forward + backward. Memory is the growth of the peak resident set during the call, in units of the logits.
A peer that is not installed has a row without times.
Try: `make bench-loss`, or `python tests/bench/bench_loss.py [--rounds 7] [--out FILE] [--only PART,…]`.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import loss_peers
import numba
import torch
import torchaudio
from loss_cases import (
    ROOT,
    agree,
    drawn,
    extra_memory,
    interleaved,
    librispeech,
    loss_steps,
    packed_of,
    rectangle,
    roofline,
)

from stillhouse.train.rnnt import precompile, prune_ranges, rnnt_loss, rnnt_loss_joint, rnnt_loss_simple, tdt_loss

RECTANGLES = [(8, 200, 40, 256), (16, 250, 60, 500), (4, 400, 100, 1024)]
CHARACTERS = (16, 400, 120, 32)
TINY = [(4, 12, 4, 30), (32, 30, 8, 40), (1, 50, 10, 30)]
CALLS = 100
H = 512
SLOW = int(os.environ.get("BENCH_SLOW_ROUNDS", "2"))  # rounds of peers that take seconds; 0: one, without a warm-up


def part_loss(out: list[str], rounds: int) -> None:
    ragged, source = librispeech()
    cases = [("×".join(map(str, r)), lambda r=r: rectangle(*r)) for r in (*RECTANGLES, CHARACTERS)]
    cases.append((f"LibriSpeech, 8 utterances ({source}), V=500", lambda: ragged))
    for title, make in cases:
        case = make()
        x, _, T, U = case
        size = x.numel() * 4
        makers = loss_steps(case)

        def fresh(name, x=x, T=T, U=U):
            return packed_of(x, T, U) if "packed" in name else x.clone()

        steps = {n: (lambda n=n, m=m, fresh=fresh: m(fresh(n))) for n, m in makers.items()}
        steps["memory roofline"] = lambda x=x: roofline(x.clone())
        found = interleaved(steps, rounds, {"torchaudio": SLOW, "plain torch": SLOW})
        agree(makers, fresh)
        memory = {n: extra_memory(m(fresh(n))) / size for n, m in makers.items()}
        base, roof = found["torchaudio"], found["memory roofline"][0]
        out += [f"\n### {title}", "", f"B, T, U+1, V = {tuple(x.shape)}, {size / 2**20:.0f} MiB of logits", ""]
        out += [
            "| | ms | × torchaudio | ms of CPU | × torchaudio | roofline | extra memory |",
            "|---|--:|--:|--:|--:|--:|--:|",
        ]
        for name, (wall, cpu) in found.items():
            out.append(
                f"| {name} | {wall * 1e3:.1f} | {base[0] / wall:.1f} | {cpu * 1e3:.1f} | {base[1] / cpu:.1f} | "
                f"{roof / wall:.0%} | {f'{memory[name]:.3f}' if name in memory else ''} |"
            )
        for peer in loss_peers.NAMES:
            if not loss_peers.installed(peer):
                out.append(f"| {peer} | not installed | | | | | |")
        peers = [name for name in found if name.startswith(loss_peers.NAMES)]
        if peers:
            best, ours = min(peers, key=lambda name: found[name]), found["ours, packed, in place"]
            out.append(f"\nOurs, packed, is {found[best][0] / ours[0]:.1f}× the best C++ loss, {best}.")
        print(*out[-16:], sep="\n", file=sys.stderr)


def part_ragged(out: list[str], rounds: int) -> None:
    """Time random batches of real length pairs: torchaudio computes no padding, so padding must cost us nothing."""
    out += ["\n### LibriSpeech length pairs drawn at random, V=500", ""]
    out += ["| | logits, MiB | of which padding | ms | × torchaudio | ms of CPU | × torchaudio |"]
    out += ["|---|--:|--:|--:|--:|--:|--:|"]
    for B, seed in ((4, 2), (8, 0), (16, 1)):
        case = drawn(B, seed)
        x, _, T, U = case
        names = ("torchaudio", "ours, own gradient", "ours, in place", "warprnnt_pytorch")
        makers = {n: m for n, m in loss_steps(case).items() if n in names}
        steps = {n: (lambda m=m, x=x: m(x.clone())) for n, m in makers.items()}
        found = interleaved(steps, rounds, {"torchaudio": SLOW})
        base, padding = found["torchaudio"], 1 - float((T * (U + 1)).sum()) / (x.numel() / x.shape[3])
        out += [
            f"| {B} utterances, {name} | {x.numel() * 4 / 2**20:.0f} | {padding:.0%} | {wall * 1e3:.1f} | "
            f"{base[0] / wall:.1f} | {cpu * 1e3:.1f} | {base[1] / cpu:.1f} |"
            for name, (wall, cpu) in found.items()
        ]


def part_tiny(out: list[str], rounds: int) -> None:
    """Time lattices so small that the fixed cost of a call counts."""
    out += [f"\n### Tiny lattices, mean of {CALLS} calls", ""]
    out += ["| B×T×U×V | | µs | µs of CPU | × warp-transducer, CPU |", "|---|---|--:|--:|--:|"]
    for shape in TINY:
        case = rectangle(*shape)
        title = "×".join(map(str, shape))
        names = ("torchaudio", "plain torch", "ours, own gradient", "fast_rnnt", "warprnnt_pytorch")
        makers = {n: m for n, m in loss_steps(case).items() if n in names}

        def many(make, x=case[0]):
            z = x.clone()
            step = make(z)

            def calls():
                for _ in range(CALLS):
                    z.grad = None
                    step()

            return calls

        steps = {n: (lambda m=m, many=many: many(m)) for n, m in makers.items()}
        found = interleaved(steps, 2 * rounds, {"torchaudio": SLOW, "plain torch": SLOW})
        warp = found.get("warprnnt_pytorch")
        for name, (wall, cpu) in found.items():
            ratio = f"{warp[1] / cpu:.2f}" if warp else "not installed"
            out.append(f"| {title} | {name} | {wall / CALLS * 1e6:.0f} | {cpu / CALLS * 1e6:.0f} | {ratio} |")


def joint_parts(B, T, U, V):
    g = torch.Generator().manual_seed(0)
    e, p = torch.randn(B, T, H, generator=g) * 0.5, torch.randn(B, U + 1, H, generator=g) * 0.5
    w, c = torch.randn(V, H, generator=g) * H**-0.5, torch.zeros(V)
    return [v.requires_grad_() for v in (e, p, w, c)]


def trained_parts(B, T, U, V, y):
    """Return inputs of a joint that has learnt an alignment: each unit's frames predict it, other frames the blank."""
    e, p, w, c = joint_parts(B, T, U, V)
    optimiser = torch.optim.Adam([e, p, w, c], lr=0.1)
    lengths = torch.full((B,), T).int(), torch.full((B,), U).int()
    for _ in range(12):
        optimiser.zero_grad()
        rnnt_loss_joint(e, p, w, c, y, *lengths, eps=1e-4).backward()
        optimiser.step()
    return [v.detach().requires_grad_() for v in (e, p, w, c)]


def part_joint(out: list[str], rounds: int) -> None:
    for shape in RECTANGLES[:2]:
        B, T, U, V = shape
        _, y, T_b, U_b = rectangle(B, T, U, V)
        out += [f"\n### joint (H={H}) and loss, {'×'.join(map(str, shape))}", ""]
        out += ["| | ms | × | ms of CPU | × | extra memory, MiB |", "|---|--:|--:|--:|--:|--:|"]
        for state, parts in (("", joint_parts(*shape)), (", trained", trained_parts(*shape, y))):

            def apart(loss, parts=parts, y=y, T_b=T_b, U_b=U_b):
                def step():
                    e, p, w, c = parts
                    logits = torch.tanh(e[:, :, None] + p[:, None]) @ w.t() + c
                    loss(logits, y, T_b, U_b, reduction="sum").backward()

                return lambda: step

            def fused(eps, parts=parts, y=y, T_b=T_b, U_b=U_b):
                return lambda: lambda: rnnt_loss_joint(*parts, y, T_b, U_b, reduction="sum", eps=eps).backward()

            steps = {
                "joint + torchaudio": apart(torchaudio.functional.rnnt_loss),
                "joint + ours": apart(lambda *a, **k: rnnt_loss(*a, inplace=True, **k)),
                "fused, eps 0": fused(0.0),
                "fused, eps 1e-6": fused(1e-6),
            }
            if state:
                steps = {k: steps[k] for k in ("joint + torchaudio", "fused, eps 1e-6")}
            found = interleaved(steps, max(2, rounds // 2), {"joint + torchaudio": SLOW, "joint + ours": SLOW})
            base = found["joint + torchaudio"]
            for name, (wall, cpu) in found.items():
                memory = extra_memory(steps[name]()) / 2**20
                out.append(
                    f"| {name}{state} | {wall * 1e3:.0f} | {base[0] / wall:.1f} | {cpu * 1e3:.0f} | "
                    f"{base[1] / cpu:.1f} | {memory:.0f} |"
                )
        print(*out[-8:], sep="\n", file=sys.stderr)


def part_pruned(out: list[str], rounds: int) -> None:
    B, T, U, V = RECTANGLES[1]
    _, y, T_b, U_b = rectangle(B, T, U, V)
    e, p, w, c = joint_parts(B, T, U, V)
    g = torch.Generator().manual_seed(1)
    am, lm = (torch.randn(B, n, V, generator=g).requires_grad_() for n in (T, U + 1))

    def pruned():
        simple, gamma = rnnt_loss_simple(am, lm, y, T_b, U_b, reduction="sum")
        ranges = prune_ranges(gamma, T_b, U_b, 5)
        loss = rnnt_loss_joint(e, p, w, c, y, T_b, U_b, reduction="sum", ranges=ranges)
        (loss + 0.5 * simple).backward()

    steps = {
        "full, fused, eps 1e-6": lambda: lambda: rnnt_loss_joint(e, p, w, c, y, T_b, U_b, reduction="sum").backward(),
        "pruned, band of 5 (simple loss, band, joint and loss)": lambda: pruned,
    }
    peer = loss_peers.pruned_step(am, lm, [e, p, w, c], y, T_b, U_b, V - 1, 5)
    if peer is not None:
        steps["fast_rnnt, pruned, band of 5 (the same)"] = lambda: peer
    found = interleaved(steps, rounds, {"full, fused, eps 1e-6": 2})
    out += [f"\n### Pruned, {B}×{T}×{U}×{V}, joint of H={H} included", "", "| | ms | ms of CPU |", "|---|--:|--:|"]
    out += [f"| {name} | {wall * 1e3:.0f} | {cpu * 1e3:.0f} |" for name, (wall, cpu) in found.items()]
    if peer is None:
        out.append("| fast_rnnt, pruned | not installed | |")


def part_tdt(out: list[str], rounds: int) -> None:
    B, T, U, V = RECTANGLES[0]
    x, y, T_b, U_b = rectangle(B, T, U, V)
    z = torch.randn(B, T, U + 1, 5, generator=torch.Generator().manual_seed(2))
    durations = [0, 1, 2, 3, 4]

    def step(loss):
        def prepare():
            a, b = x.clone().requires_grad_(), z.clone().requires_grad_()
            return lambda: loss(a, b, y.long(), T_b.long(), U_b.long(), V - 1, durations, 0.0, "sum").backward()

        return prepare

    steps = {"ours": step(tdt_loss)}
    try:
        from transformers.loss.loss_tdt import tdt_loss as theirs

        steps["transformers, plain torch"] = step(theirs)
    except ImportError:
        out.append("transformers' tdt_loss: not installed")
    found = interleaved(steps, rounds, {"transformers, plain torch": SLOW})
    out += [f"\n### tdt_loss, {B}×{T}×{U}×{V}, durations 0-4", "", "| | ms | ms of CPU |", "|---|--:|--:|"]
    out += [f"| {name} | {wall * 1e3:.1f} | {cpu * 1e3:.1f} |" for name, (wall, cpu) in found.items()]
    if len(found) == 2:
        (a, b), (c, d) = found["ours"], found["transformers, plain torch"]
        out.append(f"\nOurs is {c / a:.0f}× as fast by the clock, {d / b:.0f}× by CPU time.")


def part_precision(out: list[str], rounds: int) -> None:
    T, U, V = 3000, 300, 16
    x, y, T_b, U_b = rectangle(1, T, U, V)
    grads = {}
    for name, loss, dtype in (
        ("truth", rnnt_loss, torch.float64),
        ("ours", rnnt_loss, torch.float32),
        ("torchaudio", torchaudio.functional.rnnt_loss, torch.float32),
    ):
        z = x.to(dtype, copy=True).requires_grad_()
        loss(z, y, T_b, U_b, reduction="sum").backward()
        grads[name] = z.grad.double()
    errors = {n: float((grads[n] - grads["truth"]).abs().max()) for n in ("ours", "torchaudio")}
    out += [
        f"\n### Error of the gradient, T={T}, U={U}, V={V}, float32 against ours in float64",
        "",
        f"The largest absolute difference is {errors['ours']:.1e} for ours "
        f"and {errors['torchaudio']:.1e} for torchaudio.",
    ]


START = """
import time, torch, numpy
a = time.perf_counter()
from stillhouse.train.rnnt import precompile
b = time.perf_counter()
precompile()
print(b - a, time.perf_counter() - b)
"""


def part_start(out: list[str], rounds: int) -> None:
    runs = [
        subprocess.run([sys.executable, "-c", START], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(5)
    ]
    imported, started = (statistics.median(float(v) for v in column) for column in zip(*runs))
    out += [
        "\n### Start",
        "",
        f"The import takes {imported:.2f} s after torch and numpy, "
        f"and loading the kernels from the cache {started:.2f} s.",
    ]


PARTS = {
    "loss": part_loss, "ragged": part_ragged, "tiny": part_tiny, "joint": part_joint, "pruned": part_pruned,
    "tdt": part_tdt, "precision": part_precision, "start": part_start,
}  # fmt: skip


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((x.split(":")[1].strip() for x in lines if "model name" in x), platform.machine())
    return (
        f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, torchaudio {torchaudio.__version__}, numba {numba.__version__}. The load "
        f"average was {os.getloadavg()[0]:.1f} when it began"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "bench" / "loss.md")
    parser.add_argument("--only", default=",".join(PARTS))
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    notes = Path(__file__).with_name("bench_loss_notes.md").read_text()
    out = ["# The RNN-T loss, measured", "", "Written by `make bench-loss`. float32, forward and backward, medians of"]
    out += [f"{arguments.rounds} interleaved rounds ({max(1, SLOW)} of slow peers).", "", machine() + "."]
    precompile("float32", "float64")
    arguments.out.parent.mkdir(exist_ok=True)
    try:
        for name in arguments.only.split(","):
            PARTS[name](out, arguments.rounds)
    finally:  # After an interrupt, the measurements so far are written, too.
        arguments.out.write_text("\n".join([*out, "", notes]).rstrip() + "\n")


if __name__ == "__main__":
    main()
