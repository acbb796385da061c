"""What only the TPU compiler can say, which needs no TPU: described slices, and small programs compiled."""

import importlib
import json
import re
from pathlib import Path

import pytest

from opd_jax.parallel import sharding
from opd_jax.preflight import build as preflight_build
from opd_jax.preflight import check as preflight_check
from opd_jax.preflight import hlo, topology
from opd_jax.preflight import plan as preflight
from tests import tiny

pytestmark = pytest.mark.usefixtures("tpu_compiler")

RECIPES = {
    path.stem: re.findall(r"opd_jax\.preflight --config=\S+ --topology=(\S+)", path.read_text())
    for path in sorted((Path(__file__).parents[2] / "configs").glob("*.py"))
    if '.path = "preset:' in path.read_text()  # models of a pod; the others run on a CPU
}
# The pair of one_chip.py at its smallest: two blocks teach two, of the same widths and vocabulary.
SMALL = (
    "--config=configs/one_chip.py",
    "--config.student.drop_layers=" + str(tuple(range(26))),
    "--config.teacher.path=preset:Qwen3-0.6B",
    "--config.rollout.max_tokens=128",
    "--config.data.prompt_tokens=64",
    "--config.scoring.chunk=32",
    "--config.rollout.halvings=0",
)


@pytest.mark.parametrize(
    ("slice_", "kind", "devices"),
    [
        ("v4:1x1x1", "TPU v4", 1),
        ("v4:2x2x4", "TPU v4", 16),
        ("v5e:1x1", "TPU v5 lite", 1),
        ("v5e:2x4", "TPU v5 lite", 8),
        ("v5e:16x16", "TPU v5 lite", 256),
        ("v5p:1x1x1", "TPU v5", 1),
        ("v5p:2x2x1", "TPU v5", 4),
        ("v5p:4x4x8", "TPU v5", 128),
        ("v6e:1x1", "TPU v6 lite", 1),
        ("v6e:8x8", "TPU v6 lite", 64),
        ("tpu7x:1x1x1", "TPU7x", 2),
        ("tpu7x:2x2x2", "TPU7x", 16),
        ("2xtpu7x:2x2x1", "TPU7x", 16),
    ],
)
def test_every_kind_of_slice_is_described_from_one_chip_up(slice_, kind, devices):
    _, found = topology.describe(slice_)
    assert (found[0].device_kind, len(found)) == (kind, devices)


def test_two_slices_are_described_with_the_data_axis_across_them():
    _, devices = topology.describe("2xv5e:2x2")
    mesh = sharding.make_mesh({"data": 2, "fsdp": -1, "tensor": 1}, devices)
    assert [[d.slice_index for d in row.flat] for row in mesh.devices] == [[0] * 4, [1] * 4]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_can_be_planned_on_the_devices_of_its_slices_and_names_its_launch_line(name):
    recipe = importlib.import_module(f"configs.{name}")
    assert RECIPES[name], "the docstring names a slice"
    for slice_ in RECIPES[name]:
        config = recipe.get_config()
        micro_batch = config.train.micro_batch
        plan = preflight.plan(config, topology.describe(slice_)[1])
        assert plan.config.train.micro_batch == micro_batch, "each device has a row of a micro-batch"
    assert f"opd_jax.train --config=configs/{name}.py" in recipe.__doc__


def test_a_small_step_compiles_for_a_tpu_without_host_transfers_or_whole_logits():
    out = tiny.entry(
        *("opd_jax.preflight", *SMALL, "--topology=v5e:2x2", "--json", "--nolargest"),
        *("--config.rollout.batch=8", "--config.train.micro_batch=4"),
    )
    assert out.returncode == 0, out.stdout + out.stderr
    found = json.loads(out.stdout)
    assert [program["name"] for program in found["programs"]] == ["sample", "train_step", "evaluation"]
    assert found["ok"] and all(program["faults"] == [] for program in found["programs"])
    assert all(program["peak"] > program["arguments"] > 0 for program in found["programs"])
    train = found["programs"][1]
    operations, size = train["release"]
    assert 0 < operations < 0.01 * train["program_flops"] and 0 < size < 0.01 * train["bytes"]
    assert "all-gather" in train["collectives"]


@pytest.mark.parametrize("updates", [1, 2])
def test_moments_in_the_hosts_memory_are_fetched_and_returned_once_an_update(models, updates):
    chip, devices = topology.describe("v5e:2x2")
    # With the splash kernel a head's 8 channels are 128, and two such heads look like the tiny vocabulary.
    settings = {"mesh.tensor": 2, "train.updates_per_rollout": updates, "attention.kernel": "plain"}
    plans = [
        preflight.plan(tiny.config(models, **settings, **{"optimizer.memory": memory}), devices)
        for memory in ("device", "host")
    ]
    texts = []

    def build(traced, name):
        made = preflight_build.built(traced, name)
        texts.append(made.text)
        return made

    here, there = (preflight_check.train_step(plan, chip, build) for plan in plans)
    assert not here.faults and not there.faults
    assert here.host == here.host_seconds == 0
    moments = [preflight_check.held_bytes(plan)["optimizer state"] for plan in plans]
    moved = moments[0] - moments[1]
    assert moved > 0.99 * moments[0]
    assert there.host == here.arguments - there.arguments >= moved  # padded to tiles
    assert there.host_seconds == 2 * updates * moved / chip.host_bandwidth
    assert there.seconds == max(there.compute_seconds, there.memory_seconds, there.link_seconds) + (
        there.host_seconds
    )
    # In the branch that waits for the whole gradient, and nowhere else.
    program = hlo.Program(texts[1])
    copying = {
        name
        for name, lines in program.computations.items()
        if any(line.opcode == "copy-start" and {a.space for a in line.arrays} > {5} for line in lines)
    }
    pattern = r"(?:true|false)_computation=%?([^\s,})]+)|branch_computations=\{([^}]*)\}"
    branches = re.findall(pattern, texts[1])
    named = {name.strip().lstrip("%") for pair in branches for part in pair for name in part.split(",")}
    assert copying and copying <= named


def test_two_slices_exchange_a_few_copies_of_the_gradient_a_step_and_it_counts_as_network(models):
    chip, devices = topology.describe("2xv5e:2x2")
    plan = preflight.plan(tiny.config(models, **{"train.micro_batch": 8}), devices)
    assert dict(plan.mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    found = preflight_check.train_step(plan, chip)
    assert found.fits and not any("host" in fault for fault in found.faults)
    _, size, sent = found.collectives["between slices"]
    gradient = 4 * tiny.STUDENT.parameter_count() // 4  # float32, a device's part of its slice's
    assert gradient / 2 < size < 10 * gradient
    assert sent == size and found.network_seconds == sent / chip.network_bandwidth
