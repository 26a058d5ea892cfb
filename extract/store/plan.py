"""What a store is meant to hold: teachers, generations, shards and units of work, read from its JSON files.

Invariant: a generation's plan.json is written once and never changed; what exists is told by commits alone.
Run: `stillhouse extract --status CORPUS STORE`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stillhouse.data.errors import NoStoreError, StoreError

from .files import read_json, write_json
from .layout import FORMAT, VERSION, Paths


@dataclass(frozen=True)
class Teacher:
    """A language model as one store uses it: all that decides what its states are. `contexts` and `layers` are
    the axes C and L of its arrays, in order of arrival.
    """

    name: str
    kind: str  # "encoder" or "decoder"
    model: str  # the name or path that was given
    architecture: str
    revision: str | None
    weights_hash: str
    tokenizer_hash: str
    transform: str
    join: str
    join_ids: list[int]
    prefix_ids: list[int]
    suffix_ids: list[int]
    leading_space: bool
    width: int
    depth: int
    window: int  # most tokens a pass, special ones included
    dtype: str  # of the stored states
    model_dtype: str
    contexts: list[str] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    fingerprints: dict[str, str] = field(default_factory=dict)  # "CONTEXT/LAYER" -> hash of the view's settings
    about: str = ""  # what the model's folder says of itself, as "instruct-tuned, 4-bit quantised"


@dataclass(frozen=True)
class Shard:
    """Utterances [first, last) of the store lie in rows [number · S, number · S + rows)."""

    number: int
    first: int
    last: int
    rows: int


@dataclass(frozen=True)
class Work:
    """One context's layers, to be made for every shard of the generation's list."""

    context: str
    layers: list[int]
    shards: list[int]


@dataclass(frozen=True)
class Generation:
    """One immutable plan: the teacher's whole list of shards after it, and what work it adds."""

    number: int
    teacher: str
    work: list[Work]
    shard_rows: int
    shards: list[Shard]
    batch_tokens: int
    batch_overhead_tokens: int
    core_tokens: int
    seed: int
    created: str


@dataclass(frozen=True)
class Unit:
    """The unit of work and of commit: (teacher, context, shard), with the layers that a generation asks for."""

    generation: Generation
    context: str
    layers: tuple[int, ...]
    shard: Shard

    @property
    def teacher(self) -> str:
        return self.generation.teacher

    def __str__(self) -> str:
        return f"{self.teacher}/{self.context} shard {self.shard.number}"


@dataclass
class Plan:
    """store.json and every generation's plan.json."""

    paths: Paths
    created: str
    corpus: dict[str, Any]
    versions: dict[str, str]
    teachers: dict[str, Teacher]
    generations: list[Generation]

    def units(self, teacher: str | None = None) -> list[Unit]:
        """All units of work in the order in which writers take them."""
        return [
            Unit(g, work.context, tuple(work.layers), g.shards[s])
            for g in self.generations
            if teacher is None or g.teacher == teacher
            for work in g.work
            for s in work.shards
        ]

    def latest(self, teacher: str) -> Generation:
        """The newest generation of a teacher: its list of shards is the whole list."""
        return [g for g in self.generations if g.teacher == teacher][-1]


def read_plan(root: Path) -> Plan:
    """Read a store's plan. Errors: NoStoreError where there is none, StoreError where it is of another version."""
    paths = Paths(root)
    try:
        head = read_json(paths.store_json)
    except FileNotFoundError as e:
        raise NoStoreError("there is no store", where=root, remedy="stillhouse extract CORPUS STORE …") from e
    if head.get("format") != FORMAT:
        raise NoStoreError("this is not a store", where=paths.store_json, expected=f"format {FORMAT!r}")
    if head.get("version") != VERSION:
        raise StoreError(f"version {head.get('version')}", where=root, expected=f"version {VERSION}")
    try:
        teachers = {name: Teacher(**t) for name, t in head["teachers"].items()}
        generations = [_generation(read_json(paths.plan(g))) for g in head["generations"]]
        return Plan(paths, head["created"], head["corpus"], head["versions"], teachers, generations)
    except (KeyError, TypeError, FileNotFoundError) as e:
        raise StoreError(f"the plan is damaged: {e!r}", where=root) from e


def _generation(value: dict[str, Any]) -> Generation:
    work = [Work(**w) for w in value.pop("work")]
    shards = [Shard(i, *entry) for i, entry in enumerate(value.pop("shards"))]
    return Generation(work=work, shards=shards, **value)


def write_generation(paths: Paths, generation: Generation) -> None:
    value = dataclasses.asdict(generation)
    value["shards"] = [[s.first, s.last, s.rows] for s in generation.shards]
    write_json(paths.plan(generation.number), value)


def write_head(plan: Plan) -> None:
    """Write store.json: the moment at which its generations come into force."""
    write_json(
        plan.paths.store_json,
        {
            "format": FORMAT,
            "version": VERSION,
            "created": plan.created,
            "corpus": plan.corpus,
            "teachers": {name: dataclasses.asdict(t) for name, t in plan.teachers.items()},
            "generations": [g.number for g in plan.generations],
            "versions": plan.versions,
        },
    )
