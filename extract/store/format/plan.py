"""What a store is meant to hold: teachers, generations, shards and work items, read from its JSON files.

Guarantees: a generation's plan.json is written once and never changed. What exists is known from commits only.
Try: `stillhouse extract --status CORPUS STORE`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from ....data.errors import NoStoreError, StoreError, UsageError
from ..disk.checksums import without_checksum
from ..disk.durable import write_json
from ..disk.files import StoreFiles
from ..disk.json_records import MOST, as_record, matches_type
from ..disk.layout import FORMAT, INNER_ROWS, LATER_VERSION, VERSION, check_teacher_name, dtype_of
from ..disk.paths import Paths
from .block_sums import Sums, inherited_sums, write_sums


@dataclass(frozen=True)
class TeacherRecord:
    """A teacher as one store uses it: all that decides what its states are.

    `contexts` and `layers` are the axes C and L of its arrays, in the order in which they were added. A text teacher's
    states are those of tokens. A speech teacher's are those of frames of audio: its `axis` is "frame".
    """

    name: str
    kind: str  # "encoder" or "decoder" of text, or "speech"
    model: str  # the name or path that the user gave
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
    window: int  # most tokens a pass, special ones included, or most frames
    dtype: str  # of the stored states
    model_dtype: str
    contexts: list[str] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    fingerprints: dict[str, str] = field(default_factory=dict)  # "CONTEXT/LAYER" -> hash of the view's settings
    space_by_script: bool = False  # a leading space only before texts in scripts that write spaces between words
    about: str = ""  # what the model's folder says about it, as "instruct-tuned, 4-bit quantised"
    axis: str = "token"  # what a state belongs to: a "token" of the text, or a "frame" of the audio
    rate_hz: float = 0.0  # frames in a second, of a speech teacher
    offset_s: float = 0.0  # time of the middle of frame 0
    sample_rate_hz: int = 0  # of the samples that a speech teacher takes

    @property
    def row_arrays(self) -> tuple[str, ...]:
        """The arrays that a plan writes for each utterance and each token."""
        return ("start", "length", "audio_source") if self.is_speech else ("start", "length", "token_id", "span")

    @property
    def is_speech(self) -> bool:
        """Whether the states are those of frames of audio."""
        return self.axis == "frame"

    def as_json(self) -> dict[str, Any]:
        """Return the record as a store keeps it. That of a text teacher can be read by older versions."""
        return {k: v for k, v in dataclasses.asdict(self).items() if self.is_speech or k not in _OF_SPEECH}

    @property
    def space_choice(self) -> str:
        """Whether a space is put before each text: "yes", "no", or "auto" for scripts that write spaces."""
        return "auto" if self.space_by_script else "yes" if self.leading_space else "no"


_OF_SPEECH = ("axis", "rate_hz", "offset_s", "sample_rate_hz")


@dataclass(frozen=True)
class TeacherInfo:
    """A teacher's settings (the fields of TeacherRecord) and how many tokens of the corpus it has, or frames."""

    settings: TeacherRecord
    tokens: int
    shard_rows: int

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "settings":
            raise AttributeError(name)
        return getattr(self.settings, name)


@dataclass(frozen=True)
class Shard:
    """Utterances [first, last) of the store lie in rows [number · S, number · S + rows)."""

    number: int
    first: int
    last: int
    rows: int


@dataclass(frozen=True)
class PlannedWork:
    """One context's layers, to be extracted for every shard of the list."""

    context: str
    layers: list[int]
    shards: list[int]


@dataclass(frozen=True)
class Generation:
    """One immutable plan: the teacher's whole list of shards after it, the work that it adds, and what it drops."""

    number: int
    teacher: str
    work: list[PlannedWork]
    shard_rows: int
    shards: list[Shard]
    batch_tokens: int
    batch_overhead_tokens: int
    core_tokens: int
    seed: int
    created: str
    edition: int = 0  # the table of utterances (see index.py) that is the corpus as this teacher has it
    vocabulary: int = 0  # rows of `embedding` that count; 0: all
    passes: str = ""  # how windows go through the model, as `teacher.passes.Passes` spells it
    # Shards that earlier generations asked for and that serve nothing now, and likewise "CONTEXT/LAYER"
    dropped_shards: list[int] = field(default_factory=list)
    dropped_views: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class WorkItem:
    """What is extracted and committed as one: (teacher, context, shard), with the layers that a generation asks for."""

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
    teachers: dict[str, TeacherRecord]
    generations: list[Generation]
    # Teachers of which batches were compared with one text at a time. Earlier versions of Stillhouse did not.
    compared: list[str] = field(default_factory=list)

    @property
    def version(self) -> int:
        """The version of the format. Readers that do not know frames or codes must not take them for others."""
        return (
            LATER_VERSION if any(t.is_speech or t.dtype.startswith("pq") for t in self.teachers.values()) else VERSION
        )

    def work_items(self, teacher: str | None = None) -> list[WorkItem]:
        """Return all work items in the order in which writers take them, without what a later generation dropped."""
        items: list[WorkItem] = []
        for n, g in enumerate(self.generations):
            if teacher is not None and g.teacher != teacher:
                continue
            later = [h for h in self.generations[n + 1 :] if h.teacher == g.teacher]
            shards = {s for h in later for s in h.dropped_shards}
            views = {v for h in later for v in h.dropped_views}
            for work in g.work:
                layers = tuple(k for k in work.layers if f"{work.context}/{k}" not in views)
                if layers:
                    items += [WorkItem(g, work.context, layers, g.shards[s]) for s in work.shards if s not in shards]
        return items

    def views(self, teacher: str) -> dict[str, list[int]]:
        """Return {context: layers} that generations ask for, in the order of the teacher's axes."""
        asked = {(u.context, k) for u in self.work_items(teacher) for k in u.layers}
        t = self.teachers[teacher]
        found = {c: [k for k in t.layers if (c, k) in asked] for c in t.contexts}
        return {c: layers for c, layers in found.items() if layers}

    def shards(self, teacher: str) -> list[Shard]:
        """Return the shards of a teacher that hold something."""
        dropped = {s for g in self.generations if g.teacher == teacher for s in g.dropped_shards}
        return [s for s in self.latest(teacher).shards if s.number not in dropped]

    def edition(self, teacher: str | None = None) -> int:
        """Return the table of utterances that a teacher is at, or the newest of all teachers."""
        return max(self.latest(t).edition for t in (self.teachers if teacher is None else [teacher]))

    def summed(self) -> set[int]:
        """Return the generations whose sums are used: every teacher's latest, the newest, and those of its tables.

        Each has the sums of all that it uses, so those of earlier generations say the same again.
        """
        editions = {self.edition(name) for name in self.teachers}
        tables = {max(g.number for g in self.generations if g.edition == e) for e in editions}
        return {self.generations[-1].number, *tables, *(self.latest(name).number for name in self.teachers)}

    def is_compared(self, teacher: str) -> bool:
        """Return whether a teacher's batches were compared with one text at a time, or its states come from elsewhere.

        Earlier versions did not compare them.
        """
        chosen = teacher in self.compared or bool(self.latest(teacher).passes)
        return chosen or self.teachers[teacher].architecture == "imported"

    def latest(self, teacher: str) -> Generation:
        """Return the newest generation of a teacher. Its list of shards is the whole list."""
        return [g for g in self.generations if g.teacher == teacher][-1]


def read_plan(files: StoreFiles) -> Plan:
    """Read a store's plan. Raises NoStoreError, or StoreError where it is of another version or damaged."""
    paths, root = Paths(files), files.address
    place = files.place(paths.store_json)
    try:
        head = files.read_json(paths.store_json)
    except FileNotFoundError as e:
        raise NoStoreError("there is no store", where=root, remedy="stillhouse extract CORPUS STORE …") from e
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise NoStoreError("this is not a store", where=place, expected=f"format {FORMAT!r}")
    if head.get("version") not in (VERSION, LATER_VERSION):
        expected = f"version {VERSION} or {LATER_VERSION}"
        raise StoreError(f"version {head.get('version')!r:.60}", where=root, expected=expected)
    for key, kind in _HEAD.items():
        if not matches_type(head.get(key), kind):
            raise StoreError(f"the plan is damaged: {key} is {head.get(key)!r:.60}", where=place)
    if not matches_type(head.get("compared", []), list[str]):
        raise StoreError(f"the plan is damaged: compared is {head['compared']!r:.60}", where=place)
    teachers = {name: as_record(TeacherRecord, t, place) for name, t in head["teachers"].items()}
    for name, teacher in teachers.items():
        _check_teacher(name, teacher, place)
    generations = [_generation(paths, n, teachers) for n in head["generations"]]
    idle = teachers.keys() - {g.teacher for g in generations}
    if idle or not teachers or len({g.number for g in generations}) < len(generations):
        raise StoreError("the plan is damaged: teachers and generations do not belong together", where=place)
    compared = [name for name in head.get("compared", []) if name in teachers]
    plan = Plan(paths, head["created"], head["corpus"], head["versions"], teachers, generations, compared)
    if plan.version != head["version"]:
        what = f"the plan is damaged: version {head['version']}, and its teachers need version {plan.version}"
        raise StoreError(what, where=place)
    return plan


_HEAD = {
    "created": str,
    "corpus": dict[str, Any],
    "versions": dict[str, str],
    "teachers": dict[str, dict[str, Any]],
    "generations": list[int],
}


def _check_teacher(name: str, t: TeacherRecord, where: str) -> None:
    """Raise StoreError where a teacher's record is impossible, or would lead out of the store."""
    try:
        check_teacher_name(name)
    except UsageError as e:
        raise StoreError(f"the plan is damaged: {e.what}", where=where) from None
    sound = t.name == name and 0 < t.width < 1 << 20 and 0 <= t.depth < 1 << 16
    sound &= all(c and not set(c) & set("/\\\0") and c[0] != "." for c in t.contexts)
    sound &= t.axis in ("token", "frame") and t.is_speech == (t.kind == "speech")
    if t.is_speech:
        sound &= t.contexts == ["alone"] and 0 < t.sample_rate_hz < 1 << 32
        sound &= 0 < t.rate_hz <= t.sample_rate_hz and 0 <= t.offset_s < 1e6
    if not sound or len(set(t.contexts)) < len(t.contexts) or len(set(t.layers)) < len(t.layers):
        raise StoreError(f"the plan is damaged: the record of the teacher {name}", where=where)
    try:
        dtype_of(t.dtype).check_width(t.width)
    except UsageError as e:
        what = f"this version does not read the states of {name}, or the plan is damaged: {e.what}"
        raise StoreError(what, where=where, expected=e.expected) from None


def _generation(paths: Paths, number: int, teachers: dict[str, TeacherRecord]) -> Generation:
    path = paths.plan(number)
    where = paths.files.place(path)
    try:
        value = without_checksum(paths.files.read_json(path), path.name)
    except FileNotFoundError as e:
        raise StoreError("the plan is damaged: a generation is missing", where=where) from e
    shape = {"work": list[dict[str, Any]], "shards": list[list[int]]}
    if not isinstance(value, dict) or not all(matches_type(value.get(key), kind) for key, kind in shape.items()):
        raise StoreError("the plan is damaged: work and shards", where=where)
    if not all(len(entry) == 3 for entry in value["shards"]):
        raise StoreError("the plan is damaged: shards", where=where, expected="[first, last, rows] each")
    work = [as_record(PlannedWork, w, where) for w in value["work"]]
    shards = [Shard(i, *entry) for i, entry in enumerate(value["shards"])]
    g = as_record(Generation, value, where, work=work, shards=shards)
    teacher = teachers.get(g.teacher)
    sound = g.number == number >= 0 and 0 < g.shard_rows < MOST and g.shard_rows % INNER_ROWS == 0
    sound &= g.edition >= 0 and g.vocabulary >= 0
    if teacher is None or not sound:
        raise StoreError("the plan is damaged: teacher, number or shard_rows", where=where)
    if not all(0 <= s.first <= s.last and 0 <= s.rows <= g.shard_rows for s in shards):
        raise StoreError("the plan is damaged: an impossible shard", where=where)
    for w in work:
        known = w.context in teacher.contexts and set(w.layers) <= set(teacher.layers)
        if not known or not all(0 <= s < len(shards) for s in w.shards):
            raise StoreError("the plan is damaged: impossible work", where=where)
    return g


def write_generation(plan: Plan, generation: Generation, written: Sums) -> None:
    """Write a generation of a plan beside those before it, with the sums of what was written for it."""
    before = [(g.number, g.teacher) for g in plan.generations if g.number < generation.number]
    sums = inherited_sums(plan.paths, before, generation.teacher, generation.edition, written)
    write_sums(plan.paths, generation.number, sums)
    value = dataclasses.asdict(generation)
    value["shards"] = [[s.first, s.last, s.rows] for s in generation.shards]
    # Fields that a store never needed are left out, so that older versions can read the store.
    optional = ("edition", "vocabulary", "passes", "dropped_shards", "dropped_views")
    value = {k: v for k, v in value.items() if v or k not in optional}
    write_json(plan.paths.plan(generation.number), value)


def write_head(plan: Plan, publish: bool = True) -> None:
    """Write store.json, by which the plan's generations count. With `publish`, also in an object store."""
    write_json(
        plan.paths.store_json,
        {
            "format": FORMAT,
            "version": plan.version,
            "created": plan.created,
            "corpus": plan.corpus,
            "teachers": {name: t.as_json() for name, t in plan.teachers.items()},
            "generations": [g.number for g in plan.generations],
            "versions": plan.versions,
            "compared": [name for name in plan.compared if name in plan.teachers],
        },
    )
    if publish:
        plan.paths.files.publish_plan()
    if plan.paths.files.has_locks:  # Nothing in an object store is deleted.
        for g in plan.generations:
            if g.number not in plan.summed():
                plan.paths.sums(g.number).unlink(missing_ok=True)
