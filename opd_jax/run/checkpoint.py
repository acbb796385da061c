"""Saving and restoring what a run needs to continue exactly: state, and the position in the prompts.

Every checkpoint holds a list of its files with sizes and, up to SUMMED_BYTES, checksums, written before it
gets its final name. So a file that is missing, cut off or changed is found before anything is restored.
"""

import contextlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from opd_jax.distill import TrainState
from opd_jax.errors import UserError, reason
from opd_jax.parallel import distributed

FOLDER = "checkpoints"
DAMAGED = "damaged_checkpoints"  # where the damaged ones are moved, for whoever wants to look
MANIFEST = "_MANIFEST"
UNLISTED = (MANIFEST, "_CHECKPOINT_METADATA")  # Orbax writes the latter again when it is done
BLOCK = 1 << 24
SUMMED_BYTES = 8 << 30  # reading more back would delay a save, and the preemption that waits for it


class _Manager(ocp.CheckpointManager):
    """Saves when it is told to, and asks nobody.

    Orbax would ask JAX at every save whether the processes are to stop, by the step's number. JAX has them
    stop at the number after the last that was asked of: `distributed` numbers its own questions, and would
    wait for one of the step's size.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of one run, under workdir/checkpoints; a context manager.

    Written in the background; a checkpoint appears under its final name only when it is whole, so a
    run killed at any moment resumes from the newest whole one.

    Args:
      workdir: folder of the run.
      keep: how many of the newest are kept; the best by held-out KL is kept as well.
    """

    def __init__(self, workdir, keep: int):
        newest = policies.LatestN(keep)
        best = policies.BestN(
            get_metric_fn=lambda m: m["kl"], reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        self._manager = _Manager(
            Path(workdir).absolute() / FOLDER,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([newest, best]),
                best_fn=lambda m: m["kl"],
                best_mode="min",
                enable_async_checkpointing=True,
                async_options=ocp.options.AsyncOptions(post_finalization_callback=self._write_manifest),
            ),
        )
        self._saving: int | None = None

    @classmethod
    def of_run(cls, workdir, keep: int) -> Self:
        """The checkpoints of an existing run, for reading; creates nothing.

        Raises:
          UserError: the run has none.
        """
        if not (Path(workdir) / FOLDER).is_dir():
            raise UserError(f"--workdir={workdir} has no checkpoint; let the run go on to its first")
        return cls(workdir, keep)

    @property
    def latest(self) -> int | None:
        """Steps done in the newest checkpoint; None where there is none."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """Steps done in the checkpoint with the lowest held-out KL; None where none was evaluated."""
        return self._manager.best_step()

    def save(self, step: int, state: TrainState, prompts: dict, kl: float | None):
        """Starts writing; the arrays are copied before this returns.

        Args:
          step: steps done.
          state: the training state; may be donated afterwards.
          prompts: `TrainingBatches.state()`.
          kl: held-out KL at this very step, nats a token, if it was evaluated. If it is not finite, the
            checkpoint can't be the best.
        """
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), prompts=ocp.args.JsonSave(prompts))
        with self._writing():
            self._manager.wait_until_finished()  # else `_saving` would name the wrong one
            self._saving = step
            self._manager.save(
                step, args=args, metrics={"kl": kl} if kl is not None and math.isfinite(kl) else None
            )

    @contextlib.contextmanager
    def _writing(self):
        """Errors of writing, which may be those of the checkpoint before, become one line."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # of TensorStore, of the file system, of Orbax's own threads
            raise UserError(
                f"{self._manager.directory}: step {self._saving} can't be written"
                f" ({reason(error)}); make room or restore access, and start again: the run continues from"
                " the newest whole one"
            ) from error

    def _write_manifest(self) -> None:
        """Lists the files of the checkpoint that is about to get its name; runs in Orbax's thread."""
        if jax.process_index() != 0:
            return
        for path in Path(self._manager.directory).glob(f"{self._saving}.*tmp*"):
            with (path / MANIFEST).open("w", encoding="utf-8") as file:
                json.dump(_listing(path), file, indent=1)
                file.flush()
                os.fsync(file.fileno())

    def damage(self, step: int) -> str:
        """What is wrong with the files of a checkpoint; "" for a whole one, or one without a list of files.

        Process 0 reads them; call it in every process.
        """
        wrong = ""
        if jax.process_index() == 0:
            folder = Path(self._manager.directory) / str(step)
            try:
                if (folder / MANIFEST).is_file():
                    wrong = _difference(json.loads((folder / MANIFEST).read_text()), folder)
            except (OSError, ValueError) as error:
                wrong = f"a file can't be read: {reason(error)}"
            if wrong and not folder.exists():
                wrong = "it was removed while it was read: a run goes on there"
        told = np.zeros(200, np.uint8)
        text = wrong.encode()[:200]
        told[: len(text)] = list(text)
        return bytes(distributed.gathered(told)[0]).rstrip(b"\0").decode(errors="replace")

    def newest_whole(self) -> tuple[int | None, dict[int, str]]:
        """(the newest whole checkpoint's step or None, what is wrong with newer ones by their step).

        If there is a whole one, the damaged ones are moved out of the way. Call it in every process.
        """
        damaged = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            wrong = self.damage(step)
            if not wrong:
                self._set_aside(damaged)
                return step, damaged
            damaged[step] = wrong
        return None, damaged

    def _set_aside(self, steps: Iterable[int]) -> None:
        folder, failed = Path(self._manager.directory), ""
        if not steps:
            return
        if jax.process_index() == 0:
            target = folder.parent / DAMAGED
            try:
                target.mkdir(exist_ok=True)
                for step in steps:
                    shutil.rmtree(target / str(step), ignore_errors=True)
                    (folder / str(step)).rename(target / str(step))
            except OSError as error:
                failed = error.strerror or "OSError"
        if distributed.gathered([bool(failed)]).any():  # also: no process lists the folder before
            raise UserError(
                f"{folder} holds a damaged checkpoint that can't be moved ({failed or 'by process 0'})"
            )
        self._manager.reload()

    def restore(self, step: int, abstract_state: TrainState) -> tuple[TrainState, dict]:
        """(state, prompt position) of a checkpoint, placed as abstract_state's shardings say.

        Raises:
          UserError: there is no such checkpoint, or it can't be read.
        """
        if step not in self._manager.all_steps():
            there = ", ".join(map(str, self._manager.all_steps())) or "none"
            raise UserError(f"{self._manager.directory} has no checkpoint of step {step}; there: {there}")
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract_state), prompts=ocp.args.JsonRestore()
        )
        with self._reading(step):
            restored = self._manager.restore(step, args=args)
        return restored["state"], restored["prompts"]

    @contextlib.contextmanager
    def _reading(self, step: int):
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # of TensorStore, of the file system, of Orbax
            raise UserError(
                f"{self._manager.directory}/{step} can't be read ({reason(error)}); move that folder away to"
                " continue from an older checkpoint"
            ) from error

    def find(self, wanted) -> int:
        """The step of "latest", "best" or a number.

        Raises:
          UserError: there is no such checkpoint, or it is damaged.
        """
        step = str({"latest": self.latest, "best": self.best}.get(wanted, wanted))
        if step.isdigit() and int(step) in self._manager.all_steps():
            if wrong := self.damage(int(step)):
                others = [str(other) for other in self._manager.all_steps() if other != int(step)]
                raise UserError(
                    f"--step={wanted}: {self._manager.directory}/{step} is damaged ({wrong}); others that are"
                    f" there: {', '.join(others) or 'none'}"
                )
            return int(step)
        there = ", ".join(map(str, self._manager.all_steps())) or "none"
        raise UserError(
            f"--step={wanted}: {self._manager.directory} has no checkpoint of step {wanted}; there: {there}"
        )

    def restore_params(self, step: int, abstract_params: dict, shardings: dict) -> dict:
        """The student's parameters alone; the optimizer's state is not read.

        Args:
          step: a step that `find` returned.
          abstract_params, shardings: their shapes and dtypes, and where they go.

        Raises:
          UserError: the checkpoint holds other parameters.
        """
        self._manager.wait_until_finished()
        state = self._manager.directory / str(step) / "state"
        wanted = {
            "params": jax.tree.map(
                lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract_params, shardings
            )
        }
        restore = ocp.args.PyTreeRestore(
            item=wanted,
            restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
            partial_restore=True,
        )
        handler = ocp.PyTreeCheckpointHandler()
        found, asked = (
            {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in leaves}
            for leaves in map(
                jax.tree_util.tree_leaves_with_path,
                (handler.metadata(state)["params"], abstract_params),
            )
        )
        if found != asked:
            name = min(name for name in found | asked if found.get(name) != asked.get(name))
            raise UserError(
                f"{state}: parameter {name} is {found.get(name)} in the checkpoint,"
                f" {asked.get(name)} in student.path; that folder now holds another model"
            )
        with self._reading(step), ocp.Checkpointer(handler) as checkpointer:
            return checkpointer.restore(state, args=restore)["params"]

    def close(self):
        """Waits for what is being written."""
        with self._writing():
            self._manager.wait_until_finished()
            self._manager.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in UNLISTED)


def _listing(folder: Path) -> dict[str, list]:
    """[bytes, CRC-32] of every file of a checkpoint; without the sum where there is too much to read back."""
    files = _files(folder)
    summed = sum(path.stat().st_size for path in files) <= SUMMED_BYTES
    return {
        str(path.relative_to(folder)): [path.stat().st_size, _sum(path) if summed else None] for path in files
    }


def _sum(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            crc = zlib.crc32(block, crc)
    return crc


def _difference(wanted: dict[str, list], folder: Path) -> str:
    """The first file that is not as it was written, and how many there are; "" if all are."""
    found = {str(path.relative_to(folder)): path.stat().st_size for path in _files(folder)}
    wrong = []
    for name, (size, crc) in wanted.items():
        if name not in found:
            wrong.append(f"{name} is missing")
        elif found[name] != size:
            wrong.append(f"{name} has {found[name]} of {size} bytes")
        elif crc is not None and _sum(folder / name) != crc:
            wrong.append(f"{name} has changed")
    return wrong[0] + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else "") if wrong else ""
