"""One training step: what it does to the parameters, on any mesh and however the batch is cut."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opd_jax import release as releasing
from opd_jax.distill import (
    StepInputs,
    Supervision,
    TrainState,
    learning_rate,
    make_optimizer,
    make_train_step,
)
from opd_jax.distill.train_step import measure
from opd_jax.distill.types import Scores
from opd_jax.parallel import sharding
from opd_jax.release.release import Release
from opd_jax.release.segments import segments
from opd_jax.run.job import prepare
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
def table():
    return segments.SegmentTable.from_tokenizer(tiny.tokenizer())


@pytest.fixture(scope="module")
def student():
    return tiny.student_params()


@pytest.fixture(scope="module")
def teacher():
    return tiny.teacher_params()


@pytest.fixture(scope="module")
def rollouts(student):
    return tiny.written(TEXTS, tiny.STUDENT, student, width=WIDTH)


def settings(folder=Path("."), **overrides):
    """A config; for steps alone its folder is never read."""
    flat = {key.replace("__", "."): value for key, value in overrides.items()}
    base = {"scoring.chunk": 40, "train.micro_batch": 8, "optimizer.clip_norm": 0.0}
    return tiny.config(folder, **base | flat)


KEY = jax.random.key(0)
SGD, ADAM = optax.sgd(1.0), make_optimizer(settings())


@functools.cache
def compiled(optimizer, teacher=tiny.TEACHER, **overrides):
    """A jitted train_step on one device; the same arguments share one program."""
    step = make_train_step(tiny.STUDENT, teacher, settings(**overrides), optimizer)
    return jax.jit(step)


def start(params, optimizer):
    return TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params))


def moments(state):
    """Adam's part of an optimizer state."""
    return optax.tree.get(state.opt_state, "ScaleByAdamState")


def gradient(state):
    """The gradient of the first update, which Adam's first moment is a tenth of."""
    return jax.tree.map(lambda mu: 10 * mu, moments(state).mu)


def assert_close(ours, theirs, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), ours, theirs)


def largest_difference(ours, theirs) -> float:
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(abs(a - b).max()), ours, theirs)))


@pytest.fixture(scope="module")
def plain(student, teacher, rollouts, table):
    """(state, metrics, supervision) of one step with the paper's rule on one device."""
    return compiled(ADAM)(start(student, ADAM), StepInputs(teacher, rollouts, table, KEY))


def test_a_student_equal_to_its_teacher_has_nothing_to_learn(student, rollouts, table):
    step = compiled(SGD, tiny.STUDENT, release__rule="none")
    state, measured, _ = step(start(student, SGD), StepInputs(student, rollouts, table, KEY))
    assert abs(measured["loss"]) < 1e-5
    assert abs(measured["kl"]) < 1e-6
    assert measured["grad_norm"] < 1e-5
    assert_close(state.params, student, 1e-6)
    assert int(state.step) == 1


def test_the_gradient_is_that_of_the_loss_written_over_whole_logits(student, rollouts, plain):
    state, measured, supervision = plain
    assert 0 < measured["accepted_share"] < 1, "the texts no longer exercise the release"
    weight_BT = supervision.scores.advantage_BT * supervision.release.weight_BT
    naive = jax.jit(
        jax.value_and_grad(functools.partial(tiny.naive_loss, tiny.STUDENT)),
    )
    loss, grads = naive(student, rollouts, weight_BT)
    np.testing.assert_allclose(measured["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(measured["grad_norm"], optax.tree.norm(grads), rtol=1e-5)
    assert measured["grad_norm"] > 1e-2
    assert_close(gradient(state), grads, 2e-6)


def test_without_a_rule_every_response_token_weighs_one(student, rollouts, table):
    step = compiled(SGD, tiny.STUDENT, release__rule="none")
    other = jax.tree.map(lambda p: 1.1 * p, student)
    _, measured, supervision = step(start(student, SGD), StepInputs(other, rollouts, table, KEY))
    assert abs(measured["loss"]) > 1e-3
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


def test_a_rule_that_draws_draws_from_the_runs_key_and_the_steps_number(student, teacher, rollouts, table):
    step = compiled(SGD, release__rule="random")
    begin = start(student, SGD)
    states = begin, begin, begin.replace(step=jnp.int32(1)), begin
    keys = KEY, KEY, KEY, jax.random.key(1)
    decided = [step(state, StepInputs(teacher, rollouts, table, key))[2] for state, key in zip(states, keys)]
    first, again, next_step, other_run = (supervision.release.mask_BT for supervision in decided)
    np.testing.assert_array_equal(first, again)
    assert (first != next_step).any() and (first != other_run).any()
    alone = jax.jit(
        functools.partial(releasing.release, config=settings(release__rule="random").release),
    )(decided[0].scores, decided[0].release.segment_BT, rollouts.mask_BT, key=jax.random.fold_in(KEY, 0))
    np.testing.assert_array_equal(first, alone.mask_BT)


def test_micro_batches_do_not_change_the_step(student, teacher, rollouts, table, plain):
    step = compiled(ADAM, train__micro_batch=2)
    state, measured, _ = step(start(student, ADAM), StepInputs(teacher, rollouts, table, KEY))
    np.testing.assert_allclose(measured["loss"], plain[1]["loss"], rtol=1e-6)
    assert_close(gradient(state), gradient(plain[0]), 1e-6)


def jsd_of_a_half(logs_BTV, logt_BTV, supervision, rollouts):
    s_BTV, t_BTV = jnp.exp(logs_BTV), jnp.exp(logt_BTV)
    logm_BTV = jnp.log((s_BTV + t_BTV) / 2)
    return (s_BTV * (logs_BTV - logm_BTV) + t_BTV * (logt_BTV - logm_BTV)).sum(axis=-1) / 2


def policy_gradient_and_top_16(logs_BTV, logt_BTV, supervision, rollouts):
    token_BT1 = rollouts.response_BT[..., None]
    logp_BT = jnp.take_along_axis(logs_BTV, token_BT1, axis=-1)[..., 0]
    order_BTV = jnp.argsort(-logt_BTV, axis=-1)
    s_BTV, t_BTV = (jnp.take_along_axis(jnp.exp(x), order_BTV, axis=-1) for x in (logs_BTV, logt_BTV))
    s_BTK, t_BTK = (
        jnp.concatenate([x[..., :16], x[..., 16:].sum(axis=-1, keepdims=True)], axis=-1)
        for x in (s_BTV, t_BTV)
    )
    kl_BT = (t_BTK * jnp.log(t_BTK / s_BTK)).sum(axis=-1)
    return kl_BT - supervision.scores.advantage_BT * logp_BT


@pytest.mark.parametrize("name, naive", [("jsd", jsd_of_a_half), ("eopd", policy_gradient_and_top_16)])
def test_an_objective_in_micro_batches_is_its_weighted_sum_over_whole_logits(
    name, naive, student, teacher, rollouts, table
):
    step = compiled(ADAM, objective__name=name, train__micro_batch=2)
    state, measured, supervision = step(start(student, ADAM), StepInputs(teacher, rollouts, table, KEY))
    assert 0 < measured["accepted_share"] < 1
    assert not jax.tree.leaves(supervision.scores.targets), "hidden states leave the step"

    def mean(params):
        logs_BTV, logt_BTV = (
            tiny.whole_logp(model, tree, rollouts)[..., : tiny.STUDENT.valid_vocab]
            for model, tree in ((tiny.STUDENT, params), (tiny.TEACHER, teacher))
        )
        loss_BT = naive(logs_BTV, logt_BTV, supervision, rollouts)
        return (supervision.release.weight_BT * loss_BT).sum() / rollouts.mask_BT.sum()

    loss, grads = jax.jit(jax.value_and_grad(mean))(student)
    assert measured["grad_norm"] > 1e-3
    np.testing.assert_allclose(measured["loss"], loss, rtol=1e-5)
    assert_close(gradient(state), grads, 2e-6)


@pytest.mark.parametrize("name", ["policy_gradient", "jsd"])
def test_ends_are_taught_by_weight_at_every_position_beside_what_the_rule_keeps(
    name, student, teacher, rollouts, table
):
    overrides = {"objective__name": name, "train__micro_batch": 2}
    plain, taught = (compiled(ADAM, objective__end_weight=w, **overrides) for w in (0.0, 0.5))
    begin = start(student, ADAM)
    without, _, _ = plain(begin, StepInputs(teacher, rollouts, table, KEY))
    state, measured, _ = taught(begin, StepInputs(teacher, rollouts, table, KEY))
    assert 0 < measured["accepted_share"] < 1

    def mean(params):
        s_BT, t_BT = (
            jnp.exp(tiny.whole_logp(model, tree, rollouts)[..., tiny.END])
            for model, tree in ((tiny.STUDENT, params), (tiny.TEACHER, teacher))
        )
        kl_BT = t_BT * jnp.log(t_BT / s_BT) + (1 - t_BT) * jnp.log((1 - t_BT) / (1 - s_BT))
        return 0.5 * jnp.where(rollouts.mask_BT, kl_BT, 0).sum() / rollouts.mask_BT.sum()

    grads = jax.jit(jax.grad(mean))(student)
    assert optax.tree.norm(grads) > 1e-4
    added = jax.tree.map(lambda a, b: a - b, gradient(state), gradient(without))
    assert_close(added, grads, 2e-6)


def test_a_student_equal_to_its_teacher_has_no_end_to_learn_at_any_update(student, rollouts, table):
    overrides = {"objective__end_weight": 1.0, "train__updates_per_rollout": 2, "release__rule": "none"}
    step = compiled(ADAM, tiny.STUDENT, **overrides)
    _, measured, _ = step(start(student, ADAM), StepInputs(student, rollouts, table, KEY))
    assert abs(measured["loss"]) < 1e-5 and measured["grad_norm"] < 1e-5
    other = jax.tree.map(lambda p: 1.1 * p, student)
    _, measured, _ = step(start(student, ADAM), StepInputs(other, rollouts, table, KEY))
    assert measured["grad_norm"] > 1e-3


def test_without_an_end_weight_the_compiled_step_is_the_one_of_old(student, teacher, rollouts, table):
    """Not one instruction asks for the end ids' share."""
    args = start(student, ADAM), StepInputs(teacher, rollouts, table, KEY)
    texts = [
        compiled(ADAM, objective__end_weight=w).lower(*args).as_text(debug_info=True) for w in (0.0, 0.5)
    ]
    assert ["end_kl" in text for text in texts] == [False, True]


def test_what_the_teacher_wrote_is_scored_with_the_students_own_probabilities(student, teacher, table):
    theirs = tiny.written(TEXTS, tiny.TEACHER, teacher, width=WIDTH)
    step = compiled(ADAM, objective__name="sft", release__rule="none")
    state, measured, supervision = step(start(student, ADAM), StepInputs(teacher, theirs, table, KEY))
    loss, grads = jax.jit(
        jax.value_and_grad(functools.partial(tiny.naive_loss, tiny.STUDENT)),
    )(student, theirs, jnp.ones((len(TEXTS), WIDTH)))
    np.testing.assert_allclose(measured["loss"], loss, rtol=1e-5)
    assert_close(gradient(state), grads, 2e-6)
    ratio_BT = theirs.logp_BT - supervision.scores.student_logp_BT
    np.testing.assert_allclose(measured["kl"], ratio_BT.sum() / theirs.mask_BT.sum(), rtol=1e-4)


def test_a_reward_raises_the_likelihood_of_right_answers_and_lowers_that_of_wrong_ones(
    student, teacher, rollouts, table
):
    changed = settings(reward__weight=2.0, objective__advantage_clip=0.5, release__rule="none")
    step = make_train_step(tiny.STUDENT, tiny.TEACHER, changed, ADAM)
    step = jax.jit(step, compiler_options=tiny.OPTIMISED)  # the loss is a small sum of large terms
    reward_B = np.array([1, 0, 0, 1, np.nan, 0, np.nan, 0], np.float32)
    state, measured, supervision = step(
        start(student, ADAM), StepInputs(teacher, rollouts, table, KEY, reward_B)
    )
    np.testing.assert_allclose(measured["reward"], 2 / 6, rtol=1e-6)
    np.testing.assert_allclose(measured["graded_share"], 6 / 8, rtol=1e-6)
    mixed_B = 2 * np.array([2, -1, -1, 2, 0, -1, 0, -1]) / 3
    advantage_BT = np.clip(supervision.scores.advantage_BT, -0.5, 0.5) + mixed_B[:, None]
    assert (np.abs(supervision.scores.advantage_BT) > 0.5).any(), "the clip no longer acts"
    loss, grads = jax.jit(
        jax.value_and_grad(functools.partial(tiny.naive_loss, tiny.STUDENT)),
        compiler_options=tiny.OPTIMISED,
    )(student, rollouts, advantage_BT.astype(np.float32))
    np.testing.assert_allclose(measured["loss"], loss, rtol=0, atol=1e-6)  # of terms of about 1
    assert_close(gradient(state), grads, 2e-6)


def test_a_second_update_on_the_same_rollouts_is_another_step_from_where_the_first_ended(
    student, teacher, rollouts, table, plain
):
    step = compiled(ADAM, train__updates_per_rollout=2)
    twice, measured, _ = step(start(student, ADAM), StepInputs(teacher, rollouts, table, KEY))
    once, first, _ = plain
    assert int(twice.step) == 1
    assert int(moments(twice).count) == 2
    assert largest_difference(twice.params, once.params) > 1e-4
    # At a ratio of 1 the clipped form has the gradient of the plain one, not its value.
    np.testing.assert_allclose(measured["grad_norm"], first["grad_norm"], rtol=1e-5)


def test_recomputing_the_students_side_gives_the_same_step(student, teacher, rollouts, table, plain):
    blank = rollouts.replace(
        logp_BT=np.zeros_like(rollouts.logp_BT),
        topk_BTK=np.zeros_like(rollouts.topk_BTK),
        topk_logp_BTK=np.zeros_like(rollouts.topk_logp_BTK),
    )
    step = compiled(ADAM, scoring__student="recompute")
    state, measured, supervision = step(start(student, ADAM), StepInputs(teacher, blank, table, KEY))
    np.testing.assert_allclose(supervision.scores.contrast_BT, plain[2].scores.contrast_BT, atol=1e-5)
    np.testing.assert_allclose(measured["loss"], plain[1]["loss"], rtol=1e-5)
    assert_close(gradient(state), gradient(plain[0]), 5e-6)


@pytest.mark.parametrize("overrides", [{"train__micro_batch": 2}, {"objective__name": "reverse_kl"}])
def test_frozen_parameters_stay_and_the_others_learn_what_they_would_have(
    overrides, student, teacher, rollouts, table
):
    frozen = overrides | {"train__frozen": ("embedding", "query")}
    optimizer = make_optimizer(settings(**frozen))
    step, whole = compiled(optimizer, **frozen), compiled(ADAM, **overrides)
    state, measured, _ = step(start(student, optimizer), StepInputs(teacher, rollouts, table, KEY))
    all_trained, _, _ = whole(start(student, ADAM), StepInputs(teacher, rollouts, table, KEY))
    np.testing.assert_array_equal(state.params["embedding"], student["embedding"])
    np.testing.assert_array_equal(state.params["blocks"]["query"], student["blocks"]["query"])
    assert (state.params["blocks"]["key"] != student["blocks"]["key"]).any()
    expected = gradient(all_trained)
    del expected["embedding"], expected["blocks"]["query"]
    assert_close(gradient(state), expected, 5e-6)
    np.testing.assert_allclose(measured["grad_norm"], optax.tree.norm(expected), rtol=1e-5)


@pytest.mark.parametrize("b1", [0.0, 0.9])
def test_the_optimizer_is_optaxs_adamw_and_keeps_no_first_moment_without_momentum(b1, student):
    o = {"learning_rate": 0.01, "b1": b1, "b2": 0.95, "eps": 1e-5, "weight_decay": 0.1}
    optimizer = make_optimizer(settings(**{f"optimizer__{key}": value for key, value in o.items()}))
    grads = jax.tree.map(lambda x: jnp.cos(40 * x), student)

    def three_updates(transform):
        params, state = student, transform.init(student)
        for factor in (1.0, -0.5, 2.0):
            updates, state = transform.update(optax.tree.scale(factor, grads), state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    params, state = jax.jit(three_updates, static_argnums=0)(optimizer)
    expected, _ = jax.jit(three_updates, static_argnums=0)(optax.adamw(**o))
    assert_close(params, expected, 1e-6)
    sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (params, state)]
    assert round(sizes[1] / sizes[0]) == (2 if b1 else 1)


def test_tokens_drawn_at_another_temperature_are_weighed_by_the_policys_own_probability(
    student, teacher, rollouts, table
):
    rng = np.random.default_rng(3)
    ratio_BT = np.exp(rng.normal(0, 0.8, rollouts.mask_BT.shape)).astype(np.float32)
    shaped = rollouts.replace(behaviour_logp_BT=rollouts.logp_BT - np.log(ratio_BT))
    step = compiled(ADAM, rollout__temperature=0.6, release__rule="none")
    state, measured, supervision = step(start(student, ADAM), StepInputs(teacher, shaped, table, KEY))
    weight_BT = np.where(rollouts.mask_BT, np.minimum(ratio_BT, 2), 0)
    advantage_BT = supervision.scores.advantage_BT
    naive = jax.jit(jax.value_and_grad(functools.partial(tiny.naive_loss, tiny.STUDENT)))
    _, grads = naive(student, rollouts, advantage_BT * weight_BT)
    assert_close(gradient(state), grads, 2e-6)
    tokens = rollouts.mask_BT.sum()
    np.testing.assert_allclose(measured["kl"], -(advantage_BT * weight_BT).sum() / tokens, rtol=1e-4)
    np.testing.assert_allclose(measured["importance_weight"], weight_BT.sum() / tokens, rtol=1e-5)
    capped = (rollouts.mask_BT & (ratio_BT > 2)).sum() / tokens
    assert capped > 0.1
    np.testing.assert_allclose(measured["importance_capped"], capped, rtol=1e-5)


def with_a_nan(rollouts):
    """An advantage that is not finite at the last token of the first response."""
    last = int(rollouts.mask_BT[0].sum()) - 1
    return rollouts.replace(logp_BT=jnp.asarray(rollouts.logp_BT).at[0, last].set(jnp.nan))


@pytest.mark.parametrize(
    "overrides",
    [{}, {"train__micro_batch": 2, "train__updates_per_rollout": 2, "scoring__student": "sampler"}],
)
def test_an_update_that_is_not_finite_is_skipped_and_leaves_every_bit_of_the_state(
    overrides, student, teacher, rollouts, table
):
    step = compiled(ADAM, release__rule="none", **overrides)
    first, measured, _ = step(start(student, ADAM), StepInputs(teacher, rollouts, table, KEY))
    assert measured["skipped_updates"] == 0
    second, measured, _ = step(first, StepInputs(teacher, with_a_nan(rollouts), table, KEY))
    assert measured["skipped_updates"] == overrides.get("train__updates_per_rollout", 1)
    assert not np.isfinite(measured["loss"])
    jax.tree.map(
        np.testing.assert_array_equal, (second.params, second.opt_state), (first.params, first.opt_state)
    )
    assert int(second.step) == 2
    third, measured, _ = step(second, StepInputs(teacher, rollouts, table, KEY))
    assert measured["skipped_updates"] == 0 and np.isfinite(measured["loss"])
    assert largest_difference(third.params, second.params) > 0


def test_moments_in_the_hosts_memory_stay_there_when_an_update_is_skipped(models, rollouts):
    job = prepare(settings(models, optimizer__memory="host", release__rule="none"))
    state, teacher_params, key = job.start(), job.teacher_params(), job.key(0)
    before = jax.device_get((state.params, state.opt_state))
    placed = sharding.put_batch(job.mesh, with_a_nan(rollouts))
    state, measured, _ = job.train_step(state, StepInputs(teacher_params, placed, job.table, key))
    assert measured["skipped_updates"] == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get((state.params, state.opt_state)), before)
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(state.opt_state) if x.ndim}
    assert kinds == {"pinned_host"}


def test_a_frozen_head_has_no_gradient_in_the_compiled_step(student, teacher, rollouts, table):
    """It would be a product of the head's own shape, summed over all positions."""
    size = {tiny.STUDENT.vocab_size, tiny.STUDENT.width}

    def products_of_the_heads_shape(**overrides):
        optimizer = make_optimizer(settings(**overrides))
        lowered = compiled(optimizer, **overrides).lower(
            start(student, optimizer), StepInputs(teacher, rollouts, table, KEY)
        )
        shapes = re.findall(r"= f32\[(\d+),(\d+)\]\S* dot\(", lowered.compile().as_text())
        return sum(set(map(int, shape)) == size for shape in shapes)

    assert products_of_the_heads_shape(train__micro_batch=2)
    assert not products_of_the_heads_shape(train__micro_batch=2, train__frozen=("embedding", "query"))


@pytest.fixture(scope="module")
def sharded(models, rollouts):
    """(job, its step compiled, state, teacher) on a mesh of 2 x 2 x 2 devices."""
    job = prepare(settings(models, mesh__data=2, mesh__fsdp=2, mesh__tensor=2))
    state, teacher_params = job.start(), job.teacher_params()
    lowered = job.train_step.lower(state, StepInputs(teacher_params, rollouts, job.table, KEY))
    return job, lowered.compile(), state, teacher_params


def test_a_mesh_of_eight_devices_computes_what_one_does(sharded, rollouts, plain):
    job, step, state, teacher_params = sharded
    placed = sharding.put_batch(job.mesh, rollouts)
    eight, many, released = step(
        jax.tree.map(jnp.copy, state), StepInputs(teacher_params, placed, job.table, KEY)
    )
    one, alone, supervision = plain
    np.testing.assert_allclose(many["loss"], alone["loss"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(many["grad_norm"], alone["grad_norm"], rtol=1e-5)
    np.testing.assert_array_equal(released.release.cut_B, supervision.release.cut_B)
    assert_close(gradient(eight), gradient(one), 1e-5)


def test_the_step_never_calls_the_host_and_reuses_the_states_memory(sharded):
    _, step, state, _ = sharded
    text = step.as_text().lower()
    for word in ("callback", "infeed", "outfeed", " send(", " recv("):
        assert word not in text, word
    shards = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state)]
    assert step.memory_analysis().alias_size_in_bytes >= sum(shards)


@pytest.mark.parametrize(("rule", "needed"), [("paper", False), ("none", False), ("prune_opd", True)])
def test_the_teachers_best_tokens_are_looked_for_only_by_a_rule_that_reads_their_overlap(
    student, teacher, rollouts, table, rule, needed
):
    step = compiled(ADAM) if rule == "paper" else compiled(ADAM, release__rule=rule)
    lowered = step.lower(start(student, ADAM), StepInputs(teacher, rollouts, table, KEY))
    assert ("/overlap/" in lowered.compile().as_text()) == needed


def by_hand(accepted):
    """Two rollouts of 4 and 20 tokens; the first is cut after 1 token if accepted."""
    mask_BT = np.arange(20) < np.array([[4], [20]])
    kept_BT = np.arange(20) < np.array([[1 if accepted else 4], [20]])
    advantage_BT = np.where(mask_BT, np.array([[-1.0], [-0.5]]), 0).astype(np.float32)
    zero_BT = np.zeros(mask_BT.shape, np.float32)
    zero_BTK = np.zeros((*mask_BT.shape, 4), np.float32)
    rollouts = tiny.Rollouts(
        tokens_BL=np.zeros((2, 22), np.int32),
        prompt_mask_BP=np.ones((2, 2), bool),
        mask_BT=mask_BT,
        logp_BT=zero_BT,
        behaviour_logp_BT=zero_BT,
        topk_BTK=np.zeros((2, 20, 4), np.int32),
        topk_logp_BTK=zero_BTK,
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
    scores = Scores(
        advantage_BT=advantage_BT,
        contrast_BT=2 * mask_BT.astype(np.float32),
        teacher_logp_BT=3 * advantage_BT,
        student_logp_BT=2 * advantage_BT,
        teacher_topk_logp_BTK=zero_BTK,
        student_topk_logp_BTK=zero_BTK,
        overlap_BT=zero_BT,
        teacher_stop_BT=np.where(mask_BT, 0.125, 9),
    )
    return jax.tree.map(jnp.asarray, (rollouts, Supervision(scores=scores, release=release)))


def test_the_numbers_of_a_case_worked_by_hand():
    measured = jax.device_get(measure(*by_hand(accepted=True)))
    expected = {
        "kl": (4 * 1.0 + 20 * 0.5) / 24,
        "advantage_std": np.std([-1.0] * 4 + [-0.5] * 20),
        "contrast": 2,
        "teacher_logp": -(4 * 3.0 + 20 * 1.5) / 24,
        "stop_probability": 0.25,
        "teacher_stop_probability": 0.125,
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
        np.testing.assert_allclose(abs(measured[bins].sum() / tokens), abs(measured[mean]), rtol=1e-5)


@pytest.mark.parametrize(
    "schedule, last",
    [("constant", 1.0), ("linear", 1 / 8), ("cosine", 0.5 + 0.5 * np.cos(7 / 8 * np.pi))],
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


def test_the_numbers_of_a_whole_step_stay_what_they_were(plain):
    state, measured, _ = plain
    pinned = {
        "kl": -0.188594,
        "loss": 1.855778,
        "grad_norm": 2.456572,
        "contrast": 0.595102,
        "gain": 8.077982,
        "supervised_tokens": 456,
        "parameters": 3441.352,
    }
    size = sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(state.params))
    got = {name: float((measured | {"parameters": size})[name]) for name in pinned}
    assert got == pytest.approx(pinned, rel=1e-5)
