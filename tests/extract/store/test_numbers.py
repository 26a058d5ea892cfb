"""Numbers of store.json that do not fit the arrays are findings, and `verify` never advises itself."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hostile import places
from hostile import put as changed

from stillhouse.cli import cli
from stillhouse.data.errors import StillhouseError, StoreError
from stillhouse.extract.maintain.repair import repair_all
from stillhouse.extract.store import Store
from stillhouse.extract.store.disk.durable import write_json
from stillhouse.extract.store.verify.verify import verify

from ..conftest import loaded, make_corpus


@pytest.fixture(scope="module")
def made(bert: Path, gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teachers, one of them with states as int8 and grown by a layer."""
    from stillhouse.extract.pipeline.extract import extract
    from stillhouse.extract.pipeline.request import Request

    root = tmp_path_factory.mktemp("numbers") / "s"
    for layers in ([0], [0, 2]):
        extract(root, make_corpus(), loaded(bert), Request("bert", layers, ["alone", "past:4"]))
    extract(root, make_corpus(), loaded(gpt2), Request("gpt2", [1], ["alone"], dtype="int8"))
    assert verify(Store.open(root)) == []
    return root


def told(root: Path, *more: str) -> tuple[int, str]:
    """The exit code of `verify`, and all that it says."""
    done = CliRunner().invoke(cli, ["inspect", "verify", str(root), *more])
    if not isinstance(done.exception, SystemExit | StillhouseError | None):
        raise done.exception
    error = done.exception if isinstance(done.exception, StillhouseError) else None
    return done.exit_code, done.output + str(error or "")


def advises_itself(said: str) -> bool:
    return "inspect verify" in re.sub("inspect verify STORE (--data )?--repair", "", said)


def numbers(value: Any) -> list[tuple]:
    def at(place: tuple) -> Any:
        inner = value
        for key in place:
            inner = inner[key]
        return inner

    return [p for p in places(value) if type(at(p)) is int and p[-1] != "crc32c" and p[-2:-1] != ("fingerprints",)]


def test_every_number_of_store_json(made: Path, tmp_path: Path) -> None:
    """Widths, depths, windows, special tokens, layers, counts: all with a sound checksum."""
    root = tmp_path / "s"
    shutil.copytree(made, root)
    head = json.loads((root / "store.json").read_text())
    found = numbers(head)
    assert {p[-1] for p in found} >= {"width", "depth", "window", "utterances", "sessions"} and len(found) > 15
    for place in found:
        inner = head
        for key in place:
            inner = inner[key]
        for number in {inner + 1, 2 * inner + 64, 0} - {inner}:
            write_json(root / "store.json", changed(head, place, number))
            code, said = told(root, "--data")
            assert code == 1 and not advises_itself(said), (place, number, said)
            assert "store.json" in said or "plan.json" in said or place == ("version",), (place, said)
    write_json(root / "store.json", changed(head, ("teachers", "bert", "width"), head["teachers"]["bert"]["width"] + 8))
    code, said = told(root)
    assert "bert has width" in said and "but hidden has" in said and "backup" in said
    with pytest.raises(StoreError, match=r"bert has width .* restore this file from a backup"):
        repair_all(root, {})
    write_json(root / "store.json", changed(head, ("teachers", "bert", "dtype"), "bfloat16"))
    assert "dtype bfloat16" in told(root)[1]
    write_json(root / "store.json", head)
    assert told(root, "--data")[0] == 0


def test_contexts_and_rows_beyond_the_arrays(made: Path, tmp_path: Path) -> None:
    """Also where the group in data.zarr says the same, as after half a restore."""
    root = tmp_path / "s"
    shutil.copytree(made, root)
    head, group = (json.loads((root / p).read_text()) for p in ("store.json", "data.zarr/bert/zarr.json"))
    for key, value, said in (
        ("contexts", ["alone", "past:4", "past:8"], "3 contexts, but hidden has 2"),
        ("layers", [0, 2, 1], "3 layers, but hidden has 2"),
        ("width", 40, "width 40, but hidden has"),
    ):
        write_json(root / "store.json", changed(head, ("teachers", "bert", key), value))
        write_json(root / "data.zarr/bert/zarr.json", changed(group, ("attributes", "stillhouse", key), value))
        code, text = told(root)
        assert code == 1 and f"bert has {said}" in text and "gpt2 has" not in text, text
    write_json(root / "store.json", head)
    write_json(root / "data.zarr/bert/zarr.json", group)
    plan = json.loads((root / "plan/0/plan.json").read_text())
    rows = plan["shard_rows"]
    assert told(root)[0] == 0
    number = len(list((root / "plan").iterdir())) - 2  # the newest of bert
    plan = json.loads((root / f"plan/{number}/plan.json").read_text())
    write_json(root / f"plan/{number}/plan.json", changed(plan, ("shard_rows",), rows + 64))
    code, text = told(root)
    assert code == 1 and "bert has" in text and not advises_itself(text)


@pytest.mark.parametrize("how", ["cut", "empty", "turned", "gone"])
def test_verify_never_advises_itself(made: Path, tmp_path: Path, how: str) -> None:
    """Damage to each kind of file. What else it says, test_damage.py tests."""
    kinds: dict[str, Path] = {}
    for path in sorted(p for p in made.rglob("*") if p.is_file() and "locks" not in p.parts):
        parts = path.relative_to(made).parts
        kinds.setdefault("/".join("N" if p.isdigit() else p for p in parts), path)
    root = tmp_path / "s"
    shutil.copytree(made, root)
    for path in kinds.values():
        file = root / path.relative_to(made)
        whole = file.read_bytes()
        if not whole:
            continue
        turned = bytes([*whole[: len(whole) // 2], whole[len(whole) // 2] ^ 64, *whole[len(whole) // 2 + 1 :]])
        file.unlink()
        if how != "gone":
            file.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "turned": turned}[how])
        for more in ([], ["--data"]):
            code, said = told(root, *more)
            assert not advises_itself(said), (file, said)
            assert code in (0, 1, 10)
        file.write_bytes(whole)
    assert told(root, "--data")[0] == 0
