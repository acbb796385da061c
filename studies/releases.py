"""Where the rule lets go, beside the first wrong sentence: the sorting task's logged rollouts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

OFFSETS = range(-4, 5)
EXCHANGES = 200


def margins_around_errors(rows: Sequence[Mapping[str, Any]]) -> dict[int, tuple[float, float, int]]:
    """Offset from the first wrong sentence -> (mean M there, mean M of right responses there, responses).

    The right responses' mean is over the sentences with the same number, weighted as the wrong ones have
    them, so that a change of M along any response does not look like one after an error.
    """
    right: dict[int, list[float]] = {}
    for row in rows:
        if row["first_error"] is None:
            for number, margin in enumerate(row["margins"]):
                right.setdefault(number, []).append(margin)
    found = {}
    for offset in OFFSETS:
        pairs = []
        for row in rows:
            number = (row["first_error"] if row["first_error"] is not None else -99) + offset
            if 0 <= number < len(row["margins"]) and number in right:
                pairs.append((row["margins"][number], np.mean(right[number])))
        if pairs:
            wrong_mean, right_mean = np.mean(pairs, axis=0)
            found[offset] = float(wrong_mean), float(right_mean), len(pairs)
    return found


def margin_table(found) -> str:
    """`margins_around_errors` as Markdown."""
    lines = ["| sentences after the first wrong one | M, wrong | M, right | responses |", "|---|---|---|---|"]
    lines += [f"| {k:+d} | {wrong:.2f} | {right:.2f} | {n} |" for k, (wrong, right, n) in found.items()]
    return "\n".join(lines)


def summary(rows) -> str:
    """What the rollouts say of releases and errors, in one line."""
    wrong = [row for row in rows if row["first_error"] is not None]
    released = [row for row in wrong if row["accepted"]]
    both = np.array([row["kept"] - row["first_error"] for row in released])
    parts = [f"{len(rows)} rollouts, {len(wrong)} with an error"]
    parts += [f"released {name}: {share:.0%}" for name, (share, _) in shares(rows).items()]
    if released:
        parts.append(
            f"first released minus first wrong sentence: median {np.median(both):+.0f}, "
            f"from {np.percentile(both, 25):+.0f} to {np.percentile(both, 75):+.0f} (quartiles)"
        )
        at, far = np.mean(both == 0), np.mean(np.abs(both))
        (at_chance, at_p), (far_chance, far_p) = by_chance(released)
        parts.append(
            f"released from the first wrong sentence on: {at:.0%}, {at_chance:.0%} by chance, p {at_p:.3f}; "
            f"mean distance {far:.2f} sentences, {far_chance:.2f} by chance, p {far_p:.3f} (release points "
            f"of these {len(released)} responses exchanged between those of as many sentences, {EXCHANGES} "
            "draws; p one-sided)"
        )
    return "; ".join(parts)


def margin_figure(figure, found) -> None:
    """`margins_around_errors` as two lines."""
    axes = figure.subplots()
    offsets = list(found)
    axes.plot(offsets, [found[k][0] for k in offsets], marker="o", label="responses with an error")
    label = "right responses, same sentence numbers"
    axes.plot(offsets, [found[k][1] for k in offsets], marker="s", label=label)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="place, sentences after the first wrong one", ylabel="teacher margin M, nats")
    axes.set_xticks(offsets)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1))


def shares(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, list[float]]]:
    """Kind of response -> (share of them in which a release is accepted, the same of each seed)."""
    kinds = {
        "with an error": [row for row in rows if row["first_error"] is not None],
        "without": [row for row in rows if row["first_error"] is None],
    }
    found = {}
    for name, part in kinds.items():
        if part:
            seeds = sorted({row["seed"] for row in part})
            of_seed = [np.mean([row["accepted"] for row in part if row["seed"] == seed]) for seed in seeds]
            found[name] = float(np.mean([row["accepted"] for row in part])), of_seed
    return found


def shares_figure(figure, found) -> None:
    """`shares` as bars, and a dot a seed."""
    axes = figure.subplots()
    for at, (share, of_seed) in enumerate(found.values()):
        axes.bar(at, share, width=0.5, color="#0072B2", label="all seeds" if at == 0 else None)
        axes.plot([at] * len(of_seed), of_seed, "o", color="black", label="each seed" if at == 0 else None)
    axes.set_xticks(range(len(found)), list(found))
    axes.set(xlabel="responses", ylabel="share with an accepted release", ylim=(0, None))
    axes.grid(False, axis="x")
    axes.legend(frameon=False)


def release_figure(figure, released) -> None:
    """How far the releases of responses with an error are from it, as released and by chance."""
    axes = figure.subplots()
    distance = np.array([row["kept"] - row["first_error"] for row in released])
    chance = _exchanged(released)
    edges = np.arange(min(distance.min(), chance.min()) - 0.5, max(distance.max(), chance.max()) + 1)
    axes.hist(distance, bins=edges, edgecolor="white", label="as released")
    share = np.histogram(chance, edges)[0] / EXCHANGES
    axes.stairs(share, edges, color="black", linewidth=1.4, label="release points exchanged")
    axes.set(xlabel="first released sentence minus first wrong one, sentences", ylabel="responses")
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)


def by_chance(rows) -> tuple[tuple[float, float], tuple[float, float]]:
    """(mean over `_exchanged` draws, p) of the share of releases at the first error and of the mean distance.

    p: the share of draws, the releases as they are counted among them, that are as near to the errors.
    """
    shares_N, distances_N = _nearness(_exchanged(rows))
    share, distance = _nearness(np.array([row["kept"] - row["first_error"] for row in rows]))
    near = shares_N >= share - 1e-9, distances_N <= distance + 1e-9  # sums in another order are as near
    p_share, p_distance = (float((1 + part.sum()) / (1 + EXCHANGES)) for part in near)
    return (float(shares_N.mean()), p_share), (float(distances_N.mean()), p_distance)


def _nearness(offsets) -> tuple[np.ndarray, np.ndarray]:
    """(share that are 0, mean magnitude) over the last axis."""
    return np.mean(offsets == 0, axis=-1), np.mean(np.abs(offsets), axis=-1)


def _exchanged(rows) -> np.ndarray:
    """First released less first wrong sentence [EXCHANGES, rows], with release points permuted, fixed seed.

    Release points move between responses of as many sentences only.
    """
    rng = np.random.default_rng(0)
    found = []
    for sentences in {row["sentences"] for row in rows}:
        same = [row for row in rows if row["sentences"] == sentences]
        kept, error = (np.array([row[key] for row in same]) for key in ("kept", "first_error"))
        found.append([rng.permutation(kept) - error for _ in range(EXCHANGES)])
    return np.concatenate(found, axis=1)
