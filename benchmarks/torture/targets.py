"""What the kill campaign kills: commands on the tiny models of the tests."""

import dataclasses
import json
import sys
from pathlib import Path

from tests import tiny

ROOT = Path(__file__).parents[2]
STEPS = 16
RECIPE = """\
from pathlib import Path
from tests import tiny


def get_config(arg=None):
    return tiny.config(Path({folder!r}), **{values!r})
"""
ABLATION = """

SEEDS = (0, 1)


def arms(config):
    return {'full': {'release.rule': 'none'}, 'half': {'release.rule': 'prefix'}}
"""
DEMO = """\
import sys
from pathlib import Path
from opd_jax.data.prompts import demo

demo.prepare(Path(sys.argv[1]))
"""


@dataclasses.dataclass(frozen=True)
class Target:
    """A command that is killed.

    Attributes:
      name: in the table.
      command: its words; {out} stands for the folder of its results.
      records: the first file that says that it has begun its work, in that folder; "" for none.
      processes: how many it starts.
      cold: it starts with an empty compilation cache.
      done: what it says if it is started again after it was done, and ends with a status.
    """

    name: str
    command: tuple[str, ...]
    records: str = ""
    processes: int = 1
    cold: bool = False
    done: str = ""


def write_inputs(folder: Path) -> None:
    """Writes models, prompts and recipes."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny.save_pair(folder)
    worked = folder / "worked.jsonl"
    with worked.open("w") as file:
        for n in range(30):
            ask = {"role": "user", "content": f"What is {n} squared?"}
            reply = {"role": "assistant", "content": f"It is {n * n}."}
            file.write(json.dumps({"messages": [ask, reply]}) + "\n")
    questions = folder / "questions.jsonl"
    questions.write_text('{"prompt": "1 + 1?", "answer": "2"}\n{"prompt": "2 + 2?", "answer": "4"}\n')
    train = {"train.steps": STEPS, "eval.every": 4, "checkpoint.every": 3, "metrics.rollouts_every": 2}
    asked = {"eval.benchmark": (f"ours:{questions}",), "eval.benchmark_every": 8, "data.prompt_tokens": 128}
    sft = {"teacher.path": "", "data.path": str(worked), "rollout.max_tokens": 24, "train.micro_batch": 8}
    recipes = {
        "train.py": train | asked,
        "sft.py": train | sft,
        "pod.py": train | {"train.steps": 8, "checkpoint.every": 2, "data.heldout": 3},
        "sweep.py": train | {"train.steps": 6, "checkpoint.every": 2},
    }
    for name, values in recipes.items():
        text = RECIPE.format(folder=str(folder), values=values)
        (folder / name).write_text(text + (ABLATION if name == "sweep.py" else ""))
    (folder / "demo_prompts.py").write_text(DEMO)


def targets(inputs: Path, whole: Path) -> list[Target]:
    """All targets; `whole` has the uninterrupted run of each by its name."""
    python = (sys.executable, "-m")
    pod = ("bash", str(ROOT / "launch" / "local_pod.sh"), "2")

    def command(module: str, recipe: str, flag: str = "--workdir") -> tuple[str, ...]:
        return (*python, module, f"--config={inputs / recipe}", f"{flag}={{out}}")

    export = (*python, "opd_jax.export", f"--workdir={whole / 'train'}", "--out={out}/model")
    return [
        Target("train", command("opd_jax.train", "train.py"), "metrics.jsonl"),
        Target("train-cold", command("opd_jax.train", "train.py"), "metrics.jsonl", cold=True),
        Target("sft", command("opd_jax.sft", "sft.py"), "metrics.jsonl"),
        Target("sweep", command("opd_jax.sweep", "sweep.py", "--out"), "full/seed-0/metrics.jsonl"),
        Target("export", export, done="exists and is not an empty folder"),
        Target("demo-prompts", (sys.executable, str(inputs / "demo_prompts.py"), "{out}")),
        Target("sorting-data", (*python, "studies.sorting", "--out={out}"), "worked.jsonl"),
        Target(
            "pod",
            (*pod, f"--config={inputs / 'pod.py'}", "--workdir={out}"),
            "metrics.jsonl",
            processes=2,
        ),
    ]
