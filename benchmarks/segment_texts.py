"""Texts to cut into sentences, by kind; the same on every machine with the same packages.

They come from installed packages (reasoning-gym, champ-dataset, the environment's licences and READMEs) and
from the standard library. No network is needed.
"""

import ast
import functools
import importlib.metadata
import importlib.util
import json
import pathlib
import random
import re
import sysconfig

# Tasks of reasoning-gym whose questions and answers have sentences: stories, rules, worked answers, code,
# tables, drawings.
TASKS = (
    "acre",
    "advanced_geometry",
    "boxnet",
    "circuit_logic",
    "codeio",
    "color_cube_rotation",
    "dice",
    "family_relationships",
    "gsm_symbolic",
    "intermediate_integration",
    "jugs",
    "knights_knaves",
    "needle_haystack",
    "polynomial_equations",
    "propositional_logic",
    "self_reference",
    "sentence_reordering",
    "string_manipulation",
    "syllogism",
    "tower_of_hanoi",
    "tsumego",
    "zebra_puzzles",
)
OTHER_TASKS = (
    "ab",
    "aiw",
    "arc_1d",
    "bitwise_arithmetic",
    "calendar_arithmetic",
    "countdown",
    "course_schedule",
    "cryptarithm",
    "emoji_mystery",
    "figlet_font",
    "game_of_life_halting",
    "graph_color",
    "leg_counting",
    "list_functions",
    "mahjong_puzzle",
    "modulo_grid",
    "number_format",
    "path_star",
    "quantum_lock",
    "rubiks_cube",
    "shortest_path",
    "simple_geometry",
    "spiral_matrix",
    "string_splitting",
    "string_synthesis",
    "time_intervals",
    "word_sorting",
)
_LIST_ITEM = re.compile(r"\s*([-*+]|\d+[.)])\s")


def documents(kind: str, share: float = 1.0) -> list[str]:
    """Documents of one kind of SOURCES, in a fixed order; a `share` of them, evenly spread."""
    step = max(round(1 / share), 1)
    return [text for text in SOURCES[kind]()[::step] if text.strip()]


def _task(name, size=100):
    import reasoning_gym

    texts = []
    for entry in reasoning_gym.create_dataset(name, size=size, seed=7):
        worked = entry["metadata"].get("answer_cot", "")
        texts.append("\n\n".join(str(part) for part in (entry["question"], worked, entry["answer"])))
    return texts


@functools.cache
def _champ_data():
    folder = pathlib.Path(importlib.util.find_spec("champ_dataset").origin).parent
    return json.loads((folder / "dataset_files" / "v0.json").read_text("utf-8"))["problems"]


def _champ(field):
    return [
        "\n".join([problem[field], *(step[field] for step in problem["solution"]["steps"])])
        for problem in _champ_data().values()
    ]


def _champ_answers():
    return [a["text"] for problem in _champ_data().values() for a in problem["fws_annotations"].values()]


def _fiction():
    folder = pathlib.Path(importlib.util.find_spec("reasoning_gym").origin).parent
    text = (folder / "data" / "in_the_year_2889.txt").read_text("utf-8")
    paragraphs = text.split("\n\n")
    return ["\n\n".join(paragraphs[i : i + 8]) for i in range(0, len(paragraphs), 8)]


def _distributions():
    found = {d.metadata["Name"].lower(): d for d in importlib.metadata.distributions()}
    return [found[name] for name in sorted(found)]


def _licences():
    texts = set()
    for distribution in _distributions():
        for file in distribution.files or ():
            if re.match(r"(licen[cs]e|copying|notice|authors)", file.name.lower()) and file.suffix != ".py":
                path = pathlib.Path(distribution.locate_file(file))
                if path.is_file() and path.stat().st_size < 300_000:
                    texts.add(path.read_text("utf-8", "replace"))
    return sorted(texts)


def _manual():
    from pydoc_data import topics

    return [topics.topics[name] for name in sorted(topics.topics)]


def _readmes():
    texts = (d.metadata.get_payload() or d.metadata.get("Description") for d in _distributions())
    return [text for text in texts if text and len(text) > 500]


def _lists(readme):
    """Lists with at least four items, continuation lines included."""
    lists, run = [], []
    for line in [*readme.splitlines(), "end"]:
        if _LIST_ITEM.match(line) or (run and (not line.strip() or line.startswith("  "))):
            run.append(line)
            continue
        if sum(bool(_LIST_ITEM.match(item)) for item in run) >= 4:
            lists.append("\n".join(run))
        run = []
    return lists


def _modules():
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    return sorted(path for path in folder.glob("*.py") if path.stat().st_size > 2000)


def _docstrings():
    texts = []
    for path in _modules():
        nodes = ast.walk(ast.parse(path.read_text("utf-8")))
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        docs = [ast.get_docstring(node) for node in nodes if isinstance(node, kinds)]
        texts.append("\n\n".join(doc for doc in docs if doc and len(doc) > 80))
    return texts


def _code():
    return [path.read_text("utf-8") for path in _modules()[::2]]


def _package_code():
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    names = ("asyncio", "collections", "concurrent", "email", "http", "importlib", "json", "logging")
    names += ("multiprocessing", "sqlite3", "unittest", "urllib", "wsgiref", "xml", "zoneinfo")
    paths = sorted(path for name in names for path in (folder / name).rglob("*.py"))
    return [path.read_text("utf-8") for path in paths if path.stat().st_size > 2000]


# fmt: off
PIECES = ["Mr", "e.g", "U.S", "p.m", "Smith", "smith", "J", "b", "The", "the", "However", "yes",
          "word", "12", "3", "x-mr", "levine", "Zimmer", "\u00e9", "\u65e5\u672c"]
MARKS = [".", ".", ".", ".", "..", "...", "?", "!", ",", ";", ":", ")", "(", '"', "'", "\u201d",
         "\u201c", "*", "**", "-", "--", "`", "#", "$"]
# fmt: on
_GAPS = [" "] * 8 + ["\n", "\n\n", "  ", ""]


def scrambled(documents: int = 640, seed: int = 0) -> list[str]:
    """Random sequences of words, marks and white space: not real text, but every case of the rules."""
    draw = random.Random(seed)

    def document():
        parts = []
        for _ in range(draw.randint(4, 12)):
            parts += [draw.choice(PIECES), *draw.choices(MARKS, k=draw.randint(0, 2)), draw.choice(_GAPS)]
        return "".join(parts)

    return [document() for _ in range(documents)]


SOURCES = {f"reasoning-gym {task}": functools.partial(_task, task) for task in TASKS} | {
    "reasoning-gym (27 other tasks)": lambda: [text for task in OTHER_TASKS for text in _task(task, 20)],
    "champ solutions (LaTeX)": lambda: _champ("_raw_text"),
    "champ solutions (plain)": lambda: _champ("_text"),
    "champ model answers": _champ_answers,
    "fiction": _fiction,
    "licences": _licences,
    "Python's manual": _manual,
    "docstrings": _docstrings,
    "READMEs (Markdown)": _readmes,
    "lists (Markdown)": lambda: [text for readme in _readmes() for text in _lists(readme)],
    "code": _code,
    "code of packages": _package_code,
    "scrambled punctuation": scrambled,
}
