"""Runs of several settings, one after the other, in the ranks that torchrun started: torch is imported but once.

torchrun --nproc-per-node 2 ranks_child.py CONFIG OUT '{"name": ["section.key=value", …], …}'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from stillhouse.train.config import load_config
from stillhouse.train.loop.trainer import Trainer
from stillhouse.train.run.ranks import joined


def main(config: str, out: str, runs: str) -> None:
    with joined() as ranks:
        for name, changes in json.loads(runs).items():
            Trainer(load_config(Path(config), changes), Path(out) / name, print, ranks).run()


if __name__ == "__main__":
    main(*sys.argv[1:])
