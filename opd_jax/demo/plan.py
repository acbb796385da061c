"""How much of the demo fits into a given time: sizes from a probe, steps from a measurement."""

import copy
import dataclasses
import time
from collections.abc import Mapping

from ml_collections import ConfigDict

from opd_jax.config import get
from opd_jax.models import ModelConfig
from opd_jax.preflight import costs

# Measured in runs of the demo on two cores.
STEP_PASSES = 2.6  # time of scoring and updating, relative to the comparison in an evaluation
OF_RATE = 0.55  # FLOP/s of a whole step, relative to the rate of a large product
FIRST_COMPILING = 20.0  # estimated seconds of compiling sampler and comparison, until it is measured
COMPILES = 2.5  # time of compiling both training steps, relative to sampler and comparison
OTHER_SECONDS = 20.0  # reading weights and prompts again, checkpoints, the report
REPORT_SECONDS = 5.0
FEWEST_STEPS = 3


# Config keys of the sizes.
KEYS = {
    "data.heldout": "heldout",
    "data.prompt_tokens": "prompt_tokens",
    "rollout.batch": "batch",
    "rollout.max_tokens": "tokens",
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Upper bounds for the sizes that cost time.

    Attributes:
      heldout: prompts answered before and after training.
      prompt_tokens: the longest prompt.
      batch: answers per step.
      tokens: the longest answer.
      answers, answer_tokens: number and length of the long answers for which time is reserved.
    """

    heldout: int
    prompt_tokens: int
    batch: int
    tokens: int
    answers: int
    answer_tokens: int

    def apply(self, config: ConfigDict) -> dict[str, tuple[int, int]]:
        """Lowers a config's sizes to these, in place; returns key -> (old value, new value)."""
        changed = {}
        for key, name in KEYS.items():
            before = get(config, key)
            if before > getattr(self, name):
                changed[key] = before, getattr(self, name)
        config.update_from_flattened_dict({key: now for key, (_, now) in changed.items()})
        config.train.micro_batch = min(config.train.micro_batch, config.rollout.batch)
        return changed


WHOLE = Sizes(heldout=24, prompt_tokens=128, batch=8, tokens=96, answers=8, answer_tokens=512)
SHORT = Sizes(heldout=16, prompt_tokens=64, batch=8, tokens=96, answers=8, answer_tokens=384)
SMALL = Sizes(heldout=8, prompt_tokens=64, batch=4, tokens=64, answers=4, answer_tokens=256)
# Each of these gives way to the next one if fewer steps per arm than this fit: more steps with fewer tokens
# are more informative.
FEWEST_OF = {WHOLE: 10, SHORT: 5, SMALL: 0}
# (answers, tokens) of the long answers, the best first.
LOOKS = ((32, 640), (16, 640), (8, 640), (8, 512), (8, 384), (8, 256), (4, 256))


@dataclasses.dataclass(frozen=True)
class Measured:
    """How long a batch of held-out prompts took, and predictions from it.

    Attributes:
      sample: seconds to write a batch of answers.
      compare: seconds of both models' forward passes over the batch.
      compiling: additional seconds of the first batch.
      batch: answers in a batch.
      prompt_tokens, tokens: the longest prompt and the longest answer.
    """

    sample: float
    compare: float
    compiling: float
    batch: int
    prompt_tokens: int
    tokens: int

    @property
    def step(self) -> float:
        """Seconds of a training step."""
        return self.sample + STEP_PASSES * self.compare

    def evaluation(self, prompts: int) -> float:
        """Seconds of an evaluation on this number of prompts."""
        return -(-prompts // self.batch) * (self.sample + self.compare)

    def look(self, answers: int, answer_tokens: int) -> float:
        """Seconds to write and score long answers, including compilation."""
        rows = answers / self.batch
        # A decode step always reads all weights; the rest grows with the rows and the cache.
        sample = self.sample * answer_tokens / self.tokens * (0.6 + 0.6 * rows)
        length = (self.prompt_tokens + answer_tokens) / (self.prompt_tokens + self.tokens)
        return sample + self.compare * rows * length + 1.5 * self.compiling

    def fixed(self, sizes: Sizes) -> float:
        """Seconds of everything after the start's evaluation except the steps."""
        ends = 2 * self.evaluation(sizes.heldout)
        look = self.look(sizes.answers, sizes.answer_tokens)
        return ends + COMPILES * self.compiling + look + OTHER_SECONDS


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the demo will do.

    Attributes:
      steps: of each arm.
      most: steps of each arm if there were enough time.
      look: (answers, tokens) of the long answers, as predicted now.
      seconds: phase -> predicted seconds, in order.
      more_seconds: seconds that the other steps would take.
    """

    steps: int
    most: int
    look: tuple[int, int]
    seconds: Mapping[str, float]
    more_seconds: float


class Budget:
    """A time limit that starts now; 0 minutes set no limit."""

    def __init__(self, minutes: float):
        self.minutes = minutes
        self._started = time.perf_counter()

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._started

    @property
    def left(self) -> float:
        """Seconds left; infinite without a limit."""
        return self.minutes * 60 - self.spent if self.minutes else float("inf")


def choose_sizes(
    student: ModelConfig, teacher: ModelConfig, config: ConfigDict, rate: float, left: float
) -> Sizes:
    """The largest sizes at which enough steps fit.

    Args:
      config: its sizes are used if they are lower.
      rate: FLOP/s of a large matrix product.
      left: seconds.
    """
    for sizes, fewest in FEWEST_OF.items():
        c = copy.deepcopy(config)
        sizes.apply(c)
        shape = c.rollout.batch, c.data.prompt_tokens, c.rollout.max_tokens
        flops = costs.phase_flops(student, teacher, *shape)
        seconds = {name: value / (OF_RATE * rate) for name, value in flops.items()}
        expected = Measured(seconds["sample"], 2 * seconds["score"], FIRST_COMPILING, *shape)
        start = FIRST_COMPILING + expected.evaluation(c.data.heldout)
        if _room(expected, sizes, left - start) >= fewest:
            return sizes
    return SMALL


def fit(measured: Measured, sizes: Sizes, most: int, left: float) -> Plan:
    """The steps of an arm that fit into the seconds left after the start's evaluation, at most `most`."""
    steps = int(min(most, max(_room(measured, sizes, left), FEWEST_STEPS)))
    arm = COMPILES / 2 * measured.compiling + steps * measured.step + measured.evaluation(sizes.heldout)
    look = choose_look(measured, left - 2 * arm - OTHER_SECONDS)
    seconds = {
        "full supervision": arm,
        "release rule": arm,
        "long answers": measured.look(*look),
        "reading and writing": OTHER_SECONDS,
    }
    return Plan(steps, most, look, seconds, 2 * (most - steps) * measured.step)


def choose_look(measured: Measured, left: float) -> tuple[int, int]:
    """(answers, tokens) of the best long answers that fit, or the smallest ones."""
    return next((size for size in LOOKS if measured.look(*size) <= left), LOOKS[-1])


def _room(measured: Measured, sizes: Sizes, left: float) -> float:
    """Steps that fit for each of two arms."""
    return (left - measured.fixed(sizes)) / (2 * measured.step)
