"""On-policy distillation in JAX, with supervision released where the teacher stops teaching."""
