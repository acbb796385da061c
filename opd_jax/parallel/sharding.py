"""The mesh, and the placement of every array of a run by the tables of `layouts`."""

import functools
import math
import os

import jax
import numpy as np
from jax._src import xla_bridge
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from opd_jax.errors import UserError, reason
from opd_jax.parallel.layouts import AXES, DEFAULT, Layout, mesh_sizes

BATCH = P(("data", "fsdp"))
IN_USE = ("already in use", "libtpu_lockfile", "multi-process lockfile")  # how libtpu says so


def make_mesh(sizes, devices=None) -> Mesh:
    """A mesh with axes data, fsdp and tensor.

    If the devices form several slices, only the data axis crosses them. It needs the least traffic, one sum
    of the gradients per step, and the network between slices is the slowest.

    Args:
      sizes: the config's `mesh`; its preset fills the zeros. At most one size is -1, which takes the devices
        that are left.
      devices: all devices by default.

    Raises:
      UserError: the sizes do not fit the number of devices or slices.
    """
    devices = all_devices() if devices is None else devices
    slices = slice_count(devices)
    shape = mesh_sizes(sizes, slices)
    named = ", ".join(f"mesh.{a}={n}" for a, n in zip(AXES, shape, strict=True))
    known = int(np.prod([n for n in shape if n != -1]))
    if shape.count(-1) > 1 or any(n < 1 and n != -1 for n in shape):
        raise UserError(f"{named}: sizes are 1 or more, and one may be -1")
    if -1 in shape and len(devices) % known == 0:
        shape[shape.index(-1)] = len(devices) // known
    if int(np.prod(shape)) != len(devices):
        raise UserError(
            f"{named} does not fit {len(devices)} devices; set one axis to -1 to take what is left"
        )
    types = (jax.sharding.AxisType.Auto,) * 3
    if slices == 1:  # an axis may use a part of a side of the slice: tensor=2 on 8 x 8 chips
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(grid, AXES, axis_types=types)
    if shape[0] % slices:
        raise UserError(
            f"mesh.data={shape[0]} does not fit {slices} slices, over which it runs; "
            f"use a multiple of {slices}"
        )
    inside = (shape[0] // slices, *shape[1:])
    grid = mesh_utils.create_hybrid_device_mesh(
        inside, (slices, 1, 1), devices, allow_split_physical_axes=True
    )
    return Mesh(grid, AXES, axis_types=types)


def all_devices() -> list:
    """The devices of all processes.

    Raises:
      UserError: JAX cannot use the platform that it is told to, or another process holds the TPU.
    """
    try:
        devices = jax.devices()
        failed = getattr(xla_bridge, "_backend_errors", {}).get("tpu", "")  # where JAX has fallen back to CPU
        if any(text in failed for text in IN_USE):
            raise RuntimeError(failed)
        return devices
    except (RuntimeError, AssertionError) as error:  # the latter is all that a missing CUDA plugin raises
        asked = os.environ.get("JAX_PLATFORMS", "")
        if any(text in str(error) for text in IN_USE):
            raise UserError(
                f"another process holds the TPU ({reason(error)}); end that process, and if there is none,"
                " remove /tmp/libtpu_lockfile"
            ) from error
        raise UserError(
            f"JAX_PLATFORMS={asked}: JAX finds no such device here ({reason(error)}); unset it to take what"
            " there is, install JAX for that platform, or end the process that holds the device"
        ) from error


def slice_count(devices) -> int:
    """Number of TPU slices that the devices belong to; 1 for other devices."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def pieces(mesh: Mesh) -> int:
    """Number of parts into which the mesh cuts the rows of a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(mesh: Mesh, name: str, size: int):
    """Refuses a batch that the mesh cannot cut evenly.

    Raises:
      UserError: names the config key.
    """
    count = pieces(mesh)
    if size % count:
        raise UserError(
            f"{name}={size} cannot be cut over {count} devices (mesh.data x mesh.fsdp); "
            f"use a multiple of {count}, or move devices to mesh.tensor"
        )


def on(mesh: Mesh, fn):
    """fn, traced with the mesh available to `constrain` and `gather_weight`."""

    @functools.wraps(fn)
    def traced(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return fn(*args)

    return traced


def constrain(x, *axes, layout: Layout = DEFAULT):
    """Constrains the sharding of x and of its gradient, by the logical names of the leading axes.

    An axis without a name, or named None, stays whole. Without the constraint the compiler would cut
    activations along the width where a weight is cut, and sum them over the mesh after every product. Outside
    of `on`, x is returned unchanged.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    axes = (*axes, *(None,) * (x.ndim - len(axes)))
    return jax.lax.with_sharding_constraint(x, spec(x.shape, axes, mesh, layout.rules))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gather_weight(weight, axes, layout: Layout = DEFAULT):
    """Gathers a weight along fsdp for a product; its gradient is cut as the stored weight is."""
    axes = (None if layout.rules.get(axis) == "fsdp" else axis for axis in axes)
    return constrain(weight, *axes, layout=layout)


def _gather_weight_backward(axes, layout, _, grad):
    return (constrain(grad, *stored_axes(axes), layout=layout),)


gather_weight.defvjp(lambda *args: (gather_weight(*args), None), _gather_weight_backward)


def stored_axes(axes) -> tuple:
    """Logical axes along which a parameter is cut: none for vectors, which would cost a message per use."""
    return axes if sum(axis != "layers" for axis in axes) > 1 else (None,) * len(axes)


def spec(shape, axes, mesh: Mesh | AbstractMesh, rules=DEFAULT.rules) -> P:
    """PartitionSpec of an array from its logical axes and `Layout.rules`."""
    names, taken = [], set()
    for size, axis in zip(shape, axes, strict=True):
        name = rules.get(axis)
        over = () if name is None else (name,) if isinstance(name, str) else name
        fits = over and taken.isdisjoint(over) and size % math.prod(mesh.shape[n] for n in over) == 0
        names.append(name if fits else None)
        taken.update(over if fits else ())
    return P(*names)


def param_shardings(mesh: Mesh, abstract, axes, rules=DEFAULT.rules):
    """NamedSharding of each parameter.

    Args:
      abstract: tree with shapes, from models.transformer.abstract.
      axes: the same tree with logical axis names, from models.transformer.logical_axes.
    """
    return jax.tree.map(
        lambda a, names: NamedSharding(mesh, spec(a.shape, stored_axes(names), mesh, rules)), abstract, axes
    )


def like_params(mesh: Mesh, abstract_state, params_shardings, memory: str = "device"):
    """Shardings of an optimizer state.

    Subtrees shaped like the parameters are cut like them. The rest is whole.

    Args:
      memory: "device", or "host", which puts those subtrees into the memory of the devices' hosts.
    """
    treedef = jax.tree.structure(params_shardings)
    if memory == "host":
        params_shardings = jax.tree.map(lambda s: s.with_memory_kind("pinned_host"), params_shardings)

    def is_params(node):
        return jax.tree.structure(node) == treedef

    return jax.tree.map(
        lambda node: params_shardings if is_params(node) else replicated(mesh),
        abstract_state,
        is_leaf=is_params,
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """A full copy on every device."""
    return NamedSharding(mesh, P())


def batch(mesh: Mesh) -> NamedSharding:
    """Leading axis cut over data and fsdp."""
    return NamedSharding(mesh, BATCH)


def local_rows(mesh: Mesh, size: int) -> np.ndarray:
    """Indices of the rows of a batch of `size` that this process's devices hold, ascending.

    If devices of several processes share a row (a tensor axis across hosts), each of the processes has it.
    """
    pieces = mesh.devices.reshape(-1, mesh.shape["tensor"])
    here = [any(d.process_index == jax.process_index() for d in piece) for piece in pieces]
    return np.flatnonzero(np.repeat(here, size // len(here)))


def key(mesh: Mesh, seed: int, purpose: int) -> jax.Array:
    """A PRNG key from a seed for one purpose, the same on every device."""
    with jax.transfer_guard("allow"):  # a seed is a host number
        made = jax.random.fold_in(jax.random.key(seed), purpose)
        # As plain words, because a key array cannot be put onto devices of other processes.
        words = jax.device_get(jax.random.key_data(made))
        return jax.random.wrap_key_data(jax.device_put(words, replicated(mesh)))


def put_batch(mesh: Mesh, local):
    """Makes global arrays from the NumPy `local_rows` of each process."""
    # With several processes JAX counts this transfer as implicit.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(batch(mesh), np.asarray(x)), local
        )


def gather(mesh: Mesh, tree):
    """Whole NumPy copies of sharded arrays on every host. For small arrays."""
    return jax.device_get(_everywhere(mesh)(tree))


def local_values(tree):
    """NumPy copies of this process's rows of batch-sharded arrays, in the order `put_batch` took them."""
    return jax.tree.map(_local_values, tree)


def _local_values(x):
    shards = {s.index[0].start or 0: s.data for s in x.addressable_shards}  # replicas have one start
    return np.concatenate(jax.device_get([shards[start] for start in sorted(shards)]))


def first_rows(mesh: Mesh, tree, rows: int):
    """The first rows of batch-sharded arrays, replicated over the mesh, without a transfer to the host."""
    return _first_rows(mesh, rows)(tree)


@functools.cache
def _everywhere(mesh: Mesh):
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


@functools.cache
def _first_rows(mesh: Mesh, rows: int):
    return jax.jit(lambda t: jax.tree.map(lambda x: x[:rows], t), out_shardings=replicated(mesh))
