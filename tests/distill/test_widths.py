"""Micro-batches at the width that their rows need: the same results, less computed."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opd_jax.distill import Loss, LossInputs, scoring, train_step, widths
from opd_jax.distill.types import Ends
from opd_jax.parallel import shard_rows, sharding
from tests import tiny

T = 24
LENGTHS = np.array([5, 24, 8, 9, 17, 2, 16, 3, 6, 7, 24, 3, 8, 11, 20, 4])
NARROWER = 8, 16
SPARSE = {"family": "qwen3_moe", "qk_norm": True, "ffn": 16, "experts": 8, "experts_per_token": 2}
MODELS = {"dense": tiny.TEACHER, "experts": tiny.TEACHER.replace(normalise_experts=True, **SPARSE)}


@pytest.fixture(scope="module")
def rollouts():
    texts = ["x" * int(n - 1) for n in LENGTHS]
    made = tiny.written(texts, tiny.STUDENT, tiny.student_params(), width=T)
    np.testing.assert_array_equal(made.mask_BT.sum(axis=1), LENGTHS)
    return jax.tree.map(jnp.asarray, made)


def close(ours, theirs, atol=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=atol), ours, theirs)


@functools.cache
def scored(model: str, how: scoring.Scoring, student: bool = False):
    own = (tiny.STUDENT, tiny.student_params()) if student else None
    params = tiny.weights(MODELS[model], seed=1)
    return jax.jit(lambda r: scoring.score(MODELS[model], params, r, how, own))


def used(length_B, pieces) -> float:
    """The mean width by NumPy: the rows sorted, then cut."""
    parts = np.sort(length_B).reshape(pieces, -1).max(axis=1)
    return float(np.mean([next(w for w in (*NARROWER, T) if w >= n) for n in parts]))


@pytest.mark.parametrize(
    ("model", "keep", "student"),
    [("dense", "logits", True), ("dense", "top", False), ("experts", None, False)],
)
@pytest.mark.parametrize("pieces", [1, 4])
def test_scores_are_those_of_the_full_width(rollouts, model, keep, student, pieces):
    plain = scored(model, scoring.Scoring(5, pieces, keep, 3 if keep == "top" else 0), student)(rollouts)
    narrow = scored(model, scoring.Scoring(5, pieces, keep, 3 if keep == "top" else 0, NARROWER), student)(
        rollouts
    )
    assert plain.width == T
    assert narrow.width == used(LENGTHS, pieces)
    inside = rollouts.mask_BT[..., None]

    def targets(scores):  # without meaning outside the response
        return jax.tree.map(
            lambda x: jnp.where(inside if x.ndim == 3 else inside[..., 0], x, 0), scores.targets
        )

    close(targets(narrow), targets(plain), atol=1e-5)
    close(narrow.replace(width=None, targets=None), plain.replace(width=None, targets=None), atol=1e-5)


def test_the_distance_is_that_of_the_full_width(rollouts):
    args = tiny.STUDENT, tiny.student_params(), tiny.TEACHER, tiny.teacher_params(), rollouts
    plain = scoring.distance(*args, scoring.Scoring(5, 4))
    close(scoring.distance(*args, scoring.Scoring(5, 4, widths=NARROWER)), plain)


def batch_of(rollouts, kept_B, ends: bool):
    weight_BT = jnp.where(jnp.arange(T)[None] < kept_B[:, None], 1.5, 0.0) * rollouts.mask_BT
    advantage_BT = jnp.sin(jnp.arange(T * len(kept_B), dtype=jnp.float32)).reshape(-1, T)
    stop = Ends(0.5 * rollouts.mask_BT, 0.01 * jnp.ones_like(weight_BT)) if ends else None
    return LossInputs(rollouts, advantage_BT=advantage_BT, weight_BT=weight_BT, ends=stop)


def updated(batch, pieces: int, narrower, mesh=None):
    """(parameters, loss, norm, width) of one step of plain gradient descent."""
    loss = Loss.of(tiny.STUDENT, None, tiny.config(Path("unread")), "policy_gradient")
    update = train_step.make_update(loss, optax.sgd(1.0), pieces, narrower)
    params = tiny.student_params()

    def one(batch):
        carry, (value, norm, _, _, width) = update(
            (params, optax.sgd(1.0).init(params)), batch, {}, None, 7.0
        )
        return carry[0], value, norm, width

    if mesh is None:
        return jax.jit(one)(batch)
    rows = sharding.batch(mesh)
    return jax.jit(sharding.on(mesh, one), in_shardings=rows)(sharding.put_batch(mesh, jax.device_get(batch)))


@pytest.mark.parametrize("pieces", [1, 4])
@pytest.mark.parametrize("ends", [True, False])
def test_gradients_are_those_of_the_full_width_and_what_is_released_costs_nothing(rollouts, pieces, ends):
    kept_B = np.minimum(LENGTHS, np.arange(1, 17))
    batch = batch_of(rollouts, kept_B, ends)
    *plain, none = updated(batch, pieces, ())
    *narrow, width = updated(batch, pieces, NARROWER)
    assert none is None
    close(narrow, plain, atol=1e-5)
    # The end of a response is taught in its released part too.
    assert width == used(LENGTHS if ends else kept_B, pieces)


def test_a_mesh_sorts_the_rows_of_each_device(rollouts):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    batch = batch_of(rollouts, LENGTHS, ends=False)
    *plain, _ = updated(batch, 1, ())
    *narrow, width = updated(batch, 4, NARROWER, mesh)
    close(narrow, plain, atol=1e-5)
    sorted_SR = np.sort(LENGTHS.reshape(4, -1), axis=1)
    assert width == used(sorted_SR.max(axis=0).repeat(4), 4)


def test_rows_do_not_leave_their_device(rollouts):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4, "tensor": 1})

    def there_and_back(r):
        order_SR = shard_rows.order(widths.last_position(r.mask_BT), 2)
        turned = shard_rows.taken(r, order_SR)
        return order_SR, turned, shard_rows.put_back(turned, order_SR)

    rows = sharding.batch(mesh)
    program = jax.jit(sharding.on(mesh, there_and_back), in_shardings=rows, out_shardings=rows)
    put = sharding.put_batch(mesh, jax.device_get(rollouts))
    compiled = program.lower(put).compile()
    for traffic in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
        assert traffic not in compiled.as_text()
    order_SR, turned, back = compiled(put)
    assert np.array_equal(np.sort(order_SR, axis=1), np.tile(np.arange(2), (8, 1)))
    assert not np.array_equal(turned.mask_BT, rollouts.mask_BT)
    jax.tree.map(np.testing.assert_array_equal, back, rollouts)


def test_widths_are_shares_of_the_longest_response_in_whole_blocks():
    def of(tokens, shares):
        return widths.of(
            tiny.config(Path("unread"), **{"rollout.max_tokens": tokens, "train.widths": shares})
        )

    assert of(1024, (0.25, 0.5)) == (256, 512)
    assert of(640, (0.25, 0.5)) == (256, 384)
    assert of(300, (0.5, 0.25, 0.75)) == (128, 256)
    assert of(96, (0.25, 0.5)) == ()
    assert of(4096, ()) == ()
