"""Alternatives in transcripts, by the rules of NIST's sclite: `{ a / b }` is a or b, and `@` is no word.

Guarantees: of all readings of a reference and a hypothesis, a pair with the fewest word errors is chosen. Of equally
good ones it is that with the alternatives that come first. A text without alternatives stays as it is. A word `(uh)` of
a reference is right where the hypothesis lacks it, as in `sclite -D`, so that all systems have as many reference words.
Try: `stillhouse score HYP.trn --reference REF.stm`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

EMPTY = "@"
TOKEN = re.compile(r"[{}]|[^\s{}]+")
OPTIONAL = re.compile(r"\([^\s()]+\)")  # NIST's mark for a word that may be missing, as in (uh)
NEVER = re.compile(r"(?!)")
HESITATION = re.compile(r"\(%[^\s()]+\)")

CONTEXT = 8  # words
ERROR, ABSENT = 1 << 20, 1  # costs of a reading. Of equal numbers of errors, that with the fewer absent words is best.


class Absent(str):
    """Optional words of a reference that the hypothesis lacks. They count as right, on both sides."""


Step = tuple[tuple[int, int], int, "str | None", "str | None"]  # from where, its cost, and the words of both sides
Edge = tuple[int, str | None]  # the node that it leaves, and its word, or None for no word


@dataclass
class Network:
    """All readings of a text: paths from the first node to the last. `edges[k]` lead into node k, from lower nodes."""

    edges: list[list[Edge]] = field(default_factory=lambda: [[]])
    branches: bool = False  # whether there is more than one reading

    def node(self, *edges: Edge) -> int:
        """Add a node behind the others and return its number."""
        self.edges.append(list(edges))
        return len(self.edges) - 1


def parse_network(text: str, spell: Callable[[str], str] = str, optional: re.Pattern[str] | None = OPTIONAL) -> Network:
    """Return the readings of a text, whose words `spell` normalises.

    `optional` matches words that may be missing: OPTIONAL in a reference, HESITATION in a hypothesis, where they do not
    count. A bare `@` is a word where the other text has it, and else none. With None, the text has one reading. Braces
    that do not match or hold no "/" are part of their words.
    """
    network = Network()
    if optional is None:
        tree: Tree = list(spell(text).split())
        spell, optional = str, NEVER
    else:
        tree, spell = _tree(text), _in_context(spell)
    last = _sequence(network, 0, tree, spell, optional)
    if last != len(network.edges) - 1:
        network.node((last, None))
    return network


def _in_context(spell: Callable[[str], str]) -> Callable[[str], str]:
    """Return what spells words one by one as `spell` does in a whole text. sentence_case looks at those before."""
    before: list[str] = []

    def spelled(word: str) -> str:
        left = " ".join(before[-CONTEXT:])
        before.append(word)
        return " ".join(spell(f"{left} {word}").split()[len(spell(left).split()) :])

    return spelled


def best_reading(reference: Network, hypothesis: Network) -> tuple[str, str]:
    """Return the readings of both texts that have the fewest word errors between them."""
    best: dict[tuple[int, int], Step] = {(0, 0): ((0, 0), 0, None, None)}
    for i, above in enumerate(reference.edges):
        for j, left in enumerate(hypothesis.edges):
            words = [(u, a) for u, a in above if a is not None and not isinstance(a, Absent)]
            steps: list[Step] = [((u, v), ERROR * (a != b), a, b) for u, a in words for v, b in left if b is not None]
            steps += [((u, j), _alone(a), a, a if isinstance(a, Absent) else None) for u, a in above]
            steps += [((i, v), _alone(b), None, b) for v, b in left]
            if steps:
                costs = [best[place][1] + cost for place, cost, _, _ in steps]
                cheapest = min(costs)
                place, _, a, b = steps[costs.index(cheapest)]
                best[i, j] = place, cheapest, a, b
    sides: tuple[list[str], list[str]] = [], []
    place = len(reference.edges) - 1, len(hypothesis.edges) - 1
    while place != (0, 0):
        place, _, *pair = best[place]
        for side, word in zip(sides, pair, strict=True):
            if word is not None:
                side.append(word)
    return " ".join(reversed(sides[0])), " ".join(reversed(sides[1]))


def _alone(word: str | None) -> int:
    """Return the cost of a word that stands on one side only."""
    return 0 if word is None else ABSENT if isinstance(word, Absent) else ERROR


Tree = list["str | list[Tree]"]


def _tree(text: str) -> Tree:
    """Return words and lists of alternatives. A text whose braces are no alternatives is its words."""
    if "{" not in text:
        return list(text.split())
    tokens = TOKEN.findall(re.sub(r"(?<=[^\s{}/])/(?=[^\s{}/]+\})", " / ", text))
    stack: list[list[Tree]] = [[[]]]  # of each open brace, its alternatives
    for token in tokens:
        if token == "{":
            stack.append([[]])
        elif token == "}" and len(stack) > 1 and len(stack[-1]) > 1:
            alternatives = stack.pop()
            stack[-1][-1].append(alternatives)
        elif token == "}":
            return list(text.split())
        elif token == "/" and len(stack) > 1:
            stack[-1].append([])
        else:
            stack[-1][-1].append(token)
    return stack[0][0] if len(stack) == 1 else list(text.split())


def _sequence(
    network: Network,
    at: int,
    tree: Tree,
    spell: Callable[[str], str],
    optional: re.Pattern[str],
    inside: bool = False,
) -> int:
    """Add the readings of `tree` behind node `at` and return the node where they end."""
    for item in tree:
        if isinstance(item, str) and not optional.fullmatch(item) and (inside or item != EMPTY or optional is NEVER):
            for word in [] if item == EMPTY and inside else spell(item).split():
                at = network.node((at, word))
            continue
        network.branches = True
        if isinstance(item, str):
            end, words = at, spell(item if item == EMPTY else item[1:-1])
            for word in words.split():
                end = network.node((end, word))
            absent = Absent(words) if optional is OPTIONAL and item != EMPTY else None
            at = network.node((end, None), (at, absent or None))
            continue
        ends = [_sequence(network, at, alternative, spell, optional, inside=True) for alternative in item]
        at = network.node(*((end, None) for end in ends))
    return at
