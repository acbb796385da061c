"""How much more a recipe's training step multiplies than the passes of its models need.

    python -m opd_jax.preflight.passes configs/small_pod.py configs/paper.py

The passes: the teacher forward; the student forward, its blocks again (rematerialised) and backward, and once
more forward where scoring recomputes it; attention causal. Traced for one described chip, so that the
TPU's attention counts; nothing is compiled.
"""

import sys

import jax

from opd_jax import config
from opd_jax.distill import train_step as training
from opd_jax.errors import UserError, fail
from opd_jax.preflight import costs, jaxprs, lengths, topology
from opd_jax.preflight import plan as preflight
from opd_jax.run import programs

CHIP = "v5p:1x1x1"


def ratio(plan: programs.Programs) -> float:
    """FLOPs of train_step's matrix products over those of the passes."""
    c = plan.config
    models = (plan.student, plan.teacher)
    experts = [(m.width, m.ffn, m.experts) for m in models if m.experts]
    traced = plan.train_step.trace(plan.abstract_state(), plan.abstract_inputs())
    sizes = c.rollout.batch, c.data.prompt_tokens, c.rollout.max_tokens
    flops = costs.phase_flops(*models, *sizes)
    head = 2 * plan.student.vocab_size * plan.student.width * c.rollout.max_tokens * c.rollout.batch
    passes = flops["score"] + flops["update"] * (4 + training.recomputes(c)) / 3 - head
    rounds = lengths.training_rounds(c, lengths.full(c), 2, training.recomputes(c))
    return jaxprs.matmul_flops(traced.jaxpr.jaxpr, rounds, experts, plan.mesh.shape["tensor"]) / passes


def main(paths):
    jax.config.update("jax_platforms", "cpu")
    if not paths:
        raise UserError("give files of configs/, such as configs/small_pod.py")
    devices = topology.describe(CHIP)[1]
    for path in paths:
        recipe = config.load(path)
        recipe.mesh.preset, recipe.mesh.tensor = "one_chip", 0
        print(f"{path:<28} {ratio(preflight.plan(recipe, devices)):.3f}", flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        fail(error)
