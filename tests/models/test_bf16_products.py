"""Products with bfloat16 operands against float64 NumPy on the same operands, and in a model."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.distill import rollout, scoring
from opd_jax.models import bf16_products, transformer
from tests import tiny

NARROW = tiny.TEACHER.replace(products="bfloat16")
TEXTS = ["One. Two.", "A third one, longer.", "x", "No end here"]


def rounded(x) -> np.ndarray:
    """x as bfloat16 holds it, in float64."""
    return np.asarray(jnp.asarray(x).astype(jnp.bfloat16), np.float64)


@pytest.fixture(scope="module")
def rollouts():
    return tiny.written(TEXTS, tiny.STUDENT, tiny.weights(tiny.STUDENT, 4), width=21)


def test_value_and_both_gradients_are_sums_over_rounded_operands():
    draw = np.random.default_rng(0)
    x, w, c = (draw.normal(size=shape).astype(np.float32) for shape in ((5, 40), (40, 3), (5, 3)))
    got, back = jax.vjp(bf16_products.product, x, w)
    dx, dw = back(jnp.asarray(c))
    x, w, c = map(rounded, (x, w, c))
    for array, expected in ((got, x @ w), (dx, c @ w.T), (dw, x.T @ c)):
        assert array.dtype == jnp.float32
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-5)


def test_every_product_of_a_scored_block_takes_bfloat16_and_no_other_does(rollouts):
    params = tiny.weights(NARROW, 3)

    def operands(config):
        score = functools.partial(scoring.score, config, scoring=scoring.Scoring(8))
        text = jax.jit(score).lower(params, rollouts).as_text()
        dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
        return sum("bf16" in line for line in dots), len(dots)

    plain, all_plain = operands(tiny.TEACHER)
    narrow, all_narrow = operands(NARROW)
    assert plain == 0 and all_narrow == all_plain
    assert narrow == 7  # query, key, value, output, gate, up, down; the layers are one loop


def test_the_sampler_rounds_as_scoring_does():
    """Its log-probabilities are nearer to those of scoring with the same products than with the others."""
    params = tiny.weights(NARROW, 3)
    tokens_BP = jnp.arange(3 * 8).reshape(3, 8) % tiny.TEACHER.valid_vocab
    sampling = rollout.Sampling(max_tokens=12)

    @jax.jit
    def sampled(params):
        return rollout.sample(NARROW, params, tokens_BP, jnp.ones((3, 8), bool), jax.random.key(0), sampling)

    written = sampled(params)
    mask_BT = np.asarray(written.mask_BT)
    off = {}
    for config in (NARROW, tiny.TEACHER):
        scores = jax.jit(functools.partial(scoring.score, config, scoring=scoring.Scoring(6)))(
            params, written
        )
        off[config.products] = np.abs(scores.teacher_logp_BT - written.logp_BT)[mask_BT].mean()
    assert off["bfloat16"] < off["compute"] / 3
    text = jax.jit(sampled).lower(params).as_text()
    dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert sum("bf16" in line for line in dots) == 7 * (1 + NARROW.layers)  # prefill's loop, and decode


def test_no_product_of_a_gradient_sums_over_the_rows_of_both_operands():
    """A CPU has none in bfloat16 and XLA does it in float32 there; read before it compiles."""
    params = tiny.weights(NARROW, 3)
    tokens, mask = jnp.arange(64).reshape(2, 32) % 7, jnp.ones((2, 32), bool)

    def loss(params):
        return jnp.sum(transformer.forward(NARROW, params, tokens, mask) ** 2)

    text = jax.jit(jax.grad(loss)).lower(params).as_text()
    dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line and "bf16" in line]
    sums = [re.search(r"contracting_dims = (\[\d\] x \[\d\])", line)[1] for line in dots]
    assert len(sums) == 3 * 7 and set(sums) == {"[1] x [0]", "[1] x [1]"}


def test_log_probabilities_differ_by_less_than_those_of_a_bfloat16_model(rollouts):
    params = tiny.weights(NARROW, 3)
    plain, narrow, low = (
        np.asarray(
            jax.jit(functools.partial(scoring.score, c, scoring=scoring.Scoring(8)))(
                params, rollouts
            ).teacher_logp_BT
        )
        for c in (tiny.TEACHER, NARROW, tiny.TEACHER.replace(compute_dtype="bfloat16"))
    )
    mask_BT = np.asarray(rollouts.mask_BT)
    off, off_low = (np.abs(plain - x)[mask_BT].mean() for x in (narrow, low))
    assert 0 < off < off_low


def test_a_bfloat16_model_is_left_as_it_is():
    config = NARROW.replace(compute_dtype="bfloat16")
    tokens = jnp.arange(12).reshape(1, 12) % 7
    mask = jnp.ones((1, 12), bool)
    params = tiny.weights(NARROW, 3)
    a, b = (
        transformer.forward(c, params, tokens, mask) for c in (config, config.replace(products="compute"))
    )
    assert a.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
