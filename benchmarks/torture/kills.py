"""Kills commands at random moments, resumes them, and compares what they leave with an uninterrupted run.

    python -m benchmarks.torture.kills --out=build/torture
    python -m benchmarks.torture.kills --out=build/torture --only=train,pod --trials=4

Each trial of a target kills its command with SIGKILL two to four times, each time in what the one before
left, and then lets it end. Half of the moments are spread over the whole duration of an uninterrupted run,
half over what comes after its first record. Started again with the same --out, it goes on with the trials
that are left; trial N is drawn from the seed and N alone. Exits with status 1 if any trial differs.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from benchmarks.torture.compare import differences, leftovers
from benchmarks.torture.targets import ROOT, STEPS, Target, targets, write_inputs

LOG = "kills.jsonl"
MOMENTS = ("start", "rollouts and update", "evaluation", "checkpoint", "end")
PATIENCE = 600.0


class Runner:
    """Starts a target's command in a folder of its own.

    Args:
      out: folder of the campaign.
      target: what is started.
      folder: where its results go.
    """

    def __init__(self, out: Path, target: Target, folder: Path):
        self.target, self.folder, self.log = target, folder, folder.with_suffix(".log")
        compiled = folder.with_suffix(".compiled") if target.cold else out / "compiled"
        self._env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(compiled),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "HF_HUB_OFFLINE": "1",
            "PYTHON": sys.executable,
            "PYTHONPATH": str(ROOT),
            "GRACE": "1",
            "DEVICES": "1",
        }
        folder.mkdir(parents=True, exist_ok=True)

    def start(self) -> subprocess.Popen:
        """The command in a process group of its own."""
        words = [word.replace("{out}", str(self.folder)) for word in self.target.command]
        with self.log.open("a") as log:
            return subprocess.Popen(
                words, cwd=ROOT, env=self._env, stdout=log, stderr=log, start_new_session=True
            )

    def records(self) -> int:
        """Bytes of the file of records; -1 where there is none."""
        path = self.folder / self.target.records
        return path.stat().st_size if self.target.records and path.is_file() else -1

    def finish(self) -> str:
        """Lets the command end; returns what it said if it failed, "" if not."""
        process = self.start()
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            _kill(process, None)
            return f"did not end within {PATIENCE:.0f} s"
        said = self.log.read_text(errors="replace").strip()[-300:]
        done = code == 2 and self.target.done and self.target.done in said
        return "" if code == 0 or done else f"status {code}: {said}"

    def kill(self, draw: random.Random, whole: float, loop: float) -> str:
        """Starts the command and kills it; returns the moment, "" if it had ended before.

        Args:
          whole, loop: seconds of the uninterrupted run, and of that what followed its first record.
        """
        late = bool(self.target.records) and draw.random() < 0.5
        before, share = self.records(), draw.random()
        alone = draw.randrange(self.target.processes) if draw.random() < 0.5 else None
        process, limit = self.start(), time.monotonic() + PATIENCE
        if late:
            while self.records() <= max(before, 0) and process.poll() is None and time.monotonic() < limit:
                time.sleep(0.002)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(share * (loop if late else whole))
        if process.poll() is not None:
            return ""
        began = self.records() > before
        _kill(process, alone if self.target.processes > 1 else None)
        return moment(self.folder, began) if self.target.records == "metrics.jsonl" else "anywhere"


def moment(folder: Path, began: bool) -> str:
    """What a run was doing when it was killed, by what it left."""
    if not began:
        return "start"
    if any((folder / "checkpoints").glob("*tmp*")):
        return "checkpoint"
    lines = (folder / "metrics.jsonl").read_text().splitlines(True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    config = json.loads((folder / "config.json").read_text())
    last = records[-1] if records else {"kind": "eval", "step": 0}
    if last["step"] == config["train"]["steps"] and last["kind"] != "train":
        return "end"
    due = last["kind"] == "train" and last["step"] % config["eval"]["every"] == 0
    return "evaluation" if due else "rollouts and update"


def _kill(process: subprocess.Popen, alone: int | None) -> None:
    """Kills a process group, or one of the processes that a launch script started and then waits for it."""
    if alone is not None and (found := _children(process.pid)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(found[alone % len(found)], signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _children(pid: int) -> list[int]:
    """The Python processes below a launch script."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = path.read_text().partition("(")[2].rpartition(")")
            if int(rest.split()[1]) == pid and name.startswith("python"):
                found.append(int(path.parent.name))
    return sorted(found)


def trial(out: Path, target: Target, number: int, seed: int, times: tuple[float, float]) -> dict:
    """One trial's record: kills by moment, starts, and what differs in the end."""
    draw = random.Random(f"{seed}/{target.name}/{number}")
    folder = out / "trials" / f"{target.name}-{number}"
    for path in folder.parent.glob(f"{folder.name}*"):
        if path == folder or path.stem == folder.name:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    runner, kills = Runner(out, target, folder), Counter()
    wanted, starts = draw.randint(2, 4), 0
    while kills.total() < wanted and starts < 8:
        starts += 1
        if where := runner.kill(draw, *times):
            kills[where] += 1
        elif kills:
            break
        else:  # it had ended before: it is begun anew
            shutil.rmtree(folder)
            folder.mkdir()
    failed = runner.finish()
    wrong = [failed] if failed else differences(out / "whole" / target.name, folder)
    left = leftovers(folder)
    if not wrong:
        for path in (folder, folder.with_suffix(".compiled")):
            shutil.rmtree(path, ignore_errors=True)
    return {
        "target": target.name,
        "trial": number,
        "kills": dict(kills),
        "starts": starts + 1,
        "wrong": wrong[:5],
        "leftovers": len(left),
    }


def measure(out: Path, target: Target) -> tuple[float, float]:
    """(seconds, of these after the first record) of an uninterrupted run, whose folder stays in OUT/whole."""
    folder = out / "whole" / target.name
    known = folder.with_suffix(".json")
    if known.is_file():
        return tuple(json.loads(known.read_text()))
    for _ in range(2):  # the first one compiles
        for path in (folder, folder.with_suffix(".compiled")):
            shutil.rmtree(path, ignore_errors=True)
        runner = Runner(out, target, folder)
        begun, first = time.monotonic(), None
        process = runner.start()
        while process.poll() is None:
            if first is None and runner.records() > 0:
                first = time.monotonic()
            time.sleep(0.01)
        end = time.monotonic()
        if process.returncode:
            raise SystemExit(f"{target.name}: {runner.log.read_text()[-2000:]}")
    times = end - begun, end - (first or begun)
    known.write_text(json.dumps(times))
    return times


def table(records: list[dict]) -> str:
    """The results, a row a target and a row of sums."""
    rows = ["| what | trials | kills | starts | same results | left over |", "|---|---|---|---|---|---|"]
    names = list(dict.fromkeys(record["target"] for record in records))
    for name in (*names, "all"):
        mine = [r for r in records if name in (r["target"], "all")]
        kills = sum(sum(r["kills"].values()) for r in mine)
        same = sum(not r["wrong"] for r in mine)
        starts, left = (sum(r[key] for r in mine) for key in ("starts", "leftovers"))
        rows.append(f"| {name} | {len(mine)} | {kills} | {starts} | {same} of {len(mine)} | {left} |")
    counts = sum((Counter(r["kills"]) for r in records), Counter())
    known = ", ".join(f"{name} {counts[name]}" for name in MOMENTS)
    return "\n".join([*rows, "", f"Moments of train, sft and pod: {known}."])


def main() -> int:
    """Runs the campaign; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", default="build/torture", type=Path)
    parser.add_argument("--trials", default=5, type=int, help="of each target")
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--only", default="", help="names of targets, with commas")
    options = parser.parse_args()
    out = options.out.absolute()
    if not (out / "inputs" / "demo_prompts.py").is_file():
        write_inputs(out / "inputs")
    log = out / LOG
    records = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    done = {(record["target"], record["trial"]) for record in records}
    print(f"seed {options.seed}, {STEPS} steps, {options.trials} trials a target, log {log}", flush=True)
    wanted, times = options.only.split(",") if options.only else [], {}
    chosen = [t for t in targets(out / "inputs", out / "whole") if not wanted or t.name in wanted]
    for target in chosen:
        times[target] = whole, loop = measure(out, target)
        print(f"{target.name}: {whole:.1f} s, {loop:.1f} s after the first record", flush=True)
    for number in range(options.trials):
        for target in chosen:
            if (target.name, number) in done:
                continue
            records.append(trial(out, target, number, options.seed, times[target]))
            with log.open("a") as file:
                file.write(json.dumps(records[-1]) + "\n")
            kills = sum(sum(record["kills"].values()) for record in records)
            said = "; ".join(records[-1]["wrong"]) or "the same results"
            print(f"{target.name} {number}: {records[-1]['kills']}, {said}; {kills} kills so far", flush=True)
    print(table(records))
    return int(any(record["wrong"] for record in records))


if __name__ == "__main__":
    sys.exit(main())
