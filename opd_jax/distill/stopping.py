"""Rollouts that end before their end, by release.stop; see docs/stopping.md.

With `rule`, they stop where the teacher stops teaching. While the student writes, the teacher reads along:
after every block of tokens it scores the block behind its own KV cache, the release rule looks at the
sentences so far, and a row whose release is certain ends there. One compiled program; the scores come with
the rollouts and are not made again. With the other values, responses stop at a length.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from opd_jax import release as releasing
from opd_jax.distill import objectives, rollout, scoring
from opd_jax.distill.types import Rollouts, Scores, Stops, Targets
from opd_jax.errors import UserError
from opd_jax.models import ModelConfig, attention, transformer
from opd_jax.models import cache as kv
from opd_jax.parallel import shard_rows
from opd_jax.release.segments import SegmentTable, segment

FORMS = "never, rule, length:N, grow:A:B:STEPS or random:A:B, with numbers of tokens"


@dataclasses.dataclass(frozen=True)
class Limit:
    """The lengths at which responses stop; static.

    Attributes:
      low, high: tokens, from 1 to the length limit.
      steps: the length grows from `low` at the first step to `high` at this one. 0 draws each row's length
        between the two, both included.
      audit: share of rows that are written to their ends.
    """

    low: int
    high: int
    steps: int = 1
    audit: float = 0.0

    def draws(self, draws: rollout.Draws, sampling: rollout.Sampling, step) -> rollout.Draws:
        """The draws of a batch, with these limits where they are lower."""
        if self.steps:
            done = jnp.minimum(step / max(self.steps - 1, 1), 1.0)
            tokens = jnp.round(self.low + (self.high - self.low) * done).astype(jnp.int32)
        else:
            share_B = _uniform(draws, sampling, 1)
            tokens = self.low + jnp.floor(share_B * (self.high - self.low + 1)).astype(jnp.int32)
        audit_B = audited(draws, sampling, self.audit)
        return draws._replace(limit_B=jnp.where(audit_B, draws.limit_B, jnp.minimum(tokens, draws.limit_B)))

    def noted(self, rollouts: Rollouts, limited: rollout.Draws, sampling: rollout.Sampling) -> Rollouts:
        """The rollouts with their Stops. A row that was written to its end could have stopped nowhere."""
        length_B = rollouts.mask_BT.sum(axis=1, dtype=jnp.int32)
        short_B = limited.limit_B < sampling.max_tokens
        stopped_B = short_B & ~rollouts.finished_B & (length_B == limited.limit_B)
        found_B = jnp.where(stopped_B, length_B, 0)
        audit_B = audited(limited, sampling, self.audit)
        return rollouts.replace(stops=Stops(stopped_B, audit_B, certain_B=found_B, kept_B=found_B))


def parse(spec: str, audit: float = 0.0) -> str | Limit:
    """What a value of release.stop says: "never", "rule", or a Limit.

    Raises:
      UserError: it has none of the FORMS.
    """
    kind, *rest = spec.split(":")
    if spec in ("never", "rule"):
        return spec
    wanted = {"length": 1, "grow": 3, "random": 2}.get(kind)
    if wanted != len(rest) or not all(n.isascii() and n.isdigit() and int(n) > 0 for n in rest):
        raise UserError(f"release.stop={spec!r} is unknown; give {FORMS}")
    numbers = [int(n) for n in rest]
    if kind == "length":
        return Limit(numbers[0], numbers[0], audit=audit)
    low, high = numbers[:2]
    if low > high:
        raise UserError(f"release.stop={spec} shrinks; give the smaller number of tokens first")
    return Limit(low, high, numbers[2] if kind == "grow" else 0, audit)


def check(config) -> None:
    """Refuses a release.stop that the config's other fields make impossible or useless.

    Raises:
      UserError: names the keys and the remedy.
    """
    stop, spec, rule = parse(config.release.stop), config.release.stop, config.release
    if stop == "never":
        return
    if config.reward.weight:
        raise UserError(
            f"release.stop={spec} ends responses before their answers, which reward.weight="
            f"{config.reward.weight} grades; set one to its default"
        )
    if isinstance(stop, Limit):
        if stop.low >= config.rollout.max_tokens:
            raise UserError(
                f"release.stop={spec} stops nothing before rollout.max_tokens={config.rollout.max_tokens}; "
                "give a smaller number"
            )
        return
    if rule.rule not in releasing.CERTAIN:
        raise UserError(
            f"release.stop=rule needs a rule that can be certain before a response ends, and release.rule="
            f"{rule.rule} cannot; use one of {', '.join(sorted(releasing.CERTAIN))}"
        )
    if rule.rule == "prune_opd" and rule.prune_base:
        raise UserError(
            f"release.prune_base={rule.prune_base} supervises every token, so release.stop=rule stops"
            " nothing; set release.prune_base=0"
        )
    if config.segments.kind == "nltk":
        raise UserError(
            "release.stop=rule cuts sentences on the device, and segments.kind=nltk on the host; use punkt"
        )
    if objectives.OBJECTIVES[config.objective.name].writer == "teacher":
        raise UserError(
            f"release.stop=rule reads along with the student, and with objective.name={config.objective.name}"
            " the teacher writes; use release.stop=never or a length"
        )
    if config.rollout.max_tokens < 2:
        raise UserError("release.stop=rule needs rollout.max_tokens of 2 or more")


def _uniform(draws: rollout.Draws, sampling: rollout.Sampling, purpose: int):
    """A number in [0, 1) for each row that no token is drawn from; it follows from the row's key alone."""
    number = sampling.max_tokens + purpose  # tokens draw from 0 to max_tokens - 1
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, number)))(draws.key_B)


def audited(draws: rollout.Draws, sampling: rollout.Sampling, share: float):
    """audit_B: the rows that are written to their ends whatever release.stop says."""
    return _uniform(draws, sampling, 0) < share


class _Reading(struct.PyTreeNode):
    """The teacher's state: what it has read of the loop's rows.

    Attributes:
      hidden_BD: the teacher's hidden state that predicts the next token.
      cache: its keys and values.
      audit_B: as Stops'.
      prompt: scalar, the cache's slots before the first response token.
    """

    hidden_BD: Any
    cache: kv.StackedCache
    audit_B: Any
    prompt: Any


@dataclasses.dataclass(frozen=True)
class Judge:
    """The teacher and a rule as a `rollout.Judge`.

    Attributes:
      teacher, params: the teacher.
      table: cuts sentences.
      config: the `release` sub-config; reads rule, stop_audit and stop_cache_dtype, and what the rule reads.
      reading: how to score; its chunk, keep and top_k.
      step: number of the training step, for rules that change with it.
      block: tokens that are read at a time.
    """

    teacher: ModelConfig
    params: dict
    table: SegmentTable
    config: Any
    reading: scoring.Scoring
    step: Any
    block: int

    def begin(self, prompts, draws: rollout.Draws, sampling: rollout.Sampling):
        tokens_QP, mask_QP = prompts
        n, p = sampling.samples, tokens_QP.shape[1]
        length = -(-sampling.max_tokens // self.block) * self.block
        own = dataclasses.replace(sampling, int8_cache=self.config.stop_cache_dtype == "int8")
        hidden_QD, cache = rollout.read_prompts(self.teacher, self.params, prompts, own)
        state = _Reading(
            hidden_BD=jnp.repeat(hidden_QD, n, axis=0),
            cache=kv.stack(self.teacher, kv.repeat(cache, n), p + length),
            audit_B=audited(draws, sampling, self.config.stop_audit),
            prompt=jnp.int32(p),
        )
        shards, rows = shard_rows.count(), len(mask_QP) * n
        written = scoring.Written(
            token_BT=jnp.zeros((rows, self.block), jnp.int32),
            logp_BT=jnp.zeros((rows, self.block)),
            topk_BTK=jnp.zeros((rows, self.block, sampling.candidates), jnp.int32),
            topk_logp_BTK=jnp.zeros((rows, self.block, sampling.candidates)),
        )
        hidden_BRD = jax.ShapeDtypeStruct((rows, self.block, self.teacher.width), self.teacher.dtype)
        shapes = jax.eval_shape(self._compared, hidden_BRD, written)
        empty = jax.tree.map(
            lambda x: jnp.zeros((length, shards, rows // shards, *x.shape[2:]), x.dtype), shapes
        )
        of_row = (1, shards, rows // shards)
        stops = Stops(
            stopped_B=jnp.zeros(of_row, bool),
            audit_B=state.audit_B.reshape(of_row),
            certain_B=jnp.zeros(of_row, jnp.int32),
            kept_B=jnp.zeros(of_row, jnp.int32),
        )
        return state, (empty, stops)

    def taken(self, state: _Reading, order_SR):
        hidden_BD, audit_B = shard_rows.taken((state.hidden_BD, state.audit_B), order_SR)
        return _Reading(hidden_BD, state.cache.taken(self.teacher, order_SR), audit_B, state.prompt)

    def judged(self, rows: rollout.Rows, begin):
        state, (scores, stops) = rows.judge, rows.judged
        count = len(rows.token_B)
        local = count // shard_rows.count()

        def front(x):
            """[T, S, R, ...] -> the loop's rows, [B, T, ...]."""
            return x[:, :, :local].reshape(len(x), count, *x.shape[3:]).swapaxes(0, 1)

        def in_block(x):
            return front(jax.lax.dynamic_slice_in_dim(x, begin, self.block))

        def put(x, new, at=0):
            """New values [B, n, ...] of the loop's rows, from position `at` on."""
            new = new.swapaxes(0, 1).reshape(new.shape[1], x.shape[1], local, *x.shape[3:])
            return jax.lax.dynamic_update_slice(x, new.astype(x.dtype), (at,) + (0,) * (x.ndim - 1))

        names = "token", "logp_BT", "topk_BTK", "topk_logp_BTK"
        written = scoring.Written(*(in_block(rows.out[name]) for name in names))
        position_BR = rows.length_B[:, None] + begin + jnp.arange(self.block)[None]
        rope = attention.rope_tables(self.teacher, position_BR)
        hidden_BRD, cache = kv.extend(
            self.teacher, self.params, written.token_BT, rope, state.cache, state.prompt + begin
        )
        predicting_BRD = jnp.concatenate([state.hidden_BD[:, None], hidden_BRD[:, :-1]], axis=1)
        found = self._compared(predicting_BRD, written, in_block(rows.out["mask"]))
        scores = jax.tree.map(lambda x, new: put(x, new, begin), scores, found)

        token_BT, mask_BT = front(rows.out["token"]), front(rows.out["mask"])
        segment_BT = segment(self.table, token_BT, mask_BT)
        so_far = jax.tree.map(front, scores.replace(targets=Targets()))
        certain_B, kept_B = releasing.certain(so_far, segment_BT, mask_BT, self.config, step=self.step)
        certain_B &= ~rows.done_B
        first_B = certain_B & (front(stops.certain_B)[:, 0] == 0)
        stopped_B = certain_B & ~state.audit_B

        def noted(x, new_B, where_B):
            return put(x, jnp.where(where_B, new_B, front(x)[:, 0])[:, None])

        stops = Stops(
            stopped_B=noted(stops.stopped_B, True, stopped_B),
            audit_B=stops.audit_B,
            certain_B=noted(stops.certain_B, rows.t, first_B),
            kept_B=noted(stops.kept_B, kept_B, first_B),
        )
        state = state.replace(hidden_BD=hidden_BRD[:, -1], cache=cache)
        return rows._replace(done_B=rows.done_B | stopped_B, judge=state, judged=(scores, stops))

    def _compared(self, hidden_BRD, written: scoring.Written, mask_BR=None) -> Scores:
        """The scores of a block."""
        head_VD = transformer.head(self.teacher, self.params)
        found = scoring.compared((self.teacher, head_VD), hidden_BRD, written, self.reading)
        if mask_BR is None:
            return found
        inside = jax.tree.map(lambda x: scoring.inside(mask_BR, x), found.replace(targets=Targets()))
        return inside.replace(targets=found.targets)


def sample_and_score(
    student: tuple[ModelConfig, dict], prompts, key, sampling: rollout.Sampling, judge: Judge
) -> Rollouts:
    """Samples as `rollout.sample` does, while the teacher scores and a rule ends rows.

    Args:
      student: (config, params).
      prompts: (tokens_QP, mask_QP), as `rollout.sample`'s.
      key: as `rollout.sample`'s.

    Returns:
      Rollouts with scores, as `scoring.score` gives them for these, and stops.
    """
    rollouts, (scores, stops) = rollout.sample_judged(*student, prompts, key, sampling, judge)
    return rollouts.replace(scores=scores, stops=jax.tree.map(lambda x: x[:, 0], stops))
