"""What a run leaves behind: JSONL, TensorBoard, Weights & Biases, and the files that say how it was made.

`metrics.jsonl` is the record that everything else is made from; the rest can be switched off. In a
run of several processes only process 0 writes.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TextIO

import jax
import numpy as np

from opd_jax.errors import UserError
from opd_jax.parallel import distributed
from opd_jax.progress import Progress
from opd_jax.run import alarms
from opd_jax.run.phase_clock import PhaseClock
from opd_jax.run.run_record import has_steps, read_config

__all__ = ["MetricWriter", "PhaseClock", "config_conflict", "write_run_files"]

METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
CONFIG_FILE = "config.json"
VERSIONS_FILE = "versions.json"
PROMPTS_FILE = "prompts.json"
WANDB_FILE = "wandb_id.txt"
RECORDED_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")
# Config keys that a resumed run may change: how long it goes on, what it shows and stores, and the devices.
FREE_KEYS = (
    *("train.steps", "eval.", "checkpoint.every", "checkpoint.keep", "metrics.", "compile."),
    *("mesh.", "sharding.", "train.micro_batch", "train.pack", "optimizer.memory", "plugins"),
    *("rollout.halvings", "rollout.slots", "rollout.prompt_widths"),
    *("rollout.cache_stages", "train.widths"),  # fields of older versions
)
# Where auto is settled by a probe of the machine, which a resumed run does not repeat.
SETTLED_KEYS = ("student.products", "teacher.products")


class MetricWriter:
    """Writes the records of one run; a context manager.

    Args:
      config: the whole config; reads train.steps, metrics.tensorboard (scalars; lists stay in the JSONL) and
        metrics.wandb.
      workdir: folder of the run; made where missing.
      resume_step: the step of the restored checkpoint: later records are dropped, so that no step
        is there twice. None is a new run, and drops whatever an earlier attempt left.
      progress: what shows the records.
      plain_every: where progress is not shown in a terminal, a line every so many steps.

    Attributes:
      active: whether this process is the one that writes, number 0.
      recorded: (kind, benchmark or None) of what process 0 found of the resume_step.
      skipped: updates that were skipped in a row up to the resume_step, as process 0 found.

    Raises:
      UserError: W&B is asked for and not installed.
    """

    def __init__(
        self,
        config: Any,
        workdir: str | os.PathLike,
        resume_step: int | None,
        progress: Progress,
        plain_every: int = 10,
    ):
        self.active = jax.process_index() == 0
        self._closing = contextlib.ExitStack()
        self._failed: UserError | None = None
        self._files: dict[str, TextIO] = {}
        self._tensorboard = self._wandb = None
        self.recorded: frozenset[tuple[str, str | None]] = frozenset()
        self.skipped = 0
        if not self.active:
            return
        self._workdir = workdir = Path(workdir)
        if config.metrics.wandb:
            self._wandb = _start_wandb(workdir, {"project": config.metrics.wandb}, resume_step)
            self._closing.callback(self._wandb.finish)
        workdir.mkdir(parents=True, exist_ok=True)
        last = -1 if resume_step is None else resume_step
        kept = _keep_until(workdir / METRICS_FILE, last)
        self.recorded = frozenset((r["kind"], r.get("benchmark")) for r in kept if r["step"] == last)
        self._alarms = alarms.Alarms(kept)
        steps = [int(r.get("skipped_updates") or 0) for r in reversed(kept) if r["kind"] == "train"]
        self.skipped = sum(itertools.takewhile(bool, steps))
        _keep_until(workdir / ROLLOUTS_FILE, last)
        # Answers come before the record that they are all there.
        _keep_until(workdir / EVALUATIONS_FILE, last if ("eval", None) in self.recorded else last - 1)
        for name in (METRICS_FILE, ROLLOUTS_FILE, EVALUATIONS_FILE):
            self._files[name] = file = open(workdir / name, "a", encoding="utf-8")  # noqa: SIM115
            self._closing.callback(_close, file)
        if config.metrics.tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(
                str(workdir / "tensorboard"),
                purge_step=0 if resume_step is None else resume_step + 1,
            )
            self._closing.callback(self._tensorboard.close)
        self._total_steps, self._plain_every, self._first = config.train.steps, plain_every, True
        self._progress = progress

    def write(self, record: Mapping[str, Any]) -> None:
        """Writes one record, a mapping with "kind" ("train", "eval" or "benchmark") and "step".

        Values are host numbers, strings, None, or lists and NumPy arrays of numbers. A number that
        is not finite is written as null, since JSON has none. An alarm that the record raises is written
        after it, and said.
        """
        if not self.active:
            return
        plain = {key: _plain(value) for key, value in record.items()}
        self._append(METRICS_FILE, plain)
        kind, step = plain["kind"], plain["step"]
        group = f"{kind}/{plain['benchmark']}" if "benchmark" in plain else kind
        scalars = {
            f"{group}/{key}": float(value)
            for key, value in record.items()
            if key not in ("kind", "step")
            and np.ndim(value) == 0
            and _is_number(value)
            and np.isfinite(value)  # such as the release position of a step without a release
        }
        if self._tensorboard is not None:
            for tag, value in scalars.items():
                self._tensorboard.add_scalar(tag, value, step)
        if self._wandb is not None:
            self._wandb.log({**scalars, "step": step})
        self._show(record)
        for alarm in self._alarms.read(plain):
            self._append(METRICS_FILE, alarm)
            self.say(f"alarm: {alarms.text(alarm)}")

    def write_rollouts(self, rollouts: Sequence[Mapping[str, Any]]) -> None:
        """Appends rollouts to rollouts.jsonl, each a mapping with "step"."""
        self._append_all(ROLLOUTS_FILE, rollouts)

    def write_evaluations(self, answers: Sequence[Mapping[str, Any]]) -> None:
        """Appends answers to held-out prompts to evaluations.jsonl, each a mapping with "step"."""
        self._append_all(EVALUATIONS_FILE, answers)

    def sync(self) -> None:
        """Puts what was written on the disk, so that no checkpoint outlives the records of its steps.

        In a run of several processes this also raises what a write before could not do.

        Raises:
          UserError: the disk is full, or the folder is gone.
        """
        if self._failed is not None:
            raise self._failed
        for name, file in self._files.items():
            with self._writing(name):
                os.fsync(file.fileno())
            if not (self._workdir / name).exists():
                raise UserError(
                    f"{self._workdir / name} was removed while the run was writing it; the run ends, since"
                    " what it would write would be lost"
                )

    def say(self, text: str) -> None:
        """Shows one line among the progress."""
        if self.active:
            self._progress.say(text)

    def _show(self, record: Mapping[str, Any]) -> None:
        step, text = int(record["step"]), _summary(record)
        if record["kind"] != "train":
            named = f"  {record['benchmark']}" if "benchmark" in record else ""
            self._progress.say(f"{record['kind']:<5} step {step}{named}  {text}")
            return
        due = self._first or step % self._plain_every == 0 or step == self._total_steps
        self._first = False
        whole = record.get("seconds_step")
        busy = sum(v for key, v in record.items() if key.startswith("seconds_") and key != "seconds_step")
        self._progress.step(step, self._total_steps, text, seconds=whole, busy=busy or None, due=due)

    def _append_all(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        if self.active:
            for line in lines:
                self._append(name, {key: _plain(value) for key, value in line.items()})

    def _append(self, name: str, plain: Mapping[str, Any]) -> None:
        if self._failed is not None:  # nothing may follow what is missing
            return
        with self._writing(name):
            self._files[name].write(json.dumps(plain, allow_nan=False) + "\n")
            self._files[name].flush()

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            failed = UserError(
                f"{self._workdir / name} can't be written ({error.strerror}); make room or restore access,"
                " and start again with the same --workdir to continue from the newest checkpoint"
            )
            if jax.process_count() == 1:
                raise failed from error
            # The other processes wait for this one at every step: all are told to stop, and end together.
            if self._failed is None:
                self._failed = failed
                self.say(f"{failed}: all processes stop after their step")
                os.kill(os.getpid(), signal.SIGTERM)

    def close(self) -> None:
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _close(file: TextIO) -> None:
    """Closes a file; what a full disk does not take has been told when it was written."""
    with contextlib.suppress(OSError):
        file.close()


def _summary(record: Mapping[str, Any]) -> str:
    """The few numbers a person watches, those of them that the record has."""
    parts = []
    if record.get("loss") is not None:
        parts.append(f"loss {record['loss']:.4f}")
    if record.get("accuracy") is not None:
        low, high = record["accuracy_low"], record["accuracy_high"]
        parts.append(f"accuracy {record['accuracy']:.1%}  [{low:.1%}, {high:.1%}]")
    if record.get("kl") is not None:
        parts.append(f"kl {record['kl']:.4f}")
    if record.get("kl_low") is not None and record.get("kl_high") is not None:
        parts.append(f"[{record['kl_low']:.4f}, {record['kl_high']:.4f}]")
    if record.get("finished_share") is not None:
        parts.append(f"finished {record['finished_share']:.0%}")
    if record.get("stopped_share") is not None:
        parts.append(f"stopped {record['stopped_share']:.0%}")
    if record.get("tokens_per_second") is not None:
        parts.append(f"{record['tokens_per_second']:,.0f} tok/s")
    return "  ".join(parts)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number, np.ndarray, np.bool_))


def _plain(value: Any) -> Any:
    """The JSON form of a record's value."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _keep_until(path: Path, step: int) -> list[dict[str, Any]]:
    """Drops the lines of later steps, and a last line that a killed run left unfinished; returns the rest."""
    if not path.exists():
        return []
    kept, records = [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["step"] <= step:
            kept.append(line + "\n")
            records.append(record)
    _write_whole(path, "".join(kept))
    return records


def _write_whole(path: Path, text: str) -> None:
    """Writes a file so that a reader, or a kill, never meets half of it."""
    scratch = path.with_name(f".{path.name}.new")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def import_wandb() -> Any:
    """The module wandb.

    Raises:
      UserError: it is not installed.
    """
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(
            "metrics.wandb: the package wandb is missing; pip install wandb, or unset metrics.wandb"
        ) from error
    return wandb


def check_wandb() -> None:
    """Refuses to log without the package or a key; call it in every process. Only process 0 needs the key.

    Raises:
      UserError: in all processes.
    """
    wandb, mode = import_wandb(), os.environ.get("WANDB_MODE") or "online"
    key = os.environ.get("WANDB_API_KEY") or getattr(getattr(wandb, "api", None), "api_key", None)
    lacks = jax.process_index() == 0 and not key and mode in ("online", "run")
    if distributed.gathered([lacks]).any():
        raise UserError(
            "metrics.wandb: W&B has no key here; run `wandb login`, or set WANDB_API_KEY or"
            " WANDB_MODE=offline"
        )


def _start_wandb(workdir: Path, options: Mapping[str, Any], resume_step: int | None) -> Any:
    wandb = import_wandb()
    workdir.mkdir(parents=True, exist_ok=True)
    id_file = workdir / WANDB_FILE
    run_id = id_file.read_text().strip() if resume_step is not None and id_file.exists() else None
    run = wandb.init(dir=str(workdir), id=run_id, resume="allow", **options)
    id_file.write_text(run.id + "\n")
    run.define_metric("*", step_metric="step")
    return run


def write_run_files(
    workdir: str | os.PathLike,
    config: Any,
    prompts: Mapping[str, int] | None = None,
    measured: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json (the resolved config), versions.json (what the run was made with) and prompts.json.

    Args:
      prompts: how many prompts there are and were left out, by name; no file without them.
      measured: what was measured of the machine, for versions.json.

    Raises:
      UserError: in all processes, if process 0 cannot write them.
    """
    write = functools.partial(_write_run_files, Path(workdir), config, prompts, measured)
    distributed.by_first(write, f"--workdir={workdir}: {CONFIG_FILE}")


def _write_run_files(workdir: Path, config: Any, prompts: Any, measured: Any) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    devices = jax.devices()
    versions = {
        "python": platform.python_version(),
        **{name: _version(name) for name in RECORDED_PACKAGES},
        "system": platform.platform(),
        "backend": jax.default_backend(),
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "processes": jax.process_count(),
        "git_commit": _git_commit(),
        "command": sys.argv,
        **(measured or {}),
    }
    _write_whole(workdir / CONFIG_FILE, _config_json(config))
    _write_whole(workdir / VERSIONS_FILE, json.dumps(versions, indent=2) + "\n")
    if prompts is not None:
        _write_whole(workdir / PROMPTS_FILE, json.dumps(prompts, indent=2) + "\n")


def config_conflict(workdir: str | Path, config: Any) -> UserError | None:
    """Whether `workdir` holds a run of another config: None, or the first difference as an error to raise.

    A start that ended before its first step is no run: what it left is written anew.

    Keys in `FREE_KEYS` may differ; those that end in "." stand for everything below them. Products of auto
    are those that the run began with.

    Raises:
      UserError: the workdir's config.json is damaged.
    """
    found = read_config(workdir) if has_steps(workdir) else None
    if found is None:
        return None
    old = _flatten(found)
    new = _flatten(json.loads(_config_json(config)))
    for flat in (old, new):
        if flat.get("optimizer.schedule", "constant") == "constant":
            flat.pop("optimizer.decay_steps", None)
        else:
            flat["optimizer.decay_steps"] = flat.get("optimizer.decay_steps") or flat["train.steps"]
    for key in sorted(old.keys() | new.keys()):
        free = any(key == name or (name[-1] == "." and key.startswith(name)) for name in FREE_KEYS)
        free |= key in SETTLED_KEYS and new.get(key) == "auto"
        if not free and (key not in old or key not in new or old[key] != new[key]):
            there, here = (json.dumps(part[key]) if key in part else "not set" for part in (old, new))
            return UserError(
                f"{workdir} holds a run with another config: {key} is {there} there and {here}"
                " here; start in another --workdir, or give that run's value"
            )
    return None


def _config_json(config: Any) -> str:
    plain = config.to_dict() if hasattr(config, "to_dict") else config
    return json.dumps(plain, indent=2, sort_keys=True) + "\n"


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the source tree, "-dirty" where it has changes; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
