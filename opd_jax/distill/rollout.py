"""The student writes: prefill and decode loops, one compiled program that pays for what is written.

Prompts are prefilled in pieces of similar length. All rows of the decode loop share one step counter and one
cache slot (`slot` of `cache.decode`), so what is written is a prefix of the slots, and a step reads no more.
When at most half of the rows of every device are still written, they move together and the loop goes on with
half the rows (`Sampling.halvings`). Rows do not leave their device. Row b at step t draws from (key, b, t)
alone, so nothing of this changes what it says.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from opd_jax.distill import vocabulary, widths
from opd_jax.distill.types import Rollouts
from opd_jax.models import ModelConfig, attention, few_rows, transformer
from opd_jax.models import cache as kv
from opd_jax.parallel import shard_rows


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to draw; static, so each value compiles its own program.

    Attributes:
      max_tokens: T, the length limit of a response.
      samples: n, responses a prompt. They share its prefill.
      candidates: K, how many of the student's top tokens to keep a position.
      temperature: 0 is greedy.
      top_k: 0 keeps all. Applied before top_p.
      top_p: 1 keeps all. Applied before min_p.
      min_p: least probability relative to the most likely token's; 0 keeps all.
      int8_cache: keep keys and values in int8. Then every log-probability is that of the model as it sampled,
        its keys and values rounded, and a full forward pass gives slightly others.
      halvings: how often the rows of the decode loop may halve; each compiles its own copy of the step.
      slots: most rows that are written at a time, over all devices, so that the cache has no more; 0 is all.
      prefill_rows: most prompts that are read at a time, over all devices; 0 is all.
      prompt_shares: shares of P. A piece of prompts is read at the smallest width that holds it, or at P.
    """

    max_tokens: int
    samples: int = 1
    candidates: int = 4
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    int8_cache: bool = False
    halvings: int = 0
    slots: int = 0
    prefill_rows: int = 0
    prompt_shares: tuple[float, ...] = ()


class Draws(NamedTuple):
    """What the rows of a batch draw from, and where they end.

    Attributes:
      key_B: a PRNG key for each row, as `row_keys` makes them.
      limit_B: the most tokens of each response, from 1 to T.
    """

    key_B: Any
    limit_B: Any


def sample(config: ModelConfig, params: dict, tokens_QP, mask_QP, key, sampling: Sampling) -> Rollouts:
    """Samples n responses a prompt; stops as soon as every row has ended.

    Args:
      config, params: the student.
      tokens_QP, mask_QP: Q left-padded prompts; the last column is real in every row.
      key: a PRNG key, one for each row, as `row_keys` makes them, or Draws. Row b at step t draws from
        (key, b, t) alone, so the same seed gives the same tokens on any mesh and however the batch is cut.
      sampling: settings.

    Returns:
      Rollouts with B = Q n and T = sampling.max_tokens; row b answers prompt b // n.
    """
    q, n = tokens_QP.shape[0], sampling.samples
    if not isinstance(key, Draws):
        key_B = key if key.ndim else row_keys(key, jnp.arange(q * n))
        key = Draws(key_B, jnp.full(q * n, sampling.max_tokens, jnp.int32))
    turns = parts(q, sampling.slots // n, shard_rows.count())
    writer = _Writer.of(config, params, q * n // turns, sampling)
    if turns == 1:
        return writer.write(tokens_QP, mask_QP, key)

    def turn(part):
        tokens_QP, mask_QP, draws_QN = part
        rollouts = writer.write(tokens_QP, mask_QP, Draws(*(x.reshape(-1) for x in draws_QN)))
        return jax.tree.map(lambda x: x.reshape(-1, n, *x.shape[1:]), rollouts)

    draws_QN = Draws(*(x.reshape(q, n) for x in key))
    rollouts = shard_rows.join(jax.lax.map(turn, shard_rows.split((tokens_QP, mask_QP, draws_QN), turns)))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rollouts)


class _Rows(NamedTuple):
    """The rows of the loop, B of them, and what they have written.

    Attributes:
      t: position of the next token.
      token_B, done_B: the last token, and whether the row has ended.
      draws, length_B: what it draws from, and the number of its prompt's tokens.
      cache: keys and values.
      out: what every row of the batch has written, by name: [T, S, R, ...]. The loop's rows stand first in
        each of the S shards.
    """

    t: Any
    token_B: Any
    done_B: Any
    draws: Draws
    length_B: Any
    cache: kv.KVCache
    out: dict


@dataclasses.dataclass(frozen=True)
class _Writer:
    """A model that is ready to write: settings, and weights as the decode step reads them."""

    config: ModelConfig
    params: dict
    unstacked: dict
    head_VD: Any
    sampling: Sampling

    @classmethod
    def of(cls, config: ModelConfig, params: dict, rows: int, sampling: Sampling) -> "_Writer":
        with jax.named_scope("prefill"):
            unstacked = kv.unstack(config, params, rows)
        return cls(config, params, unstacked, transformer.head(config, params), sampling)

    def write(self, tokens_QP, mask_QP, draws: Draws) -> Rollouts:
        """The responses to some prompts, `samples` to each."""
        p, t_max, samples = tokens_QP.shape[1], self.sampling.max_tokens, self.sampling.samples
        with jax.named_scope("prefill"):
            hidden_QD, cache = self._prefill(tokens_QP, mask_QP)
            tokens_BP, mask_BP, hidden_BD = (
                jnp.repeat(x, samples, axis=0) for x in (tokens_QP, mask_QP, hidden_QD)
            )
            cache = kv.grow(self.config, kv.repeat(cache, samples), p + t_max)
        rows = _Rows(
            t=0,
            token_B=jnp.zeros_like(mask_BP[:, 0], jnp.int32),
            done_B=jnp.zeros_like(mask_BP[:, 0]),
            draws=draws,
            length_B=mask_BP.sum(axis=1, dtype=jnp.int32),
            cache=cache,
            out=self._nothing(len(mask_BP)),
        )
        out = self._loops(self._emit(rows, hidden_BD), p)
        mask_BT, token_BT = out.pop("mask"), out.pop("token")
        return Rollouts(
            tokens_BL=jnp.concatenate([tokens_BP, token_BT], axis=1),
            prompt_mask_BP=mask_BP,
            mask_BT=mask_BT,
            finished_B=(mask_BT & self._ends(token_BT)).any(axis=1),
            **out,
        )

    def _prefill(self, tokens_QP, mask_QP):
        """(hidden_QD of the last position, KVCache of P slots), in pieces of prompts of similar length."""
        q, p = tokens_QP.shape
        read = functools.partial(kv.prefill, self.config, self.params, int8=self.sampling.int8_cache)
        pieces = parts(q, self.sampling.prefill_rows, shard_rows.count())
        if pieces == 1:
            return read(tokens_QP, mask_QP)

        def at_width(width: int):
            def part(piece):
                hidden_QD, cache = read(*(x[:, p - width :] for x in piece))
                return hidden_QD, kv.widen(cache, p)

            return part

        def piece(part):
            length_Q = part[1].sum(axis=1, dtype=jnp.int32)
            shares = widths.rounded(self.sampling.prompt_shares, p)
            return widths.narrowest((*shares, p), length_Q, at_width, part)

        order_SR = shard_rows.order(mask_QP.sum(axis=1), pieces)
        cut = shard_rows.split(shard_rows.taken((tokens_QP, mask_QP), order_SR), pieces)
        read_QD, cache = shard_rows.join(jax.lax.map(piece, cut))
        back_SR = jnp.argsort(order_SR, axis=1)
        return shard_rows.taken(read_QD, back_SR), kv.taken(self.config, cache, back_SR)

    def _nothing(self, rows: int) -> dict:
        """What `rows` rows have written before their first token."""
        shards, k = shard_rows.count(), self.sampling.candidates
        shape = self.sampling.max_tokens, shards, rows // shards
        return {
            "token": jnp.full(shape, self.config.pad_id, jnp.int32),
            "mask": jnp.zeros(shape, bool),
            "logp_BT": jnp.zeros(shape, jnp.float32),
            "behaviour_logp_BT": jnp.zeros(shape, jnp.float32),
            "stop_BT": jnp.zeros(shape, jnp.float32),
            "topk_BTK": jnp.zeros((*shape, k), jnp.int32),
            "topk_logp_BTK": jnp.zeros((*shape, k), jnp.float32),
        }

    def _ends(self, token):
        """Whether ids end a response."""
        ids = _end_ids(self.config).reshape((1,) * token.ndim + (-1,))
        return (token[..., None] == ids).any(axis=-1)

    def _loops(self, rows: _Rows, p: int) -> dict:
        """Writes until all have ended; returns `_Rows.out` as [B, T, ...], rows in the batch's order."""
        shards, all_rows = rows.out["mask"].shape[1:]
        place_SR = jnp.broadcast_to(jnp.arange(all_rows)[None], (shards, all_rows))
        unstacked, local = self.unstacked, all_rows
        rope_1LC = attention.rope_tables(self.config, jnp.arange(p + self.sampling.max_tokens)[None])
        for halving in range(self.sampling.halvings + 1):
            last = halving == self.sampling.halvings or local == 1
            fewer = 0 if last else -(-local // 2)
            rows = jax.lax.while_loop(
                functools.partial(self._goes_on, fewer),
                functools.partial(self._step, unstacked, rope_1LC),
                rows,
            )
            if last:
                break
            rows, order_SR = self._halved(rows, fewer)
            place_SR = jnp.take_along_axis(place_SR, order_SR, axis=1)
            if few_rows.apply(self.config, shards * fewer) != few_rows.apply(self.config, shards * local):
                unstacked = kv.unstack(self.config, self.params, shards * fewer)
            local = fewer
        out = _rows_of(rows.out, jnp.argsort(place_SR, axis=1))
        return {name: x.reshape(len(x), -1, *x.shape[3:]).swapaxes(0, 1) for name, x in out.items()}

    def _goes_on(self, fewer: int, rows: _Rows):
        """Whether some shard still writes more than `fewer` rows."""
        live_S = (~rows.done_B).reshape(shard_rows.count(), -1).sum(axis=1)
        return (rows.t < self.sampling.max_tokens) & (live_S > fewer).any()

    def _halved(self, rows: _Rows, fewer: int) -> tuple[_Rows, jax.Array]:
        """The first `fewer` rows of each shard after those that are still written have moved to the front.

        Returns:
          (the rows, the order [S, R] of all of the batch's rows that brought them there).
        """
        order_SR = shard_rows.order(rows.done_B)
        kept_SR = order_SR[:, :fewer]
        left = jnp.arange(order_SR.shape[1], rows.out["mask"].shape[2], dtype=order_SR.dtype)
        all_SR = jnp.concatenate([order_SR, jnp.broadcast_to(left[None], (len(order_SR), len(left)))], axis=1)
        of_row = rows.token_B, rows.done_B, rows.draws, rows.length_B
        cache = kv.taken(self.config, rows.cache, kept_SR)
        token_B, done_B, draws, length_B = shard_rows.taken(of_row, kept_SR)
        out = _rows_of(rows.out, all_SR)
        return _Rows(rows.t, token_B, done_B, draws, length_B, cache, out), all_SR

    def _step(self, unstacked: dict, rope_1LC, rows: _Rows) -> _Rows:
        """Runs each row's last token through the model, and draws the next."""
        with jax.named_scope("decode"):
            place_B = rows.length_B + rows.t - 1
            rope_B1C = [table[0, place_B][:, None] for table in rope_1LC]
            slot = len(rope_1LC[0][0]) - self.sampling.max_tokens + rows.t - 1
            hidden_BD, cache = kv.decode(self.config, unstacked, rows.token_B, rope_B1C, rows.cache, slot)
        return self._emit(rows._replace(cache=cache), hidden_BD)

    def _emit(self, rows: _Rows, hidden_BD) -> _Rows:
        """Draws token t of every row that has not ended and writes it down."""
        u_B2 = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, rows.t), (2,)))(rows.draws.key_B)
        with jax.named_scope("head"):
            logits_BV = transformer.logits(self.config, self.head_VD, hidden_BD, decoding=True)
        with jax.named_scope("draw"):
            drawn = _draw(self.sampling, logits_BV, u_B2, _end_ids(self.config))
        live_B = ~rows.done_B
        token_B = jnp.where(live_B, drawn.pop("token"), self.config.pad_id)
        values = {
            name: jnp.where(live_B.reshape((-1,) + (1,) * (x.ndim - 1)), x, 0) for name, x in drawn.items()
        }
        values |= {"token": token_B, "mask": live_B}

        def written(out, x):
            x = x.reshape(1, out.shape[1], -1, *x.shape[1:])
            return jax.lax.dynamic_update_slice(out, x, (rows.t,) + (0,) * (out.ndim - 1))

        out = {name: written(x, values[name]) for name, x in rows.out.items()}
        done_B = rows.done_B | self._ends(token_B) | (rows.t + 1 >= rows.draws.limit_B)
        return rows._replace(t=rows.t + 1, token_B=token_B, done_B=done_B, out=out)


def _rows_of(out: dict, order_SR) -> dict:
    """[T, S, R, ...] arrays with the rows of each shard in another order."""
    take = jax.vmap(lambda x_TR, order_R: x_TR[:, order_R], in_axes=(1, 0), out_axes=1)
    return {name: take(x, order_SR) for name, x in out.items()}


def parts(rows: int, most: int, shards: int) -> int:
    """The least number of equal parts of `rows` rows, cut within shards, with at most `most` rows in each.

    One if `most` is 0, and one row of each shard in a part if `most` is too few for that.
    """
    local, most = rows // shards, max(most // shards, 1) if most else rows
    return next(n for n in range(1, local + 1) if local % n == 0 and local // n <= most)


def _end_ids(config: ModelConfig):
    return jnp.array(config.eos_ids or (-1,), jnp.int32)


def row_keys(key, row_B):
    """The PRNG keys of rollouts by their numbers in the batch of all processes."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, row_B)


def _draw(sampling: Sampling, logits_BV, u_B2, end_ids) -> dict:
    """One token a row and what is known of it: ids [B], log-probabilities [B], candidates [B, K]."""
    logits_BRW = vocabulary.fold(logits_BV)
    normaliser_B = vocabulary.log_normaliser(logits_BRW)
    topk_BK = vocabulary.top(logits_BRW, sampling.candidates)
    if sampling.temperature == 0:
        token_B = topk_BK[:, 0]
        behaviour_logp_B = jnp.zeros_like(normaliser_B)
    else:
        shaped_BRW = logits_BRW / sampling.temperature
        if sampling.top_k:
            shaped_BRW = vocabulary.keep_top_k(shaped_BRW, sampling.top_k)
        if sampling.top_p < 1:
            shaped_BRW = vocabulary.keep_top_p(shaped_BRW, sampling.top_p)
        if sampling.min_p:
            shaped_BRW = vocabulary.keep_min_p(shaped_BRW, sampling.min_p)
        token_B = vocabulary.draw(shaped_BRW, u_B2)
        behaviour_logp_B = vocabulary.pick_logit(shaped_BRW, token_B[:, None])[
            :, 0
        ] - vocabulary.log_normaliser(shaped_BRW)
    chosen_B = vocabulary.pick_logit(logits_BRW, token_B[:, None])[:, 0]
    stop_BE = logits_BV[:, jnp.maximum(end_ids, 0)] - normaliser_B[:, None]
    return {
        "token": token_B,
        "logp_BT": chosen_B - normaliser_B,
        "behaviour_logp_BT": behaviour_logp_B,
        "stop_BT": jnp.where(end_ids[None] >= 0, jnp.exp(stop_BE), 0).sum(axis=1),
        "topk_BTK": topk_BK,
        "topk_logp_BTK": vocabulary.pick_logit(logits_BRW, topk_BK) - normaliser_B[:, None],
    }
