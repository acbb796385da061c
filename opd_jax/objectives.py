"""Losses on scored rollouts, computed chunk by chunk from hidden states, gradients included."""

import functools

import jax
import jax.numpy as jnp

from opd_jax import scoring
from opd_jax.models import transformer
from opd_jax.models.config import ModelConfig


def policy_gradient(logp_BT, old_logp_BT, advantage_BT, weight_BT, clip_ratio: float | None):
    """Per-token loss whose sum over the batch, divided by the response tokens, is the objective.

    Args:
      logp_BT: the student's log-probability of each token, with gradient.
      old_logp_BT: the same when the token was written; used only with clip_ratio.
      advantage_BT: A_t in nats; no gradient.
      weight_BT: supervision q_t times its rescale, 0 outside the response.
      clip_ratio: None for one update a rollout: -A'_t log p. Otherwise, for several updates on the same
        rollouts, -min(r A', clip(r, 1 - clip_ratio, 1 + clip_ratio) A') with r = p / p_old, whose
        gradient at r = 1 is that of the first form.

    Returns:
      loss_BT, float32.

    Source: paper.md, steps 7 and 8; the clipped form is PPO's (Schulman et al. 2017, arXiv 1707.06347).
    """
    scaled_BT = jax.lax.stop_gradient(advantage_BT * weight_BT)
    if clip_ratio is None:
        return -scaled_BT * logp_BT
    ratio_BT = jnp.exp(logp_BT - old_logp_BT)
    clipped_BT = jnp.clip(ratio_BT, 1 - clip_ratio, 1 + clip_ratio)
    return -jnp.minimum(ratio_BT * scaled_BT, clipped_BT * scaled_BT)


def policy_gradient_sum(
    config: ModelConfig,
    params: dict,
    rollouts,
    advantage_BT,
    weight_BT,
    *,
    chunk: int,
    clip_ratio: float | None,
    remat: str,
):
    """Sum of `policy_gradient` over a batch, differentiable in params; one student forward pass.

    Returns:
      A float32 scalar. Divide by the response tokens of the whole batch, all micro-batches counted.
    """
    hidden_BTD = scoring.response_hidden(config, params, rollouts, remat)
    head_VD = params["embedding" if config.tie_embeddings else "head"]

    def loss(head_VD, hidden_BcD, per_token):
        token_Bc, old_logp_Bc, advantage_Bc, weight_Bc = per_token
        logits_BcV = transformer.logits(config, head_VD.astype(config.dtype), hidden_BcD)
        logp_Bc = scoring.token_logp(logits_BcV, token_Bc)
        return policy_gradient(logp_Bc, old_logp_Bc, advantage_Bc, weight_Bc, clip_ratio).sum()

    per_token = rollouts.response_BT, rollouts.logp_BT, advantage_BT, weight_BT
    return chunked_sum(loss, chunk, head_VD, hidden_BTD, per_token)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def chunked_sum(loss, chunk: int, head_VD, hidden_BTD, per_token):
    """Sum over chunks of positions of loss(head_VD, hidden_BcD, per_token of the chunk).

    Under differentiation each chunk's gradient is taken while its logits are there: the vocabulary's
    matrix is read three times (logits, gradient of the hidden states, gradient of the matrix) where
    rematerialising in a backward pass would read it four times, and nothing of size V outlives a chunk.

    Args:
      loss: returns a scalar; differentiated in head_VD and hidden_BcD only. Weights of 0 must give 0.
      chunk: positions at a time.
      head_VD: output matrix in its stored dtype, in which its gradient accumulates.
      hidden_BTD: final hidden states.
      per_token: pytree of [B, T, ...], without gradient.
    """

    def step(total, piece):
        hidden_BcD, per_token = piece
        return total + loss(head_VD, hidden_BcD, per_token), None

    pieces = scoring.chunked((hidden_BTD, per_token), chunk)
    return jax.lax.scan(step, jnp.float32(0), pieces)[0]


def _chunked_sum_forward(loss, chunk, head_VD, hidden_BTD, per_token):
    def step(carry, piece):
        total, head_grad_VD = carry
        hidden_BcD, per_token = piece
        value, (head_grad, hidden_grad) = jax.value_and_grad(loss, argnums=(0, 1))(
            head_VD, hidden_BcD, per_token
        )
        return (total + value, head_grad_VD + head_grad), hidden_grad

    pieces = scoring.chunked((hidden_BTD, per_token), chunk)
    start = jnp.float32(0), jnp.zeros_like(head_VD)
    (total, head_grad_VD), hidden_grad = jax.lax.scan(step, start, pieces)
    b, t, d = hidden_BTD.shape
    hidden_grad_BTD = hidden_grad.swapaxes(0, 1).reshape(b, -1, d)[:, :t]
    return total, (head_grad_VD, hidden_grad_BTD)


def _chunked_sum_backward(loss, chunk, residuals, cotangent):
    head_grad_VD, hidden_grad_BTD = residuals
    return (
        (cotangent * head_grad_VD).astype(head_grad_VD.dtype),
        (cotangent * hidden_grad_BTD).astype(hidden_grad_BTD.dtype),
        None,
    )


chunked_sum.defvjp(_chunked_sum_forward, _chunked_sum_backward)
