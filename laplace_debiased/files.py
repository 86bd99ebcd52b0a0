"""Records in files: written whole or not at all, read with errors that say what to do.

A record is a dictionary of tensors and plain values, so that ``torch.load(weights_only=True)``
reads it: opening a file runs no code from it.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from torch import Tensor

from laplace_debiased._version import __version__
from laplace_debiased.errors import StoredFileError

try:
    import fcntl
except ImportError:  # no such thing on Windows; there an open file cannot be removed anyway
    fcntl = None  # type: ignore[assignment]

_TOKEN_LENGTH = 12

PathLike = str | os.PathLike[str]

_PYTHONS = RuntimeError, EOFError, ValueError
_UNREADABLE = *_PYTHONS, UnpicklingError, LookupError, TypeError, AttributeError
_DAMAGED = *_PYTHONS, zipfile.BadZipFile, zlib.error, struct.error, OverflowError, OSError
"""What ``zipfile`` raises on flipped bytes: names (UnicodeDecodeError), sizes, offsets, flags."""


def write_record(path: PathLike, kind: str, version: int, payload: Mapping[str, Any]) -> None:
    """Write a record, so that a crash at any moment leaves the old file or the new one.

    The record goes to a temporary file in the same folder, is flushed to the disk and renamed. It
    takes over the permissions of the file that it replaces; those of a new one follow the umask.
    What an earlier crash left there is removed.

    Args:
        path: where to.
        kind: what it is, checked when it is read.
        version: version of its format.
        payload: tensors and plain values.

    Raises:
        TypeError: if ``path`` is no path.
        OSError: as the file system says, and for a device, a pipe or a read-only file; the old
            file is then as it was.
    """
    target = resolved_path(path)
    mode = _mode(target)
    if mode is not None and not mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            errno.EACCES, "the file is read-only: make it writable or save elsewhere", str(target)
        )
    _remove_leftovers(target)
    record = {
        "format": kind,
        "format_version": version,
        "library_version": __version__,
        **payload,
    }
    temporary, file = _open_temporary(target)
    try:
        with file:
            if mode is not None:
                os.chmod(temporary, mode)
            _written(record, file)
            file.flush()
            os.fsync(file.fileno())
            # Renamed while the file is open and locked: no other writer takes it for a leftover.
            if os.name == "posix":
                os.replace(temporary, target)
        if os.name != "posix":
            os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def read_record(
    path: PathLike, kind: str, newest: int, map_location: torch.device | str | None = None
) -> dict[str, Any]:
    """Read a record.

    Args:
        path: where from.
        kind: what it must be.
        newest: the newest version of its format that is understood.
        map_location: device of the tensors; the CPU by default.

    Raises:
        TypeError: if ``path`` is no path.
        FileNotFoundError: if there is no such file.
        StoredFileError: if it is damaged, something else, or of a newer version.
    """
    source = resolved_path(path)
    if _mode(source) is None:  # opening a pipe would wait for a writer
        raise FileNotFoundError(errno.ENOENT, f"no {kind} file here", str(source))
    _check_archive(source, kind)
    location = "cpu" if map_location is None else map_location
    try:
        record = torch.load(source, map_location=location, weights_only=True)
    except _UNREADABLE as error:
        raise StoredFileError(
            f"{source} is no {kind} file: it holds other objects than tensors and plain values, "
            "which are not loaded from a file for safety, or tensors that map_location="
            f"{location!r} cannot place ({type(error).__name__}: {str(error).splitlines()[0]})."
        ) from error
    _check_header(source, record, kind, newest)
    return record


def remove_file(path: PathLike) -> None:
    """Remove a file and what a crash left beside it; nothing happens if there is none."""
    target = resolved_path(path)
    target.unlink(missing_ok=True)
    _remove_leftovers(target)


def resolved_path(path: PathLike) -> Path:
    """The file behind a path; a link leads to its target.

    Raises:
        TypeError: if it is no path.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"path must be a string or os.PathLike; got {type(path).__name__}. For a file object "
            "use torch.save(la.state_dict(), file)."
        )
    return Path(os.path.realpath(path))


_ESCAPED = "~/[({"
_STEP = re.compile(r"/[^/\[({]*|\[\d*\]|\(\d*\)|\{\}")


class _Node(dict[str, Any]):
    """A container while it is put together: entries by the last step of their keys."""


def flattened(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, lists and tuples as one mapping, whose values are no containers.

    A key is the way to a value: ``a/b`` is entry "b" of mapping "a", ``a[0]`` the first of a list,
    ``a(0)`` of a tuple. ``a[]`` and ``a()`` hold all of a list or tuple of numbers, a tensor [n]
    (of none: [0]), and ``a{}`` stands for a mapping without entries. Names are escaped in the
    manner of JSON pointers: ~0 to ~4 are "~", "/", "[", "(" and "{".
    """
    return {key: value for name in tree for key, value in _leaves(_escaped(name), tree[name])}


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """What :func:`flattened` had; of names and containers, as earlier versions wrote, the same.

    Raises:
        ValueError: if a key is none, or contradicts another.
    """
    root = _Node()
    for key, value in flat.items():
        steps = _STEP.findall(f"/{key}")
        try:
            if not isinstance(key, str) or "".join(steps) != f"/{key}":
                raise ValueError
            if steps[-1] in ("[]", "()", "{}"):
                value = {} if steps[-1] == "{}" else value.tolist()
                value = tuple(value) if steps.pop() == "()" else value
            node = root
            for step in steps[:-1]:
                node = node.setdefault(step, _Node())
            if not isinstance(node, _Node) or steps[-1] in node:
                raise ValueError
            node[steps[-1]] = value
        except (ValueError, AttributeError, TypeError, RuntimeError):  # the last of tolist()
            raise _edited(key) from None
    return _container("", root)


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    match value:
        case Mapping():
            for name, entry in value.items():
                yield from _leaves(f"{key}/{_escaped(name)}", entry)
            if not value:
                yield f"{key}{{}}", None
        case list() | tuple():
            start, end = "[]" if isinstance(value, list) else "()"
            numbers = _numbers(value)
            if numbers is not None:
                yield f"{key}{start}{end}", numbers
                return
            for place, entry in enumerate(value):
                yield from _leaves(f"{key}{start}{place}{end}", entry)
        case _:
            yield key, value


def _numbers(values: list[Any] | tuple[Any, ...]) -> Tensor | None:
    """Integers that 64 bits hold, or floats, in a tensor."""
    if all(type(v) is int and -(2**63) <= v < 2**63 for v in values):
        return torch.tensor(values, dtype=torch.int64, device="cpu")
    if {float} != set(map(type, values)):
        return None
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _container(key: str, value: Any) -> Any:
    if not isinstance(value, _Node):
        return value
    entries = {step: _container(f"{key}{step}", entry) for step, entry in value.items()}
    kinds = {step[0] for step in entries}
    if kinds <= {"/"}:
        return {
            re.sub("~([0-4])", lambda found: _ESCAPED[int(found[1])], step[1:]): entry
            for step, entry in entries.items()
        }
    start, end = "[]" if kinds == {"["} else "()"
    try:
        in_order = [entries[f"{start}{place}{end}"] for place in range(len(entries))]
    except KeyError:
        raise _edited(key[1:]) from None
    return in_order if start == "[" else tuple(in_order)


def _escaped(name: str) -> str:
    for code, character in enumerate(_ESCAPED):
        name = name.replace(character, f"~{code}")
    return name


def _edited(key: object) -> ValueError:
    return ValueError(
        f"the state's entry {key!r} is none of ours or contradicts another one: it is damaged or "
        "was edited; save the posterior again."
    )


_FOLDER = 0x10
"""The bit of an archive's entry that marks a folder."""


def _check_archive(source: Path, kind: str) -> None:
    """Check that a file is whole; torch reads the bytes of tensors without a checksum."""
    with open(source, "rb") as file:  # what the file system refuses passes through
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
                # Torch takes an entry that is marked as a folder for empty, and reads no bytes.
                folders = [e.filename for e in archive.infolist() if e.external_attr & _FOLDER]
        except _DAMAGED as error:
            raise StoredFileError(
                f"{source} is no {kind} file, or only a part of one ({error}). If it was copied or "
                "downloaded, fetch it again; else save it again."
            ) from error
    if damaged is not None or folders:
        what = f"{damaged or folders[0]} has a wrong {'mark' if damaged is None else 'checksum'}"
        raise StoredFileError(f"{source} is damaged: {what}. Fetch or save it again.")


def _check_header(source: Path, record: object, kind: str, newest: int) -> None:
    if not isinstance(record, dict) or "format" not in record:
        advice = ""
        if isinstance(record, dict) and "cls_name" in record:
            advice = " It looks like a bare state: use load_state_dict(torch.load(path))."
        raise StoredFileError(f"{source} is no {kind} file: it does not say so.{advice}")
    if record["format"] != kind:
        raise StoredFileError(f"{source} is a {record['format']!r} file, not a {kind!r} file.")
    version = record.get("format_version")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise StoredFileError(f"{source} has the impossible format_version {version!r}.")
    if version > newest:
        raise StoredFileError(
            f"{source} has format_version {version}, written by laplace-debiased "
            f"{record.get('library_version')}; this is {__version__}, which reads up to {newest}. "
            "Upgrade laplace-debiased."
        )


def _mode(path: Path) -> int | None:
    """Permissions of a file; None if there is none.

    Raises:
        OSError: if something else than a regular file is there.
    """
    try:
        found = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    if stat.S_ISDIR(found):
        raise IsADirectoryError(errno.EISDIR, "a file is needed here, not a folder", str(path))
    if not stat.S_ISREG(found):
        raise OSError(errno.EINVAL, "a regular file is needed, no device or pipe", str(path))
    return stat.S_IMODE(found)


def _open_temporary(target: Path) -> tuple[Path, BinaryIO]:
    """A new, locked file beside the target."""
    while True:
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(_TOKEN_LENGTH // 2)}.tmp")
        try:
            file = open(temporary, "xb")  # noqa: SIM115
        except FileExistsError:
            continue
        except FileNotFoundError:
            raise FileNotFoundError(
                errno.ENOENT, "the folder does not exist; create it first", str(target.parent)
            ) from None
        # Between the two lines above and below another writer may have taken it for a leftover.
        if _locked(file) is not False and temporary.exists():
            return temporary, file
        file.close()


def _locked(file: BinaryIO) -> bool | None:
    """Whether the lock could be taken; None where the file system has none."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _written(record: dict[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(record, file)
    except RuntimeError as error:
        # Cut off by an interrupt or a full disk, torch's writer complains of the file's end.
        if isinstance(error.__context__, KeyboardInterrupt | OSError):
            raise error.__context__ from None
        raise


def _remove_leftovers(target: Path) -> None:
    """Remove temporary files of writers that are gone: a living one holds a lock on its own."""
    prefix = f".{target.name}."
    try:
        names = [entry for entry in os.listdir(target.parent) if entry.startswith(prefix)]
    except OSError:
        return
    for name in names:
        token = name[len(prefix) :].removesuffix(".tmp")
        if not name.endswith(".tmp") or len(token) != _TOKEN_LENGTH:
            continue
        with suppress(OSError), open(target.parent / name, "rb") as file:
            if _locked(file):
                os.unlink(target.parent / name)


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
