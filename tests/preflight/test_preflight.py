"""Preflight: what it counts, what it refuses, and one small program compiled for a real TPU topology."""

import dataclasses
import importlib
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs import small_pod
from opd_jax import config
from opd_jax.errors import UserError
from opd_jax.models import splash, transformer
from opd_jax.models.files import presets, source
from opd_jax.parallel import sharding
from opd_jax.preflight import build as preflight_build
from opd_jax.preflight import check as preflight_check
from opd_jax.preflight import costs, hlo, jaxprs, lengths, passes, ragged, reports, topology
from opd_jax.preflight import dump as preflight_dump
from opd_jax.preflight import plan as preflight
from opd_jax.preflight import search as preflight_search
from opd_jax.preflight import table as preflight_table
from tests import tiny

CHIP = topology.CHIPS["v5e"]

ALWAYS = [costs.Stretch(rows=8, steps=32, slots=16 + 32)]
ALONE = {"data": 1, "fsdp": 1, "tensor": 1}


def compiled(fn, *arguments, **options):
    """hlo.Program of a function."""
    return hlo.Program(jax.jit(fn, **options).lower(*arguments).compile().as_text())


def planned(models, *, devices, **overrides):
    """Programs of the tiny pair on so many CPU devices, cut over fsdp."""
    config = tiny.config(models, **{"rollout.batch": 16, "train.micro_batch": 8} | overrides)
    return preflight.plan(config, jax.devices()[:devices])


@pytest.fixture(scope="module")
def report(models):
    """The report of a sound step on eight devices."""
    return preflight_check.check(planned(models, devices=8), CHIP, largest=False)


# ---- Presets and topologies.


@pytest.mark.parametrize(
    ("name", "parameters"),  # as the model cards' weight files have them, a tied head once
    [
        ("Qwen3-0.6B", 596_049_920),
        ("Qwen3-1.7B", 1_720_574_976),
        ("Qwen3-4B", 4_022_468_096),
        ("Qwen3-8B", 8_190_735_360),
        ("Qwen3-14B", 14_768_307_200),
        ("Qwen3-32B", 32_762_123_264),
        ("Qwen3-30B-A3B", 30_532_122_624),
    ],
)
def test_a_preset_has_the_published_number_of_parameters(name, parameters):
    model = source.config(f"preset:{name}")
    assert model.parameter_count() == parameters
    declared = jax.tree.leaves(transformer.abstract(model))
    assert sum(leaf.size for leaf in declared) == parameters


def test_every_preset_has_room_for_its_tokens():
    for name in presets.PRESETS:
        model = presets.read_config(name)
        assert max(model.eos_ids) < model.valid_vocab <= model.vocab_size


def test_a_preset_cannot_be_loaded_and_an_unknown_one_is_refused_by_name():
    with pytest.raises(UserError, match=r"student\.path=preset:Qwen3-8B has shapes and no weights"):
        source.load("preset:Qwen3-8B")
    with pytest.raises(UserError, match=r"teacher\.path=preset:Qwen9: no such preset; use one of Qwen3"):
        source.config("preset:Qwen9", "teacher.path")


@pytest.mark.parametrize(
    "name", ["v9:4x4", "v5e", "v5e:4", "v5e:4x4x4", "v5p:4x4", "v5e:0x4", "v5e:4xfour", "v5e:3x5", "4x4"]
)
def test_a_wrong_topology_is_a_one_line_error(name):
    with pytest.raises(UserError, match=f"^--topology={name}") as error:
        topology.describe(name)
    assert "\n" not in str(error.value)


def test_without_the_compiler_a_right_topology_names_what_to_install(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"compiler is not installed; pip install 'opd_jax\[tpu\]'"):
        topology.describe("v5e:4x4")


# ---- Counting.


def test_matrix_products_are_counted_as_often_as_loops_run_them():
    a, b = jnp.ones((3, 4)), jnp.ones((4, 4))

    def loops(a, b):
        five = jax.lax.scan(lambda x, _: (x @ b, None), a, length=5)[0]
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: jax.checkpoint(jnp.dot)(x, b), five)

    once = 2 * 3 * 4 * 4
    assert jaxprs.matmul_flops(jax.make_jaxpr(loops)(a, b).jaxpr, unknown_trips=7) == (5 + 7) * once


def test_counted_flops_of_a_forward_pass_are_the_compilers():
    model, rows, length = tiny.STUDENT.replace(layers=1), 2, 24
    arguments = (transformer.abstract(model), *_tokens(rows, length))

    def logits(params, tokens_BL, mask_BL):
        hidden_BLD = transformer.forward(model, params, tokens_BL, mask_BL)
        return transformer.logits(model, transformer.head(model, params), hidden_BLD)

    traced = jax.jit(logits).trace(*arguments)
    counted = jaxprs.matmul_flops(traced.jaxpr.jaxpr)
    formula = rows * length * model.matmul_flops_per_token(head=True)
    formula += rows * 4 * length**2 * model.heads * model.head_size  # plain attention masks half of it
    assert counted == formula
    theirs = traced.lower().compile().cost_analysis()["flops"]
    assert counted < theirs < 1.5 * counted, "theirs has the elementwise operations as well"


SPARSE = tiny.STUDENT.replace(
    family="qwen3_moe",
    experts=8,
    experts_per_token=2,
    normalise_experts=True,
    layers=1,
    compute_dtype="bfloat16",
)


def test_a_sparse_models_flops_are_those_of_the_chosen_experts_forward_and_backward():
    rows, length = 8, 6

    def loss(params, tokens_BL, mask_BL):
        return transformer.forward(SPARSE, params, tokens_BL, mask_BL).sum()

    mesh = sharding.make_mesh({"data": 2, "fsdp": 4, "tensor": 1})
    attention = 4 * length**2 * SPARSE.heads * SPARSE.head_size
    one_pass = rows * (length * SPARSE.matmul_flops_per_token(head=False) + attention)
    arguments = transformer.abstract(SPARSE), *_tokens(rows, length)
    for fn in (loss, sharding.on(mesh, loss)):
        assert jaxprs.matmul_flops(jax.make_jaxpr(fn)(*arguments).jaxpr) == one_pass
        assert jaxprs.matmul_flops(jax.make_jaxpr(jax.grad(fn))(*arguments).jaxpr) == 3 * one_pass


@pytest.mark.parametrize(
    ("ffn", "others"),
    [
        (64, {"ffn": 128, "experts": 4}),  # one width is the other's multiple
        (128, {"ffn": 128, "experts": 4}),  # told by the experts that a device holds
        (64, {"ffn": 96, "experts": 3}),  # too few for the devices, so cut in width
    ],
)
def test_a_devices_share_of_the_experts_multiplies_its_share_of_the_rows_in_each_sparse_model(ffn, others):
    sparse = SPARSE.replace(ffn=ffn)
    other = SPARSE.replace(experts_per_token=1, **others)

    def hidden(params, others, tokens_BL, mask_BL):
        of_other = transformer.forward(other, others, tokens_BL, mask_BL)
        return transformer.forward(sparse, params, tokens_BL, mask_BL) + of_other

    arguments = *map(transformer.abstract, (sparse, other)), *_tokens(8, 6)
    cut = sharding.on(sharding.make_mesh({"data": 2, "fsdp": 1, "tensor": 4}), hidden)
    whole, parts = (jax.make_jaxpr(fn)(*arguments).jaxpr for fn in (hidden, cut))
    for models in ((sparse, other), (other, sparse)):
        experts = [(model.width, model.ffn, model.experts) for model in models]
        assert jaxprs.matmul_flops(whole, 1, experts) == jaxprs.matmul_flops(whole)
        assert jaxprs.matmul_flops(parts, 1, experts, tensor=4) == jaxprs.matmul_flops(whole)


def test_of_branches_the_costliest_is_counted_and_the_others_are_looked_through():
    """A piece of prompts may be read at any of its widths; the widest is predicted."""
    a, b = jnp.ones((64, 32)), jnp.ones((32, 32))

    def branches(which, a, b):
        def at(width):  # the products stand in a loop, and a narrow result is filled up
            def narrow(a, b):
                x = jax.lax.scan(lambda x, _: (jnp.tanh(x @ b), None), a[:width], length=4)[0]
                return jnp.pad(x, ((0, 64 - width), (0, 0)))

            return narrow

        return jax.lax.switch(which, [at(8), at(64), at(16)], a, b)

    traced = jax.jit(branches).trace(jnp.int32(0), a, b)
    assert jaxprs.matmul_flops(traced.jaxpr.jaxpr) == 4 * 2 * 64 * 32 * 32
    program = hlo.Program(traced.lower().compile().as_text())
    rows = {array.dims[0]: times for i, times, _ in program if i.opcode == "dot" for array in i.arrays}
    assert rows == {8: 0, 16: 0, 64: 4}


def test_a_grouped_product_of_no_sparse_model_is_refused_with_its_widths():
    product = jax.make_jaxpr(jax.lax.ragged_dot)(jnp.ones((6, 32)), jnp.ones((2, 32, 64)), jnp.array([4, 2]))
    assert jaxprs.matmul_flops(product.jaxpr, 1, [(32, 64, 2)]) == 2 * 6 * 32 * 64
    assert jaxprs.matmul_flops(product.jaxpr, 1, [(32, 128, 2)], tensor=2) == 2 * 6 * 32 * 64
    with pytest.raises(ValueError, match="widths 32 and 64"):
        jaxprs.matmul_flops(product.jaxpr, 1, [(32, 128, 2), (64, 128, 2)])


def test_the_splash_kernels_products_are_those_of_the_blocks_it_computes_forward_and_backward():
    b, length, heads, c, block = 2, 2048, 4, 128, 512

    def attend(q, k, v):
        return splash.attend(q, k, v, jnp.ones((b, length), bool)).astype(jnp.float32).sum()

    kv_BLKC = jnp.ones((b, length, 2, c), jnp.bfloat16)
    arguments = jnp.ones((b, length, heads, c), jnp.bfloat16), kv_BLKC, kv_BLKC
    blocks = sum(range(1, length // block + 1))  # on the diagonal or below
    product = 2 * b * heads * blocks * block**2 * c
    assert jaxprs.matmul_flops(jax.make_jaxpr(attend)(*arguments).jaxpr) == 2 * product
    backward = jax.make_jaxpr(jax.grad(attend, argnums=(0, 1, 2)))(*arguments).jaxpr
    row_sums = 2 * b * heads * length * c  # of output x its gradient
    assert jaxprs.matmul_flops(backward) == (2 + 3 + 4) * product + row_sums


def test_a_decode_step_reads_the_experts_of_its_tokens_and_a_long_batch_reads_all():
    dense, expert = SPARSE.replace(experts=0, experts_per_token=0), 2 * 3 * SPARSE.width * SPARSE.ffn
    router = 2 * SPARSE.width * SPARSE.experts
    assert costs.read_bytes(SPARSE, 1, 1) == costs.weight_bytes(dense, 1) + expert + router  # two of them
    assert costs.read_bytes(SPARSE, 10_000, 1) == costs.weight_bytes(SPARSE, 1)
    assert costs.read_bytes(dense, 1, 1) == costs.weight_bytes(dense, 1)
    spread = costs.weight_bytes(dense, 1) + router + 8 * expert // 2 // 4  # all eight, over four devices
    assert costs.read_bytes(SPARSE, 10_000, 1, spread=4) == spread


def test_the_steps_flops_are_three_student_passes_and_a_teacher_pass():
    b, p, t = 3, 5, 7
    flops = costs.phase_flops(tiny.STUDENT, tiny.STUDENT, b, p, t)
    head = 2 * tiny.STUDENT.vocab_size * tiny.STUDENT.width
    keys = sum(range(1, p + t + 1))
    passes = b * ((p + t) * tiny.STUDENT.matmul_flops_per_token(head=False) + t * head)
    passes += b * 4 * keys * tiny.STUDENT.heads * tiny.STUDENT.head_size * tiny.STUDENT.layers
    assert flops["score"] == passes and flops["update"] == 3 * passes


def test_steps_that_read_what_is_written_move_less_and_rows_add_to_it():
    batch, twice = (costs.MicroBatch(rows, 16, 512, ALONE) for rows in (8, 16))
    full_SR = np.full((1, 8), 512)
    whole, written = (lengths.decode(full_SR, 16, 2, whole) for whole in (16 + 512, 0))
    assert [(rows, steps) for rows, steps, _ in written] == [(8, 511), (4, 0), (2, 0)]
    all_, own = (costs.sample_bytes(tiny.STUDENT, batch, decoded) for decoded in (whole, written))
    eight = [stretch._replace(rows=2 * stretch.rows) for stretch in whole]
    assert own < all_ < costs.sample_bytes(tiny.STUDENT, twice, eight)
    unread = sum(512 - t for t in range(1, 512)) / 511
    assert all_ - own == 511 * 8 * 8 * tiny.STUDENT.layers * 2 * tiny.STUDENT.head_size * unread


def test_the_rows_of_every_device_must_have_left_before_any_halves():
    one, other = [3, 3, 9, 20], [12, 3, 5, 4]
    assert [s[:2] for s in lengths.decode(np.array([one, other]), 8, 1)] == [(4, 3), (2, 16)]
    assert [s[:2] for s in lengths.decode(np.array([other]), 8, 2)] == [(4, 3), (2, 1), (1, 7)]
    assert [s[:2] for s in lengths.decode(np.array([[1]]), 8, 2)] == [(1, 0), (1, 0), (1, 0)]


def test_samples_that_share_a_prefill_need_it_once():
    sizes = tiny.STUDENT, tiny.STUDENT, 8, 16, 32
    alone, shared = costs.phase_flops(*sizes), costs.phase_flops(*sizes, samples=4)
    one = 16 * tiny.STUDENT.matmul_flops_per_token(head=False) + costs.attention_flops(tiny.STUDENT, 0, 16)
    assert alone["sample"] - shared["sample"] == 6 * one
    assert alone["update"] == shared["update"]
    batch = costs.MicroBatch(8, 16, 32, ALONE)
    moved = [costs.sample_bytes(tiny.STUDENT, batch, ALWAYS, samples) for samples in (1, 4)]
    forward = [costs.forward_bytes(tiny.STUDENT, rows, 16, 1) for rows in (8, 2)]
    assert moved[0] - moved[1] == forward[0] - forward[1]


def test_an_int8_cache_moves_a_byte_a_value_and_a_float32_a_token_and_head():
    wide = tiny.STUDENT.replace(head_size=128)
    batch = costs.MicroBatch(8, 16, 32, ALONE)
    floats, bytes_ = (costs.sample_bytes(wide, batch, ALWAYS, int8_cache=int8) for int8 in (False, True))
    assert floats - bytes_ == 32 * (16 + 32) * 2 * 8 * wide.layers * wide.kv_heads * (4 * 128 - 132)


def test_collectives_are_counted_by_kind_with_bytes_and_the_rounds_of_their_loop():
    mesh = sharding.make_mesh({"data": 1, "fsdp": 8, "tensor": 1})
    cut = NamedSharding(mesh, P(None, "fsdp", None))

    def gather_each(weight_NDD, x_BD):
        def step(x_BD, weight_DD):
            whole = jax.lax.with_sharding_constraint(weight_DD, NamedSharding(mesh, P()))
            return jnp.tanh(x_BD @ whole), None

        return jax.lax.scan(step, x_BD, weight_NDD)[0].sum()

    weight = jax.ShapeDtypeStruct((6, 64, 64), jnp.float32, sharding=cut)
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    found = {c.kind: c for c in compiled(gather_each, weight, x).collectives()}
    gathered = found["all-gather"]
    assert (gathered.group, gathered.times * gathered.bytes) == (8, 6 * 64 * 64 * 4)
    assert gathered.wire_bytes == 6 * 64 * 64 * 4 * 7 / 8
    assert found["all-reduce"].bytes == 4


def test_a_scopes_work_is_counted_as_often_as_its_loop_runs_and_nothing_elses():
    def fn(x):
        with jax.named_scope("release"):
            y = jax.lax.fori_loop(0, 5, lambda _, y: jnp.sin(y) * 2 + 1, x)
        return jnp.cos(y) @ x

    operations, size = compiled(fn, jnp.ones((64, 64))).scope("release")
    each = 64 * 64
    assert 5 * 3 * each <= operations <= 5 * 8 * each
    assert 5 * 2 * 4 * each <= size <= 5 * 8 * 4 * each
    assert compiled(fn, jnp.ones((64, 64))).scope("elsewhere") == (0, 0)


def test_a_program_on_one_device_has_no_collective_and_reaches_no_host():
    program = compiled(lambda x: jnp.sort(x @ x), jnp.ones((8, 8)))
    assert program.collectives() == [] and program.host_transfers() == []


# ---- Verdicts.


def test_a_sound_step_passes_and_says_what_it_needs(report):
    assert report.ok, preflight_table.step(report, "cpu")
    assert [program.name for program in report.programs] == ["sample", "train_step", "evaluation"]
    for program in report.programs:
        assert 0 < program.arguments < program.peak and program.flops > 0 and program.bytes > 0
        assert program.seconds == max(program.compute_seconds, program.memory_seconds, program.link_seconds)
    first, second, _ = report.programs
    assert report.seconds == first.seconds + second.seconds
    assert report.tokens_a_second == pytest.approx(16 * 12 / report.seconds / 8)
    assert second.resident == 0 and first.resident > report.held["optimizer state"]


def test_the_responses_to_a_prompt_are_predicted_in_one_turn_as_the_sampler_writes_them():
    settings = config.default()
    settings.update_from_flattened_dict({"rollout.slots": 4, "rollout.halvings": 0})
    length_B = np.array([9, 9, 2, 2, 7, 7, 3, 3])  # two devices, two prompts each, two responses to each
    turns = lengths.of_config(settings, tiny.STUDENT, 2, length_B, samples=2)
    assert [[stretch[:2] for stretch in turn] for turn in turns] == [[(2, 8)], [(2, 2)]]


def test_each_loop_without_a_limit_runs_its_own_number_of_rounds_and_so_do_loops_inside_it():
    def fn(x, n, m):
        x = jax.lax.fori_loop(0, n, lambda _, x: jnp.cos(x), x)
        return jax.lax.fori_loop(0, n, lambda _, x: jax.lax.fori_loop(0, m, lambda _, y: jnp.sin(y), x), x)

    text = jax.jit(fn).lower(jnp.ones(4), 2, 3).compile().as_text()
    for trips, want in (
        ([(3, 9), (5, 7)], {"cosine": 3, "sine": 35}),
        ([(3, 9)], {"cosine": 3, "sine": 0}),
        ([(3, 9), (5, [(7, 1)])], {"cosine": 3, "sine": 35}),
        ([(3, 9), (5, [])], {"cosine": 3, "sine": 0}),
        (2, {"cosine": 2, "sine": 4}),
    ):
        found = {i.opcode: times for i, times, _ in hlo.Program(text, trips)}
        assert {name: found[name] for name in want} == want


def test_a_step_of_ragged_responses_is_predicted_between_nothing_and_the_padded_one(models):
    plan = planned(models, devices=8, **{"rollout.halvings": 2})
    report = preflight_check.check(plan, CHIP, largest=False)
    full = ragged.of(plan, report, np.full(16, 12))
    assert full.written == pytest.approx(full.full) and sum(full.full) == pytest.approx(report.seconds)
    short = ragged.of(plan, report, np.array([12, 2] * 8))
    assert short.mean_tokens == 7 and short.full == full.full
    assert short.written[0] < min(short.padded[0], full.written[0])
    # Two rows a device: one loop of a step for both, then ten of the longer one alone.
    assert lengths.of_config(plan.config, plan.student, 8, np.array([12, 2] * 8))[0][:2] == [
        costs.Stretch(2, 1, 49),
        costs.Stretch(1, 10, 54.5),
    ]
    # Prompts of 48 leave no room for a second row in sequences of 60, but a head's chunks follow the longest.
    assert short.padded[1] == report.programs[1].seconds
    assert "these lengths take" in preflight_table.step(dataclasses.replace(report, ragged=short), "")


def test_a_step_that_stops_rows_is_predicted_from_what_is_written_and_kept(models):
    """The teacher reads in the sampler's program, and the training step no longer does."""
    stops = {"release.stop": "rule", "release.stop_block": 4, "segments.kind": "fixed:2"}
    plan, without = (planned(models, devices=8, **fields) for fields in (stops, {}))
    report = preflight_check.check(plan, CHIP, largest=False)
    assert report.ok and [p.name for p in report.programs[3:]] == ["evaluation_sample"]
    usual = preflight_check.check(without, CHIP, largest=False)
    for total in ("flops", "program_flops"):
        assert getattr(report.programs[0], total) > getattr(usual.programs[0], total)
        assert getattr(report.programs[1], total) < getattr(usual.programs[1], total)
        both, before = (sum(getattr(p, total) for p in r.programs[:2]) for r in (report, usual))
        assert both == pytest.approx(before, rel=0.2), total
    length_B = np.full(16, 12)
    full = ragged.of(plan, report, length_B)
    assert full.written == pytest.approx(full.full)
    now = lengths.stopped("0.5:0.25:0.5", length_B)
    assert sorted(zip(*now)) == [(6, 3)] * 8 + [(12, 12)] * 8
    fewer = ragged.of(plan, report, length_B, lengths.stopped("1:0.25:0.5", length_B))
    assert fewer.written[0] < full.written[0] and fewer.mean_tokens == 6


def test_stops_may_be_those_of_a_run(tmp_path):
    file = tmp_path / "rollouts.jsonl"
    rows = [{"tokens": 9, "kept_tokens": 4}, {"tokens": 30, "kept_tokens": 30}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = lengths.stopped(str(file), np.full(300, 40))
    assert set(zip(*(x.tolist() for x in found))) == {(9, 4), (30, 30)}
    with pytest.raises(UserError, match=r"--stops=gone.jsonl: there is no such file; give SHARE"):
        lengths.stopped("gone.jsonl", np.full(4, 10))


@pytest.mark.parametrize("spec", ["0.5", "0.5:0.3", "1.5:0.2:0.3", "0.5:0.4:0.3", "0.5:0:0.3", "a:b:c"])
def test_wrong_stops_are_a_mistake(spec):
    with pytest.raises(UserError, match=f"--stops={spec}: give SHARE:KEPT:WRITTEN"):
        lengths.stopped(spec, np.full(4, 10))


def test_every_sampler_of_a_run_is_compiled_and_the_students_pass_in_scoring_is_counted(models):
    settings = {"objective.name": "sft", "rollout.samples_per_prompt": 2, "teacher.end_id": 5}
    plan = planned(models, devices=1, **settings)
    found = {p.name: p for p in preflight_check.check(plan, CHIP, largest=False).programs}
    assert list(found) == ["sample", "train_step", "evaluation", "evaluation_sample"]
    assert plan.teacher.swapped_ids == (0, 5)
    sizes = 16, 48, 12
    pair = tiny.TEACHER, tiny.STUDENT
    of_teacher, of_student = (costs.phase_flops(writer, tiny.TEACHER, *sizes) for writer in pair)
    grouped = costs.phase_flops(tiny.TEACHER, tiny.TEACHER, *sizes, samples=2)
    assert found["sample"].flops == grouped["sample"] < of_teacher["sample"]
    assert found["evaluation_sample"].flops == of_student["sample"]
    one_pass = of_student["update"] / 3
    assert found["train_step"].flops == pytest.approx(of_student["score"] + 4 * one_pass)
    batch = costs.MicroBatch(8, 48, 12, plan.mesh.shape, pieces=2)
    own = costs.train_bytes(tiny.STUDENT, tiny.TEACHER, batch, mu_bytes=4)
    pass_bytes = costs.forward_bytes(tiny.STUDENT, 8, 60, 1) + 12 * 8 * 12 * tiny.STUDENT.vocab_size
    assert found["train_step"].bytes - own == 2 * pass_bytes


def test_every_width_of_a_prompt_bucket_is_compiled(models):
    plan = planned(models, devices=1, **{"data.prompt_buckets": (16, 48)})
    found = {p.name: p for p in preflight_check.check(plan, CHIP, largest=False).programs}
    assert list(found) == ["sample", "train_step", "evaluation", "sample_16", "train_step_16"]
    for name in ("sample", "train_step"):
        assert found[f"{name}_16"].fits and not found[f"{name}_16"].faults
        assert 0 < found[f"{name}_16"].flops < found[name].flops


def test_the_program_that_measures_the_gradients_noise_scores_once_and_takes_three_gradients(models):
    plan = planned(models, devices=8, **{"metrics.gradient_noise_every": 5})
    found = preflight_check.gradient_noise(plan, CHIP)
    assert found.fits and not found.faults and found.peak > found.arguments > 0
    flops = costs.phase_flops(tiny.STUDENT, tiny.TEACHER, 16, 48, 12)
    assert found.flops == (flops["score"] + 3 * flops["update"]) / 8
    # A micro-batch and one of two groups are 8 rollouts alike.
    batch = costs.MicroBatch(1, 48, 12, plan.mesh.shape, pieces=2)
    one = costs.train_bytes(tiny.STUDENT, tiny.TEACHER, batch, mu_bytes=4)
    passes = 2 * (costs.forward_bytes(tiny.TEACHER, 1, 60, 1) + 12 * 12 * tiny.TEACHER.vocab_size)
    own = tiny.STUDENT.parameter_count() // 8
    learnt = one - passes - 2 * 8 * own - own * 28
    assert found.bytes == passes + 3 * (learnt + 2 * 24 * own)


def test_arguments_are_the_bytes_that_are_held(report):
    held = sum(report.held.values())
    assert held < report.programs[1].arguments
    params = 4 * tiny.STUDENT.parameter_count()
    assert params / 8 <= report.held["student parameters"] < params / 4


def test_an_int8_teacher_is_held_and_read_at_a_byte_a_weight(models):
    plans = [planned(models, devices=1, **{"teacher.weights": kind}) for kind in ("float", "int8")]
    held = [preflight_check.held_bytes(plan)["teacher parameters"] for plan in plans]
    teacher = tiny.TEACHER
    matrices = teacher.layers * (32 * 8 * (2 * 4 + 2 * 2) + 3 * 32 * 48) + 272 * 32
    channels = teacher.layers * (8 * (4 + 2 * 2) + 32 + 2 * 48 + 32) + 272
    assert held[0] - held[1] == 3 * matrices - 4 * channels
    whole, half = (costs.weight_bytes(teacher.replace(weights=kind), 1) for kind in ("float", "int8"))
    assert whole == 4 * half, "float32 on a CPU"


def test_the_report_can_be_read_as_a_table_and_as_json(report):
    text = preflight_table.step(report, "eight devices")
    assert "peak of capacity" in text and "FAILS" not in text and text.endswith("\npasses")
    assert json.loads(json.dumps(dataclasses.asdict(report)))["micro_batch"] == 8


def test_a_chip_too_small_fails_by_name(models):
    small = dataclasses.replace(CHIP, hbm_bytes=1000)
    failed = preflight_check.check(planned(models, devices=1), small, largest=False)
    assert not failed.ok
    assert "FAILS: train_step does not fit" in preflight_table.step(failed, "one device")


def test_memory_held_beside_a_program_counts(models):
    program = reports.ProgramReport("sample", peak=6, resident=5, capacity=10)
    assert not program.fits and dataclasses.replace(program, resident=4).fits


def test_the_compilers_message_that_memory_is_short_becomes_a_line():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
        "(50.59G) exceeds available HBM (15.75G).\nmore"
    )
    assert preflight_build.shortage(message) == "needs 50.59G of 15.75G"


def plant(plan, step):
    """The plan with another train_step that computes from the same arguments."""
    plan.__dict__["train_step"] = jax.jit(sharding.on(plan.mesh, step))
    return preflight_check.train_step(plan, CHIP)


def test_a_planted_callback_fails(models):
    def step(state, inputs):
        jax.debug.print("step {}", state.step)
        return state.step

    faults = plant(planned(models, devices=1), step).faults
    assert faults and all("calls the host" in fault for fault in faults)


def test_a_callback_that_only_the_compiled_text_shows_is_found():
    def calls(x):
        return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct((), jnp.float32), x)

    assert compiled(calls, jnp.float32(1)).host_transfers()


def test_copies_of_the_hosts_memory_are_counted_and_all_else_done_there_is_named():
    lines = (
        "%p = f32[16,128]{1,0:S(5)} parameter(0)",
        "%c = (f32[16,128]{1,0}, f32[16,128]{1,0:S(5)}, u32[]{:S(2)}) copy-start(%p)",
        "%d = f32[16,128]{1,0} copy-done(%c)",
        "%r = (bf16[16,128]{1,0:S(5)}, bf16[16,128]{1,0}, u32[]{:S(2)}) copy-start(%b)",
        '%a = f32[16,128]{1,0:S(5)} add(%d, %d), metadata={op_name="jit(f)/add"}',
        '%n = f32[16,128]{1,0} negate(%p), metadata={op_name="jit(f)/neg"}',
        "%o = f32[16,128]{1,0} negate(%d)",
    )
    program = hlo.Program("ENTRY %main () -> f32[] {\n  " + "\n  ".join(lines) + "\n}")
    assert program.host_memory() == (16 * 128 * 4, 16 * 128 * 2, ["add jit(f)/add", "negate jit(f)/neg"])


def test_what_slices_exchange_over_their_hosts_is_no_transfer_to_the_host():
    line = "%s = (f32[16,8,128], u32[], token[]) send(%a, %b), channel_id=2, is_host_transfer=true"
    served = ', frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}'
    between, other = (
        hlo.Program(f"ENTRY %main (a: f32[]) -> f32[] {{\n  {text}\n}}") for text in (line + served, line)
    )
    assert between.host_transfers() == [] and other.host_transfers() == ["send"]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_planted_logits_of_all_positions_fail_in_any_layout(models, order):
    plan = planned(models, devices=1)

    def step(state, inputs):
        student, rollouts = plan.student, inputs.rollouts
        mask_BL = jnp.ones(rollouts.tokens_BL.shape, bool)
        hidden_BLD = transformer.forward(student, state.params, rollouts.tokens_BL, mask_BL)
        logits = transformer.logits(student, transformer.head(student, state.params), hidden_BLD)
        return logits.transpose(order)

    faults = plant(plan, step).faults
    assert faults and all("holds logits of all positions" in fault for fault in faults)


def test_weights_as_large_as_logits_are_none():
    program = compiled(lambda w: (w.T * 2) @ w, jnp.ones((264, 32)))
    assert program.vocabulary_arrays(16, [264], [32]) == []
    assert program.vocabulary_arrays(16, [264]) != []


def test_a_device_computes_the_logits_of_its_own_rows_alone(models):
    plan = planned(models, devices=8)
    lowered = plan.train_step.lower(plan.abstract_state(), plan.abstract_inputs())
    program = hlo.Program(lowered.compile().as_text())
    rows = 2 * plan.config.scoring.chunk  # of a micro-batch of 8 each device has one
    assert program.vocabulary_arrays(rows, [264, 272], [32, 4]) == []


def test_the_search_tries_meshes_and_micro_batches_until_one_is_too_large_and_ranks_them(models, monkeypatch):
    sampled = []

    def sample(plan, chip, name, build, *, training):
        sampled.append(plan.mesh.shape["tensor"])
        return reports.ProgramReport(name, memory_seconds=plan.mesh.shape["tensor"] / 2)

    def compiled(plan, chip, name, *_, **how):
        micro_batch, tensor = plan.config.train.micro_batch, plan.mesh.shape["tensor"]
        seconds = 8 / micro_batch
        return reports.ProgramReport(name, peak=micro_batch, capacity=4 * tensor, memory_seconds=seconds)

    monkeypatch.setattr(preflight_check, "_sample", sample)
    monkeypatch.setattr(preflight_check, "_compile", compiled)
    config = tiny.config(models, **{"rollout.batch": 8})
    told = []
    found = preflight_search.search(config, jax.devices()[:2], CHIP, preflight.plan, told.append)
    assert len(told) == len(found)
    assert told[0] == "mesh.tensor=1, train.micro_batch=2: 4.5 s a step" and told[2].endswith("not pass")
    tried = [(mesh["fsdp"], mesh["tensor"], size, report.ok) for mesh, size, report in found]
    fitting = [(1, 2, 8, True), (2, 1, 4, True), (1, 2, 4, True), (2, 1, 2, True), (1, 2, 2, True)]
    assert tried == [*fitting, (1, 2, 1, True), (2, 1, 8, False)]
    assert sampled == [1, 2], "the sampler is compiled once for a mesh"
    lines = preflight_table.search(found).splitlines()
    assert lines[1].split()[:4] == ["data=1", "fsdp=1", "tensor=2", "8"] and lines[1].endswith("yes")
    sizes = "--config.mesh.data=1 --config.mesh.fsdp=1 --config.mesh.tensor=2"
    assert lines[-1] == f"best: {sizes} --config.train.micro_batch=8"
    assert preflight_table.search(found[-1:]).endswith("\nnone passes")


def test_the_search_says_which_meshes_a_model_does_not_fit(models):
    config = tiny.config(models, **{"rollout.batch": 6, "train.frozen": ("nothing",)})
    told = []
    assert preflight_search.search(config, jax.devices(), CHIP, preflight.plan, told.append) == []
    assert told[0] == "mesh.tensor=1: the prompts cannot be cut over 8 devices"
    assert told[-1].startswith("mesh.tensor=8: train.frozen names nothing")


def test_a_program_is_read_from_the_compilers_dump_as_from_the_compiler(models, tmp_path):
    plan = planned(models, devices=8)
    whole = preflight_check.train_step(plan, CHIP)
    try:
        preflight_check.train_step(plan, CHIP, preflight_dump.only("train_step", tmp_path))
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()
    read = preflight_check.train_step(plan, CHIP, preflight_dump.reader(tmp_path))
    assert (read.arguments, read.collectives) == (whole.arguments, whole.collectives)
    assert read.arguments < read.peak and read.faults == [] and read.release == whole.release
    with pytest.raises(UserError, match=r"sample holds no after_optimizations.*--stop_after=buffers"):
        preflight_check.samplers(plan, CHIP, preflight_dump.reader(tmp_path))


def test_a_compile_is_ended_once_its_program_has_its_memory(tmp_path, monkeypatch):
    lines = ["size 8, parameter 0", "size 32, preallocated-temp:", "size 9, color 1, preallocated-temp:"]
    files = {
        "": "ENTRY %main (a: f32[]) -> f32[] {\n}\n",
        "-buffer-assignment": "".join(f"allocation {n}: {line}\n" for n, line in enumerate(lines)),
        "-memory-usage-report": "",
    }
    writes = f"""
import pathlib, sys, time
name, folder = (word.partition("=")[2] for word in sys.argv[-2:])
for kind, text in {files!r}.items():
    (pathlib.Path(folder) / name / f"m.after_optimizations{{kind}}.txt").write_text(text)
time.sleep(600)
"""
    script = tmp_path / "opd_jax/preflight/__main__.py"
    script.parent.mkdir(parents=True)
    for package in (script.parent, script.parent.parent):
        (package / "__init__.py").write_text("")
    monkeypatch.chdir(tmp_path)
    build = preflight_dump.until_buffers(tmp_path / "dump", [])
    script.write_text(writes)
    made = build(None, "sample")
    assert (made.arguments, made.temporaries, made.peak) == (8, 32, 40)
    refused = "jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: XLA:TPU compile permanent error."
    refused += " Ran out of memory in memory space hbm. Used 50.5G of 15.7G hbm."
    script.write_text(f"raise SystemExit({refused!r})")
    assert build(None, "sample").shortage == "needs 50.5G of 15.7G"
    script.write_text("raise SystemExit('error: no such preset')")
    with pytest.raises(UserError, match=r"sample was not compiled \(error: no such preset\); see .*log"):
        build(None, "sample")


def test_what_slices_send_each_other_is_counted_apart():
    sends = (
        "%s = (f32[16,8,128], u32[], token[]) send(%a, %b), channel_id=2, is_host_transfer=true, "
        'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
        '_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    program = hlo.Program(f"ENTRY %main (a: f32[]) -> f32[] {{\n  {sends}\n}}")
    (exchange,) = program.between_slices(2)
    assert (exchange.kind, exchange.bytes, exchange.times) == ("all-reduce", 16 * 8 * 128 * 4, 1)
    assert exchange.wire_bytes == exchange.bytes, "of two slices each sends its whole part"
    assert program.between_slices(4)[0].wire_bytes == 1.5 * exchange.bytes


# ---- Recipes.


def test_make_preflight_checks_every_recipe_on_the_slices_that_its_docstring_names():
    folder = Path(__file__).parents[2]
    lines = (folder / "Makefile").read_text().partition("\npreflight:")[2].partition("\n\n")[0]
    made = re.findall(r"opd_jax\.preflight (--config=\S+ --topology=\S+)", lines)
    named = [
        line
        for path in (folder / "configs").glob("[!_]*.py")
        # Models of a pod; the others run on a CPU.
        if importlib.import_module(f"configs.{path.stem}").get_config().student.path.startswith("preset:")
        for line in re.findall(r"opd_jax\.preflight (--config=\S+ --topology=\S+)", path.read_text())
        or [path.stem]
    ]
    assert sorted(made) == sorted(named)


def test_the_small_pods_step_needs_little_more_than_its_models_passes():
    config = small_pod.get_config()
    config.mesh.preset, config.mesh.tensor = "one_chip", 0
    assert 1 < passes.ratio(preflight.plan(config, jax.devices()[:1])) < 1.25


def _tokens(rows, length):
    shape = rows, length
    return jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, bool)
