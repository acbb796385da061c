"""The feed-forward of a mixture of experts. Each token goes to its top-k experts; none is dropped.

Rows are sorted by expert and multiplied group by group (`jax.lax.ragged_dot`). On TPU and GPU this computes
only the chosen experts. XLA's CPU backend has no grouped product and multiplies every row by every expert:
the result is right, but only small models are practical.

On a mesh each device runs its own rows through its own experts, and one sum over `tensor` adds up the parts
of a token. When decoding, tokens are few and no device could hold all experts. The experts are then spread
over `fsdp` too, and each device runs the rows of all its neighbours. The compiler never partitions a grouped
product, because it would gather all experts.
"""

import jax
import jax.numpy as jnp
from flax import struct

from opd_jax.models import int8
from opd_jax.models.config import ModelConfig
from opd_jax.parallel import sharding

# Logical axes of an expert's matrices in the products, which need them whole along fsdp.
_IN, _OUT = ("experts", None, "ffn"), ("experts", "ffn", None)
_SPREAD = ("spread_experts", None, None)


@struct.dataclass
class Routing:
    """What a block's router decided for each token.

    Attributes:
      expert_BLX: the token's X experts, most likely first.
      weight_BLX: float32, their probabilities in the softmax over all experts, normalised if configured.
      entropy_BL: entropy of that softmax, nats.
    """

    expert_BLX: jax.Array
    weight_BLX: jax.Array
    entropy_BL: jax.Array


@struct.dataclass
class Load:
    """How the routers of all blocks spread a batch's tokens. The loads of parts of a batch add up.

    Attributes:
      rows_NE: int32, tokens that chose each expert of each block.
      entropy_N: float32, sum of `Routing.entropy_BL` over the tokens.
      tokens: int32, real tokens. No field counts padding.
    """

    rows_NE: jax.Array
    entropy_N: jax.Array
    tokens: jax.Array


def route(config: ModelConfig, router_DE, x_BLD) -> Routing:
    """Chooses the experts of each token from its normalised hidden states."""
    x_MD = x_BLD.reshape(-1, x_BLD.shape[-1])
    logp_ME = jax.nn.log_softmax(jax.lax.dot(x_MD, router_DE, preferred_element_type=jnp.float32))
    probability_ME = jnp.exp(logp_ME)
    weight_MX, expert_MX = jax.lax.top_k(probability_ME, config.experts_per_token)
    if config.normalise_experts:
        weight_MX = weight_MX / weight_MX.sum(axis=-1, keepdims=True)
    routing = Routing(expert_MX, weight_MX, -(probability_ME * logp_ME).sum(axis=-1))
    return jax.tree.map(lambda x: x.reshape(*x_BLD.shape[:2], *x.shape[1:]), routing)


def block_load(config: ModelConfig, routing: Routing, mask_BL) -> Load:
    """One block's part of `Load`, without a gradient."""
    chosen_BLXE = routing.expert_BLX[..., None] == jnp.arange(config.experts)[None, None, None]
    rows_E = (chosen_BLXE & mask_BL[..., None, None]).sum(axis=(0, 1, 2), dtype=jnp.int32)
    entropy_BL = jax.lax.stop_gradient(routing.entropy_BL)
    return Load(rows_E, jnp.where(mask_BL, entropy_BL, 0).sum(), mask_BL.sum(dtype=jnp.int32))


def statistics(load: Load) -> dict[str, jax.Array]:
    """Means over blocks: peak load relative to the mean, share of idle experts, entropy in nats."""
    mean_N = load.rows_NE.mean(axis=1)
    return {
        "peak": (load.rows_NE.max(axis=1) / jnp.maximum(mean_N, 1e-9)).mean(),
        "idle": (load.rows_NE == 0).mean(),
        "entropy": load.entropy_N.mean() / jnp.maximum(load.tokens, 1),
    }


def can_spread(config: ModelConfig, mesh) -> bool:
    """Whether each expert can be placed on a single device of the fsdp and tensor axes."""
    if not config.experts or mesh.empty or "spread_experts" not in config.layout.rules:
        return False
    return config.experts % (mesh.shape["fsdp"] * mesh.shape["tensor"]) == 0


def feed_forward(config: ModelConfig, p: dict, x_BLD, routing: Routing, *, spread: bool = False):
    """Sums weight x (silu(x gate) * (x up)) down over each token's experts, as transformers' Qwen3MoE does.

    Args:
      p: one block's weights: gate and up [E, D, F], down [E, F, D].
      x_BLD: normalised hidden states; padding is routed like any token and costs the same.
      routing: what `route` decided.
      spread: each expert is on a single device of the fsdp and tensor axes; needs `can_spread`.

    Returns:
      [B, L, D] in x's dtype.
    """
    arrays = x_BLD, routing.expert_BLX, routing.weight_BLX, p["gate"], p["up"], p["down"]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _held_experts(*arrays[:3], arrays[3:])
    rules = config.layout.rules
    weights = (_SPREAD,) * 3 if spread else (_IN, _IN, _OUT)
    axes = (*(("batch", None, None),) * 3, *weights)

    def cut(x, names):
        return jax.tree.map(lambda part: sharding.spec(part.shape, names, mesh, rules), x)

    specs = tuple(map(cut, arrays, axes))
    experts_cut_by, width_cut_by, _ = sharding.spec(p["down"].shape, weights[-1], mesh, rules)

    def part(x_BLD, expert_BLX, weight_BLX, *weights):
        cut_by = experts_cut_by or width_cut_by
        if cut_by is None:
            return _held_experts(x_BLD, expert_BLX, weight_BLX, weights)
        first = 0 if experts_cut_by is None else jax.lax.axis_index(experts_cut_by) * weights[-1].shape[0]
        # JAX 0.10 does not sum the gradient of a gather over an axis that cuts only its indices.
        x_BLD = jax.lax.pcast(x_BLD, cut_by, to="varying")
        return jax.lax.psum(_held_experts(x_BLD, expert_BLX, weight_BLX, weights, first), cut_by)

    def spread_part(*arrays):
        rows, weights = arrays[:3], arrays[3:]
        # The rows of all devices come to the experts held here; the results go back to the rows' owners.
        x_BLD, expert_BLX, weight_BLX = (jax.lax.all_gather(x, "fsdp", tiled=True) for x in rows)
        x_BLD = jax.lax.pcast(x_BLD, "tensor", to="varying")
        first = jax.lax.axis_index(experts_cut_by) * weights[-1].shape[0]
        out_BLD = _held_experts(x_BLD, expert_BLX, weight_BLX, weights, first)
        return jax.lax.psum(jax.lax.psum_scatter(out_BLD, "fsdp", tiled=True), "tensor")

    cut_part = spread_part if spread else part
    return jax.shard_map(cut_part, in_specs=specs, out_specs=specs[0])(*arrays)


def _held_experts(x_BLD, expert_BLX, weight_BLX, weights, first=0):
    """What the experts held here, numbers `first` to `first` + E - 1, add to each token: [B, L, D]."""
    gate_EDF, up_EDF, down_EFD = weights
    held, chosen = gate_EDF.shape[0], expert_BLX.shape[-1]
    x_MD = x_BLD.reshape(-1, x_BLD.shape[-1])
    place_R, size_E = _places(expert_BLX.reshape(-1, chosen) - first, held)  # R = tokens x experts a token
    row_R = jnp.arange(len(place_R), dtype=jnp.int32)
    # Which of the R rows stands at each sorted place. Rows of experts held elsewhere come after the groups.
    order_R = row_R.at[place_R].set(row_R, mode="drop", unique_indices=True)
    # Past its groups a grouped product is undefined, and so is its gradient.
    here_R1 = (row_R < size_E.sum())[:, None]
    in_RD = jnp.where(here_R1, x_MD[order_R // chosen], 0)
    sorted_R = jnp.maximum(expert_BLX.reshape(-1)[order_R] - first, 0)
    gated_RF = jax.nn.silu(int8.grouped_product(in_RD, gate_EDF, size_E, sorted_R))
    gated_RF = gated_RF * int8.grouped_product(in_RD, up_EDF, size_E, sorted_R)
    out_RD = jnp.where(here_R1, int8.grouped_product(gated_RF, down_EFD, size_E, sorted_R), 0)
    # Back to the tokens' order, by a gather instead of a scatter-add.
    out_RD = out_RD.at[place_R].get(mode="fill", fill_value=0, unique_indices=True)
    out_MXD = out_RD.reshape(len(x_MD), chosen, -1)
    weight_MX1 = weight_BLX.reshape(len(x_MD), chosen, 1).astype(out_MXD.dtype)
    return (out_MXD * weight_MX1).sum(axis=1).reshape(x_BLD.shape)


def _places(expert_MX, held: int):
    """Places of the tokens' rows when they are sorted by expert.

    This is a counting sort. A general sort of so many rows would compile for a minute on TPU, and run longer.

    Args:
      expert_MX: numbers of each token's experts, no two the same; only 0 to held - 1 are held here.

    Returns:
      place_R: the place of each row; rows of experts held elsewhere have distinct places past R.
      size_E: rows of each expert held here.
    """
    here_MX = (expert_MX >= 0) & (expert_MX < held)
    chosen_ME = (expert_MX[..., None] == jnp.arange(held)[None, None]).any(axis=1).astype(jnp.int32)
    size_E = chosen_ME.sum(axis=0)
    first_E = jnp.cumsum(size_E) - size_E
    place_ME = first_E[None] + jnp.cumsum(chosen_ME, axis=0) - chosen_ME
    place_MX = jnp.take_along_axis(place_ME, jnp.clip(expert_MX, 0, held - 1), axis=1)
    row_R = jnp.arange(expert_MX.size, dtype=jnp.int32)
    return jnp.where(here_MX.reshape(-1), place_MX.reshape(-1), expert_MX.size + row_R), size_E
