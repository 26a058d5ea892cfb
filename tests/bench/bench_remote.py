"""What reading a store in an object store costs: requests, bytes and memory a batch, and requests a command.

Run: python tests/bench/bench_remote.py. A server that speaks S3's protocol and a counting proxy are started here; the
store is made by the real writer with random states of a real width.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "lib"))
import s3
from made_up import MadeUpTeacher, made_up_corpus

from stillhouse.cli import cli
from stillhouse.data.batches.sampler import BatchSampler
from stillhouse.extract.pipeline.extract import extract
from stillhouse.extract.pipeline.request import Request
from stillhouse.extract.store import Store
from stillhouse.extract.store.remote.client import close_all

UTTERANCES, WIDTH, BATCH = 5_000, 384, 64
URL = "s3://bucket/bench"


def resident_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def warm(url: str) -> float:
    """Return the share by which checked reads of what the cache holds are slower, the median of 15 pairs."""
    checked, unchecked = (Store.open(url, checksums=c) for c in (True, False))
    view, ids = checked.resolve("t/alone/1"), checked.utterance_ids
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for n in range(16):
        batch = ids[n * BATCH : (n + 1) * BATCH]
        for store in (checked, unchecked):
            store.gather(batch, view)
        for store in (checked, unchecked) if n % 2 else (unchecked, checked):
            begin = time.perf_counter()
            for _ in range(10):
                store.gather(batch, view)
            seconds[store.checksums].append(time.perf_counter() - begin)
    return float(np.median(np.array(seconds[True][1:]) / np.array(seconds[False][1:]))) - 1


def main() -> None:
    corpus = made_up_corpus(UTTERANCES)
    with tempfile.TemporaryDirectory() as scratch, s3.moto() as port:
        folder = Path(scratch)
        proxy = s3.Proxy(port)
        os.environ |= {
            "AWS_ENDPOINT_URL": proxy.url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "STILLHOUSE_CACHE": str(folder / "cache"),
        }
        request = Request("t", [0, 1], ["alone"])
        summary = extract(URL, corpus, MadeUpTeacher(WIDTH, 1), request)  # type: ignore[arg-type]
        items, puts = summary.units, proxy.counts["PUT"]
        print(f"store: {UTTERANCES:,} utterances, {summary.tokens:,} tokens, {WIDTH} wide, {items} items of 2 layers")
        print(f"extract: {proxy.counts.total():,} requests, of which {puts} PUT; {proxy.bytes_out / 1e6:.1f} MB read")
        print(f"warm: checksums cost {warm(URL):.1%} of the time of a batch")
        for shards_mixed in (4, 0):
            for path in (folder / "cache").rglob("*"):
                path.unlink() if path.is_file() else None
            proxy.reset()
            before = resident_mb()
            store = Store.open(URL)
            view = store.resolve("t/alone/1")
            ids = [u.id for u in corpus.utterances]
            lengths = store.lengths("t")[store.rows(ids)]
            opened = proxy.counts.total(), proxy.bytes_out
            sampler = BatchSampler(
                lengths[:, None], max_frames=BATCH * 40, shards=store.shards(ids), mix=shards_mixed or len(ids)
            )
            counts, read, payload = [], [], []
            for epoch in (0, 1):
                for plan in sampler.epoch(epoch):
                    a, b = proxy.counts.total(), proxy.bytes_out
                    states = store.gather([ids[i] for i in plan.indices], view).states[view[0]]
                    counts.append(proxy.counts.total() - a)
                    read.append(proxy.bytes_out - b)
                    payload.append(states.nbytes)
            half = len(counts) // 2
            what = f"{shards_mixed} shards mixed" if shards_mixed else "all shards mixed"
            print(
                f"{what}: opening {opened[0]} requests, {opened[1] / 1e6:.2f} MB; first epoch {sum(counts[:half])} "
                f"requests in {half} batches, most {max(counts[:half])} in one, {sum(read[:half]) / 1e6:.1f} MB for "
                f"{sum(payload[:half]) / 1e6:.1f} MB of states; second epoch {sum(counts[half:])} requests; "
                f"memory +{resident_mb() - before:.0f} MB"
            )
        commands(folder, proxy)
        proxy.close()


def commands(folder: Path, proxy: s3.Proxy) -> None:
    """Print the requests of each command, with a cache of its own."""
    ids = Store.open(URL).utterance_ids
    (folder / "ids").write_text("\n".join(ids[:300]))
    runs = {
        "inspect info": ["inspect", "info", URL],
        "inspect ls": ["inspect", "ls", URL],
        "inspect show": ["inspect", "show", URL, ids[0]],
        "inspect stats": ["inspect", "stats", URL],
        "inspect verify": ["inspect", "verify", URL],
        "inspect verify --data": ["inspect", "verify", URL, "--data"],
        "inspect similarity": ["inspect", "similarity", URL],
        "inspect export of one view": ["inspect", "export", URL, str(folder / "out.npz"), "--view", "t/alone/1"],
        "store cp": ["store", "cp", URL, str(folder / "copy")],
        "store subset of 300 utterances": ["store", "subset", URL, str(folder / "part"), "--utterances"],
        "store cp to another URL": ["store", "cp", URL, "s3://bucket/copied"],
    }
    runs["store subset of 300 utterances"].append(str(folder / "ids"))
    for name, arguments in runs.items():
        close_all()
        os.environ["STILLHOUSE_CACHE"] = str(folder / f"cache of {name}")
        proxy.reset()
        done = CliRunner().invoke(cli, arguments)
        assert done.exit_code == 0, done.output
        print(f"{name}: {proxy.counts.total()} requests, {proxy.bytes_out / 1e6:.1f} MB read")


if __name__ == "__main__":
    main()
