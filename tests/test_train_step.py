"""One training step: what it does to the parameters, on any mesh and however the batch is cut."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opd_jax import scoring, segments
from opd_jax.job import prepare
from opd_jax.release import Release
from opd_jax.train_step import Supervision, TrainState, learning_rate, make_train_step, measure
from tests import tiny

WIDTH = 96
TEXTS = (
    "I see a cat. It is red. The sun is hot. You are old. We go now. Be well. Yes we do.",
    "One and one is two. Two and two is four. So it is. All is well. Nine is odd. Ten is not.",
    "Go up. Go down. Stop. Turn left. Turn right. Run fast. Walk slow. Sit still. Rest.",
    "No dots here at all just a line of words",
    "It is so. It is not so. Why is it so? Who can say. I can not! We may try. They will.",
    "A b c. D e f. G h i. J k l. M n o. P q r. S t u. V w x. Y z. Then again from the top.",
    "Short.",
    "We add 2 and 3. That is 5. We take 1. Now 4 is left. So say 4. The end is here. Bye.",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny.save_pair(folder)
    return folder


@pytest.fixture(scope="module")
def table():
    return segments.SegmentTable.from_tokenizer(tiny.tokenizer())


@pytest.fixture(scope="module")
def student():
    return tiny.params(tiny.STUDENT, 1)


@pytest.fixture(scope="module")
def teacher():
    return tiny.params(tiny.TEACHER, 2)


@pytest.fixture(scope="module")
def rollouts(student):
    return tiny.written(TEXTS, tiny.STUDENT, student, width=WIDTH)


@functools.cache
def compiled(optimizer, teacher=tiny.TEACHER, **overrides):
    """A jitted train_step on one device; the same arguments share one program."""
    return jax.jit(make_train_step(tiny.STUDENT, teacher, settings(**overrides), optimizer))


def settings(**overrides):
    from pathlib import Path

    flat = {key.replace("__", "."): value for key, value in overrides.items()}
    return tiny.config(Path("."), **{"scoring.chunk": 40, "train.micro_batch": 8} | flat)


SGD, ADAM = optax.sgd(1.0), optax.adam(1e-3)


def start(params, optimizer):
    return TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params))


def assert_close(ours, theirs, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), ours, theirs)


def largest_difference(ours, theirs) -> float:
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(abs(a - b).max()), ours, theirs)))


@pytest.fixture(scope="module")
def plain(student, teacher, rollouts, table):
    """(state, metrics, supervision) of one SGD step with the paper's rule."""
    return compiled(SGD)(start(student, SGD), teacher, rollouts, table)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(student, rollouts, table):
    step = compiled(SGD, tiny.STUDENT)
    state, measured, _ = step(start(student, SGD), student, rollouts, table)
    assert abs(measured["loss"]) < 1e-5
    assert abs(measured["kl"]) < 1e-6
    assert measured["grad_norm"] < 1e-5
    assert_close(state.params, student, 1e-6)
    assert int(state.step) == 1


def test_an_sgd_step_subtracts_the_gradient_of_the_loss_written_over_whole_logits(
    student, rollouts, plain
):
    state, measured, supervision = plain
    assert 0 < measured["accepted_share"] < 1, "the texts no longer exercise the release"
    weight_BT = supervision.scores.advantage_BT * supervision.release.weight_BT
    loss, grads = jax.value_and_grad(tiny.naive_loss, argnums=1)(
        tiny.STUDENT, student, rollouts, weight_BT
    )
    np.testing.assert_allclose(measured["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(measured["grad_norm"], optax.global_norm(grads), rtol=1e-4)
    assert measured["grad_norm"] > 1e-2
    assert_close(state.params, jax.tree.map(lambda p, g: p - g, student, grads), 2e-6)


def test_without_a_rule_every_response_token_weighs_one(student, teacher, rollouts, table):
    step = compiled(SGD, release__rule="none")
    _, measured, supervision = step(start(student, SGD), teacher, rollouts, table)
    np.testing.assert_array_equal(supervision.release.weight_BT, rollouts.mask_BT)
    np.testing.assert_array_equal(supervision.release.mask_BT, rollouts.mask_BT)
    assert measured["kept_share"] == 1
    assert measured["accepted_share"] == 0
    assert np.isnan(measured["release_position"])


def test_the_rule_keeps_a_prefix_that_weighs_as_much_as_the_whole_response(plain, rollouts):
    release = plain[2].release
    kept_BT = np.arange(WIDTH) < np.asarray(release.kept_B)[:, None]
    np.testing.assert_array_equal(release.mask_BT, kept_BT)
    np.testing.assert_allclose(release.weight_BT.sum(axis=1), rollouts.mask_BT.sum(axis=1), rtol=1e-6)
    assert (release.kept_B < rollouts.mask_BT.sum(axis=1)).tolist() == release.accepted_B.tolist()


def test_micro_batches_do_not_change_the_step(student, teacher, rollouts, table, plain):
    step = compiled(SGD, train__micro_batch=2)
    state, measured, _ = step(start(student, SGD), teacher, rollouts, table)
    np.testing.assert_allclose(measured["loss"], plain[1]["loss"], rtol=1e-6)
    assert_close(state.params, plain[0].params, 1e-6)


def test_a_second_update_on_the_same_rollouts_is_another_step_from_where_the_first_ended(
    student, teacher, rollouts, table
):
    step = compiled(ADAM, train__updates_per_rollout=2)
    twice, measured, _ = step(start(student, ADAM), teacher, rollouts, table)
    once, first, _ = compiled(ADAM)(start(student, ADAM), teacher, rollouts, table)
    assert int(twice.step) == 1
    assert int(twice.opt_state[0].count) == 2
    assert largest_difference(twice.params, once.params) > 1e-4
    # At a ratio of 1 the clipped form has the gradient of the plain one, not its value.
    np.testing.assert_allclose(measured["grad_norm"], first["grad_norm"], rtol=1e-5)


def test_recomputing_the_students_side_gives_the_same_step(
    student, teacher, rollouts, table, plain
):
    blank = rollouts.replace(
        logp_BT=np.zeros_like(rollouts.logp_BT), topk_BTK=np.zeros_like(rollouts.topk_BTK)
    )
    step = compiled(SGD, scoring__student="recompute")
    state, measured, supervision = step(start(student, SGD), teacher, blank, table)
    np.testing.assert_allclose(
        supervision.scores.contrast_BT, plain[2].scores.contrast_BT, atol=1e-5
    )
    np.testing.assert_allclose(measured["loss"], plain[1]["loss"], rtol=1e-5)
    assert_close(state.params, plain[0].params, 5e-6)


@pytest.fixture(scope="module")
def sharded(models):
    """The job of a (2, 2, 2) mesh and its compiled step, for these rollouts."""
    mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    job = prepare(tiny.config(models, **{"scoring.chunk": 40, "optimizer.clip_norm": 0.0} | mesh))
    state, teacher_params = job.start(), job.teacher_params()
    return job, state, teacher_params


def test_a_mesh_of_eight_devices_computes_what_one_does(
    sharded, student, teacher, rollouts, table
):
    job, state, teacher_params = sharded
    alone = jax.jit(make_train_step(tiny.STUDENT, tiny.TEACHER, job.config, job.optimizer))
    expected, one, supervision = alone(start(student, job.optimizer), teacher, rollouts, table)
    state, eight, released = job.train_step(
        jax.tree.map(jnp.copy, state), teacher_params, rollouts, job.table
    )
    np.testing.assert_allclose(eight["loss"], one["loss"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(eight["grad_norm"], one["grad_norm"], rtol=1e-4)
    np.testing.assert_array_equal(released.release.cut_B, supervision.release.cut_B)
    # Adam divides by the gradient's own size, so rounding moves where the gradient is near zero.
    for ours, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params)):
        assert np.mean(np.abs(np.asarray(ours) - np.asarray(theirs)) > 1e-5) < 1e-3


def test_the_step_never_calls_the_host_and_reuses_the_states_memory(sharded, rollouts):
    job, state, teacher_params = sharded
    program = job.train_step.lower(state, teacher_params, rollouts, job.table).compile()
    text = program.as_text().lower()
    for word in ("callback", "infeed", "outfeed", "send(", "recv(", "host_"):
        assert word not in text, word
    shards = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state)]
    assert program.memory_analysis().alias_size_in_bytes >= sum(shards)


def by_hand(accepted):
    """Two rollouts of 4 and 20 tokens; the first is cut after 1 token if accepted."""
    mask_BT = np.arange(20) < np.array([[4], [20]])
    kept_BT = np.arange(20) < np.array([[1 if accepted else 4], [20]])
    advantage_BT = np.where(mask_BT, np.array([[-1.0], [-0.5]]), 0).astype(np.float32)
    zero_BT = np.zeros(mask_BT.shape, np.float32)
    rollouts = tiny.Rollouts(
        tokens_BL=np.zeros((2, 22), np.int32),
        prompt_mask_BP=np.ones((2, 2), bool),
        mask_BT=mask_BT,
        logp_BT=zero_BT,
        behaviour_logp_BT=zero_BT,
        topk_BTK=np.zeros((2, 20, 4), np.int32),
        stop_BT=np.where(mask_BT, 0.25, 0).astype(np.float32),
        finished_B=np.array([True, False]),
    )
    release = Release(
        weight_BT=kept_BT.astype(np.float32),
        mask_BT=kept_BT,
        segment_BT=np.where(mask_BT, 0, -1),
        kept_B=kept_BT.sum(axis=1),
        cut_B=np.array([1, 1]),
        segments_B=np.array([1, 1]),
        accepted_B=np.array([accepted, False]),
        gain_B=np.array([3.0, -7.0], np.float32),
    )
    scores = scoring.Scores(
        advantage_BT=advantage_BT,
        contrast_BT=2 * mask_BT.astype(np.float32),
        teacher_logp_BT=zero_BT,
        student_logp_BT=zero_BT,
    )
    return jax.tree.map(jnp.asarray, (rollouts, Supervision(scores=scores, release=release)))


def test_the_numbers_of_a_case_worked_by_hand():
    measured = jax.device_get(measure(*by_hand(accepted=True)))
    expected = {
        "kl": (4 * 1.0 + 20 * 0.5) / 24,
        "advantage_std": np.std([-1.0] * 4 + [-0.5] * 20),
        "contrast": 2,
        "stop_probability": 0.25,
        "response_tokens": 24,
        "supervised_tokens": 21,
        "kept_share": 21 / 24,
        "accepted_share": 0.5,
        "release_position": 0.25,
        "gain": 3,
        "response_length": 12,
        "finished_share": 0.5,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(measured[name], value, rtol=1e-6, err_msg=name)
    # Four tokens fall into bins 0, 5, 10 and 15 of the first rollout; the second has one a bin.
    ours = np.isin(np.arange(20), [0, 5, 10, 15])
    np.testing.assert_array_equal(measured["position_tokens"], 1 + ours)
    np.testing.assert_array_equal(measured["position_kept_tokens"], 1 + (np.arange(20) == 0))
    np.testing.assert_allclose(measured["position_contrast_sum"], 2 + 2 * ours)
    np.testing.assert_allclose(measured["position_advantage_sum"], -0.5 - ours)
    np.testing.assert_allclose(measured["position_advantage_sq_sum"], 0.25 + ours)
    np.testing.assert_array_equal(measured["release_histogram"], np.arange(20) == 5)


def test_a_batch_in_which_nothing_is_released_has_no_release_position():
    measured = jax.device_get(measure(*by_hand(accepted=False)))
    assert np.isnan(measured["release_position"])
    assert np.isnan(measured["gain"])
    assert measured["release_histogram"].sum() == 0


def test_the_bins_of_a_step_sum_to_its_totals(plain):
    _, measured, supervision = plain
    tokens = measured["response_tokens"]
    assert measured["position_tokens"].sum() == tokens
    assert measured["position_kept_tokens"].sum() == measured["supervised_tokens"]
    assert measured["release_histogram"].sum() == supervision.release.accepted_B.sum()
    for bins, mean in (("position_contrast_sum", "contrast"), ("position_advantage_sum", "kl")):
        np.testing.assert_allclose(
            abs(measured[bins].sum() / tokens), abs(measured[mean]), rtol=1e-5
        )


@pytest.mark.parametrize(
    "schedule, last", [("constant", 1.0), ("linear", 1 / 8), ("cosine", 0.5 + 0.5 * np.cos(7 / 8 * np.pi))]
)
def test_the_learning_rate_warms_up_and_then_follows_its_schedule(schedule, last):
    config = settings(
        optimizer__schedule=schedule,
        optimizer__learning_rate=1.0,
        optimizer__warmup_steps=2,
        train__steps=5,
        train__updates_per_rollout=2,
    )
    rate = learning_rate(config)
    np.testing.assert_allclose([rate(n) for n in (0, 1, 2)], [0.5, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(rate(9), last, rtol=1e-5)
