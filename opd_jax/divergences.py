"""Divergences of a student's next-token distribution from a teacher's, each with its gradient written out.

Every function takes float32 logits [..., V] in which the ids that do not exist are -inf (the same ids in
both models; one may have more rows of such ids than the other), and returns nats [...], differentiable in
the student's logits alone. An explicit gradient costs one array of size V instead of what automatic
differentiation keeps, is exactly 0 where the two distributions are equal, and has no 0 x inf.

S and T are the student's and the teacher's probabilities. A gradient is in the student's logits.
"""

import jax
import jax.numpy as jnp

from opd_jax import vocabulary


@jax.custom_vjp
def _with_gradient(logits, value, gradient):
    """`value` [...], whose gradient in `logits` [..., V] is declared to be `gradient` [..., V]."""
    return value


def _forward(logits, value, gradient):
    return value, gradient


def _backward(gradient, cotangent):
    return cotangent[..., None] * gradient, None, None


_with_gradient.defvjp(_forward, _backward)


def log_probabilities(logits):
    """log softmax over the last axis, float32; -inf where the logit is -inf."""
    rows = logits.reshape(-1, logits.shape[-1])
    normaliser = vocabulary.log_normaliser(vocabulary.fold(rows)).reshape(logits.shape[:-1])
    return logits - normaliser[..., None]


def entropy(logits):
    """Entropy of softmax(logits), nats."""
    logp = log_probabilities(logits)
    return -jnp.where(jnp.isneginf(logp), 0, jnp.exp(logp) * logp).sum(axis=-1)


def _pair(student_logits, teacher_logits):
    """(student logits, log S, log T, log S - log T) over ids that both have rows for; 0 at absent ids."""
    shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
    student_logits, teacher_logits = student_logits[..., :shared], teacher_logits[..., :shared]
    logs = log_probabilities(jax.lax.stop_gradient(student_logits))
    logt = log_probabilities(jax.lax.stop_gradient(teacher_logits))
    exists = ~(jnp.isneginf(logs) | jnp.isneginf(logt))
    return student_logits, logs, logt, jnp.where(exists, logs - logt, 0)


def reverse_kl(student_logits, teacher_logits):
    """KL(S || T) = sum S log(S / T). Gradient: S (log(S / T) - KL)."""
    student_logits, logs, _, ratio = _pair(student_logits, teacher_logits)
    s = jnp.exp(logs)
    value = (s * ratio).sum(axis=-1)
    return _with_gradient(student_logits, value, s * (ratio - value[..., None]))


def forward_kl(student_logits, teacher_logits):
    """KL(T || S) = sum T log(T / S). Gradient: S - T."""
    student_logits, logs, logt, ratio = _pair(student_logits, teacher_logits)
    t = jnp.exp(logt)
    return _with_gradient(student_logits, -(t * ratio).sum(axis=-1), jnp.exp(logs) - t)


def generalised_jsd(student_logits, teacher_logits, beta: float):
    """beta KL(T || M) + (1 - beta) KL(S || M) with M = beta T + (1 - beta) S.

    Gradient: (1 - beta) S (log(S / M) - KL(S || M)).

    beta = 0 is KL(T || S) and beta = 1 is KL(S || T), by definition: the formula itself goes to 0 there,
    JSD / beta to KL(T || S) as beta -> 0 and JSD / (1 - beta) to KL(S || T) as beta -> 1.

    Source: Agarwal et al. 2024 (GKD, arXiv 2306.13649), equation 1; the two ends as in trl's GKD trainer.
    """
    if beta == 0:
        return forward_kl(student_logits, teacher_logits)
    if beta == 1:
        return reverse_kl(student_logits, teacher_logits)
    student_logits, logs, logt, ratio = _pair(student_logits, teacher_logits)
    # log(M / S), from the larger of the two: exactly 0 at S = T, and nothing overflows.
    fall = jnp.expm1(-jnp.abs(ratio))
    mixture = jnp.where(ratio < 0, jnp.log1p((1 - beta) * fall) - ratio, jnp.log1p(beta * fall))
    s, t = jnp.exp(logs), jnp.exp(logt)
    student_kl = -(s * mixture).sum(axis=-1)
    teacher_kl = -(t * (ratio + mixture)).sum(axis=-1)
    value = beta * teacher_kl + (1 - beta) * student_kl
    gradient = -(1 - beta) * s * (mixture + student_kl[..., None])
    return _with_gradient(student_logits, value, gradient)


def _columns(ids, size: int):
    """0..size-1 along the last axis, of the rank of `ids`."""
    return jnp.arange(size).reshape((1,) * (ids.ndim - 1) + (-1,))


def _is_one_of(ids, size: int):
    """[..., V] bool: which entries of an axis of `size` are among `ids` [..., K]."""
    column = _columns(ids, size)
    found = jnp.zeros((*ids.shape[:-1], size), bool)
    for k in range(ids.shape[-1]):
        found |= column == ids[..., k, None]
    return found


def grouped(logits, top):
    """log-probabilities of the ids `top` [..., K] and, last, of all other ids together: [..., K + 1].

    The rest is a log-sum-exp of its own, not 1 minus the others, so it keeps its digits when it is small.
    At least one existing id must be outside `top`.
    """
    return _grouped(log_probabilities(logits), top)


def _grouped(logp, top):
    rest = jnp.where(_is_one_of(top, logp.shape[-1]), -jnp.inf, logp)
    rest = vocabulary.log_normaliser(vocabulary.fold(rest.reshape(-1, rest.shape[-1])))
    rest = rest.reshape(*top.shape[:-1], 1)
    return jnp.concatenate([jnp.take_along_axis(logp, top, axis=-1), rest], axis=-1)


def grouped_forward_kl(student_logits, top, teacher_logp):
    """KL(T || S) over K ids and the group of all others; at most the KL over the whole vocabulary.

    Never negative, and 0 where the K + 1 probabilities agree, which a sum over the K ids alone is not.
    Gradient: S - T within the K ids, S (1 - T_rest / S_rest) outside them.

    Args:
      student_logits: [..., V].
      top: K distinct ids, [..., K].
      teacher_logp: what `grouped` gives of the teacher, [..., K + 1].
    """
    logp = log_probabilities(jax.lax.stop_gradient(student_logits))
    student_logp = _grouped(logp, top)
    value = (jnp.exp(teacher_logp) * (teacher_logp - student_logp)).sum(axis=-1)
    target = jnp.exp(logp + (teacher_logp - student_logp)[..., -1:])
    column = _columns(top, logp.shape[-1])
    for k in range(top.shape[-1]):
        target = jnp.where(column == top[..., k, None], jnp.exp(teacher_logp[..., k, None]), target)
    return _with_gradient(student_logits, value, jnp.exp(logp) - target)
