"""The key/value cache: prefill fills it, decode reads it once and writes one slot a step.

Decoding keeps one array a layer instead of a stacked one, and `unstack` does the same to the weights
once, before the loop: a slice of a stacked array inside the loop would be copied at every step.
"""

import jax
import jax.numpy as jnp
from flax import struct

from opd_jax.models import attention, transformer
from opd_jax.models.config import ModelConfig


@struct.dataclass
class KVCache:
    """Keys and values of every layer.

    Attributes:
      keys: one [B, K, C, S] array a layer in the compute dtype, S slots.
      values: one [B, K, S, C] array a layer.
      filled_BS: slots that hold a real token.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    filled_BS: jax.Array


def unstack(config: ModelConfig, params: dict) -> tuple[dict, ...]:
    """The blocks' weights, layer by layer, in the compute dtype or int8, gathered once for all steps."""
    return tuple(
        transformer.gather_block(config, jax.tree.map(lambda w, i=i: w[i], params["blocks"]))
        for i in range(config.layers)
    )


def prefill(config: ModelConfig, params: dict, tokens_BP, mask_BP):
    """Reads left-padded prompts.

    Args:
      tokens_BP, mask_BP: ids and which are real; the last column is real in every row.

    Returns:
      (hidden_BD of the last position, normalised; KVCache of P slots, to be given room by `grow`).
    """
    rope = attention.rope_tables(config, transformer.positions(mask_BP))
    allowed_BPP = attention.causal_mask(mask_BP)

    def attend(q, k, v):
        k, v = attention.cached(k, v)
        return attention.attend(q, k, v, allowed_BPP), (k, v)

    def step(x_BPD, p):
        return transformer.block(config, p, x_BPD, rope, attend)

    x_BPD = transformer.embed(config, params, tokens_BP)
    x_BPD, (k_NBKCP, v_NBKPC) = jax.lax.scan(step, x_BPD, params["blocks"])
    cache = KVCache(keys=tuple(k_NBKCP), values=tuple(v_NBKPC), filled_BS=mask_BP)
    return transformer.rms_norm(x_BPD[:, -1], params["final_norm"], config.norm_eps), cache


def grow(cache: KVCache, slots: int) -> KVCache:
    """The cache with empty slots added at the end, `slots` in all."""
    none, room = (0, 0), (0, slots - cache.filled_BS.shape[1])
    return KVCache(
        keys=tuple(jnp.pad(k_BKCS, (none, none, none, room)) for k_BKCS in cache.keys),
        values=tuple(jnp.pad(v_BKSC, (none, none, room, none)) for v_BKSC in cache.values),
        filled_BS=jnp.pad(cache.filled_BS, (none, room)),
    )


def decode(config: ModelConfig, params: dict, layers, token_B, position_B, cache: KVCache, slot):
    """One token a row through the model.

    Args:
      layers: what `unstack` returned.
      token_B, position_B: id and rotary position of the token.
      slot: scalar index of the cache slot it takes, the same in every row.

    Returns:
      (hidden_BD, normalised; the cache with the slot filled).
    """
    rope = attention.rope_tables(config, position_B[:, None])
    filled_BS = jax.lax.dynamic_update_slice_in_dim(
        cache.filled_BS, jnp.ones_like(cache.filled_BS[:, :1]), slot, axis=1
    )
    x_B1D = transformer.embed(config, params, token_B)[:, None]
    keys, values = [], []
    for p, k_BKCS, v_BKSC in zip(layers, cache.keys, cache.values, strict=True):

        def attend(q, k, v, k_BKCS=k_BKCS, v_BKSC=v_BKSC):
            k, v = attention.cached(k, v)
            k_BKCS = jax.lax.dynamic_update_slice_in_dim(k_BKCS, k, slot, axis=3)
            v_BKSC = jax.lax.dynamic_update_slice_in_dim(v_BKSC, v, slot, axis=2)
            return attention.attend(q, k_BKCS, v_BKSC, filled_BS[:, None]), (k_BKCS, v_BKSC)

        x_B1D, (k_BKCS, v_BKSC) = transformer.block(config, p, x_B1D, rope, attend)
        keys.append(k_BKCS)
        values.append(v_BKSC)
    hidden_BD = transformer.rms_norm(x_B1D[:, 0], params["final_norm"], config.norm_eps)
    return hidden_BD, KVCache(keys=tuple(keys), values=tuple(values), filled_BS=filled_BS)
