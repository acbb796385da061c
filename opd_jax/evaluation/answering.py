"""A model answers a benchmark: accuracy with its interval, pass@k, length, and a line a problem."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from opd_jax import data
from opd_jax.data.prompts import Conversation
from opd_jax.errors import UserError
from opd_jax.evaluation import estimates, rewards
from opd_jax.evaluation.answers import reference
from opd_jax.evaluation.grading import Grader, Task, Verdict
from opd_jax.evaluation.tasks import Benchmark, Problem
from opd_jax.evaluation.tasks import load as load_benchmark
from opd_jax.parallel import distributed, sharding
from opd_jax.progress import Progress, own

# What a grader can say, as numbers that processes exchange.
VERDICTS = (Verdict(True), *(Verdict(False, failed) for failed in ("", "time", "crash", "error")))
HELD_OUT = "heldout"  # the benchmark of a run's own held-out prompts
SHARED_FILE = "shared_prompts.jsonl"
FOLDER = "benchmarks"  # in a workdir: NAME-STEP.jsonl and NAME-STEP.json


@dataclasses.dataclass(frozen=True)
class ResponseSampler:
    """What writes responses and what reads them.

    Attributes:
      draw: draw(params, PromptBatch, number, Progress) -> (PromptBatch, Rollouts), a `run.draw.Draw`. Two
        models that draw with the same key differ by their parameters alone.
      batching: the shape of its batches.
      mesh, tokenizer, grader: the devices, the transformers tokenizer, and what grades.
    """

    draw: Callable
    batching: data.Batching
    mesh: jax.sharding.Mesh
    tokenizer: Any
    grader: Grader


@dataclasses.dataclass(frozen=True)
class RenderedBenchmark:
    """A benchmark as one model's prompts.

    Attributes:
      benchmark: the problems.
      prompts: the rendered problems, each once, in order.
    """

    benchmark: Benchmark
    prompts: list[data.Prompt]


def prepare(
    specs: Sequence[str],
    tokenizer: Any,
    config: Any,
    key: str = "eval.benchmark",
    heldout: Sequence[data.Prompt] = (),
) -> tuple[RenderedBenchmark, ...]:
    """Reads benchmarks and renders them with the data section's system prompt, turns and template.

    Args:
      heldout: a run's held-out prompts; those with an answer are the benchmark "heldout".

    Raises:
      UserError: as `benchmarks.load`, two have one name, a problem is longer than data.prompt_tokens, or no
        held-out prompt has an answer.
    """
    rendered_benchmarks = tuple(
        _held_out(heldout, key) if spec == HELD_OUT else _prepare(spec, tokenizer, config, key)
        for spec in specs
    )
    names = [rendered.benchmark.name for rendered in rendered_benchmarks]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{key}: {name} is there more than once, and results go by name; drop one")
    return rendered_benchmarks


def _held_out(heldout: Sequence[data.Prompt], key: str) -> RenderedBenchmark:
    prompts = [prompt for prompt in heldout if prompt.answer is not None]
    problems = tuple(
        Problem(p.question, p.text, reference(p.answer)) for p in heldout if p.answer is not None
    )
    if not prompts:
        raise UserError(
            f"{key}={HELD_OUT} needs held-out prompts with answers, and there are none; add `answer` to the"
            " run's data, or name a benchmark"
        )
    if len(prompts) < len(heldout):
        left = len(heldout) - len(prompts)
        logging.warning("%s=%s: %d of %d held-out prompts have no answer", key, HELD_OUT, left, len(heldout))
    return RenderedBenchmark(Benchmark(HELD_OUT, problems, 1), prompts)


def _prepare(spec: str, tokenizer: Any, config: Any, key: str) -> RenderedBenchmark:
    benchmark = load_benchmark(spec, key)
    conversations = [
        Conversation([{"role": "user", "content": problem.text}], problem.answer)
        for problem in benchmark.problems
    ]
    # A benchmark without some of its problems is another one, and has instructions of its own.
    section = config.copy_and_resolve_references()
    section.update({"over_long": "error", "instruction": ""})
    return RenderedBenchmark(benchmark, data.render(conversations, tokenizer, section, f"{key}={spec}: ")[0])


def shared_with_training(
    prompts: data.Prompts, rendered_benchmarks: Sequence[RenderedBenchmark]
) -> list[dict[str, Any]]:
    """The training prompts whose last message evaluation asks too, but for case, spaces and punctuation.

    Returns:
      One record a pair: evaluation ("heldout" or a benchmark's name), problem (its number there), question,
      train (the number among the training prompts), prompt (its text).
    """
    asked = {HELD_OUT: [prompt.question for prompt in prompts.heldout]}
    named = [rendered for rendered in rendered_benchmarks if rendered.benchmark.name != HELD_OUT]
    asked |= {e.benchmark.name: [problem.question for problem in e.benchmark.problems] for e in named}
    train = [prompt.question for prompt in prompts.train]
    return [
        {"evaluation": name, "problem": j, "question": texts[j], "train": i, "prompt": prompts.train[i].text}
        for name, texts in asked.items()
        for i, j in data.duplicates(train, texts)
    ]


def say_shared(shared: Sequence[dict[str, Any]]) -> str:
    """One line on what `shared_with_training` found."""
    names = dict.fromkeys(record["evaluation"] for record in shared)
    problems = {name: {r["problem"] for r in shared if r["evaluation"] == name} for name in names}
    counts = (f"{len(numbers)} in {name}" for name, numbers in problems.items())
    return (
        f"training prompts are evaluated on too, but for case and punctuation: {', '.join(counts)}"
        f" (such as {shared[0]['question'][:60]!r}); remove them from the training data"
    )


def write_shared(folder: str | Path, shared: Sequence[dict[str, Any]]) -> None:
    """Writes FOLDER/shared_prompts.jsonl, a line a pair; no file where there is none."""
    file = Path(folder) / SHARED_FILE
    lines = "".join(json.dumps(record) + "\n" for record in shared)
    if shared:
        distributed.by_first(lambda: file.write_text(lines, encoding="utf-8"), str(file))


def answer(
    rendered: RenderedBenchmark,
    response_sampler: ResponseSampler,
    params: dict,
    samples: int,
    progress: Progress | None = None,
    piece: str = "benchmark",
) -> dict:
    """Samples `samples` responses to every problem and grades them; call it in every process.

    Args:
      progress: shows what goes on; the benchmark has its own if not given.
      piece: the name of this work in the plan of `progress`.

    Returns:
      accuracy (avg@samples) with accuracy_low and accuracy_high, its 95% bootstrap interval over problems;
      pass_2, pass_4, ... and pass_SAMPLES; response_length, tokens; finished_share; ungraded, the number of
      responses that could not be graded within the limits and count as wrong; problems, samples; seconds;
      and rows, one dict a problem.
    """
    with own(progress) as shown, shown.work(piece, f"benchmark {rendered.benchmark.name}"):
        return _answer(rendered, response_sampler, params, samples, shown)


def _answer(
    rendered: RenderedBenchmark,
    response_sampler: ResponseSampler,
    params: dict,
    samples: int,
    shown: Progress,
) -> dict:
    started = time.perf_counter()
    name = rendered.benchmark.name
    repeated = [prompt for prompt in rendered.prompts for _ in range(samples)]
    columns = []
    mesh, tokenizer = response_sampler.mesh, response_sampler.tokenizer
    batching = response_sampler.batching.fitting(mesh, len(repeated))
    parts = -(-len(repeated) // batching.batch)
    with shown.phase(f"benchmark {name}: sampling, batch", parts=parts):
        for number, local in enumerate(data.heldout_batches(repeated, batching)):
            shown.at(number + 1)
            batch, rollouts = response_sampler.draw(params, local, number, shown)
            written = rollouts.tokens_BL, rollouts.mask_BT, rollouts.finished_B
            columns.append(sharding.gather(mesh, (batch.valid_B, *written)))
    valid_B, tokens_BL, mask_BT, finished_B = (np.concatenate(x) for x in zip(*columns, strict=True))
    response_BT = tokens_BL[:, -mask_BT.shape[1] :]
    begun = [rewards.thought_begun(tokenizer, prompt.ids) for prompt in repeated]
    texts = [
        tokenizer.decode(row_T[on_T], skip_special_tokens=True)
        for row_T, on_T in zip(response_BT[valid_B], mask_BT[valid_B], strict=True)
    ]
    problems = [problem for problem in rendered.benchmark.problems for _ in range(samples)]
    tasks = [
        Task(tag + text, problem.answer, problem.generator)
        for tag, text, problem in zip(begun, texts, problems, strict=True)
    ]
    with shown.phase(f"benchmark {name}: grading response", parts=len(tasks)):
        verdicts = _grade(response_sampler.grader, tasks, shown.at)
    shape = len(rendered.prompts), samples
    right_NS = np.array([verdict.right for verdict in verdicts]).reshape(shape)
    failed_NS = np.array([verdict.failed for verdict in verdicts]).reshape(shape)
    tokens_NS = mask_BT[valid_B].sum(axis=1).reshape(shape)
    finished_NS = finished_B[valid_B].reshape(shape)
    right_N = right_NS.sum(axis=1)
    low, high = estimates.bootstrap_ratio(right_N, np.full(len(right_N), samples))
    powers = {2**n for n in range(1, int(math.log2(samples)) + 1)}
    passes = {
        f"pass_{k}": float(np.mean([estimates.pass_at_k(samples, int(c), k) for c in right_N]))
        for k in sorted(powers | ({samples} if samples > 1 else set()))
    }
    rows = [
        {
            "problem": n,
            "text": problem.text,
            "answer": problem.answer,
            "right": right_NS[n].astype(int).tolist(),
            "tokens": tokens_NS[n].tolist(),
            "finished": finished_NS[n].tolist(),
            "failed": failed_NS[n].tolist(),
            "responses": texts[n * samples : (n + 1) * samples],
        }
        for n, problem in enumerate(rendered.benchmark.problems)
    ]
    return {
        "benchmark": rendered.benchmark.name,
        "accuracy": float(right_NS.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        **passes,
        "response_length": float(tokens_NS.mean()),
        "finished_share": float(finished_NS.mean()),
        "ungraded": int((failed_NS != "").sum()),
        "problems": shape[0],
        "samples": samples,
        "tokens": int(tokens_NS.sum()),
        "seconds": time.perf_counter() - started,
        "rows": rows,
    }


def _grade(
    grader: Grader, tasks: Sequence[Task], told: Callable[[int], None] = lambda number: None
) -> list[Verdict]:
    """Verdicts of all tasks, of which each process grades its share."""
    count = jax.process_count()
    mine = grader.grade(tasks[jax.process_index() :: count], lambda number: told(number * count))
    code_N = np.zeros(-(-len(tasks) // count), np.int32)
    code_N[: len(mine)] = [VERDICTS.index(verdict) for verdict in mine]
    return [VERDICTS[code] for code in distributed.gathered(code_N).T.reshape(-1)[: len(tasks)]]


def write(folder: str | Path, label: str | int, result: dict) -> Path:
    """Writes FOLDER/NAME-LABEL.jsonl, a line a problem, and the summary next to it; returns the former."""
    folder = Path(folder)
    path = folder / f"{result['benchmark']}-{label}.jsonl"

    def write_both():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in result["rows"]), encoding="utf-8")
        summary = {name: value for name, value in result.items() if name != "rows"}
        path.with_suffix(".json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")

    distributed.by_first(write_both, str(path))
    return path
