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
the loop's cache in the order that the kernel reads, so the transpose is free; a test compiles a loop for
TPUs and finds no copy.

The new slot is best written by the kernel too (`write_and_attend`). A TPU writes whole tiles, so that one
slot along the lanes costs 128: for SmolLM2-360M and 64 rows, `dynamic_update_slice` would take longer than
attention itself.
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
    return _on_mesh(q_B1HC, start_B, written, layer, (), interpret)[0]


def write_and_attend(q_B1HC, new, layer, start_B, slot, *, interpret: bool = False):
    """Writes the cache's new slot and attends, as `attend` does, to all slots up to it.

    The kernel writes the slot together with the few slots that share its tiles. It has them already, so this
    is cheaper than `dynamic_update_slice`, which reads them again and needs a program of its own.

    Args:
      q_B1HC, layer, start_B, interpret: as in `attend`; the slot is not written yet.
      new: what the slot is to hold, arrays like those of `layer` with one slot.
      slot: int32 scalar, the number of slots written before; the same in every row.

    Returns:
      (what `attend` returns; the layer with the slot written, in the memory of the old one if XLA may).
    """
    out_B1HC, *layer = _on_mesh(q_B1HC, start_B, slot + 1, layer, new, interpret)
    return out_B1HC, tuple(layer)


def _on_mesh(q_B1HC, start_B, written, layer, new, interpret):
    """[attention's output, the layer's arrays if there is something new], each device with its part."""
    slots = layer[0].shape[3]
    if slots % LANES:
        raise ValueError(f"the cache has {slots} slots; the decode kernel takes a multiple of {LANES}")
    mesh = jax.sharding.get_abstract_mesh()
    written_1 = jnp.reshape(written, 1).astype(jnp.int32)
    operands = q_B1HC, start_B.astype(jnp.int32), written_1, tuple(layer), tuple(new)
    part = functools.partial(_attend, interpret=interpret)
    if mesh.empty:
        return part(*operands)
    heads = sharding.spec(layer[0].shape, ("batch", "cache_heads", None, None), mesh)
    spec = jax.sharding.PartitionSpec
    queries = spec(heads[0], None, heads[1], None)
    in_specs = queries, spec(heads[0]), spec(), heads, heads
    out_specs = [queries, *(heads for _ in layer if new)]
    # The kernel's outputs do not say over which axes they vary.
    return jax.shard_map(part, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*operands)


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


def _attend(q_B1HC, start_B, written_1, layer, new, *, interpret):
    """`_on_mesh` on one device's rows and heads."""
    b, kv, c, s = layer[0].shape
    heads = q_B1HC.shape[2]
    filled = SUBLANES * pl.cdiv(heads // kv, SUBLANES)
    q_BHC = (q_B1HC * c**-0.5).reshape(b, heads, c)
    itemsize = layer[0].dtype.itemsize
    rows, slots = block(b, kv, c, s, itemsize)
    channels_last = c % LANES == 0
    turned = 0 if channels_last else 1  # keys or values
    layer = [x.swapaxes(2, 3) if n == turned else x for n, x in enumerate(layer)]

    def cache_block(n, slots, index):
        """`slots` slots of keys and values (n < 2) or scales, at index(the grid's indices)."""
        if n < 2 and channels_last:
            return pl.BlockSpec((rows, kv, slots, c), lambda *at: (at[0], 0, index(*at), 0))
        width = c if n < 2 else 1
        return pl.BlockSpec((rows, kv, width, slots), lambda *at: (at[0], 0, 0, index(*at)))

    def tile(n):
        """The slots that are written together: those that share a register's tile with the new one."""
        size = SUBLANES * 4 // itemsize if n < 2 and channels_last else LANES
        return cache_block(
            n, size, lambda g, j, first_G, start_B, written_1: jax.lax.div(written_1[0] - 1, size)
        )

    query_block = pl.BlockSpec((rows, heads, c), lambda *at: (at[0], 0, 0))
    layer_blocks = [cache_block(n, slots, _block_to_load) for n in range(len(layer))]
    tiles = [tile(n) for n in range(len(new))]
    new = [x.astype(jnp.float32).reshape(b, kv, 1, -1) for x in new]
    new = [x if n < 2 else jnp.broadcast_to(x, (b, kv, 1, LANES)) for n, x in enumerate(new)]
    new_blocks = [pl.BlockSpec((rows, *x.shape[1:]), lambda *at: (at[0], 0, 0, 0)) for x in new]
    blocks = pl.cdiv(written_1[0], slots)
    first_G = jnp.minimum(start_B.reshape(-1, rows).min(axis=1) // slots, blocks - 1)
    scalars = first_G, start_B, written_1
    out_BHC, *layer = pl.pallas_call(
        functools.partial(_kernel, arrays=len(layer), writes=bool(new), channels_last=channels_last),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(b // rows, blocks),
            in_specs=[query_block, *layer_blocks, *new_blocks],
            out_specs=[query_block, *tiles],
            scratch_shapes=[
                pltpu.VMEM((rows, kv, filled, c), q_BHC.dtype),
                pltpu.VMEM((rows, kv, filled, LANES), jnp.float32),
                pltpu.VMEM((rows, kv, filled, LANES), jnp.float32),
                pltpu.VMEM((rows, kv, filled, c), jnp.float32),
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_BHC, *(layer if new else ()))],
        input_output_aliases={len(scalars) + 1 + n: 1 + n for n in range(len(new))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="decode_attention",
        interpret=interpret,
    )(*scalars, q_BHC, *layer, *new)
    return [out_BHC[:, None], *(x.swapaxes(2, 3) if n == turned else x for n, x in enumerate(layer))]


def _block_to_load(g, j, first_G, *_):
    """The block of slots of step j of group g: a step before the group's first real slot loads that one."""
    return jnp.maximum(j, first_G[g])


def _kernel(first_G, start_B, written_1, *rest, arrays, writes, channels_last):
    """One grid step: some rows, all their heads, one block of slots.

    Args:
      first_G: each group's first block that holds a real slot. start_B, written_1: as in `attend`.
      rest: scaled queries of the rows, [R, H, C]; keys and values, [R, K, S, C] if channels_last, else
        [R, K, C, S]; the scales [R, K, 1, S] of both if they are int8; if the kernel writes, the new slot of
        each in float32, channels or one scale along the lanes; the output like the queries; and the tile to
        write of each. Then what is kept between steps: the queries by kv head, their number filled up to a
        multiple of 8, and in float32 the largest score and the sum of weights, each the same in all lanes,
        and the sum of weighted values.
      arrays: the number of a layer's arrays, 2 or 4.
    """
    q_RHC, *rest, q_RKGC, largest_RKG_, total_RKG_, sum_RKGC = rest
    layer, rest = rest[:arrays], rest[arrays:]
    k, v, *scales = layer
    new, out_RHC, tiles = rest[: writes * arrays], rest[writes * arrays], rest[writes * arrays + 1 :]
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

    def write():
        """Puts the new slot into the block, which then is as if it had been written before, and its tiles."""
        at = written_1[0] - 1 - j * slots
        for n, (x, x_new, x_tile) in enumerate(zip(layer, new, tiles)):
            axis = slot_axis if n < 2 else 2
            size = x_tile.shape[1 + axis]
            base = pl.multiple_of(jax.lax.div(at, size) * size, size)
            part = (pl.ds(base, size), slice(None)) if axis == 1 else (slice(None), pl.ds(base, size))
            for r in range(rows):
                for m in range(kv):
                    old = x[r, m, *part].astype(jnp.float32)
                    fresh = x_new[r, m]
                    if n < 2 and axis == 2:
                        fresh = jnp.broadcast_to(fresh, (size, c)).T
                    here = jax.lax.broadcasted_iota(jnp.int32, old.shape, axis - 1) == at - base
                    x[r, m, *part] = x_tile[r, m] = jnp.where(here, fresh, old).astype(x.dtype)

    def finish():
        if writes:
            write()
        add(ends=True)
        for r in range(rows):
            out_KGC = sum_RKGC[r] / _lanes(total_RKG_[r], c)
            out_HC = jnp.concatenate([out_KGC[n, :group] for n in range(kv)], axis=0)
            out_RHC[r] = out_HC.astype(out_RHC.dtype)

    @pl.when(j >= first_G[g])
    def compute():
        jax.lax.cond(j < last, functools.partial(add, ends=False), finish)


def _product(left_KGX, right, axis):
    """float32 products of each head's rows, summed over `axis` of the right operand.

    The precision is not left to jax.config: the compiler has no more than one for bfloat16.
    """
    dims = (((2,), (axis,)), ((0,), (0,)))
    precision = jax.lax.Precision.HIGHEST if left_KGX.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.dot_general(left_KGX, right, dims, precision=precision, preferred_element_type=jnp.float32)


def _lanes(x_KG_, count: int):
    """Numbers that are the same in all 128 lanes, over `count` lanes."""
    return jnp.concatenate([x_KG_] * pl.cdiv(count, LANES), axis=-1)[..., :count]
