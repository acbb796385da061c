"""Problems of reasoning-gym's generators, made in a process of their own.

Some generators draw from sets, whose order follows Python's hash seed. With a random one, a run that starts
again and every host of a pod would get other problems. So the seed of this process is fixed.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

from opd_jax.errors import UserError, nearest, reason

FIXED = {"PYTHONHASHSEED": "0"}  # also for the worker that grades their answers by number


def generator_environment() -> dict[str, str]:
    """The environment of a process that generates problems, or grades them."""
    root = str(Path(__file__).parents[3])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | FIXED | {"PYTHONPATH": os.pathsep.join(paths)}


def generate(task: str, size: int, seed: int, where: str) -> list[tuple[str, str]]:
    """(question, answer) pairs of a reasoning-gym generator; the same in every process on every machine.

    Raises:
      UserError: reasoning-gym is missing, has no such task, or the task needs settings.
    """
    command = [sys.executable, "-m", __name__, task, str(size), str(seed)]
    done = subprocess.run(command, env=generator_environment(), capture_output=True, text=True)
    try:
        found = json.loads(done.stdout)
    except ValueError as error:
        said = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise UserError(f"{where}: the generator of {task!r} ended early ({said[0]}); try again") from error
    if "missing" in found:
        raise UserError(f"{where}: the package reasoning-gym is missing; pip install reasoning-gym")
    if "known" in found:
        close = nearest(task, found["known"])
        raise UserError(f"{where}: reasoning-gym has no task {task!r}{close}; name one that it has")
    if "error" in found:
        raise UserError(
            f"{where}: reasoning-gym cannot generate {task!r} from a size and a seed ({found['error']}); name"
            " another task"
        )
    return [(question, answer) for question, answer in found["pairs"]]


def _found(task: str, size: int, seed: int) -> dict:
    """What `generate` reads: pairs, or why there are none."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        return {"missing": True}
    if task not in DATASETS:
        return {"known": sorted(DATASETS)}
    try:
        dataset = reasoning_gym.create_dataset(task, size=size, seed=seed)
        return {"pairs": [(item["question"], str(item["answer"] or "")) for item in dataset]}
    # Generators raise all kinds of errors: assertions if they need settings, import errors.
    except Exception as error:
        return {"error": reason(error)}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # a generator may print
        result = _found(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    print(json.dumps(result))
