"""Time and tokens until a run has halved its held-out KL: one row of docs/convergence.md.

    make row                                     # trains the demo's recipe, then adds the row
    python -m benchmarks.row runs/row            # of any run, prints the row
    python -m benchmarks.row runs/row --add      # and adds it to docs/convergence.md

A run counts up to the first evaluation with at most half of the start's KL. Minutes are those of training
steps, without evaluations. Tokens are those that the student wrote.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

from opd_jax.errors import UserError, fail
from opd_jax.models import cpu
from opd_jax.run import METRICS_FILE, VERSIONS_FILE, read_config

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "convergence.md"
END = "<!-- rows end here -->"


def halved(lines: list[dict]) -> tuple[int, float, int, float, float] | None:
    """(steps, seconds, tokens, KL before, KL after) at the first evaluation with half of the KL, or None.

    Args:
      lines: of metrics.jsonl, as `MetricWriter` writes them.
    """
    start = next((line["kl"] for line in lines if line["kind"] == "eval"), None)
    seconds, tokens = 0.0, 0
    for line in lines:
        if line["kind"] == "train":
            seconds += line["seconds_step"]
            tokens += int(line["response_tokens"])
        if line["kind"] == "eval" and line["kl"] <= start / 2:
            return line["step"], seconds, tokens, start, line["kl"]
    return None


def row(workdir: Path, recipe: str) -> str:
    """The row of a run, in Markdown.

    Raises:
      UserError: there is no run, or it has not halved its KL.
    """
    config = read_config(workdir)
    if config is None:
        raise UserError(f"{workdir} holds no run (no config.json); train one first: make row")
    lines = [json.loads(line) for line in (workdir / METRICS_FILE).read_text().splitlines()]
    found = halved(lines)
    if found is None:
        raise UserError(f"{workdir}: no evaluation has half of the start's KL; train for more steps")
    steps, seconds, tokens, before, after = found
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    versions = json.loads((workdir / VERSIONS_FILE).read_text())
    machine = f"{os.cpu_count()} cores of {cpu.name()}"
    if versions["backend"] != "cpu":
        machine = f"{versions['devices']} × {versions['device_kind']}"
    cells = [
        datetime.datetime.now(datetime.UTC).date().isoformat(),
        f"`{commit}`" if commit else "–",
        machine,
        f"`{recipe}`, `release.rule={config['release']['rule']}`, seed {config['seed']}",
        f"{before:.3f} → {after:.3f}",
        str(steps),
        f"{seconds / 60:.1f}",
        f"{tokens:,}",
    ]
    return "| " + " | ".join(cells) + " |"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.row", description=__doc__)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--recipe", default="configs/demo.py", help="how the run is named")
    parser.add_argument("--add", action="store_true", help="add the row to docs/convergence.md")
    options = parser.parse_args(argv)
    try:
        line = row(options.workdir, options.recipe)
    except UserError as error:
        fail(error)
    print(line)
    if options.add:
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(text.replace(END, f"{line}\n{END}"), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
