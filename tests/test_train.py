"""The loop: what a run leaves behind, that a kill changes nothing, and that no transfer hides in it."""

import copy
import dataclasses
import io
import itertools
import json
import re
import signal
import subprocess
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from opd_jax.errors import UserError
from opd_jax.parallel import distributed, sharding
from opd_jax.progress.progress import Progress
from opd_jax.run.checkpoint import Checkpoints
from opd_jax.run.job import Job, prepare
from opd_jax.train import train, work
from tests import tiny


@pytest.fixture(scope="module")
def job(models):
    return prepare(tiny.config(models, **{"train.steps": 5}))


@pytest.fixture(scope="module")
def finished(job, tmp_path_factory):
    """(workdir, final state) of an uninterrupted run of 5 steps."""
    workdir = tmp_path_factory.mktemp("finished")
    return workdir, train(job, workdir)


def quiet(config):
    """A progress that has planned a run, shown nowhere."""
    progress = Progress(io.StringIO(), active=True, thread=False)
    progress.plan(work(config))
    return progress


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_step_is_recorded_once_and_evaluations_at_start_interval_and_end(finished):
    records = lines(finished[0] / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3, 4, 5]
    assert [r["step"] for r in records if r["kind"] == "eval"] == [0, 2, 4, 5]


def test_a_training_line_has_what_the_report_reads(finished):
    last = lines(finished[0] / "metrics.jsonl")[-2]
    assert last["kind"] == "train"
    assert np.isfinite([last[k] for k in ("loss", "kl", "grad_norm", "tokens_per_second")]).all()
    assert {"seconds_sample", "seconds_train", "seconds_data", "seconds_step"} <= last.keys()
    assert sum(last["position_tokens"]) == last["response_tokens"]


def test_a_run_does_what_was_planned_and_tells_each_phase(job, tmp_path, monkeypatch):
    told, doing = [], []
    phase, device = Progress._phase, Progress.device

    def noted_phase(self, label, *arguments, **options):
        told.append(label)
        return phase(self, label, *arguments, **options)

    def noted_device(self, label, *kind):
        doing.append(label)
        device(self, label, *kind)

    monkeypatch.setattr(Progress, "_phase", noted_phase)
    monkeypatch.setattr(Progress, "device", noted_device)
    progress = quiet(job.config)
    assert work(job.config) == {"step": 5, "evaluation": 4}
    train(job, tmp_path, progress=progress)
    assert not any(pieces.left for pieces in progress._plan.pieces.values())
    evaluation = "evaluating on 6 held-out prompts, batch"
    assert told == [
        "reading the student's weights",
        "reading the teacher's weights",
        *(evaluation, "compiling the sampler", "compiling the divergence"),
        "compiling the training step",
        *(evaluation, "saving step 2"),
        *(evaluation, "saving step 4"),
        *(evaluation, "saving step 5"),
        "writing what is left of the checkpoint",
    ]
    phases = "sampling", "scoring and updating"
    assert [label for label in doing if label] == [f"step {n}/5: {p}" for n in range(1, 6) for p in phases]


def undocumented(record: dict) -> set[str]:
    """Fields of a line of metrics.jsonl that docs/metrics.md does not name."""
    page = Path(__file__).parents[1] / "docs" / "metrics.md"
    return record.keys() - set(re.findall(r"`(\w+)`", page.read_text())) - {"kind", "step"}


def test_every_field_of_a_run_is_documented(finished):
    records = lines(finished[0] / "metrics.jsonl")
    assert not undocumented(records[0]), "of an evaluation"
    assert not undocumented(records[1]), "of a step"


def test_a_run_leaves_its_rollouts_answers_config_and_versions(finished, job):
    workdir = finished[0]
    assert {r["step"] for r in lines(workdir / "rollouts.jsonl")} == {1, 2, 4, 5}
    answers = lines(workdir / "evaluations.jsonl")
    assert {a["step"] for a in answers} == {0, 2, 4, 5}
    assert len(answers) == 4 * job.config.data.heldout
    assert json.loads((workdir / "config.json").read_text())["train"]["micro_batch"] == 8
    assert json.loads((workdir / "versions.json").read_text())["jax"] == jax.__version__


def test_training_moves_the_student_towards_its_teacher(finished):
    kl = [r["kl"] for r in lines(finished[0] / "metrics.jsonl") if r["kind"] == "eval"]
    assert kl[-1] < kl[0]


def test_the_final_checkpoint_is_the_final_state(finished, job):
    workdir, state = finished
    with Checkpoints(workdir, 2) as checkpoints:
        assert checkpoints.latest == 5
        saved, _ = checkpoints.restore(5, job.abstract_state())
    jax.tree.map(np.testing.assert_array_equal, saved, state)


def test_moments_in_the_hosts_memory_change_nothing_and_the_run_goes_on_with_them_on_the_device(
    finished, models, tmp_path
):
    def moments(state):
        return [x for x in jax.tree.leaves(state.opt_state) if x.ndim]

    settings = {"train.steps": 3, "optimizer.memory": "host"}
    state = train(prepare(tiny.config(models, **settings)), tmp_path)
    assert {x.sharding.memory_kind for x in moments(state)} == {"pinned_host"}
    state = train(prepare(tiny.config(models, **{"train.steps": 5})), tmp_path)
    assert {x.sharding.memory_kind for x in moments(state)} == {"device"}
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, atol=1e-6), state, finished[1])


def test_a_transfer_planted_in_the_loop_is_caught(finished, job, tmp_path):
    """To the device: on CPU JAX guards no transfer to the host, where float(loss) reads the same memory."""

    class Planted(Job):
        @property
        def sample_group(self):
            return lambda params, tokens_BP, mask_BP, *rest: job.sample_group(
                params, tokens_BP, np.ones(mask_BP.shape, bool), *rest
            )

    planted = Planted(**{field.name: getattr(job, field.name) for field in dataclasses.fields(job)})
    planted.__dict__["train_step"] = job.train_step  # compiled already
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        train(planted, tmp_path)


@pytest.mark.parametrize("platform", ["cuda", "tpu", "gup"])
def test_a_platform_that_is_not_there_is_one_line(models, tmp_path, platform):
    """CUDA's plugin raises an AssertionError without a word, the others a RuntimeError."""
    config = Path(__file__).parents[1] / "configs" / "demo.py"
    done = tiny.entry(
        "opd_jax.train",
        f"--config={config}",
        f"--workdir={tmp_path}",
        env={"JAX_PLATFORMS": platform, "PYTHONPATH": ""},
    )
    assert done.returncode == 2
    *others, last = done.stderr.splitlines()
    assert last.startswith(f"error: JAX_PLATFORMS={platform}: JAX finds no such device here (")
    assert platform == "tpu" or not others  # the TPU's library says more, where it is installed
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("step", [3, 4])
def test_a_run_told_to_stop_saves_at_once_and_ends_as_if_nothing_had_happened(finished, job, tmp_path, step):
    """Step 4 is to be evaluated, which waits until the run goes on."""
    told = tiny.told_to_stop(job, step)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        train(told, tmp_path)
    assert ended.value.code == distributed.PREEMPTED
    assert signal.getsignal(signal.SIGTERM) is before
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.latest == step
    assert [r["step"] for r in lines(tmp_path / "metrics.jsonl") if r["kind"] == "eval"] == [0, 2]

    progress = quiet(job.config)
    state = train(job, tmp_path, progress=progress)
    assert not any(pieces.left for pieces in progress._plan.pieces.values()), "what is left of the plan"
    jax.tree.map(np.testing.assert_array_equal, state, finished[1])
    again, whole = (
        [(r["kind"], r["step"], r["kl"]) for r in lines(folder / "metrics.jsonl")]
        for folder in (tmp_path, finished[0])
    )
    assert again == whole


def test_segments_cut_by_nltk_on_the_host_train_as_those_cut_on_device(models, tmp_path):
    """To the last bit, on eight devices, the step compiled as a user's is."""
    short = {"train.steps": 2, "eval.every": 0, "checkpoint.every": 0}
    for kind in ("punkt", "nltk"):
        job = prepare(tiny.config(models, **short, **{"segments.kind": kind}))
        job.__dict__["train_step"] = optimised(job.train_step)
        train(job, tmp_path / kind)
    assert len(losses(tmp_path / "punkt")) == 2
    assert losses(tmp_path / "nltk") == losses(tmp_path / "punkt")


def optimised(program):
    """The program as a user's process compiles it."""
    compiled = []

    def run(*arguments):
        if not compiled:
            compiled.append(program.lower(*arguments).compile(compiler_options=tiny.OPTIMISED))
        return compiled[0](*arguments)

    return run


def test_prompt_buckets_change_no_loss_and_compile_each_program_once_a_width(models, tmp_path, monkeypatch):
    texts = [f"What is {n}?" for n in range(22)] + ["What is one and one, then?"] * 2
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    settings = {"data.path": str(tmp_path / "prompts.jsonl"), "data.heldout": 0, "eval.every": 0}
    job = prepare(tiny.config(models, **settings | {"train.steps": 3, "checkpoint.every": 0}))
    train(job, tmp_path / "plain")
    bucketed = dataclasses.replace(job, config=copy.deepcopy(job.config))
    bucketed.config.data.prompt_buckets = (26,)
    bucketed.__dict__["train_step"] = job.train_step

    widths, put_batch = [], sharding.put_batch

    def noted(mesh, local):
        widths.append(local.tokens_BP.shape[1])
        return put_batch(mesh, local)

    monkeypatch.setattr("opd_jax.train.sharding.put_batch", noted)
    programs = job.sample_group, job.train_step
    before = [program._cache_size() for program in programs]
    train(bucketed, tmp_path / "bucketed")
    assert sorted(set(widths)) == [26, 48]  # 48 is compiled already
    assert [program._cache_size() - count for program, count in zip(programs, before)] == [1, 1]
    np.testing.assert_allclose(losses(tmp_path / "bucketed"), losses(tmp_path / "plain"), rtol=1e-4)


def test_gradient_noise_and_grades_are_recorded_and_change_no_step(models, tmp_path):
    prompts = [{"prompt": f"What is {n}?"} | ({"answer": "123456"} if n % 2 else {}) for n in range(24)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    settings = {"data.path": str(tmp_path / "prompts.jsonl"), "data.heldout": 0, "eval.every": 0}
    settings |= {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "checkpoint.every": 0, "train.steps": 2}
    settings |= {"metrics.rollouts": 8}
    job = prepare(tiny.config(models, **settings))
    progress = quiet(job.config)
    train(job, tmp_path / "plain", progress=progress)
    assert not any(pieces.left for pieces in progress._plan.pieces.values()), "what is left of the plan"
    measuring = dataclasses.replace(job, config=copy.deepcopy(job.config))
    measuring.config.metrics.gradient_noise_every = 2
    train(measuring, tmp_path / "noise")
    assert losses(tmp_path / "noise") == losses(tmp_path / "plain")
    first, last = lines(tmp_path / "noise" / "metrics.jsonl")
    assert not any(key.startswith("gradient_") for key in first)
    np.testing.assert_allclose(last["gradient_norm_kept"], last["grad_norm"], rtol=1e-4)
    assert last["seconds_gradient_noise"] > 0
    assert not undocumented(last)
    shown = lines(tmp_path / "noise" / "rollouts.jsonl")
    odd = [int("".join(filter(str.isdigit, r["prompt"]))) % 2 for r in shown]
    assert [r["right"] for r in shown] == [False if n else None for n in odd]
    assert 0 < sum(odd) < len(odd) == 16


def test_a_start_that_fails_before_its_first_step_does_not_keep_the_workdir(models, tmp_path, finished):
    settings = {"train.steps": 5, "optimizer.learning_rate": 0.5}

    def fails(*_):
        raise RuntimeError("out of memory")

    wrong = prepare(tiny.config(models, **settings), tmp_path)
    wrong.__dict__["train_step"] = fails
    with pytest.raises(RuntimeError, match="out of memory"):
        train(wrong, tmp_path)
    assert [r["kind"] for r in lines(tmp_path / "metrics.jsonl")] == ["eval"]

    right = prepare(tiny.config(models, **{"train.steps": 5}), tmp_path)
    state = train(right, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, state, finished[1])
    assert losses(tmp_path) == losses(finished[0])
    assert [r["step"] for r in lines(tmp_path / "metrics.jsonl") if r["kind"] == "eval"] == [0, 2, 4, 5]
    with pytest.raises(UserError, match="holds a run with another config"):
        prepare(tiny.config(models, **settings), tmp_path)


def test_a_clock_that_goes_backwards_changes_no_record(models, job, tmp_path, finished, monkeypatch):
    """Within a run by a minute a look, and by a day between two starts."""
    now = itertools.count(time.time(), -60)
    monkeypatch.setattr(time, "time", lambda: next(now))
    train(prepare(tiny.config(models, **{"train.steps": 3, "metrics.tensorboard": True})), tmp_path)
    earlier = itertools.count(next(now) - 86_400, -60)
    monkeypatch.setattr(time, "time", lambda: next(earlier))
    progress = quiet(job.config)
    state = train(job, tmp_path, progress=progress)
    assert not any(pieces.left for pieces in progress._plan.pieces.values()), "what is left of the plan"
    jax.tree.map(np.testing.assert_array_equal, state, finished[1])
    assert losses(tmp_path) == losses(finished[0])
    records = lines(tmp_path / "metrics.jsonl")
    seconds = [r[key] for r in records for key in r if key.startswith(("seconds", "tokens_per_second"))]
    assert seconds and min(seconds) >= 0


LONG = {"train.steps": 40, "checkpoint.every": 5, "eval.every": 20}


def test_a_run_killed_and_started_again_ends_as_if_nothing_had_happened(models, tmp_path):
    """The whole run is of this process, with as many devices."""
    recipe, killed = tmp_path / "recipe.py", tmp_path / "killed"
    recipe.write_text(
        "from pathlib import Path\nfrom tests import tiny\n\n\ndef get_config():\n"
        f"    return tiny.config(Path({str(models)!r}), **{LONG!r})\n"
    )

    def run(**options):
        options["env"] = {"JAX_NUM_CPU_DEVICES": str(jax.device_count())}
        return tiny.entry("opd_jax.train", f"--config={recipe}", f"--workdir={killed}", **options)

    job = prepare(tiny.config(models, **LONG))
    state = train(job, tmp_path / "whole")
    process = run(start=subprocess.Popen, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_steps_past_a_checkpoint(killed, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run was over before it could be killed"
    reached = losses(killed)
    assert 5 < len(reached) < LONG["train.steps"]
    again = run()
    assert again.returncode == 0, again.stderr
    assert "step 1/" not in again.stderr, "it began anew"

    assert losses(killed) == losses(tmp_path / "whole")
    with Checkpoints(killed, 2) as checkpoints:
        saved, _ = checkpoints.restore(LONG["train.steps"], job.abstract_state())
    jax.tree.map(np.testing.assert_array_equal, saved, state)


def wait_for_steps_past_a_checkpoint(workdir, process):
    """Returns once a checkpoint is whole and a step after it is recorded."""
    for _ in range(20_000):
        saved = [int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()]
        if saved and len(losses(workdir)) > min(saved):
            return
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    raise AssertionError("no checkpoint appeared")


def losses(workdir):
    """(step, loss, kl) of every whole training line."""
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    records = [json.loads(line) for line in text.splitlines(True) if line.endswith("\n")]
    return [(r["step"], r["loss"], r["kl"]) for r in records if r["kind"] == "train"]
