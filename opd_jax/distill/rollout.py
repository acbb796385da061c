"""The student writes: prefill and a decode loop, one compiled program.

All rows share one step counter and one cache slot (`slot` of `cache.decode`). A row that has ended
waits until all have.
"""

import dataclasses

import jax
import jax.numpy as jnp

from opd_jax.distill import vocabulary
from opd_jax.distill.types import Rollouts
from opd_jax.models import ModelConfig, attention, transformer
from opd_jax.models import cache as kv


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to draw; static, so each value compiles its own program.

    Attributes:
      max_tokens: T, the length limit of a response.
      samples: n, responses a prompt. They share its prefill.
      candidates: K, how many of the student's top tokens to keep a position.
      temperature: 0 is greedy.
      top_k: 0 keeps all. Applied before top_p.
      top_p: 1 keeps all. Applied before min_p.
      min_p: least probability relative to the most likely token's; 0 keeps all.
      int8_cache: keep keys and values in int8. Then every log-probability is that of the model as it sampled,
        its keys and values rounded, and a full forward pass gives slightly others.
      cache_stages: how many sizes the KV cache grows through. Each step reads the whole cache, so n stages
        read (n + 1) / 2n of the response part of it; each compiles its own copy of the decode step.
    """

    max_tokens: int
    samples: int = 1
    candidates: int = 4
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    cache_stages: int = 1
    int8_cache: bool = False


def sample(config: ModelConfig, params: dict, tokens_QP, mask_QP, key, sampling: Sampling) -> Rollouts:
    """Samples n responses a prompt; stops as soon as every row has ended.

    Args:
      config, params: the student.
      tokens_QP, mask_QP: Q left-padded prompts; the last column is real in every row.
      key: a PRNG key, or one for each row, as `row_keys` makes them. Row b at step t draws from (key, b, t)
        alone, so the same seed gives the same tokens on any mesh and however the batch is cut.
      sampling: settings.

    Returns:
      Rollouts with B = Q n and T = sampling.max_tokens; row b answers prompt b // n.
    """
    b, p = tokens_QP.shape[0] * sampling.samples, tokens_QP.shape[1]
    t_max = sampling.max_tokens
    key_B = key if key.ndim else row_keys(key, jnp.arange(b))
    end_ids = jnp.array(config.eos_ids or (-1,), jnp.int32)
    head_VD = transformer.head(config, params)

    with jax.named_scope("prefill"):
        hidden_QD, cache = kv.prefill(config, params, tokens_QP, mask_QP, int8=sampling.int8_cache)
        tokens_BP, mask_BP, hidden_BD = (
            jnp.repeat(x, sampling.samples, axis=0) for x in (tokens_QP, mask_QP, hidden_QD)
        )
        cache = kv.repeat(cache, sampling.samples)
        length_B = mask_BP.sum(axis=1, dtype=jnp.int32)
        unstacked = kv.unstack(config, params, b)
        rope_1LC = attention.rope_tables(config, jnp.arange(p + t_max)[None])

    def emit(out, hidden_BD, done_B, t):
        """Draws token t of every row that has not ended and writes it down."""
        u_B2 = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, t), (2,)))(key_B)
        with jax.named_scope("head"):
            logits_BV = transformer.logits(config, head_VD, hidden_BD, decoding=True)
        with jax.named_scope("draw"):
            drawn = _draw(sampling, logits_BV, u_B2, end_ids)
        live_B = ~done_B
        token_B = jnp.where(live_B, drawn["token"], config.pad_id)
        values = {
            name: jnp.where(live_B.reshape((-1,) + (1,) * (x.ndim - 1)), x, 0) for name, x in drawn.items()
        }
        values |= {"token": token_B, "mask": live_B}
        out = {name: jax.lax.dynamic_update_index_in_dim(out[name], values[name], t, axis=0) for name in out}
        ended_B = (token_B[:, None] == end_ids[None]).any(axis=1)
        return out, token_B, done_B | ended_B

    def step(state):
        t, out, token_B, done_B, cache = state
        with jax.named_scope("decode"):
            rope_B1C = [table[0, length_B + t - 1][:, None] for table in rope_1LC]
            hidden_BD, cache = kv.decode(config, unstacked, token_B, rope_B1C, cache, p + t - 1)
        return t + 1, *emit(out, hidden_BD, done_B, t), cache

    out = {
        "token": jnp.full((t_max, b), config.pad_id, jnp.int32),
        "mask": jnp.zeros((t_max, b), bool),
        "logp": jnp.zeros((t_max, b), jnp.float32),
        "behaviour_logp": jnp.zeros((t_max, b), jnp.float32),
        "stop": jnp.zeros((t_max, b), jnp.float32),
        "topk": jnp.zeros((t_max, b, sampling.candidates), jnp.int32),
        "topk_logp": jnp.zeros((t_max, b, sampling.candidates), jnp.float32),
    }
    first = emit(out, hidden_BD, jnp.zeros((b,), bool), 0)
    state = 1, *first, cache
    for stage in range(1, sampling.cache_stages + 1):
        end = t_max * stage // sampling.cache_stages
        state = *state[:-1], kv.grow(config, state[-1], p + end)
        state = jax.lax.while_loop(lambda s, end=end: (s[0] < end) & ~s[3].all(), step, state)
    _, out, _, done_B, _ = state
    out = {name: x.swapaxes(0, 1) for name, x in out.items()}
    return Rollouts(
        tokens_BL=jnp.concatenate([tokens_BP, out["token"]], axis=1),
        prompt_mask_BP=mask_BP,
        mask_BT=out["mask"],
        logp_BT=out["logp"],
        behaviour_logp_BT=out["behaviour_logp"],
        topk_BTK=out["topk"],
        topk_logp_BTK=out["topk_logp"],
        stop_BT=out["stop"],
        finished_B=done_B,
    )


def row_keys(key, row_B):
    """The PRNG keys of rollouts by their numbers in the batch of all processes."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, row_B)


def _draw(sampling: Sampling, logits_BV, u_B2, end_ids) -> dict:
    """One token a row and what is known of it: ids [B], log-probabilities [B], candidates [B, K]."""
    logits_BRW = vocabulary.fold(logits_BV)
    normaliser_B = vocabulary.log_normaliser(logits_BRW)
    topk_BK = vocabulary.top(logits_BRW, sampling.candidates)
    if sampling.temperature == 0:
        token_B = topk_BK[:, 0]
        behaviour_logp_B = jnp.zeros_like(normaliser_B)
    else:
        shaped_BRW = logits_BRW / sampling.temperature
        if sampling.top_k:
            shaped_BRW = vocabulary.keep_top_k(shaped_BRW, sampling.top_k)
        if sampling.top_p < 1:
            shaped_BRW = vocabulary.keep_top_p(shaped_BRW, sampling.top_p)
        if sampling.min_p:
            shaped_BRW = vocabulary.keep_min_p(shaped_BRW, sampling.min_p)
        token_B = vocabulary.draw(shaped_BRW, u_B2)
        behaviour_logp_B = vocabulary.pick_logit(shaped_BRW, token_B[:, None])[
            :, 0
        ] - vocabulary.log_normaliser(shaped_BRW)
    chosen_B = vocabulary.pick_logit(logits_BRW, token_B[:, None])[:, 0]
    stop_BE = logits_BV[:, jnp.maximum(end_ids, 0)] - normaliser_B[:, None]
    return {
        "token": token_B,
        "logp": chosen_B - normaliser_B,
        "behaviour_logp": behaviour_logp_B,
        "stop": jnp.where(end_ids[None] >= 0, jnp.exp(stop_BE), 0).sum(axis=1),
        "topk": topk_BK,
        "topk_logp": vocabulary.pick_logit(logits_BRW, topk_BK) - normaliser_B[:, None],
    }
