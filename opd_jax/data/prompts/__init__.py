"""Prompt sources, and the built-in demo prompts as a TensorFlow Datasets builder."""
