"""Splash attention, JAX's kernel for TPU: causal attention that stores no array of scores.

Each row of a sequence is a segment, padding too. Query heads of a group share their keys, which are not
repeated. Blocks above the diagonal are computed neither forward nor backward. Lengths and head sizes that the
kernel does not take are filled up with zeros, which changes no result.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as kernels

from opd_jax.parallel import sharding

LANES = 128  # lanes of a TPU register; head sizes and blocks are multiples of it
BLOCKS = (512, 256, 128)


def attend(q_BLHC, k_BLKC, v_BLKC, row_BL, *, interpret: bool = False):
    """Causal softmax attention among the real tokens of each row.

    On a mesh each device computes its own rows and heads. If `tensor` does not divide the kv heads evenly,
    every device along it computes all heads.

    Args:
      q_BLHC: queries; head h belongs to kv head h // (H / K). k_BLKC, v_BLKC: keys and values.
      row_BL: as for `attention.causal_mask`; padding gives finite, meaningless values.
      interpret: run the kernel in interpret mode, which works on any device.

    Returns:
      [B, L, H, C] in the queries' dtype. Scores and softmax are float32.
    """
    mesh = jax.sharding.get_abstract_mesh()

    def part(q_BLHC, k_BLKC, v_BLKC, row_BL):
        return _attend(q_BLHC, k_BLKC, v_BLKC, row_BL, interpret)

    if mesh.empty:
        return part(q_BLHC, k_BLKC, v_BLKC, row_BL)
    heads = sharding.spec(k_BLKC.shape, ("batch", None, "kv_heads", None), mesh)
    rows = sharding.spec(row_BL.shape, ("batch", None), mesh)
    # The kernel's outputs do not say over which axes they vary.
    cut = jax.shard_map(part, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
    return cut(q_BLHC, k_BLKC, v_BLKC, row_BL)


def _attend(q_BLHC, k_BLKC, v_BLKC, row_BL, interpret):
    _, real_length, heads, c = q_BLHC.shape
    room = -real_length % BLOCKS[-1], -c % LANES
    # Keys at the end are seen by no query before them; channels of zeros add nothing to a score.
    q_BLHC, k_BLKC, v_BLKC = (
        jnp.pad(x, ((0, 0), (0, room[0]), (0, 0), (0, room[1]))) for x in (q_BLHC, k_BLKC, v_BLKC)
    )
    row_BL = jnp.pad(row_BL, ((0, 0), (0, room[0])))
    length = real_length + room[0]
    b = next(block for block in BLOCKS if length % block == 0)
    kernel = kernels.make_splash_mha(
        kernels.MultiHeadMask([kernels.CausalMask((length, length))] * heads),
        block_sizes=kernels.BlockSizes(
            block_q=b,
            block_kv=b,
            block_q_dkv=b,
            block_kv_dkv=b,
            block_q_dq=b,
            block_kv_dq=b,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    segment_BL = row_BL.astype(jnp.int32)
    q, k, v = (x.swapaxes(1, 2) for x in (q_BLHC * c**-0.5, k_BLKC, v_BLKC))
    out_BHLC = jax.vmap(kernel)(q, k, v, kernels.SegmentIds(segment_BL, segment_BL))
    # A tuple only with save_residuals, which this kernel is made without.
    return out_BHLC.swapaxes(1, 2)[:, :real_length, :, :c]  # pyright: ignore[reportAttributeAccessIssue]
