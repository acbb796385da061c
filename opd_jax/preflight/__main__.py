"""Compiles a run's programs for a TPU slice that is not attached, and says whether and how fast they run.

    python -m opd_jax.preflight --config=configs/one_chip.py --topology=v5e:1x1
    python -m opd_jax.preflight --config=configs/small_pod.py --topology=v5e:4x4 --search
    python -m opd_jax.preflight --config=configs/small_pod.py --topology=v5e:4x4 --json
    python -m opd_jax.preflight --config=configs/small_pod.py --topology=v5e:4x4 --lengths=lognormal:0.33:0.7
    python -m opd_jax.preflight --config=configs/paper_stop.py --topology=v5p:4x4x4 --stops=0.79:0.13:0.17
    python -m opd_jax.preflight --config=configs/paper.py --topology=v5p:4x4x4 --stop_after=buffers

Presets as paths (preset:Qwen3-1.7B) need no weights or tokenizers. The exit status is 1 if the memory does
not suffice, or if a program reaches the host or holds the logits of all positions.
"""

import dataclasses
import json
import sys
import tempfile

import jax
from absl import flags

from opd_jax.config import run
from opd_jax.errors import UserError
from opd_jax.preflight import check, dump, lengths, ragged, reports, search, table, topology
from opd_jax.preflight.build import Built, built
from opd_jax.preflight.plan import plan
from opd_jax.progress import Progress


def as_dict(report: reports.StepReport) -> dict:
    """The report that --json prints."""
    return dataclasses.asdict(report) | {"ok": report.ok, "assumed": check.ASSUMED}


def builder(f):
    """Returns, by the flags, (a function like build.built, whether it compiles whole programs)."""
    if f.only:
        return dump.only(f.only, f.dump), False
    if f.from_dump:
        return dump.reader(f.from_dump), False
    if f.stop_after:
        return dump.until_buffers(f.dump or tempfile.mkdtemp(prefix="preflight-"), sys.argv[1:]), False
    return built, True


def announced(build, progress: Progress):
    """`build`, with a phase of progress for each program."""

    def compile_shown(traced, name: str) -> Built:
        with progress.phase(f"compiling {name}"):
            return build(traced, name)

    return compile_shown


def main(_):
    if flags.FLAGS.config is None:
        raise UserError("--config is not set; give a file of configs/, such as configs/small_pod.py")
    config = flags.FLAGS.config
    if flags.FLAGS.search and (flags.FLAGS.stop_after or flags.FLAGS.from_dump or flags.FLAGS.only):
        raise UserError("--search compiles whole programs; leave out --stop_after, --from_dump and --only")
    length_B = lengths.response_lengths(flags.FLAGS.lengths, config.rollout.batch, config.rollout.max_tokens)
    stopped = lengths.stopped(flags.FLAGS.stops, length_B)
    chip, devices = topology.describe(flags.FLAGS.topology)
    if flags.FLAGS.search:
        # Each compile takes minutes. Results so far go to standard error, only the table to standard output.
        with Progress() as progress:
            build = announced(built, progress)
            found = search.search(config, devices, chip, plan, progress.say, build)
        if not found:
            raise UserError(
                "--search found no mesh for these devices that the config's sizes fit (each is named above); "
                "change rollout.batch, rollout.samples_per_prompt or the model's sizes"
            )
        if flags.FLAGS.json:
            tried = [{"mesh": mesh, "micro_batch": size} | as_dict(step) for mesh, size, step in found]
            print(json.dumps(tried, indent=1))
        else:
            print(table.search(found))
        sys.exit(0 if any(step.ok for *_, step in found) else 1)
    build, whole = builder(flags.FLAGS)
    largest = flags.FLAGS.largest and whole
    with Progress() as progress:
        build = announced(build, progress)
        planned = plan(config, devices)
        report = check.check(planned, chip, largest=largest, build=build)
    if flags.FLAGS.lengths != "full" or flags.FLAGS.stops:
        report.ragged = ragged.of(planned, report, length_B, stopped)
    if flags.FLAGS.json:
        print(json.dumps(as_dict(report), indent=1))
    else:
        print(table.step(report, f"{flags.FLAGS.topology}, {len(devices)} devices"))
    sys.exit(0 if report.ok else 1)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # the slice is described, not attached
    flags.DEFINE_string("topology", "v5e:4x4", "The slice, KIND:SHAPE, such as v5e:4x4 or v5p:4x4x4.")
    flags.DEFINE_bool("json", False, "Print the report as JSON.")
    flags.DEFINE_bool("largest", True, "Look for the largest micro-batch: some more compiles.")
    flags.DEFINE_enum("stop_after", None, ["buffers"], "Stop each compile before it generates code.")
    flags.DEFINE_string("dump", "", "Folder that --stop_after writes to; a temporary one if not given.")
    flags.DEFINE_string("from_dump", "", "Read such a folder instead of compiling.")
    flags.DEFINE_string("only", "", "The one program to compile, without a report; for --stop_after.")
    flags.DEFINE_string("lengths", "full", f"Also predict a step with responses of {lengths.FORMS}.")
    flags.DEFINE_string("stops", "", f"And some of them stop early: {lengths.STOPS}.")
    flags.DEFINE_bool("search", False, "Compile other mesh shapes and micro-batches, and rank them.")
    run(main)
