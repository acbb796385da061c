"""The records of a run: what is written, what a resumed run keeps, and the phase clock."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from opd_jax.errors import UserError
from opd_jax.run import metrics
from tests import tiny


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train_line(step, **more):
    return {"kind": "train", "step": step, "loss": 0.5, "kl": 0.25, **more}


def test_numbers_arrays_and_lists_survive_the_jsonl(tmp_path):
    with tiny.writer(tmp_path) as out:
        out.write(
            train_line(
                np.int64(1),
                grad_norm=np.float32(0.5),
                release_histogram=np.arange(3),
                position_tokens=[1, 2.5],
                release_position=None,
            )
        )
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert line == train_line(
        1,
        grad_norm=0.5,
        release_histogram=[0, 1, 2],
        position_tokens=[1, 2.5],
        release_position=None,
    )


def test_line_is_on_disk_before_the_writer_is_closed(tmp_path):
    with tiny.writer(tmp_path) as out:
        out.write(train_line(1))
        out.write_rollouts([{"step": 1, "prompt": "é"}])
        assert len(lines(tmp_path / "metrics.jsonl")) == len(lines(tmp_path / "rollouts.jsonl")) == 1


def test_number_that_is_not_finite_is_null_and_the_line_stays_strict_json(tmp_path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    with tiny.writer(tmp_path) as out:
        out.write(train_line(1, gain=float("nan"), release_histogram=np.array([np.inf, 1.0])))
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=refuse)
    assert (line["gain"], line["release_histogram"]) == (None, [None, 1.0])


def test_resumed_run_has_every_step_once(tmp_path):
    with tiny.writer(tmp_path) as out:
        for step in range(1, 8):
            out.write(train_line(step, loss=1.0))
            out.write_rollouts([{"step": step}])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # a kill in the middle of a line
    with tiny.writer(tmp_path, resume_step=4) as out:
        for step in range(5, 10):
            out.write(train_line(step, loss=2.0))
            out.write_rollouts([{"step": step}])
    written = lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in written] == list(range(1, 10))
    assert [line["loss"] for line in written] == [1.0] * 4 + [2.0] * 5
    assert [line["step"] for line in lines(tmp_path / "rollouts.jsonl")] == list(range(1, 10))


def test_new_run_drops_what_an_attempt_without_a_checkpoint_left(tmp_path):
    for _ in range(2):
        with tiny.writer(tmp_path) as out:
            out.write({"kind": "eval", "step": 0, "kl": 1.0})
    assert len(lines(tmp_path / "metrics.jsonl")) == 1


def test_answers_whose_evaluation_was_cut_short_are_dropped_and_what_is_there_is_known(tmp_path):
    with tiny.writer(tmp_path) as out:
        out.write({"kind": "eval", "step": 2, "kl": 0.5})
        out.write_evaluations([{"step": 2, "prompt": 0}])
        out.write(train_line(4))
        out.write({"kind": "benchmark", "step": 4, "benchmark": "ours", "response_length": 3.0})
        out.write_evaluations([{"step": 4, "prompt": 0}])
    with tiny.writer(tmp_path, resume_step=4) as out:
        assert out.recorded == {("train", None), ("benchmark", "ours")}
        out.write_evaluations([{"step": 4, "prompt": 0}, {"step": 4, "prompt": 1}])
    rows = lines(tmp_path / "evaluations.jsonl")
    assert [(row["step"], row["prompt"]) for row in rows] == [(2, 0), (4, 0), (4, 1)]


def test_only_process_0_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    stream = io.StringIO()
    with tiny.writer(tmp_path / "run", tensorboard=True, stream=stream) as out:
        out.write(train_line(1))
        out.write_rollouts([{"step": 1}])
        out.say("told to stop")
        out.sync()
    metrics.write_run_files(tmp_path / "run", {"seed": 0})
    assert not (tmp_path / "run").exists()
    assert stream.getvalue() == ""


def test_sync_puts_every_record_on_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
    with tiny.writer(tmp_path) as out:
        out.sync()
    names = ("metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl")
    assert sorted(synced) == sorted(str(tmp_path / name) for name in names)


def test_a_full_disk_is_one_line(tmp_path):
    """/dev/full takes nothing, as a full disk; what is left in the buffer is written again when it closes."""
    with (
        open("/dev/full", "w") as full,
        pytest.raises(UserError, match=r"metrics.jsonl can't be written \(No space left on device\)"),
        tiny.writer(tmp_path) as out,
    ):
        os.dup2(full.fileno(), out._files["metrics.jsonl"].fileno())
        out.write(train_line(1))


def test_the_updates_skipped_before_a_restart_are_counted(tmp_path):
    with tiny.writer(tmp_path) as out:
        for step, skipped in enumerate((1.0, 0.0, 1.0, 1.0), 1):
            out.write(train_line(step, skipped_updates=skipped))
    with tiny.writer(tmp_path, resume_step=4) as out:
        assert out.skipped == 2
    with tiny.writer(tmp_path, resume_step=2) as out:
        assert out.skipped == 0


def test_a_folder_that_is_removed_meanwhile_ends_the_run_at_the_next_save(tmp_path):
    with tiny.writer(tmp_path / "run") as out:
        out.write(train_line(1))
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(UserError, match=r"metrics.jsonl was removed while the run was writing it"):
            out.sync()


def test_tensorboard_file_holds_the_scalars(tmp_path):
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    with tiny.writer(tmp_path, tensorboard=True) as out:
        out.write(train_line(3, release_histogram=[1, 2], release_position=None))
        out.write({"kind": "eval", "step": 3, "kl": 0.125})
    (file,) = (tmp_path / "tensorboard").iterdir()
    blob, found = file.read_bytes(), {}
    while blob:
        size = int.from_bytes(blob[:8], "little")
        body = blob[12 : 12 + size]
        assert int.from_bytes(blob[12 + size : 16 + size], "little") == masked_crc32c(body)
        event = Event.FromString(body)
        found |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
        blob = blob[16 + size :]
    assert found == {("train/loss", 3): 0.5, ("train/kl", 3): 0.25, ("eval/kl", 3): 0.125}


def test_wandb_is_imported_only_when_asked_for_and_missing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with tiny.writer(tmp_path):
        pass
    with (
        pytest.raises(UserError, match=r"metrics\.wandb.*pip install wandb"),
        tiny.writer(tmp_path, wandb="p"),
    ):
        pass


def test_wandb_without_a_key_is_one_line_before_anything_is_read(monkeypatch):
    nothing = types.SimpleNamespace(api=types.SimpleNamespace(api_key=None))
    monkeypatch.setitem(sys.modules, "wandb", nothing)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(UserError, match="no key here; run `wandb login`"):
        metrics.check_wandb()
    monkeypatch.setenv("WANDB_MODE", "offline")
    metrics.check_wandb()


def test_wandb_gets_the_scalars_and_a_resumed_run_keeps_its_id(tmp_path, monkeypatch):
    calls, logged = [], []

    def init(**options):
        calls.append(options)
        return types.SimpleNamespace(
            id=options["id"] or "abc123",
            log=logged.append,
            define_metric=lambda *args, **kwargs: None,
            finish=lambda: logged.append("finished"),
        )

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.setenv("WANDB_API_KEY", "key")
    for resume_step in (None, 1):
        with tiny.writer(tmp_path, wandb="p", resume_step=resume_step) as out:
            out.write(train_line((resume_step or 0) + 1))
    assert [call["id"] for call in calls] == [None, "abc123"]
    assert calls[0]["project"] == "p"
    assert logged[:2] == [{"train/loss": 0.5, "train/kl": 0.25, "step": 1}, "finished"]


def test_progress_without_a_terminal_is_a_plain_line_every_few_steps(tmp_path):
    stream = io.StringIO()
    with tiny.writer(tmp_path, total_steps=25, stream=stream) as out:
        for step in range(1, 26):
            out.write(train_line(step, tokens_per_second=1234.5))
        out.write({"kind": "eval", "step": 25, "kl": 0.1, "kl_low": 0.05, "kl_high": 0.2})
    shown = stream.getvalue().splitlines()
    assert [line.split()[1] for line in shown] == ["1/25", "10/25", "20/25", "25/25", "step"]
    assert "loss 0.5000  kl 0.2500  1,234 tok/s" in shown[1] and shown[1].endswith("left")
    assert shown[-1] == "eval  step 25  kl 0.1000  [0.0500, 0.2000]"


def test_progress_on_a_terminal_is_a_bar_with_loss_and_speed(tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with tiny.writer(tmp_path, total_steps=3, stream=stream) as out:
        for step in (1, 2, 3):
            out.write(train_line(step, tokens_per_second=50.0))
    assert "3/3" in stream.getvalue() and "loss 0.5000" in stream.getvalue()


def test_run_files_name_config_versions_and_devices(tmp_path):
    config = ml_collections.ConfigDict({"seed": 3, "mesh": {"data": -1}})
    metrics.write_run_files(tmp_path, config)
    assert json.loads((tmp_path / "config.json").read_text()) == config.to_dict()
    versions = json.loads((tmp_path / "versions.json").read_text())
    assert versions["jax"] == jax.__version__
    assert (versions["backend"], versions["devices"]) == ("cpu", 8)
    assert "git_commit" in versions


def test_the_commit_of_the_source_tree_is_recorded_with_whether_it_was_changed(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ("-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=tree, check=True, capture_output=True, text=True).stdout.strip()

    def recorded():
        metrics.write_run_files(tmp_path / "run", {"seed": 3})
        return json.loads((tmp_path / "run" / "versions.json").read_text())["git_commit"]

    tree = tmp_path / "tree"
    (tree / "opd_jax").mkdir(parents=True)
    source = tree / "opd_jax" / "metrics.py"
    source.write_text("one")
    monkeypatch.setattr(metrics, "__file__", str(source))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert recorded() is None  # no repository
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "One")
    assert recorded() == git("rev-parse", "HEAD") and len(recorded()) == 40
    source.write_text("two")
    assert recorded() == git("rev-parse", "HEAD") + "-dirty"


def base_config():
    return ml_collections.ConfigDict(
        {
            "train": {"steps": 10, "micro_batch": 2},
            "eval": {"every": 5},
            "rollout": {"batch": 8, "sizes": (1, 2)},
        }
    )


def decaying(steps, decay_steps=0, schedule="cosine"):
    config = base_config()
    config.train.steps = steps
    config.optimizer = {"schedule": schedule, "decay_steps": decay_steps}
    return config


def test_a_longer_run_does_not_bend_the_schedule_of_the_steps_done(tmp_path):
    metrics.write_run_files(tmp_path, decaying(10))
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    conflict = str(metrics.config_conflict(tmp_path, decaying(20)))
    assert "optimizer.decay_steps is 10 there and 20 here" in conflict
    assert metrics.config_conflict(tmp_path, decaying(20, decay_steps=10)) is None
    metrics.write_run_files(tmp_path, decaying(10, schedule="constant"))
    assert metrics.config_conflict(tmp_path, decaying(20, schedule="constant")) is None


def test_same_config_and_changed_length_are_no_conflict(tmp_path):
    assert metrics.config_conflict(tmp_path, base_config()) is None  # nothing there yet
    metrics.write_run_files(tmp_path, base_config())
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    changed = base_config()
    changed.train.steps, changed.eval.every = 20, 1
    changed.metrics = {"wandb": None}
    changed.mesh, changed.sharding, changed.train.micro_batch = {"data": 2}, {"student": "whole"}, 4
    assert metrics.config_conflict(tmp_path, base_config()) is None
    assert metrics.config_conflict(tmp_path, changed) is None


def test_first_other_key_is_named_with_both_values(tmp_path):
    metrics.write_run_files(tmp_path, base_config())
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    changed = base_config()
    changed.rollout.batch = 4
    conflict = metrics.config_conflict(tmp_path, changed)
    assert "rollout.batch is 8 there and 4 here" in str(conflict) and "\n" not in str(conflict)
    added = base_config()
    added.train.steps_more = 1  # begins like a free key, and is none
    assert "train.steps_more is not set there" in str(metrics.config_conflict(tmp_path, added))


@pytest.mark.parametrize("step", ["checkpoints/3", "damaged_checkpoints/3", "metrics.jsonl"])
def test_a_workdir_is_protected_once_it_has_a_step_and_not_by_a_start_that_failed(tmp_path, step):
    metrics.write_run_files(tmp_path, base_config())
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "metrics.jsonl").write_text('{"kind": "eval", "step": 0}\n{"kind": "tr')
    changed = base_config()
    changed.rollout.batch = 4
    assert metrics.config_conflict(tmp_path, changed) is None
    if step == "metrics.jsonl":
        with tiny.writer(tmp_path) as out:
            out.write(train_line(1))
    else:
        (tmp_path / step).mkdir(parents=True)
    assert "rollout.batch is 8 there and 4 here" in str(metrics.config_conflict(tmp_path, changed))


def test_files_of_a_run_that_cannot_be_written_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"config.json can't be written \(Not a directory|File exists"):
        metrics.write_run_files(tmp_path / "file", base_config())


def test_with_several_processes_a_full_disk_tells_all_to_stop_and_writes_nothing_more(tmp_path, monkeypatch):
    told = []
    with open("/dev/full", "w") as full, tiny.writer(tmp_path) as out:
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(metrics.os, "kill", lambda pid, number: told.append((pid, number)))
        os.dup2(full.fileno(), out._files["metrics.jsonl"].fileno())
        out.write(train_line(1))
        out.write_rollouts([{"step": 2}])
        with pytest.raises(UserError, match=r"metrics.jsonl can't be written \(No space left on device\)"):
            out.sync()
    assert told == [(os.getpid(), signal.SIGTERM)]
    assert (tmp_path / "rollouts.jsonl").read_text() == ""


@jax.jit
def busy(x_DD):
    return jax.lax.fori_loop(0, 60, lambda _, x: jnp.tanh(x @ x_DD), x_DD)


@pytest.fixture(scope="module")
def busy_input():
    x_DD = jnp.eye(400) * 0.5
    busy(x_DD).block_until_ready()
    return x_DD


def test_phases_of_a_step_add_up_to_its_wall_time_and_watch_does_not_wait(busy_input):
    with metrics.PhaseClock() as clock:
        start = time.perf_counter()
        first = busy(busy_input)
        clock.watch("sample", 1, first)
        second = busy(busy(first))
        clock.watch("train", 1, second)
        dispatched = time.perf_counter() - start
        second.block_until_ready()
        wall = time.perf_counter() - start
        seconds = clock.pop(1)
    assert set(seconds) == {"sample", "train"}
    assert dispatched < 0.5 * wall
    assert sum(seconds.values()) == pytest.approx(wall, rel=0.2, abs=0.005)
    assert seconds["train"] > seconds["sample"]  # it is twice the work


def test_gap_between_dispatches_is_not_counted(busy_input):
    with metrics.PhaseClock() as clock:
        clock.watch("a", 1, busy(busy_input).block_until_ready())
        time.sleep(0.3)
        clock.watch("b", 1, jnp.zeros(()).block_until_ready())
        assert clock.pop(1)["b"] < 0.1


def test_same_phase_twice_in_a_step_is_summed():
    with metrics.PhaseClock() as clock:
        for _ in range(3):
            clock.watch("train", 7, jnp.zeros(()))
        assert list(clock.pop(7)) == ["train"]
        assert clock.pop(7) == {}


def test_deleted_array_yields_no_time_and_the_clock_goes_on(busy_input):
    with metrics.PhaseClock() as clock:
        gone = jnp.ones((4,))
        gone.delete()
        clock.watch("sample", 1, gone)
        clock.watch("train", 1, busy(busy_input))
        assert set(clock.pop(1)) == {"train"}


def test_donated_array_does_not_end_the_run(busy_input):
    step = jax.jit(busy, donate_argnums=0)
    state_DD = jnp.array(busy_input)
    with metrics.PhaseClock() as clock:
        for number in range(1, 6):
            state_DD = step(state_DD)
            clock.watch("train", number, state_DD)  # donated by the next call
        state_DD.block_until_ready()
        assert set(clock.pop(5)) == {"train"}
    assert bool(jnp.isfinite(state_DD).all())


def test_pop_returns_in_time_what_is_not_ready(busy_input):
    class Never:
        def block_until_ready(self):
            time.sleep(0.5)

    with metrics.PhaseClock() as clock:
        clock.watch("sample", 1, Never())
        start = time.perf_counter()
        assert clock.pop(1, timeout=0.05) == {}
        assert time.perf_counter() - start < 0.3
