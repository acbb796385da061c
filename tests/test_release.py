"""The release rule against float64 NumPy, ruptures, and numbers worked by hand."""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ruptures
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from opd_jax import release as rel
from opd_jax.errors import UserError

EPS = 1e-12
change_point = jax.jit(functools.partial(rel.change_point, eps=EPS))


def config(rule="paper", min_segments=4, rescale="sequence"):
    return types.SimpleNamespace(rule=rule, min_segments=min_segments, rescale=rescale)


@functools.cache
def jitted_release(**fields):
    def run(contrast_BT, segment_BT, mask_BT):
        scores = types.SimpleNamespace(contrast_BT=contrast_BT)
        return rel.release(scores, segment_BT, mask_BT, config(**fields))

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


def reference_bics(score_N):
    """Step 5 of paper.md in float64: BIC0 and BIC1 for every tau (inf where it is no drop)."""
    score_N = np.asarray(score_N, np.float64)
    n = len(score_N)
    residual = ((score_N - score_N.mean()) ** 2).sum()
    bic0 = n * np.log((residual + EPS) / n) + np.log(n)
    # Row tau of a matrix is the split after tau segments; row 0 is no split.
    left_NN = np.tri(n, n, -1, dtype=bool)
    size_N = np.arange(n)
    mean1_N = np.where(left_NN, score_N, 0).sum(1) / np.maximum(size_N, 1)
    mean2_N = np.where(left_NN, 0, score_N).sum(1) / (n - size_N)
    residual_NN = score_N - np.where(left_NN, mean1_N[:, None], mean2_N[:, None])
    bic1_N = n * np.log(((residual_NN**2).sum(1) + EPS) / n) + 3 * np.log(n)
    # float64's mean of equal numbers is off by an ulp; equal sides must not count as a drop.
    is_drop_N = (size_N > 0) & (mean1_N - mean2_N > 1e-14 * (1 + np.abs(score_N).max()))
    bic1_N = np.where(is_drop_N, bic1_N, np.inf)
    return bic0, bic1_N


def pad(rows, width=24):
    """Rows in one of two compiled shapes: many of at most 24 segments, or few of at most 2000."""
    score_BN = np.full((48_000 // width, width), np.nan, np.float32)  # padding is never to be read
    valid_BN = np.zeros(score_BN.shape, bool)
    for i, row in enumerate(rows):
        score_BN[i, : len(row)], valid_BN[i, : len(row)] = row, True
    return score_BN, valid_BN


def assert_equal_to_reference(rows, width=24, min_segments=1):
    out = jax.tree.map(np.asarray, change_point(*pad(rows, width), min_segments=min_segments))
    for name in ("bic0_B", "bic1_B", "gain_B"):
        assert np.isfinite(getattr(out, name)).all(), name
    decided = 0
    for i, row in enumerate(rows):
        n = len(row)
        if n < 2:
            assert not out.accepted_B[i] and out.cut_B[i] == n
            continue
        bic0, bic1_N = reference_bics(row)
        gain = bic0 - bic1_N.min()
        if np.isfinite(gain):
            np.testing.assert_allclose(out.gain_B[i], gain, rtol=1e-5, atol=3e-4)
        if abs(gain) <= 1e-3:
            continue
        accepted = gain > 0 and n >= min_segments
        assert out.accepted_B[i] == accepted, (i, row, gain, out.gain_B[i])
        if not accepted:
            assert out.cut_B[i] == n
        elif np.sum(bic1_N <= bic1_N.min() + 1e-3) == 1:
            assert out.cut_B[i] == bic1_N.argmin(), (i, row, bic1_N)
            decided += 1
        else:  # several drops are equal to within float64's own noise: any of them
            assert bic1_N[out.cut_B[i]] <= bic1_N.min() + 1e-3, (i, row, bic1_N)
    return decided


def random_rows(rng, count, longest):
    """Steps, slopes, noise, ties, constants and offsets of scores as float32 numbers."""
    rows = []
    for i in range(count):
        n = int(rng.integers(0, longest + 1)) if i % 3 else int(rng.integers(0, 8))
        row = rng.normal(0, 10.0 ** rng.uniform(-6, 1), n)
        kind = i % 7
        if n and kind < 3:
            row[: rng.integers(0, n + 1)] += 10.0 ** rng.uniform(-3, 2)
        elif kind == 3:
            row = rng.integers(0, 3, n).astype(float)
        elif kind == 4:
            row = np.full(n, rng.uniform(0, 5))
            row[: rng.integers(0, n + 1)] += rng.choice([0.0, 1e-4, 2.0])
        elif kind == 5:
            row = np.log1p(rng.exponential(1.0, n) * np.exp(-np.arange(n) / max(n, 1)))
        if i % 5 == 0:
            row = row + rng.choice([10.0, 1e3, 1e4])
        rows.append(row.astype(np.float32))
    return rows


def test_change_point_equals_float64_on_ten_thousand_short_rows():
    rng = np.random.default_rng(0)
    decided = sum(
        assert_equal_to_reference(random_rows(rng, 2000, 24), 24, min_segments)
        for min_segments in (1, 2, 3, 4, 6)
    )
    assert decided > 2000


def test_change_point_equals_float64_on_rows_of_up_to_two_thousand_segments():
    rng = np.random.default_rng(1)
    assert assert_equal_to_reference(random_rows(rng, 24, 2000), 2000) > 5


@pytest.mark.parametrize("n", [0, 1, 2, 3])
def test_tiny_rows_are_finite_and_equal_to_float64(n):
    rows = itertools.product((0.0, 1e-7, 0.5, 3.0), repeat=n)
    assert_equal_to_reference([np.asarray(row, np.float32) for row in rows])


def test_a_split_that_explains_all_but_the_last_bits_keeps_its_gain():
    rows = []
    for noise in (1e-6, 1e-5, 1e-4):
        for n in (8, 16, 64, 100, 256, 600, 1024, 2000):
            row = np.random.default_rng(n).normal(0, noise, n)
            row[: n // 3] += 4.0
            rows.append(row.astype(np.float32))
    assert assert_equal_to_reference(rows, 2000) == len(rows) == 24


def test_a_slight_drop_in_two_thousand_segments_is_weighed_as_in_float64():
    rng = np.random.default_rng(2)
    rows = []
    for step in np.linspace(0.1, 0.25, 24):
        row = rng.normal(0, 1, 2000) + 5
        row[:700] += step
        rows.append(row.astype(np.float32))
    assert assert_equal_to_reference(rows, 2000) > 2


def test_ruptures_finds_the_same_cut_where_its_optimum_is_a_drop():
    rng = np.random.default_rng(3)
    rows = [row for row in random_rows(rng, 200, 24) if len(row) >= 4]
    out = change_point(*pad(rows), min_segments=1)
    compared = 0
    for i, row in enumerate(rows):
        row = row.astype(np.float64)
        bic0, bic1_N = reference_bics(row)
        tau = ruptures.Dynp(model="l2", min_size=1, jump=1).fit(row[:, None]).predict(1)[0]
        unique = np.sum(bic1_N <= bic1_N.min() + 1e-3) == 1
        if row[:tau].mean() > row[tau:].mean() and bic1_N.min() < bic0 - 1e-3 and unique:
            assert out.cut_B[i] == tau
            compared += 1
    assert compared > 30


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 2**12), min_size=0, max_size=16),
    st.integers(-(2**11), 2**11),
    st.integers(0, 8),
)
def test_a_constant_added_to_all_scores_and_gaps_between_them_change_nothing(values, shift, gap):
    row = np.asarray(values, np.float32) / 1024  # on a grid, so that adding the constant is exact
    score_BN, valid_BN = pad([row, row + np.float32(shift / 1024), row])
    score_BN[2], valid_BN[2] = np.roll(score_BN[2], gap), np.roll(valid_BN[2], gap)
    out = change_point(score_BN, valid_BN, min_segments=3)
    for field in (out.accepted_B, out.cut_B):
        assert field[0] == field[1] == field[2]
    np.testing.assert_allclose(out.gain_B[1:3], out.gain_B[0], rtol=1e-5, atol=1e-5)


def test_a_rise_is_never_accepted():
    out = change_point(*pad([[0, 0, 0, 0, 5, 5, 5, 5]]), min_segments=1)
    assert not out.accepted_B[0] and out.cut_B[0] == 8


def test_min_segments_guards_short_rows():
    rows = pad([[1.0, 0.5], [1.0, 0.5, 0.5], [1.0, 1.0, 0.5, 0.5]])
    assert change_point(*rows, min_segments=1).accepted_B[:3].tolist() == [True, True, True]
    assert change_point(*rows, min_segments=4).accepted_B[:3].tolist() == [False, False, True]


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
    """Steps 4 to 7 of paper.md for one rollout, sentence by sentence, in float64."""
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
    collectives = compiled.count(" all-reduce(") + compiled.count(" all-gather(")
    assert collectives <= (2 if rescale == "batch" else 0)
    alone = run_release(*batch, rescale=rescale)
    for name, value in vars(alone).items():
        np.testing.assert_allclose(np.asarray(getattr(out, name)), value, rtol=1e-6, err_msg=name)


def test_a_new_rule_is_one_function(monkeypatch):
    monkeypatch.setattr(rel, "RULES", dict(rel.RULES))

    @rel.rule("halve")
    def _halve(scores, segments, config, key):
        cut_B = jax.random.randint(key, segments.mask_BT.shape[:1], 1, 2)
        first_BT = segments.order_BT < cut_B[:, None]
        return rel.Proposal(jnp.where(first_BT, 1.0, 0.5), cut_B, cut_B > 0, cut_B * 0.0)

    scores = types.SimpleNamespace(contrast_BT=jnp.asarray([CONTRAST]))
    out = rel.release(
        scores,
        jnp.asarray([SEGMENT]),
        jnp.asarray([MASK]),
        config(rule="halve"),
        key=jax.random.key(0),
    )
    np.testing.assert_allclose(out.weight_BT[0, :4], np.array([1, 1, 0.5, 0.5]) * 9 / 5.5, rtol=1e-6)
    np.testing.assert_allclose(out.weight_BT.sum(), 9, rtol=1e-6)


@pytest.mark.parametrize("field", ["rule", "rescale"])
def test_an_unknown_name_is_refused_with_the_config_key(field):
    scores = types.SimpleNamespace(contrast_BT=jnp.asarray([CONTRAST]))
    with pytest.raises(UserError, match=rf"release\.{field}='papr'.*"):
        rel.release(scores, jnp.asarray([SEGMENT]), jnp.asarray([MASK]), config(**{field: "papr"}))
