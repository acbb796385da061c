"""int8 weights against NumPy: what is stored, what it gives, and where it lies on a mesh."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.distill import StepInputs, scoring
from opd_jax.models import int8, transformer
from opd_jax.models.files import hf
from opd_jax.parallel import sharding
from opd_jax.run import programs
from opd_jax.run.job import prepare
from tests import tiny

MODEL = tiny.TEACHER.replace(layers=2, tie_embeddings=False, weights="int8", swapped_ids=(254, tiny.END))
SPARSE = MODEL.replace(family="qwen3_moe", qk_norm=True, experts=8, experts_per_token=2, ffn=20)
TEXTS = ["One. Two.", "A third one, longer.", "x", "No end here"] * 2
# The axes that each matrix's product sums over, the layers' being 0, by hand.
SUMMED = {"query": 1, "key": 1, "value": 1, "output": (1, 2), "gate": 1, "up": 1, "down": 1}
SUMMED |= {"embedding": 1}


def whole(weight) -> np.ndarray:
    """A weight in float64, quantised or not."""
    if not int8.is_quantised(weight):
        return np.asarray(weight, np.float64)
    return np.asarray(weight.values, np.float64) * np.asarray(weight.scale, np.float64)


def dequantised(params) -> dict:
    return jax.tree.map(whole, params, is_leaf=int8.is_quantised)


@functools.cache
def quantised(config) -> dict:
    """Random weights of a config in int8."""
    axes = transformer.declared_axes(config)
    quantise = jax.jit(lambda params: int8.quantise_tree(params, axes))
    return quantise(tiny.weights(config.replace(weights="float"), 3))


@pytest.fixture(scope="module")
def rollouts():
    student = tiny.weights(tiny.STUDENT, 4)
    return tiny.written(TEXTS, tiny.STUDENT, student, width=21)


@functools.cache
def scorer(config):
    how = scoring.Scoring(chunk=8)
    return jax.jit(functools.partial(scoring.score, config, scoring=how))


def test_an_int8_weight_is_off_by_at_most_half_its_channels_scale():
    weight = np.random.default_rng(0).normal(size=(5, 7, 3)).astype(np.float32)
    weight[:, :, 1] *= 1e-4
    weight[:, :, 2] = 0
    got = int8.quantise(jnp.asarray(weight), (0, 1))
    assert got.values.dtype == jnp.int8 and got.scale.dtype == jnp.float32
    assert got.shape == weight.shape and got.scale.shape == (1, 1, 3)
    largest = np.abs(weight).max(axis=(0, 1))
    np.testing.assert_array_less(np.abs(whole(got) - weight).max(axis=(0, 1)), largest / 253 + 1e-12)
    np.testing.assert_array_equal(np.abs(got.values).max(axis=(0, 1)), [127, 127, 0])


def test_a_checkpoint_is_quantised_as_numpy_does_it_and_vectors_stay(models):
    _, exact = hf.load(models / "teacher")
    config, params = hf.load(models / "teacher", stored="int8")
    assert config.weights == "int8"
    assert jax.tree.map(like, params) == jax.tree.map(like, transformer.abstract(config))
    params, exact = ({"embedding": tree["embedding"]} | tree["blocks"] for tree in (params, exact))
    for name, got in params.items():
        if name not in SUMMED:
            np.testing.assert_array_equal(got, exact[name])
            continue
        largest = np.abs(exact[name]).max(axis=SUMMED[name], keepdims=True)
        np.testing.assert_allclose(got.scale, largest / 127, rtol=1e-6)
        assert np.abs(got.values - exact[name] / got.scale).max() <= 0.5001


def like(array):
    return array.shape, array.dtype


def test_a_mesh_loads_the_same_int8_weights_and_holds_a_quarter_of_the_bytes(models):
    config, want = hf.load(models / "teacher", stored="int8")
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    shardings = programs.param_shardings(mesh, config)
    _, got = hf.load(models / "teacher", mesh, shardings, stored="int8")
    jax.tree.map(np.testing.assert_array_equal, got, want)
    output = got["blocks"]["output"]
    assert output.values.sharding.shard_shape(output.shape) == (3, 2, 8, 16)
    assert output.scale.sharding.is_fully_replicated
    gate = got["blocks"]["gate"].scale
    assert gate.sharding.shard_shape(gate.shape) == (3, 1, 24)


def numpy_logits(config, params, tokens_L):
    """A dense model's logits [L, V] of one row without padding, float64, written from its definition."""

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + config.norm_eps) * scale

    length, half = len(tokens_L), config.head_size // 2
    angle = np.arange(length)[:, None] * config.rope_theta ** (-np.arange(half) / half)

    def rotated(x_LHC):
        low, high = x_LHC[..., :half], x_LHC[..., half:]
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)

    x_LD = params["embedding"][tokens_L]
    for i in range(config.layers):
        p = {name: w[i] for name, w in params["blocks"].items()}
        h_LD = norm(x_LD, p["attention_norm"])
        q, k, v = (np.einsum("ld,dhc->lhc", h_LD, p[name]) for name in ("query", "key", "value"))
        q, k = rotated(q), rotated(k)
        k, v = (np.repeat(y, config.heads // config.kv_heads, axis=1) for y in (k, v))
        score = np.einsum("lhc,mhc->hlm", q, k) * config.head_size**-0.5
        score = np.exp(score - score.max(axis=-1, keepdims=True)) * np.tri(length)
        out = np.einsum("hlm,mhc->lhc", score / score.sum(axis=-1, keepdims=True), v)
        x_LD = x_LD + np.einsum("lhc,hcd->ld", out, p["output"])
        h_LD = norm(x_LD, p["ffn_norm"])
        gate = h_LD @ p["gate"]
        x_LD = x_LD + (gate / (1 + np.exp(-gate)) * (h_LD @ p["up"])) @ p["down"]
    logits = norm(x_LD, params["final_norm"]) @ params["head"].T
    one, other = config.swapped_ids
    logits[:, [one, other]] = logits[:, [other, one]]
    return logits[:, : config.valid_vocab]


def test_scores_are_those_of_the_dequantised_model_in_float64(rollouts):
    params = quantised(MODEL)
    scores = scorer(MODEL)(params, rollouts)
    exact = dequantised(params)
    start = rollouts.prompt_mask_BP.shape[1]
    mask_BL = np.concatenate([rollouts.prompt_mask_BP, rollouts.mask_BT], axis=1)
    for row in range(4):
        logits = numpy_logits(MODEL, exact, rollouts.tokens_BL[row][mask_BL[row]])
        logp = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
        t = rollouts.mask_BT[row].sum()
        before = rollouts.prompt_mask_BP[row].sum() - 1 + np.arange(t)
        token = rollouts.tokens_BL[row, start : start + t]
        np.testing.assert_allclose(scores.teacher_logp_BT[row, :t], logp[before, token], atol=2e-5)
        best = np.sort(np.take_along_axis(logits[before], rollouts.topk_BTK[row, :t], axis=-1))
        np.testing.assert_allclose(scores.contrast_BT[row, :t], best[:, -1] - best[:, -2], atol=2e-5)


@pytest.mark.parametrize(
    "config",
    [MODEL, SPARSE, SPARSE.replace(experts=7)],
    ids=["dense", "experts are cut", "their widths are cut"],
)
def test_a_mesh_scores_as_one_device_and_gathers_weights_in_int8(config, rollouts):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    places = programs.param_shardings(mesh, config), sharding.batch(mesh)
    score = functools.partial(scoring.score, config, scoring=scoring.Scoring(8))
    arguments = jax.device_put((quantised(config), rollouts), places)
    score = jax.jit(sharding.on(mesh, score), in_shardings=places).lower(*arguments).compile()
    got, want = score(*arguments), scorer(config)(quantised(config), rollouts)
    for name in ("teacher_logp_BT", "contrast_BT", "teacher_stop_BT"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), atol=2e-5, err_msg=name)
    gathered = re.findall(r"= (\w+)\[([\d,]+)\]\S* all-gather", score.as_text())
    assert any(kind == "s8" for kind, _ in gathered)
    floating = [set(map(int, shape.split(","))) for kind, shape in gathered if kind != "s8"]
    assert not any(config.width in shape and shape & {config.ffn, config.ffn // 2} for shape in floating)


def test_experts_in_int8_are_those_of_the_dequantised_model(rollouts):
    """The floating-point experts are compared with transformers' in test_moe.py."""
    params = quantised(SPARSE)
    exact = jax.tree.map(lambda w: jnp.asarray(w, jnp.float32), dequantised(params))
    got = scorer(SPARSE)(params, rollouts)
    want = scorer(SPARSE.replace(weights="float"))(exact, rollouts)
    np.testing.assert_allclose(got.teacher_logp_BT, want.teacher_logp_BT, atol=2e-5)
    assert not int8.is_quantised(params["blocks"]["router"])


def test_every_program_of_a_run_takes_an_int8_teacher_and_they_agree(models):
    settings = {"teacher.weights": "int8", "objective.name": "reverse_kl", "release.rule": "none"}
    job = prepare(tiny.config(models, **settings, **{"scoring.student": "recompute"}))
    teacher, state, key = job.teacher_params(), job.start(), job.key(0)
    tokens_BP = np.full((8, 48), tiny.PAD, np.int32)
    tokens_BP[:, -3:] = list(b"Hi:")
    prompt = sharding.put_batch(job.mesh, (tokens_BP, tokens_BP != tiny.PAD))
    step = jax.device_put(np.int32(0), sharding.replicated(job.mesh))
    rollouts = job.sample_teacher(teacher, *prompt, key, step)
    sums = job.divergence(state.params, teacher, rollouts)
    _, metrics, supervision = job.train_step(state, StepInputs(teacher, rollouts, job.table, key))
    np.testing.assert_allclose(supervision.scores.teacher_logp_BT, rollouts.logp_BT, atol=2e-5)
    kl = sums["kl_B"].sum() / sums["tokens_B"].sum()
    np.testing.assert_allclose(metrics["loss"], kl, rtol=1e-4)
    assert kl > 0.1
