"""Times tunix's sampler on tunix's Llama 3 model, as opd_jax.bench times our sampling.

    python benchmarks/tunix_sampler.py LAYERS WIDTH FFN HEADS KV_HEADS HEAD_SIZE VOCABULARY \\
        BATCH PROMPT RESPONSE [--logprobs]

tunix.generate.sampler.Sampler is called as tunix's RL rollouts call it: temperature 1, and their defaults
top_p=1 and top_k=None, which draw from the whole vocabulary without a sort. Weights are random and
float32, and embeddings are tied. The cache holds exactly PROMPT + RESPONSE positions. There is no end
token.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import tunix
from flax import nnx
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.llama3.model import Llama3, ModelConfig

NAMES = ["layers", "width", "ffn", "heads", "kv_heads", "head_size", "vocabulary"]
NAMES += ["batch", "prompt", "response"]
MATMUL = 2048  # size of the square product that measures the machine


class IdTokenizer:
    """Text is decimal token ids separated by spaces; no model emits its end and pad ids."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def bos_id(self) -> int:
        return 0  # with 0, tunix puts no such token before the prompt

    def eos_id(self) -> int:
        return -2

    def pad_id(self) -> int:
        return -1


def best_seconds(fn, *args, repeats: int):
    """Least wall time of fn(*args) over `repeats` runs after one that compiles, and the last result."""
    jax.block_until_ready(fn(*args))
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = jax.block_until_ready(fn(*args))
        seconds.append(time.perf_counter() - started)
    return min(seconds), result


def llama(sizes: argparse.Namespace) -> Llama3:
    """A random model. Tunix's own initialiser would leave the feed-forward weights at 0."""
    config = ModelConfig(
        num_layers=sizes.layers,
        vocab_size=sizes.vocabulary,
        embed_dim=sizes.width,
        hidden_dim=sizes.ffn,
        num_heads=sizes.heads,
        head_dim=sizes.head_size,
        num_kv_heads=sizes.kv_heads,
        rope_theta=10_000,
        norm_eps=1e-6,
        weight_tying=True,
    )
    model = Llama3(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)

    def draw(x):
        if x.ndim < 2:  # scales of the norms
            return x
        return jnp.asarray(0.02 * rng.standard_normal(x.shape, np.float32))

    nnx.update(model, jax.tree.map(draw, nnx.state(model, nnx.Param)))
    return model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in NAMES:
        parser.add_argument(name, type=int)
    parser.add_argument("--logprobs", action="store_true", help="also return the tokens' log-probabilities")
    sizes = parser.parse_args()
    b, p, t = sizes.batch, sizes.prompt, sizes.response

    model = llama(sizes)
    weights = jax.tree.leaves(nnx.state(model, nnx.Param))
    if {x.dtype for x in weights} != {jnp.dtype("float32")}:
        raise RuntimeError("the model is not in float32")
    cache = CacheConfig(p + t, sizes.layers, sizes.kv_heads, sizes.head_size)
    sampler = Sampler(model, IdTokenizer(), cache)
    ids_BP = np.random.default_rng(1).integers(1, sizes.vocabulary, (b, p))
    prompts = [" ".join(map(str, row)) for row in ids_BP.tolist()]

    def sample():
        return sampler(
            prompts,
            max_generation_steps=t,
            max_prompt_length=p,
            temperature=1.0,
            top_p=1.0,
            top_k=None,
            seed=0,
            return_logprobs=sizes.logprobs,
        ).tokens

    seconds, tokens = best_seconds(sample, repeats=3)
    if [len(row) for row in tokens] != [t] * b:
        raise RuntimeError(f"the sampler did not return {t} tokens for each of {b} prompts")

    x = jnp.ones((MATMUL, MATMUL), jnp.float32)
    rate = 2 * MATMUL**3 / best_seconds(jax.jit(lambda a: a @ a), x, repeats=5)[0]
    print(
        f"{jax.devices()[0].device_kind}, tunix {tunix.__version__}, jax {jax.__version__}, "
        f"float32; a {MATMUL}³ matrix product runs at {rate / 1e9:.0f} GFLOP/s"
    )
    print(" ".join(f"{name}={getattr(sizes, name)}" for name in NAMES))
    print(f"{sum(x.size for x in weights)} parameters")
    print(f"{'phase':<12}{'seconds':>10}{'tokens/s':>10}")
    print(f"{'sample':<12}{seconds:>10.4f}{b * t / seconds:>10.0f}")


if __name__ == "__main__":
    main()
