"""The table of the comparison: means, and differences paired by unit with intervals and a test."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from data import GENERATED
from numpy.typing import NDArray

SMALLEST_EFFECT = 0.05  # of the AUC on other channels; fixed before the first run
TRAINED_ARMS = 7  # of run.py
BASES = ("random", "average", "average_cls", "shuffled")
_DRAWS = 10_000


def summary(
    scores: list[dict[str, Any]], steps: int, start: str | None = None, generated: int = GENERATED
) -> dict[str, Any]:
    """Everything for the file of results; `scores` are the rows of finished runs of so many `steps`."""
    from measure import processor_name

    arms = list(dict.fromkeys(row["arm"] for row in scores))
    by_arm = {arm: [row for row in scores if row["arm"] == arm] for arm in arms}
    trained = [row for row in scores if row["arm"] != "random"]
    seeds = sorted({row["seed"] for row in trained}) or [0]
    which = f"--seeds {len(seeds)}" if seeds == list(range(len(seeds))) else ""
    which = which or " and ".join(f"--seed {seed}" for seed in seeds)
    only = {row["arm"] for row in trained}
    return {
        "command": f"python benchmarks/ssl_proof/run.py --steps {steps} {which}"
        + (f" --start {start}" if start else "")
        + (f" --generated {generated}" if generated != GENERATED else "")
        + "".join(f" --only {arm}" for arm in arms if arm in only and len(only) < TRAINED_ARMS),
        "processor": processor_name(),
        "smallest_effect": SMALLEST_EFFECT,
        "arms": {arm: _arm(rows, by_arm) for arm, rows in by_arm.items()},
        "runs": _rounded(scores),
    }


def _rounded(value: Any) -> Any:
    """Floats of containers with four digits."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 4) if isinstance(value, float) else value


def _arm(rows: list[dict[str, Any]], by_arm: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    found: dict[str, Any] = {"seeds": [row["seed"] for row in rows]}
    for domain in dict.fromkeys(name for row in rows for name in row["probe"]):
        ours = [row for row in rows if domain in row["probe"]]
        same, other = _same_and_other(ours, domain)
        part: dict[str, Any] = {"same": float(same.mean()), "other": float(other.mean())}
        part["other_by_seed"] = other.mean(axis=1).tolist()
        for base in BASES:
            seeds = {row["seed"] for row in ours}
            theirs = [
                row
                for row in by_arm.get(base, [])
                if domain in row["probe"] and row["seed"] in seeds
            ]
            if theirs and by_arm[base] is not rows:
                for kind, index in (("same", 0), ("other", 1)):
                    pair = (
                        {r["seed"]: values for r, values in zip(x, table, strict=True)}
                        for x, table in (
                            (ours, _same_and_other(ours, domain)[index]),
                            (theirs, _same_and_other(theirs, domain)[index]),
                        )
                    )
                    part[f"{kind}_minus_{base}"] = _difference(*pair)
        found[domain] = part
    for section in ("decoder", "decoder_five"):
        made = [row[section] for row in rows if row.get(section)]
        for start in made[0] if made else ():
            own = [table[start][start] for table in made]
            others = [[ap for name, ap in table[start].items() if name != start] for table in made]
            found[f"{section}_{start}"] = {
                "same": _seeds(own),
                "other": _seeds([np.mean(row) for row in others]),
                "spread_over_channels": _seeds([np.std(row, ddof=1) for row in others]),
                "by_channel": {
                    name: float(np.mean([t[start][name] for t in made])) for name in made[0][start]
                },
            }
    for share in rows[0]["labels"]:
        found[f"labels_{share}"] = _seeds([row["labels"][share] for row in rows])
    seen = [row for row in rows if row.get("views")]
    if seen:
        bases = {
            base: [row for row in by_arm.get(base, []) if row.get("views")]
            for base in BASES
            if by_arm.get(base) is not rows
        }
        found["views"] = {
            domain: {
                kind: _views(seen, bases, domain, kind)
                for kind, numbers in kinds.items()
                if isinstance(numbers, dict)
            }
            for domain, kinds in seen[0]["views"].items()
        }
    return found


def _views(
    rows: list[dict[str, Any]], bases: dict[str, list[dict[str, Any]]], domain: str, kind: str
) -> dict[str, Any]:
    """Means over seeds and fields, and differences of the retrievals paired by field."""

    def values(which: list[dict[str, Any]], name: str) -> dict[int, NDArray[np.float64]]:
        return {row["seed"]: np.array(row["views"][domain][kind][name]) for row in which}

    found: dict[str, Any] = {}
    for name in rows[0]["views"][domain][kind]:
        ours = values(rows, name)
        found[name] = float(np.mean(list(ours.values())))
        if name.startswith("retrieval"):
            for base, others in bases.items():
                theirs = values(others, name)
                if ours.keys() & theirs.keys():
                    found[f"{name}_minus_{base}"] = _difference(ours, theirs)
    return found


def _difference(
    ours: dict[int, NDArray[np.float64]], theirs: dict[int, NDArray[np.float64]]
) -> dict[str, Any]:
    """Of numbers of units by seed: seeds that both have, averaged first, then `_paired`."""
    seeds = sorted(ours.keys() & theirs.keys())
    gain = np.array([ours[seed] - theirs[seed] for seed in seeds])  # [seeds, units]
    return {**_paired(gain.mean(axis=0)), "by_seed": gain.mean(axis=1).tolist()}


def _same_and_other(
    rows: list[dict[str, Any]], domain: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[seeds, units] AUC on the channel of the probe, and mean over all other channels."""
    tables = []
    for row in rows:
        table = row["probe"][domain]
        tables.append([[table[start][to] for to in table] for start in table])
    values = np.array(tables)  # [seeds, from, to, units]
    eye = np.eye(values.shape[1], dtype=bool)
    return values[:, eye].mean(axis=1), values[:, ~eye].mean(axis=1)


def _seeds(values: list[Any]) -> dict[str, Any]:
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": spread, "by_seed": [float(v) for v in values]}


def _paired(gain: NDArray[np.float64]) -> dict[str, float]:
    """Mean difference of units, 95 % interval (units drawn again), p of a sign-flip test."""
    rng = np.random.default_rng(0)
    drawn = gain[rng.integers(0, len(gain), (_DRAWS, len(gain)))].mean(axis=1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    every = len(gain) <= 13  # all signs are few enough
    signs = (
        np.array(list(product([-1.0, 1.0], repeat=len(gain))))
        if every
        else rng.choice([-1.0, 1.0], (_DRAWS, len(gain)))
    )
    extreme = np.abs((signs * gain).mean(axis=1)) >= abs(gain.mean()) - 1e-12
    p = extreme.mean() if every else (1 + extreme.sum()) / (1 + _DRAWS)
    return {"mean": float(gain.mean()), "low": float(low), "high": float(high), "p": float(p)}


def table(result: dict[str, Any]) -> list[str]:
    """Lines for the terminal."""
    from dinocell.results.table import align_columns

    arms = result["arms"]
    if not arms:
        return ["no run is finished"]
    every: dict[str, None] = {}  # domains, of arms that lack read-outs, too
    for found in arms.values():
        every |= {
            n: None for n, part in found.items() if isinstance(part, dict) and "other" in part
        }
    domains = [name for name in every if not name.startswith("decoder_")]
    labels = [name for name in next(iter(arms.values())) if name.startswith("labels_")]
    head = ["arm", "seeds"]
    for name in domains:
        head += [f"{name} same", "other"]
    rows = [[*head, *labels]]
    for arm, found in arms.items():
        row = [arm, str(len(found["seeds"]))]
        for name in domains:
            row += [
                f"{found[name][kind]:.3f}" if name in found else "" for kind in ("same", "other")
            ]
        rows.append([*row, *(f"{found[name]['mean']:.3f}" for name in labels)])
    lines = align_columns(rows)
    for arm, found in arms.items():
        for domain in domains:
            for base in BASES:
                gain = found.get(domain, {}).get(f"other_minus_{base}")
                if gain:
                    lines.append(
                        f"{arm} - {base}, {domain}, other channels: {gain['mean']:+.3f} "
                        f"({gain['low']:+.3f} to {gain['high']:+.3f}), p {gain['p']:.4f}"
                    )
    return lines
