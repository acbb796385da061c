"""The change point against float64 NumPy, ruptures, and what must not change it."""

import functools
import itertools
import re

import jax
import numpy as np
import pytest
import ruptures
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from opd_jax import release as rel

EPS = 1e-12
change_point = jax.jit(functools.partial(rel.change_point, eps=EPS))


def collectives(compiled: str) -> int:
    """How many collectives an executable's text has."""
    return len(re.findall(r" (?:all-|reduce-scatter|collective-)[a-z-]*\(", compiled))


def host_calls(compiled: str) -> list[str]:
    """What of an executable's text waits for the host."""
    words = ("callback", "infeed", "outfeed", " send(", " recv(", "host-")
    return [word for word in words if word in compiled.lower()]


def reference_bics(score_N):
    """The change-point test in float64: BIC0 and BIC1 for every tau (inf where it is no drop)."""
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


def test_segments_anywhere_in_a_row_are_weighed_as_if_they_stood_together():
    rng = np.random.default_rng(4)
    rows = [row for row in random_rows(rng, 2000, 16) if len(row) <= 16]
    score_BN, valid_BN = pad(rows)
    scattered_BN, holes_BN = np.full_like(score_BN, np.nan), np.zeros_like(valid_BN)
    for i, row in enumerate(rows):
        place = np.sort(rng.choice(24, len(row), replace=False))
        scattered_BN[i, place], holes_BN[i, place] = row, True
    together = change_point(score_BN, valid_BN, min_segments=4)
    apart = change_point(scattered_BN, holes_BN, min_segments=4)
    assert together.accepted_B.sum() > 300
    np.testing.assert_array_equal(apart.accepted_B, together.accepted_B)
    np.testing.assert_array_equal(apart.cut_B, together.cut_B)
    np.testing.assert_allclose(apart.gain_B, together.gain_B, rtol=1e-5, atol=3e-4)


def test_neither_the_batch_nor_the_padding_of_a_row_matters():
    rng = np.random.default_rng(5)
    rows = random_rows(rng, 24, 24)
    wide = change_point(*pad(rows, 2000), min_segments=4)
    order = rng.permutation(24)
    narrow = change_point(*pad([rows[i] for i in order]), min_segments=4)
    assert 0 < wide.accepted_B[:24].sum() < 24
    for name in ("accepted_B", "cut_B"):
        theirs_B = np.asarray(getattr(wide, name))[:24][order]
        np.testing.assert_array_equal(getattr(narrow, name)[:24], theirs_B, name)
    theirs_B = np.asarray(wide.gain_B)[:24][order]
    np.testing.assert_allclose(narrow.gain_B[:24], theirs_B, rtol=1e-5, atol=3e-4)


def test_eight_devices_need_neither_each_other_nor_the_host():
    rows = random_rows(np.random.default_rng(6), 2000, 24)
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    put = functools.partial(jax.device_put, device=NamedSharding(mesh, P("data")))
    sharded = [put(x) for x in pad(rows)]
    executable = change_point.lower(*sharded, min_segments=4).compile()
    compiled = executable.as_text()
    assert not collectives(compiled) and not host_calls(compiled)
    many, one = executable(*sharded, min_segments=4), change_point(*pad(rows), min_segments=4)
    assert len(many.cut_B.sharding.device_set) == 8
    np.testing.assert_array_equal(many.accepted_B, one.accepted_B)
    np.testing.assert_array_equal(many.cut_B, one.cut_B)
    np.testing.assert_allclose(many.gain_B, one.gain_B, rtol=1e-5, atol=3e-4)
