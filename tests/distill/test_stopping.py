"""Rollouts that stop: the teacher reads along, its scores are scoring's, and only certain rows end."""

import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from opd_jax.distill import StepInputs, rollout, scoring, stopping, train_step
from opd_jax.parallel import sharding
from opd_jax.progress import Progress
from opd_jax.release import release
from opd_jax.release.segments import SegmentTable
from opd_jax.run import Key, prepare
from opd_jax.train import train
from tests import tiny

Q, P, T, N = 4, 9, 40, 2
PAIR = (tiny.STUDENT, tiny.TEACHER)
NEVER = 1e9


@functools.cache
def prompts():
    ids = np.random.default_rng(0).integers(33, 120, (Q, P)).astype(np.int32)
    mask = np.arange(P)[None] >= np.array([0, 3, 5, 1])[:, None]
    return np.where(mask, ids, tiny.PAD).astype(np.int32), mask


@functools.cache
def table():
    return SegmentTable.from_tokenizer(tiny.tokenizer(), "fixed:3")


def config(**changed):
    usual = {"rule": "paper", "rescale": "sequence", "min_segments": 4}
    return SimpleNamespace(
        **usual | {"stop_gain": 0.5, "stop_after": 2, "stop_audit": 0.3, "stop_cache_dtype": "auto"} | changed
    )


@functools.cache
def judged(gain: float, audit: float = 0.3, block: int = 7, keep: str | None = None, **how):
    sampling = rollout.Sampling(max_tokens=T, samples=N, **how)
    rule = config(stop_gain=gain, stop_audit=audit)

    @jax.jit
    def run(student, teacher, tokens_QP, mask_QP):
        judge = stopping.Judge(PAIR[1], teacher, table(), rule, scoring.Scoring(4, keep=keep), 0, block)
        key = jax.random.key(1)
        return stopping.sample_and_score((PAIR[0], student), (tokens_QP, mask_QP), key, sampling, judge)

    return run(tiny.student_params(), tiny.teacher_params(), *prompts())


@functools.cache
def plain():
    sampling = rollout.Sampling(max_tokens=T, samples=N)
    sample = jax.jit(rollout.sample, static_argnums=(0, 5))
    return sample(PAIR[0], tiny.student_params(), *prompts(), jax.random.key(1), sampling)


@pytest.mark.parametrize(
    ("gain", "block", "how"), [(NEVER, 7, {}), (0.5, 7, {"halvings": 2}), (0.5, 64, {"slots": 4})]
)
def test_what_is_written_is_a_prefix_of_what_would_be_and_is_scored_as_scoring_does(gain, block, how):
    r = judged(gain, block=block, keep="logits", **how)
    scores, stops = r.scores, r.stops
    on_BT, whole_BT = np.asarray(r.mask_BT), np.asarray(plain().mask_BT)
    assert (on_BT <= whole_BT).all() and (stops.stopped_B == (on_BT.sum(1) < whole_BT.sum(1))).all()
    np.testing.assert_array_equal(r.response_BT[on_BT], plain().response_BT[on_BT])
    want = jax.jit(
        lambda r: scoring.score(PAIR[1], tiny.teacher_params(), r, scoring.Scoring(4, keep="logits"))
    )(r)
    hidden = (np.where(on_BT[..., None], s.targets.hidden_BTD, 0) for s in (scores, want))
    np.testing.assert_allclose(*hidden, atol=2e-5)
    for name, value in vars(want.replace(targets=None, computed=None, teacher_load=None)).items():
        if value is not None:
            np.testing.assert_allclose(getattr(scores, name), value, atol=2e-5, err_msg=name)


def test_a_row_ends_at_the_first_block_at_which_its_release_is_certain():
    """Against the rule on every prefix of whole blocks, without the sentence that may go on."""
    r = judged(0.5)
    stops = r.stops
    whole = scoring.score(PAIR[1], tiny.teacher_params(), plain(), scoring.Scoring(4))
    segment_BT = np.broadcast_to(np.arange(T) // 3, (Q * N, T))
    certain = {}
    for t in range(7, T + 7, 7):
        shown_BT = np.asarray(plain().mask_BT) & (np.arange(T) < t)
        length_B = shown_BT.sum(axis=1)
        ended_BT = shown_BT & (segment_BT < ((length_B - 1) // 3)[:, None])
        found = release(whole, jnp.asarray(segment_BT), jnp.asarray(ended_BT), config())
        enough = found.accepted_B & (found.gain_B > 0.5) & (found.segments_B - found.cut_B >= 2)
        going = np.asarray(plain().mask_BT.sum(axis=1)) > t
        for b in np.flatnonzero(np.asarray(enough) & going):
            certain.setdefault(int(b), (min(t, T), int(found.kept_B[b])))
    assert certain, "no row is certain"
    want = np.array([certain.get(b, (0, 0)) for b in range(Q * N)])
    np.testing.assert_array_equal(np.stack([stops.certain_B, stops.kept_B], axis=1), want)
    stopped_B = (want[:, 0] > 0) & ~np.asarray(stops.audit_B)
    np.testing.assert_array_equal(stops.stopped_B, stopped_B)
    np.testing.assert_array_equal(np.asarray(r.mask_BT.sum(axis=1))[stopped_B], want[stopped_B, 0])


@pytest.mark.parametrize(
    ("spec", "step", "tokens"),
    [("length:5", 3, {5}), ("grow:4:12:5", 0, {4}), ("grow:4:12:5", 2, {8}), ("grow:4:12:5", 9, {12})],
)
def test_rows_stop_at_a_length_unless_they_are_audited(spec, step, tokens):
    got, want = limited(spec, step), plain()
    whole_B, length_B = (np.asarray(r.mask_BT.sum(axis=1)) for r in (want, got))
    stopped_B, audit_B = np.asarray(got.stops.stopped_B), np.asarray(got.stops.audit_B)
    assert audit_B.any() and not (audit_B & stopped_B).any() and stopped_B.any()
    assert set(length_B[stopped_B]) == tokens
    np.testing.assert_array_equal(length_B[~stopped_B], whole_B[~stopped_B])
    on_BT = np.asarray(got.mask_BT)
    np.testing.assert_array_equal(got.response_BT[on_BT], want.response_BT[on_BT])
    assert not np.asarray(got.finished_B)[stopped_B].any() and got.scores is None


def test_random_lengths_are_spread_over_their_range_and_follow_from_the_rows_keys():
    limit = stopping.parse("random:4:12")
    draws = rollout.draws(jax.random.key(0), 600, rollout.Sampling(max_tokens=T))
    found_B = np.asarray(limit.draws(draws, rollout.Sampling(max_tokens=T), 0).limit_B)
    assert (found_B.min(), found_B.max()) == (4, 12)
    assert stats.chisquare(np.bincount(found_B)[4:]).pvalue > 0.01
    few = rollout.Draws(*(x[100:200] for x in draws))
    np.testing.assert_array_equal(
        limit.draws(few, rollout.Sampling(max_tokens=T), 0).limit_B, found_B[100:200]
    )


@functools.cache
def limited(spec: str, step: int):
    sampling = rollout.Sampling(max_tokens=T, samples=N)
    limit = stopping.parse(spec, audit=0.3)

    def run(params, tokens_QP, mask_QP):
        draws = limit.draws(rollout.draws(jax.random.key(1), Q, sampling), sampling, step)
        found = rollout.sample(PAIR[0], params, tokens_QP, mask_QP, draws, sampling)
        return limit.noted(found, draws, sampling)

    return jax.jit(run)(tiny.student_params(), *prompts())


# Settings with which rows of the tiny models stop.
EAGER = {
    "release.stop": "rule",
    "release.stop_block": 4,
    "release.stop_gain": 0.0,
    "release.stop_after": 1,
    "release.stop_audit": 0.2,
    "release.min_segments": 3,
    "segments.kind": "fixed:2",
    "rollout.max_tokens": 24,
}


@pytest.mark.parametrize("cache_dtype", ["auto", "int8"])
def test_a_run_that_stops_rows_goes_on_after_an_interruption_to_the_last_bit(models, tmp_path, cache_dtype):
    """With an int8 cache, the step has the student read what it wrote, and leaves the teacher's scores."""
    job = prepare(tiny.config(models, **EAGER, **{"rollout.cache_dtype": cache_dtype, "train.steps": 4}))
    whole = train(job, tmp_path / "whole")
    told = tiny.told_to_stop(job, 2)
    with pytest.raises(SystemExit):
        train(told, tmp_path / "cut")
    jax.tree.map(np.testing.assert_array_equal, train(job, tmp_path / "cut"), whole)
    records = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").open()]
    steps = [r for r in records if r["kind"] == "train"]
    assert sum(r["stopped_share"] for r in steps) > 0
    for r in steps:
        assert r["stopped_share"] + r["limit_share"] + r["finished_share"] == pytest.approx(1)
        assert (r["audit_agreement"] is None) == (r["audit_rows"] == 0)
    rows = [json.loads(line) for line in (tmp_path / "whole" / "rollouts.jsonl").open()]
    stopped = [row for row in rows if row["stopped"]]
    assert stopped and all(row["tokens"] == row["certain_tokens"] and not row["audit"] for row in stopped)
    assert all(row["accepted"] for row in stopped), "the step cuts where the sampler did"


def test_what_a_step_keeps_of_a_stopped_row_is_what_was_certain(models):
    """And its scores, made while sampling, give the loss that scoring would."""
    job = prepare(tiny.config(models, **EAGER))
    state, teacher_params = job.start(), job.teacher_params()
    _, rollouts = job.training_draw(teacher_params)(
        state.params, next(job.training_batches()), state.step, Progress()
    )
    inputs = StepInputs(teacher_params, rollouts, job.table, job.key(Key.RELEASE))
    later = inputs.replace(rollouts=rollouts.replace(scores=None))
    supervise = jax.jit(
        lambda params, inputs: train_step.supervise(job.student, job.teacher, job.config, params, 0, inputs)
    )
    scores, released, _ = supervise(state.params, inputs)
    stopped_B = np.asarray(rollouts.stops.stopped_B)
    assert stopped_B.any()
    np.testing.assert_array_equal(
        np.asarray(released.kept_B)[stopped_B], np.asarray(rollouts.stops.kept_B)[stopped_B]
    )
    sums = np.asarray(released.weight_BT.sum(axis=1))
    read = np.asarray(released.segments_B) * 2  # tokens of whole sentences
    np.testing.assert_allclose(sums[stopped_B], read[stopped_B], rtol=1e-5)
    assert not np.asarray(released.weight_BT)[~np.asarray(rollouts.mask_BT)].any()
    again, _, _ = supervise(state.params, later)
    np.testing.assert_allclose(scores.advantage_BT, again.advantage_BT, atol=2e-5)


def test_audited_rows_are_written_to_their_ends_and_are_a_share_of_all():
    r = judged(0.5, audit=1.0)
    stops = r.stops
    assert np.asarray(stops.audit_B).all() and not np.asarray(stops.stopped_B).any()
    np.testing.assert_array_equal(r.mask_BT, plain().mask_BT)
    assert (np.asarray(stops.certain_B) > 0).any(), "what would have been is noted"


def test_a_mesh_stops_what_one_device_stops():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    want = judged(0.5, halvings=1)
    sampling = rollout.Sampling(max_tokens=T, samples=N, halvings=1)

    def run(student, teacher, tokens_QP, mask_QP):
        judge = stopping.Judge(PAIR[1], teacher, table(), config(), scoring.Scoring(4), 0, 7)
        key = jax.random.key(1)
        return stopping.sample_and_score((PAIR[0], student), (tokens_QP, mask_QP), key, sampling, judge)

    rows = sharding.batch(mesh)
    program = jax.jit(sharding.on(mesh, run), in_shardings=(None, None, rows, rows), out_shardings=rows)
    got = program(tiny.student_params(), tiny.teacher_params(), *prompts())
    np.testing.assert_array_equal(got.tokens_BL, want.tokens_BL)
    jax.tree.map(np.testing.assert_array_equal, got.stops, want.stops)
    np.testing.assert_allclose(got.scores.advantage_BT, want.scores.advantage_BT, atol=1e-4)
