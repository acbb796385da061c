"""The gradient's norm and signal-to-noise ratio against single gradients, in float64 by NumPy."""

import functools
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opd_jax.distill import StepInputs, train_step
from opd_jax.distill.gradient_noise import PARTS, cut, group_count, make_gradient_noise
from opd_jax.errors import UserError
from opd_jax.release.segments import segments
from opd_jax.run import sizes
from tests import tiny

WIDTH = 48
TEXTS = (
    "I see a cat. It is red. The sun is hot. We go.",
    "One is odd. Two is not. So it is. All is well.",
    "Go up. Go down. Stop. Turn left. Turn right.",
    "No dots here at all just a line of words",
    "It is so. It is not. Why is it so? Who can say.",
    "A b c. D e f. G h i. J k l. M n o. P q r.",
    "Short.",
    "We add 2 and 3. That is 5. We take 1. Bye.",
)
GROUPS = 4
KEPT = 12  # tokens
KEY = jax.random.key(0)


def settings(**overrides):
    flat = {key.replace("__", "."): value for key, value in overrides.items()}
    base = {"scoring.chunk": 48, "train.micro_batch": 8, "release.rule": "prefix"}
    base |= {"release.prefix_tokens": KEPT}
    return tiny.config(Path("."), **base | flat)


@pytest.fixture(scope="module")
def case():
    """(student, teacher, rollouts, table)."""
    student = tiny.student_params()
    rollouts = tiny.written(TEXTS, tiny.STUDENT, student, width=WIDTH)
    table = segments.SegmentTable.from_token_bytes([], "fixed:4")
    return student, tiny.teacher_params(), rollouts, table


@functools.cache
def compiled(samples):
    """gradient_noise of four groups, for `samples` responses a prompt."""
    c = settings(rollout__samples_per_prompt=samples)
    return jax.jit(make_gradient_noise(tiny.STUDENT, tiny.TEACHER, c, GROUPS))


def run(case, rollouts, samples=1):
    student, teacher, _, table = case
    return jax.device_get(compiled(samples)(student, jnp.int32(0), StepInputs(teacher, rollouts, table, KEY)))


@pytest.fixture(scope="module")
def measured(case):
    return run(case, case[2])


@pytest.fixture(scope="module")
def row_gradients(case):
    """part -> [B, parameters] float64: each row's share of the batch's gradient, from whole logits."""
    student, teacher, rollouts, table = case
    supervise = functools.partial(train_step.supervise, tiny.STUDENT, tiny.TEACHER, settings())
    scored = jax.jit(supervise)
    _, released, loss_inputs = scored(student, jnp.int32(0), StepInputs(teacher, rollouts, table, KEY))
    kept_BT = rollouts.mask_BT & (np.arange(WIDTH) < KEPT)
    np.testing.assert_array_equal(released.mask_BT, kept_BT)
    scale_B1 = rollouts.mask_BT.sum(axis=1, keepdims=True) / kept_BT.sum(axis=1, keepdims=True)
    weights = {"kept": kept_BT * scale_B1, "all": rollouts.mask_BT, "released": rollouts.mask_BT & ~kept_BT}
    naive = jax.grad(functools.partial(tiny.naive_loss, tiny.STUDENT))
    gradient = jax.jit(naive)
    found = {}
    for part, weight_BT in weights.items():
        weight_BT = np.asarray(weight_BT * loss_inputs.advantage_BT, np.float32)
        rows = []
        for b in range(len(TEXTS)):
            row, weight_1T = jax.tree.map(lambda x, b=b: x[b : b + 1], (rollouts, weight_BT))
            share = row.mask_BT.sum() / rollouts.mask_BT.sum()
            rows.append(jax.tree.map(lambda x, share=share: share * x, gradient(student, row, weight_1T)))
        flat = [np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(g)]) for g in rows]
        found[part] = np.stack(flat)
    return found


@pytest.mark.parametrize("part", PARTS)
def test_norm_and_ratio_are_those_of_single_gradients(measured, row_gradients, part):
    rows_BN = row_gradients[part]
    # Group i has rows i and i + 4; each stands for the whole batch.
    groups_GN = GROUPS * (rows_BN[:GROUPS] + rows_BN[GROUPS:])
    mean_N = groups_GN.mean(axis=0)
    noise = groups_GN.var(axis=0, ddof=1).sum() / GROUPS
    np.testing.assert_allclose(measured[f"gradient_norm_{part}"], np.linalg.norm(mean_N), rtol=1e-4)
    snr = np.sum(mean_N**2) / noise - 1
    np.testing.assert_allclose(measured[f"gradient_snr_{part}"], snr, rtol=1e-3, atol=1e-3)


def test_taught_ends_are_part_of_what_is_trained_on_and_of_no_released_token(case, measured):
    student, teacher, rollouts, table = case
    c = settings(objective__end_weight=1.0)
    noise = jax.jit(make_gradient_noise(tiny.STUDENT, tiny.TEACHER, c, GROUPS))
    taught = noise(student, jnp.int32(0), StepInputs(teacher, rollouts, table, KEY))
    ratio = {part: taught[f"gradient_norm_{part}"] / measured[f"gradient_norm_{part}"] for part in PARTS}
    assert ratio["released"] == pytest.approx(1, abs=1e-5)
    assert all(abs(ratio[part] - 1) > 1e-3 for part in ("kept", "all"))


def test_where_nothing_is_released_the_rest_has_no_gradient_and_no_ratio(case):
    rollouts = case[2]
    whole = run(case, rollouts.replace(mask_BT=rollouts.mask_BT & (np.arange(WIDTH) < KEPT)))
    assert whole["gradient_norm_released"] == 0 and np.isnan(whole["gradient_snr_released"])
    assert whole["gradient_norm_kept"] == whole["gradient_norm_all"] > 0
    assert whole["gradient_snr_kept"] == whole["gradient_snr_all"]


def test_the_responses_of_a_prompt_share_a_group(case):
    assert cut(np.arange(12), 3, 2).tolist() == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
    # Rows 0 and 1 over and over, as the two responses of four prompts: four equal groups, without noise.
    twice = jax.tree.map(lambda x: np.concatenate([x[:2]] * 4), case[2])
    assert np.isnan(run(case, twice, samples=2)["gradient_snr_all"])
    assert np.isfinite(run(case, twice)["gradient_snr_all"])


@pytest.mark.parametrize(
    "batch, samples, micro_batch, shards, expected",
    [
        (64, 1, 64, 1, 16),
        (64, 4, 64, 1, 16),
        (64, 4, 64, 8, 2),
        (1024, 1, 16, 4, 64),
        (48, 1, 48, 1, 16),
        (12, 1, 12, 1, 12),
        (16, 1, 16, 16, None),
        (16, 16, 16, 1, None),
    ],
)
def test_groups_are_sixteen_or_one_a_micro_batch_where_the_batch_allows_it(
    batch, samples, micro_batch, shards, expected
):
    c = settings(rollout__batch=batch, rollout__samples_per_prompt=samples, train__micro_batch=micro_batch)
    mesh = SimpleNamespace(shape={"data": shards, "fsdp": 1, "tensor": 2})
    assert group_count(c, mesh) == expected


def test_a_batch_too_small_for_two_groups_is_refused_before_anything_is_compiled():
    c = settings(metrics__gradient_noise_every=1)
    mesh = SimpleNamespace(shape={"data": 8, "fsdp": 1, "tensor": 1})
    with pytest.raises(UserError, match=r"metrics\.gradient_noise_every=1 .* 8 prompts"):
        sizes.check(c, mesh, tiny.STUDENT, tiny.TEACHER)
