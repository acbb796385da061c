"""TPU topologies by name: devices of slices that are not attached, and the specifications of their chips."""

import dataclasses
import importlib.util
import math
import os
import re

import jax

from opd_jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device of a slice: a chip, or one of the two halves of a tpu7x chip.

    Attributes:
      flops: peak bfloat16 FLOP/s.
      hbm_bytes: memory that the compiler lets a program use.
      hbm_bandwidth: bytes per second.
      link_bandwidth: bytes per second of one inter-chip link in one direction.
      network_bandwidth: bytes per second of its share of the hosts' network, which joins slices.
      host_bandwidth: bytes per second between its memory and its host's, in one direction.
      dimensions: of the torus that the links form.
      devices: devices per chip.
    """

    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    dimensions: int
    devices: int = 1
    host_bandwidth: float = 15e9


# Peaks: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x} and jax-ml.github.io/scaling-book/tpus (links);
# Network: from the former (v5e and v6e: a pod's network divided by its 256 chips); v4 is assumed to have
# v5p's. Bus to the host: the latter's number for v6e, assumed for all. Memory: what the compiler of libtpu
# 0.0.42 reports as available.
CHIPS = {
    "v4": Chip(275e12, int(30.75 * GIB), 1.2e12, 45e9, 6.25e9, 3),
    "v5e": Chip(197e12, int(15.75 * GIB), 0.819e12, 45e9, 3.125e9, 2),
    "v5p": Chip(459e12, int(95.74 * GIB), 2.765e12, 90e9, 6.25e9, 3),
    "v6e": Chip(918e12, int(31.25 * GIB), 1.638e12, 90e9, 12.5e9, 2),
    "tpu7x": Chip(2307e12 / 2, int(94.75 * GIB), 7.38e12 / 2, 90e9, 12.5e9 / 2, 3, devices=2),
}


def describe(name: str) -> tuple[Chip, list]:
    """(the chip, the devices) of a topology such as v5e:4x4 or v5p:4x4x4, or of two such slices, 2xv5e:4x4.

    The devices are only described, not attached.

    Raises:
      UserError: the name is unknown, no slice has the shape, or this machine has no TPU compiler.
    """
    several = re.fullmatch(r"([1-9]\d*)x([a-z].*)", name)
    slices, one = (int(several[1]), several[2]) if several else (1, name)
    kind, _, shape = one.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise UserError(f"--topology={name} is not KIND:SHAPE with a kind of {', '.join(CHIPS)}; try v5e:4x4")
    chip = CHIPS[kind]
    sides = [int(side) for side in shape.split("x")]
    if len(sides) != chip.dimensions:
        example = "x".join(["4"] * chip.dimensions)
        raise UserError(f"--topology={name}: {kind} slices have {chip.dimensions} sides, as {kind}:{example}")
    hosts = (2, 2, 1)
    partial = any(side % host for side, host in zip(sides, hosts))  # less than a whole host
    if partial and math.prod(sides) > 4:
        raise UserError(f"--topology={name}: sides of more than one host are even; try {kind}:4x4")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("the TPU compiler is not installed; pip install 'opd_jax[tpu]'")
    from jax.experimental import topologies

    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no device is used, so no lock is needed
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")  # not used: the topology's name decides
    options = {}
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # the two cores of a chip are one device
    if partial:
        options["chips_per_host_bounds"] = (*sides, 1)[:3]
    try:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=one, num_slices=slices, **options
        ).devices
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--topology={name} cannot be described ({reason}); try {kind}:2x2") from error
    return chip, devices
