"""The objectives by name: per-token losses, each declared with its own fields of the config.

An objective is one function of `Tokens` that returns a loss for each position. `@objective(name)` registers
it, and `objective.name = name` selects it. See docs/objectives.md.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from opd_jax import distill
from opd_jax.declare import PARAMETERS, Field, parameters
from opd_jax.distill import divergences


@struct.dataclass
class Tokens:
    """What an objective sees of a chunk of response positions.

    Attributes:
      logits_BTV: the student's, float32, with gradient; -inf at ids that do not exist.
      token_BT: ids of the response.
      old_logp_BT: the student's log-probability of them when they were scored.
      advantage_BT: A_t in nats, clipped and with the task reward mixed in.
      teacher_logits_BTV: the teacher's, for objectives that are registered with teacher="logits".
      teacher_top: TeacherTop, for objectives that are registered with teacher="top".
    """

    logits_BTV: jax.Array
    token_BT: jax.Array
    old_logp_BT: jax.Array
    advantage_BT: jax.Array
    teacher_logits_BTV: jax.Array | None = None
    teacher_top: Any = None


class Options:
    """Numbers that objectives read.

    Attributes:
      clip_ratio: train.clip_ratio, or None where each rollout gets one update.
      others: the fields of the config's `objective` section by their names, such as beta. One that is not
        given has its default. See docs/configs.md.
    """

    clip_ratio: float | None

    def __init__(self, clip_ratio: float | None = None, **values):
        for (section, _), fields in PARAMETERS.items():
            if section == "objective":
                self.__dict__ |= {name: field.default for name, field in fields.items()}
        self.__dict__ |= values | {"clip_ratio": clip_ratio}

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"objective.{name} is no field of the config")


def options(config) -> Options:
    """Options from the whole config."""
    several = config.train.updates_per_rollout > 1
    return Options(config.train.clip_ratio if several else None, **config.objective)


@dataclasses.dataclass(frozen=True)
class Objective:
    """A registered loss.

    Attributes:
      loss: (Tokens, Options) -> loss_BT in nats.
      teacher: what it needs of the teacher besides the scores: nothing, its logits, or its top tokens.
      advantage: whether it reads advantage_BT.
      writer: who writes the responses.
    """

    loss: Callable[[Tokens, Options], jax.Array]
    teacher: Literal["logits", "top"] | None = None
    advantage: bool = False
    writer: Literal["student", "teacher"] = "student"


OBJECTIVES: dict[str, Objective] = {}


def objective(
    name: str,
    *,
    teacher: Literal["logits", "top"] | None = None,
    advantage: bool = False,
    writer: Literal["student", "teacher"] = "student",
    **fields: Field,
) -> Callable:
    """Registers a function as the objective that `objective.name = name` selects.

    Args:
      teacher, advantage, writer: see `Objective`.
      fields: fields of the config that this objective alone reads, as `objective.FIELD` and `options.FIELD`.

    Raises:
      ValueError: another objective has such a field, or the name is that of an objective of this package.
    """

    def register(function):
        known = OBJECTIVES.get(name)
        if known and known.loss.__module__ == __name__ != function.__module__:
            raise ValueError(f"objective.name={name} is an objective of opd_jax; choose another name")
        parameters("objective", name, fields)
        OBJECTIVES[name] = Objective(function, teacher, advantage, writer)
        return function

    return register


@objective("policy_gradient", advantage=True)
def policy_gradient(tokens: Tokens, options: Options):
    """-A_t log S(y_t): the single-sample estimate of the reverse KL's gradient.

    With options.clip_ratio, for several updates on the same rollouts, it is
    -min(r A, clip(r, 1 - clip_ratio, 1 + clip_ratio) A) with r = S / S_old. At r = 1 its gradient is that of
    the first form.

    Source: arXiv 2605.13643; the clipped form is PPO's (Schulman et al. 2017, arXiv 1707.06347).
    """
    logp_BT = distill.scoring.token_logp(tokens.logits_BTV, tokens.token_BT)
    advantage_BT = jax.lax.stop_gradient(tokens.advantage_BT)
    if options.clip_ratio is None:
        return -advantage_BT * logp_BT
    ratio_BT = jnp.exp(logp_BT - tokens.old_logp_BT)
    clipped_BT = jnp.clip(ratio_BT, 1 - options.clip_ratio, 1 + options.clip_ratio)
    return -jnp.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT)


@objective("reverse_kl", teacher="logits")
def reverse_kl(tokens: Tokens, options: Options):
    """KL(S || T) over the vocabulary at each position. Source: Agarwal et al. 2024 (arXiv 2306.13649)."""
    return divergences.reverse_kl(tokens.logits_BTV, tokens.teacher_logits_BTV)


@objective("forward_kl", teacher="logits")
def forward_kl(tokens: Tokens, options: Options):
    """KL(T || S) over the vocabulary at each position. Source: Agarwal et al. 2024 (arXiv 2306.13649)."""
    return divergences.forward_kl(tokens.logits_BTV, tokens.teacher_logits_BTV)


@objective(
    "jsd",
    teacher="logits",
    beta=Field(
        0.5,
        """Weight of the teacher in the mixture M = beta T + (1 - beta) S. The loss is
        beta KL(T || M) + (1 - beta) KL(S || M). 0 is `forward_kl`; 1 is `reverse_kl`.""",
        least=0,
        most=1,
    ),
)
def jsd(tokens: Tokens, options: Options):
    """Generalised JSD, see `divergences.generalised_jsd`: beta 0 is the forward KL, 1 the reverse KL."""
    return divergences.generalised_jsd(tokens.logits_BTV, tokens.teacher_logits_BTV, options.beta)


@objective("sft", writer="teacher")
def sft(tokens: Tokens, options: Options):
    """-log S(y_t) on what the teacher wrote. Source: Kim & Rush 2016 (arXiv 1606.07947), from samples."""
    return -distill.scoring.token_logp(tokens.logits_BTV, tokens.token_BT)


@objective(
    "eopd",
    teacher="top",
    advantage=True,
    entropy_threshold=Field(
        0.8, "The forward KL is added where the teacher's entropy is above this many nats.", least=0
    ),
)
def eopd(tokens: Tokens, options: Options):
    """Policy gradient, plus the forward KL on the teacher's top tokens where its entropy is above tau.

    Source: EOPD (Jin et al. 2026, arXiv 2603.07079); the group of all other tokens is ours.
    """
    top = tokens.teacher_top
    kl_BT = divergences.grouped_forward_kl(tokens.logits_BTV, top.top_BTK, top.logp_BTK)
    uncertain_BT = top.entropy_BT > options.entropy_threshold
    return policy_gradient(tokens, options) + jnp.where(uncertain_BT, kl_BT, 0)


@objective("aopd", teacher="top", advantage=True)
def aopd(tokens: Tokens, options: Options):
    """Policy gradient where A_t > 0, the forward KL on the teacher's top tokens elsewhere.

    Source: AOPD (Jia et al. 2026, arXiv 2605.06387); the group of all other tokens is ours.
    """
    top = tokens.teacher_top
    kl_BT = divergences.grouped_forward_kl(tokens.logits_BTV, top.top_BTK, top.logp_BTK)
    return jnp.where(tokens.advantage_BT > 0, policy_gradient(tokens, options), kl_BT)
