"""The teacher scores every token: advantages and local contrast from one forward pass.

Whatever needs the vocabulary runs over chunks of positions, so [B, T, V] never exists.
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from opd_jax.distill import divergences, packing, vocabulary
from opd_jax.distill.types import Array, Rollouts, Scores, Sequences, Targets, TeacherTop
from opd_jax.models import ModelConfig, moe, transformer


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How to score; static, so each value compiles its own program.

    Attributes:
      chunk: response positions whose logits exist at a time: B/micro_batches x chunk x V floats.
      micro_batches: pieces that the batch is cut into, one after another.
      keep: fills Scores.targets: "logits" keeps the hidden states that give the teacher's logits, "top" its
        `top_k` most likely tokens and its entropy.
      top_k: how many tokens `keep="top"` keeps.
      pack: lay rows behind each other, and compute the micro-batches that hold a row (packing.py). Without,
        or with one micro-batch, all rows are computed at full length.
    """

    chunk: int
    micro_batches: int = 1
    keep: Literal["logits", "top"] | None = None
    top_k: int = 0
    pack: bool = True


class Written(NamedTuple):
    """What scoring reads of each response token; as Rollouts'."""

    token_BT: Array
    logp_BT: Array
    topk_BTK: Array
    topk_logp_BTK: Array

    @classmethod
    def of(cls, r: Rollouts) -> "Written":
        return cls(r.response_BT, r.logp_BT, r.topk_BTK, r.topk_logp_BTK)


def score(
    teacher: ModelConfig,
    teacher_params: dict,
    rollouts: Rollouts,
    scoring: Scoring,
    student: tuple[ModelConfig, dict] | None = None,
) -> Scores:
    """Scores rollouts with one teacher forward pass.

    Args:
      teacher, teacher_params: the teacher; no gradient flows into it.
      rollouts: their topk_BTK are the candidates unless `student` is given. The teacher reads their
        tokens_BL, so it sees the student's prompt.
      scoring: settings.
      student: (config, params) to recompute the student's log-probabilities and candidates with, at the
        price of another forward pass; None takes the sampler's, which are the same in exact arithmetic.

    Returns:
      Scores.

    Source: arXiv 2605.13643; docs/how_it_works.md, steps 1 and 2.
    """

    def one(sequences: Sequences, r: Written) -> tuple[Scores, moe.Load | None]:
        own = r.topk_BTK, r.topk_logp_BTK, r.logp_BT
        if student is not None:
            config, params = student
            with jax.named_scope("student"):
                hidden_BTD, _ = response_hidden(config, params, sequences)
                own = over_chunks(
                    functools.partial(_student_chunk, config, r.topk_BTK.shape[-1]),
                    scoring.chunk,
                    transformer.head(config, params),
                    (hidden_BTD, r.token_BT),
                    sequences.slots,
                )
        candidate_BTK, topk_logp_BTK, logp_BT = own
        r = r._replace(logp_BT=logp_BT, topk_BTK=candidate_BTK, topk_logp_BTK=topk_logp_BTK)
        with jax.named_scope("teacher"):
            hidden_BTD, load = response_hidden(teacher, teacher_params, sequences)
            head_VD = transformer.head(teacher, teacher_params)
            return compared((teacher, head_VD), hidden_BTD, r, scoring, sequences.slots), load

    (scores, load), computed = in_pieces(one, rollouts, scoring)
    targets = scores.targets
    scores = jax.tree.map(lambda x: inside(rollouts.mask_BT, x), scores.replace(targets=Targets()))
    return scores.replace(targets=targets, teacher_load=load, computed=computed)


def with_student(
    scores: Scores, student: tuple[ModelConfig, dict], rollouts: Rollouts, scoring: Scoring
) -> Scores:
    """Scores with the student's log-probabilities by a forward pass of it; the candidates stay."""
    config, params = student

    def one(sequences: Sequences, r: Written):
        hidden_BTD, _ = response_hidden(config, params, sequences)
        logps = over_chunks(
            functools.partial(_logps_chunk, config),
            scoring.chunk,
            transformer.head(config, params),
            (hidden_BTD, r.token_BT, r.topk_BTK),
            sequences.slots,
        )
        return logps, ()

    (found, _), computed = in_pieces(one, rollouts, scoring)
    topk_logp_BTK, logp_BT = (inside(rollouts.mask_BT, x) for x in found)
    return scores.replace(
        advantage_BT=scores.teacher_logp_BT - logp_BT,
        student_logp_BT=logp_BT,
        student_topk_logp_BTK=topk_logp_BTK,
        computed=computed,
    )


def compared(teacher, hidden_BTD, written: Written, scoring: Scoring, slots=None) -> Scores:
    """Scores of response tokens from the teacher's hidden states; without meaning outside the responses.

    Args:
      teacher: (its config, its output matrix [V, D]).
      hidden_BTD: the teacher's hidden states that predict the tokens.
      written: the tokens, with the student's log-probabilities and candidates.
      slots: as `over_chunks`'.
    """
    config, head_VD = teacher
    topk_logp_BTK, logp_BT, stop_BT, contrast_BT, overlap_BT, top = over_chunks(
        functools.partial(_teacher_chunk, config, scoring.top_k if scoring.keep == "top" else 0),
        scoring.chunk,
        head_VD,
        (hidden_BTD, written.token_BT, written.topk_BTK),
        slots,
    )
    return Scores(
        advantage_BT=logp_BT - written.logp_BT,
        contrast_BT=contrast_BT,
        teacher_logp_BT=logp_BT,
        student_logp_BT=written.logp_BT,
        teacher_topk_logp_BTK=topk_logp_BTK,
        student_topk_logp_BTK=written.topk_logp_BTK,
        overlap_BT=overlap_BT,
        teacher_stop_BT=stop_BT,
        targets=Targets(hidden_BTD=hidden_BTD if scoring.keep == "logits" else None, top=top),
    )


def inside(mask_BT, x):
    """[B, T, ...] values of the response tokens, and 0 elsewhere."""
    return jnp.where(mask_BT.reshape(mask_BT.shape + (1,) * (x.ndim - 2)), x, 0)


def in_pieces(one, rollouts: Rollouts, scoring: Scoring):
    """one(micro-batch) for each micro-batch, one after another.

    Args:
      one: one(Sequences, Written of their response tokens) -> (a pytree of [R, T, ...] arrays, any pytree).

    Returns:
      ((the first pytree for the batch as [B, T, ...], without meaning outside the responses; the sum of the
      second), the share of the batch's positions that was computed).
    """
    written, pieces = Written.of(rollouts), scoring.micro_batches
    if pieces == 1:
        return one(rollouts.sequences, written), jnp.float32(1)

    def of_piece(piece: packing.Piece):
        return one(piece.sequences, piece.taken(written))

    packed = packing.pack(rollouts.prompt_mask_BP, rollouts.mask_BT, together=scoring.pack)
    found = packing.mapped(of_piece, packed, rollouts, pieces)
    return found, packing.rounds(packed, pieces) / pieces


def _student_chunk(config, candidates, head_VD, chunk):
    """(candidate_BcK, their logp_BcK, the token's logp_Bc)."""
    hidden_BcD, token_Bc = chunk
    logits_BcV = transformer.logits(config, head_VD, hidden_BcD)
    top_BcK = _top(logits_BcV, candidates)
    logp_BcN = _logp(logits_BcV, top_BcK, token_Bc[..., None])
    return top_BcK, logp_BcN[..., :-1], logp_BcN[..., -1]


def _logps_chunk(config, head_VD, chunk):
    """(the candidates' logp_BcK, the token's logp_Bc)."""
    hidden_BcD, token_Bc, candidate_BcK = chunk
    logits_BcV = transformer.logits(config, head_VD, hidden_BcD)
    logp_BcN = _logp(logits_BcV, candidate_BcK, token_Bc[..., None])
    return logp_BcN[..., :-1], logp_BcN[..., -1]


def _teacher_chunk(config, top_k, head_VD, chunk):
    """(candidates' logp_BcK, the token's logp_Bc, stop_Bc, margin_Bc, overlap_Bc, TeacherTop or None)."""
    hidden_BcD, token_Bc, candidate_BcK = chunk
    logits_BcV = transformer.logits(config, head_VD, hidden_BcD)
    k = candidate_BcK.shape[-1]
    end_BcE = jnp.broadcast_to(jnp.array(config.eos_ids, jnp.int32), (*token_Bc.shape, len(config.eos_ids)))
    logp_BcN = _logp(logits_BcV, candidate_BcK, token_Bc[..., None], end_BcE)
    ranked_BcK = jax.lax.top_k(jnp.take_along_axis(logits_BcV, candidate_BcK, axis=-1), 2)[0]
    with jax.named_scope("overlap"):  # compiled only where a rule reads it
        shared_BcK = (candidate_BcK[..., :, None] == _top(logits_BcV, k)[..., None, :]).any(axis=-1)
    return (
        logp_BcN[..., :k],
        logp_BcN[..., k],
        jnp.exp(logp_BcN[..., k + 1 :]).sum(axis=-1),
        ranked_BcK[..., 0] - ranked_BcK[..., 1],
        shared_BcK.mean(axis=-1),
        _teacher_top(logits_BcV, top_k) if top_k else None,
    )


def _top(logits_BcV, count):
    top_NK = vocabulary.top(vocabulary.fold(_rows(logits_BcV)), count)
    return top_NK.reshape(*logits_BcV.shape[:-1], count)


def _logp(logits_BcV, *ids):
    """log softmax at ids [B, c, n] each, side by side."""
    id_BcN = jnp.concatenate(ids, axis=-1)
    normaliser_N = vocabulary.log_normaliser(vocabulary.fold(_rows(logits_BcV)))
    normaliser_Bc1 = normaliser_N.reshape(*logits_BcV.shape[:-1], 1)
    return jnp.take_along_axis(logits_BcV, id_BcN, axis=-1) - normaliser_Bc1


def _teacher_top(logits_BcV, top_k: int) -> TeacherTop:
    top_BcK = _top(logits_BcV, top_k)
    return TeacherTop(
        top_BTK=top_BcK,
        logp_BTK=divergences.grouped(logits_BcV, top_BcK),
        entropy_BT=divergences.entropy(logits_BcV),
    )


@jax.custom_vjp
def token_logp(logits_BTV, token_BT):
    """log softmax(logits) at the given ids, [B, T]; its gradient is one pass over the logits."""
    return _token_logp(logits_BTV, token_BT)[0]


def _token_logp(logits_BTV, token_BT):
    logit_BT = jnp.take_along_axis(logits_BTV, token_BT[..., None], axis=-1)[..., 0]
    normaliser_BT = vocabulary.log_normaliser(vocabulary.fold(_rows(logits_BTV)))
    normaliser_BT = normaliser_BT.reshape(token_BT.shape)
    return logit_BT - normaliser_BT, (logits_BTV, token_BT, normaliser_BT)


def _token_logp_gradient(residuals, grad_BT):
    logits_BTV, token_BT, normaliser_BT = residuals
    chosen = jnp.arange(logits_BTV.shape[-1])[None, None] == token_BT[..., None]
    softmax_BTV = jnp.exp(logits_BTV - normaliser_BT[..., None])
    return grad_BT[..., None] * (chosen - softmax_BTV), None


token_logp.defvjp(_token_logp, _token_logp_gradient)


def _rows(logits_BTV):
    return logits_BTV.reshape(-1, logits_BTV.shape[-1])


def response_hidden(config: ModelConfig, params: dict, sequences: Sequences, remat: str = "none"):
    """(the hidden states [R, T, D] that predict the response tokens, the moe.Load of the tokens or None)."""
    s = sequences
    hidden_RLD, load = transformer.forward_and_load(
        config, params, s.tokens_RL, s.row_RL, s.position_RL, remat=remat
    )
    return _predicting(hidden_RLD, s.place_RT, s.slot_RL), load


@jax.custom_vjp
def _predicting(hidden_RLD, place_RT, slot_RL):
    """hidden_RLD at place_RT, and 0 where there is no such place. Its gradient is a gather too."""
    return jnp.take_along_axis(hidden_RLD, place_RT[..., None], axis=1, mode="fill", fill_value=0)


def _predicting_forward(hidden_RLD, place_RT, slot_RL):
    return _predicting(hidden_RLD, place_RT, slot_RL), (place_RT, slot_RL)


def _predicting_gradient(residuals, grad_RTD):
    place_RT, slot_RL = residuals
    return _predicting(grad_RTD, slot_RL, place_RT), None, None


_predicting.defvjp(_predicting_forward, _predicting_gradient)


def over_chunks(fn, chunk: int, head_VD, arrays, slots=None):
    """Applies fn(head_VD, arrays of `chunk` positions) along axis 1 of `arrays`, one chunk after another.

    Args:
      fn: returns a pytree of [B, chunk, ...] arrays.
      arrays: pytree of [B, T, ...]; see `chunked`.
      slots: a scalar; chunks after so many positions are left out, and give 0. None is T.

    Returns:
      The pytree of [B, T, ...].
    """
    t = jax.tree.leaves(arrays)[0].shape[1]
    pieces = chunked(arrays, chunk)
    count = len(jax.tree.leaves(pieces)[0])

    def one(number):
        return fn(head_VD, jax.tree.map(lambda x: x[number], pieces))

    def add(number, found):
        return jax.tree.map(
            lambda all_, x: jax.lax.dynamic_update_index_in_dim(all_, x, number, 0), found, one(number)
        )

    empty = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), jax.eval_shape(one, 0))
    out = jax.lax.fori_loop(0, needed(t, count, slots), add, empty)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[1], -1, *x.shape[3:])[:, :t], out)


def needed(t: int, count: int, slots):
    """How many of `count` chunks of `chunked` hold the first `slots` of T positions; all if None."""
    return count if slots is None else jnp.minimum(-(-slots // -(-t // count)), count)


def chunked(arrays, chunk: int):
    """[B, T, ...] -> [n, B, T/n, ...] with n = T/chunk rounded up, so that little is filled with zeros."""

    def cut(x):
        pieces = -(-x.shape[1] // chunk)
        chunk_ = -(-x.shape[1] // pieces)
        padding = [(0, 0)] * x.ndim
        padding[1] = (0, -x.shape[1] % chunk_)
        x = jnp.pad(x, padding)
        return x.reshape(x.shape[0], -1, chunk_, *x.shape[2:]).swapaxes(0, 1)

    return jax.tree.map(cut, arrays)


def distance(
    student: ModelConfig,
    student_params: dict,
    teacher: ModelConfig,
    teacher_params: dict,
    rollouts: Rollouts,
    scoring: Scoring,
):
    """How far the student is from the teacher at each position of its responses, in nats, 0 outside them.

    Both models must share ids; ids that either tokenizer lacks carry no mass in the student. The models
    may have different numbers of vocabulary rows. Of `scoring` keep and top_k are not read.

    Returns:
      (KL(student || teacher) over the whole vocabulary [B, T], the teacher's log-probability of the token
      that the student wrote [B, T]).
    """
    shared = min(student.vocab_size, teacher.vocab_size)
    heads = transformer.head(student, student_params), transformer.head(teacher, teacher_params)

    def one(heads, chunk):
        student_BcD, teacher_BcD, token_Bc = chunk
        logp_BcV = jax.nn.log_softmax(transformer.logits(student, heads[0], student_BcD))[..., :shared]
        logq_BcV = jax.nn.log_softmax(transformer.logits(teacher, heads[1], teacher_BcD))[..., :shared]
        kl_Bc = jnp.where(jnp.isneginf(logp_BcV), 0.0, jnp.exp(logp_BcV) * (logp_BcV - logq_BcV)).sum(axis=-1)
        return kl_Bc, jnp.take_along_axis(logq_BcV, token_Bc[..., None], axis=-1)[..., 0]

    def piece(sequences: Sequences, r: Written):
        models = (student, student_params), (teacher, teacher_params)
        hidden = (response_hidden(*model, sequences)[0] for model in models)
        return over_chunks(one, scoring.chunk, heads, (*hidden, r.token_BT), sequences.slots), ()

    found, _ = in_pieces(piece, rollouts, scoring)[0]
    return tuple(inside(rollouts.mask_BT, x_BT) for x_BT in found)
