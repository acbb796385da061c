"""What of the demo fits a time budget."""

import dataclasses

import pytest

from opd_jax.config import load
from opd_jax.demo import plan as demo_plan
from opd_jax.demo.plan import SHORT, SMALL, WHOLE, Measured
from tests import tiny

# Batches of 8 answers of 96 tokens to prompts of 128: a fast machine and one at a third of its speed.
FAST = Measured(sample=2.3, compare=1.5, compiling=10, batch=8, prompt_tokens=128, tokens=96)
SLOW = dataclasses.replace(FAST, sample=7, compare=6, compiling=20)


def seconds(plan) -> float:
    return sum(plan.seconds.values())


def test_a_fast_machine_makes_all_steps_and_a_slow_one_those_that_fit():
    assert demo_plan.fit(FAST, WHOLE, most=24, left=450).steps == 24
    slow = demo_plan.fit(SLOW, SHORT, most=24, left=400)
    assert demo_plan.FEWEST_STEPS <= slow.steps < 24
    assert seconds(slow) <= 400
    whole = demo_plan.fit(SLOW, SHORT, most=24, left=float("inf"))
    arms = [sum(plan.seconds[arm] for arm in ("full supervision", "release rule")) for plan in (slow, whole)]
    assert arms[0] + slow.more_seconds == pytest.approx(arms[1])


def test_no_time_at_all_still_tells_the_story_in_the_fewest_steps():
    assert demo_plan.fit(SLOW, SHORT, most=24, left=0).steps == demo_plan.FEWEST_STEPS
    assert demo_plan.fit(SLOW, SHORT, most=2, left=0).steps == 2
    assert demo_plan.choose_look(SLOW, left=0) == demo_plan.LOOKS[-1]


def test_more_time_never_makes_less():
    times = range(0, 3000, 50)
    steps = [demo_plan.fit(SLOW, WHOLE, most=24, left=left).steps for left in times]
    looks = [demo_plan.LOOKS.index(demo_plan.choose_look(SLOW, left)) for left in times]
    assert steps == sorted(steps) and looks == sorted(looks, reverse=True)
    assert steps[-1] == 24 and looks[-1] == 0


def test_sizes_follow_the_rate_of_the_machine_and_only_lower_those_of_the_config():
    config = load("demo")
    sizes = {"vocab_size": 49152, "width": 576, "heads": 9, "kv_heads": 3, "head_size": 64, "ffn": 1536}
    models = [tiny.STUDENT.replace(layers=layers, **sizes) for layers in (27, 30)]
    assert demo_plan.choose_sizes(*models, config, rate=450e9, left=470) == WHOLE
    assert demo_plan.choose_sizes(*models, config, rate=150e9, left=470) == SHORT
    assert demo_plan.choose_sizes(*models, config, rate=30e9, left=470) == SMALL
    assert demo_plan.choose_sizes(*models, config, rate=80e9, left=float("inf")) == WHOLE
    config.data.heldout = 2
    SHORT.apply(config)
    assert (config.data.heldout, config.data.prompt_tokens) == (2, SHORT.prompt_tokens)
    SMALL.apply(config)
    assert (config.rollout.batch, config.rollout.max_tokens, config.train.micro_batch) == (4, 64, 4)


def test_a_budget_counts_down_and_none_never_ends(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(demo_plan.time, "perf_counter", lambda: now[0])
    limited, unlimited = demo_plan.Budget(2), demo_plan.Budget(0)
    now[0] += 50
    assert (limited.spent, limited.left) == (50, 70)
    assert unlimited.left == float("inf")
