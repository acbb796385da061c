"""The predicted time of a step with responses of given lengths, from the report of a full-length step.

A program takes the longest of compute, HBM, links and network, as at full length. Each is scaled by what the
rows cost at their lengths: decode steps by the rows that are left and the slots that they have written,
scoring and the gradient by the micro-batches that are left when rows are packed (every prompt of full length,
and every token supervised, unless it is given where rows stop and what they keep).
"""

import dataclasses

import numpy as np

from opd_jax.distill import train_step as training
from opd_jax.parallel import sharding
from opd_jax.preflight import costs, lengths
from opd_jax.preflight.reports import ProgramReport, Ragged, StepReport
from opd_jax.run import programs


def of(
    plan: programs.Programs,
    report: StepReport,
    length_B: np.ndarray,
    stopped: lengths.Written | None = None,
) -> Ragged:
    """Predicts a step with these lengths.

    Args:
      plan: the programs that `report` is of.
      report: as `check.check` returns it.
      length_B: tokens of each whole response of a batch.
      stopped: what is written of them, and what is kept; all if not given.
    """
    sample, train = report.programs[:2]
    now = stopped or lengths.Written(length_B, length_B)
    return Ragged(
        mean_tokens=float(now.written_B.mean()),
        full=[sample.seconds, train.seconds],
        written=[_sample(plan, sample, now.written_B), _train(plan, train, now)],
        padded=[_sample(plan, sample, length_B, padded=True), train.seconds],
    )


def _seconds(report: ProgramReport, compute: float, memory: float, traffic: float) -> float:
    """Seconds of a program with shares of its compute, its HBM traffic and what it sends."""
    return dataclasses.replace(
        report,
        compute_seconds=compute * report.compute_seconds,
        memory_seconds=memory * report.memory_seconds,
        link_seconds=traffic * report.link_seconds,
        network_seconds=traffic * report.network_seconds,
    ).seconds


def _sample(plan, report: ProgramReport, length_B: np.ndarray, padded: bool = False) -> float:
    """Seconds of the sampler; with `padded`, of one whose rows wait for the longest and read all slots."""
    c, devices = plan.config, sharding.pieces(plan.mesh)
    writer = plan.teacher if plan.teacher_writes else plan.student
    p, t, samples = c.data.prompt_tokens, c.rollout.max_tokens, c.rollout.samples_per_prompt
    batch = costs.MicroBatch(len(length_B) // devices, p, t, plan.mesh.shape)

    def decoded(length_B) -> list[costs.Stretch]:
        turns = lengths.of_config(c, writer, devices, length_B, samples)
        return [stretch for turn in turns for stretch in turn]

    block, teacher = lengths.judged(c), plan.teacher

    def products(decoded: list[costs.Stretch]) -> int:
        prompts = batch.rows // samples
        models = [writer, teacher] if block else [writer]
        total = 0
        for model in models:
            total += prompts * p * model.matmul_flops_per_token(head=False)
            total += prompts * costs.attention_flops(model, 0, p)
            for rows, steps, slots in decoded:
                attention = costs.attention_flops(model, int(slots) - 1, 1)
                total += rows * steps * (model.matmul_flops_per_token(head=True) + attention)
        return total

    def moved(decoded: list[costs.Stretch]) -> int:
        int8, own = c.rollout.cache_dtype == "int8", c.release.stop_cache_dtype == "int8"
        total = costs.sample_bytes(writer, batch, decoded, samples, int8)
        return total + (costs.read_along_bytes(teacher, batch, decoded, block, samples, own) if block else 0)

    full, now = decoded(np.full_like(length_B, t)), decoded(length_B)
    if padded:
        now = [costs.Stretch(batch.rows, int(length_B.max()) - 1, p + t)]
    sent = [sum(rows * steps for rows, steps, _ in each) for each in (now, full)]
    return _seconds(report, products(now) / products(full), moved(now) / moved(full), sent[0] / sent[1])


def _train(plan, report: ProgramReport, now: lengths.Written) -> float:
    """Seconds of train_step."""
    c, devices = plan.config, sharding.pieces(plan.mesh)
    p, t, pieces = c.data.prompt_tokens, c.rollout.max_tokens, lengths.micro_batches(c)
    batch = costs.MicroBatch(c.train.micro_batch // devices, p, t, plan.mesh.shape, pieces)
    updates, recomputed = c.train.updates_per_rollout, training.recomputes(c)
    teacher = None if plan.scores_while_sampling else plan.teacher
    passes = [(teacher, 1)] if teacher else []
    passes += [(plan.student, 1)] if recomputed else []

    def products(passes, packed: list[int]) -> float:
        """FLOPs of passes over micro-batches whose responses have so many chunks."""
        length, chunks = p + t, lengths.chunks(c)
        total = 0.0
        for model, times in passes:
            blocks = length * model.matmul_flops_per_token(head=False) + costs.attention_flops(
                model, 0, length
            )
            head = 2 * t * model.vocab_size * model.width
            total += times * (len(packed) * blocks + sum(packed) / chunks * head)
        return total

    def moved(scored: int, learnt: int) -> float:
        """HBM traffic of micro-batches that are scored, and of some that are learnt from."""

        def of(pieces: int, updates: int) -> int:
            own = dataclasses.replace(batch, pieces=pieces)
            return costs.train_bytes(plan.student, teacher, own, 4, recomputed, updates)

        read = of(scored, 0)
        return read + of(learnt, updates) - of(learnt, 0)

    read, learnt = (lengths.packed(c, devices, length_B) for length_B in now)
    whole = lengths.full(c)
    gradient = [(plan.student, 3 * updates)]
    compute = products(passes, read) + products(gradient, learnt)
    compute /= products(passes, whole) + products(gradient, whole)
    memory = moved(len(read), len(learnt)) / moved(pieces, pieces)
    return _seconds(report, compute, memory, (len(read) + len(learnt)) / (2 * pieces))
