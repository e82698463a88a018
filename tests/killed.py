"""Kill a writer of a run folder before each of its file operations, and look at what is left.

    python tests/killed.py write|replace FOLDER
    python tests/killed.py fit FOLDER ARGUMENTS OF stem-fast fit

A process of its own, because it forks: torch is imported once, and every fork runs the action until
SIGKILL. Prints one line a kill: "absent", or the mark of the run that loads. "write" makes a run of
three epochs, "replace" makes it over an old run, "fit" is the whole command (which takes longer, so
it is killed at every third operation only).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from stem_fast.data.schema import Encoding, Schema
from stem_fast.models.network import STEMNet
from stem_fast.training import checkpoint
from stem_fast.training.options import TrainingConfig

EVENTS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir")
ENCODING = Encoding(Schema({"click": "binary"}, categorical=("user",)), {"user": ["a", "b"]})


def marked_model(mark: float) -> STEMNet:
    """A tiny model whose embeddings are all ``mark``."""
    model = STEMNet(
        {"user": 4},
        ["click"],
        embedding_dim=2,
        num_shared_experts=1,
        expert_hidden_units=(2,),
        gate_hidden_units=(),
        tower_hidden_units=(),
    )
    torch.nn.init.constant_(model.embedding.weight, mark)
    return model


def write(run: Path, *, overwrite: bool = False) -> None:
    """What ``fit`` does to a run folder in three epochs, all of them better than the last."""
    training = TrainingConfig()
    checkpoint.create_run(run, marked_model(1), ENCODING, training, overwrite=overwrite)
    checkpoint.save_json(run / checkpoint.HISTORY, [1])
    for epoch in (2, 3):
        checkpoint.save_weights(run, marked_model(epoch))
        checkpoint.save_json(run / checkpoint.HISTORY, list(range(1, epoch + 1)))
    checkpoint.save_json(run / checkpoint.METRICS, {})


def kill_at(point: int, folder: Path) -> None:
    """SIGKILL this process before its file operation number ``point`` in ``folder``.

    The weights are written outside of Python, where no hook sees them, so they count as one more
    operation: killed when half of the file is there.
    """
    count = itertools.count(1)

    def hook(event: str, arguments: tuple) -> None:
        inside = event in EVENTS and str(arguments[0]).startswith(str(folder))
        if inside and next(count) == point:
            os.kill(os.getpid(), signal.SIGKILL)

    def halfway(tensors: dict, path: Path) -> None:
        save_file(tensors, path)
        size = os.path.getsize(path)
        if next(count) == point:
            os.truncate(path, size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    save_file = checkpoint.save_file
    checkpoint.save_file = halfway
    sys.addaudithook(hook)


def each_kill(action: Callable[[], object], folder: Path, stride: int) -> Iterator[None]:
    """Yield after every killed fork, and after the first that reaches its end."""
    for point in itertools.count(1, stride):
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # stdout is for the states
            try:
                kill_at(point, folder)
                action()
                os._exit(0)
            except BaseException as error:
                if isinstance(error, SystemExit) and not error.code:
                    os._exit(0)
                traceback.print_exc()
                os._exit(1)
        _, status = os.waitpid(child, 0)
        yield
        if not os.WIFSIGNALED(status):
            if status:
                raise SystemExit("the action failed by itself")
            return


def state(run: Path) -> str:
    """ "absent", or the first embedding of the run, which must load."""
    if not run.exists():
        return "absent"
    checkpoint.refuse_existing(run, overwrite=True)  # what is left over is never in the way
    model, _, _ = checkpoint.load_run(run)
    return f"{model.embedding.weight[1, 0].item():g}"


def main(mode: str, folder: Path, arguments: list[str]) -> None:
    torch.set_num_threads(1)
    run = folder / "run"
    actions: dict[str, Callable[[], object]] = {
        "write": lambda: write(run),
        "replace": lambda: write(run, overwrite=True),
    }
    if mode == "fit":
        from stem_fast.cli import app

        actions["fit"] = lambda: app(["fit", "--out", str(run), *arguments])
        # Both import a lot: here once, and not in every fork.
        torch.optim.Adam([torch.zeros(1)])
        with contextlib.redirect_stdout(None), contextlib.suppress(SystemExit):
            app(["fit", "--help"])
    folder.mkdir(exist_ok=True)
    if mode == "replace":
        checkpoint.create_run(run, marked_model(-1), ENCODING, TrainingConfig())
    for _ in each_kill(actions[mode], folder, stride=3 if mode == "fit" else 1):
        print(state(run), flush=True)
        for path in sorted(folder.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        if mode == "replace":
            checkpoint.create_run(run, marked_model(-1), ENCODING, TrainingConfig())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
