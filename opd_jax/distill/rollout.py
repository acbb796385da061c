"""The student writes: prefill and decode loops, one compiled program that pays for what is written.

Prompts are prefilled in pieces of similar length. All rows of the decode loop share one step counter and one
cache slot (`slot` of `cache.decode`), so what is written is a prefix of the slots, and a step reads no more.
When at most half of the rows of every device are still written, they move together and the loop goes on with
half the rows (`Sampling.halvings`). Rows do not leave their device. Row b at step t draws from (key, b, t)
alone, so nothing of this changes what it says.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, Protocol

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


def draws(key, prompts: int, sampling: Sampling) -> Draws:
    """The Draws of a batch of prompts, from a `key` as `sample` takes it."""
    if isinstance(key, Draws):
        return key
    rows = prompts * sampling.samples
    key_B = key if key.ndim else row_keys(key, jnp.arange(rows))
    return Draws(key_B, jnp.full(rows, sampling.max_tokens, jnp.int32))


class Judge(Protocol):
    """Reads responses while they are written, block by block, and may end rows.

    Attributes:
      block: tokens of a block.

    A judge keeps a state, a pytree with the loop's rows in front (or what `taken` makes of it).
    """

    @property
    def block(self) -> int: ...

    def begin(self, prompts, draws: Draws, sampling: Sampling) -> tuple[Any, Any]:
        """(its state before the first token, what it will have written: zeros of [T, S, R, ...])."""
        ...

    def taken(self, state: Any, order_SR) -> Any:
        """The state of the rows that an order names within each shard."""
        ...

    def judged(self, rows: "Rows", begin) -> "Rows":
        """The rows after it has read tokens `begin` to `begin` + block - 1."""
        ...


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
    return sample_judged(config, params, (tokens_QP, mask_QP), key, sampling)[0]


def sample_judged(
    config: ModelConfig, params: dict, prompts, key, sampling: Sampling, judge: Judge | None = None
) -> tuple[Rollouts, Any]:
    """`sample` with a judge that reads along.

    Args:
      prompts: (tokens_QP, mask_QP).

    Returns:
      (Rollouts, what the judge has written, each [B, T, ...] or [B, 1, ...]).
    """
    tokens_QP, mask_QP = prompts
    q, n = tokens_QP.shape[0], sampling.samples
    key = draws(key, q, sampling)
    turns = parts(q, sampling.slots // n, shard_rows.count())
    writer = _Writer.of(config, params, q * n // turns, sampling, judge)
    if turns == 1:
        return writer.write(tokens_QP, mask_QP, key)

    def turn(part):
        tokens_QP, mask_QP, draws_QN = part
        written = writer.write(tokens_QP, mask_QP, Draws(*(x.reshape(-1) for x in draws_QN)))
        return jax.tree.map(lambda x: x.reshape(-1, n, *x.shape[1:]), written)

    draws_QN = Draws(*(x.reshape(q, n) for x in key))
    written = shard_rows.join(jax.lax.map(turn, shard_rows.split((tokens_QP, mask_QP, draws_QN), turns)))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), written)


class Rows(NamedTuple):
    """The rows of the loop, B of them, and what they have written.

    Attributes:
      t: position of the next token.
      token_B, done_B: the last token, and whether the row has ended.
      draws, length_B: what it draws from, and the number of its prompt's tokens.
      cache: keys and values.
      out: what every row of the batch has written, by name: [T, S, R, ...]. The loop's rows stand first in
        each of the S shards.
      judge: the judge's state.
      judged: what the judge has written, as `out`.
    """

    t: Any
    token_B: Any
    done_B: Any
    draws: Draws
    length_B: Any
    cache: kv.KVCache
    out: dict
    judge: Any = ()
    judged: Any = ()


@dataclasses.dataclass(frozen=True)
class _Writer:
    """A model that is ready to write: settings, and weights as the decode step reads them."""

    config: ModelConfig
    params: dict
    unstacked: dict
    head_VD: Any
    sampling: Sampling
    judge: Judge | None = None

    @classmethod
    def of(
        cls, config: ModelConfig, params: dict, rows: int, sampling: Sampling, judge: Judge | None
    ) -> "_Writer":
        with jax.named_scope("prefill"):
            unstacked = kv.unstack(config, params, rows)
        return cls(config, params, unstacked, transformer.head(config, params), sampling, judge)

    @property
    def length(self) -> int:
        """Response positions that are kept: T, or as many as the judge's blocks have."""
        block = self.judge.block if self.judge is not None else 1
        return -(-self.sampling.max_tokens // block) * block

    def write(self, tokens_QP, mask_QP, draws: Draws) -> tuple[Rollouts, Any]:
        """The responses to some prompts, `samples` to each."""
        p, t_max, samples = tokens_QP.shape[1], self.sampling.max_tokens, self.sampling.samples
        with jax.named_scope("prefill"):
            hidden_QD, cache = read_prompts(self.config, self.params, (tokens_QP, mask_QP), self.sampling)
            tokens_BP, mask_BP, hidden_BD = (
                jnp.repeat(x, samples, axis=0) for x in (tokens_QP, mask_QP, hidden_QD)
            )
            cache = kv.grow(self.config, kv.repeat(cache, samples), p + t_max)
        rows = Rows(
            t=0,
            token_B=jnp.zeros_like(mask_BP[:, 0], jnp.int32),
            done_B=jnp.zeros_like(mask_BP[:, 0]),
            draws=draws,
            length_B=mask_BP.sum(axis=1, dtype=jnp.int32),
            cache=cache,
            out=self._nothing(len(mask_BP)),
        )
        if self.judge is not None:
            with jax.named_scope("judge"):
                state, judged = self.judge.begin((tokens_QP, mask_QP), draws, self.sampling)
            rows = rows._replace(judge=state, judged=judged)
        out, judged = self._loops(self._emit(rows, hidden_BD), p)
        out, judged = jax.tree.map(lambda x: x[:, : self.sampling.max_tokens], (out, judged))
        mask_BT, token_BT = out.pop("mask"), out.pop("token")
        rollouts = Rollouts(
            tokens_BL=jnp.concatenate([tokens_BP, token_BT], axis=1),
            prompt_mask_BP=mask_BP,
            mask_BT=mask_BT,
            finished_B=(mask_BT & self._ends(token_BT)).any(axis=1),
            **out,
        )
        return rollouts, judged

    def _nothing(self, rows: int) -> dict:
        """What `rows` rows have written before their first token."""
        shards, k = shard_rows.count(), self.sampling.candidates
        shape = self.length, shards, rows // shards
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

    def _loops(self, rows: Rows, p: int) -> tuple[dict, Any]:
        """Writes until all have ended; returns `Rows.out` and `Rows.judged` as [B, T, ...], rows in the
        batch's order."""
        shards, all_rows = rows.out["mask"].shape[1:]
        place_SR = jnp.broadcast_to(jnp.arange(all_rows)[None], (shards, all_rows))
        unstacked, local = self.unstacked, all_rows
        rope_1LC = attention.rope_tables(self.config, jnp.arange(p + self.sampling.max_tokens)[None])
        for halving in range(self.sampling.halvings + 1):
            last = halving == self.sampling.halvings or local == 1
            fewer = 0 if last else -(-local // 2)
            step = functools.partial(self._step, unstacked, rope_1LC)
            rows = jax.lax.while_loop(
                functools.partial(self._goes_on, fewer),
                step if self.judge is None else functools.partial(self._block, step),
                rows,
            )
            if last:
                break
            rows, order_SR = self._halved(rows, fewer)
            place_SR = jnp.take_along_axis(place_SR, order_SR, axis=1)
            if few_rows.apply(self.config, shards * fewer) != few_rows.apply(self.config, shards * local):
                unstacked = kv.unstack(self.config, self.params, shards * fewer)
            local = fewer
        found = _rows_of((rows.out, rows.judged), jnp.argsort(place_SR, axis=1))
        return jax.tree.map(lambda x: x.reshape(len(x), -1, *x.shape[3:]).swapaxes(0, 1), found)

    def _block(self, step, rows: Rows) -> Rows:
        """Writes up to the next multiple of the judge's block, or until all have ended, and has it judged."""
        assert self.judge is not None
        block = self.judge.block
        begin = rows.t // block * block
        end = jnp.minimum(begin + block, self.sampling.max_tokens)
        rows = jax.lax.while_loop(lambda rows: (rows.t < end) & ~rows.done_B.all(), step, rows)
        with jax.named_scope("judge"):
            return self.judge.judged(rows._replace(t=end), begin)

    def _goes_on(self, fewer: int, rows: Rows):
        """Whether some shard still writes more than `fewer` rows."""
        live_S = (~rows.done_B).reshape(shard_rows.count(), -1).sum(axis=1)
        goes_on = (rows.t < self.sampling.max_tokens) & (live_S > fewer).any()
        # Rows that end with their first token are judged too.
        return goes_on if self.judge is None else goes_on | (rows.t == 1)

    def _halved(self, rows: Rows, fewer: int) -> tuple[Rows, jax.Array]:
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
        out, judged = _rows_of((rows.out, rows.judged), all_SR)
        state = self.judge.taken(rows.judge, kept_SR) if self.judge is not None else ()
        return Rows(rows.t, token_B, done_B, draws, length_B, cache, out, state, judged), all_SR

    def _step(self, unstacked: dict, rope_1LC, rows: Rows) -> Rows:
        """Runs each row's last token through the model, and draws the next."""
        with jax.named_scope("decode"):
            place_B = rows.length_B + rows.t - 1
            rope_B1C = [table[0, place_B][:, None] for table in rope_1LC]
            slot = len(rope_1LC[0][0]) - self.sampling.max_tokens + rows.t - 1
            hidden_BD, cache = kv.decode(self.config, unstacked, rows.token_B, rope_B1C, rows.cache, slot)
        return self._emit(rows._replace(cache=cache), hidden_BD)

    def _emit(self, rows: Rows, hidden_BD) -> Rows:
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


def read_prompts(config: ModelConfig, params: dict, prompts, sampling: Sampling):
    """(hidden_QD of the last position, KVCache of P slots), in pieces of prompts of similar length.

    Args:
      prompts: (tokens_QP, mask_QP).
    """
    tokens_QP, mask_QP = prompts
    q, p = tokens_QP.shape
    read = functools.partial(kv.prefill, config, params, int8=sampling.int8_cache)
    pieces = parts(q, sampling.prefill_rows, shard_rows.count())
    if pieces == 1:
        return read(tokens_QP, mask_QP)

    def at_width(width: int):
        def part(piece):
            hidden_QD, cache = read(*(x[:, p - width :] for x in piece))
            return hidden_QD, kv.widen(cache, p)

        return part

    def piece(part):
        length_Q = part[1].sum(axis=1, dtype=jnp.int32)
        shares = widths.rounded(sampling.prompt_shares, p)
        return widths.narrowest((*shares, p), length_Q, at_width, part)

    order_SR = shard_rows.order(mask_QP.sum(axis=1), pieces)
    cut = shard_rows.split(shard_rows.taken((tokens_QP, mask_QP), order_SR), pieces)
    read_QD, cache = shard_rows.join(jax.lax.map(piece, cut))
    back_SR = jnp.argsort(order_SR, axis=1)
    return shard_rows.taken(read_QD, back_SR), kv.taken(config, cache, back_SR)


def _rows_of(out, order_SR):
    """[T, S, R, ...] arrays with the rows of each shard in another order."""
    take = jax.vmap(lambda x_TR, order_R: x_TR[:, order_R], in_axes=(1, 0), out_axes=1)
    return jax.tree.map(lambda x: take(x, order_SR), out)


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
