"""Rollouts as HTML. Each sentence is coloured by its supervision; all text is escaped."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

SHOWN = {"latest": 4, "earliest": 2}  # rollouts of the last and the first recorded step of a run


def supervised(sentence: Mapping[str, Any]) -> str:
    """A sentence's supervision: "kept", "partly" (a cut inside it, or single tokens), or "released"."""
    whole = sentence["tokens"]
    kept = sentence.get("kept_tokens", whole if sentence["kept"] else 0)
    return "kept" if kept == whole else "partly" if kept else "released"


def articles(rollouts: Sequence[Mapping[str, Any]]) -> str:
    """Some of the rollouts, one article each; "" without rollouts."""
    return "".join(_rollout(rollout) for rollout in _choose(rollouts))


def _choose(rollouts: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Some rollouts of the latest step and of the earliest, those with a release first."""
    steps = sorted({rollout["step"] for rollout in rollouts})
    latest_earliest = dict.fromkeys([*steps[-1:], *steps[:1]])
    for step, count in zip(latest_earliest, SHOWN.values(), strict=False):
        at_step = [rollout for rollout in rollouts if rollout["step"] == step]
        yield from sorted(at_step, key=lambda rollout: not rollout["accepted"])[:count]


def _ending(rollout: Mapping[str, Any]) -> str:
    if rollout.get("stopped"):
        return "stopped"
    return "finished" if rollout["finished"] else "cut at the length limit"


def _rollout(rollout: Mapping[str, Any]) -> str:
    sentences = [s for s in rollout["sentences"] if s["text"]]
    gain = f", BIC gain {rollout['gain']:.1f}" if rollout.get("gain") is not None else ""
    facts = [
        f"step {rollout['step']}",
        f"{rollout['kept_tokens']} of {rollout['tokens']} tokens supervised",
        f"release accepted{gain}" if rollout["accepted"] else "no release",
        _ending(rollout),
    ]
    top = max((s["contrast"] or 0.0 for s in sentences), default=0.0) or 1.0
    bars, text = [], []
    for before, sentence in zip([None, *sentences], sentences, strict=False):
        kind = supervised(sentence)
        margin, advantage = (
            "–" if sentence[key] is None else f"{sentence[key]:.2f}" for key in ("contrast", "advantage")
        )
        height = 8 + 92 * (sentence["contrast"] or 0.0) / top
        size = f"flex:{sentence['tokens']};height:{height:.0f}%"
        bars.append(f'<i class="{kind}" style="{size}"></i>')
        if before is not None and supervised(before) != "released" and kind == "released":
            text.append('<b class="cut" title="supervision ends here"></b>')
        body = sentence["text"].rstrip()
        tail = sentence["text"][len(body) :]
        hint = f"M {margin}, A {advantage} nats/token, {sentence['tokens']} tokens"
        if kind == "partly":
            hint += f", {sentence['kept_tokens']} of them supervised"
        span = f'<span class="{kind}" title="{hint}">{escape(body)}</span>'
        text.append(f"{span}<sub>{margin}</sub>{tail or ' '}")
    return (
        f'<article><p class="prompt">{escape(rollout["prompt"])}</p><p class="facts">'
        f'{" · ".join(facts)}</p><div class="strip">{"".join(bars)}</div>'
        f'<p class="response">{"".join(text)}</p></article>'
    )
