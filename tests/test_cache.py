"""Cache entries: whole or absent at every moment, damage is noticed, nothing is left behind."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stem_fast.common import DataError
from stem_fast.data.cache import (
    DAY,
    META,
    Writer,
    cache_root,
    entries,
    evict,
    read_entry,
    write_entry,
)


def fill(writer: Writer) -> None:
    writer.append("a", np.arange(6, dtype=np.int32).reshape(3, 2))
    writer.append("a", np.arange(2, dtype=np.int32).reshape(1, 2))
    writer.append("b", np.zeros((4, 0), np.float32))
    writer.append("c", np.zeros(0, np.int64))


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    path = tmp_path / "cache" / "entry"
    with write_entry(path) as writer:
        fill(writer)
    return path


def arrays(entry: Path) -> dict[str, np.ndarray]:
    found = read_entry(entry)
    assert found is not None
    return found


def test_round_trip(entry: Path) -> None:
    found = arrays(entry)
    assert set(found) == {"a", "b", "c"}
    np.testing.assert_array_equal(found["a"], [[0, 1], [2, 3], [4, 5], [0, 1]])
    assert found["a"].dtype == np.int32
    assert isinstance(found["a"], np.memmap)
    assert found["b"].shape == (4, 0)
    assert found["c"].shape == (0,)
    assert [path.name for path in entry.parent.iterdir()] == ["entry"]
    # Plain .npy files, for other programs.
    np.testing.assert_array_equal(np.load(entry / "a.npy", allow_pickle=False), found["a"])


def test_writing_to_a_mapped_array_leaves_the_file_alone(entry: Path) -> None:
    arrays(entry)["a"][:] = 7
    assert arrays(entry)["a"][0, 1] == 1


def test_a_row_order_other_than_c_is_kept(tmp_path: Path) -> None:
    with write_entry(tmp_path / "entry") as writer:
        writer.append("a", np.asfortranarray([[1, 2], [3, 4]]))
    assert arrays(tmp_path / "entry")["a"].tolist() == [[1, 2], [3, 4]]


def test_no_entry(tmp_path: Path) -> None:
    assert read_entry(tmp_path / "nothing") is None


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def garble(path: Path) -> None:
    path.write_bytes(b"x" * path.stat().st_size)


@pytest.mark.parametrize("file", ["a.npy", META])
@pytest.mark.parametrize("damage", [Path.unlink, truncate, garble])
def test_damage_is_noticed_and_mended(
    entry: Path, file: str, damage: Callable[[Path], None]
) -> None:
    damage(entry / file)
    assert read_entry(entry) is None
    with write_entry(entry) as writer:
        fill(writer)
    assert arrays(entry)["a"].shape == (4, 2)
    assert [path.name for path in entry.parent.iterdir()] == ["entry"]


def test_a_byte_that_changed_is_noticed(entry: Path) -> None:
    content = (entry / "a.npy").read_bytes()
    for place in (*range(0, len(content), 17), len(content) - 1):
        changed = bytearray(content)
        changed[place] ^= 0x80
        (entry / "a.npy").write_bytes(changed)
        assert read_entry(entry) is None
    (entry / "a.npy").write_bytes(content)
    assert read_entry(entry) is not None


@pytest.mark.parametrize(
    "content",
    ["[]", "3", "{}", "null", '{"a": "x"}', '{"a": 160}', '{"gone": 10}', '{"a": ' + "[" * 200_000],
)
def test_meta_data_of_another_form_is_damage(entry: Path, content: str) -> None:
    (entry / META).write_text(content)
    assert read_entry(entry) is None


def test_an_empty_array_file_is_damage(entry: Path) -> None:
    (entry / "a.npy").write_bytes(b"")
    sizes = json.loads((entry / META).read_text())
    (entry / META).write_text(json.dumps({**sizes, "a": 0}))
    assert read_entry(entry) is None


def aborted(entry: Path, error: type[BaseException]) -> None:
    with write_entry(entry) as writer:
        fill(writer)
        raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_an_aborted_write_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        aborted(tmp_path / "entry", error)
    assert list(tmp_path.iterdir()) == []


def test_an_aborted_rewrite_leaves_the_entry(entry: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        aborted(entry, KeyboardInterrupt)
    assert arrays(entry)["a"].shape == (4, 2)
    assert list(entry.parent.iterdir()) == [entry]


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from stem_fast.data.cache import write_entry
with write_entry(Path(sys.argv[1])) as writer:
    writer.append("a", np.arange(10**6))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_write_never_shows_and_is_swept_later(tmp_path: Path) -> None:
    entry = tmp_path / "entry"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(entry)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert read_entry(entry) is None
    (left,) = tmp_path.iterdir()
    other = tmp_path / ".other.left"
    other.mkdir()
    os.utime(other, (0, 0))
    with write_entry(entry) as writer:
        fill(writer)
    assert left.exists()  # it might belong to a process that is still at work
    os.utime(left, (left.stat().st_mtime - 2 * DAY,) * 2)
    with write_entry(entry) as writer:
        fill(writer)
    assert {path.name for path in tmp_path.iterdir()} == {"entry", ".other.left"}


def test_the_first_of_two_racing_writers_stays(tmp_path: Path) -> None:
    entry = tmp_path / "entry"
    with write_entry(entry) as slow:
        fill(slow)
        with write_entry(entry) as fast:
            fill(fast)
        inode = (entry / "a.npy").stat().st_ino
    assert (entry / "a.npy").stat().st_ino == inode
    assert arrays(entry)["a"].shape == (4, 2)
    assert list(tmp_path.iterdir()) == [entry]


def test_a_race_lost_at_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = tmp_path / "entry"
    rename = os.rename

    def late(source: Path, target: Path) -> None:
        monkeypatch.setattr(os, "rename", rename)
        with write_entry(entry) as winner:
            fill(winner)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    with write_entry(entry) as loser:
        fill(loser)
    assert arrays(entry)["a"].shape == (4, 2)
    assert list(tmp_path.iterdir()) == [entry]


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    message = f"{tmp_path / 'file'}: cannot write the cache ("
    with (
        pytest.raises(DataError, match=re.escape(message)),
        write_entry(tmp_path / "file" / "entry"),
    ):
        pass

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Writer, "append", full)
    message = "cannot write the cache (No space left on device): set STEM_FAST_CACHE to another"
    with (
        pytest.raises(DataError, match=re.escape(message)),
        write_entry(tmp_path / "cache" / "entry") as writer,
    ):
        fill(writer)
    assert list((tmp_path / "cache").iterdir()) == []


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEM_FAST_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache_root() == tmp_path / ".cache" / "stem_fast"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_root() == Path("/xdg/stem_fast")
    monkeypatch.setenv("STEM_FAST_CACHE", "/mine")
    assert cache_root() == Path("/mine")
    assert cache_root(tmp_path) == tmp_path
    assert cache_root("") == Path("/mine")


# ---- eviction ------------------------------------------------------------------------------


def named(root: Path, letter: str, used: float, size: int = 1000) -> Path:
    path = root / (letter * 40)
    with write_entry(path) as writer:
        writer.append("a", np.zeros(size, np.int8))
    os.utime(path, (used, used))
    return path


def test_the_longest_unused_goes_first(tmp_path: Path) -> None:
    paths = {
        letter: named(tmp_path, letter, used)
        for letter, used in zip("abcd", (30, 10, 20, 40), strict=True)
    }
    (tmp_path / "mine").mkdir()
    found = entries(tmp_path)
    assert [entry.path for entry in found] == [paths[letter] for letter in "bcad"]
    size = found[0].size
    assert size == sum(file.stat().st_size for file in paths["b"].iterdir()) > 1000
    read_entry(paths["b"])  # which makes it the newest
    gc.collect()
    assert evict(tmp_path, 4 * size) == []
    removed = evict(tmp_path, 2.5 * size)
    assert [entry.path for entry in removed] == [paths["c"], paths["a"]]
    assert {path.name[0] for path in tmp_path.iterdir()} == {"b", "d", "m"}
    assert read_entry(paths["b"]) is not None


def test_what_killed_writes_left_goes_too(tmp_path: Path) -> None:
    """Of every entry, a day later; what has another name is nobody's business here."""
    old, new, mine = f".{'a' * 40}.x1y2z3", f".{'b' * 40}.x1y2z3", f".{'c' * 39}.x1y2z3"
    for name in (old, new, mine):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.npy").write_bytes(bytes(1000))
    for name in (old, mine):
        os.utime(tmp_path / name, (time.time() - 2 * DAY,) * 2)
    kept = named(tmp_path, "d", 1)
    assert evict(tmp_path, 10**6) == []
    assert {path.name for path in tmp_path.iterdir()} == {new, mine, kept.name}
    assert evict(tmp_path / "nowhere", 0) == []


USING = """
import sys
from pathlib import Path
from stem_fast.data.cache import read_entry
arrays = read_entry(Path(sys.argv[1]))
print("read", flush=True)
sys.stdin.readline()
print(arrays["a"].sum())
"""


def test_an_entry_in_use_stays(tmp_path: Path) -> None:
    """By another process, and by this one as long as one of its arrays, or a view, is there."""
    used, mine, other = (named(tmp_path, letter, i) for i, letter in enumerate("abc"))
    command = [sys.executable, "-c", USING, str(used)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as user:
        assert user.stdin is not None
        assert user.stdout is not None
        assert user.stdout.readline() == "read\n"
        view = torch.from_numpy(arrays(mine)["a"])[10:]
        gc.collect()
        assert [entry.path for entry in evict(tmp_path, -1)] == [other]
        user.stdin.write("\n")
        user.stdin.flush()
        assert user.stdout.readline() == "0\n"
    assert view.sum() == 0
    assert [entry.path for entry in evict(tmp_path, -1)] == [used]
    del view
    gc.collect()
    assert [entry.path for entry in evict(tmp_path, -1)] == [mine]
    assert list(tmp_path.iterdir()) == []
