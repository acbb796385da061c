"""A pod on one machine: two processes of four devices give what one process of eight gives."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from opd_jax.models.files import hf
from opd_jax.parallel import distributed
from opd_jax.run.checkpoint import Checkpoints
from opd_jax.run.job import prepare
from opd_jax.train import train
from tests import tiny

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SIZES = {
    "train.steps": 2,
    "rollout.max_tokens": 6,
    "data.heldout": 3,
    "checkpoint.every": 100,
    "metrics.rollouts_every": 0,
    "data.prompt_tokens": 128,
    "eval.benchmark_every": 2,
    "eval.samples": 2,
}


@pytest.fixture(scope="module")
def sizes(models):
    """SIZES, and a benchmark of 5 problems with 2 responses each: 10 rows for batches of 8."""
    path = models / "pod_questions.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}?", "answer": "a"}) + "\n" for n in range(5)))
    return SIZES | {"eval.benchmark": (f"ours:{path}",)}


@pytest.fixture(scope="module")
def start(models, sizes, tmp_path_factory):
    """start(workdir, *arguments): launches two processes on the tiny pair; returns the Popen."""
    folder = tmp_path_factory.mktemp("pod")
    recipe = folder / "recipe.py"
    recipe.write_text(
        "from pathlib import Path\nfrom tests import tiny\n\n\ndef get_config():\n"
        f"    return tiny.config(Path({str(models)!r}), **{sizes!r})\n"
    )

    def start(workdir, *arguments):
        return subprocess.Popen(
            ["bash", "launch/local_pod.sh", "2", f"--config={recipe}", f"--workdir={workdir}", *arguments],
            cwd=ROOT,
            env=os.environ | {"PYTHON": sys.executable},
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture(scope="module")
def pod(start, tmp_path_factory):
    """The folder of a finished run of two processes."""
    workdir = tmp_path_factory.mktemp("runs") / "pod"
    process = start(workdir)
    errors = process.communicate(timeout=600)[1]
    assert process.returncode == 0, errors
    return workdir


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_metrics_and_state_of_two_processes_are_those_of_one(pod, models, sizes, tmp_path):
    job = prepare(tiny.config(models, **sizes))
    state = train(job, tmp_path)
    ours, theirs = records(pod), records(tmp_path)
    assert [(r["kind"], r["step"]) for r in ours] == [(r["kind"], r["step"]) for r in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        names = {"loss", "kl", "grad_norm", "response_tokens", "supervised_tokens", "response_length"}
        for name in names & other.keys():
            np.testing.assert_allclose(mine[name], other[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert [r["step"] for r in ours if r["kind"] == "benchmark"] == [0, 2]
    ours, theirs = ((folder / "benchmarks" / "ours-2.jsonl").read_text() for folder in (pod, tmp_path))
    assert ours == theirs
    assert json.loads((pod / "versions.json").read_text())["processes"] == 2

    # What two processes saved together comes back in one, cut another way.
    cube = prepare(tiny.config(models, **sizes, **{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}))
    with Checkpoints(pod, 2) as checkpoints:
        saved, position = checkpoints.restore(2, cube.abstract_state())
    assert position["step"] == 2
    assert saved.params["embedding"].sharding == cube.state_shardings.params["embedding"]
    for (path, a), b in zip(jax.tree.leaves_with_path(saved), jax.tree.leaves(state), strict=True):
        name = jax.tree_util.keystr(path)
        # Adam's step is the learning rate, 1e-3, whatever the size of a gradient near 0.
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4, err_msg=name)


def test_two_processes_export_one_folder_that_holds_the_checkpoint_bit_for_bit(pod, models, sizes, tmp_path):
    done = subprocess.run(
        ["bash", "launch/local_pod.sh", "2", "opd_jax.export", f"--workdir={pod}", f"--out={tmp_path}/out"],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the student of step 2") == 1
    with Checkpoints(pod, 2) as checkpoints:
        saved = checkpoints.restore(2, prepare(tiny.config(models, **sizes)).abstract_state())[0]
    jax.tree.map(np.testing.assert_array_equal, hf.load(tmp_path / "out")[1], saved.params)


def test_two_processes_told_to_stop_save_one_step_and_ask_to_be_started_again(start, tmp_path):
    process = start(tmp_path, "--config.train.steps=5000", "--config.eval.every=0")
    try:
        while not (tmp_path / "metrics.jsonl").exists() or not records(tmp_path):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=300)[1]
    finally:
        process.kill()
    assert process.returncode == distributed.PREEMPTED, errors
    last = records(tmp_path)[-1]["step"]
    assert f"told to stop after step {last}" in errors
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.latest == last < 5000


# What is saved has a step far from the number of looks that either run has taken.
TOLD_BETWEEN = """
import os, signal, sys, time
import jax, numpy
from opd_jax.parallel import distributed, sharding
from opd_jax.run.checkpoint import Checkpoints
from opd_jax.distill import TrainState

distributed.initialize()
mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
one = jax.device_put(numpy.int32(1), sharding.replicated(mesh))
for run in range(2):
    with distributed.Preemption() as preemption:
        stops = []
        for _ in range(3):
            stops.append(preemption.reached())
            distributed.gathered([0])
        with Checkpoints(sys.argv[1], 1) as checkpoints:
            checkpoints.save(1000 * (run + 1), TrainState(one, {"w": one}, {"m": one}), {"step": 0}, None)
    if run == 0 and jax.process_index() == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(3)  # the notice travels on a thread of its own
print(stops)
"""


def test_a_notice_between_two_runs_of_a_sweep_stops_the_second_at_its_first_step(tmp_path):
    (tmp_path / "told_between.py").write_text(TOLD_BETWEEN)
    done = subprocess.run(
        ["bash", "launch/local_pod.sh", "2", "told_between", str(tmp_path / "run")],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "[True, False, False]" in done.stdout


# Process 0's transcripts go to a disk that is full, from the second step on.
FULL_DISK = """
import os, runpy, sys
from opd_jax.run.metrics import MetricWriter

write_rollouts = MetricWriter.write_rollouts
def on_a_full_disk(self, rollouts):
    if self.active and rollouts[0]["step"] == 2:
        os.dup2(os.open("/dev/full", os.O_WRONLY), self._files["rollouts.jsonl"].fileno())
    write_rollouts(self, rollouts)
MetricWriter.write_rollouts = on_a_full_disk
sys.argv[0] = "train"
runpy.run_module("opd_jax.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("save_every", [0, 100])
def test_a_disk_that_is_full_in_process_0_ends_every_process_in_one_line(models, sizes, tmp_path, save_every):
    (tmp_path / "full_disk.py").write_text(FULL_DISK)
    (tmp_path / "recipe.py").write_text(
        "from pathlib import Path\nfrom tests import tiny\n\n\ndef get_config():\n"
        f"    return tiny.config(Path({str(models)!r}), **{sizes!r})\n"
    )
    changes = "train.steps=500 eval.every=0 eval.benchmark_every=1000 metrics.rollouts_every=2"
    changes += f" checkpoint.every={save_every}"
    words = [f"--config={tmp_path / 'recipe.py'}", f"--workdir={tmp_path / 'run'}"]
    words += [f"--config.{change}" for change in changes.split()]
    # After GRACE the script would kill a process that is left waiting.
    environment = {"PYTHON": sys.executable, "PYTHONPATH": f"{ROOT}:{tmp_path}", "GRACE": "600"}
    with (tmp_path / "said").open("w") as said:
        done = subprocess.run(
            ["bash", "launch/local_pod.sh", "2", "full_disk", *words],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=said,
            stderr=said,
            timeout=300,
        )
    text = (tmp_path / "said").read_text()
    assert done.returncode == 2, text
    assert "rollouts.jsonl can't be written (No space left on device)" in text
    assert "Traceback" not in text
    assert len([line for line in text.splitlines() if line.startswith("error: ")]) == 1


def test_a_process_that_fails_is_named_and_ends_the_others(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text(
        "import os, sys, time\n"
        "if os.environ['JAX_PROCESS_ID'] == '1':\n    sys.exit('no weights here')\n"
        "time.sleep(600)\n"
    )
    done = subprocess.run(
        ["bash", "launch/local_pod.sh", "2", "broken"],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(tmp_path), "GRACE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "process 1 ended with status 1" in done.stderr
    assert "[1] no weights here" in done.stderr
