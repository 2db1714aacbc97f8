"""Folders that come from a disk or the Hub, and folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from imsm.errors import InputError, first_line


def cache_folder(name: str) -> Path:
    """Where computed things of one kind lie unless told otherwise: `imsm/NAME` in `$XDG_CACHE_HOME`, or in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imsm" / name


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside `path` to write a file to, which is renamed at the end, so that it is there whole or as it was.

    Makes its folder. Several processes may write the same file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        yield beside
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file as `replacing` does."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` whose files are moved into it at the end; nothing is moved on an error.

    A new folder appears in one rename. In an existing one files, and folders whole, are replaced one by one, `config.json`
    last, since a folder without it counts as incomplete.

    Raises:
        InputError: `folder` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder to save into")
    folder.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield stage
        stage.chmod(0o755)
        if not folder.exists():
            stage.rename(folder)
            return
        for path in sorted(stage.iterdir(), key=lambda path: path.name == "config.json"):
            if path.is_dir() and (folder / path.name).is_dir():
                os.replace(folder / path.name, stage / f".{path.name}-before")
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def folder_here(name: str | os.PathLike[str], what: str) -> Path | None:
    """The folder `name`, or None where there is none and the name may be a repository's on the Hub, which is not asked.

    Raises:
        InputError: the name is a path, and there is no such folder.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or os.fspath(name).startswith((".", "/", "~")) or os.fspath(name).count("/") > 1:
        raise InputError(f"{what} {os.fspath(name)!r} is not a folder")
    return None


def fetch(name: str | os.PathLike[str], files: tuple[str, ...], what: str, hub: dict[str, Any]) -> Path:
    """The folder `name`, or a download of just `files` from the Hub repository of that name.

    Raises:
        InputError: there is no such folder or repository.
    """
    if (folder := folder_here(name, what)) is not None:
        return folder
    try:
        return Path(snapshot_download(os.fspath(name), allow_patterns=list(files), **hub))
    except (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        ValueError,
        OSError,
    ) as e:
        raise InputError(
            f"{what} {os.fspath(name)!r} is neither a folder here nor a repository that the Hub gives: {first_line(e)}"
        ) from e
