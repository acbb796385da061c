"""The loss of the student: an objective summed over a batch, chunk by chunk, gradients included.

The objectives are in objectives.py. Here they get their weights (release mask and rescale), the teacher's
logits where they need them, and chunks of positions, so that [B, T, V] never exists. See docs/objectives.md.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from opd_jax.distill import divergences, objectives, scoring, trainable
from opd_jax.distill.types import LossInputs, LossPart, PerToken
from opd_jax.models import ModelConfig, transformer


@dataclasses.dataclass(frozen=True)
class Loss:
    """The weighted sum of an objective over rollouts, differentiable in the trained parameters.

    Attributes:
      objective: a key of OBJECTIVES.
      options: the numbers that it reads.
      student: the model that learns.
      teacher: the model whose logits an objective with teacher="logits" reads; otherwise not needed.
      chunk: response positions whose logits exist at a time.
      remat: a name of transformer.REMAT_POLICIES, for the student's forward pass.
    """

    objective: str
    options: objectives.Options
    student: ModelConfig
    teacher: ModelConfig | None
    chunk: int
    remat: str = "none"

    @classmethod
    def of(cls, student: ModelConfig, teacher: ModelConfig | None, config, objective: str = "") -> Self:
        """The loss that a config asks for, or that of another `objective` with the config's options."""
        return cls(
            objective=objective or config.objective.name,
            options=objectives.options(config),
            student=student,
            teacher=teacher,
            chunk=config.scoring.chunk,
            remat=config.train.remat,
        )

    def __call__(
        self, trained: dict, inputs: LossInputs | LossPart, frozen: dict, teacher_params: dict | None, tokens
    ):
        """The sum over the rollouts, divided by `tokens`; one student forward pass.

        Args:
          trained, frozen: the student's parameters, as `trainable.split` returns them.
          inputs: a batch, or a part of it.
          teacher_params: needed only with an objective that reads the teacher's logits.
          tokens: the response tokens of the whole batch, of which `inputs` may be a part.

        Returns:
          (float32 scalar in nats, the moe.Load of the student's experts or None).
        """
        params = trainable.join(trained, frozen)
        sequences, per_token = inputs.sequences, inputs.per_token
        hidden_BTD, load = scoring.response_hidden(self.student, params, sequences, self.remat)
        head_VD = params["embedding" if self.student.tie_embeddings else "head"]
        teacher_head_VD = None
        if per_token.targets.hidden_BTD is not None:
            assert self.teacher is not None and teacher_params is not None
            teacher_head_VD = transformer.head(self.teacher, teacher_params)
        shared = Shared(teacher_head_VD, sequences.slots)
        total = chunked_sum(self.of_chunk, self.chunk, head_VD, hidden_BTD, per_token, shared)
        return total / tokens, load

    def of_chunk(self, head_VD, hidden_BcD, per_token: PerToken, teacher_head_VD):
        """The sum over a chunk of positions; see `chunked_sum`."""
        token_Bc, old_logp_Bc, advantage_Bc, weight_Bc, targets, ends = per_token
        teacher_logits_BcV = None
        if targets.hidden_BTD is not None and self.teacher is not None:
            teacher_logits_BcV = transformer.logits(self.teacher, teacher_head_VD, targets.hidden_BTD)
        whole_head_VD = transformer.gather_head(self.student, head_VD)
        tokens = objectives.Tokens(
            logits_BTV=transformer.logits(self.student, whole_head_VD, hidden_BcD),
            token_BT=token_Bc,
            old_logp_BT=old_logp_Bc,
            advantage_BT=advantage_Bc,
            teacher_logits_BTV=teacher_logits_BcV,
            teacher_top=targets.top,
        )
        loss_Bc = objectives.OBJECTIVES[self.objective].loss(tokens, self.options)
        total = (weight_Bc * loss_Bc).sum()
        if ends is None:
            return total
        with jax.named_scope("end_kl"):
            kl_Bc = end_kl(tokens.logits_BTV, self.student.eos_ids, ends.stop_BT)
            return total + (ends.weight_BT * kl_Bc).sum()


class Shared(NamedTuple):
    """What all chunks share, without gradient.

    Attributes:
      teacher_head_VD: a pytree that a loss reads besides the student's output matrix.
      slots: a scalar; chunks after so many positions are left out, since their weights are 0. None is T.
    """

    teacher_head_VD: Any = None
    slots: Any = None


def chunked_sum(loss, chunk: int, head_VD, hidden_BTD, per_token, shared: Shared | None = None):
    """Sum over chunks of positions of loss(head_VD, hidden_BcD, per_token of the chunk, teacher_head_VD).

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
    return _chunked_sum(loss, chunk, head_VD, hidden_BTD, per_token, shared or Shared())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked_sum(loss, chunk, head_VD, hidden_BTD, per_token, shared):

    def add(number, total):
        hidden_BcD, per_token = jax.tree.map(lambda x: x[number], pieces)
        return total + loss(head_VD, hidden_BcD, per_token, shared.teacher_head_VD)

    pieces = scoring.chunked((hidden_BTD, per_token), chunk)
    count = scoring.needed(hidden_BTD.shape[1], len(pieces[0]), shared.slots)
    return jax.lax.fori_loop(0, count, add, jnp.float32(0))


def _chunked_sum_forward(loss, chunk, head_VD, hidden_BTD, per_token, shared):
    def add(number, sums):
        total, head_grad_VD, hidden_grad = sums
        hidden_BcD, per_token = jax.tree.map(lambda x: x[number], pieces)
        value, (head_more, hidden_more) = jax.value_and_grad(loss, argnums=(0, 1))(
            head_VD, hidden_BcD, per_token, shared.teacher_head_VD
        )
        hidden_grad = jax.lax.dynamic_update_index_in_dim(hidden_grad, hidden_more, number, 0)
        return total + value, head_grad_VD + head_more, hidden_grad

    pieces = scoring.chunked((hidden_BTD, per_token), chunk)
    b, t, d = hidden_BTD.shape
    start = jnp.float32(0), jnp.zeros_like(head_VD), jnp.zeros_like(pieces[0])
    count = scoring.needed(t, len(pieces[0]), shared.slots)
    total, head_grad_VD, hidden_grad = jax.lax.fori_loop(0, count, add, start)
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


_chunked_sum.defvjp(_chunked_sum_forward, _chunked_sum_backward)


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


def importance(logp_BT, behaviour_logp_BT, cap: float):
    """The truncated importance weight of each token: min(p_S / q, cap), without gradient.

    Args:
      logp_BT: the student's log-probability at temperature 1, without truncation, in nats.
      behaviour_logp_BT: the log-probability under the distribution q that the token was drawn from.

    Source: truncated importance sampling (Ionides 2008), here for each token: what comes before a token was
    drawn from q as well, and stays so.
    """
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(logp_BT - behaviour_logp_BT), cap))


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
