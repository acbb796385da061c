"""Task rewards: is the final answer of a response right? Host side, with the device waiting."""

from collections.abc import Sequence

import jax
import numpy as np

from opd_jax import sharding
from opd_jax.grading import Grader, Task


def reward_batch(
    mesh, tokenizer, grader: Grader, answers: Sequence[str | None], rollouts
) -> jax.Array:
    """Decodes and grades a batch of responses: reward_B on the mesh, NaN where there is no answer.

    1 for a right answer, else 0; an answer that cannot be graded within the grader's limits is not right.
    One host round trip: it waits for the sampler, and each process grades its own rows.

    Args:
      answers: the reference answers of this process's rows.
      rollouts: Rollouts on the mesh.
    """
    tokens_BL, mask_BT = sharding.local_rows((rollouts.tokens_BL, rollouts.mask_BT))
    response_BT = tokens_BL[:, -mask_BT.shape[1] :]
    graded = [b for b, answer in enumerate(answers) if answer is not None]
    texts = [tokenizer.decode(response_BT[b][mask_BT[b]], skip_special_tokens=True) for b in graded]
    verdicts = grader.grade([Task(text, answers[b]) for text, b in zip(texts, graded)])
    reward_B = np.full(len(answers), np.nan, np.float32)
    reward_B[graded] = [verdict.right for verdict in verdicts]
    return sharding.put_batch(mesh, reward_B)
