"""Attention of one new token per row, a Pallas kernel for TPU that reads only the written part of the cache.

Plain attention reads every slot of the cache and masks those that are not written yet. This kernel's grid is
(groups of rows) x (blocks of slots), and the second number is computed at runtime from the number of written
slots. Blocks before the first real slot of a group of left-padded rows are not loaded either.

Block sizes: a grid step costs about 0.35 us whatever it does, so a step of one row is too small (64 rows x 8
blocks x 28 layers are 14k steps, 5 ms a token). A step takes several rows, about 2 MiB of keys and values,
which need 2.6 us from the HBM of a v5e and hide the step's own cost. Slots come in blocks of 128 if there are
enough rows to fill a step, so that on average half a block, 64 slots, is read in vain.

The kernel wants channels or slots along the lanes of a register, whichever fill them: channels if the head
size is a multiple of 128, else slots. The cache is handed over transposed to that order. The compiler stores
the loop's cache in the order that the kernel reads, so the transpose is free.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from opd_jax.models.attention import MASKED
from opd_jax.parallel import sharding

LANES = 128  # lanes of a TPU register; the cache's slots are a multiple of it
SUBLANES = 8  # query rows of a kv head are filled up to a multiple of it
STEP_BYTES = 2 * 2**20  # keys and values of one grid step; they are double buffered
MAX_SLOTS = 512  # of a block
MAX_HEADS = 64  # rows x kv heads of a step: the kernel's code is written out for each


def attend(q_B1HC, layer, start_B, written, *, interpret: bool = False):
    """Softmax attention of one query per row over the real slots, start_b <= slot < written.

    On a mesh each device computes its own rows and heads. If `tensor` does not divide the kv heads evenly,
    every device along it computes all heads. The cache's slots must not be cut over the mesh.

    Args:
      q_B1HC: queries; head h belongs to kv head h // (H / K).
      layer: a layer of `cache.KVCache`, the new slot included: keys [B, K, C, S] and values [B, K, S, C] in
        the queries' dtype, or in int8, followed by their scales. S is a multiple of 128. What the slots from
        `written` on hold does not matter.
      start_B: int32, the first real slot of each row. The slots before it hold finite numbers. A row with
        start >= written gives a finite, meaningless value.
      written: int32 scalar, the number of written slots, at least 1; the same in every row.
      interpret: run the kernel in interpret mode, which works on any device.

    Returns:
      [B, 1, H, C] in the queries' dtype. Scores and softmax are float32.
    """
    keys_BKCS = layer[0]
    slots = keys_BKCS.shape[3]
    if slots % LANES:
        raise ValueError(f"the cache has {slots} slots; the decode kernel takes a multiple of {LANES}")
    mesh = jax.sharding.get_abstract_mesh()
    written_1 = jnp.reshape(written, 1).astype(jnp.int32)
    operands = q_B1HC, start_B.astype(jnp.int32), written_1, *layer
    part = functools.partial(_attend, interpret=interpret)
    if mesh.empty:
        return part(*operands)
    heads = sharding.spec(keys_BKCS.shape, ("batch", "cache_heads", None, None), mesh)
    rows, over_heads = heads[0], heads[1]
    spec = jax.sharding.PartitionSpec
    queries = spec(rows, None, over_heads, None)
    in_specs = queries, spec(rows), spec(), *(heads for _ in layer)
    # The kernel's output does not say over which axes it varies.
    cut = jax.shard_map(part, in_specs=in_specs, out_specs=queries, check_vma=False)
    return cut(*operands)


def block(rows: int, heads: int, channels: int, slots: int, itemsize: int) -> tuple[int, int]:
    """(rows, slots) of one grid step, for a device's rows, kv heads and slots of the cache."""

    def fits(r, s):
        return r * s * 2 * heads * channels * itemsize <= STEP_BYTES

    most = max(1, min(rows // 2, MAX_HEADS // heads))  # two groups at least: some chips have two cores
    r = max(n for n in range(1, most + 1) if rows % n == 0 and (n == 1 or fits(n, LANES)))
    s = LANES
    while 2 * s <= min(slots, MAX_SLOTS) and fits(r, 2 * s):
        s *= 2
    return r, s


def _attend(q_B1HC, start_B, written_1, *layer, interpret):
    """`attend` on one device's rows and heads."""
    keys_BKCS, values_BKSC, *scales = layer
    b, kv, c, s = keys_BKCS.shape
    heads = q_B1HC.shape[2]
    filled = SUBLANES * pl.cdiv(heads // kv, SUBLANES)
    q_BHC = (q_B1HC * c**-0.5).reshape(b, heads, c)
    rows, slots = block(b, kv, c, s, keys_BKCS.dtype.itemsize)
    channels_last = c % LANES == 0
    if channels_last:
        keys, values = keys_BKCS.swapaxes(2, 3), values_BKSC
        cache_block = pl.BlockSpec((rows, kv, slots, c), lambda *at: (at[0], 0, _block_to_load(*at), 0))
    else:
        keys, values = keys_BKCS, values_BKSC.swapaxes(2, 3)
        cache_block = pl.BlockSpec((rows, kv, c, slots), lambda *at: (at[0], 0, 0, _block_to_load(*at)))
    scale_block = pl.BlockSpec((rows, kv, 1, slots), lambda *at: (at[0], 0, 0, _block_to_load(*at)))
    query_block = pl.BlockSpec((rows, heads, c), lambda *at: (at[0], 0, 0))
    blocks = pl.cdiv(written_1[0], slots)
    first_G = jnp.minimum(start_B.reshape(-1, rows).min(axis=1) // slots, blocks - 1)
    out_BHC = pl.pallas_call(
        functools.partial(_kernel, channels_last=channels_last),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(b // rows, blocks),
            in_specs=[query_block, cache_block, cache_block, *(scale_block for _ in scales)],
            out_specs=query_block,
            scratch_shapes=[
                pltpu.VMEM((rows, kv, filled, c), q_BHC.dtype),
                pltpu.VMEM((rows, kv, filled, LANES), jnp.float32),
                pltpu.VMEM((rows, kv, filled, LANES), jnp.float32),
                pltpu.VMEM((rows, kv, filled, c), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q_BHC.shape, q_BHC.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="decode_attention",
        interpret=interpret,
    )(first_G, start_B, written_1, q_BHC, keys, values, *scales)
    return out_BHC[:, None]


def _block_to_load(g, j, first_G, *_):
    """The block of slots of step j of group g: a step before the group's first real slot loads that one."""
    return jnp.maximum(j, first_G[g])


def _kernel(first_G, start_B, written_1, q_RHC, *rest, channels_last):
    """One grid step: some rows, all their heads, one block of slots.

    Args:
      first_G: each group's first block that holds a real slot. start_B, written_1: as in `attend`.
      q_RHC: scaled queries of the rows.
      rest: keys and values, [R, K, S, C] if channels_last, else [R, K, C, S]; the scales [R, K, 1, S] of both
        if they are int8; the output like q_RHC. Then what is kept between steps: the queries by kv head,
        their number filled up to a multiple of 8, and in float32 the largest score and the sum of weights,
        each the same in all lanes, and the sum of weighted values.
    """
    k, v, *scales, out_RHC, q_RKGC, largest_RKG_, total_RKG_, sum_RKGC = rest
    rows, heads, c = q_RHC.shape
    _, kv, filled, _ = q_RKGC.shape
    group = heads // kv
    slots = k.shape[2 if channels_last else 3]
    g, j, last = pl.program_id(0), pl.program_id(1), pl.num_programs(1) - 1
    slot_axis, channel_axis = (1, 2) if channels_last else (2, 1)

    @pl.when(j == 0)
    def start():
        largest_RKG_[...] = jnp.full_like(largest_RKG_, MASKED)
        total_RKG_[...] = jnp.zeros_like(total_RKG_)
        sum_RKGC[...] = jnp.zeros_like(sum_RKGC)
        for r in range(rows):
            q_HC = q_RHC[r].astype(jnp.float32)
            for n in range(kv):
                q_GC = jnp.pad(q_HC[n * group : (n + 1) * group], ((0, filled - group), (0, 0)))
                q_RKGC[r, n] = q_GC.astype(q_RKGC.dtype)

    def add(ends: bool):
        """Adds the block to the sums; `ends`: it may hold slots that are not written."""
        dtype = q_RHC.dtype
        slot_11S = j * slots + jax.lax.broadcasted_iota(jnp.int32, (1, 1, slots), 2)
        for r in range(rows):
            allowed_11S = slot_11S >= start_B[g * rows + r]
            k_K, v_K = k[r], v[r]
            if ends:
                allowed_11S &= slot_11S < written_1[0]
            score_KGS = _product(q_RKGC[r], k_K.astype(dtype), channel_axis)
            if scales:
                score_KGS *= scales[0][r]
            score_KGS = jnp.where(allowed_11S, score_KGS, MASKED)
            old = largest_RKG_[r]
            new = jnp.maximum(old, score_KGS.max(axis=-1, keepdims=True))
            kept = jnp.exp(old - new)
            weight_KGS = jnp.exp(score_KGS - _lanes(new, slots))
            largest_RKG_[r] = new
            total_RKG_[r] = total_RKG_[r] * kept + weight_KGS.sum(axis=-1, keepdims=True)
            if scales:
                scale_K1S = scales[1][r]
                weight_KGS *= jnp.where(allowed_11S, scale_K1S, 0) if ends else scale_K1S
            elif ends:  # a weight of 0 times NaN is NaN
                at = j * slots + jax.lax.broadcasted_iota(jnp.int32, v_K.shape, slot_axis)
                v_K = jnp.where(at < written_1[0], v_K.astype(jnp.float32), 0)
            value_KGC = _product(weight_KGS.astype(dtype), v_K.astype(dtype), slot_axis)
            sum_RKGC[r] = sum_RKGC[r] * _lanes(kept, c) + value_KGC

    @pl.when((j >= first_G[g]) & (j < last))
    def inner():
        add(ends=False)

    @pl.when(j == last)
    def end():
        add(ends=True)
        for r in range(rows):
            out_KGC = sum_RKGC[r] / _lanes(total_RKG_[r], c)
            out_HC = jnp.concatenate([out_KGC[n, :group] for n in range(kv)], axis=0)
            out_RHC[r] = out_HC.astype(out_RHC.dtype)


def _product(left_KGX, right, axis):
    """float32 products of each head's rows, summed over `axis` of the right operand."""
    dims = (((2,), (axis,)), ((0,), (0,)))
    return jax.lax.dot_general(left_KGX, right, dims, preferred_element_type=jnp.float32)


def _lanes(x_KG_, count: int):
    """Numbers that are the same in all 128 lanes, over `count` lanes."""
    return jnp.concatenate([x_KG_] * pl.cdiv(count, LANES), axis=-1)[..., :count]
