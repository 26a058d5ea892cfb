"""From files to what is scored: hypotheses and their references, normalised alike, each in its best reading.

Guarantees: the figures depend on the words of the files, never on their formats.
Try: `stillhouse score HYP.trn --corpus corpus.jsonl`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...data.errors import CorpusError, first_few
from ...data.manifest import read_manifest
from .formats import read_file
from .networks import HESITATION, OPTIONAL, best_reading, parse_network
from .normal import AUTO, normaliser, one_sided, resolve_transform, without_notation
from .references import Pair, Paired, manifest_references, pair_lines, pair_own, read_pair


@dataclass(frozen=True)
class Scored:
    """(id, reference, hypothesis) of each utterance, the ids without a hypothesis, and notes for the user.

    `written` are the references as they are in their file, with all alternatives.
    """

    triples: list[tuple[str, str, str]]
    written: list[str]
    missing: list[str]
    notes: list[str]


class Scoring:
    """References, and how hypotheses are compared with them.

    Arguments:
        transform: see `resolve_transform`, or "auto": what `one_sided` finds, for references out of another file.
        corpus: the manifest of the references, or None.
        reference: another file of references, or None. Without both, the hypotheses bring their own.
        pairing: see `read_pair`.
        split: the splits of the corpus to score, or None for those that have a hypothesis.
        allow_missing: references without a hypothesis are left out. Otherwise they count as deleted.
    """

    def __init__(
        self,
        transform: str = "auto",
        corpus: Path | None = None,
        reference: Path | None = None,
        pairing: str | None = None,
        split: str | None = None,
        allow_missing: bool = False,
    ) -> None:
        self.transform, self.reference, self.pairing = transform, reference, pairing
        self.split, self.allow_missing = split, allow_missing
        self.manifest = read_manifest(corpus) if corpus is not None else None
        self.selected = self.manifest.select(split) if self.manifest is not None else None
        self.applied = ""  # the transforms of the first file, which the others get too

    def read(self, path: Path) -> Scored:
        """Return what is scored of a file of hypotheses. Raises CorpusError if it does not fit the references."""
        paired = self._pair(path)
        chosen = paired.pairs
        missing = [line.id for line in paired.missing]
        if missing:
            verb = "are left out" if self.allow_missing else "count as deleted"
            remedy = "" if self.allow_missing else ". Leave them out with --allow-missing"
            total = len(chosen) + len(missing)
            paired.notes.append(
                f"{path}: {len(missing)} of {total} utterances have no hypothesis and {verb}: "
                f"{first_few(missing)}{remedy}"
            )
            if not self.allow_missing:
                chosen = [*chosen, *(Pair(line, "") for line in paired.missing)]
        if not any(pair.reference.text.split() for pair in chosen):
            raise CorpusError("no reference has a word", where=path, expected="transcripts to compare with")
        if not self.applied:
            self._choose_transform(chosen, paired.notes)
        written = [pair.reference.text for pair in chosen]
        return Scored([self._reading(pair) for pair in chosen], written, missing, paired.notes)

    def _choose_transform(self, pairs: list[Pair], notes: list[str]) -> None:
        """Set `applied`. References beside hypotheses were spelled by the decoder, so that they stay as they are."""
        if self.transform != AUTO:
            self.applied = resolve_transform(self.transform)
            return
        # In all formats, so that one decode gets one transform.
        refs = [without_notation(pair.reference.text) for pair in pairs]
        hyps = [without_notation(pair.hypothesis) for pair in pairs]
        found = one_sided(refs, hyps)
        own = all(pair.own for pair in pairs if pair.reference.text)
        self.applied = "none" if own else found
        if found != "none":
            names = [name for step, name in (("lower", "case"), ("no_punct", "punctuation")) if step in found]
            what = f"the references and the hypotheses differ in {' and '.join(names)} throughout"
            if own:
                notes.append(f"{what}, and this counts as errors (drop it with --transform {found})")
            else:
                notes.append(f"{what}, and this is dropped (compare as written with --transform none)")

    def _reading(self, pair: Pair) -> tuple[str, str, str]:
        spell = normaliser(self.applied)
        ref, hyp = pair.reference.text, pair.hypothesis
        sides = ((ref, pair.reference.nist, OPTIONAL), (hyp, pair.nist, HESITATION))
        if any(nist and any(c in text for c in "{(@") for text, nist, _ in sides):
            networks = [parse_network(text, spell, optional if nist else None) for text, nist, optional in sides]
            if any(network.branches for network in networks):
                return pair.reference.id, *best_reading(*networks)
        return pair.reference.id, spell(ref), spell(hyp)

    def _pair(self, path: Path) -> Paired:
        if self.selected is not None and self.manifest is not None:
            lines = read_file(path)
            references = manifest_references(self.selected)
            if self.split is not None:
                kept = [line for line in lines if line.id not in self.manifest.by_id or line.id in self.selected.by_id]
                outside = len(lines) - len(kept)
                paired = pair_lines(kept, references, self.manifest.path)
                if outside:
                    paired.notes.append(f"{outside} hypotheses of other splits are left out")
            else:
                paired = self._in_touched_splits(pair_lines(lines, references, self.manifest.path))
            return self._with_audio(paired)
        if self.reference is not None:
            hyps, refs, how = read_pair(path, self.reference, self.pairing)
            paired = pair_lines(hyps, refs, self.reference)
            if how == "lines":
                paired.notes.append(f"{path} and {self.reference} are paired line by line (--pair ids pairs by ids)")
            return paired
        return pair_own(read_file(path))

    def _with_audio(self, paired: Paired) -> Paired:
        """Forget missing utterances that are text alone, beside others with audio: there was nothing to decode."""
        assert self.selected is not None
        own = self.selected.by_id
        if not any(u.audio is not None for u in own.values()):
            return paired  # Not even the audio of what was recognised is named.
        missing = [line for line in paired.missing if own[line.id].audio is not None]
        return Paired(paired.pairs, missing, paired.notes)

    def _in_touched_splits(self, paired: Paired) -> Paired:
        """Forget missing utterances of splits in which nothing was recognised: these were not to be decoded."""
        assert self.manifest is not None
        by_id = self.manifest.by_id
        touched = {by_id[pair.reference.id].split for pair in paired.pairs}
        missing = [line for line in paired.missing if by_id[line.id].split in touched]
        return Paired(paired.pairs, missing, paired.notes)
