"""Checkpoints: what is kept, that it comes back bit for bit, and onto another mesh."""

import dataclasses
import io
import os
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from opd_jax.distill import TrainState
from opd_jax.errors import UserError
from opd_jax.progress import Progress
from opd_jax.run import Session
from opd_jax.run.checkpoint import Checkpoints
from opd_jax.run.job import prepare
from tests import tiny


@pytest.fixture(scope="module")
def job(models):
    return prepare(tiny.config(models, **{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}))


@pytest.fixture(scope="module")
def state(job):
    """A state whose every array differs from what a fresh one would hold."""

    def fill(path, leaf):
        numbers = np.arange(leaf.size).reshape(leaf.shape) + len(jax.tree_util.keystr(path))
        return jax.device_put(numbers.astype(leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(fill, job.start())


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_state_comes_back_bit_for_bit_onto_another_mesh(models, job, state, tmp_path):
    position = {"step": 3, "seed": 0}
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(3, state, position, None)
    other = prepare(tiny.config(models, **{"mesh.fsdp": 8}))
    with Checkpoints(tmp_path, 1) as checkpoints:
        restored, at = checkpoints.restore(3, other.abstract_state())
    assert_same(restored, state)
    assert at == position
    assert jax.tree.map(lambda x: x.sharding, restored) == other.state_shardings
    assert restored.params["embedding"].sharding != state.params["embedding"].sharding


def test_frozen_parameters_have_no_moments_in_a_checkpoint_and_come_back_with_it(models, tmp_path):
    frozen = {"train.frozen": ("embedding", "down")}
    job = prepare(tiny.config(models, **{"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2} | frozen))
    state = job.start()
    for moment in (optax.tree.get(state.opt_state, name) for name in ("mu", "nu")):
        assert "embedding" not in moment
        assert "down" not in moment["blocks"]
        assert moment["blocks"]["up"].sharding == state.params["blocks"]["up"].sharding
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, state, {"step": 1}, None)
    other = prepare(tiny.config(models, **{"mesh.fsdp": 8} | frozen))
    with Checkpoints(tmp_path, 1) as checkpoints:
        restored, _ = checkpoints.restore(1, other.abstract_state())
    assert_same(restored, state)
    assert jax.tree.map(lambda x: x.sharding, restored) == other.state_shardings


@pytest.mark.parametrize("memory", ["device", "pinned_host"])
def test_a_save_holds_what_was_saved_though_the_arrays_are_donated_at_once(memory, tmp_path):
    """Large enough that writing is still going on while later steps reuse the buffers."""
    moment = jax.device_put(jnp.ones(8_000_000), jnp.ones(1).sharding.with_memory_kind(memory))
    state = TrainState(jnp.int32(1), {"w": jnp.ones(8_000_000)}, {"m": moment})
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    where = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0, out_shardings=where)
    with Checkpoints(tmp_path, 1) as checkpoints:
        checkpoints.save(1, state, {"step": 1}, None)
        for _ in range(20):
            state = step(state)
        jax.block_until_ready(state)
    with Checkpoints(tmp_path, 1) as checkpoints:
        restored, _ = checkpoints.restore(1, shapes)
    for array in jax.tree.leaves(restored):
        np.testing.assert_array_equal(array, np.ones_like(array))


def test_the_newest_and_the_best_are_kept(job, state, tmp_path):
    with Checkpoints(tmp_path, 2) as checkpoints:
        for step, kl in enumerate([0.5, 0.1, None, 0.3, None, 0.2], start=1):
            checkpoints.save(step, dataclasses.replace(state), {"step": step}, kl)
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.latest == 6
        assert checkpoints.best == 2
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()}
    assert kept == {"2", "5", "6"}


def test_a_kl_that_is_not_finite_does_not_replace_the_best(job, state, tmp_path):
    with Checkpoints(tmp_path, 2) as checkpoints:
        for step, kl in enumerate([0.4, float("nan"), float("inf"), 0.5], start=1):
            checkpoints.save(step, dataclasses.replace(state), {"step": step}, kl)
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.best == 1
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()}
    assert kept == {"1", "3", "4"}


def largest_file(folder):
    """A file of arrays: the largest of a checkpoint."""
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "missing": (lambda path: path.unlink(), "is missing"),
    "emptied": (lambda path: path.write_bytes(b""), "has 0 of "),
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-7]), " bytes"),
    "a flipped bit": (flip, "has changed"),
}


@pytest.fixture(scope="module")
def three_steps(job, state, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("three")
    with Checkpoints(workdir, 3) as checkpoints:
        for step in (1, 2, 3):
            numbered = dataclasses.replace(state, step=state.step + step)
            checkpoints.save(step, numbered, {"step": step}, None)
    return workdir


@pytest.mark.parametrize("name", DAMAGES)
def test_a_torn_checkpoint_is_named_moved_away_and_the_one_before_is_continued_from(
    name, three_steps, job, state, tmp_path
):
    workdir = tmp_path / "run"
    shutil.copytree(three_steps, workdir)
    tear, said = DAMAGES[name]
    for step in (2, 3):
        tear(largest_file(workdir / "checkpoints" / str(step)))
    with Checkpoints(workdir, 3) as checkpoints, pytest.raises(UserError, match=f"is damaged .*{said}"):
        checkpoints.find("latest")
    shown = io.StringIO()
    with Progress(shown) as progress, Session(job.config, workdir, progress) as session:
        assert session.done == 1
        restored, position = session.state(job.start, job.abstract_state)
    assert position == {"step": 1}
    assert_same(restored, dataclasses.replace(state, step=state.step + 1))
    lines = [line for line in shown.getvalue().splitlines() if "damaged" in line]
    assert len(lines) == 2 and all(said in line for line in lines)
    assert sorted(path.name for path in (workdir / "damaged_checkpoints").iterdir()) == ["2", "3"]


def test_a_run_without_a_whole_checkpoint_is_refused_in_one_line(three_steps, job, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(three_steps, workdir)
    for step in (1, 2, 3):
        largest_file(workdir / "checkpoints" / str(step)).unlink()
    with (
        Progress(io.StringIO()) as progress,
        pytest.raises(UserError, match="no whole checkpoint left .step 3: .* is missing") as caught,
        Session(job.config, workdir, progress),
    ):
        pass
    assert "\n" not in str(caught.value)
    with (  # nothing was moved: started again, the run does not begin anew
        Progress(io.StringIO()) as progress,
        pytest.raises(UserError, match="no whole checkpoint left"),
        Session(job.config, workdir, progress),
    ):
        pass


def test_a_list_of_files_that_is_cut_off_is_damage(three_steps, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(three_steps, workdir)
    (workdir / "checkpoints" / "3" / "_MANIFEST").write_text("{")
    with Checkpoints(workdir, 3) as checkpoints:
        step, damaged = checkpoints.newest_whole()
    assert step == 2 and damaged[3].startswith("a file can't be read: ")


def test_a_checkpoint_without_a_list_of_its_files_that_cannot_be_read_is_one_line(three_steps, job, tmp_path):
    """As those of earlier versions are."""
    workdir = tmp_path / "run"
    shutil.copytree(three_steps, workdir)
    folder = workdir / "checkpoints" / "3"
    (folder / "_MANIFEST").unlink()
    largest_file(folder).write_bytes(b"")
    with Checkpoints(workdir, 3) as checkpoints:
        assert checkpoints.newest_whole() == (3, {})
        with pytest.raises(UserError, match="checkpoints/3 can't be read .*older checkpoint") as caught:
            checkpoints.restore(3, job.abstract_state())
    assert "\n" not in str(caught.value)


def test_two_processes_do_not_write_one_folder(job, tmp_path):
    with Progress(io.StringIO()) as progress, Session(job.config, tmp_path, progress):
        code = (
            "import sys; from opd_jax.run.session import _lock; from pathlib import Path\n"
            "with _lock(Path(sys.argv[1])): pass"
        )
        done = tiny.entry(code, tmp_path, command=(sys.executable, "-c"))
        assert done.returncode == 1
        assert f"UserError: --workdir={tmp_path}: process {os.getpid()} on " in done.stderr
    with Progress(io.StringIO()) as progress, Session(job.config, tmp_path, progress):
        pass  # the lock is free again


def test_without_evaluations_there_is_no_best(job, state, tmp_path):
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.latest is None
        checkpoints.save(1, state, {"step": 1}, None)
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.best is None
        assert checkpoints.latest == 1


def test_a_checkpoint_that_is_not_there_is_named_beside_those_that_are(job, state, tmp_path):
    with Checkpoints(tmp_path, 2) as checkpoints:
        with pytest.raises(UserError, match="no checkpoint of step 4; there: none"):
            checkpoints.restore(4, job.abstract_state())
        checkpoints.save(2, state, {"step": 2}, None)
        with pytest.raises(UserError, match="no checkpoint of step 4; there: 2"):
            checkpoints.restore(4, job.abstract_state())


def test_what_a_kill_left_half_written_is_no_checkpoint(job, state, tmp_path):
    with Checkpoints(tmp_path, 2) as checkpoints:
        checkpoints.save(2, state, {"step": 2}, None)
    half = tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp"
    (half / "state").mkdir(parents=True)
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert checkpoints.latest == 2
