"""Divergences of a student's next-token distribution from a teacher's, each with its gradient written out.

Every function takes float32 logits [..., V] in which the ids that do not exist are -inf (the same ids in
both models; one may have more rows of such ids than the other), and returns nats [...], differentiable in
the student's logits alone. An explicit gradient costs one array of size V instead of what automatic
differentiation keeps, is exactly 0 where the two distributions are equal, and has no 0 x inf.

S and T are the student's and the teacher's probabilities. A gradient is in the student's logits.
"""

import functools

import jax
import jax.numpy as jnp

from opd_jax.distill import vocabulary


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def event_forward_kl(student_logits, ids: tuple[int, ...], teacher_probability):
    """KL(T || S) of one yes or no: whether the next token is one of `ids`.

    It is the forward KL over two groups: 0 where the two probabilities agree, and at most the KL over the
    whole vocabulary. Gradient: S (1 - T_group / S_group), each id by its own group. It is made from the
    logits when it is needed: next to another divergence, no further array of size V is kept.

    Args:
      student_logits: [..., V].
      ids: distinct existing ids; at least one existing id must be outside.
      teacher_probability: that of `ids` together, [...].
    """
    return _event_forward(student_logits, ids, teacher_probability)[0]


def _event_forward(logits, ids, teacher_probability):
    t = jnp.clip(teacher_probability, 0, 1)
    log_inside = jax.nn.logsumexp(logits[..., jnp.array(ids)], axis=-1)
    lanes = vocabulary.fold(logits.reshape(-1, logits.shape[-1]))
    column = jnp.arange(lanes.shape[1] * lanes.shape[2]).reshape(1, *lanes.shape[1:])
    peak = lanes.max(axis=(1, 2), keepdims=True)
    outside = jnp.where(_among(column, ids), 0, jnp.exp(lanes - peak)).sum(axis=1).sum(axis=1)
    log_outside = peak[:, 0, 0] + jnp.log(jnp.maximum(outside, jnp.finfo(jnp.float32).tiny))
    log_outside = log_outside.reshape(t.shape)
    normaliser = jnp.logaddexp(log_inside, log_outside)
    value, excess = 0.0, []
    for log_own, share, log_share in ((log_inside, t, jnp.log(t)), (log_outside, 1 - t, jnp.log1p(-t))):
        excess.append(jnp.where(share > 0, log_share - (log_own - normaliser), -jnp.inf))
        value = value + jnp.where(share > 0, share * excess[-1], 0)
    return value, (logits, normaliser, *excess)


def _event_backward(ids, residuals, cotangent):
    logits, normaliser, excess_inside, excess_outside = residuals
    logp = logits - normaliser[..., None]
    inside = _among(jnp.arange(logits.shape[-1]), ids)
    excess = jnp.where(inside, excess_inside[..., None], excess_outside[..., None])
    return cotangent[..., None] * (jnp.exp(logp) - jnp.exp(logp + excess)), None


event_forward_kl.defvjp(_event_forward, _event_backward)


def _among(column, ids: tuple[int, ...]):
    """Which entries of `column` are one of a few given ids."""
    return functools.reduce(jnp.logical_or, [column == i for i in ids])
