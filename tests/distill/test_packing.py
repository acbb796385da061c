"""Rows behind each other: the same results, less computed."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opd_jax.distill import Loss, LossInputs, packing, scoring, train_step
from opd_jax.distill.types import Ends
from opd_jax.models import attention
from opd_jax.parallel import sharding
from tests import tiny

T = 24
LENGTHS = np.array([5, 24, 8, 9, 17, 2, 16, 3, 6, 7, 24, 3, 8, 11, 20, 4])
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


def laid(prompt_B, response_B, length, responses, shards=1):
    """Sequences used by the fullest shard when rows are laid by a loop in NumPy: longest first, first fit."""
    used = []
    for prompts, needs in zip(np.split(prompt_B, shards), np.split(response_B, shards), strict=True):
        filled = []
        for n in np.argsort(-(prompts + needs) * (needs > 0), kind="stable"):
            if needs[n]:
                fits = [
                    x
                    for x in filled
                    if x[0] + prompts[n] + needs[n] <= length and x[1] + needs[n] <= responses
                ]
                if not fits:
                    filled.append([0, 0])
                    fits = filled[-1:]
                fits[0][0] += prompts[n] + needs[n]
                fits[0][1] += needs[n]
        used.append(len(filled))
    return max(used)


def test_rows_keep_their_tokens_positions_and_predictors(rollouts):
    """Every row is in one sequence, whole and alone in its places."""
    p = rollouts.prompt_mask_BP.shape[1]
    need_BT = rollouts.mask_BT & (np.arange(16) != 3)[:, None]  # one row is left out
    packed = packing.pack(rollouts.prompt_mask_BP, need_BT)
    pieces, seen = 4, {}
    prompt_B = np.asarray(rollouts.prompt_mask_BP.sum(axis=1))
    assert packed.used == laid(prompt_B, LENGTHS * (np.arange(16) != 3), p + T, T)
    for number in range(int(packing.rounds(packed, pieces))):
        piece = packing.piece(packed, rollouts, number, pieces)
        s = piece.sequences
        written = np.asarray(piece.taken(rollouts.response_BT))
        assert s.slots == (np.asarray(s.place_RT) < p + T).any(axis=0).nonzero()[0].max() + 1
        for r in range(len(s.tokens_RL)):
            place_T, slot_L = np.asarray(s.place_RT[r]), np.asarray(s.slot_RL[r])
            for slot in np.flatnonzero(place_T < p + T):
                assert slot_L[place_T[slot]] == slot
            assert (slot_L < T).sum() == (place_T < p + T).sum()
            for row in set(np.asarray(s.row_RL[r]).tolist()) - {0}:
                on = np.flatnonzero(s.row_RL[r] == row)
                np.testing.assert_array_equal(on, np.arange(on[0], on[-1] + 1))
                np.testing.assert_array_equal(s.position_RL[r][on], np.arange(len(on)))
                slots = slot_L[on][slot_L[on] < T]
                seen[row - 1] = np.asarray(s.tokens_RL[r])[on], written[r, slots]
    assert sorted(seen) == [b for b in range(16) if b != 3]
    for b, (tokens, response) in seen.items():
        mask_L = np.concatenate([rollouts.prompt_mask_BP[b], rollouts.mask_BT[b]])
        np.testing.assert_array_equal(tokens, rollouts.tokens_BL[b][mask_L])
        np.testing.assert_array_equal(response, rollouts.response_BT[b][: LENGTHS[b]])


def test_sequences_are_full_at_most_and_few():
    rng = np.random.default_rng(0)
    for _ in range(20):
        prompt_B, response_B = rng.integers(1, 9, 32), rng.integers(0, 33, 32)
        mask_BP = np.arange(8) >= 8 - prompt_B[:, None]
        packed = jax.jit(packing.pack)(mask_BP, np.arange(32) < response_B[:, None])
        filled = np.zeros((32, 2), int)
        np.add.at(
            filled,
            packed.sequence_SN[0],
            np.stack([packed.prompt_SN + packed.response_SN, packed.response_SN], -1)[0],
        )
        assert (filled <= [40, 32]).all()
        assert packed.used == (filled[:, 0] > 0).sum() == laid(prompt_B, response_B, 40, 32)


def test_full_rows_take_a_sequence_each():
    mask_BP, mask_BT = np.ones((6, 4), bool), np.ones((6, 9), bool)
    assert packing.pack(mask_BP, mask_BT).used == 6


@pytest.mark.parametrize("length", [40, 600])
def test_a_token_sees_its_own_row_alone(length):
    """Attention in one product and in blocks, against each row by itself."""
    rng = np.random.default_rng(length)
    ends = sorted(rng.choice(np.arange(1, length), 3, replace=False).tolist())
    row_L = np.searchsorted(ends, np.arange(length), side="right") + 1
    row_L[ends[-1] :] = 0
    q, k, v = (jnp.asarray(rng.normal(size=(1, length, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    out = attention.causal(jnp.asarray(row_L[None]))(q, *attention.cached(k, v))
    for first, last in zip([0, *ends], ends, strict=False):
        alone_q, alone_k, alone_v = (x[:, first:last] for x in (q, k, v))
        alone = attention.causal(jnp.ones((1, last - first), bool))(
            alone_q, *attention.cached(alone_k, alone_v)
        )
        np.testing.assert_allclose(out[:, first:last], alone, atol=2e-6)


@functools.cache
def scored(model: str, how: scoring.Scoring, student: bool = False):
    own = (tiny.STUDENT, tiny.student_params()) if student else None
    params = tiny.weights(MODELS[model], seed=1)
    return jax.jit(lambda r: scoring.score(MODELS[model], params, r, how, own))


@pytest.mark.parametrize(
    ("model", "keep", "student"),
    [("dense", "logits", True), ("dense", "top", False), ("experts", None, False)],
)
@pytest.mark.parametrize("pack", [True, False])
def test_scores_are_those_of_rows_by_themselves(rollouts, model, keep, student, pack):
    top_k = 3 if keep == "top" else 0
    plain = scored(model, scoring.Scoring(5, 1, keep, top_k), student)(rollouts)
    found = scored(model, scoring.Scoring(5, 4, keep, top_k, pack), student)(rollouts)
    assert plain.computed == 1
    prompt_B = np.asarray(rollouts.prompt_mask_BP.sum(axis=1))
    used = laid(prompt_B, LENGTHS, rollouts.tokens_BL.shape[1], T)
    assert found.computed == (-(-used // 4) / 4 if pack else 1)
    assert used <= 12
    inside = rollouts.mask_BT[..., None]

    def targets(scores):  # without meaning outside the response
        return jax.tree.map(
            lambda x: jnp.where(inside if x.ndim == 3 else inside[..., 0], x, 0), scores.targets
        )

    close(targets(found), targets(plain), atol=1e-5)
    close(found.replace(computed=None, targets=None), plain.replace(computed=None, targets=None), atol=1e-5)


def test_the_distance_is_that_of_rows_by_themselves(rollouts):
    args = tiny.STUDENT, tiny.student_params(), tiny.TEACHER, tiny.teacher_params(), rollouts
    close(scoring.distance(*args, scoring.Scoring(5, 4)), scoring.distance(*args, scoring.Scoring(5)))


def batch_of(rollouts, kept_B, ends: bool):
    weight_BT = jnp.where(jnp.arange(T)[None] < kept_B[:, None], 1.5, 0.0) * rollouts.mask_BT
    advantage_BT = jnp.sin(jnp.arange(T * len(kept_B), dtype=jnp.float32)).reshape(-1, T)
    stop = Ends(0.5 * rollouts.mask_BT, 0.01 * jnp.ones_like(weight_BT)) if ends else None
    return LossInputs(rollouts, advantage_BT=advantage_BT, weight_BT=weight_BT, ends=stop)


def updated(batch, pieces: int, mesh=None):
    """(parameters, loss, norm, share computed) of one step of plain gradient descent."""
    loss = Loss.of(tiny.STUDENT, None, tiny.config(Path("unread")), "policy_gradient")
    update = train_step.make_update(loss, optax.sgd(1.0), pieces)
    params = tiny.student_params()

    def one(batch):
        carry, (value, norm, _, _, computed) = update(
            (params, optax.sgd(1.0).init(params)), batch, {}, None, 7.0
        )
        return carry[0], value, norm, computed

    if mesh is None:
        return jax.jit(one)(batch)
    rows = sharding.batch(mesh)
    return jax.jit(sharding.on(mesh, one), in_shardings=rows)(sharding.put_batch(mesh, jax.device_get(batch)))


@pytest.mark.parametrize("ends", [True, False])
def test_gradients_are_those_of_rows_by_themselves_and_what_is_released_costs_nothing(rollouts, ends):
    kept_B = np.minimum(LENGTHS, np.arange(16))  # of the first row nothing
    batch = batch_of(rollouts, kept_B, ends)
    *plain, _ = updated(batch, 1)
    *found, computed = updated(batch, 4)
    close(found, plain, atol=1e-5)
    prompt_B = np.asarray(rollouts.prompt_mask_BP.sum(axis=1))
    # The end of a response is taught in its released part too.
    used = laid(prompt_B, LENGTHS if ends else kept_B, rollouts.tokens_BL.shape[1], T)
    assert computed == -(-used // 4) / 4


def test_a_gradient_with_nothing_to_learn_is_zero(rollouts):
    params, loss, norm, computed = updated(batch_of(rollouts, np.zeros(16, int), ends=False), 4)
    assert loss == norm == computed == 0
    jax.tree.map(np.testing.assert_array_equal, params, tiny.student_params())


def test_a_mesh_packs_the_rows_of_each_device(rollouts):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    batch = batch_of(rollouts, LENGTHS, ends=False)
    *plain, _ = updated(batch, 1)
    *found, computed = updated(batch, 4, mesh)
    close(found, plain, atol=1e-5)
    prompt_B = np.asarray(rollouts.prompt_mask_BP.sum(axis=1))
    assert computed == laid(prompt_B, LENGTHS, rollouts.tokens_BL.shape[1], T, shards=4) / 4 < 1


def test_rows_do_not_leave_their_device(rollouts):
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4, "tensor": 1})

    def there_and_back(r):
        packed = packing.pack(r.prompt_mask_BP, r.mask_BT)
        read = r.response_BT, r.topk_logp_BTK
        found, lengths = packing.mapped(
            lambda piece: (piece.taken(read), (piece.sequences.row_RL > 0).sum()), packed, r, 2
        )
        return *(jnp.where(r.mask_BT.reshape(16, T, *(1,) * (x.ndim - 2)), x, 0) for x in found), lengths

    rows = sharding.batch(mesh)
    program = jax.jit(
        sharding.on(mesh, there_and_back),
        in_shardings=rows,
        out_shardings=(rows, rows, sharding.replicated(mesh)),
    )
    put = sharding.put_batch(mesh, jax.device_get(rollouts))
    compiled = program.lower(put).compile()
    for traffic in ("all-gather", "all-to-all", "collective-permute"):
        assert traffic not in compiled.as_text()
    tokens_BT, logp_BTK, count = compiled(put)
    np.testing.assert_array_equal(tokens_BT, np.where(rollouts.mask_BT, rollouts.response_BT, 0))
    np.testing.assert_array_equal(logp_BTK, rollouts.topk_logp_BTK)
    assert count == rollouts.mask_BT.sum() + rollouts.prompt_mask_BP.sum()


def test_hidden_states_and_their_gradient_are_taken_from_the_predicting_positions(rollouts):
    """Against slices of the sequence, which JAX differentiates by itself."""
    s = rollouts.sequences
    p = rollouts.prompt_mask_BP.shape[1]
    hidden_BLD = jax.random.normal(jax.random.key(0), (*s.tokens_RL.shape, 3))
    weight_BTD = jax.random.normal(jax.random.key(1), (*s.place_RT.shape, 3))

    def ours(x):
        return (scoring._predicting(x, s.place_RT, s.slot_RL) * weight_BTD).sum()

    def slices(x):
        return (x[:, p - 1 : -1] * weight_BTD).sum()

    close(jax.value_and_grad(ours)(hidden_BLD), jax.value_and_grad(slices)(hidden_BLD), atol=1e-5)
