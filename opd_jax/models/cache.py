"""The key/value cache. Prefill fills it; each decode step reads it once and writes one slot.

Decoding keeps one array per layer instead of a stacked one, because a slice of a stacked array inside the
loop would be copied at every step. `unstack` splits the weights in the same way, once, before the loop.
"""

import jax
import jax.numpy as jnp
from flax import struct

from opd_jax.models import attention, decode_attention, moe, transformer
from opd_jax.models.config import ModelConfig
from opd_jax.models.int8 import quantise
from opd_jax.parallel import shard_rows, sharding

READ = 128, 512  # slots that `extend` reads at a time, of a short cache and of a long one
LONG = 2048  # slots of the longest short cache


@struct.dataclass
class KVCache:
    """Keys and values of every layer.

    Attributes:
      layers: (keys [B, K, C, S], values [B, K, S, C]) of each layer in the compute dtype, for S slots. In
        int8 the scales of both follow, each float32 [B, K, 1, S].
      start_B: the first slot of each row that holds a real token; all written slots after it do too.
    """

    layers: tuple[tuple[jax.Array, ...], ...]
    start_B: jax.Array


def unstack(config: ModelConfig, params: dict, rows: int) -> dict:
    """The parameters as `decode` takes them: with "layers", the blocks' weights one by one, for "blocks".

    They are gathered once for all steps.

    They have the dtype and layout that products of `rows` rows use. Experts, which are most of a sparse
    model, are spread over the slice if possible.
    """
    spread = moe.can_spread(config, jax.sharding.get_abstract_mesh())

    def layer(i):
        p = jax.tree.map(lambda w: w[i], params["blocks"])
        return transformer.decode_block(config, transformer.gather_block(config, p, spread=spread), rows)

    return params | {"layers": tuple(map(layer, range(config.layers))), "blocks": {}}


def _stored(k_BKCL, v_BKLC, int8: bool) -> tuple[jax.Array, ...]:
    """Keys and values in the form that the cache stores."""
    if not int8:
        return k_BKCL, v_BKLC
    k, v = quantise(k_BKCL, (2,)), quantise(v_BKLC, (3,))  # one scale for each token and head
    return k.values, v.values, k.scale, v.scale.swapaxes(2, 3)


def prefill(config: ModelConfig, params: dict, tokens_BP, mask_BP, *, int8: bool = False):
    """Reads left-padded prompts.

    Args:
      tokens_BP, mask_BP: ids, and which of them are real; the last column is real in every row.
      int8: keep keys and values in int8, with a scale for each token and head. The prompts' own attention
        is not affected.

    Returns:
      (hidden_BD of the last position, normalised; KVCache of P slots, to be given room by `grow`).
    """
    rope = attention.rope_tables(config, transformer.positions(mask_BP))
    causal = transformer.causal(config, mask_BP)

    def attend(q, k, v):
        return causal(q, k, v), _stored(*attention.cached(k, v), int8)

    def step(x_BPD, p):
        p = transformer.gather_block(config, p)
        return transformer.block(config, p, x_BPD, rope, attend)[:2]

    x_BPD = transformer.embed(config, params, tokens_BP)
    x_BPD, stacked = jax.lax.scan(step, x_BPD, params["blocks"])
    cache = KVCache(layers=tuple(zip(*stacked, strict=True)), start_B=(~mask_BP).sum(axis=1, dtype=jnp.int32))
    return transformer.rms_norm(x_BPD[:, -1], params["final_norm"], config.norm_eps), cache


def repeat(cache: KVCache, samples: int) -> KVCache:
    """Each row of the cache followed by its copies, `samples` in all; no device needs another's rows."""
    return jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), cache)


def widen(cache: KVCache, slots: int) -> KVCache:
    """Adds empty slots in front of the first, up to `slots`."""
    room = slots - cache.layers[0][0].shape[attention.SLOT_AXES[0]]

    def padded(x, slot_axis):
        return jnp.pad(x, [(room if axis == slot_axis else 0, 0) for axis in range(x.ndim)])

    return KVCache(_each(padded, cache.layers), cache.start_B + room)


def grow(config: ModelConfig, cache: KVCache, slots: int) -> KVCache:
    """Adds empty slots at the end, and places the cache on the mesh as the layout says.

    Args:
      slots: how many there must be; `slots_for` says how many there are.
    """
    slots = slots_for(config, slots)

    def padded(x, slot_axis):
        room = slots - x.shape[slot_axis]
        return jnp.pad(x, [(0, room if axis == slot_axis else 0) for axis in range(x.ndim)])

    return _placed(config, KVCache(_each(padded, cache.layers), cache.start_B))


def taken(config: ModelConfig, cache: KVCache, order_SR) -> KVCache:
    """The rows of the cache in an order within each shard, as `shard_rows.taken` takes them."""
    return _placed(config, shard_rows.taken(cache, order_SR))


def reads(platform: str) -> str:
    """The value of ModelConfig.cache_reads for a platform."""
    return {"cpu": "blocks", "tpu": "kernel"}.get(platform, "all")


def slots_for(config: ModelConfig, tokens: int) -> int:
    """Slots of a cache that holds `tokens` tokens: a multiple of what is read at a time."""
    multiple = {"all": 1, "blocks": attention.SLOTS, "kernel": decode_attention.LANES}[config.cache_reads]
    return -(-tokens // multiple) * multiple


def _each(fn, layers):
    """fn(array, its axis of slots) for all arrays of all layers."""
    return tuple(tuple(map(fn, layer, attention.SLOT_AXES)) for layer in layers)


def _placed(config: ModelConfig, cache: KVCache) -> KVCache:
    """Places the cache on the mesh as the layout says."""

    def placed(x, slot_axis):
        axes = ["batch", "cache_heads", None, None]
        axes[slot_axis] = "cache_slots"
        return sharding.constrain(x, *axes, layout=config.layout)

    return KVCache(_each(placed, cache.layers), sharding.constrain(cache.start_B, "batch"))


@struct.dataclass
class StackedCache:
    """Keys and values of a model that reads behind what it has read, several tokens at a time.

    Attributes:
      arrays: those of a layer in KVCache.layers, of all layers: each with an axis of N layers in front.
      start_B: as KVCache's.
    """

    arrays: tuple[jax.Array, ...]
    start_B: jax.Array

    def taken(self, config: ModelConfig, order_SR) -> "StackedCache":
        """Its rows in an order within each shard, as `shard_rows.taken` takes them."""
        arrays = tuple(jax.vmap(lambda x: shard_rows.taken(x, order_SR))(x) for x in self.arrays)
        start_B = sharding.constrain(shard_rows.taken(self.start_B, order_SR), "batch")
        return StackedCache(_placed_layers(config, arrays), start_B)


def read_slots(slots: int) -> int:
    """Slots that `extend` reads at a time, of a cache with so many."""
    return READ[slots > LONG]


def stack(config: ModelConfig, cache: KVCache, slots: int) -> StackedCache:
    """A prefilled cache with room for `slots` slots or a few more, in the form that `extend` takes."""
    slots = -(-slots // read_slots(slots)) * read_slots(slots)

    def stacked(layers, slot_axis):
        x = jnp.stack(layers)
        room = slots - x.shape[slot_axis + 1]
        return jnp.pad(x, [(0, room if axis == slot_axis + 1 else 0) for axis in range(x.ndim)])

    arrays = tuple(map(stacked, zip(*cache.layers, strict=True), attention.SLOT_AXES))
    return StackedCache(_placed_layers(config, arrays), sharding.constrain(cache.start_B, "batch"))


def _placed_layers(config: ModelConfig, arrays):
    def placed(x, slot_axis):
        axes = [None, "batch", "cache_heads", None, None]
        axes[slot_axis + 1] = "cache_slots"
        return sharding.constrain(x, *axes, layout=config.layout)

    return tuple(map(placed, arrays, attention.SLOT_AXES))


def extend(config: ModelConfig, params: dict, tokens_BR, rope, cache: StackedCache, slot):
    """Runs the next R tokens of each row through the model, behind what the cache holds.

    The layers are scanned, so compile time does not grow with depth.

    Args:
      params: as `transformer.forward` takes them.
      tokens_BR: ids.
      rope: attention.rope_tables of their positions.
      slot: scalar index of the first cache slot to write, the same in every row.

    Returns:
      (hidden_BRD, normalised; the cache with R more slots filled).
    """
    int8, written = cache.arrays[0].dtype == jnp.int8, slot + tokens_BR.shape[1]
    size = read_slots(cache.arrays[0].shape[attention.SLOT_AXES[0] + 1])

    def step(carry, layer):
        x_BRD, arrays = carry
        p, i = layer

        def attend(q, k, v):
            filled = tuple(
                jax.lax.dynamic_update_slice(
                    all_, new[None], [i, *(slot if axis == at else 0 for axis in range(4))]
                )
                for all_, new, at in zip(
                    arrays, _stored(*attention.cached(k, v), int8=int8), attention.SLOT_AXES
                )
            )

            def read(block):
                def cut(x, at):
                    sizes = [size if axis == at else n for axis, n in enumerate(x.shape[1:])]
                    begin = [i, *(block * size if axis == at else 0 for axis in range(4))]
                    return jax.lax.dynamic_slice(x, begin, (1, *sizes))[0]

                return tuple(map(cut, filled, attention.SLOT_AXES))

            return attention.attend_to_blocks(q, read, size, cache.start_B, written), filled

        p = transformer.gather_block(config, p)
        x_BRD, arrays, _ = transformer.block(config, p, x_BRD, rope, attend)
        return (x_BRD, arrays), None

    x_BRD = transformer.embed(config, params, tokens_BR)
    layers = params["blocks"], jnp.arange(config.layers)
    (x_BRD, arrays), _ = jax.lax.scan(step, (x_BRD, cache.arrays), layers)
    x_BRD = sharding.constrain(x_BRD, "batch")
    hidden_BRD = transformer.rms_norm(x_BRD, params["final_norm"], config.norm_eps)
    return hidden_BRD, StackedCache(arrays, cache.start_B)


def decode(config: ModelConfig, params: dict, token_B, rope, cache: KVCache, slot):
    """Runs one token of each row through the model.

    Args:
      params: what `unstack` returned.
      token_B: ids.
      rope: attention.rope_tables of their positions, [B, 1, head_size / 2] each. The caller looks them up: a
        compiler would recompute cosines inside the loop for every head of every layer.
      slot: scalar index of the cache slot to write, the same in every row.

    Returns:
      (hidden_BD, normalised; the cache with the slot filled).
    """
    spread = moe.can_spread(config, jax.sharding.get_abstract_mesh())
    x_B1D = transformer.embed(config, params, token_B)[:, None]
    kept = []
    for p, layer in zip(params["layers"], cache.layers, strict=True):

        def attend(q, k, v, layer=layer):
            new = _stored(*attention.cached(k, v), int8=layer[0].dtype == jnp.int8)
            if config.cache_reads == "kernel":
                return decode_attention.write_and_attend(q, new, layer, cache.start_B, slot)
            layer = tuple(
                jax.lax.dynamic_update_slice_in_dim(old, x, slot, axis)
                for old, x, axis in zip(layer, new, attention.SLOT_AXES)
            )
            in_blocks = config.cache_reads == "blocks"
            return attention.attend_written(q, layer, cache.start_B, slot + 1, in_blocks), layer

        x_B1D, layer, _ = transformer.block(config, p, x_B1D, rope, attend, spread=spread)
        kept.append(layer)
    hidden_BD = transformer.rms_norm(x_B1D[:, 0], params["final_norm"], config.norm_eps)
    return hidden_BD, KVCache(tuple(kept), cache.start_B)
