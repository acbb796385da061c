"""Task rewards: is the final answer of a response right? Runs on the host while the device waits."""

import re
from collections.abc import Sequence

import jax
import numpy as np

from opd_jax.evaluation.grading import Grader, Task
from opd_jax.parallel import distributed, sharding

THOUGHT_BEGUN = re.compile(r"<(?:think|thinking|thought|reasoning)>\s*$")
TAG_TOKENS = 16  # more than such a tag has


def reward_batch(mesh, tokenizer, grader: Grader, answers: Sequence[str | None], rollouts) -> jax.Array:
    """Decodes and grades a batch of responses. Returns reward_B on the mesh.

    The reward is 1 for a right answer and 0 otherwise, NaN without a reference answer. An answer that cannot
    be graded within the grader's limits is not right. This waits for the sampler, and each process grades its
    own rows. If several processes hold a row, it is right if one of them finds it right in time.

    Args:
      answers: the reference answers of this process's rows.
      rollouts: Rollouts on the mesh.
    """
    tokens_BL, mask_BT = sharding.local_values((rollouts.tokens_BL, rollouts.mask_BT))
    verdicts = graded(tokenizer, grader, answers, tokens_BL, mask_BT)
    rows = sharding.local_rows(mesh, len(rollouts.mask_BT))
    right_B = np.full(len(rollouts.mask_BT), -1, np.int32)
    right_B[rows] = [-1 if right is None else right for right in verdicts]
    right_B = distributed.gathered(right_B).max(axis=0)[rows]
    return sharding.put_batch(mesh, np.where(right_B < 0, np.nan, right_B).astype(np.float32))


def graded(
    tokenizer, grader: Grader, answers: Sequence[str | None], tokens_BL: np.ndarray, mask_BT: np.ndarray
) -> list[bool | None]:
    """Whether each response is right; None without a reference answer.

    Args:
      tokens_BL: prompts and responses.
      mask_BT: response tokens.
    """
    prompt_BP, response_BT = np.split(tokens_BL, [-mask_BT.shape[1]], axis=1)
    right: list[bool | None] = [None] * len(answers)
    known = [(b, answer) for b, answer in enumerate(answers) if answer is not None]
    texts = [
        thought_begun(tokenizer, prompt_BP[b])
        + tokenizer.decode(response_BT[b][mask_BT[b]], skip_special_tokens=True)
        for b, _ in known
    ]
    verdicts = grader.grade([Task(text, answer) for text, (_, answer) in zip(texts, known)])
    for (b, _), verdict in zip(known, verdicts):
        right[b] = verdict.right
    return right


def thought_begun(tokenizer, ids: Sequence[int]) -> str:
    """The tag with which a prompt ends, if its template begins the response's thought; else ""."""
    found = THOUGHT_BEGUN.search(tokenizer.decode(list(ids[-TAG_TOKENS:])))
    return found[0] if found else ""
