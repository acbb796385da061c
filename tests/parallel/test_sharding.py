"""Meshes, placement rules, and gradients that do not depend on where arrays live."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax._src import xla_bridge
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from opd_jax.distill import Loss, LossInputs, Rollouts, objectives
from opd_jax.errors import UserError
from opd_jax.models import transformer
from opd_jax.parallel import compile_cache, layouts, sharding
from tests import tiny

MODEL = tiny.STUDENT.replace(
    family="qwen2",
    attention_bias=True,
    vocab_size=66,
    valid_vocab=66,
    kv_heads=1,  # does not divide over mesh.tensor=2
    tie_embeddings=False,
    eos_ids=(),
    pad_id=0,
)


def sizes(data, fsdp, tensor):
    return {"data": data, "fsdp": fsdp, "tensor": tensor}


def cube():
    return sharding.make_mesh(sizes(2, 2, 2))


def weight_shardings(mesh):
    return sharding.param_shardings(mesh, transformer.abstract(MODEL), transformer.logical_axes(MODEL))


@pytest.mark.parametrize(
    "asked, shape",
    [((8, 1, 1), (8, 1, 1)), ((-1, 2, 2), (2, 2, 2)), ((1, -1, 1), (1, 8, 1)), ((2, 4, -1), (2, 4, 1))],
)
def test_one_size_of_minus_one_takes_the_devices_that_are_left(asked, shape):
    mesh = sharding.make_mesh(sizes(*asked))
    assert tuple(mesh.shape.items()) == tuple(zip(("data", "fsdp", "tensor"), shape))


def test_a_mesh_of_given_devices_uses_those_alone():
    devices = jax.devices()[2:4]
    mesh = sharding.make_mesh(sizes(1, -1, 1), devices)
    assert list(mesh.devices.flat) == devices


@pytest.mark.parametrize(
    "asked, problem",
    [
        ((3, 1, 1), "does not fit 8 devices"),
        ((3, -1, 1), "does not fit 8 devices"),
        ((16, -1, 1), "does not fit 8 devices"),
        ((-1, -1, 1), "one may be -1"),
        ((0, -1, 1), "1 or more"),
        ((-2, 2, 2), "1 or more"),
        ((-2, -2, 2), "1 or more"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_one_line_that_names_the_keys(asked, problem):
    with pytest.raises(UserError) as error:
        sharding.make_mesh(sizes(*asked))
    message = str(error.value)
    assert problem in message and "\n" not in message
    assert "mesh.data={}, mesh.fsdp={}, mesh.tensor={}".format(*asked) in message


# What libtpu says, through JAX.
HELD = (
    "Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process with pid 4711. Not"
    " attempting to load libtpu.so in this process. (set JAX_PLATFORMS='' to choose an available backend)",
    "Unable to initialize backend 'tpu': ABORTED: Internal error when accessing libtpu multi-process"
    ' lockfile. Run "$ sudo rm /tmp/libtpu_lockfile".\nmore lines',
)


@pytest.mark.parametrize("said", HELD)
@pytest.mark.parametrize("falls_back", [False, True])
def test_a_tpu_that_another_process_holds_is_one_line_before_anything_else(monkeypatch, said, falls_back):
    """Without JAX_PLATFORMS JAX goes on with the CPU and keeps libtpu's words to itself."""

    def devices():
        raise RuntimeError(said)

    if falls_back:
        monkeypatch.setitem(xla_bridge._backend_errors, "tpu", said.partition(": ")[2])
    else:
        monkeypatch.setattr(jax, "devices", devices)
    cache = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        for ask in (sharding.all_devices, lambda: compile_cache.enable("auto")):
            with pytest.raises(UserError, match="another process holds the TPU") as caught:
                ask()
            assert said.partition("ABORTED: ")[2][:40] in str(caught.value)
            assert "remove /tmp/libtpu_lockfile" in str(caught.value)
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)


def test_a_batch_that_the_mesh_cannot_cut_is_refused_with_its_config_key():
    sharding.check_batch(cube(), "train.micro_batch", 8)
    with pytest.raises(UserError, match=r"train\.micro_batch=6 .* 4 devices .* multiple of 4"):
        sharding.check_batch(cube(), "train.micro_batch", 6)


def test_spec_follows_the_rules_and_leaves_axes_whole_that_do_not_divide():
    mesh = cube()
    assert sharding.spec((64, 32), ("vocab", "embed"), mesh) == P("tensor", "fsdp")
    assert sharding.spec((65, 32), ("vocab", "embed"), mesh) == P(None, "fsdp")
    assert sharding.spec((2, 32, 1, 8), ("layers", "embed", "kv_heads", "head_size"), mesh) == P(
        None, "fsdp", None, None
    )


def test_a_mesh_axis_cuts_experts_before_their_hidden_width_and_never_two_axes():
    mesh, axes = cube(), ("experts", "embed", "ffn")
    assert sharding.spec((6, 4, 8), axes, mesh) == P("tensor", "fsdp", None)
    assert sharding.spec((5, 4, 8), axes, mesh) == P(None, "fsdp", "tensor")
    assert sharding.spec((4, 4), ("batch", "embed"), mesh) == P(("data", "fsdp"), None)


def test_spec_takes_other_rules_than_the_table():
    assert sharding.spec((4, 6), ("embed", "ffn"), cube(), {"ffn": "data"}) == P(None, "data")


def test_every_parameter_gets_a_sharding_that_cuts_it_evenly():
    mesh, abstract = cube(), transformer.abstract(MODEL)
    shardings = weight_shardings(mesh)
    pieces = jax.tree.map(lambda a, s: s.shard_shape(a.shape), abstract, shardings)
    assert pieces["embedding"] == (33, 16)
    assert pieces["blocks"]["query"] == (2, 16, 2, 8)
    assert pieces["blocks"]["key"] == (2, 16, 1, 8)
    assert pieces["blocks"]["down"] == (2, 24, 16)


def test_optimizer_moments_lie_like_the_parameters_and_counters_everywhere():
    mesh = cube()
    params = transformer.abstract(MODEL)
    state = jax.eval_shape(optax.adamw(1e-3).init, params)
    shardings = sharding.like_params(mesh, state, weight_shardings(mesh))
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    assert shardings[0].mu == weight_shardings(mesh)
    assert shardings[0].nu == weight_shardings(mesh)
    assert shardings[0].count == sharding.replicated(mesh)


def test_put_batch_cuts_rows_over_data_and_fsdp_and_gather_brings_them_back():
    mesh = cube()
    local = {"a_BT": np.arange(24).reshape(8, 3), "b_B": np.arange(8) > 3}
    placed = sharding.put_batch(mesh, local)
    assert placed["a_BT"].sharding == NamedSharding(mesh, P(("data", "fsdp")))
    assert {s.data.shape for s in placed["a_BT"].addressable_shards} == {(2, 3)}
    back = sharding.gather(mesh, placed)
    assert all(isinstance(x, np.ndarray) for x in back.values())
    jax.tree.map(np.testing.assert_array_equal, back, local)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What make_mesh and local_rows look at in a device."""

    id: int
    process_index: int
    slice_index: int = 0
    platform: str = "none"
    device_kind: str = "none"


@pytest.mark.parametrize(
    ("shape", "process_of_chip", "rows"),
    [
        ((8, 1), [0, 0, 1, 1, 2, 2, 3, 3], [8, 9, 10, 11]),
        # A torus wound so that the chips of a host do not follow each other.
        ((8, 1), [0, 1, 0, 2, 1, 3, 2, 3], [6, 7, 12, 13]),
        # Four chips of two hosts hold each row together.
        ((2, 4), [0, 0, 1, 1, 2, 2, 3, 3], list(range(8, 16))),
    ],
)
def test_a_process_reads_the_rows_that_its_devices_hold(monkeypatch, shape, process_of_chip, rows):
    monkeypatch.setattr(jax, "process_index", lambda: 2)
    chips = np.array([Chip(n, process) for n, process in enumerate(process_of_chip)])
    mesh = Mesh(chips.reshape(1, *shape), sharding.AXES)
    assert sharding.local_rows(mesh, 16).tolist() == rows


@pytest.mark.parametrize(
    ("preset", "count", "slices", "shape"),
    [
        ("one_chip", 1, 1, (1, 1, 1)),
        ("one_host", 4, 1, (1, 4, 1)),
        ("slice", 16, 1, (1, 16, 1)),
        ("slices", 16, 1, (1, 16, 1)),
        ("slices", 16, 2, (2, 8, 1)),
        ("replicas", 16, 1, (16, 1, 1)),
    ],
)
def test_a_preset_is_a_mesh_of_one_chip_one_host_a_slice_or_several(preset, count, slices, shape):
    chips = [Chip(n, n // 4, slice_index=n * slices // count) for n in range(count)]
    asked = {"preset": preset} | sizes(0, 0, 0)
    assert sharding.make_mesh(asked, chips).devices.shape == shape


def test_a_size_that_is_given_replaces_the_presets():
    chips = [Chip(n, n // 4, slice_index=n // 8) for n in range(16)]
    mesh = sharding.make_mesh({"preset": "slices"} | sizes(0, 0, 4), chips)
    assert mesh.devices.shape == (2, 2, 4)


@pytest.mark.parametrize(
    ("layout", "query", "down", "experts"),
    [
        (("fsdp",), P(None, "fsdp", "tensor", None), P(None, "tensor", "fsdp"), P("tensor", "fsdp", None)),
        (("tensor",), P(None, None, "tensor", None), P(None, "tensor", None), P("tensor", None, None)),
        (("whole",), P(None, None, None, None), P(None, None, None), P(None, None, None)),
    ],
)
def test_each_table_of_weights_cuts_what_its_name_says(layout, query, down, experts):
    rules, mesh = layouts.Layout(*layout).rules, cube()
    axes = {"query": ("layers", "embed", "heads", "head_size"), "down": ("layers", "ffn", "embed")}
    assert sharding.spec((2, 32, 4, 8), axes["query"], mesh, rules) == query
    assert sharding.spec((2, 48, 32), axes["down"], mesh, rules) == down
    assert sharding.spec((8, 32, 16), ("experts", "embed", "ffn"), mesh, rules) == experts


def test_the_cache_is_cut_by_heads_or_slots_and_activations_by_rows_or_positions():
    mesh, keys = cube(), ("batch", "cache_heads", None, "cache_slots")
    rows = ("data", "fsdp")
    by_cache = {"heads": P(rows, "tensor", None, None), "slots": P(rows, None, None, "tensor")}
    for cache, found in by_cache.items():
        assert sharding.spec((8, 2, 8, 32), keys, mesh, layouts.Layout(cache=cache).rules) == found
    for batch, found in {"rows": P(rows, None, None), "positions": P(rows, "tensor", None)}.items():
        table = layouts.Layout(batch=batch).rules
        assert sharding.spec((8, 12, 32), ("batch", "positions", None), mesh, table) == found


def test_of_several_slices_only_the_data_axis_leaves_one():
    chips = [Chip(n, n // 2, slice_index=n % 2) for n in range(16)]
    mesh = sharding.make_mesh(sizes(4, 2, -1), chips)
    assert mesh.devices.shape == (4, 2, 2)
    slice_of = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    assert slice_of.reshape(4, -1).tolist() == [[0] * 4, [0] * 4, [1] * 4, [1] * 4]


def test_an_axis_may_take_a_part_of_a_side_of_the_slice():
    @dataclasses.dataclass(frozen=True)
    class Placed(Chip):
        coords: tuple[int, int, int] = (0, 0, 0)
        core_on_chip: int = 0

    kind = {"platform": "tpu", "device_kind": "TPU v6 lite"}
    chips = [Placed(n, n // 4, coords=(n % 8, n // 8, 0), **kind) for n in range(64)]
    mesh = sharding.make_mesh(sizes(1, -1, 2), chips)
    assert mesh.devices.shape == (1, 32, 2)
    for one, other in mesh.devices[0]:
        assert np.abs(np.subtract(one.coords, other.coords)).sum() == 1, "partners are neighbours"


def test_slices_over_which_the_data_axis_does_not_go_evenly_are_refused():
    chips = [Chip(n, n // 2, slice_index=n // 4) for n in range(8)]
    with pytest.raises(UserError, match="mesh.data=1 does not fit 2 slices.*multiple of 2"):
        sharding.make_mesh(sizes(1, -1, 1), chips)


def test_first_rows_are_replicated_and_in_order():
    mesh = cube()
    x_BT = np.arange(24).reshape(8, 3)
    first = sharding.first_rows(mesh, sharding.put_batch(mesh, {"x": x_BT}), 5)["x"]
    assert first.sharding.is_fully_replicated
    np.testing.assert_array_equal(first, x_BT[:5])


def test_the_policy_gradient_on_a_mesh_equals_that_on_one_device():
    b, p, t = 8, 4, 9
    rng = np.random.default_rng(0)

    params = tiny.weights(MODEL)
    mask_BT = np.arange(t)[None] < rng.integers(1, t + 1, (b, 1))
    zeros_BT = np.zeros((b, t), np.float32)
    rollouts = Rollouts(
        tokens_BL=rng.integers(0, 66, (b, p + t)).astype(np.int32),
        prompt_mask_BP=np.arange(p)[None] >= rng.integers(0, p, (b, 1)),
        mask_BT=mask_BT,
        logp_BT=zeros_BT,
        behaviour_logp_BT=zeros_BT,
        topk_BTK=np.zeros((b, t, 4), np.int32),
        topk_logp_BTK=np.zeros((b, t, 4), np.float32),
        stop_BT=zeros_BT,
        finished_B=np.zeros(b, bool),
    )
    batch = rollouts, rng.normal(size=(b, t)).astype(np.float32), mask_BT.astype(np.float32)

    def value_and_grad(params, batch):
        def total(params):
            summed = Loss("policy_gradient", objectives.Options(), MODEL, None, chunk=4)
            return summed(params, LossInputs(*batch), {}, None, 1.0)[0]

        return jax.value_and_grad(total)(params)

    want_value, want = jax.jit(value_and_grad)(jax.tree.map(jnp.asarray, params), batch)
    mesh = cube()
    weights = weight_shardings(mesh)
    on_mesh = jax.jit(
        sharding.on(mesh, value_and_grad),
        in_shardings=(weights, sharding.batch(mesh)),
        out_shardings=(sharding.replicated(mesh), weights),
    )
    value, grads = on_mesh(params, batch)
    np.testing.assert_allclose(value, want_value, rtol=1e-5)
    assert grads["embedding"].sharding.shard_shape((66, 32)) == (33, 16)

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())

    jax.tree.map(close, grads, want)
