"""Compiles a run for one slice with different meshes and micro-batches, and ranks them."""

import copy
from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from opd_jax.errors import UserError
from opd_jax.parallel import sharding
from opd_jax.preflight import check, reports, topology
from opd_jax.preflight.build import Built, built
from opd_jax.run import Programs


def search(
    config: ConfigDict,
    devices: list,
    chip: topology.Chip,
    planned: Callable[[ConfigDict, list], Programs],
    tell: Callable[[str], None] = lambda line: None,
    build: Callable[..., Built] = built,
) -> list[tuple[dict[str, int], int, reports.StepReport]]:
    """Compiles all programs over mesh shapes and micro-batches.

    On each mesh it tries micro-batches of 1, 2, 4 ... rollouts per device, up to the first that does not
    pass. mesh.data is the number of slices.

    Args:
      planned: (config, devices) -> Programs.
      tell: called with a line about each mesh and micro-batch that was compiled, or was not and why.
      build: compiles a program, as `build.built` does.

    Returns:
      [(mesh sizes, micro-batch, StepReport)]: first those that pass, the fastest first.
    """
    found = []
    count, slices = len(devices), sharding.slice_count(devices)
    for tensor in (n for n in (1, 2, 4, 8) if count // slices % n == 0):
        pieces = count // tensor
        if config.rollout.batch // config.rollout.samples_per_prompt % pieces:
            tell(f"mesh.tensor={tensor}: the prompts cannot be cut over {pieces} devices")
            continue
        micro_batch, sampled = pieces, None
        while config.rollout.batch % micro_batch == 0 and micro_batch <= config.rollout.batch:
            tried = copy.deepcopy(config)
            with tried.unlocked():
                tried.mesh.data, tried.mesh.fsdp, tried.mesh.tensor = slices, pieces // slices, tensor
                tried.train.micro_batch = micro_batch
            try:
                plan = planned(tried, devices)
            except UserError as error:
                tell(f"mesh.tensor={tensor}: {error}")
                break
            sampled = check.samplers(plan, chip, build) if sampled is None else sampled
            report = check.check(plan, chip, largest=False, sampled=sampled, build=build)
            found.append((dict(plan.mesh.shape), micro_batch, report))
            verdict = f"{report.seconds:.3g} s a step" if report.ok else "does not pass"
            tell(f"mesh.tensor={tensor}, train.micro_batch={micro_batch}: {verdict}")
            jax.clear_caches()  # otherwise all compiled programs stay in memory, half a gigabyte each
            if not report.ok:
                break
            micro_batch *= 2
    return sorted(found, key=lambda item: (not item[2].ok, item[2].seconds))
