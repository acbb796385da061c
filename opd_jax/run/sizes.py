"""The sizes of a run against its mesh and models, checked before anything is compiled."""

from absl import logging

from opd_jax.distill import gradient_noise, trainable
from opd_jax.errors import UserError
from opd_jax.models import ModelConfig, transformer
from opd_jax.parallel import sharding


def check(config, mesh, student: ModelConfig, teacher: ModelConfig):
    """Refuses sizes that the mesh cannot cut or the models do not have; completes train.micro_batch.

    Raises:
      UserError: names the config key.
    """
    prompts = config.rollout.batch // config.rollout.samples_per_prompt
    sharding.check_batch(mesh, "rollout.batch / rollout.samples_per_prompt", prompts)
    fill_micro_batch(config, mesh)
    least = config.rollout.samples_per_prompt * sharding.pieces(mesh)
    if 0 < config.rollout.slots < least:
        raise UserError(
            f"rollout.slots={config.rollout.slots} is less than rollout.samples_per_prompt x mesh.data x "
            f"mesh.fsdp = {least}, one prompt's rollouts for each device; raise it, or set it to 0 for all"
        )
    if config.metrics.gradient_noise_every and gradient_noise.group_count(config, mesh) is None:
        raise UserError(
            f"metrics.gradient_noise_every={config.metrics.gradient_noise_every} compares groups of prompts, "
            f"and {prompts} prompts (rollout.batch / rollout.samples_per_prompt) make no two that fill "
            "mesh.data x mesh.fsdp devices and fit into train.micro_batch; use more prompts, or set it to 0"
        )
    trainable.check(transformer.abstract(student), config.train.frozen)
    check_length(config, "student.path", student)
    check_length(config, "teacher.path", teacher)
    valid = min(student.valid_vocab, teacher.valid_vocab)
    if config.scoring.candidates > valid:
        raise UserError(f"scoring.candidates={config.scoring.candidates} exceeds {valid} token ids")
    if config.objective.top_k >= valid:
        raise UserError(f"objective.top_k={config.objective.top_k} must be below the {valid} token ids")


def fill_micro_batch(config, mesh):
    """Gives every device one rollout of a micro-batch that is smaller than the mesh, and says so.

    Raises:
      UserError: a larger one that the mesh cannot cut.
    """
    asked, least = config.train.micro_batch, sharding.pieces(mesh)
    if asked < least and config.rollout.batch % least == 0:
        with config.unlocked():
            config.train.micro_batch = least
        logging.warning(
            "train.micro_batch=%d is raised to %d: a rollout for each of %d devices (mesh.data x mesh.fsdp)",
            *(asked, least, least),
        )
    sharding.check_batch(mesh, "train.micro_batch", config.train.micro_batch)


def check_length(config, key: str, model: ModelConfig):
    """Refuses a prompt and response longer than a model's positions.

    Raises:
      UserError: names the model's key.
    """
    length = config.data.prompt_tokens + config.rollout.max_tokens
    if length > model.max_positions:
        raise UserError(
            f"data.prompt_tokens + rollout.max_tokens = {length} is more than the "
            f"{model.max_positions} positions of {key}; lower one of them"
        )
