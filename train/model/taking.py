"""Copy the weights of one transducer into another one, as far as they mean the same in both.

Guarantees: a module's weights are taken together or not at all. Rows that belong to units are taken by the unit's text,
never by its number. Whatever is not taken is listed, with a reason.
Try: `pytest tests/train/model/test_taking.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...data.units import BLANK, UNKNOWN, Units
from ..config import Config
from .build import build_model
from .transducer import Transducer

FRONT = "encoder.front.convolutions.0"  # It reads the features, so their normalisation belongs to it.
NOT_A_PART, UNLIKE, ABSENT = "not named in init.parts", "other shapes", "the source has none"
_BLOCK = re.compile(r"(.*?\.)(\d+)(\..*|)")


@dataclass
class Taken:
    """What a model has of another one, by the names of its weights.

    `whole` equal the source's. `rows` have some rows of the source, and how many. `left` lists the modules that have
    nothing of it, by the reason. `unused` lists the source's modules that have no place here.
    """

    whole: list[str] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    left: dict[str, list[str]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


@torch.no_grad()
def take(
    model: Transducer,
    source: Transducer,
    parts: Collection[str],
    rows: Mapping[str, Sequence[int]],
    barred: Mapping[str, str],
) -> Taken:
    """Copy weights and normalisation of `source` into `model`, and return what was taken.

    Arguments:
        parts: encoder, predictor and joint, or some of them. See `part_of`.
        rows: for each weight whose rows have a meaning of their own, the source's row of each row here, or -1.
        barred: {regular expression: reason}: modules that are not taken although they have the same shapes, because
            they mean something else.
    """
    own, theirs = model.state_dict(), source.state_dict()
    there = _by_module(theirs)
    taken = Taken()
    for module, names in _by_module(own).items():
        why = next((reason for pattern, reason in barred.items() if re.match(pattern, f"{module}.")), None)
        if part_of(module) not in parts:
            why = NOT_A_PART
        elif module not in there:
            why = ABSENT
        elif why is None and not _alike(own, theirs, names, there[module], rows):
            why = UNLIKE
        if why is not None:
            taken.left.setdefault(why, []).append(module)
            continue
        for name in names:
            if name in rows:
                index = torch.tensor(rows[name])
                known = index >= 0
                own[name][known] = theirs[name][index[known]]
                if not known.all():
                    taken.rows[name] = int(known.sum())
                    continue
            else:
                own[name].copy_(theirs[name])
            taken.whole.append(name)
    taken.unused = [m for m in there if m not in _by_module(own) and part_of(m) in parts]
    taken.left = {why: groups(some, _by_module(own)) for why, some in taken.left.items()}
    taken.unused = groups(taken.unused, there)
    return taken


def part_of(name: str) -> str:
    """Return the part that a weight belongs to: encoder, predictor, or joint, with all heads that score units."""
    head = name.partition(".")[0]
    return head if head in ("encoder", "predictor") else "joint"


def unit_rows(config: Config, bins: int, units: Units, source: Units) -> dict[str, list[int]]:
    """Return, for each weight with a row for each unit, the source's row of each unit, or -1.

    Blank and unknown are units of every vocabulary, whatever they are called.
    """
    number = {piece: k for k, piece in enumerate(source.pieces) if k > UNKNOWN}
    index = [BLANK, UNKNOWN, *(number.get(piece, -1) for piece in units.pieces[UNKNOWN + 1 :])]
    shallow = config.model_copy(update={"model": config.model.model_copy(update={"layers": 0})})
    few, more = (build_model(shallow, size, bins).state_dict() for size in (2, 3))
    return {name: index for name, value in few.items() if value.shape != more[name].shape}


def duration_rows(durations: Sequence[int], source: Sequence[int]) -> dict[str, list[int]]:
    """Return, for each weight with a row for each duration, the source's row of each duration, or -1."""
    index = [source.index(d) if d in source else -1 for d in durations]
    return {f"joint.durations.{name}": index for name in ("weight", "bias")}


def _by_module(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of weights by module. Each module is taken as a whole."""
    found: dict[str, list[str]] = {}
    for name in names:
        module = FRONT if name.startswith("encoder.feature_") else name.rpartition(".")[0]
        found.setdefault(module, []).append(name)
    return found


def _alike(
    own: Mapping[str, Tensor],
    theirs: Mapping[str, Tensor],
    names: Sequence[str],
    others: Sequence[str],
    rows: Mapping[str, Sequence[int]],
) -> bool:
    if set(names) != set(others):
        return False
    return all(own[n].shape[n in rows :] == theirs[n].shape[n in rows :] for n in names)


def groups(some: Collection[str], every: Collection[str]) -> list[str]:
    """Return modules in few words: a name stands for all modules of `every` below it, and 2-4 for three blocks."""
    chosen, found = set(some), []
    for module in some:
        parents = [module[: m.end()] for m in re.finditer(r"[^.]+", module)]
        whole = (p for p in parents if all(m in chosen for m in every if f"{m}.".startswith(f"{p}.")))
        found.append(next(whole))
    runs: dict[tuple[str, str], list[list[int]]] = {}
    shown: dict[str, tuple[str, str] | None] = {}
    for name in dict.fromkeys(found):
        numbered = _BLOCK.fullmatch(name)
        key = (numbered[1], numbered[3]) if numbered else None
        shown.setdefault("*".join(key) if key else name, key)
        if numbered and key:
            number, own = int(numbered[2]), runs.setdefault(key, [])
            if own and own[-1][1] == number - 1:
                own[-1][1] = number
            else:
                own.append([number, number])
    return [
        text
        for name, key in shown.items()
        for text in (
            [f"{key[0]}{a if a == b else f'{a}-{b}'}{key[1]}" for a, b in runs[key]] if key is not None else [name]
        )
    ]
