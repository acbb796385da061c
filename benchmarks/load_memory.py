"""Measures the host memory that loading a checkpoint needs beyond the arrays; prints a Markdown table.

    python -m benchmarks.load_memory [--folder=DIR] [--only=dense|sparse]

Writes two synthetic sharded checkpoints in bfloat16, one of 4.2 GB (dense) and one of 2.4 GB (64 experts a
block). Loads each in a fresh process, then deletes it. Needs Linux.

On a CPU the arrays themselves are in host memory. Their bytes are subtracted, so the rest is what a host with
accelerators would need. Memory is the process's own (RssAnon, sampled every 2 ms). Pages of the mapped files
are not counted, because the system can reclaim them.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from opd_jax.models.files import hf, hf_config, safetensors_out, weights

FILE_BYTES = 10**9
DENSE = {
    "model_type": "qwen3",
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 6144,
    "vocab_size": 65536,
}
SPARSE = DENSE | {
    "model_type": "qwen3_moe",
    "hidden_size": 1024,
    "num_hidden_layers": 11,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 512,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "vocab_size": 8192,
}
CHECKPOINTS = {"dense": DENSE, "sparse": SPARSE}


def write(folder: Path, raw: dict) -> int:
    """Writes a model folder with random weights; returns the bytes of all tensors."""
    dtype = np.dtype(jnp.bfloat16)
    noise = (np.random.default_rng(0).normal(size=1 << 20) / 32).astype(dtype)
    files, room = [], 0
    for tensor in weights.tensors(hf_config.from_json(raw), "hf"):
        if room <= 0:
            files.append({})
            room = FILE_BYTES
        files[-1][tensor.name] = tensor.shape
        room -= int(np.prod(tensor.shape)) * dtype.itemsize
    index, total = {}, 0
    for number, shapes in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        values = (np.resize(noise, shape) for shape in shapes.values())
        total += safetensors_out.write(folder / name, shapes, dtype, values)
        index |= dict.fromkeys(shapes, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(raw))
    return total


def own_memory() -> int:
    """RssAnon of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measure(folder: Path):
    """Loads the folder; prints as JSON the bytes of the arrays and the peak above the start."""
    jax.block_until_ready(jax.jit(jnp.zeros_like)(jnp.ones(8)))
    start, peak, done = own_memory(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.is_set():
            peak = max(peak, own_memory())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, params = hf.load(folder, dtype=jnp.bfloat16)
    jax.block_until_ready(params)
    done.set()
    watcher.join()
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(json.dumps({"arrays": arrays, "peak": peak - start}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", help="where to write (default: the system's temporary folder)")
    parser.add_argument("--only", choices=tuple(CHECKPOINTS))
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        return measure(options.load)
    print("| checkpoint | size | largest tensor | experts of a block, one kind | peak beyond the arrays |")
    print("|---|---|---|---|---|")
    for name in [options.only] if options.only else CHECKPOINTS:
        raw = CHECKPOINTS[name]
        config = hf_config.from_json(raw)
        largest = max(np.prod(tensor.shape) for tensor in weights.tensors(config, "hf"))
        together = config.experts * config.width * config.ffn
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            total = write(Path(folder), raw)
            command = [sys.executable, "-m", "benchmarks.load_memory", f"--load={folder}"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout)
        sizes = 2 * largest, 2 * together, found["peak"] - found["arrays"]
        cells = " | ".join(f"{size / 1e6:.0f} MB" for size in sizes)
        print(f"| {name} | {total / 1e9:.1f} GB | {cells} |", flush=True)


if __name__ == "__main__":
    main()
