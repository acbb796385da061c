"""What the student minimises: an objective summed over a batch chunk by chunk, gradients included.

The objectives themselves are in losses.py; weights (release mask and rescale), chunks, and what a loss needs
of the teacher are added here. See docs/objectives.md.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct

from opd_jax.distill import divergences, scoring
from opd_jax.distill.objectives import OBJECTIVES, Options, Tokens
from opd_jax.models import ModelConfig, transformer


@struct.dataclass
class Ends:
    """How the end of a response is taught beside the objective.

    Attributes:
      weight_BT: what each position counts; 0 outside the response.
      stop_BT: the teacher's probability of an end token.
    """

    weight_BT: jax.Array
    stop_BT: jax.Array


def end_kl(logits_BTV, end_ids: tuple[int, ...], stop_BT):
    """KL(T || S) of "the response ends here", at each position.

    A reverse KL is nearly blind to a token that the student hardly gives any probability: its gradient
    there is S log(S / T). A student that has unlearnt to end is therefore not taught to end again, and a rule
    that releases the last sentences takes even that away. This term is as large as the teacher's wish to end.

    Args:
      end_ids: the ids that end a response.
      stop_BT: the teacher's probability of them together.

    Source: the first term of decoupled distillation (Zhao et al. 2022, arXiv 2203.08679), whose target class
    is here the end of the response.
    """
    return divergences.event_forward_kl(logits_BTV, end_ids, stop_BT)


def advantage(advantage_BT, clip: float, reward_weight: float = 0.0, reward_B=None):
    """The advantage that a loss sees: clipped, then with the task reward mixed in.

    Args:
      advantage_BT: log T(y_t) - log S(y_t), nats.
      clip: largest absolute value in nats; 0 does not clip.
      reward_weight: nats a unit of reward.
      reward_B: reward of each response, NaN where it has none; None mixes nothing in. Its mean over the
        batch is subtracted, so that the mix favours no response on average.
    """
    if clip:
        advantage_BT = jnp.clip(advantage_BT, -clip, clip)
    if reward_B is None:
        return advantage_BT
    graded_B = ~jnp.isnan(reward_B)
    mean = jnp.where(graded_B, reward_B, 0).sum() / jnp.maximum(graded_B.sum(), 1)
    return advantage_BT + reward_weight * jnp.where(graded_B, reward_B - mean, 0)[:, None]


def loss_sum(
    name: str,
    options: Options,
    config: ModelConfig,
    params: dict,
    rollouts,
    advantage_BT,
    weight_BT,
    *,
    chunk: int,
    remat: str,
    targets: scoring.Targets | None = None,
    teacher: tuple[ModelConfig, jax.Array] | None = None,
    ends: Ends | None = None,
):
    """Weighted sum of an objective over a batch, differentiable in params; one student forward pass.

    Args:
      name: a key of OBJECTIVES.
      config, params: the student.
      remat: a name of transformer.REMAT_POLICIES.
      others: see `head_loss_sum`.

    Returns:
      (a float32 scalar, the moe.Load of the student's experts or None). Divide the former by the response
      tokens of the whole batch, all micro-batches counted.
    """
    hidden_BTD, load = scoring.response_hidden_and_load(config, params, rollouts, remat)
    total = head_loss_sum(
        name,
        options,
        config,
        params["embedding" if config.tie_embeddings else "head"],
        hidden_BTD,
        rollouts,
        advantage_BT,
        weight_BT,
        chunk=chunk,
        targets=targets,
        teacher=teacher,
        ends=ends,
    )
    return total, load


def head_loss_sum(
    name: str,
    options: Options,
    config: ModelConfig,
    head_VD,
    hidden_BTD,
    rollouts,
    advantage_BT,
    weight_BT,
    *,
    chunk: int,
    targets: scoring.Targets | None = None,
    teacher: tuple[ModelConfig, jax.Array] | None = None,
    ends: Ends | None = None,
):
    """The part of `loss_sum` that sees the vocabulary: differentiable in head_VD and hidden_BTD.

    Args:
      head_VD: the student's output matrix in its stored dtype.
      hidden_BTD: the student's final hidden states at the response positions.
      rollouts: response_BT and logp_BT are read, the latter as Tokens.old_logp_BT.
      advantage_BT: see `Tokens`.
      weight_BT: release mask times rescale; multiplies the loss of each position; no gradient.
      chunk: positions whose logits exist at a time.
      targets: what `scoring.score` kept for an objective that needs more of the teacher.
      teacher: (config, head_VD) of the teacher; read only if the targets hold its hidden states.
      ends: adds `end_kl` to every position with its own weight, whatever weight_BT is there.
    """

    def loss(head_VD, hidden_BcD, per_token, teacher_head_VD):
        token_Bc, old_logp_Bc, advantage_Bc, weight_Bc, targets, ends = per_token
        teacher_logits_BcV = None
        if targets.hidden_BTD is not None:
            teacher_logits_BcV = transformer.logits(teacher[0], teacher_head_VD, targets.hidden_BTD)
        tokens = Tokens(
            logits_BTV=transformer.logits(config, transformer.gather_head(config, head_VD), hidden_BcD),
            token_BT=token_Bc,
            old_logp_BT=old_logp_Bc,
            advantage_BT=advantage_Bc,
            teacher_logits_BTV=teacher_logits_BcV,
            teacher_top=targets.top,
        )
        total = (weight_Bc * OBJECTIVES[name].loss(tokens, options)).sum()
        if ends is None:
            return total
        with jax.named_scope("end_kl"):
            return total + (ends.weight_BT * end_kl(tokens.logits_BTV, config.eos_ids, ends.stop_BT)).sum()

    targets = targets or scoring.Targets()
    per_token = rollouts.response_BT, rollouts.logp_BT, advantage_BT, weight_BT, targets, ends
    teacher_head_VD = None if teacher is None else teacher[1]
    return chunked_sum(loss, chunk, head_VD, hidden_BTD, per_token, teacher_head_VD)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def chunked_sum(loss, chunk: int, head_VD, hidden_BTD, per_token, fixed=None):
    """Sum over chunks of positions of loss(head_VD, hidden_BcD, per_token of the chunk, fixed).

    Under differentiation each chunk's gradient is taken while its logits are there: the vocabulary's
    matrix is read three times (logits, gradient of the hidden states, gradient of the matrix) where
    rematerialising in a backward pass would read it four times, and nothing of size V outlives a chunk.

    Args:
      loss: returns a scalar; differentiated in head_VD and hidden_BcD only. Weights of 0 must give 0.
      chunk: positions at a time.
      head_VD: output matrix in its stored dtype, in which its gradient accumulates.
      hidden_BTD: final hidden states.
      per_token: pytree of [B, T, ...], without gradient.
      fixed: pytree that every chunk sees whole, without gradient.
    """

    def step(total, piece):
        hidden_BcD, per_token = piece
        return total + loss(head_VD, hidden_BcD, per_token, fixed), None

    pieces = scoring.chunked((hidden_BTD, per_token), chunk)
    return jax.lax.scan(step, jnp.float32(0), pieces)[0]


def _chunked_sum_forward(loss, chunk, head_VD, hidden_BTD, per_token, fixed):
    def step(carry, piece):
        total, head_grad_VD = carry
        hidden_BcD, per_token = piece
        value, (head_grad, hidden_grad) = jax.value_and_grad(loss, argnums=(0, 1))(
            head_VD, hidden_BcD, per_token, fixed
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
        None,
    )


chunked_sum.defvjp(_chunked_sum_forward, _chunked_sum_backward)
