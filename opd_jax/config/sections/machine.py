"""Fields of the devices, evaluations, checkpoints and records."""

from opd_jax.declare import Field, listed_in

LAYOUTS = "opd_jax.parallel.layouts"
AXIS = """Devices along the axis `{}`. 0 takes the preset's number. -1, on one axis at most, takes the devices
        that are left. {}"""

FIELDS = {
    "mesh.preset": Field(
        "slices",
        """A mesh by name, as sizes of data x fsdp x tensor.

        - `one_chip`: 1 x 1 x 1.
        - `one_host`: 1 x all x 1, the chips of one host.
        - `slice`: 1 x all x 1, the chips of one slice.
        - `slices`: slices x rest x 1, several slices. Only `data` crosses between them. Also right for
          one.
        - `replicas`: all x 1 x 1. Every device holds whole models: the least traffic if they fit.""",
        allowed=listed_in(LAYOUTS, "MESHES"),
    ),
    "mesh.data": Field(0, AXIS.format("data", "The batch is cut over `data` and `fsdp`.")),
    "mesh.fsdp": Field(0, AXIS.format("fsdp", "Weights are cut over `fsdp` by width.")),
    "mesh.tensor": Field(
        0,
        AXIS.format(
            "tensor",
            """Weights are cut over `tensor` by heads, ffn and vocabulary. Raise it if there are fewer
            rollouts than devices, or if a weight must be cut further.""",
        ),
    ),
    "sharding.student": Field(
        "fsdp",
        """How the student's weights, gradients and moments are cut. The tables are in
        `opd_jax/parallel/layouts.py`.

        - `fsdp`: width over `fsdp`; heads, ffn, vocabulary and experts over `tensor`. The weights of a
          block are gathered over `fsdp` when the block runs.
        - `tensor`: over `tensor` alone. Nothing is gathered, and a device holds `fsdp` times as much.
        - `whole`: every device holds all weights.""",
        allowed=listed_in(LAYOUTS, "WEIGHTS"),
    ),
    "sharding.teacher": Field(
        "fsdp",
        "How the teacher's weights are cut; same choices as `sharding.student`.",
        allowed=listed_in(LAYOUTS, "WEIGHTS"),
    ),
    "sharding.cache": Field(
        "heads",
        """How keys and values are cut over `tensor` while responses are written. `heads` cuts by key heads.
        `slots` cuts by positions, for a `mesh.tensor` that does not divide the key heads; each decode step
        then sums over `tensor`. Rows always stay with their rollouts.""",
        allowed=listed_in(LAYOUTS, "CACHE"),
    ),
    "sharding.batch": Field(
        "rows",
        """How activations are cut. `rows` cuts the batch over `data` and `fsdp`. `positions` also cuts them
        over `tensor` by position between the blocks. That divides what `train.remat=full` keeps by
        `mesh.tensor`, and costs a gather and a scatter in every block.""",
        allowed=listed_in(LAYOUTS, "BATCH"),
    ),
    "compile.cache": Field(
        "auto",
        """Folder where compiled programs are kept for the next start. `off` keeps none. `auto` is
        `$JAX_COMPILATION_CACHE_DIR` if it is set; else `~/.cache/opd_jax/compiled` on TPU and GPU, and off
        on CPU.""",
    ),
    "eval.every": Field(
        10,
        """Steps between evaluations on the held-out prompts, `rollout.batch` at a time. The first is before
        training, the last after it. 0 is off.""",
        least=0,
    ),
    "eval.benchmark": Field(
        (),
        """Benchmarks that are answered and graded during training with the same compiled sampler, such as
        `("gsm8k:FILE", "champ", "rg:chain_sum", "heldout")`. docs/evaluation.md has the names. `()` is
        off.""",
        items=str,
    ),
    "eval.benchmark_every": Field(
        50, "Steps between benchmarks. They also run after the last step.", least=1
    ),
    "eval.samples": Field(1, "Responses to each problem of a benchmark.", least=1),
    "checkpoint.every": Field(
        50, "Steps between checkpoints. One is also saved after the last step. 0 saves none at all.", least=0
    ),
    "checkpoint.keep": Field(
        2, "Newest checkpoints that are kept, in addition to the best one by held-out KL.", least=1
    ),
    "metrics.rollouts_every": Field(
        10,
        """Steps between lists of rollouts in rollouts.jsonl. 0 is off. Rollouts whose prompts have an
        `answer` are graded in other processes while the device runs the next step. The report's curves of
        S, and of right and wrong answers, use only these rollouts.""",
        least=0,
    ),
    "metrics.rollouts": Field(4, "Rollouts in each of these lists. 0 writes none.", least=0),
    "metrics.gradient_noise_every": Field(
        0,
        """Steps between measurements of the gradient's norm and signal-to-noise ratio, for the tokens trained
        on, for all tokens and for the released ones. 0 is off and costs nothing. A measurement is a
        program of its own before the step. It scores the rollouts again and takes three gradients over the
        batch: up to three times the time of the training step, and twice the memory of the student's
        float32 parameters beside the activations of a micro-batch.""",
        least=0,
    ),
    "metrics.tensorboard": Field(True, "Whether TensorBoard event files are written."),
    "metrics.wandb": Field(
        "",
        """Weights & Biases project. `""` is off. Needs `pip install wandb`.""",
    ),
}
