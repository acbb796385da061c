"""Compiles each program of a run from shapes, and judges what came out."""

import copy
import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from opd_jax.distill import gradient_noise as noise_program
from opd_jax.distill import train_step as training
from opd_jax.models import ModelConfig, moe
from opd_jax.parallel import sharding
from opd_jax.preflight import costs, hlo, jaxprs, lengths, topology
from opd_jax.preflight.build import built
from opd_jax.preflight.reports import ProgramReport, StepReport
from opd_jax.run import programs

# What the predicted time takes for granted; preflight prints it with the time.
ASSUMED = (
    "a program takes the longest of compute, HBM, links and network, each at its peak, and hides the others",
    "every response has full length; links carry a ring along one axis of the torus, in both directions",
    "no latency of kernels or collectives, no sorts and gathers, no host time, no padding to tiles",
    "what lies in the hosts' memory is fetched and returned at the bus's speed while nothing else runs",
)


def check(
    plan: programs.Programs,
    chip: topology.Chip,
    *,
    largest: bool = True,
    sampled: list | None = None,
    build=built,
) -> StepReport:
    """Compiles sample, train_step, the evaluation's programs and that of the gradient's noise.

    Args:
      chip: what a device of the plan's mesh can do.
      largest: also look for the largest micro-batch, at the price of compiling train_step a few times more.
      sampled: what `samplers` returned for the same mesh; None compiles them.
      build: how a program is compiled, as `built`.
    """
    c, mesh = plan.config, plan.mesh
    b, p, t = c.rollout.batch, c.data.prompt_tokens, c.rollout.max_tokens
    flops = costs.phase_flops(plan.student, plan.teacher, b, p, t)
    batch = _micro_batch(plan)
    sample, *others = samplers(plan, chip, build) if sampled is None else sampled
    evaluated = plan.abstract_state().params, plan.abstract_teacher(), plan.abstract_rollouts()
    reports = [
        sample,
        train_step(plan, chip, build),
        _compile(
            plan,
            chip,
            Work(
                "evaluation",
                plan.divergence,
                evaluated,
                rows=batch.rows,
                flops=flops["update"] / 3 + flops["score"],
                hbm_bytes=costs.divergence_bytes(plan.student, plan.teacher, batch),
                resident_bytes=held_bytes(plan)["optimizer state"],
                loop=lengths.training_rounds(c, lengths.full(c), 1),
            ),
            build,
        ),
        *others,
    ]
    if c.metrics.gradient_noise_every:
        reports.append(gradient_noise(plan, chip, build))
    for width in sorted({*c.data.prompt_buckets} - {p}):
        reports += _of_width(plan, chip, width, build)
    seconds = reports[0].seconds + reports[1].seconds
    report = StepReport(
        programs=reports,
        seconds=seconds,
        tokens_a_second=b * t / seconds / mesh.devices.size if seconds else 0.0,
        held=held_bytes(plan),
        micro_batch=c.train.micro_batch,
    )
    if largest:
        report.largest_micro_batch = _largest(plan, chip, reports[1], build)
    return report


def _of_width(plan: programs.Programs, chip: topology.Chip, width: int, build) -> list[ProgramReport]:
    """The reports of sample and train_step for a narrower bucket of data.prompt_buckets."""
    narrow = _changed(plan, "data.prompt_tokens", width)
    return [
        _sample(narrow, chip, f"sample_{width}", build, training=True),
        train_step(narrow, chip, build, f"train_step_{width}"),
    ]


def _changed(plan: programs.Programs, key: str, value) -> programs.Programs:
    """The plan with another value of one field."""
    config = copy.deepcopy(plan.config)
    with config.unlocked():
        config.update_from_flattened_dict({key: value})
    return dataclasses.replace(plan, config=config)


def samplers(plan: programs.Programs, chip: topology.Chip, build=built) -> list[ProgramReport]:
    """The reports of sample and, where evaluations sample otherwise, evaluation_sample.

    They are the same whatever the micro-batch.
    """
    c = plan.config
    samples = c.rollout.samples_per_prompt
    found = [_sample(plan, chip, "sample", build, training=True)]
    others = plan.teacher_writes or samples > 1 or c.release.stop != "never"
    if (c.eval.every or c.eval.benchmark) and others:
        found.append(_sample(plan, chip, "evaluation_sample", build, training=False))
    return found


def _sample(plan: programs.Programs, chip, name: str, build, *, training: bool) -> ProgramReport:
    """The report of the sampler of the responses to train on, or of that of evaluations, at full length."""
    c, mesh = plan.config, plan.mesh
    b, p, t = c.rollout.batch, c.data.prompt_tokens, c.rollout.max_tokens
    rows = b // sharding.pieces(mesh)
    by_teacher = training and plan.teacher_writes
    samples = c.rollout.samples_per_prompt if training else 1
    block = lengths.judged(c) if training else 0
    writer = plan.teacher if by_teacher else plan.student
    held = held_bytes(plan)
    int8 = c.rollout.cache_dtype == "int8"
    spread = mesh.shape["fsdp"] if moe.can_spread(writer, mesh) else 1
    batch = costs.MicroBatch(rows, p, t, mesh.shape)
    turns = lengths.of_config(c, writer, sharding.pieces(mesh), np.full(b, t), samples)
    decoded = [stretch for turn in turns for stretch in turn]
    flops = costs.phase_flops(writer, plan.teacher, b, p, t, samples)
    moved = costs.sample_bytes(writer, batch, decoded, samples, int8, spread)
    resident = held["optimizer state"]
    if block:
        own = c.release.stop_cache_dtype == "int8"
        moved += costs.read_along_bytes(plan.teacher, batch, decoded, block, samples, own)
    else:
        resident += held[f"{'student' if by_teacher else 'teacher'} parameters"]
    params = plan.abstract_state().params
    return _compile(
        plan,
        chip,
        Work(
            name,
            plan.sample_to_train if training else plan.sample,
            plan.abstract_training_draw() if training else (params, *plan.abstract_draw(b)),
            rows=rows,
            flops=flops["sample"] + (flops["score"] if block else 0),
            hbm_bytes=moved,
            resident_bytes=resident,
            loop=lengths.rounds(turns[0], block),
            models=(writer, plan.teacher) if block else (writer,),
        ),
        build,
    )


def train_step(
    plan: programs.Programs, chip: topology.Chip, build=built, name: str = "train_step"
) -> ProgramReport:
    """The training step's report alone."""
    c, batch = plan.config, _micro_batch(plan)
    flops = costs.phase_flops(plan.student, plan.teacher, c.rollout.batch, batch.prompt, batch.response)
    mu_bytes = {"float32": 4, "bfloat16": 2}[c.optimizer.mu_dtype] if c.optimizer.b1 else 0
    recomputed, updates = training.recomputes(c), c.train.updates_per_rollout
    scored = not plan.scores_while_sampling
    teacher = plan.teacher if scored else None
    return _compile(
        plan,
        chip,
        Work(
            name,
            plan.train_step,
            (plan.abstract_state(), plan.abstract_inputs()),
            rows=batch.rows,
            flops=scored * flops["score"] + flops["update"] * (3 * updates + recomputed) / 3,
            hbm_bytes=costs.train_bytes(plan.student, teacher, batch, mu_bytes, recomputed, updates),
            loop=lengths.training_rounds(c, lengths.full(c), 1 + (scored or recomputed), recomputed),
        ),
        build,
    )


def gradient_noise(plan: programs.Programs, chip: topology.Chip, build=built) -> ProgramReport:
    """The report of the program that metrics.gradient_noise_every runs with some training steps."""
    c, batch = plan.config, _micro_batch(plan)
    groups, recomputed = noise_program.group_count(c, plan.mesh), training.recomputes(c)
    assert groups is not None, "sizes.check refuses a batch without two groups"
    flops = costs.phase_flops(plan.student, plan.teacher, c.rollout.batch, batch.prompt, batch.response)
    state = plan.abstract_state()
    return _compile(
        plan,
        chip,
        Work(
            "gradient_noise",
            plan.gradient_noise,
            (state.params, state.step, plan.abstract_inputs()),
            rows=batch.rows,
            flops=flops["score"] + flops["update"] * (3 + recomputed / 3),
            hbm_bytes=costs.gradient_noise_bytes(plan.student, plan.teacher, batch, groups, recomputed),
            resident_bytes=held_bytes(plan)["optimizer state"],
            loop=[
                *lengths.training_rounds(c, lengths.full(c), 1, recomputed),
                (lengths.chunks(c), 0),
            ],
        ),
        build,
    )


def _micro_batch(plan: programs.Programs) -> costs.MicroBatch:
    """The rollouts that one device scores and trains on at a time."""
    c, mesh = plan.config, plan.mesh
    return costs.MicroBatch(
        rows=c.train.micro_batch // sharding.pieces(mesh),
        prompt=c.data.prompt_tokens,
        response=c.rollout.max_tokens,
        mesh=mesh.shape,
        pieces=c.rollout.batch // c.train.micro_batch,
    )


def held_bytes(plan: programs.Programs) -> dict:
    """Bytes of one device that lie there for the whole run; moments in the host's memory are in none."""
    state = plan.abstract_state()
    return {
        "student parameters": device_bytes(state.params),
        "optimizer state": device_bytes(state.opt_state),
        "teacher parameters": device_bytes(plan.abstract_teacher()),
    }


def device_bytes(tree) -> int:
    """Bytes of one device's shards of abstract arrays, of those that lie in its own memory."""
    own = [a for a in jax.tree.leaves(tree) if a.sharding.memory_kind != "pinned_host"]
    return sum(a.dtype.itemsize * math.prod(a.sharding.shard_shape(a.shape)) for a in own)


@dataclasses.dataclass(frozen=True)
class Work:
    """A program to compile, and what is known of it from shapes.

    Attributes:
      name, fn, arguments: fn(*arguments) is what a run calls; fn is jitted.
      rows: rollouts of one device whose activations are alive at a time.
      flops: of the models, over all devices.
      hbm_bytes: traffic of one device.
      resident_bytes: what the run holds on one device besides the arguments.
      loop: how often the loops without a fixed number of rounds run, in their order.
      models: those that the program runs; by default student and teacher.
    """

    name: str
    fn: Any
    arguments: Sequence[Any]
    rows: int
    flops: float
    hbm_bytes: int
    resident_bytes: int = 0
    loop: jaxprs.Trips = 1
    models: tuple[ModelConfig, ...] = ()


def _compile(plan: programs.Programs, chip: topology.Chip, work: Work, build) -> ProgramReport:
    """Compiles a program with `build`, as `built`, and reports what came out."""
    c, mesh = plan.config, plan.mesh
    started = time.perf_counter()
    traced = work.fn.trace(*work.arguments)
    count = mesh.devices.size
    experts = [(m.width, m.ffn, m.experts) for m in work.models or (plan.student, plan.teacher) if m.experts]
    report = ProgramReport(
        name=work.name,
        capacity=chip.hbm_bytes,
        flops=work.flops / count,
        program_flops=jaxprs.matmul_flops(traced.jaxpr.jaxpr, work.loop, experts, mesh.shape["tensor"])
        / count,
        bytes=work.hbm_bytes,
        memory_seconds=work.hbm_bytes / chip.hbm_bandwidth,
        faults=[f"calls the host: {call}" for call in jaxprs.host_calls(traced.jaxpr.jaxpr)],
    )
    report.compute_seconds = report.program_flops / chip.flops
    if report.faults:
        return report
    made = build(traced, work.name)
    report.compile_seconds = time.perf_counter() - started
    report.shortage = made.shortage
    if made.shortage:
        return report
    report.arguments, report.temporaries, report.peak = made.arguments, made.temporaries, made.peak
    report.host = made.host
    report.resident = work.resident_bytes
    program = hlo.Program(made.text, work.loop)
    slices = sharding.slice_count(mesh.devices.flat)
    between = [("between slices", c) for c in program.between_slices(slices)]
    for kind, collective in [*((c.kind, c) for c in program.collectives()), *between]:
        total = report.collectives.setdefault(kind, [0, 0, 0.0])
        total[0] += collective.times
        total[1] += collective.bytes * collective.times
        total[2] += collective.wire_bytes
    outside = sum(c.wire_bytes for _, c in between)
    inside = sum(total[2] for total in report.collectives.values()) - outside
    report.link_seconds = inside / (2 * chip.link_bandwidth)  # both directions of one axis of the torus
    report.network_seconds = outside / chip.network_bandwidth
    report.release = program.scope("release")
    report.largest = [[array.bytes, str(array), op] for array, op in program.largest(5)]
    fetched, returned, others = program.host_memory()
    report.host_seconds = (fetched + returned) / chip.host_bandwidth
    report.faults += [f"reaches the host: {line}" for line in program.host_transfers() + others]
    if max(fetched, returned) > made.host * c.train.updates_per_rollout:
        report.faults.append(
            f"copies {fetched} bytes from the host's memory and {returned} to it; it has {made.host} there"
        )
    report.faults += [
        f"holds logits of all positions: {line}"
        for line in program.vocabulary_arrays(
            work.rows * c.rollout.max_tokens, *_vocabularies((plan.student, plan.teacher), mesh)
        )
    ]
    return report


def _vocabularies(models, mesh):
    """(the numbers of vocabulary rows a device may hold, the widths of weights that hold them)."""
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    sizes = {v for m in models for v in (m.vocab_size, m.vocab_size // tensor)}
    widths = {d for m in models for d in (m.width, m.width // fsdp)}
    return sorted(sizes), sorted(widths)


def _largest(plan, chip, report: ProgramReport, build) -> int | None:
    """The largest micro-batch with which train_step fits, by bisection over the divisors of the batch."""
    batch, own = plan.config.rollout.batch, plan.config.train.micro_batch
    least = plan.mesh.shape["data"] * plan.mesh.shape["fsdp"]
    sizes = [n for n in range(least, batch + 1, least) if batch % n == 0]
    place = sizes.index(own)
    fitting, failing = (place, len(sizes)) if report.fits else (-1, place)
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        if train_step(_changed(plan, "train.micro_batch", sizes[middle]), chip, build).fits:
            fitting = middle
        else:
            failing = middle
    return sizes[fitting] if fitting >= 0 else None
