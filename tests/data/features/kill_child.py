"""Compute features in forked children and kill them at random moments, for test_kill.py.

Prints one JSON line: what each child reported, how often it was killed, and the files after each kill.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torchaudio.compliance.kaldi

from stillhouse.data.features.compute import PartDone, compute_features
from stillhouse.data.manifest import read_manifest

assert torchaudio is not None  # imported before the forks, so that a child starts at once


def child(pipe: int, manifest: str, features: str) -> None:
    def say(fact: dict) -> None:
        os.write(pipe, json.dumps(fact).encode() + b"\n")

    def on_part(part: PartDone) -> None:
        say({"done": part.ids})

    corpus = read_manifest(manifest)
    try:
        compute_features(
            corpus,
            features,
            (1.0, 1.1),
            workers=0,
            part_s=0.8,
            on_start=lambda there, _: say({"there": there}),
            on_part=on_part,
        )
    except BaseException as e:
        say({"error": repr(e)})
        os._exit(1)
    say({"finished": True})
    os._exit(0)


def main(manifest: str, features: str, kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    rng = random.Random(seed)
    reports: list[list[dict]] = []
    files: list[list[str]] = []
    killed = 0
    while True:
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(read_end)
            child(write_end, manifest, features)
        os.close(write_end)
        stream = os.fdopen(read_end, "rb")
        lines: list[bytes] = []
        if killed < kills:
            # A few words in, then a moment later: anywhere in reading, computing, writing, merging, sweeping.
            for _ in range(rng.randint(0, 3)):
                if line := stream.readline():
                    lines.append(line)
            deadline = time.perf_counter() + rng.uniform(0, 0.03)
            while time.perf_counter() < deadline:
                pass
            os.kill(pid, signal.SIGKILL)
        lines += stream.readlines()
        status = os.waitpid(pid, 0)[1]
        stream.close()
        # A kill may cut the last line short.
        reports.append([json.loads(line) for line in lines if line.endswith(b"\n")])
        folder = Path(features + ".parts")
        files.append(sorted(p.name for p in folder.iterdir()) if folder.is_dir() else [])
        if not os.WIFSIGNALED(status):
            if killed >= kills or os.WEXITSTATUS(status):
                break
            # It was faster than the kill: do it all again.
            os.unlink(features)
            reports.append([{"restart": True}])
        else:
            killed += 1
    print(json.dumps({"reports": reports, "killed": killed, "files": files}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
