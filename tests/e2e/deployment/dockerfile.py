"""Builds the stages of a Dockerfile into directories, where no container engine is at hand.

It knows the instructions that this repository's Dockerfile uses and refuses others. The base image is a clean
Debian root file system; what differs from the base image of the registry is not seen.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import ssl
import string
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

CERTIFICATES = "/run/certificates.pem"
NETWORK_VARIABLES = re.compile(r"PIP_.*|.*_proxy|.*_PROXY")
"""What the installers of this machine need to reach its package mirrors."""


@dataclass(slots=True)
class Stage:
    """One `FROM`, and, once built, its file system and what containers of it start with."""

    base: str
    instructions: list[tuple[str, str]]
    root: Path = Path()
    environment: dict[str, str] = field(default_factory=dict)
    directory: str = "/"
    user: str = ""
    entrypoint: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)


def parse(path: Path) -> tuple[dict[str, str], dict[str, Stage]]:
    """The arguments that stand before the first `FROM`, and the stages by name."""
    lines = [line for line in path.read_text().splitlines() if not re.match(r"\s*#|\s*$", line)]
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    name = ""
    for instruction in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        word, _, rest = instruction.partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            stages[name] = Stage(string.Template(base).substitute(arguments), [])
        elif stages:
            stages[name].instructions.append((word, rest.strip()))
        else:
            assert word == "ARG", instruction
            key, _, value = rest.partition("=")
            arguments[key] = value
    return arguments, stages


class Builder:
    """Builds stages, each once, from a context directory."""

    def __init__(self, stages: dict[str, Stage], *, context: Path, clean: Path, work: Path) -> None:
        """`clean` is what stands for the base image; stages are made in `work`."""
        self._stages = stages
        self._context = context
        self._clean = clean
        self._work = work

    def build(self, name: str) -> Stage:
        stage = self._stages[name]
        if stage.root != Path():
            return stage
        base = self.build(stage.base) if stage.base in self._stages else Stage("", [], self._clean)
        stage.root = self._work / name
        stage.environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        stage.environment |= base.environment
        stage.directory = base.directory
        subprocess.run(["cp", "-a", "--reflink=auto", str(base.root), str(stage.root)], check=True)
        for word, rest in stage.instructions:
            self._execute(stage, word, rest)
        return stage

    def _execute(self, stage: Stage, word: str, rest: str) -> None:
        if word == "RUN":
            self._run(stage, rest)
        elif word == "COPY":
            self._copy(stage, rest.split())
        elif word in ("ENV", "ARG"):
            for pair in shlex.split(rest):
                key, _, value = pair.partition("=")
                stage.environment[key] = string.Template(value).substitute(stage.environment)
        elif word == "WORKDIR":
            stage.directory = rest
            inside(stage.root, rest).mkdir(parents=True, exist_ok=True)
        elif word == "USER":
            stage.user = rest
        elif word == "ENTRYPOINT":
            stage.entrypoint = json.loads(rest)
        elif word == "HEALTHCHECK":
            stage.healthcheck = json.loads(rest.partition(" CMD ")[2])
        else:
            assert word in ("EXPOSE", "LABEL"), word

    def _run(self, stage: Stage, text: str) -> None:
        lines = [
            "set -e",
            f"mount -t proc proc {stage.root}/proc",
            f"mount -t tmpfs -o mode=755 tmpfs {stage.root}/dev",
            f"for name in null zero urandom; do touch {stage.root}/dev/$name;"
            f" mount --bind /dev/$name {stage.root}/dev/$name; done",
        ]
        made: list[Path] = []
        for place, source in _network_files().items():
            target = inside(stage.root, place)
            if not target.exists():
                made.append(target)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.mkdir() if source.is_dir() else target.touch()
            # Read-only: what is installed here must change nothing of this machine.
            lines.append(f"mount --bind {source} {target} && mount -o remount,bind,ro {target}")
        lines.append(f'cd {stage.root} && exec chroot {stage.root} "$@"')
        given = {name: value for name, value in os.environ.items() if NETWORK_VARIABLES.fullmatch(name)}
        given |= dict.fromkeys(("PIP_CERT", "SSL_CERT_FILE"), CERTIFICATES)
        variables = [f"{name}={value}" for name, value in {**given, **stage.environment}.items()]
        command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation=private"]
        command += ["sh", "-c", "\n".join(lines), "sh", "/usr/bin/env", "-i", *variables]
        command += ["sh", "-c", f"cd {stage.directory} && {text}"]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        assert done.returncode == 0, f"RUN {text}\n{done.stdout}"
        for target in made:
            target.rmdir() if target.is_dir() else target.unlink()

    def _copy(self, stage: Stage, words: list[str]) -> None:
        top = self._context
        if words[0].startswith("--from="):
            top = self.build(words.pop(0).removeprefix("--from=")).root
        else:
            self._assert_sent(words[:-1])
        *sources, place = words
        target = inside(stage.root, os.path.join(stage.directory, place))
        for source in sources:
            found = inside(top, source)
            if found.is_dir():
                ignore = shutil.ignore_patterns("__pycache__")
                shutil.copytree(found, target, symlinks=True, dirs_exist_ok=True, ignore=ignore)
            else:
                into_directory = place.endswith("/") or len(sources) > 1
                target.mkdir(parents=True, exist_ok=True) if into_directory else None
                shutil.copy(found, target / found.name if into_directory else target)

    def _assert_sent(self, sources: list[str]) -> None:
        """An engine sees only what .dockerignore lets through."""
        sent = [
            line[1:] for line in (self._context / ".dockerignore").read_text().splitlines() if line[:1] == "!"
        ]
        for source in sources:
            assert any(source == path or source.startswith(f"{path}/") for path in sent), source


def _network_files() -> dict[str, Path]:
    """Files and directories of this machine by where installers look for them."""
    places = ["/etc/resolv.conf", "/etc/hosts", "/etc/pip.conf"]
    places += filter(os.path.isabs, os.environ.get("PIP_FIND_LINKS", "").split())
    found = {place: Path(place).resolve() for place in places if os.path.exists(place)}
    if certificates := ssl.get_default_verify_paths().cafile:
        found[CERTIFICATES] = Path(certificates).resolve()
    return found


def inside(root: Path, place: str) -> Path:
    """A place of an image on this machine."""
    return root / place.lstrip("/")
