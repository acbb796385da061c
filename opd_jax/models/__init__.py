"""Language models: one Flax NNX class for the supported families, and Hugging Face folders in and out."""

from opd_jax.models.transformer import prune

__all__ = ["prune"]
