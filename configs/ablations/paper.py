"""The table of the paper (arXiv 2605.13643): students of 1.7B, 4B and 8B, full supervision against the rule.

The part of --config after the colon is a folder that every worker sees, here /shared. It holds
- models/: Qwen3-1.7B, Qwen3-4B, Qwen3-8B and the teacher, Qwen3-30B-A3B-Instruct-2507;
- data/: deepmath-*.parquet (DeepMath-103K);
- benchmarks/: aime25.jsonl, hmmt25_feb.jsonl, hmmt25_nov.jsonl, math500.jsonl, minerva.jsonl and gpqa.csv
  (columns: docs/evaluation.md).

    python -m opd_jax.sweep --config=configs/ablations/paper.py:/shared --out=/shared/runs/paper \
      --jobs=runs/paper --settings=launch/settings.sh
    SETTINGS=runs/paper/1.7B-release-seed-0.sh launch/tpu.sh run        # and so on, one slice a run
    python -m opd_jax.sweep --config=configs/ablations/paper.py:/shared --out=/shared/runs/paper --teacher
    python -m opd_jax.sweep --config=configs/ablations/paper.py:/shared --out=/shared/runs/paper --table

Run the command with --teacher on every worker of a slice: the teacher answers the benchmarks, once. The last
command makes the table. Its rows are the columns of the paper's table: the start of each student ("base"),
its arms, and the teacher. "mean" is over the five in-domain benchmarks. The paper's means, in per cent:

              base   full   release   controls of 1.7B: best fixed prefix 39.4, shuffled 38.0,
    1.7B      24.9   36.8   40.1      std of the advantage 38.8
    4B        32.5   51.6   53.9
    8B        33.8   54.7   55.2      teacher 62.2

Cost: 12 runs of 100 steps, 1.59, 2.22 or 2.66 v5p chip-hours a step (1.7B, 4B, 8B; docs/preflight.md): 2200
chip-hours, predicted for responses of full length, without the evaluations.

This table has not been run.
- Sizes, the int8 teacher and the int8 cache are those of configs/paper.py. Its programs are compiled for v5p
  and v6e slices (docs/preflight.md; for the larger students see paper_4b.py and paper_8b.py). For bfloat16
  add --config.teacher.weights=float --config.rollout.cache_dtype=auto.
- We do not know the paper's learning rate, instruction and number of responses a problem. Here the rate is
  the default, the instruction is that of the benchmarks, and 8 responses are averaged.
- Students answer without thinking. If their chat template then renders something that the teacher's does not,
  the run stops and says so. In that case put the student's chat_template into the teacher's folder.
- For a dense teacher set --config.teacher.path.
"""

from pathlib import PurePath

from ml_collections import ConfigDict

from opd_jax import config
from opd_jax.evaluation import BOXED

SEEDS = (0,)
STUDENTS = ("1.7B", "4B", "8B")
BENCHMARKS = ("aime25", "hmmt25_feb", "hmmt25_nov", "math500", "minerva")
MEAN = BENCHMARKS  # the paper's in-domain benchmarks, so without GPQA


def get_config(shared="/shared"):
    """The config that all arms share; student.path is the first arm's."""
    c = config.load("paper")
    c.student.path = f"{shared}/models/Qwen3-1.7B"
    c.teacher.path = f"{shared}/models/Qwen3-30B-A3B-Instruct-2507"
    c.data.source = "deepmath"
    c.data.path = f"{shared}/data/deepmath-*.parquet"
    c.data.instruction = BOXED
    c.data.template = '{"enable_thinking": false}'
    c.data.over_long = "drop"
    c.train.steps = 100
    c.eval.every = 50
    c.eval.benchmark = (
        *(f"{name}:{shared}/benchmarks/{name}.jsonl" for name in BENCHMARKS),
        f"gpqa:{shared}/benchmarks/gpqa.csv",
    )
    c.eval.benchmark_every = 100
    c.eval.samples = 8
    c.checkpoint.every = 10
    return c


def arms(config: ConfigDict) -> dict[str, dict]:
    """Each student with and without the rule; for the smallest one also the controls."""
    models = PurePath(config.student.path).parent
    both = {"full": {"release.rule": "none"}, "release": {"release.rule": "paper"}}
    rules: dict[str, dict[str, dict]] = {size: dict(both) for size in STUDENTS}
    for tokens in (1024, 2048, 4096, 8192):
        rules["1.7B"][f"prefix_{tokens}"] = {"release.rule": "prefix", "release.prefix_tokens": tokens}
    for rule in ("shuffled", "advantage_std"):
        rules["1.7B"][rule] = {"release.rule": rule}
    return {
        f"{size}-{name}": {"student.path": f"{models}/Qwen3-{size}"} | overrides
        for size, named in rules.items()
        for name, overrides in named.items()
    }


def against(arm):
    """The arm that `arm` is compared with: full supervision of the same student."""
    return f"{arm.partition('-')[0]}-full"
