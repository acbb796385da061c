"""Which products a CPU is to take, and what it is called."""

import pytest

from opd_jax.models import cpu
from opd_jax.parallel import sharding
from opd_jax.run import metrics, resolve
from tests import tiny


@pytest.mark.parametrize(
    "float32, bfloat16, instructions, choice",
    [
        (100e9, 300e9, True, "bfloat16"),
        (100e9, 300e9, None, "bfloat16"),  # a system that tells nothing of its CPU
        (100e9, 300e9, False, "compute"),
        (100e9, 119e9, True, "compute"),
        (170e9, 87e9, True, "compute"),  # a CPU with AVX512_BF16 whose library does not use it
    ],
)
def test_auto_takes_bfloat16_only_where_the_cpu_has_it_and_it_is_faster(
    float32, bfloat16, instructions, choice
):
    assert cpu.Probe(float32, bfloat16, instructions).choice == choice


@pytest.mark.parametrize(
    "text, expected",
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 fma\n", True),
        ("flags\t\t: fpu avx2 amx_bf16\n", True),
        ("Features\t: fp asimd bf16\n", True),
        ("flags\t\t: fpu avx2 fma\n", False),
        ("processor : 0\n", None),
    ],
)
def test_the_instructions_of_a_cpu_are_read_from_what_the_system_lists(text, expected, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(cpu, "CPU_FILE", tmp_path / "cpuinfo")
    assert cpu.has_instructions() is expected


def test_a_system_that_lists_no_cpu_has_no_known_instructions(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "CPU_FILE", tmp_path / "absent")
    assert cpu.has_instructions() is None


def test_the_probe_times_both_products_of_this_machine():
    probe = cpu.probe()
    assert probe.float32 > 0 and probe.bfloat16 > 0
    assert probe.record()["float32_products_gflops"] == round(probe.float32 / 1e9, 1)


def test_auto_is_settled_once_and_a_run_keeps_what_it_began_with(tmp_path, monkeypatch):
    """In another process, on a machine whose probe says otherwise, the run's config.json decides."""
    mesh = sharding.make_mesh(tiny.default().mesh)
    monkeypatch.setattr(cpu, "probe", lambda: cpu.Probe(1e9, 3e9, True))
    config = tiny.default()
    resolve.settle_products(config, mesh, tmp_path)
    assert (config.student.products, config.teacher.products) == ("bfloat16", "bfloat16")
    metrics.write_run_files(tmp_path, config)
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)

    monkeypatch.setattr(cpu, "probe", lambda: cpu.Probe(3e9, 1e9, False))
    again = tiny.default()
    assert metrics.config_conflict(tmp_path, again) is None
    resolve.settle_products(again, mesh, tmp_path)
    assert (again.student.products, again.teacher.products) == ("bfloat16", "bfloat16")
    elsewhere = tiny.default()
    elsewhere.teacher.products = "bfloat16"  # what is asked for is not probed
    resolve.settle_products(elsewhere, mesh, tmp_path / "new")
    assert (elsewhere.student.products, elsewhere.teacher.products) == ("compute", "bfloat16")
    assert "student.products" in str(metrics.config_conflict(tmp_path, elsewhere))


def test_a_machine_is_named_by_its_cores_its_cpu_and_its_widest_vectors(tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(
        "model name\t: Intel(R) Xeon(R) CPU E5-2680 v4 @ 2.40GHz\nflags\t\t: fpu avx avx2 fma\n"
    )
    monkeypatch.setattr(cpu, "CPU_FILE", tmp_path / "cpuinfo")
    monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda _: {0, 1})
    assert cpu.name() == "2 cores of Intel Xeon E5-2680 v4, AVX2"
