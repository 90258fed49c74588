"""Merge the series onto a commit of upstream: the state of each patch there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dinocell.upstream.git import Commit, Scratch, ThreeSides
from dinocell.upstream.placement import additions_in, misplaced
from dinocell.upstream.series import Addition, Patch, Series


@dataclass(frozen=True)
class Outcome:
    """One patch on one commit."""

    name: str
    # "clean" (upstream's files are those of the pin, or all lines are at their numbers), "offset"
    # (merged at other lines), "there" (the commit already has it), "conflict"
    state: str
    # by path and function, how far each addition moved, in lines
    offsets: Mapping[str, int] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()  # of a conflict, one sentence each
    # of a conflict, by path, upstream's lines and ours
    sides: Mapping[str, tuple[ThreeSides, ...]] = field(default_factory=dict)
    # of a patch that applies, by path, its additions numbered on the commit's files
    places: Mapping[str, tuple[Addition, ...]] = field(default_factory=dict)

    @property
    def applies(self) -> bool:
        return self.state != "conflict"


@dataclass(frozen=True)
class Merged:
    """The whole series on one commit."""

    commit: Commit
    outcomes: tuple[Outcome, ...]  # one a patch, in the order of the series
    texts: Mapping[str, bytes]  # path → contents of the patched files, if everything applies
    bases: Mapping[str, bytes]  # path → contents of these files in the commit

    @property
    def applies(self) -> bool:
        return all(outcome.applies for outcome in self.outcomes)


def merge_patch(scratch: Scratch, commit: Commit, patch: Patch, pin_commit: str = "") -> Outcome:
    """One patch alone on a commit; files that were renamed since `pin_commit` are named."""
    entries = scratch.entries(commit.id, sorted(patch.additions))
    reasons = []
    for path in patch.additions:
        if path not in entries:
            new = scratch.renamed(pin_commit, commit.id, path) if pin_commit else ""
            moved = f"it is {new} now: change 'Hook:' and the paths of the patch"
            now = moved if new else "it is gone"
            reasons.append(f"{path} must exist, got a commit without it; {now}")
    if reasons:
        return _conflict(patch, reasons)
    texts = {path: scratch.read(entries[path]) for path in patch.additions}
    present = _places(texts, patch)
    if any(present.values()):
        if trouble := _trouble(texts, patch):
            return _conflict(patch, ["the commit has a part of it, or in another form", *trouble])
        return Outcome(patch.name, "there", places=present)
    for path, base in patch.bases.items():
        if entries[path] != base and not scratch.has(base):
            reasons.append(
                f"the checkout must hold what {path} was when the patch was made, got a repository "
                f"without blob {base[:12]}: git fetch origin {pin_commit or 'the commit in UPSTREAM'}"
            )
    if reasons:
        return _conflict(patch, reasons)
    scratch.begin(commit.id)
    if not scratch.apply(patch.text):
        sides = {path: tuple(scratch.sides(path)) for path in patch.additions}
        functions = ", ".join(sorted({hook.function for hook in patch.hooks}))
        reasons = [
            f"{path}:{side.line} upstream changed the place of the addition ({functions})"
            for path, found in sides.items()
            for side in found
        ]
        sides = {path: found for path, found in sides.items() if found}
        return _conflict(patch, reasons or ["git could not merge it"], sides)
    merged = {path: scratch.staged(path) or b"" for path in patch.additions}
    if trouble := _trouble(merged, patch):
        return _conflict(patch, trouble)
    places = _places(merged, patch)
    offsets = {
        f"{path} {hook.function}": new.after - old.after
        for path, items in patch.additions.items()
        for hook, old, new in zip(patch.hooks_of(path), items, places[path], strict=True)
        if new.after != old.after
    }
    return Outcome(patch.name, "offset" if offsets else "clean", offsets=offsets, places=places)


def merge_series(scratch: Scratch, commit: Commit, series: Series) -> Merged:
    """Each patch alone, then all of them one after the other."""
    outcomes = [merge_patch(scratch, commit, p, series.pin.commit) for p in series.patches]
    entries = scratch.entries(commit.id, series.paths)
    bases = {path: scratch.read(blob) for path, blob in entries.items()}
    if not all(outcome.applies for outcome in outcomes):
        return Merged(commit, tuple(outcomes), {}, bases)
    scratch.begin(commit.id)
    for number, (patch, outcome) in enumerate(zip(series.patches, outcomes, strict=True)):
        if outcome.state == "there":
            continue
        if not scratch.apply(patch.text):
            reason = "it applies alone, but not after the patches before it"
            outcomes[number] = _conflict(patch, [reason])
            return Merged(commit, tuple(outcomes), {}, bases)
    texts = {path: scratch.staged(path) or b"" for path in series.paths}
    for path, text in texts.items():
        trouble = misplaced(text.decode("utf-8", "replace"), path, series.patches)
        for number, patch in enumerate(series.patches):
            if patch.name in trouble:
                outcomes[number] = _conflict(patch, trouble[patch.name])
    return Merged(commit, tuple(outcomes), texts, bases)


def _conflict(
    patch: Patch, reasons: Sequence[str], sides: Mapping[str, tuple[ThreeSides, ...]] | None = None
) -> Outcome:
    return Outcome(patch.name, "conflict", reasons=tuple(reasons), sides=sides or {})


def _trouble(texts: Mapping[str, bytes], patch: Patch) -> list[str]:
    found = (misplaced(text.decode("utf-8", "replace"), p, [patch]) for p, text in texts.items())
    return [sentence for faults in found for sentence in faults.get(patch.name, ())]


def _places(texts: Mapping[str, bytes], patch: Patch) -> dict[str, tuple[Addition, ...]]:
    return {
        path: tuple(additions_in(text.decode("utf-8", "replace")).get(patch.name, []))
        for path, text in texts.items()
    }
