"""Files appear whole or not at all; the cache folder is the user's alone."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from graphopt.errors import GraphoptError
from graphopt.files import atomic_path, cache_dir

POSIX = pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")


def contents(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in folder.iterdir() if p.is_file()}


def test_nothing_is_seen_before_the_end(tmp_path: Path) -> None:
    target = tmp_path / "m.pt2"
    target.write_text("old")
    with atomic_path(target) as path:
        path.write_text("new")
        assert path.name == "m.pt2" and path.parent.parent == tmp_path
        assert contents(tmp_path) == {"m.pt2": "old"}
    assert contents(tmp_path) == {"m.pt2": "new"} and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_failure_leaves_all_as_it_was(error: type[BaseException], tmp_path: Path) -> None:
    target = tmp_path / "m.onnx"
    target.write_text("old")
    with pytest.raises(error), atomic_path(target) as path:
        path.write_text("half")
        path.with_name("m.onnx.data").write_text("half")
        raise error
    assert contents(tmp_path) == {"m.onnx": "old"} and len(list(tmp_path.iterdir())) == 1


def test_side_files_come_along(tmp_path: Path) -> None:
    target = tmp_path / "m.onnx"
    target.write_text("old")
    (tmp_path / "m.onnx.data").write_text("old data")
    with atomic_path(target) as path:
        path.write_text("new")
        path.with_name("m.onnx.data").write_text("new data")
        (path.parent / "sub").mkdir()
        (path.parent / "sub" / "x").write_text("x")
    assert contents(tmp_path) == {"m.onnx": "new", "m.onnx.data": "new data"}
    assert contents(tmp_path / "sub") == {"x": "x"}


def test_the_target_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a reader never finds a new model beside old data that it still lacks."""
    order: list[str] = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda a, b: (order.append(a.name), replace(a, b))[1])
    with atomic_path(tmp_path / "m.onnx") as path:
        for name in ("m.onnx", "a.data", "z.data"):
            path.with_name(name).write_text(name)
    assert order[-1] == "m.onnx" and len(order) == 3


def test_failing_rename_puts_the_set_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "m.onnx"
    target.write_text("old")
    (tmp_path / "a.data").write_text("old data")
    replace = Path.replace

    def failing(self: Path, place: Path) -> Path:
        if self.name == "m.onnx":
            raise OSError("disk full")
        return replace(self, place)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OSError, match="disk full"), atomic_path(target) as path:
        path.write_text("new")
        path.with_name("a.data").write_text("new data")
        path.with_name("b.data").write_text("more data")
    assert contents(tmp_path) == {"m.onnx": "old", "a.data": "old data"}
    assert len(list(tmp_path.iterdir())) == 2


def test_folder_as_target(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for prepared in (False, True):
        if prepared:
            target.mkdir()
        with atomic_path(target) as path:
            path.mkdir()
            (path / "config.json").write_text("{}")
        assert contents(target) == {"config.json": "{}"}
        (target / "config.json").unlink()
        target.rmdir()


def test_folder_that_is_not_empty_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "mine").write_text("x")
    with pytest.raises(GraphoptError, match="a folder stands"), atomic_path(target) as path:
        path.write_text("file")
    assert contents(target) == {"mine": "x"} and len(list(tmp_path.iterdir())) == 1


def test_nothing_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GraphoptError, match="nothing was written"), atomic_path(tmp_path / "m"):
        pass
    assert not list(tmp_path.iterdir())


def test_missing_parent_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(GraphoptError, match="does not exist"),
        atomic_path(tmp_path / "absent" / "m"),
    ):
        raise AssertionError("the block must not run")


@POSIX
def test_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "m")
    with atomic_path(tmp_path / "link") as path:
        path.write_text("new")
    assert (tmp_path / "link").is_symlink() and contents(tmp_path / "real") == {"m": "new"}


@POSIX
def test_permissions(tmp_path: Path) -> None:
    """A new file gets what the process's mask allows, a replaced one keeps its own."""
    before = os.umask(0o022)
    try:
        target = tmp_path / "m"
        for expected in (0o644, 0o600):
            with atomic_path(target) as path:
                path.write_text("x")
            assert stat.S_IMODE(target.stat().st_mode) == expected
            target.chmod(0o600)
    finally:
        os.umask(before)


def test_many_writers(tmp_path: Path) -> None:
    """The last one wins, whole."""
    target = tmp_path / "m"

    def write(letter: str) -> None:
        for _ in range(10):
            with atomic_path(target) as path:
                path.write_text(letter * 1000)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    text = target.read_text()
    assert len(text) == 1000 and len(set(text)) == 1
    assert len(list(tmp_path.iterdir())) == 1


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_cache_is_made_private(home: Path) -> None:
    folder = cache_dir("bench")
    assert folder == home / "graphopt" / "bench" == cache_dir("bench")
    for made in (folder, folder.parent):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700


@POSIX
def test_cache_is_made_private_again(home: Path) -> None:
    cache_dir().chmod(0o755)
    assert stat.S_IMODE(cache_dir().stat().st_mode) == 0o700


@pytest.mark.parametrize("configured", ["", "relative/cache"])
def test_cache_falls_back_to_the_platforms_folder(
    configured: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The XDG specification has relative paths ignored."""
    monkeypatch.setenv("XDG_CACHE_HOME", configured)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("graphopt.files.sys.platform", "linux")
    assert cache_dir() == tmp_path / ".cache" / "graphopt"
    monkeypatch.setattr("graphopt.files.sys.platform", "darwin")
    assert cache_dir() == tmp_path / "Library" / "Caches" / "graphopt"


@POSIX
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_cache_that_others_may_write_is_refused(home: Path, mode: int) -> None:
    cache_dir().chmod(mode)
    with pytest.raises(GraphoptError, match="other users may write") as refusal:
        cache_dir()
    assert "XDG_CACHE_HOME" in (refusal.value.fix or "")


@POSIX
def test_cache_that_is_a_link_is_refused(home: Path, tmp_path: Path) -> None:
    home.mkdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (home / "graphopt").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(GraphoptError, match="is a link"):
        cache_dir()


@POSIX
def test_cache_of_someone_else_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_dir()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(GraphoptError, match="belongs to user id"):
        cache_dir()


def test_cache_that_cannot_be_made(home: Path) -> None:
    home.write_text("a file")
    with pytest.raises(GraphoptError, match="cannot be made"):
        cache_dir()
