"""Prompts become rollouts: a compiled sampler, its PRNG key and the devices that it runs on.

What the sampler does is in `distill/rollout.py`.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np

from opd_jax.data import Batching, PromptBatch
from opd_jax.distill import Rollouts
from opd_jax.models import ModelConfig
from opd_jax.parallel import sharding
from opd_jax.progress import Progress


@dataclasses.dataclass(frozen=True)
class Draw:
    """Draws responses to batches of prompts.

    Attributes:
      sample: compiled sample(params, tokens_QP, mask_QP, key, step, *reads) -> Rollouts.
      key: a PRNG key on the mesh. The draws follow from it and the number of the batch alone.
      mesh: the devices.
      name: what progress calls the sampler.
      reads: what it reads besides.
    """

    sample: Callable
    key: jax.Array
    mesh: jax.sharding.Mesh
    name: str = "the sampler"
    reads: tuple = ()

    def __call__(
        self, params: dict, local: PromptBatch, number: int | jax.Array, progress: Progress
    ) -> tuple[PromptBatch, Rollouts]:
        """(the batch of all processes on the mesh, its rollouts); does not wait for the devices.

        Args:
          params: of the model that writes.
          local: this process's rows of the batch.
          number: of the batch; a number on the host is copied to the devices.
        """
        batch = sharding.put_batch(self.mesh, local)
        if not isinstance(number, jax.Array):
            number = jax.device_put(np.int32(number), sharding.replicated(self.mesh))
        with progress.compiling(self.name, self.sample, local.tokens_BP.shape[1]):
            return batch, self.sample(params, batch.tokens_BP, batch.mask_BP, self.key, number, *self.reads)


def batching_of(config, mesh, model: ModelConfig) -> Batching:
    """The batches of rollout.batch prompts, or fewer, that evaluations and benchmarks ask a model."""
    batch = config.rollout.batch
    rows = sharding.local_rows(mesh, batch)
    least = math.lcm(config.train.micro_batch or batch, sharding.pieces(mesh))
    return Batching(batch, config.data.prompt_tokens, model.pad_id, rows, least=least)
