"""Meshes by name, and tables that say which mesh axes cut which logical axis.

A run names one mesh (`mesh.preset`), and one table each for the student's weights, the teacher's weights, the
key/value cache and the batch (`sharding.*`). An axis stays whole if the mesh does not divide it evenly, or if
an earlier axis of the array uses the same mesh axis: experts are cut before their hidden width.
"""

import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

AXES = ("data", "fsdp", "tensor")
SLICES = "slices"  # stands for the number of slices

# Devices along data, fsdp and tensor; -1 takes the devices that are left.
MESHES = {
    "one_chip": (1, 1, 1),
    "one_host": (1, -1, 1),
    "slice": (1, -1, 1),
    "slices": (SLICES, -1, 1),  # on one slice or host, the same as "slice" or "one_host"
    "replicas": (-1, 1, 1),
}

_SPREAD = {"spread_experts": ("fsdp", "tensor")}  # decoding: few tokens, so they move to the experts
_TENSOR = dict.fromkeys(("experts", "heads", "kv_heads", "ffn", "vocab"), "tensor")

WEIGHTS = {
    "fsdp": {"embed": "fsdp", **_TENSOR, **_SPREAD},
    "tensor": {**_TENSOR, **_SPREAD},
    "whole": {},
}
CACHE = {
    "heads": {"cache_heads": "tensor"},
    "slots": {"cache_slots": "tensor"},
}
_ROWS = {"batch": ("data", "fsdp"), "replica": "data"}
BATCH = {
    "rows": _ROWS,
    "positions": {**_ROWS, "positions": "tensor"},
}


class Layout(NamedTuple):
    """Names of the tables that place a model's arrays.

    Attributes:
      weights: a key of WEIGHTS.
      cache: a key of CACHE.
      batch: a key of BATCH.
    """

    weights: str = "fsdp"
    cache: str = "heads"
    batch: str = "rows"

    @property
    def rules(self) -> Mapping[str, str | tuple[str, ...]]:
        """Logical axis -> mesh axis or axes, of all three tables."""
        return _rules(*self)

    def parts(self, axis: str, mesh_shape: Mapping[str, int]) -> int:
        """Number of parts into which a logical axis is cut if it divides evenly."""
        over = self.rules.get(axis, ())
        return math.prod(mesh_shape[name] for name in ((over,) if isinstance(over, str) else over))


DEFAULT = Layout()


@functools.cache
def _rules(weights: str, cache: str, batch: str):
    return MappingProxyType(WEIGHTS[weights] | CACHE[cache] | BATCH[batch])


def mesh_sizes(sizes: Mapping[str, Any], slices: int) -> list[int]:
    """Devices along each of AXES, from a config's `mesh`; its preset fills the zeros."""
    preset = MESHES.get(sizes.get("preset", ""), (0, 0, 0))
    filled = [sizes[axis] or named for axis, named in zip(AXES, preset, strict=True)]
    return [slices if size == SLICES else int(size) for size in filled]
