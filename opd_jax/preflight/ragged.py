"""The predicted time of a step with responses of given lengths, from the report of a full-length step.

A program takes the longest of compute, HBM, links and network, as at full length. Each is scaled by what the
rows cost at their lengths: decode steps by the rows that are left and the slots that they have written,
scoring and the gradient by the micro-batches that are left when rows are packed (every token supervised,
every prompt of full length).
"""

import dataclasses

import numpy as np

from opd_jax.parallel import sharding
from opd_jax.preflight import costs, lengths
from opd_jax.preflight.reports import ProgramReport, Ragged, StepReport
from opd_jax.run import programs


def of(plan: programs.Programs, report: StepReport, length_B: np.ndarray) -> Ragged:
    """Predicts a step with these lengths.

    Args:
      plan: the programs that `report` is of.
      report: as `check.check` returns it.
      length_B: tokens of each response of a batch.
    """
    sample, train = report.programs[:2]
    return Ragged(
        mean_tokens=float(length_B.mean()),
        full=[sample.seconds, train.seconds],
        written=[_sample(plan, sample, length_B), _train(plan, train, length_B)],
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

    def products(decoded: list[costs.Stretch]) -> int:
        prompts = batch.rows // samples
        total = prompts * p * writer.matmul_flops_per_token(head=False)
        total += prompts * costs.attention_flops(writer, 0, p)
        for rows, steps, slots in decoded:
            attention = costs.attention_flops(writer, int(slots) - 1, 1)
            total += rows * steps * (writer.matmul_flops_per_token(head=True) + attention)
        return total

    def moved(decoded: list[costs.Stretch]) -> int:
        return costs.sample_bytes(writer, batch, decoded, samples, c.rollout.cache_dtype == "int8")

    full, now = decoded(np.full_like(length_B, t)), decoded(length_B)
    if padded:
        now = [costs.Stretch(batch.rows, int(length_B.max()) - 1, p + t)]
    sent = [sum(rows * steps for rows, steps, _ in each) for each in (now, full)]
    return _seconds(report, products(now) / products(full), moved(now) / moved(full), sent[0] / sent[1])


def _train(plan, report: ProgramReport, length_B: np.ndarray) -> float:
    """Seconds of train_step."""
    c, devices = plan.config, sharding.pieces(plan.mesh)
    p, t, pieces = c.data.prompt_tokens, c.rollout.max_tokens, lengths.micro_batches(c)
    packed = lengths.packed(c, devices, length_B)
    batch = costs.MicroBatch(c.train.micro_batch // devices, p, t, plan.mesh.shape, pieces)
    updates = c.train.updates_per_rollout

    flops = costs.phase_flops(plan.student, plan.teacher, c.rollout.batch, p, t)
    whole = flops["score"] + updates * flops["update"]
    models = (plan.teacher, 1), (plan.student, 3 * updates)
    head = sum(2 * passes * c.rollout.batch * t * m.vocab_size * m.width for m, passes in models)
    computed = len(packed) / pieces
    of_head = sum(packed) / (pieces * lengths.chunks(c))
    products = (whole - head) / whole * computed + head / whole * of_head

    def moved(pieces: int) -> int:
        own = dataclasses.replace(batch, pieces=pieces)
        return costs.train_bytes(plan.student, plan.teacher, own, mu_bytes=4)

    return _seconds(report, products, moved(len(packed)) / moved(pieces), computed)
