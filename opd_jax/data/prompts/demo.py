"""The demo prompts as a TFDS dataset in array_record files, built once into a cache folder.

A quarter of each split is everyday requests written for this project (`everyday.json`). The rest is
grade-school problems with a numeric answer, from reasoning-gym's `gsm_symbolic`.
"""

import contextlib
import fcntl
import hashlib
import io
import itertools
import json
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import tensorflow_datasets as tfds

from opd_jax.errors import UserError

EVERYDAY_FILE = Path(__file__).with_name("everyday.json")
HELDOUT_EVERY = 4  # requests 3, 7, 11, ... of the file are held out
PROBLEMS_A_REQUEST = 3
BUILDING = ".building-"  # what the name of an unfinished folder begins with
LOCK = ".lock"
GSM_SEEDS = {"train": 0, "heldout": 1}


def everyday(split: str) -> list[str]:
    """The everyday requests of "train" or "heldout", in the order of the file."""
    requests = json.loads(EVERYDAY_FILE.read_text(encoding="utf-8"))
    held = [i % HELDOUT_EVERY == HELDOUT_EVERY - 1 for i in range(len(requests))]
    wanted = split == "heldout"
    return [text for text, is_held in zip(requests, held, strict=True) if is_held == wanted]


def grade_school(split: str, count: int, exclude: set[str]) -> list[tuple[str, str]]:
    """`count` distinct (question, answer) pairs of the split's seed, none of them in `exclude`."""
    try:
        import reasoning_gym
    except ImportError as error:
        raise UserError(
            "data.source=demo: the package reasoning-gym is missing; pip install reasoning-gym"
        ) from error
    # The generator sometimes repeats a question; twice the number is enough.
    dataset = reasoning_gym.create_dataset("gsm_symbolic", size=2 * count, seed=GSM_SEEDS[split])
    pairs = {item["question"]: item["answer"] for item in dataset}
    fresh = [(question, answer) for question, answer in pairs.items() if question not in exclude]
    return fresh[:count]


class OpdDemo(tfds.core.GeneratorBasedBuilder):
    """Splits "train" and "heldout" of {prompt, answer}; an empty answer means there is none.

    Both splits repeat one request and three problems, so that every prefix has the same mixture. No text is
    in both splits.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {"prompt": tfds.features.Text(), "answer": tfds.features.Text()}
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        del dl_manager  # nothing is downloaded
        seen: set[str] = set()
        splits = {}
        for split in ("heldout", "train"):
            requests = everyday(split)
            problems = grade_school(split, PROBLEMS_A_REQUEST * len(requests), exclude=seen)
            seen.update(question for question, _ in problems)
            splits[split] = self._generate_examples(requests, problems)
        return splits

    def _generate_examples(
        self, requests: list[str], problems: list[tuple[str, str]]
    ) -> Iterator[tuple[int, dict[str, str]]]:
        fresh = iter(problems)
        for i, request in enumerate(requests):
            group = [(request, ""), *itertools.islice(fresh, PROBLEMS_A_REQUEST)]
            for j, (prompt, answer) in enumerate(group):
                yield i * len(group) + j, {"prompt": prompt, "answer": answer}


def prepare(cache: Path) -> Path:
    """Builds the dataset under `cache` unless it is there; returns its folder.

    The folder's name has a digest of the sources, so that an edited request never uses an old cache.
    Processes that build at the same time use folders of their own. The first rename wins, and the others use
    its result. What a killed process left unfinished is removed.

    Raises:
      UserError: the cache cannot be written, or reasoning-gym is missing.
    """
    sources = [EVERYDAY_FILE.read_text(encoding="utf-8"), HELDOUT_EVERY, PROBLEMS_A_REQUEST, GSM_SEEDS]
    digest = hashlib.sha256(json.dumps(sources).encode()).hexdigest()[:12]
    final = cache / f"opd_demo-{OpdDemo.VERSION}-{digest}"
    _remove_abandoned(cache)
    if final.exists():
        return final
    with contextlib.ExitStack() as stack:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            scratch = stack.enter_context(_scratch(cache))
        except OSError as error:
            raise UserError(
                f"data.cache={cache}: cannot be written ({error.strerror}); name another folder"
            ) from error
        tfds.disable_progress_bar()
        builder = OpdDemo(data_dir=scratch, file_format="array_record")
        # TFDS prints a message about downloading, although it downloads nothing.
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
        try:
            Path(builder.data_path).rename(final)
        except OSError:
            if not final.exists():
                raise
    return final


@contextlib.contextmanager
def _scratch(cache: Path) -> Iterator[Path]:
    """A folder to build in, which is locked until it is removed or this process ends."""
    lock = None
    while lock is None:
        folder = Path(tempfile.mkdtemp(prefix=BUILDING, dir=cache))
        lock = _locked(folder)
    with lock:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _locked(folder: Path) -> IO[str] | None:
    """The folder's lock file, locked; None if another process removed the folder before that."""
    with contextlib.suppress(FileNotFoundError):
        lock = (folder / LOCK).open("a+")
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / LOCK).exists():
            lock.write(platform.node())
            lock.flush()
            return lock
        lock.close()
    return None


def _remove_abandoned(cache: Path) -> None:
    """Removes the unfinished folders of processes of this host that have ended: the system unlocked them.

    Folders of other hosts stay, because some shared file systems do not show a lock to them.
    """
    for folder in cache.glob(f"{BUILDING}*"):
        with contextlib.suppress(OSError), (folder / LOCK).open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.seek(0)
            if lock.read().strip() in ("", platform.node()):
                shutil.rmtree(folder, ignore_errors=True)
