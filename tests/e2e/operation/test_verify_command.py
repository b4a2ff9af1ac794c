"""`penstock verify` and `penstock bench`."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from penstock.client.cli import bench
from penstock.client.cli import commands as cli

from ..support import MIB, Checkpoints, DaemonProcess


def sums(*paths: Path) -> str:
    return "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in paths)


def verify(daemon: DaemonProcess, *sources: Path) -> int:
    return cli.main(["verify", "--no-progress", "--socket-dir", str(daemon.socket_dir), *map(str, sources)])


def test_each_file_has_a_line_and_what_fits_is_ok(
    daemon: DaemonProcess, write: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    one, _ = write("a", 2)
    two, _ = write("b", 2, prefix="b.")
    (one.parent / "SHA256SUMS").write_text(sums(one))
    assert verify(daemon, one.parent) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"ok          {one}  2.10 MB, SHA-256",
        f"unverified  {two}  2.10 MB read; the store has no checksum, nor has SHA256SUMS",
    ]


def test_a_file_that_does_not_fit_is_named_and_the_others_are_read_all_the_same(
    daemon: DaemonProcess, write: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    one, _ = write("a", 1)
    two, _ = write("b", 1, prefix="b.")
    (one.parent / "SHA256SUMS").write_text(sums(one, two))
    content = bytearray(one.read_bytes())
    content[-1] ^= 1
    one.write_bytes(content)
    assert verify(daemon, one.parent) == 1
    said = capsys.readouterr()
    first, second = said.out.splitlines()
    assert first.startswith(f"CORRUPT     {one}  SHA-256 is {hashlib.sha256(content).hexdigest()}")
    assert second.startswith(f"ok          {two}")
    assert "1 files are corrupt or could not be read" in said.err


def test_the_name_of_a_file_forges_no_line_and_moves_no_cursor(
    daemon: DaemonProcess, write: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = write("a", 1)
    path.rename(path.with_name("a\nok          forged\x1b[2J.safetensors"))
    assert verify(daemon, path.parent) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("unverified")
    assert line.isprintable()
    assert verify(daemon, path.with_name("\x1b[2J")) == 1
    daemon_line, line = capsys.readouterr().err.splitlines()
    assert daemon_line.startswith("daemon ")
    assert line.startswith("penstock: ")
    assert line.isprintable()


def test_a_bench_measures_within_its_bytes_and_says_which_flags(
    write: Checkpoints, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = write("model", 8)
    monkeypatch.setattr(bench, "CONNECTIONS", (2,))
    arguments = ["bench", "--no-progress", "--bytes", "8MiB", "--seconds", "60", "--memory-limit", "32MiB"]
    assert cli.main([*arguments, str(path)]) == 0
    head, *rows, said = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "connections"
    assert [line.split()[0] for line in rows] == ["2", "2"]
    assert said.startswith("use penstockd --concurrency 2 --block-size ")


def test_a_bench_reads_no_more_than_its_bytes(write: Checkpoints) -> None:
    path, _ = write("model", 8)
    row = bench.measure([str(path)], 2, MIB, seconds=60, most_bytes=3 * MIB, memory_limit="32MiB")
    assert row.read_bytes == 3 * MIB


def test_a_bench_of_nothing_fails_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "CONNECTIONS", (2,))
    arguments = ["bench", "--no-progress", "--memory-limit", "32MiB"]
    assert cli.main([*arguments, str(tmp_path / "nothing.safetensors")]) == 1
    assert "does not exist" in capsys.readouterr().err
