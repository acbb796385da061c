"""A run's programs on one device and on meshes of eight: the same tokens, decisions, losses and gradients."""

import functools
import math
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from opd_jax.config.validation import validate
from opd_jax.distill import StepInputs, TrainState
from opd_jax.parallel import sharding
from opd_jax.parallel.layouts import DEFAULT, Layout
from opd_jax.release.segments import segments
from opd_jax.run import programs
from tests import tiny

SPARSE = {"family": "qwen3_moe", "qk_norm": True, "ffn": 16, "experts": 8, "experts_per_token": 2}
PAIRS = {
    "dense": (tiny.STUDENT, tiny.TEACHER),
    "experts": tuple(m.replace(normalise_experts=True, **SPARSE) for m in (tiny.STUDENT, tiny.TEACHER)),
}
ONE = (1, 1, 1)


def run(pair: str, sizes: tuple[int, int, int], rollouts=None, tables=(DEFAULT, DEFAULT)):
    """(rollouts, metrics, Adam's first moment, Supervision) of a first step; it may be given its rollouts."""
    student, teacher = (
        m.replace(valid_vocab=tiny.STUDENT.valid_vocab, layout=layout)
        for m, layout in zip(PAIRS[pair], tables, strict=True)
    )
    overrides = {f"mesh.{axis}": size for axis, size in zip(sharding.AXES, sizes, strict=True)}
    settings = {"data.prompt_tokens": 8, "rollout.max_tokens": 24, "rollout.halvings": 1}
    settings |= {"rollout.batch": 16, "train.micro_batch": 8}  # so that rows are packed
    config = tiny.config(Path("unread"), **settings | overrides)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[: math.prod(sizes)])
    p = programs.Programs.of(validate(config), mesh, student, teacher)
    params = jax.device_put(jax.tree.map(np.array, tiny.weights(student)), p.state_shardings.params)
    teacher_params = jax.device_put(tiny.weights(teacher, seed=1), p.teacher_shardings)
    key = sharding.key(mesh, 0, 0)
    prompts = np.random.default_rng(0).integers(33, 127, (16, 8)).astype(np.int32), np.ones((16, 8), bool)
    draw = params, *sharding.put_batch(mesh, prompts), key, np.int32(1)
    sampled = p.sample_group.lower(*draw).compile()(*draw)
    if rollouts is None:
        rollouts = sampled
    table = segments.SegmentTable.from_tokenizer(tiny.tokenizer(), "fixed:2")
    start = jax.jit(p.optimizer.init, out_shardings=p.state_shardings.opt_state)
    state = TrainState(np.int32(0), params, start(params))
    inputs = StepInputs(
        teacher_params,
        sharding.put_batch(mesh, jax.device_get(rollouts)),
        jax.device_put(table, sharding.replicated(mesh)),
        key,
    )
    state, measured, supervision = p.train_step.lower(state, inputs).compile()(state, inputs)
    moment = optax.tree.get(state.opt_state, "ScaleByAdamState").mu
    return jax.device_get((sampled, measured, moment, supervision))


one_device = functools.cache(functools.partial(run, sizes=ONE))


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)])
@pytest.mark.parametrize("pair", PAIRS)
def test_a_mesh_gives_what_one_device_gives(pair, sizes):
    sampled, measured, *_ = one_device(pair)
    assert 0 < measured["accepted_share"] < 1, "the rollouts no longer exercise the release"
    check(pair, run(pair, sizes, sampled))


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize(
    "tables",
    [
        (Layout("tensor", "slots", "positions"), Layout("whole", "slots", "positions")),
        (Layout("whole", "heads", "rows"), Layout("tensor", "heads", "rows")),
    ],
)
def test_other_tables_of_what_is_cut_give_what_one_device_gives(pair, tables):
    check(pair, run(pair, (2, 2, 2), one_device(pair)[0], tables))


def check(pair, many):
    """Asserts that what a mesh gave is what one device gives."""
    sampled, measured, moment, supervision = one_device(pair)
    np.testing.assert_array_equal(many[0].tokens_BL, sampled.tokens_BL)
    np.testing.assert_allclose(many[0].logp_BT, sampled.logp_BT, atol=1e-4)
    for name in ("loss", "kl", "contrast", "kept_share"):
        np.testing.assert_allclose(many[1][name], measured[name], rtol=1e-5, atol=1e-5, err_msg=name)
    np.testing.assert_array_equal(many[3].release.cut_B, supervision.release.cut_B)
    np.testing.assert_allclose(many[3].scores.advantage_BT, supervision.scores.advantage_BT, atol=1e-4)

    def close(ours, theirs):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * max(np.abs(theirs).max(), 1e-6))

    jax.tree.map(close, many[2], moment)
    routers = {name for name in measured if "router" in name}
    models = ("student", "teacher") if pair == "experts" else ()
    assert routers == {f"{m}_router_{name}" for m in models for name in ("peak", "idle", "entropy")}
    for name in routers:
        np.testing.assert_allclose(many[1][name], measured[name], rtol=1e-5, err_msg=name)
