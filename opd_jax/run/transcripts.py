"""Rollouts as text, sentence by sentence, for rollouts.jsonl; host side."""

from collections.abc import Sequence

import numpy as np


def records(
    tokenizer, step: int, rollouts, supervision, right: Sequence[bool | None] | None = None
) -> list[dict]:
    """One record a rollout, as rollouts.jsonl holds them.

    Args:
      tokenizer: decodes the ids.
      step: the step they were written in.
      rollouts, supervision: Rollouts and Supervision with NumPy arrays.
      right: whether the final answer of each is right, None for one that has no reference; absent from the
        records if not given.
    """
    scores, release = supervision.scores, supervision.release
    prompt_width = rollouts.prompt_mask_BP.shape[1]
    records = []
    for b in range(rollouts.tokens_BL.shape[0]):
        prompt_P, response_T = np.split(rollouts.tokens_BL[b], [prompt_width])
        sentences = []
        for number in range(int(release.segment_BT[b].max(initial=-1)) + 1):
            here_T = release.segment_BT[b] == number
            sentences.append(
                {
                    "text": tokenizer.decode(response_T[here_T]),
                    "tokens": int(here_T.sum()),
                    "kept": bool(release.mask_BT[b][here_T].all()),
                    "kept_tokens": int(release.mask_BT[b][here_T].sum()),
                    "contrast": float(scores.contrast_BT[b][here_T].mean()),
                    "advantage": float(scores.advantage_BT[b][here_T].mean()),
                    "advantage_std": float(scores.advantage_BT[b][here_T].std()),
                }
            )
        records.append(
            {
                "step": step,
                "prompt": tokenizer.decode(prompt_P[rollouts.prompt_mask_BP[b]]),
                "finished": bool(rollouts.finished_B[b]),
                "accepted": bool(release.accepted_B[b]),
                "gain": float(release.gain_B[b]),
                "kept_tokens": int(release.kept_B[b]),
                "tokens": int(rollouts.mask_BT[b].sum()),
                "sentences": sentences,
            }
            | _stops(rollouts.stops, b)
            | ({} if right is None else {"right": right[b]})
        )
    return records


def _stops(stops, b: int) -> dict:
    """What a record says of release.stop; nothing where no row can stop."""
    if stops is None:
        return {}
    return {
        "stopped": bool(stops.stopped_B[b]),
        "audit": bool(stops.audit_B[b]),
        "certain_tokens": int(stops.certain_B[b]),
    }
