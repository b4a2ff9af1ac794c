"""The Dockerfile, built without a container engine, and its daemon at work."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from penstock.client import StreamerClient

from ..containers import cannot, child_of
from ..support import REPOSITORY, random_tensors, same, wait_until, write_checkpoint
from .dockerfile import Builder, Stage, inside, parse
from .manifests import containers

DOCKERFILE = REPOSITORY / "Dockerfile"
CACHE = REPOSITORY / ".cache"
MIB = 1 << 20


def test_the_dockerfile_passes_hadolint() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def pins(path: str) -> dict[str, str]:
    """The versions in a file of requirements."""
    found = re.findall(r"^([^\s=#]+)==(\S+)", (REPOSITORY / path).read_text(), re.MULTILINE)
    return {canonicalize_name(name): version for name, version in found}


def asked_for(key: str) -> list[Requirement]:
    """A list of requirements in pyproject.toml."""
    text = (REPOSITORY / "pyproject.toml").read_text()
    block = re.search(rf"^{key} = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    return [Requirement(quoted) for quoted in re.findall(r'^\s+"(.+)",', block[1], re.MULTILINE)]


def test_the_lock_file_has_what_the_daemon_needs_and_nothing_else() -> None:
    needed: set[str] = set()
    todo = [one for key in ("dependencies", "server", "gcs", "azure") for one in asked_for(key)]
    while todo:
        package = todo.pop()
        needed.add(canonicalize_name(package.name))
        for text in requires(package.name) or ():
            further = Requirement(text)
            extras = package.extras or {""}
            applies = not further.marker or any(further.marker.evaluate({"extra": one}) for one in extras)
            if applies and canonicalize_name(further.name) not in needed:
                todo.append(further)
    known = pins("constraints.txt")
    assert pins("deploy/image/server.lock") == {name: known[name] for name in needed}


def test_both_images_say_the_version_of_the_package() -> None:
    (version,) = re.findall(r'^version = "(.+)"$', (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)
    _, stages = parse(DOCKERFILE)
    for name in ("daemon", "client"):
        labels = dict(stages[name].instructions)["LABEL"]
        assert f'org.opencontainers.image.version="{version}"' in labels


def test_no_stage_takes_the_package_from_an_index() -> None:
    """pip prefers the highest version of a name, wherever it finds it: the name must not be asked for."""
    _, stages = parse(DOCKERFILE)
    runs = [rest for stage in stages.values() for word, rest in stage.instructions if word == "RUN"]
    installs = [run for run in runs if "/wheels" in run]
    assert len(installs) == 2
    for run in installs:
        assert "--find-links" not in run
        named = set(re.findall(r"\S*penstock\S*", run))
        assert named <= {"/opt/penstock/bin/python", "/wheels/penstock-*.whl"}


def test_commands_users_and_paths_are_those_of_the_manifests() -> None:
    _, stages = parse(DOCKERFILE)
    entrypoint = json.loads(dict(stages["daemon"].instructions)["ENTRYPOINT"])
    assert entrypoint == containers("overlays/sidecar")["penstock"].command
    users = {name: dict(stages[name].instructions)["USER"] for name in ("daemon", "client")}
    node = containers("overlays/daemonset")["penstock"].security
    inference = containers("overlays/daemonset-client")["inference"]
    assert users["daemon"] == f"{node['runAsUser']}:{node['runAsGroup']}"
    assert users["client"] == f"{inference.security['runAsUser']}:{inference.security['runAsGroup']}"
    (examples,) = (rest for word, rest in stages["client"].instructions if "deploy/examples" in rest)
    assert inference.command[1] == f"{examples.split()[-1]}/serve.py"


@pytest.fixture(scope="module")
def work() -> Iterator[Path]:
    top = Path(tempfile.mkdtemp(prefix="pst-image-"))
    yield top
    subprocess.run(["rm", "-rf", "--one-file-system", str(top)], check=True)


@pytest.fixture(scope="module")
def clean(require_tool: Callable[[str], str], work: Path) -> Path:
    """A root file system of Debian with nothing that is not essential; kept in `.cache` from run to run."""
    if os.geteuid() != 0:
        cannot("needs root, to install into a root file system")
    suite = {"12": "bookworm", "13": "trixie"}[parse(DOCKERFILE)[0]["BASE"].split(":")[1].split(".")[0]]
    archive = CACHE / f"{suite}.tar"
    root = work / "clean"
    if not archive.exists():
        CACHE.mkdir(exist_ok=True)
        subprocess.run([require_tool("debootstrap"), "--variant=minbase", suite, str(root)], check=True)
        unfinished = archive.with_suffix(".new")
        subprocess.run(["tar", "-cf", str(unfinished), "-C", str(root), "."], check=True)
        unfinished.rename(archive)
        return root
    root.mkdir()
    subprocess.run(["tar", "-xpf", str(archive), "-C", str(root)], check=True)
    return root


@pytest.fixture(scope="module")
def builder(clean: Path, work: Path) -> Builder:
    return Builder(parse(DOCKERFILE)[1], context=REPOSITORY, clean=clean, work=work)


def in_image(stage: Stage, command: list[str], *mounts: tuple[str, Path]) -> list[str]:
    """A command line that runs one in a container of the image, its root read-only."""
    lines = [
        "set -e",
        f"mount --bind {stage.root} {stage.root}",
        f"cd {stage.root}",
        *(f"mkdir -p .{place} && mount --bind {source} .{place}" for place, source in mounts),
        "mount -t proc proc proc",
        "mount -t sysfs -o ro sysfs sys",
        "mount -t tmpfs -o mode=755 tmpfs dev",
        "for name in null zero urandom; do touch dev/$name; mount --bind /dev/$name dev/$name; done",
        f"mount -o remount,bind,ro {stage.root} .",
        'exec chroot . "$@"',
    ]
    user, _, group = stage.user.partition(":")
    variables = [f"{name}={value}" for name, value in stage.environment.items()]
    confined = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--no-new-privs"]
    confined += ["--bounding-set=-all", "--inh-caps=-all"]
    unshare = [
        "unshare",
        "--mount",
        "--pid",
        "--ipc",
        "--net",
        "--fork",
        "--kill-child",
        "--propagation=private",
    ]
    return [*unshare, "sh", "-c", "\n".join(lines), "sh", "env", "-i", *variables, *confined, *command]


def installed(image: Stage, place: str) -> set[str]:
    return {path.name for path in inside(image.root, place).glob("lib/python3*/site-packages/*")}


@pytest.mark.image
@pytest.mark.timeout(600)
def test_the_image_s_daemon_serves_as_its_user_from_a_read_only_root(
    unshare: tuple[str, ...], builder: Builder, tmp_path: Path
) -> None:
    image = builder.build("daemon")
    packages = {
        path.name for path in inside(image.root, "/opt/penstock/lib").glob("python3*/site-packages/*")
    }
    assert {"grpc", "boto3", "penstock"} <= packages
    assert not packages & {"torch", "pip", "setuptools", "hatchling", "tqdm", "numpy"}
    assert not inside(image.root, "/src").exists()
    page = "lib/python3*/site-packages/penstock/server/watch/page/index.html"
    assert list(inside(image.root, "/opt/penstock").glob(page))

    tmp_path.chmod(0o755)
    tensors = random_tensors(8, MIB)
    write_checkpoint(tmp_path / "m.safetensors", tensors).chmod(0o644)
    sockets = inside(image.root, "/run/penstock")
    assert f"{sockets.stat().st_uid}:{sockets.stat().st_gid}" == image.user
    writable = tmp_path / "sockets"
    writable.mkdir()
    os.chown(writable, *map(int, image.user.split(":")))
    command = in_image(
        image,
        [*image.entrypoint, "--memory-limit=64MiB"],
        ("/run/penstock", writable),
        ("/models", tmp_path),
    )
    log_path = tmp_path / "log"
    with log_path.open("wb") as log:
        daemon = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=log)
    pid = child_of(daemon)
    try:
        wait_until(
            lambda: " serving " in log_path.read_text() or daemon.poll() is not None, "the daemon to serve"
        )
        assert daemon.poll() is None, log_path.read_text()
        enter = ["nsenter", f"--target={pid}", "--mount", "--pid", "--net", "--root", "--wd"]
        user, group = image.user.split(":")
        enter += [f"--setuid={user}", f"--setgid={group}", "env", "-i"]
        enter += [f"{name}={value}" for name, value in image.environment.items()]
        healthy = subprocess.run([*enter, *image.healthcheck], capture_output=True, text=True, check=False)
        assert healthy.returncode == 0, f"{healthy.stderr}{daemon.poll()}: {log_path.read_text()}"
        client = StreamerClient(f"/proc/{pid}/root/run/penstock")
        same(client.load_state_dict("/models/m.safetensors").items(), tensors)
        os.kill(pid, signal.SIGTERM)
        assert daemon.wait(60) == 0
        sick = subprocess.run(in_image(image, image.healthcheck), capture_output=True, check=False)
        assert sick.returncode != 0
    finally:
        if daemon.poll() is None:
            os.kill(pid, signal.SIGKILL)
        daemon.wait()


@pytest.mark.image
@pytest.mark.timeout(600)
def test_the_client_image_has_the_examples_and_no_server(unshare: tuple[str, ...], builder: Builder) -> None:
    image = builder.build("client")
    packages = installed(image, "/opt/client")
    assert {"grpc", "torch", "penstock"} <= packages
    assert not packages & {"boto3", "prometheus_client", "pip"}
    tried = subprocess.run(
        in_image(image, [*image.entrypoint, "status"]), capture_output=True, text=True, check=False
    )
    assert "no penstock daemon answers" in tried.stderr
    example = inside(image.root, "/opt/penstock/examples/serve.py")
    assert example.read_text() == (REPOSITORY / "deploy/examples/serve.py").read_text()
