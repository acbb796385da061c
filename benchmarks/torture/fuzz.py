"""Reads damaged inputs as a command does: each is either read, or refused in one line of a UserError.

    python -m benchmarks.torture.fuzz --out=build/torture/fuzz
    python -m benchmarks.torture.fuzz --only=GGUF,JSONL --count=100

Everything else is a fault: another exception, a message of several lines or more than 500 characters, weights
that are not finite, more than 20 s, more than 4 GiB, or a process that dies. Faults stay in OUT, one file
each. Input N of a kind is drawn from the seed and N alone. Exits with status 1 if there is a fault.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import select
import subprocess
import sys
import traceback
from collections import Counter
from pathlib import Path

from benchmarks.torture.mutate import mutate

ROOT = Path(__file__).parents[2]
SECONDS, BYTES, LONGEST = 20.0, 4 << 30, 500


def work() -> None:
    """A worker: answers each line [kind, folder] of standard input with one of [outcome, text]."""
    from benchmarks.torture import fuzz_inputs
    from opd_jax.errors import UserError

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints
    limited = False
    for line in sys.stdin:
        kind, folder = json.loads(line)
        try:
            fuzz_inputs.read(kind, Path(folder))
            outcome = "read", ""
        except UserError as error:
            text = str(error)
            wrong = len(text) > LONGEST or len(text.splitlines()) != 1
            outcome = ("fault", f"message of {len(text)} characters") if wrong else ("refused", text)
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in place if "/opd_jax/" in frame.filename] or place
            where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
            outcome = "fault", f"{where} {type(error).__name__}: {str(error)[:160]!r}"
        if not limited:  # after what JAX maps once
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
            limited = True
        print(json.dumps(outcome), file=answers, flush=True)


class Worker:
    """A process that reads inputs; it is started anew after it was killed or has died."""

    def __init__(self, warm: tuple[str, Path]):
        self._warm, self._process = warm, None

    def read(self, kind: str, folder: Path) -> tuple[str, str]:
        """(read, refused or fault; what was said)."""
        if self._process is None:
            env = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.torture.fuzz", "--worker"],
                **{"cwd": ROOT, "env": env, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE},
                **{"stderr": subprocess.DEVNULL, "text": True},
            )
            outcome = self._ask(*self._warm, 180.0)
            if outcome[0] != "read":
                raise SystemExit(f"the sound {self._warm[0]} is not read: {outcome[1]}")
        return self._ask(kind, folder, SECONDS)

    def _ask(self, kind: str, folder: Path, seconds: float) -> tuple[str, str]:
        assert self._process and self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps([kind, str(folder)]) + "\n")
        self._process.stdin.flush()
        answer = ""
        if select.select([self._process.stdout], [], [], seconds)[0]:
            answer = self._process.stdout.readline()
            if answer:
                return tuple(json.loads(answer))
            text = f"the process died with status {self._process.wait()}"
        else:
            text = f"more than {seconds:.0f} s"
        self.end()
        return "fault", text

    def end(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = None


def main() -> int:
    """Runs the campaign; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", default="build/torture/fuzz", type=Path)
    parser.add_argument("--count", default=400, type=int, help="inputs of each kind")
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--only", default="", help="kinds, with commas")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work()
        return 0
    from benchmarks.torture import fuzz_inputs

    out = options.out.absolute()
    sound, folder = out / "sound", out / "now"
    if not (sound / "override" / "words.txt").is_file():
        fuzz_inputs.write(sound)
    counts: dict[str, Counter] = {}
    print(f"seed {options.seed}, {options.count} inputs a kind", flush=True)
    for kind, file in fuzz_inputs.FILES.items():
        if options.only and kind not in options.only.split(","):
            continue
        counts[kind], text, seen = Counter(), (sound / file).read_bytes(), set()
        worker = Worker((kind, sound))
        for number in range(options.count):
            damaged = mutate(kind, text, random.Random(f"{options.seed}/{kind}/{number}"))
            fuzz_inputs.place(kind, sound, folder, damaged)
            outcome, said = worker.read(kind, folder)
            counts[kind][outcome] += 1
            if outcome == "fault":
                name = f"{kind.replace(' ', '_')}-{number}"
                (out / f"{name}-{Path(file).name}").write_bytes(damaged)
                if (what := hashlib.sha256(said[:60].encode()).digest()) not in seen:
                    print(f"{kind} {number}: {said}", flush=True)
                    seen.add(what)
        worker.end()
        print(f"{kind}: {dict(counts[kind])}", flush=True)
    names = ("read", "refused", "fault")
    print("| input | damaged | read | refused in one line | faults |\n|---|---|---|---|---|")
    for kind, found in (*counts.items(), ("all", sum(counts.values(), Counter()))):
        print(f"| {kind} | {found.total()} | {' | '.join(str(found[name]) for name in names)} |")
    return int(any(found["fault"] for found in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
