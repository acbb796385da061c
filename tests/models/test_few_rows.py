"""Decoding by columns: the same numbers as by rows, on CPUs alone, and in the order that was asked for."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.distill import rollout
from opd_jax.models import cache, few_rows, int8, transformer
from opd_jax.parallel import sharding
from opd_jax.preflight import topology
from opd_jax.run import programs, resolve
from tests import tiny

MODEL = tiny.STUDENT.replace(width=32, ffn=40, layers=2, qk_norm=True, attention_bias=True)
COLUMNS = MODEL.replace(decoding="columns")
SAMPLING = rollout.Sampling(max_tokens=10)


def prompts(rows):
    """Ragged prompts: (tokens_BP, mask_BP)."""
    rng = np.random.default_rng(0)
    mask_BP = np.arange(6)[None] >= rng.integers(0, 6, rows)[:, None]
    return np.where(mask_BP, rng.integers(0, 250, (rows, 6)), tiny.PAD).astype(np.int32), mask_BP


def sampled(model, rows=4, params=None):
    """Rollouts of a model."""
    params = tiny.weights(MODEL) if params is None else params
    sample = jax.jit(rollout.sample, static_argnums=(0, 5), compiler_options=tiny.OPTIMISED)
    return sample(model, params, *prompts(rows), jax.random.key(1), SAMPLING)


@pytest.mark.parametrize("rows", [1, few_rows.ROWS, few_rows.ROWS + 1])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 1e-5)])
def test_a_product_is_the_rows_times_the_weight(rows, dtype, tolerance):
    rng = np.random.default_rng(1)
    x_MR = jnp.asarray(rng.normal(size=(rows, 48)), dtype)
    weight = jnp.asarray(rng.normal(size=(3, 16, 5, 7)), dtype)
    kept = few_rows.turned(weight, inputs=2)
    assert kept.values_NR.shape == (35, 48) and kept.shape == weight.shape
    got_MN = jax.jit(few_rows.product, static_argnums=2)(x_MR, kept.values_NR, jnp.float32)
    want_MN = np.asarray(x_MR, np.float64) @ np.asarray(weight, np.float64).reshape(48, 35)
    assert got_MN.dtype == jnp.float32
    np.testing.assert_allclose(got_MN, want_MN, atol=tolerance * np.abs(want_MN).max())


@pytest.mark.parametrize("rows", [4, few_rows.ROWS + 4])
@pytest.mark.parametrize("products", ["compute", "bfloat16"])
def test_decoding_by_columns_writes_what_decoding_by_rows_writes(products, rows):
    by_rows, by_columns = (sampled(m.replace(products=products), rows) for m in (MODEL, COLUMNS))
    np.testing.assert_array_equal(by_columns.tokens_BL, by_rows.tokens_BL)
    np.testing.assert_allclose(by_columns.logp_BT, by_rows.logp_BT, atol=1e-4)


def test_an_int8_student_decodes_as_before():
    params = int8.quantise_tree(tiny.weights(MODEL), transformer.declared_axes(MODEL))
    by_rows, by_columns = (sampled(m.replace(weights="int8"), params=params) for m in (MODEL, COLUMNS))
    np.testing.assert_array_equal(by_columns.logp_BT, by_rows.logp_BT)


def test_a_mesh_decodes_by_columns_what_one_device_does():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})

    def sample(params, tokens_BP, mask_BP, key):
        return rollout.sample(COLUMNS, params, tokens_BP, mask_BP, key, SAMPLING)

    shardings = programs.param_shardings(mesh, COLUMNS)
    program = jax.jit(sharding.on(mesh, sample), in_shardings=(shardings, None, None, None))
    got = program(tiny.weights(MODEL), *prompts(4), jax.random.key(1))
    want = sampled(COLUMNS)
    np.testing.assert_array_equal(got.tokens_BL, want.tokens_BL)
    np.testing.assert_allclose(got.logp_BT, want.logp_BT, atol=1e-4)


def test_only_a_small_batch_has_its_weights_stored_by_columns():
    def kinds(model, rows):
        params = transformer.abstract(model)
        unstacked = jax.eval_shape(functools.partial(cache.unstack, model, rows=rows), params)
        return {
            name for name, weight in unstacked["layers"][0].items() if isinstance(weight, few_rows.Columns)
        }

    blocks = {"query", "key", "value", "output", "gate_up", "down"}
    assert kinds(COLUMNS, few_rows.ROWS) == blocks
    assert kinds(COLUMNS, few_rows.ROWS + 1) == kinds(MODEL, 1) == set()
    assert kinds(COLUMNS.replace(weights="int8"), 1) == set()
    sparse = COLUMNS.replace(experts=4, experts_per_token=2)
    assert kinds(sparse, 1) == blocks - {"gate_up", "down"}


def test_the_compiled_loop_multiplies_the_weight_from_the_left():
    shapes = transformer.abstract(COLUMNS), *prompts(4), jax.random.key(1)
    sample = jax.jit(lambda *a: rollout.sample(COLUMNS, *a, SAMPLING), compiler_options=tiny.OPTIMISED)
    text = sample.lower(*shapes).compile().as_text()
    # Gate and up together are [80, 32] times [4, 32]: the compiler keeps the order, and the transpose.
    products = re.findall(r"f32\[(\d+,\d+)\]\S* (?:fusion|dot)\(.*while/body/decode/ffn/dot_general", text)
    assert {"80,4", "32,4"} <= set(products) and not {"4,80", "4,32"} & set(products)
    assert re.search(r"f32\[264,4\]\S* (?:fusion|dot)\(.*while/body/head/dot_general", text)


def test_only_cpus_decode_by_columns(models, tpu_compiler):
    config = tiny.config(models)
    one = {"data": 1, "fsdp": 1, "tensor": 1}
    cpu = sharding.make_mesh(one, devices=jax.devices()[:1])
    tpu = sharding.make_mesh(one, devices=topology.describe("v5e:2x2")[1][:1])
    assert resolve.student_model(config, cpu).decoding == "columns"
    assert {m.decoding for m in resolve.models(config, tpu)} == {"rows"}
