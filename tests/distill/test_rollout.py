"""The sampler against full forward passes, on ragged prompts, on meshes, and past each row's end."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from opd_jax.distill import rollout
from opd_jax.models import transformer
from opd_jax.parallel import sharding
from opd_jax.preflight import hlo, jaxprs, lengths
from tests import tiny

B, P, T = 8, 6, 10
MODEL = tiny.STUDENT.replace(
    family="qwen3",
    qk_norm=True,
    vocab_size=72,
    valid_vocab=66,  # the six rows after it must never be seen
    eos_ids=(5, 17, 30, 41),
    pad_id=1,
)
PLAIN = rollout.Sampling(max_tokens=T)
SHAPED = rollout.Sampling(max_tokens=T, temperature=0.7, top_k=40, top_p=0.8, halvings=2)
GREEDY = rollout.Sampling(max_tokens=T, temperature=0)
LENGTHS = np.array([6, 1, 3, 5, 2, 6, 4, 3])

sample_jit = jax.jit(rollout.sample, static_argnums=(0, 5))


@functools.cache
def params():
    """Random weights; the padding rows of the vocabulary are the likeliest, were they not masked."""
    out = tiny.weights(MODEL)
    table = out["embedding"]
    return out | {"embedding": table.at[MODEL.valid_vocab :].multiply(8.0)}


def prompts():
    """Ragged prompts, left-padded: (tokens_BP, mask_BP)."""
    ids = np.random.default_rng(1).integers(6, 16, (B, P)).astype(np.int32)
    mask_BP = np.arange(P)[None] >= P - LENGTHS[:, None]
    return np.where(mask_BP, ids, MODEL.pad_id).astype(np.int32), mask_BP


@functools.cache
def sampled(sampling, seed=0):
    tokens_BP, mask_BP = prompts()
    out = sample_jit(MODEL, params(), tokens_BP, mask_BP, jax.random.key(seed), sampling)
    return jax.tree.map(np.asarray, out)


@jax.jit
def _full_logits(tokens_BL, mask_BL):
    hidden_BLD = transformer.forward(MODEL, params(), tokens_BL, mask_BL)
    return transformer.logits(MODEL, transformer.head(MODEL, params()), hidden_BLD)


@functools.cache
def reference_logits(sampling):
    """float64 logits_BTV that predict each response token, by one full forward pass."""
    r = sampled(sampling)
    mask_BL = np.concatenate([r.prompt_mask_BP, r.mask_BT], axis=1)
    return np.asarray(_full_logits(r.tokens_BL, mask_BL))[:, P - 1 : -1].astype(np.float64)


def at_tokens(logp_BTV, r):
    return np.take_along_axis(logp_BTV, r.response_BT[..., None], axis=-1)[..., 0]


EVERY_SAMPLING = pytest.mark.parametrize(
    "sampling", [PLAIN, SHAPED, GREEDY], ids=["plain", "shaped", "greedy"]
)


# One row reaches the limit, half have left after three tokens, three quarters after five.
LIMITS = np.array([2, 10, 3, 5, 1, 3, 4, 9], np.int32)
ENDLESS = MODEL.replace(eos_ids=())


@functools.cache
def limited(sampling, model=ENDLESS):
    tokens_BP, mask_BP = prompts()
    keys = rollout.row_keys(jax.random.key(0), np.arange(B * sampling.samples))
    draws = rollout.Draws(keys, jnp.repeat(LIMITS, sampling.samples))
    return jax.tree.map(np.asarray, sample_jit(model, params(), tokens_BP, mask_BP, draws, sampling))


def the_same(got, want, atol=1e-5):
    assert want.scores is want.stops is got.scores is got.stops is None
    for name, value in vars(want).items():
        if name not in ("scores", "stops"):
            np.testing.assert_allclose(getattr(got, name), value, atol=atol, err_msg=name)
    np.testing.assert_array_equal(got.tokens_BL, want.tokens_BL)


@pytest.mark.parametrize(("int8", "halvings"), [(False, 1), (False, 5), (True, 2)])
def test_rows_that_leave_change_nothing(int8, halvings):
    sampling = dataclasses.replace(PLAIN, int8_cache=int8)
    the_same(limited(dataclasses.replace(sampling, halvings=halvings)), limited(sampling))


@pytest.mark.parametrize("halvings", [0, 2])
def test_a_row_stops_at_its_own_limit(halvings):
    r, whole = limited(dataclasses.replace(PLAIN, halvings=halvings)), limited(PLAIN)
    np.testing.assert_array_equal(r.mask_BT.sum(axis=1), LIMITS)
    assert not r.finished_B.any()
    np.testing.assert_array_equal(r.tokens_BL[LIMITS == T], whole.tokens_BL[LIMITS == T])


@pytest.mark.parametrize(("slots", "samples"), [(1, 1), (4, 1), (4, 2), (10, 2)])
def test_rows_that_wait_change_nothing(slots, samples):
    sampling = dataclasses.replace(PLAIN, samples=samples)
    the_same(limited(dataclasses.replace(sampling, slots=slots, halvings=1)), limited(sampling))


def test_prompts_read_in_pieces_at_their_own_widths_and_a_cache_read_in_blocks_change_nothing():
    tokens_BP, mask_BP = (
        np.pad(x, ((0, 0), (90, 0)), constant_values=fill) for x, fill in zip(prompts(), (1, 0))
    )
    long_BP = np.where(np.arange(96) >= 30, 7, 1)[None]
    tokens_BP = np.concatenate([tokens_BP[:6], np.tile(long_BP, (2, 1))]).astype(np.int32)
    mask_BP = np.concatenate([mask_BP[:6], long_BP[[0, 0]] == 7])
    whole = sample_jit(MODEL, params(), tokens_BP, mask_BP, jax.random.key(0), PLAIN)
    pieces = dataclasses.replace(PLAIN, prefill_rows=2, prompt_shares=(0.25, 0.5))
    in_blocks = MODEL.replace(cache_reads="blocks")
    for model, sampling in ((MODEL, pieces), (in_blocks, PLAIN), (in_blocks, pieces)):
        the_same(sample_jit(model, params(), tokens_BP, mask_BP, jax.random.key(0), sampling), whole)


def test_a_step_after_halvings_computes_the_rows_that_are_left():
    """FLOPs by the trips of each loop, which `lengths.decode` tells from the lengths."""
    tokens_BP, mask_BP = prompts()
    keys = rollout.row_keys(jax.random.key(0), np.arange(B))
    sampling = dataclasses.replace(PLAIN, halvings=2)
    traced = sample_jit.trace(ENDLESS, params(), tokens_BP, mask_BP, rollout.Draws(keys, LIMITS), sampling)
    stretches = lengths.decode(LIMITS[None], P, 2)
    # Of the ordered 10 9 5 4 3 3 2 1 more than four are longer than t until t = 3, more than two until t = 5.
    assert [(rows, steps) for rows, steps, _ in stretches] == [(8, 2), (4, 2), (2, 5)]
    assert [slots for *_, slots in stretches] == [P + 1.5, P + 3.5, P + 7]
    counted = [
        jaxprs.matmul_flops(traced.jaxpr.jaxpr, [(n, 0) for n in trips])
        for trips in ([0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [steps for _, steps, _ in stretches])
    ]
    _, *one, whole = np.subtract(counted, counted[0])
    assert one[0] == 2 * one[1] == 4 * one[2] > 0
    assert whole == 2 * one[0] + 2 * one[1] + 5 * one[2]


@EVERY_SAMPLING
def test_logp_is_the_full_forwards_log_softmax_at_temperature_one(sampling):
    r = sampled(sampling)
    want_BT = at_tokens(special.log_softmax(reference_logits(sampling), axis=-1), r)
    np.testing.assert_allclose(r.logp_BT[r.mask_BT], want_BT[r.mask_BT], atol=1e-4)


@EVERY_SAMPLING
def test_topk_is_the_full_forwards_four_best_ids_in_order(sampling):
    r = sampled(sampling)
    want_BTK = np.argsort(-reference_logits(sampling), axis=-1)[..., :4]
    np.testing.assert_array_equal(r.topk_BTK[r.mask_BT], want_BTK[r.mask_BT])


@EVERY_SAMPLING
def test_the_candidates_log_probabilities_are_the_full_forwards(sampling):
    r = sampled(sampling)
    logp_BTV = special.log_softmax(reference_logits(sampling), axis=-1)
    want_BTK = np.take_along_axis(logp_BTV, r.topk_BTK, axis=-1)
    np.testing.assert_allclose(r.topk_logp_BTK[r.mask_BT], want_BTK[r.mask_BT], atol=1e-4)


@EVERY_SAMPLING
def test_stop_probability_sums_the_end_tokens(sampling):
    r = sampled(sampling)
    mass_BTV = special.softmax(reference_logits(sampling), axis=-1)
    want_BT = mass_BTV[..., list(MODEL.eos_ids)].sum(axis=-1)
    np.testing.assert_allclose(r.stop_BT[r.mask_BT], want_BT[r.mask_BT], atol=1e-5)


def test_behaviour_logp_without_shaping_is_logp():
    r = sampled(PLAIN)
    np.testing.assert_allclose(r.behaviour_logp_BT, r.logp_BT, atol=1e-5)


def test_behaviour_logp_is_that_of_the_tempered_and_truncated_distribution():
    r = sampled(SHAPED)
    shaped_BTV = reference_logits(SHAPED) / 0.7
    order_BTV = np.argsort(-shaped_BTV, axis=-1)
    ranked_BTV = np.take_along_axis(shaped_BTV, order_BTV, axis=-1)
    ranked_BTV[..., 40:] = -np.inf
    mass_BTV = special.softmax(ranked_BTV, axis=-1)
    before_BTV = np.cumsum(mass_BTV, axis=-1) - mass_BTV
    ranked_BTV[before_BTV >= 0.8] = -np.inf
    kept_BTV = np.empty_like(ranked_BTV)
    np.put_along_axis(kept_BTV, order_BTV, ranked_BTV, axis=-1)
    want_BT = at_tokens(special.log_softmax(kept_BTV, axis=-1), r)
    np.testing.assert_allclose(r.behaviour_logp_BT[r.mask_BT], want_BT[r.mask_BT], atol=1e-4)
    assert (r.behaviour_logp_BT[r.mask_BT] > r.logp_BT[r.mask_BT]).any()


DRAWS = 4096


@pytest.mark.parametrize(
    "filters",
    [
        {"temperature": 0.5},
        {"top_k": 9},
        {"top_p": 0.6},
        {"min_p": 0.3},
        {"temperature": 1.5, "top_k": 30, "top_p": 0.9, "min_p": 0.15},
    ],
    ids=str,
)
def test_first_tokens_pass_a_chi_square_test_against_the_filtered_distribution(filters):
    tokens_BP, mask_BP = (np.repeat(x[:1], DRAWS, axis=0) for x in prompts())
    sampling = rollout.Sampling(max_tokens=1, **filters)
    r = sample_jit(MODEL, params(), tokens_BP, mask_BP, jax.random.key(3), sampling)
    logits_V = np.asarray(_full_logits(tokens_BP[:1], mask_BP[:1]))[0, -1].astype(np.float64)
    expected_V = DRAWS * filtered(logits_V, **filters)
    count_V = np.bincount(r.response_BT[:, 0], minlength=MODEL.vocab_size)
    assert count_V[expected_V == 0].sum() == 0
    rare_V = expected_V < 5
    bins = [np.append(x[~rare_V], x[rare_V].sum()) for x in (count_V, expected_V)]
    bins = [x[bins[1] > 0] for x in bins]
    assert len(bins[0]) > 3
    assert stats.chisquare(*bins).pvalue > 1e-3


def filtered(logits_V, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Probabilities by sorting, in float64, each filter renormalised before the next."""
    order_V = np.argsort(-logits_V)
    mass_V = special.softmax(logits_V[order_V] / temperature)
    if top_k:
        mass_V[top_k:] = 0
        mass_V /= mass_V.sum()
    mass_V[np.cumsum(mass_V) - mass_V >= top_p] = 0
    mass_V[mass_V < min_p * mass_V[0]] = 0
    out_V = np.empty_like(mass_V)
    out_V[order_V] = mass_V / mass_V.sum()
    return out_V


def test_temperature_zero_takes_the_likeliest_token_with_certainty():
    r = sampled(GREEDY)
    want_BT = reference_logits(GREEDY).argmax(axis=-1)
    np.testing.assert_array_equal(r.response_BT[r.mask_BT], want_BT[r.mask_BT])
    assert not r.behaviour_logp_BT.any()


@EVERY_SAMPLING
def test_ids_beyond_the_tokenizer_are_never_drawn_and_never_candidates(sampling):
    r = sampled(sampling)
    assert r.response_BT.max() < MODEL.valid_vocab
    assert r.topk_BTK.max() < MODEL.valid_vocab


def test_past_a_rows_end_every_field_is_pad_false_or_zero():
    r = sampled(PLAIN)
    assert 0 < r.mask_BT.sum() < r.mask_BT.size
    past_BT = ~r.mask_BT
    assert (r.response_BT[past_BT] == MODEL.pad_id).all()
    for field_BT in (r.logp_BT, r.behaviour_logp_BT, r.stop_BT, r.topk_BTK, r.topk_logp_BTK):
        assert not field_BT[past_BT].any()


def test_a_row_is_finished_if_and_only_if_its_last_token_ends_it():
    r = sampled(PLAIN)
    assert set(r.finished_B.tolist()) == {True, False}
    for tokens_T, mask_T, finished in zip(r.response_BT, r.mask_BT, r.finished_B):
        response = tokens_T[mask_T]
        ends = np.isin(response, MODEL.eos_ids)
        assert not ends[:-1].any()
        assert ends[-1] == finished
        assert finished or len(response) == T


def test_an_end_token_counts_as_response_and_carries_its_logp():
    r = sampled(PLAIN)
    row = int(np.flatnonzero(r.finished_B)[0])
    last = int(r.mask_BT[row].sum()) - 1
    assert r.response_BT[row, last] in MODEL.eos_ids
    assert r.logp_BT[row, last] < 0


def test_nothing_more_is_written_once_every_row_has_ended():
    tokens_BP, mask_BP = prompts()
    always = MODEL.replace(eos_ids=tuple(range(MODEL.valid_vocab)))
    r = sample_jit(always, params(), tokens_BP, mask_BP, jax.random.key(0), PLAIN)
    np.testing.assert_array_equal(r.mask_BT, np.tile(np.arange(T) == 0, (B, 1)))
    assert r.finished_B.all()
    assert not np.asarray(r.logp_BT)[:, 1:].any()


def test_a_model_without_end_tokens_writes_to_the_limit():
    tokens_BP, mask_BP = prompts()
    endless = MODEL.replace(eos_ids=())
    r = sample_jit(endless, params(), tokens_BP, mask_BP, jax.random.key(0), PLAIN)
    assert r.mask_BT.all() and not r.finished_B.any() and not r.stop_BT.any()


def test_a_ragged_prompt_gives_what_it_gives_alone_and_unpadded():
    row, r = 3, sampled(PLAIN)
    tokens_BP, _ = prompts()
    alone_BP = tokens_BP[row : row + 1, P - LENGTHS[row] :]
    keys = rollout.row_keys(jax.random.key(0), np.array([row]))
    alone = sample_jit(MODEL, params(), alone_BP, np.ones_like(alone_BP, bool), keys, PLAIN)
    np.testing.assert_array_equal(alone.response_BT[0], r.response_BT[row])
    np.testing.assert_array_equal(alone.topk_BTK[0], r.topk_BTK[row])
    np.testing.assert_allclose(alone.logp_BT[0], r.logp_BT[row], atol=1e-5)


def test_rows_with_the_same_prompt_and_different_keys_write_different_responses():
    tokens_BP, mask_BP = prompts()
    tokens_BP, mask_BP = (np.tile(x[:1], (B, 1)) for x in (tokens_BP, mask_BP))
    r = sample_jit(MODEL, params(), tokens_BP, mask_BP, jax.random.key(0), PLAIN)
    assert len({tuple(row) for row in np.asarray(r.response_BT)}) > B // 2


def test_another_seed_gives_other_tokens_and_the_same_seed_the_same():
    tokens_BP, mask_BP = prompts()
    again = sample_jit(MODEL, params(), tokens_BP, mask_BP, jax.random.key(0), PLAIN)
    np.testing.assert_array_equal(again.tokens_BL, sampled(PLAIN).tokens_BL)
    assert (sampled(PLAIN, seed=1).response_BT != sampled(PLAIN).response_BT).any()


def test_an_int8_cache_leaves_the_first_token_exact_and_rounds_the_rest_a_little():
    sampling = dataclasses.replace(PLAIN, int8_cache=True, halvings=2)
    r = sampled(sampling)
    want_BT = at_tokens(special.log_softmax(reference_logits(sampling), axis=-1), r)
    error_BT = np.where(r.mask_BT, np.abs(r.logp_BT - want_BT), 0)
    assert error_BT[:, 0].max() < 1e-4
    assert 1e-4 < error_BT[:, 1:].max() < 0.1


def test_samples_of_one_prompt_are_what_the_prompt_given_as_often_writes():
    tokens_BP, mask_BP = (np.repeat(x, 3, axis=0) for x in prompts())
    want = sample_jit(MODEL, params(), tokens_BP, mask_BP, jax.random.key(0), PLAIN)
    got = sampled(dataclasses.replace(PLAIN, samples=3))
    the_same(got, want)
    responses = got.response_BT.reshape(B, 3, T)
    assert all((row_3T[0] != row_3T[1]).any() for row_3T in responses)


def test_samples_of_one_prompt_share_its_prefill():
    def flops(prompts, samples):
        sampling = rollout.Sampling(max_tokens=T, samples=samples)
        shaped = jax.ShapeDtypeStruct((prompts, P), np.int32), jax.ShapeDtypeStruct((prompts, P), bool)
        traced = sample_jit.trace(MODEL, params(), *shaped, jax.random.key(0), sampling)
        return jaxprs.matmul_flops(traced.jaxpr.jaxpr)

    prefill = P * MODEL.matmul_flops_per_token(head=False)
    prefill += 4 * P**2 * MODEL.heads * MODEL.head_size * MODEL.layers
    assert flops(8, 1) - flops(2, 4) == 6 * prefill


MESHES = pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)], ids=str)
GROUPED = dataclasses.replace(PLAIN, samples=2, halvings=1, slots=8)
GROUPED_INT8 = dataclasses.replace(GROUPED, int8_cache=True)


def on_mesh(shape, sampling):
    """The sampler compiled for a mesh of eight devices."""
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, shape)))
    rows, whole = sharding.batch(mesh), sharding.replicated(mesh)
    weights = sharding.param_shardings(mesh, transformer.abstract(MODEL), transformer.logical_axes(MODEL))

    def sample(params, tokens_QP, mask_QP, key):
        return rollout.sample(MODEL, params, tokens_QP, mask_QP, key, sampling)

    jitted = jax.jit(sharding.on(mesh, sample), in_shardings=(weights, rows, rows, whole), out_shardings=rows)
    return jitted.lower(params(), *prompts(), jax.random.key(0)).compile(), (weights, rows, rows, whole)


@MESHES
@pytest.mark.parametrize("sampling", [GROUPED, GROUPED_INT8], ids=["float", "int8"])
def test_the_same_seed_gives_the_same_tokens_on_any_mesh(shape, sampling):
    program, shardings = on_mesh(shape, sampling)
    r = program(*jax.device_put((params(), *prompts(), jax.random.key(0)), shardings))
    want = sampled(sampling)
    np.testing.assert_array_equal(r.tokens_BL, want.tokens_BL)
    np.testing.assert_array_equal(r.mask_BT, want.mask_BT)
    np.testing.assert_array_equal(r.topk_BTK, want.topk_BTK)
    # A sum in another order may round a cached value to the next of the 255.
    np.testing.assert_allclose(r.logp_BT, want.logp_BT, atol=5e-3 if sampling.int8_cache else 1e-5)
    if shape[2] == 1 and shape[1] == 1:
        kinds = {c.kind for c in hlo.Program(program.as_text()).collectives()}
        assert kinds == {"all-reduce"}, "a device needs another's prompts"


def test_a_decode_step_writes_one_slot_of_the_cache_in_place_and_reads_the_rest_once():
    b, p, t, model = 5, 7, 24, tiny.STUDENT
    prompts = jax.ShapeDtypeStruct((b, p), jnp.int32), jax.ShapeDtypeStruct((b, p), bool)
    sampling = rollout.Sampling(max_tokens=t)
    sample = jax.jit(lambda *args: rollout.sample(model, *args, jax.random.key(0), sampling))
    program = hlo.Program(sample.lower(transformer.abstract(model), *prompts).compile().as_text(), t)
    cached = {(b, model.kv_heads, model.head_size, p + t), (b, model.kv_heads, p + t, model.head_size)}
    step = [i for i, times, fused in program if times >= t and not fused]
    idle = ("parameter", "get-tuple-element", "tuple", "while")

    def readers(written):
        name = re.compile(rf"%{re.escape(written.name)}\b(?!\.)")
        return [i for i in step if i.opcode not in idle and name.search(i.text)]

    written = [i for i in step if i.opcode not in idle and any(a.dims in cached for a in i.arrays)]
    assert len(written) == 2 * model.layers, "keys and values of each block, and no copy or transpose of them"
    held = [i for i in step if i.opcode == "get-tuple-element" and i.arrays[0].dims in cached]
    assert [len(readers(i)) for i in held] == [1] * len(written), "the update alone"
    for update in written:
        assert "dynamic-update-slice" in update.name
        assert len(readers(update)) == 1, "attention"


def test_rows_of_a_sparse_model_leave_on_a_mesh_and_change_nothing():
    experts = {
        "family": "qwen3_moe",
        "ffn": 16,
        "experts": 8,
        "experts_per_token": 2,
        "normalise_experts": True,
    }
    model = ENDLESS.replace(**experts)
    weights = tiny.weights(model)
    draws = rollout.Draws(rollout.row_keys(jax.random.key(0), np.arange(B)), LIMITS)
    want = sample_jit(model, weights, *prompts(), draws, PLAIN)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    rows = sharding.batch(mesh)
    placed = sharding.param_shardings(mesh, transformer.abstract(model), transformer.logical_axes(model))
    sampling = dataclasses.replace(PLAIN, halvings=2)
    sample = jax.jit(
        sharding.on(mesh, lambda *args: rollout.sample(model, *args, sampling)),
        in_shardings=(placed, rows, rows, rows),
        out_shardings=rows,
    )
    the_same(sample(*jax.device_put((weights, *prompts(), draws), (placed, rows, rows, rows))), want)
