"""Language models: one Flax NNX class for the supported families, and Hugging Face folders in and out."""
