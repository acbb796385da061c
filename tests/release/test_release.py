"""The release: masks, rescales and counts, against NumPy and numbers worked by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from opd_jax import release as rel
from opd_jax.config import default
from opd_jax.distill.types import Scores
from opd_jax.errors import UserError
from tests.release.test_change_point import collectives, host_calls, reference_bics


def config(**fields):
    c = default().release
    c.update(fields)
    return c


def scores_of(contrast_BT):
    """Scores that are 0 but for the margin."""
    zero_BT = jnp.zeros_like(contrast_BT)
    zero_BTK = jnp.stack([zero_BT] * 4, axis=-1)
    return Scores(zero_BT, contrast_BT, zero_BT, zero_BT, zero_BTK, zero_BTK, zero_BT, zero_BT)


@functools.cache
def jitted_release(**fields):
    def run(contrast_BT, segment_BT, mask_BT):
        return rel.release(scores_of(contrast_BT), segment_BT, mask_BT, config(**fields))

    return jax.jit(run)


def run_release(contrast_BT, segment_BT, mask_BT, **fields):
    """release() in one compiled shape: rows and positions beyond the given ones are padding."""
    rows, positions = np.shape(mask_BT)
    room = ((0, 8 - rows), (0, 48 - positions))
    out = jitted_release(**fields)(
        np.pad(np.asarray(contrast_BT, np.float32), room, constant_values=np.nan),
        np.pad(np.asarray(segment_BT, np.int32), room, constant_values=-1),
        np.pad(np.asarray(mask_BT, bool), room),
    )
    return jax.tree.map(
        lambda x: np.asarray(x)[:rows] if x.ndim == 1 else np.asarray(x)[:rows, :positions], out
    )


# Two sentences of 2 tokens with mean margin e^2 - 1, then three with mean margin e - 1: S = 2 2 1 1
# 1. n = 5, RSS0 = 6/5, RSS1(2) = 0: gain = 5 log((1.2 + 1e-12) / 1e-12) - 2 log 5.
HIGH, LOW = np.expm1(2.0), np.expm1(1.0)
CONTRAST = [HIGH - 1, HIGH + 1, HIGH, HIGH, LOW, LOW + 0.5, LOW - 0.5, LOW, LOW, 0, 0, 0]
SEGMENT = [0, 0, 1, 1, 2, 3, 3, 4, 4, -1, -1, -1]
MASK = [1] * 9 + [0] * 3


def test_the_worked_example_is_cut_after_its_second_sentence():
    out = run_release([CONTRAST], [SEGMENT], [MASK])
    assert out.accepted_B[0] and out.cut_B[0] == 2 and out.segments_B[0] == 5
    assert out.kept_B[0] == 4 and out.mask_BT[0].tolist() == [True] * 4 + [False] * 8
    np.testing.assert_allclose(out.weight_BT[0], [9 / 4] * 4 + [0] * 8, rtol=1e-6)
    # S is exact here only to float32, so RSS1 is 1e-13 at most: the gain is held to 1%.
    np.testing.assert_allclose(out.gain_B[0], 5 * np.log(1.2e12) - 2 * np.log(5), rtol=1e-2)
    assert out.segment_BT[0].tolist() == SEGMENT


def test_rescale_none_and_batch_in_the_worked_example():
    flat = [1.0] * 12
    args = ([CONTRAST, flat], [SEGMENT, SEGMENT], [MASK, MASK])
    none = run_release(*args, rescale="none")
    np.testing.assert_array_equal(none.weight_BT, [[1] * 4 + [0] * 8, [1] * 9 + [0] * 3])
    batch = run_release(*args, rescale="batch")
    np.testing.assert_allclose(batch.weight_BT, none.weight_BT * (18 / 13), rtol=1e-6)
    assert none.accepted_B.tolist() == [True, False] and none.cut_B.tolist() == [2, 5]


def test_rule_none_supervises_every_response_token():
    out = run_release([CONTRAST], [SEGMENT], [MASK], rule="none")
    np.testing.assert_array_equal(out.weight_BT[0], MASK)
    assert out.kept_B[0] == 9 and out.cut_B[0] == out.segments_B[0] == 5
    assert not out.accepted_B[0] and out.gain_B[0] == 0


@pytest.mark.parametrize("rule", ["none", "paper"])
@pytest.mark.parametrize("rescale", rel.RESCALES)
def test_rows_without_response_give_finite_zeros(rule, rescale):
    out = run_release(
        np.full((2, 6), np.nan), np.full((2, 6), -1), np.zeros((2, 6)), rule=rule, rescale=rescale
    )
    for name, value in vars(out).items():
        if name != "segment_BT":
            assert not value.any() or name == "gain_B", name
        assert np.isfinite(value).all(), name


def random_batch(seed, rollouts=8, positions=48):
    rng = np.random.default_rng(seed)
    length_B1 = rng.integers(0, positions + 1, (rollouts, 1))
    mask_BT = np.arange(positions) < length_B1
    segment_BT = np.cumsum(rng.random((rollouts, positions)) < 0.25, axis=1)
    contrast_BT = rng.exponential(1, (rollouts, positions)) * np.where(
        np.arange(positions) < rng.integers(0, positions, (rollouts, 1)), 3, 0.3
    )
    return contrast_BT * mask_BT, np.where(mask_BT, segment_BT, -1), mask_BT


def reference_release(contrast_T, segment_T, mask_T, min_segments):
    """The rule for one rollout, sentence by sentence, in float64: scores, change point, mask, rescale."""
    labels = np.unique(segment_T[mask_T])
    score_N = [np.log1p(contrast_T[mask_T & (segment_T == label)].mean()) for label in labels]
    kept_T = mask_T.copy()
    cut, accepted = len(labels), False
    if len(labels) >= max(min_segments, 2):
        bic0, bic1_N = reference_bics(score_N)
        if bic1_N.min() < bic0:
            cut, accepted = int(bic1_N.argmin()), True
            kept_T &= segment_T < labels[cut]
    return kept_T * (mask_T.sum() / max(kept_T.sum(), 1)), cut, accepted


def test_whole_batches_equal_the_reference_sentence_by_sentence():
    accepted = 0
    for seed in range(40):
        batch = random_batch(seed)
        out = run_release(*batch)
        for i, row in enumerate(zip(*batch, strict=True)):
            weight_T, cut, is_accepted = reference_release(*row, min_segments=4)
            np.testing.assert_allclose(out.weight_BT[i], weight_T, rtol=1e-6)
            assert out.cut_B[i] == cut and out.accepted_B[i] == is_accepted
            accepted += is_accepted
    assert 50 < accepted < 300


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.permutations(range(8)))
def test_a_rollout_does_not_depend_on_its_batch_or_its_padding(seed, order):
    contrast_BT, segment_BT, mask_BT = random_batch(seed)
    out = run_release(contrast_BT, segment_BT, mask_BT)
    noise_BT = np.where(mask_BT, contrast_BT, 1e6)  # what is outside the response is never read
    labels_BT = np.where(mask_BT, segment_BT, 7)
    other = run_release(noise_BT[order], labels_BT[order], mask_BT[order])
    for name in ("weight_BT", "mask_BT", "kept_B", "cut_B", "segments_B", "accepted_B", "gain_B"):
        np.testing.assert_array_equal(getattr(out, name)[order], getattr(other, name), name)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31))
def test_rescale_keeps_the_loss_mass(seed):
    batch = random_batch(seed)
    tokens_B = batch[2].sum(axis=1)
    out = run_release(*batch)
    np.testing.assert_allclose(out.weight_BT.sum(axis=1), tokens_B, rtol=1e-5)
    out = run_release(*batch, rescale="batch")
    np.testing.assert_allclose(out.weight_BT.sum(), tokens_B.sum(), rtol=1e-5)
    assert np.all((out.weight_BT > 0) == out.mask_BT) and not np.any(out.mask_BT & ~batch[2])


def test_tokens_outside_the_mask_in_the_middle_are_stepped_over():
    contrast_BT, segment_BT, mask_BT = (np.asarray([x]) for x in (CONTRAST, SEGMENT, MASK))
    holes = [0, 2, 4, 4, 9]
    wide = [
        np.insert(x, holes, fill, axis=1) for x, fill in ((contrast_BT, 50.0), (segment_BT, 0), (mask_BT, 0))
    ]
    out = run_release(*wide)
    assert out.cut_B[0] == 2 and out.segments_B[0] == 5 and out.kept_B[0] == 4
    plain = run_release(contrast_BT, segment_BT, mask_BT)
    kept = np.asarray(wide[2][0], bool)
    np.testing.assert_array_equal(out.weight_BT[0, kept], plain.weight_BT[0, MASK.index(1) : 9])


@pytest.mark.parametrize("rescale", ["sequence", "batch"])
def test_eight_devices_give_the_same_result_as_one(rescale):
    batch = random_batch(5)
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    put = functools.partial(jax.device_put, device=NamedSharding(mesh, P("data")))
    types_ = (jnp.float32, jnp.int32, bool)
    sharded = [put(np.asarray(x, dtype)) for x, dtype in zip(batch, types_, strict=True)]
    executable = jitted_release(rescale=rescale).lower(*sharded).compile()
    out, compiled = executable(*sharded), executable.as_text()
    assert len(out.weight_BT.sharding.device_set) == 8
    # Rows stay where they are; only the batch rescale asks the other devices, for two sums.
    assert collectives(compiled) in ((1, 2) if rescale == "batch" else (0,))
    assert not host_calls(compiled)
    alone = run_release(*batch, rescale=rescale)
    for name, value in vars(alone).items():
        np.testing.assert_allclose(np.asarray(getattr(out, name)), value, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("field", ["rule", "rescale"])
def test_an_unknown_name_is_refused_with_the_config_key(field):
    scores = scores_of(jnp.asarray([CONTRAST]))
    with pytest.raises(UserError, match=rf"release\.{field}='papr'.*"):
        rel.release(scores, jnp.asarray([SEGMENT]), jnp.asarray([MASK]), config(**{field: "papr"}))
