"""Saving and restoring what a run needs to go on exactly: state, and the position in the prompts."""

import math
from pathlib import Path
from typing import Self

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from opd_jax.distill import TrainState
from opd_jax.errors import UserError

FOLDER = "checkpoints"


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
            ),
        )

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
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), prompts=ocp.args.JsonSave(prompts)),
            metrics={"kl": kl} if kl is not None and math.isfinite(kl) else None,
        )

    def restore(self, step: int, abstract_state: TrainState) -> tuple[TrainState, dict]:
        """(state, prompt position) of a checkpoint, placed as abstract_state's shardings say.

        Raises:
          UserError: there is no such checkpoint.
        """
        if step not in self._manager.all_steps():
            there = ", ".join(map(str, self._manager.all_steps())) or "none"
            raise UserError(f"{self._manager.directory} has no checkpoint of step {step}; there: {there}")
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract_state), prompts=ocp.args.JsonRestore()
            ),
        )
        return restored["state"], restored["prompts"]

    def find(self, wanted) -> int:
        """The step of "latest", "best" or a number.

        Raises:
          UserError: there is no such checkpoint.
        """
        step = str({"latest": self.latest, "best": self.best}.get(wanted, wanted))
        if step.isdigit() and int(step) in self._manager.all_steps():
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
        with ocp.Checkpointer(handler) as checkpointer:
            return checkpointer.restore(state, args=restore)["params"]

    def close(self):
        """Waits for what is being written."""
        self._manager.wait_until_finished()
        self._manager.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
