"""Warm sets of a real daemon: a ConfigMap's links, status and metrics, `penstock warm-set check`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from penstock.client.cli import commands as cli

from ..conftest import StartDaemon
from ..support import MIB, Checkpoints, DaemonProcess, same, wait_until

LIMIT = ("--memory-limit", "16MiB")


class ConfigMapVolume:
    """A directory as kubelet makes one: the file is a link through `..data`, a link that is swapped."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._versions = 0
        self.file = directory / "warm-set.yaml"

    def write(self, *entries: dict[str, Any]) -> None:
        self._versions += 1
        version = self._directory / f"..2026_11_28_{self._versions}"
        version.mkdir()
        (version / self.file.name).write_text(json.dumps({"checkpoints": entries}))
        swapped = self._directory / "..data_tmp"
        swapped.symlink_to(version.name)
        swapped.rename(self._directory / "..data")
        if not self.file.is_symlink():
            self.file.symlink_to(f"..data/{self.file.name}")
        for old in self._directory.glob("..2026*"):
            if old != version:
                (old / self.file.name).unlink()
                old.rmdir()


@pytest.fixture
def volume(tmp_path: Path) -> ConfigMapVolume:
    directory = tmp_path / "volume"
    directory.mkdir()
    return ConfigMapVolume(directory)


def states(daemon: DaemonProcess) -> dict[str, str]:
    return {entry["name"]: entry["state"] for entry in daemon.status()["warm_set"]["entries"]}


def metric(daemon: DaemonProcess, name: str) -> float:
    lines = daemon.http("/metrics")[1].decode().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name} ")]
    return float(line.split()[1])


def test_a_swap_of_a_config_map_s_links_is_noticed_and_reconciled(
    start_daemon: StartDaemon, volume: ConfigMapVolume, checkpoints: Checkpoints
) -> None:
    (one, tensors), (two, _) = checkpoints("one"), checkpoints("two")
    volume.write({"name": "one", "source": str(one), "pin": True})
    daemon = start_daemon(*LIMIT, "--warm-set", str(volume.file))
    wait_until(lambda: states(daemon) == {"one": "warm"}, "the first checkpoint to be warm")
    volume.write({"name": "two", "source": str(two)}, {"name": "gone", "source": "/nothing"})
    wait_until(lambda: states(daemon) == {"two": "warm", "gone": "failed"}, "the second to be warm")
    stages = {Path(stage["sources"][0]).stem: stage["pinned"] for stage in daemon.status()["stages"]}
    assert stages == {"one": False, "two": False}
    before = daemon.read_bytes()
    with daemon.client().load(one) as load:
        same(load, tensors)
    assert daemon.read_bytes() == before


def test_status_page_and_metrics_tell_the_state_of_every_entry(
    start_daemon: StartDaemon,
    volume: ConfigMapVolume,
    checkpoints: Checkpoints,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, large = checkpoints("one")[0], checkpoints("large", 40)[0]
    volume.write(
        {"name": "one", "source": str(one), "pin": True},
        {"name": "large", "source": str(large)},
        {"name": "gone", "source": "/nothing"},
    )
    daemon = start_daemon(*LIMIT, "--warm-set", str(volume.file))
    wanted = {"one": "warm", "large": "does_not_fit", "gone": "failed"}
    wait_until(lambda: states(daemon) == wanted, "each entry to find its state")
    told = daemon.http_status()["warm_set"]
    assert (told["file"], told["problems"]) == (str(volume.file), [])
    warm, lacks, failed = told["entries"]
    assert (warm["ready_bytes"], warm["total_bytes"], warm["pin"]) == (5 * MIB, 5 * MIB, True)
    assert warm["stage_id"] == daemon.status()["stages"][0]["id"]
    assert (lacks["needed_bytes"], lacks["left_bytes"]) == (40 * MIB, 16 * MIB)
    assert lacks["reason"].startswith("it needs 41.9 MB, and 16.8 MB can be had beside")
    assert "/nothing does not exist" in failed["reason"]
    assert all(entry["seconds"] >= 0 and entry["checked_seconds"] is not None for entry in (warm, lacks))
    entries = "penstock_warm_set_entries"
    counts = {"warm": 1, "does_not_fit": 1, "failed": 1, "reading": 0, "waiting": 0}
    wait_until(
        lambda: counts == {state: metric(daemon, f'{entries}{{state="{state}"}}') for state in counts},
        "the metrics to tell of each",
    )
    assert metric(daemon, "penstock_warm_set_broken") == 0
    volume.file.unlink()
    volume.file.write_text("checkpoints: {}")
    wait_until(lambda: metric(daemon, "penstock_warm_set_broken") == 1, "the fault to be told")
    assert cli.main(["status", "--socket-dir", str(daemon.socket_dir)]) == 0
    shown = capsys.readouterr().out
    assert f"not in force: {volume.file}: line 1: checkpoints: is not a list" in shown
    assert "warm, pinned" in shown
    assert states(daemon) == wanted


def test_a_daemon_that_stops_waits_for_no_warm_set(
    start_daemon: StartDaemon, volume: ConfigMapVolume, tmp_path: Path, checkpoints: Checkpoints
) -> None:
    features = tmp_path / "penstock.features"
    volume.write(
        {"name": "one", "source": str(checkpoints("one")[0])}, {"name": "gone", "source": "/nothing"}
    )
    daemon = start_daemon(*LIMIT, "--warm-set", str(volume.file), "--node-features", str(features))
    wait_until(lambda: features.exists() and "warm-one=true" in features.read_text(), "the label")
    assert "warm-gone" not in features.read_text()
    assert daemon.terminate() == 0
    assert not features.exists()


# ---- penstock warm-set check -----------------------------------------------------------------------


def check(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """With its output as a shell would see it."""
    command = [sys.executable, "-c", "from penstock.client.cli.commands import main; exit(main())"]
    return subprocess.run(
        [*command, "warm-set", "check", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        check=False,
    )


def test_check_says_that_a_file_is_a_warm_set_without_a_daemon(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text("checkpoints:\n  - {name: a, source: s3://b/c/}\n")
    (tmp_path / "yaml.py").write_text("raise SystemExit('a stranger in the working directory ran')")
    done = check("good.yaml", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "good.yaml: a warm set of 1\n", "")


def test_check_tells_every_fault_with_its_line_and_fails(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("checkpoints:\n  - name: a b\n    source: c\n    tier: 3\n")
    done = check("bad.yaml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert [line.split(": ")[:3] for line in done.stderr.splitlines()] == [
        ["bad.yaml", "line 2", "name"],
        ["bad.yaml", "line 3", "source"],
        ["bad.yaml", "line 4", "tier"],
    ]
    missing = check("missing.yaml", cwd=tmp_path)
    assert (missing.returncode, missing.stderr.count("\n")) == (1, 1)
    assert "missing.yaml: it cannot be read (No such file or directory)" in missing.stderr
    assert check(cwd=tmp_path).returncode == 2
