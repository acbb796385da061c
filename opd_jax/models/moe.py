"""The feed-forward of a mixture of experts: each token to its top-k experts, none dropped.

Rows are sorted by expert and multiplied group by group (`jax.lax.ragged_dot`), so the work is that of the
experts chosen, on TPU and GPU. XLA's CPU backend has no grouped product and multiplies every row by every
expert: right, but for small models only.
"""

import jax
import jax.numpy as jnp
from flax import struct

from opd_jax.models.config import ModelConfig


@struct.dataclass
class Routing:
    """Where the tokens of one block, or of all with a leading axis of N blocks, were sent.

    Attributes:
      probability_BLE: the router's softmax over all experts, float32.
      expert_BLX: ids of the chosen experts, most likely first, X a token.
    """

    probability_BLE: jax.Array
    expert_BLX: jax.Array


@struct.dataclass
class RouterStatistics:
    """How evenly each block's experts are used by the real tokens of a batch; float32.

    Attributes:
      load_NE: share of the block's assignments that each expert got; sums to 1 a block.
      entropy_N: mean entropy of the router's softmax, nats; ln(experts) is uniform.
    """

    load_NE: jax.Array
    entropy_N: jax.Array


def route(config: ModelConfig, router_DE, x_BLD) -> tuple[Routing, jax.Array]:
    """Routing, and weight_BLX float32: the chosen experts' probabilities, normalised if configured."""
    rows_MD = x_BLD.reshape(-1, x_BLD.shape[-1])
    logits_ME = jax.lax.dot(rows_MD, router_DE, preferred_element_type=jnp.float32)
    probability_BLE = jax.nn.softmax(logits_ME).reshape(*x_BLD.shape[:2], -1)
    weight_BLX, expert_BLX = jax.lax.top_k(probability_BLE, config.experts_per_token)
    if config.normalise_experts:
        weight_BLX = weight_BLX / weight_BLX.sum(axis=-1, keepdims=True)
    return Routing(probability_BLE, expert_BLX), weight_BLX


def feed_forward(config: ModelConfig, p: dict, x_BLD) -> tuple[jax.Array, Routing]:
    """Sum over each token's experts of weight x (silu(x gate) * (x up)) down, as transformers' Qwen3MoE.

    Args:
      p: one block's weights: router [D, E], gate and up [E, D, F], down [E, F, D].
      x_BLD: normalised hidden states; padding is routed like any token and costs the same.

    Returns:
      ([B, L, D] in x's dtype, Routing).
    """
    routing, weight_BLX = route(config, p["router"], x_BLD)
    rows_MD = x_BLD.reshape(-1, x_BLD.shape[-1])
    expert_R = routing.expert_BLX.reshape(-1)  # R = tokens x experts a token
    order_R = jnp.argsort(expert_R)
    size_E = jnp.zeros(config.experts, jnp.int32).at[expert_R].add(1)
    sorted_RD = rows_MD[order_R // config.experts_per_token]
    gated_RF = jax.nn.silu(jax.lax.ragged_dot(sorted_RD, p["gate"], size_E))
    gated_RF = gated_RF * jax.lax.ragged_dot(sorted_RD, p["up"], size_E)
    out_RD = jax.lax.ragged_dot(gated_RF, p["down"], size_E)
    # Back to the tokens' order: a gather by the inverse permutation, no scatter-add.
    out_RD = out_RD.at[jnp.argsort(order_R)].get(unique_indices=True)
    out_MXD = out_RD.reshape(rows_MD.shape[0], -1, rows_MD.shape[1])
    weight_MX1 = weight_BLX.reshape(rows_MD.shape[0], -1, 1).astype(out_MXD.dtype)
    return (out_MXD * weight_MX1).sum(axis=1).reshape(x_BLD.shape), routing


def statistics(routing: Routing, mask_BL) -> RouterStatistics:
    """RouterStatistics of one block's routing over the tokens where mask_BL; carries no gradient."""
    routing = jax.lax.stop_gradient(routing)
    experts = routing.probability_BLE.shape[-1]
    tokens = jnp.maximum(mask_BL.sum(), 1).astype(jnp.float32)
    chosen_BLX = jnp.where(mask_BL[..., None], routing.expert_BLX, experts)  # one past the end is dropped
    load_E = jnp.zeros(experts, jnp.float32).at[chosen_BLX.reshape(-1)].add(1, mode="drop")
    entropy_BL = jax.scipy.special.entr(routing.probability_BLE).sum(axis=-1)
    return RouterStatistics(
        load_NE=load_E / (tokens * chosen_BLX.shape[-1]),
        entropy_N=jnp.where(mask_BL, entropy_BL, 0).sum() / tokens,
    )


def metrics(stats: RouterStatistics) -> dict[str, jax.Array]:
    """Scalars for a log, means over the blocks: entropy (nats), and load relative to an even one.

    router_max_load is 1 where the busiest expert has no more than its even share, and the number of experts
    over experts_per_token where all tokens go one way; router_idle_share counts experts without any token.
    """
    experts = stats.load_NE.shape[-1]
    return {
        "router_entropy": stats.entropy_N.mean(),
        "router_max_load": (stats.load_NE.max(axis=-1) * experts).mean(),
        "router_idle_share": (stats.load_NE == 0).mean(dtype=jnp.float32),
    }
