"""README, CONTRIBUTING and docs: examples run, commands and files exist, figures are those of the
results files.

A block that cannot run here has ``<!-- checked only: REASON -->`` before it. Of it, and of code
within sentences, the commands, flags, files and names are checked.
"""

from __future__ import annotations

import importlib
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch
import typer
from pyarrow import csv
from typer.testing import CliRunner

from bench import run as bench_run
from stem_fast import STEMNet
from stem_fast.cli import app
from stem_fast.training.options import OPTIONS, fit_settings

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted([README, ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(
    r"(?:^<!-- checked only: (?P<why>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
SPAN = re.compile(r"`([^`\n]+)`")


class Block(NamedTuple):
    where: str  # page:line
    language: str
    why: str | None  # why it is checked only
    text: str


def read_blocks(page: Path) -> list[Block]:
    source, name = page.read_text("utf-8"), page.relative_to(ROOT)
    return [
        Block(
            f"{name}:{source[: found.start('text')].count(chr(10)) + 1}",
            found["language"],
            found["why"],
            found["text"],
        )
        for found in FENCE.finditer(source)
    ]


BLOCKS = [block for page in PAGES for block in read_blocks(page)]


def every(*languages: str, run: bool = True) -> Any:
    """Parametrizes a test by the blocks of these languages that run, or that are checked only."""
    found = [b for b in BLOCKS if b.language in languages and run == (b.why is None)]
    assert found
    return pytest.mark.parametrize("block", found, ids=[block.where for block in found])


@pytest.fixture
def docs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports what docs/ makes pages with."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    assert {(b.language, b.why is None) for b in BLOCKS} == {
        ("python", True),
        ("yaml", True),
        ("sh", True),
        ("sh", False),
    }
    fences = sum(page.read_text("utf-8").count("```") for page in PAGES)
    assert fences == 2 * len(BLOCKS)


# Blocks that run


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with small tables of the names and columns that examples read."""
    folder = tmp_path_factory.mktemp("docs")
    data = folder / "KuaiRand-Pure" / "data"
    data.mkdir(parents=True)
    draw = np.random.default_rng(0)

    def write(name: str, **columns: Any) -> None:
        csv.write_csv(pa.table(columns), data / name)

    for name, rows in (
        ("log_standard_4_08_to_4_21_pure.csv", 600),
        ("log_standard_4_22_to_5_08_pure.csv", 200),
    ):
        write(
            name,
            user_id=draw.integers(0, 20, rows),
            video_id=draw.integers(0, 30, rows),
            date=draw.integers(20220421, 20220424, rows),
            is_click=draw.integers(0, 2, rows),
            long_view=draw.integers(0, 2, rows),
            tab=draw.integers(0, 2, rows),
        )
    write("new_rows.csv", user_id=[1, 2, 3], video_id=[4, 5, 6], tab=[0, 1, 0])
    write(
        "user_features_pure.csv",
        user_id=np.arange(20),
        user_active_degree=["full", "low"] * 10,
        follow_user_num_range=np.arange(20) % 3,
    )
    features = ("author_id", "music_id", "tag", "video_type", "upload_type")
    write(
        "video_features_basic_pure.csv",
        video_id=np.arange(30),
        **{name: draw.integers(0, 4, 30) for name in features},
    )
    model = STEMNet({"user_id": 9, "video_id": 7}, ["finish", "like"])
    torch.save(model.to_official(), data / "STEM_TiktokLarge.model")
    before = Path.cwd(), torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEM_FAST_CACHE", str(folder / "cache"))
        first = next(b for b in BLOCKS if b.where.startswith("README") and "fit" in b.text)
        run_commands(first, folder)
        yield folder
    os.chdir(before[0])
    torch.set_num_threads(before[1])


def words(block: Block) -> list[list[str]]:
    """The commands of a block, split as a shell does."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [found for line in lines if (found := shlex.split(line, comments=True))]


def run_commands(block: Block, folder: Path) -> None:
    os.chdir(folder)
    for command in words(block):
        name, *arguments = command
        if name == "cd":
            os.chdir(arguments[0])
        elif name == "stem-fast":
            # Several pages make the same run.
            again = ["--overwrite"] if arguments[0] in ("fit", "synth") else []
            result = CliRunner().invoke(app, [*arguments, *again])
            assert result.exit_code == 0, f"{block.where}: {shlex.join(command)}\n{result.output}"
        elif command[:3] == ["python", "-m", "bench.run"]:
            os.chdir(ROOT)
            assert bench_run.main(command[3:]) == 0
        else:
            pytest.fail(f"{block.where}: {name!r} does not run here: mark it 'checked only'")


@every("sh")
def test_commands_run(block: Block, workspace: Path) -> None:
    run_commands(block, workspace)


@every("python")
def test_python_runs(block: Block, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace / "KuaiRand-Pure" / "data")
    exec(compile(block.text, block.where, "exec"), {"__name__": "example"})


@every("yaml")
def test_yaml_is_read(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(f"train: a\nvalid: b\nout: c\n{block.text}", "utf-8")
    assert fit_settings({}, file).schema.tasks


# Code that does not run


def subcommands(root: Any) -> dict[str, Any]:
    found = {}
    for name, command in root.commands.items():
        found[name] = command
        inner = getattr(command, "commands", {})
        found |= {f"{name} {each}": command for each, command in inner.items()}
    return found


COMMANDS = subcommands(typer.main.get_command(app))
FLAGS = {
    name: {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)}
    for name, command in COMMANDS.items()
}
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)


def script_flags(path: Path) -> set[str]:
    return {*re.findall(r'add_argument\(\s*"(--[\w-]+)"', path.read_text("utf-8")), "--help"}


def check_command(command: list[str]) -> None:
    """That a command, its flags and files exist; words in capitals stand for a reader's own."""
    while "=" in command[0]:
        command = command[1:]
    name, *arguments = command
    name = name.removeprefix(".venv/bin/")
    given = {word.split("=")[0] for word in arguments if word.startswith("-") and word != "-m"}
    for word in arguments:
        if word.startswith(("bench/", "tests/", "docs/")) and not word.isupper():
            assert "NAME" in word or (ROOT / word).exists(), word
    if name == "stem-fast" and not arguments[0].isupper():
        assert arguments[0] in COMMANDS
        assert given <= FLAGS[arguments[0]] | {"--help"}, given - FLAGS[arguments[0]]
    elif name == "make":
        assert {word for word in arguments if "=" not in word} <= {*TARGETS}
    elif name == "python":
        module = arguments[0] != "-m"
        path = ROOT / (arguments[0] if module else arguments[1].replace(".", "/") + ".py")
        assert given <= script_flags(path), given - script_flags(path)
    elif name == "bash":
        assert (ROOT / arguments[0]).exists()
    else:
        assert name in ("stem-fast", "pip", "git", "source"), name


@every("sh", run=False)
def test_commands_that_do_not_run_exist(block: Block) -> None:
    for command in words(block):
        check_command(command)


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        if all((found := getattr(found, part, None)) is not None for part in parts[end:]):
            return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_code_within_sentences_exists(page: Path) -> None:
    source = FENCE.sub("", page.read_text("utf-8"))
    scripts = [*(ROOT / "bench").glob("*.py"), ROOT / "tests/fixtures/make_official.py"]
    flags = set().union(*FLAGS.values(), *map(script_flags, scripts))
    for span in SPAN.findall(source):
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]+", span):
            assert flag in flags, span
        if re.match(r"(\w+=\S+ )*(stem-fast|make|python -m bench\S*) ", span):
            check_command(shlex.split(span.replace(" ...", "")))
        if re.fullmatch(r"(stem_fast|bench|tests|docs|kernels|csrc)/[\w./]*", span):
            assert (ROOT / span).exists(), span
        if name := re.match(r"stem_fast(\.\w+)+", span):
            assert resolves(name[0]), span
    for name in re.findall(r"^::: ([\w.]+)$", source, re.MULTILINE):
        assert resolves(name), name
    if page.parent == ROOT:  # mkdocs looks at links of docs/
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", source):
            assert (ROOT / link).exists(), link


def test_what_does_not_exist_is_seen() -> None:
    for command in (
        "stem-fast fitt",
        "stem-fast fit --no-such-flag 1",
        "make nothing",
        "python -m bench.run --no-such-flag",
        "bash bench/nothing.sh",
        "stem-fast fit --config bench/nothing.yaml",
        "npm install",
    ):
        with pytest.raises((AssertionError, KeyError)):
            check_command(shlex.split(command))
    assert resolves("stem_fast.optim.ExactAdam")
    assert not resolves("stem_fast.optim.InexactAdam")
    assert not resolves("stem_fast.nothing.ExactAdam")


def test_readme_is_short() -> None:
    assert len(README.read_text("utf-8").splitlines()) <= 150


# Figures


def test_tables_of_readme_are_those_of_the_results(docs: Any) -> None:
    tables = docs("tables")
    source = README.read_text("utf-8")
    names = re.findall(r"^<!-- table: (.+) -->$", source, re.MULTILINE)
    assert names
    for name in names:
        _, _, rest = source.partition(f"<!-- table: {name} -->\n")
        assert rest.startswith(tables.markdown(name) + "\n\n"), name


def test_figures_of_readme_are_those_of_the_results(docs: Any) -> None:
    figures = {name: make() for name, make in docs("tables").FIGURES.items()}
    text = " ".join(README.read_text("utf-8").split())
    for sentence in (
        "takes {adam 10M ms} ms on two CPU threads",
        "fused dense Adam takes {dense adam 10M ms} ms",
        "is {step ratio} times as fast as the official code's at 0.6 million rows and "
        "{step ratio 10M} times at 10 million",
        "is {finish AUC} here and {official finish AUC} in the official code",
    ):
        expected = re.sub(r"\{(.+?)\}", lambda found: figures[found[1]], sentence)
        assert expected in text, expected


def test_every_results_file_is_in_the_docs(docs: Any) -> None:
    tables = docs("tables")
    pages = "\n".join(page.read_text("utf-8") for page in (ROOT / "docs").rglob("*.md"))
    used = re.findall(r"<!-- table: (.+) -->", pages)
    assert {*tables.TABLES} <= {*used}
    for name in used:
        assert tables.markdown(name).startswith(("| ", "AMD", "NVIDIA")), name
    assert {*re.findall(r"\{\{ (.+?) \}\}", pages)} <= {*tables.FIGURES}
    assert {path.stem for path in tables.RESULTS.glob("*.json")} == {*tables.READ}


# Pages that are made from the code


def test_the_command_reference_has_every_option(docs: Any) -> None:
    reference = docs("commands").reference()
    sections = dict(
        part.partition("\n")[::2] for part in re.split(r"^## stem-fast ", reference, flags=re.M)
    )
    assert {*sections} >= {*COMMANDS}
    for name, option in OPTIONS.items():
        (line,) = (row for row in sections["fit"].splitlines() if f"`{name}` |" in row)
        assert option.help in line
        assert f"`--{name.replace('_', '-')}" in line
        assert option.shown is None or str(option.shown) in line.split(" | ")[2]
    for name in {*COMMANDS} - {"fit"}:
        for flag in FLAGS[name] - {"--help"}:
            assert flag in sections[name].lower() or flag.upper() in sections[name]


def test_the_picture_of_rooms_is_that_of_the_imports(docs: Any) -> None:
    rooms = docs("rooms")
    graph = rooms.imports()
    assert "models" in graph["training"]
    assert "training" not in graph["models"]
    assert {*graph} == {
        path.stem
        for path in (ROOT / "stem_fast").iterdir()
        if not path.name.startswith("_")
        and (path.suffix == ".py" or (path / "__init__.py").exists())
    }
    picture = rooms.picture()
    assert all(f">{room}</text>" in picture for room in graph)
