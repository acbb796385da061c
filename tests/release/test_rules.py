"""Every rule's weights: pinned to numbers by hand, against NumPy, and what must hold for all of them."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from scipy import special

from opd_jax import release as rel
from opd_jax.config import default
from opd_jax.distill.types import Scores
from opd_jax.release import rules
from tests.release.test_change_point import collectives, host_calls, reference_bics

B, T, K = 8, 48, 4
HIGH, LOW = np.expm1(2.0), np.expm1(1.0)  # means whose segment scores are 2 and 1
BUILT_IN = tuple(rules.RULES)
DRAWING = ("shuffled", "random")
EVERY_RULE = pytest.mark.parametrize("rule", BUILT_IN)
FIELDS = {
    "prune_opd": {"prune_drop": 0.25, "prune_base": 0.0},
    "ta_opd": {"ta_share": 0.3},
    "fopd": {"fopd_start": 5, "fopd_end": 40, "fopd_steps": 8},
    "esr": {"esr_tokens": 7},
    "popd": {"popd_start": 0.2, "popd_steps": 8},
    "kat": {"kat_kl": 0.35, "kat_sentences": 2},
}


def config(rule, **fields):
    c = default().release
    c.update({"rule": rule} | FIELDS.get(rule, {}) | fields)
    return c


@functools.cache
def jitted(rule, **fields):
    """Compiled (scores, segment_BT, mask_BT, step, key) -> {rescale: Release}."""

    def run(scores, segment_BT, mask_BT, step, key):
        return {
            rescale: rel.release(
                scores,
                segment_BT,
                mask_BT,
                config(rule, rescale=rescale, **fields),
                step=step,
                key=key,
            )
            for rescale in rel.RESCALES
        }

    return jax.jit(run)


def run(rule, batch, step=0, seed=0, **fields):
    """{rescale: Release} in one compiled shape: rows and positions beyond the given ones are padding."""
    rows, positions = np.shape(batch["mask_BT"])

    def pad(x, fill, dtype):
        x = np.asarray(x, dtype)
        room = [(0, B - rows), (0, T - positions)] + [(0, 0)] * (x.ndim - 2)
        return np.pad(x, room, constant_values=fill)

    def score(name):
        nothing = np.zeros((rows, positions, K) if name.endswith("K") else (rows, positions))
        return pad(batch.get(name, nothing), np.nan, np.float32)

    scores = {name: score(name) for name in Scores.__dataclass_fields__}
    segment_BT = pad(batch.get("segment_BT", np.zeros((rows, positions))), -1, np.int32)
    mask_BT = pad(batch["mask_BT"], False, bool)
    out = jitted(rule, **fields)(Scores(**scores), segment_BT, mask_BT, np.int32(step), jax.random.key(seed))
    return jax.tree.map(
        lambda x: np.asarray(x)[:rows] if x.ndim == 1 else np.asarray(x)[:rows, :positions], out
    )


def lengths(*length, width=12):
    return np.arange(width) < np.array(length)[:, None]


def random_batch(seed, rows=B, positions=T):
    """Responses of any length, none included, in sentences; every score is random, and 0 outside."""
    rng = np.random.default_rng(seed)
    mask_BT = np.arange(positions) < rng.integers(0, positions + 1, (rows, 1))
    drop_BT = np.arange(positions) < rng.integers(0, positions, (rows, 1))
    scale_BT = np.where(drop_BT, 3, 0.3)
    logp_BTK = np.log(rng.dirichlet(np.ones(K + 1), (2, rows, positions)))[..., :K]
    batch = {
        "contrast_BT": rng.exponential(1, (rows, positions)) * scale_BT,
        "advantage_BT": rng.normal(0, 1, (rows, positions)) * scale_BT,
        "student_topk_logp_BTK": logp_BTK[0],
        "teacher_topk_logp_BTK": logp_BTK[1],
        "overlap_BT": rng.integers(0, K + 1, (rows, positions)) / K,
    }
    batch = {
        name: np.where(mask_BT[..., None] if name.endswith("K") else mask_BT, x, 0).astype(np.float32)
        for name, x in batch.items()
    }
    segment_BT = np.cumsum(rng.random((rows, positions)) < 0.25, axis=1)
    return batch | {"segment_BT": np.where(mask_BT, segment_BT, -1), "mask_BT": mask_BT}


# ---- By hand.


def test_a_prefix_in_tokens_keeps_that_many_of_each_response():
    segment = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    batch = {"mask_BT": lengths(5, 2, 0, 12), "segment_BT": [segment] * 4}
    out = run("prefix", batch, prefix_tokens=3)["none"]
    np.testing.assert_array_equal(out.weight_BT, lengths(3, 2, 0, 3))
    assert out.accepted_B.tolist() == [True, False, False, True]
    assert out.cut_B.tolist() == [2, 1, 0, 2] and out.segments_B.tolist() == [3, 1, 0, 6]


def test_a_prefix_as_a_share_is_rounded_and_keeps_at_least_one_token():
    batch = {"mask_BT": lengths(10, 1, 4, 8, 0)}
    out = run("prefix", batch, prefix_fraction=0.3)  # of 10, 1, 4, 8: 3, 0.3, 1.2, 2.4
    np.testing.assert_array_equal(out["none"].weight_BT, lengths(3, 1, 1, 2, 0))
    np.testing.assert_allclose(out["sequence"].weight_BT[0, :3], 10 / 3, rtol=1e-6)
    np.testing.assert_allclose(out["batch"].weight_BT[:4, 0], 23 / 7, rtol=1e-6)


def test_fopds_prefix_grows_linearly_with_the_step_and_then_stays():
    batch = {"mask_BT": lengths(12)}
    kept = [
        run("fopd", batch, step, fopd_start=2, fopd_end=10, fopd_steps=5)["none"].kept_B[0]
        for step in (0, 1, 2, 3, 4, 5, 1000)
    ]
    assert kept == [2, 4, 6, 8, 10, 10, 10]


def test_esr_keeps_a_number_of_tokens():
    out = run("esr", {"mask_BT": lengths(5, 2, 0, 12)}, esr_tokens=3)["none"]
    np.testing.assert_array_equal(out.weight_BT, lengths(3, 2, 0, 3))
    assert out.accepted_B.tolist() == [True, False, False, True]


def test_popds_horizon_grows_from_a_share_of_the_limit_to_all_of_it():
    batch = {"mask_BT": lengths(48, 10, width=T)}
    kept = [
        run("popd", batch, step, popd_start=0.25, popd_steps=4)["none"].kept_B.tolist()
        for step in (0, 1, 2, 3, 9)
    ]
    assert kept == [[12, 10], [24, 10], [36, 10], [48, 10], [48, 10]]


def test_kat_ends_where_the_models_agree_for_some_sentences_in_a_row():
    same, other = [0.5, 0.3, 0.1, 0.06], [0.1, 0.8, 0.05, 0.04]  # KL of 0 and of 0.66 nats
    low, high = [same, same], [other, other]
    mixed = [same, other]  # a mean of 0.33
    rows = [
        high + low + high + low + low + high,  # one low sentence is not enough
        low + low + high + high + high + high,
        high + mixed + low + high + low + mixed,
        high * 6,
    ]
    batch = {
        "mask_BT": lengths(12, 12, 12, 12),
        "segment_BT": [np.repeat(np.arange(6), 2)] * 4,
        "student_topk_logp_BTK": np.log([[same] * 12] * 4),
        "teacher_topk_logp_BTK": np.log(rows),
    }
    out = run("kat", batch, kat_kl=0.1, kat_sentences=2)["none"]
    np.testing.assert_array_equal(out.weight_BT, lengths(6, 0, 12, 12))
    assert out.cut_B.tolist() == [3, 0, 6, 6] and out.accepted_B.tolist() == [True, True, False, False]
    out = run("kat", batch, kat_kl=0.4, kat_sentences=2)["none"]
    np.testing.assert_array_equal(out.weight_BT, lengths(6, 0, 2, 12))
    out = run("kat", batch, kat_kl=0.1, kat_sentences=1)["none"]
    np.testing.assert_array_equal(out.weight_BT, lengths(2, 0, 4, 12))


# Five sentences of two tokens but for the third, with scores 2 2 1 1 1, and a row with no drop.
SEGMENT = [0, 0, 1, 1, 2, 3, 3, 4, 4]
MARGIN = [HIGH - 1, HIGH + 1, HIGH, HIGH, LOW, LOW + 0.5, LOW - 0.5, LOW, LOW]


def test_the_suffix_is_what_the_papers_rule_releases():
    batch = {
        "mask_BT": lengths(9, 9, width=9),
        "segment_BT": [SEGMENT, SEGMENT],
        "contrast_BT": [MARGIN, [1.0] * 9],
    }
    paper, suffix = run("paper", batch), run("suffix", batch)
    assert paper["none"].accepted_B.tolist() == suffix["none"].accepted_B.tolist() == [True, False]
    np.testing.assert_array_equal(suffix["none"].weight_BT, [[0] * 4 + [1] * 5, [0] * 9])
    np.testing.assert_array_equal(suffix["none"].mask_BT, ~paper["none"].mask_BT)
    assert suffix["none"].cut_B.tolist() == [3, 0]
    np.testing.assert_allclose(suffix["sequence"].weight_BT[0], [0] * 4 + [9 / 5] * 5, rtol=1e-6)
    np.testing.assert_allclose(suffix["batch"].weight_BT[0], [0] * 4 + [18 / 5] * 5, rtol=1e-6)
    np.testing.assert_array_equal(suffix["none"].gain_B, paper["none"].gain_B)


def test_the_advantages_spread_not_its_size_is_the_signal():
    segment = np.repeat(np.arange(6), 2)
    spread = np.repeat([HIGH, HIGH, LOW, LOW, LOW, LOW], 2) * np.tile([-1, 1], 6)
    size = np.repeat([9.0, 9.0, 1.0, 1.0, 1.0, 1.0], 2)
    batch = {
        "mask_BT": lengths(12, 12),
        "segment_BT": [segment, segment],
        "advantage_BT": [spread - 3, size],
    }
    out = run("advantage_std", batch)["none"]
    assert out.accepted_B.tolist() == [True, False] and out.cut_B.tolist() == [2, 6]
    np.testing.assert_array_equal(out.weight_BT, lengths(4, 12))


def test_iw_opd_weighs_by_the_share_of_the_drift_still_to_come():
    batch = {
        "mask_BT": lengths(4, 2, width=4),
        "advantage_BT": [[1.0, -2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]],
    }
    out = run("iw_opd", batch, iw_gamma=0.5)
    # |A| before each token: 0, 1, 3, 3 of 4.
    np.testing.assert_allclose(
        out["none"].weight_BT, [[1.5, 1.375, 1.125, 1.125], [1.5, 1.5, 0, 0]], rtol=1e-6
    )
    np.testing.assert_allclose(out["sequence"].weight_BT[0], np.array([12, 11, 9, 9]) * 4 / 41, rtol=1e-6)
    np.testing.assert_array_equal(out["none"].mask_BT, batch["mask_BT"])
    assert out["none"].kept_B.tolist() == [4, 2] and not out["none"].accepted_B.any()


def test_prune_opd_takes_a_step_down_at_each_drifted_token():
    batch = {
        "mask_BT": lengths(6, 3, width=6),
        "overlap_BT": [[1, 0.5, 0.75, 0.5, 0.25, 1], [0.25, 1, 1, 0, 0, 0]],
    }
    out = run("prune_opd", batch, prune_overlap=0.7, prune_drop=0.25, prune_base=0.5)["none"]
    want_BT = [[1.5, 1.25, 1.25, 1.0, 0.75, 0.75], [1.25, 1.25, 1.25, 0, 0, 0]]
    np.testing.assert_allclose(out.weight_BT, want_BT, rtol=1e-6)
    assert out.kept_B.tolist() == [6, 3] and not out.accepted_B.any()
    out = run("prune_opd", batch, prune_overlap=0.7, prune_drop=0.5, prune_base=0.0)["none"]
    want_BT = [[1, 0.5, 0.5, 0, 0, 0], [0.5, 0.5, 0.5, 0, 0, 0]]
    np.testing.assert_allclose(out.weight_BT, want_BT, rtol=1e-6)
    assert out.kept_B.tolist() == [3, 3] and out.accepted_B.tolist() == [True, False]


def test_ta_opd_takes_what_is_both_off_and_within_reach():
    student = [0.5, 0.3, 0.1, 0.06]
    agrees, far = [0.5, 0.3, 0.1, 0.06], [0.002, 0.002, 0.002, 0.03]
    learnable, unsure = [0.1, 0.8, 0.05, 0.04], [0.2, 0.3, 0.1, 0.05]
    rows = np.log([[agrees, far, learnable, unsure, agrees]])
    batch = {
        "mask_BT": lengths(5, width=5),
        "student_topk_logp_BTK": np.log([[student] * 5]),
        "teacher_topk_logp_BTK": rows,
    }
    # KL of the renormalised candidates: 0, 1.9, 0.6, 0.1, 0; mass: 0.96, 0.04, 0.99, 0.65, 0.96.
    for share, want in ((0.2, [0, 0, 1, 0, 0]), (0.4, [0, 0, 1, 1, 0]), (1.0, [1] * 5)):
        out = run("ta_opd", batch, ta_share=share)["none"]
        np.testing.assert_array_equal(out.weight_BT, [want], err_msg=str(share))
        assert out.accepted_B[0] == (share < 1)


def test_equal_tokens_are_taken_from_the_front():
    batch = {"mask_BT": lengths(10, 3)}
    out = run("ta_opd", batch, ta_share=0.3)["none"]
    np.testing.assert_array_equal(out.weight_BT, lengths(3, 1))


# ---- Against NumPy.


def reference_drop(score_of, batch, row, min_segments=4):
    """How many segments a drop of log(1 + score) keeps, and their labels; float64."""
    mask_T, segment_T = batch["mask_BT"][row], batch["segment_BT"][row]
    labels = np.unique(segment_T[mask_T])
    score_N = [np.log1p(score_of(row, mask_T & (segment_T == label))) for label in labels]
    if len(labels) >= min_segments:
        bic0, bic1_N = reference_bics(score_N)
        if bic1_N.min() < bic0:
            return int(bic1_N.argmin()), labels
    return len(labels), labels


def whole(logp_NK):
    """Probabilities of the candidates and of the rest."""
    p_NK = np.exp(logp_NK.astype(np.float64))
    return np.append(p_NK, 1 - p_NK.sum(axis=-1, keepdims=True), axis=-1)


def reference_weights(rule, batch, row, step):
    """float64 weights of one response's tokens, before the rescale."""
    mask_T = batch["mask_BT"][row]
    on = np.flatnonzero(mask_T)
    n, c, weight_T = len(on), config(rule), np.zeros(T)
    if rule in ("paper", "suffix", "advantage_std"):
        signal, reduce = ("advantage_BT", np.std) if rule == "advantage_std" else ("contrast_BT", np.mean)

        def score_of(row, here_T):
            return reduce(batch[signal][row, here_T].astype(np.float64))

        cut, labels = reference_drop(score_of, batch, row)
        kept_T = np.isin(batch["segment_BT"][row], labels[:cut])
        weight_T[mask_T & (kept_T ^ (rule == "suffix"))] = 1
    elif rule == "none":
        weight_T[on] = 1
    elif rule == "prefix":
        weight_T[on[: max(round(c.prefix_fraction * n), 1)]] = 1
    elif rule == "fopd":
        grown = c.fopd_start + (c.fopd_end - c.fopd_start) * min(step / (c.fopd_steps - 1), 1)
        weight_T[on[: round(grown)]] = 1
    elif rule == "esr":
        weight_T[on[: c.esr_tokens]] = 1
    elif rule == "popd":
        share = c.popd_start + (1 - c.popd_start) * min(step / (c.popd_steps - 1), 1)
        weight_T[on[: max(round(share * T), 1)]] = 1
    elif rule == "kat":
        p_2NK = (whole(batch[f"{model}_topk_logp_BTK"][row, on]) for model in ("student", "teacher"))
        kl_T = np.zeros(T)
        kl_T[on] = special.rel_entr(*p_2NK).sum(axis=-1)
        labels = np.unique(batch["segment_BT"][row][mask_T])
        here = [mask_T & (batch["segment_BT"][row] == label) for label in labels]
        low = [kl_T[at].mean() < c.kat_kl for at in here]
        m = c.kat_sentences
        runs = [i for i in range(len(low) - m + 1) if all(low[i : i + m])]
        for at in here[: runs[0] if runs else len(here)]:
            weight_T[at] = 1
    elif rule == "iw_opd":
        size = np.abs(batch["advantage_BT"][row, on].astype(np.float64))
        weight_T[on] = 1 + c.iw_gamma * (1 - (np.cumsum(size) - size) / size.sum())
    elif rule == "prune_opd":
        drifted = np.cumsum(batch["overlap_BT"][row, on] < c.prune_overlap)
        weight_T[on] = np.clip(1 - c.prune_drop * drifted, 0, 1) + c.prune_base
    elif rule != "ta_opd":
        raise ValueError(f"add a branch for {rule}")
    elif n:
        teacher = np.exp(batch["teacher_topk_logp_BTK"][row, on].astype(np.float64))
        student = np.exp(batch["student_topk_logp_BTK"][row, on].astype(np.float64))
        share = [x / x.sum(axis=-1, keepdims=True) for x in (teacher, student)]
        factors = special.rel_entr(*share).sum(axis=-1), teacher.sum(axis=-1)
        ends = [np.quantile(x, [0.05, 0.95]) for x in factors]
        unit = [np.clip((x - a) / (b - a), 0, 1) if b > a else 1 for x, (a, b) in zip(factors, ends)]
        best = np.argsort(-unit[0] * unit[1], kind="stable")[: max(round(c.ta_share * n), 1)]
        weight_T[on[best]] = 1
    return weight_T


@pytest.mark.parametrize("rule", [rule for rule in BUILT_IN if rule not in DRAWING])
def test_weights_equal_numpys_on_whole_batches(rule):
    released = 0
    for seed in range(12):
        batch = random_batch(seed)
        out = run(rule, batch, step=seed)["none"]
        want_BT = np.array([reference_weights(rule, batch, row, seed) for row in range(B)])
        np.testing.assert_allclose(out.weight_BT, want_BT, rtol=2e-5, atol=1e-6)
        for row in range(B):
            labels = np.unique(batch["segment_BT"][row][want_BT[row] > 0])
            assert out.cut_B[row] == len(labels)
        released += (want_BT[batch["mask_BT"]] == 0).sum()
    assert (released > 0) == (rule not in ("none", "iw_opd"))


# ---- While a response is written.


@pytest.mark.parametrize("rule", sorted(rules.CERTAIN))
def test_a_release_is_certain_only_if_what_follows_does_not_change_it(rule):
    """Where the rule decides at once; where a change point does, if the evidence suffices."""
    fields = {"stop_gain": 1.0, "stop_after": 2}
    read = jax.jit(lambda *a: rel.certain(Scores(**a[0]), *a[1:3], config(rule, **fields), step=a[3]))
    found = 0
    for seed in range(4):
        batch = random_batch(seed)
        names = Scores.__dataclass_fields__
        scores = {n: batch.get(n, np.zeros((B, T, K) if n.endswith("K") else (B, T))) for n in names}
        want = run(rule, batch, step=seed)["none"]
        for t in range(4, T + 1, 4):
            shown_BT = batch["mask_BT"] & (np.arange(T) < t)
            certain_B, kept_B = read(scores, batch["segment_BT"], shown_BT, np.int32(seed))
            ended_BT = np.asarray(rel.ended(batch["segment_BT"], shown_BT))
            for b in np.flatnonzero(certain_B):
                found += 1
                if rules.CERTAIN[rule] is rules.at_once:
                    assert kept_B[b] == want.kept_B[b]
                    continue
                only = {n: x[b : b + 1] for n, x in batch.items()} | {"mask_BT": ended_BT[b : b + 1]}
                sofar = run(rule, only)["none"]
                assert sofar.accepted_B[0] and sofar.gain_B[0] > 1 and kept_B[b] == sofar.kept_B[0]
                assert sofar.segments_B[0] - sofar.cut_B[0] >= 2
    assert found > 5


def test_the_last_sentence_may_go_on():
    batch = {"mask_BT": lengths(5, 2, 0), "segment_BT": [[0, 0, 1, 1, 2, 2] + [3] * 6] * 3}
    ended_BT = rel.ended(np.array(batch["segment_BT"]), batch["mask_BT"])
    np.testing.assert_array_equal(ended_BT, lengths(4, 0, 0))


# ---- The rules that draw.


def same_lengths(seed=1):
    """A batch of equal lengths in sentences of two tokens, most with a drop somewhere."""
    rng = np.random.default_rng(seed)
    drop_B = rng.integers(1, 12, B) * 2
    contrast_BT = np.where(np.arange(24) < drop_B[:, None], HIGH, LOW) + rng.uniform(0, 0.1, (B, 24))
    segment_BT = np.broadcast_to(np.arange(24) // 2, (B, 24))
    return {"mask_BT": np.ones((B, 24), bool), "segment_BT": segment_BT, "contrast_BT": contrast_BT}


def test_a_shuffle_hands_the_papers_release_points_to_other_rollouts():
    batch = same_lengths()
    paper = run("paper", batch)["none"].kept_B
    assert len(np.unique(paper)) > 4
    orders = [run("shuffled", batch, seed=seed)["none"].kept_B for seed in range(4)]
    for kept_B in orders:
        assert sorted(kept_B) == sorted(paper)
    assert len({tuple(kept_B) for kept_B in [*orders, paper]}) == 5


def test_a_shuffled_release_point_is_a_share_of_the_response():
    batch = random_batch(3)
    paper = run("paper", batch)["none"].kept_B
    length_B = batch["mask_BT"].sum(axis=1)
    share_B = np.where(length_B > 0, paper / np.maximum(length_B, 1), 1)
    order_B = np.asarray(jax.random.permutation(jax.random.key(7), B))
    want_B = np.clip(np.round(share_B[order_B] * length_B), np.minimum(length_B, 1), length_B)
    np.testing.assert_array_equal(run("shuffled", batch, seed=7)["none"].kept_B, want_B)
    assert (want_B != paper).any()


@functools.cache
def kept_over_keys(rule, seed, keys=4000):
    """kept_B of one batch under many keys, [keys, B]."""
    batch = random_batch(seed)
    zero_BTK = jnp.zeros((B, T, K))
    scores = Scores(*[zero_BTK[..., 0]] * 4, zero_BTK, zero_BTK, *[zero_BTK[..., 0]] * 2).replace(
        contrast_BT=batch["contrast_BT"]
    )
    draw = jax.jit(
        jax.vmap(
            lambda key: (
                rel.release(scores, batch["segment_BT"], batch["mask_BT"], config(rule), key=key).kept_B
            )
        )
    )
    return np.asarray(draw(jax.random.split(jax.random.key(0), keys)))


@pytest.mark.parametrize("seed", [0, 5])
def test_random_cuts_keep_as_many_tokens_as_the_papers_rule_on_average(seed):
    batch = random_batch(seed)
    paper, length_B = run("paper", batch)["none"].kept_B, batch["mask_BT"].sum(axis=1)
    kept_NB = kept_over_keys("random", seed)
    total_N = kept_NB.sum(axis=1)
    error = total_N.std() / np.sqrt(len(total_N))
    assert paper.sum() < length_B.sum() and error < 0.01 * paper.sum()
    assert abs(total_N.mean() - paper.sum()) < 4 * error
    # Every rollout has the same expected share of its tokens after the first, and none is left empty.
    share_B = (kept_NB.mean(axis=0) - 1)[length_B > 9] / (length_B[length_B > 9] - 1)
    np.testing.assert_allclose(share_B, (paper - (paper > 0)).sum() / (length_B - 1).clip(0).sum(), atol=0.02)
    assert (kept_NB >= np.minimum(length_B, 1)).all() and (kept_NB <= length_B).all()
    assert (kept_NB.std(axis=0)[length_B > 9] > 1).all()


def test_a_shuffle_sends_each_point_everywhere_equally_often():
    kept_NB = kept_over_keys("shuffled", 5)
    length_B = random_batch(5)["mask_BT"].sum(axis=1)
    share_NB = kept_NB[:, length_B > 20] / length_B[length_B > 20]
    means = share_NB.mean(axis=0)
    assert share_NB.shape[1] > 2 and np.ptp(means) < 0.04


@pytest.mark.parametrize("rule", DRAWING)
def test_the_same_key_draws_the_same_and_another_key_does_not(rule):
    batch = same_lengths()
    first, again, other = (run(rule, batch, seed=seed)["none"].kept_B for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


# ---- What holds for every rule.


@EVERY_RULE
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31), step=st.integers(0, 20))
def test_supervision_stays_in_the_response_and_a_rescale_restores_its_mass(rule, seed, step):
    batch = random_batch(seed)
    mask_BT, length_B = batch["mask_BT"], batch["mask_BT"].sum(axis=1)
    out = run(rule, batch, step, seed)
    plain = out["none"]
    for released in out.values():
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(released))
        assert (released.weight_BT >= 0).all() and not released.weight_BT[~mask_BT].any()
        np.testing.assert_array_equal(released.mask_BT, released.weight_BT > 0)
        np.testing.assert_array_equal(released.mask_BT, plain.mask_BT)
        np.testing.assert_array_equal(released.kept_B, plain.mask_BT.sum(axis=1))
        assert (released.cut_B <= released.segments_B).all()
    some_B = plain.kept_B > 0
    assert rule in ("suffix", "kat") or (some_B == (length_B > 0)).all()
    np.testing.assert_allclose(
        out["sequence"].weight_BT.sum(axis=1), np.where(some_B, length_B, 0), rtol=1e-5
    )
    np.testing.assert_allclose(out["batch"].weight_BT.sum(), length_B.sum() if some_B.any() else 0, rtol=1e-5)
    scale = out["batch"].weight_BT.sum() / max(plain.weight_BT.sum(), 1e-9)
    np.testing.assert_allclose(out["batch"].weight_BT, plain.weight_BT * scale, rtol=1e-5)


@EVERY_RULE
def test_a_batch_without_any_response_gives_zeros(rule):
    out = run(rule, {"mask_BT": np.zeros((3, 6), bool), "segment_BT": np.full((3, 6), -1)})
    for released in out.values():
        for name, value in vars(released).items():
            assert np.isfinite(value).all(), name
            assert name in ("segment_BT", "gain_B") or not value.any(), name


@EVERY_RULE
def test_what_stands_outside_the_response_is_never_read(rule):
    batch = random_batch(11)
    mask_BT = batch["mask_BT"]
    noisy = {
        name: np.where(mask_BT[..., None] if name.endswith("K") else mask_BT, x, 7 if x.dtype == int else 1e6)
        for name, x in batch.items()
    } | {"mask_BT": mask_BT}
    ours, theirs = run(rule, batch, 2, 1)["sequence"], run(rule, noisy, 2, 1)["sequence"]
    for name in ("weight_BT", "mask_BT", "kept_B", "cut_B", "segments_B", "accepted_B", "gain_B"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), name)


@EVERY_RULE
def test_tokens_outside_the_mask_in_the_middle_are_stepped_over(rule):
    batch = random_batch(12, positions=32)
    place = np.sort(np.random.default_rng(0).permutation(T)[:32])
    spread = {}
    for name, x in batch.items():
        spread[name] = np.full((B, T, *x.shape[2:]), 0, x.dtype)
        spread[name][:, place] = x
    ours, theirs = run(rule, batch, 2, 1)["batch"], run(rule, spread, 2, 1)["batch"]
    np.testing.assert_allclose(theirs.weight_BT[:, place], ours.weight_BT, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(theirs.weight_BT.sum(), ours.weight_BT.sum(), rtol=1e-5)
    for name in ("kept_B", "cut_B", "segments_B", "accepted_B"):
        np.testing.assert_array_equal(getattr(theirs, name), getattr(ours, name), name)


@pytest.mark.parametrize("rule", [rule for rule in BUILT_IN if rule not in DRAWING])
def test_a_rollout_does_not_depend_on_the_others_of_its_batch(rule):
    batch = random_batch(13)
    order = np.random.default_rng(1).permutation(B)
    ours = run(rule, batch, 2)["sequence"]
    theirs = run(rule, {name: x[order] for name, x in batch.items()}, 2)["sequence"]
    for name in ("weight_BT", "mask_BT", "kept_B", "cut_B", "segments_B", "accepted_B", "gain_B"):
        np.testing.assert_array_equal(getattr(ours, name)[order], getattr(theirs, name), name)


@EVERY_RULE
def test_eight_devices_release_what_one_does(rule):
    batch = random_batch(14)
    mesh = Mesh(np.asarray(jax.devices()), ("data",))
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    names = Scores.__dataclass_fields__
    zero_BT = np.zeros((B, T), np.float32)
    scores = Scores(**{name: batch.get(name, zero_BT) for name in names})
    arrays = scores, batch["segment_BT"].astype(np.int32), batch["mask_BT"]
    arrays = jax.device_put(arrays, rows)
    rest = jax.device_put((np.int32(2), jax.random.key(9)), whole)

    def one(scores, segment_BT, mask_BT, step, key):
        return rel.release(scores, segment_BT, mask_BT, config(rule), step=step, key=key)

    executable = jax.jit(one).lower(*arrays, *rest).compile()
    compiled = executable.as_text()
    assert not host_calls(compiled)
    assert bool(collectives(compiled)) == (rule in DRAWING)  # only these look at other rollouts
    many, alone = executable(*arrays, *rest), run(rule, batch, 2, 9)["sequence"]
    assert len(many.weight_BT.sharding.device_set) == 8
    np.testing.assert_allclose(many.weight_BT, alone.weight_BT, rtol=1e-6)
    for name in ("mask_BT", "kept_B", "cut_B", "accepted_B"):
        np.testing.assert_array_equal(getattr(many, name), getattr(alone, name), name)


def test_a_new_rule_is_one_function(monkeypatch):
    monkeypatch.setitem(rules.RULES, "halve", None)

    @rules.rule("halve")
    def _halve(scores, segments, config, step, key):
        cut_B = jax.random.randint(key, segments.mask_BT.shape[:1], 1, 2)
        first_BT = segments.order_BT < cut_B[:, None]
        return rules.Proposal(jnp.where(first_BT, 1.0, 0.5), cut_B, cut_B > 0, cut_B * 0.0)

    batch = {"mask_BT": lengths(9, width=9), "segment_BT": [SEGMENT]}
    out = run("halve", batch)["sequence"]
    np.testing.assert_allclose(out.weight_BT[0, :4], np.array([1, 1, 0.5, 0.5]) * 9 / 5.5, rtol=1e-6)


@EVERY_RULE
def test_every_rule_and_its_fields_are_documented(rule):
    text, stopping = (
        (Path(__file__).parents[2] / "docs" / page).read_text() for page in ("rules.md", "stopping.md")
    )
    assert f"## `{rule}`" in text
    for field in default().release:
        assert f"release.{field}" in (stopping if field.startswith("stop") else text), field
