"""A record is written whole or not at all; anything else is refused with a reason."""

from __future__ import annotations

import io
import os
import re
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from laplace_debiased import files
from laplace_debiased.errors import StoredFileError
from laplace_debiased.files import flattened, nested, read_record, remove_file, write_record

KIND = "test record"


def write(path: Path, value: float = 1.0) -> None:
    write_record(path, KIND, 1, {"value": torch.full((1000,), value)})


def value(path: Path) -> float:
    return float(read_record(path, KIND, 1)["value"][0])


class Killed(BaseException):
    """What an interrupt at the worst moment looks like."""


@pytest.mark.parametrize("moment", ["save", "fsync", "replace"])
def test_interrupted_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    path = tmp_path / "a.pt"
    write(path, 1.0)

    def stop(*args: object, **kwargs: object) -> None:
        raise Killed

    owner = torch if moment == "save" else os
    with monkeypatch.context() as patched:
        patched.setattr(owner, moment, stop)
        with pytest.raises(Killed):
            write(path, 2.0)
    assert value(path) == 1.0
    assert os.listdir(tmp_path) == ["a.pt"]


def test_next_write_clears_what_a_crash_left_but_not_what_another_writer_holds(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.pt"
    dead = tmp_path / ".a.pt.0123456789ab.tmp"
    dead.write_bytes(b"half")
    users = tmp_path / ".a.pt.notes.tmp"
    users.write_bytes(b"mine")
    temporary, file = files._open_temporary(path)
    with file:
        write(path)
        assert temporary.exists()
    assert not dead.exists()
    assert users.exists()
    write(path)
    assert not temporary.exists()
    remove_file(path)
    assert os.listdir(tmp_path) == [users.name]


def test_link_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.pt"
    link.symlink_to(tmp_path / "real" / "a.pt")
    write(link, 3.0)
    assert link.is_symlink()
    assert value(tmp_path / "real" / "a.pt") == 3.0


def test_every_cut_of_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    write(path)
    whole = path.read_bytes()
    for length in [0, 1, 4, *range(100, len(whole), len(whole) // 25), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(StoredFileError, match="only a part"):
            read_record(path, KIND, 1)


def test_flipped_bit_of_a_tensor_is_refused(tmp_path: Path) -> None:
    """torch.load itself reads it without complaint."""
    path = tmp_path / "a.pt"
    write(path)
    raw = bytearray(path.read_bytes())
    place = raw.find(torch.ones(100).numpy().tobytes())
    raw[place + 50] ^= 1
    path.write_bytes(raw)
    assert not torch.equal(torch.load(path, weights_only=True)["value"], torch.ones(1000))
    with pytest.raises(StoredFileError, match="checksum"):
        read_record(path, KIND, 1)


def test_a_tensor_that_is_marked_as_a_folder_is_refused(tmp_path: Path) -> None:
    """Torch's reader would leave the memory as it found it; the checksum is right."""
    path = tmp_path / "record.pt"
    write_record(path, KIND, 1, {"x": torch.ones(9)})
    whole = bytearray(path.read_bytes())
    entries = [m.start() for m in re.finditer(b"PK\x01\x02", whole)]
    for start in entries:
        flipped = bytearray(whole)
        flipped[start + 38] ^= 0x10  # external attributes
        path.write_bytes(flipped)
        with pytest.raises(StoredFileError, match="wrong mark"):
            read_record(path, KIND, 1)
    assert len(entries) > 2


def test_foreign_files_are_refused_with_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for content, match in [
        ({"weight": torch.ones(2)}, "does not say so"),
        ({"cls_name": "X", "mean": torch.ones(2)}, "load_state_dict"),
        ({"format": "another"}, "'another' file"),
        ({"format": KIND, "format_version": 2, "library_version": "9.9"}, r"9\.9.*Upgrade"),
        ({"format": KIND, "format_version": True}, "impossible format_version"),
        ([1, 2], "does not say so"),
        (torch.nn.Linear(1, 1), "other objects"),
    ]:
        torch.save(content, path)
        with pytest.raises(StoredFileError, match=match):
            read_record(path, KIND, 1)
    path.write_text("hello")
    with pytest.raises(StoredFileError, match="no test record file"):
        read_record(path, KIND, 1)


def test_impossible_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no test record file.*nowhere"):
        read_record(tmp_path / "nowhere.pt", KIND, 1)
    with pytest.raises(FileNotFoundError, match=r"does not exist.*no_folder"):
        write(tmp_path / "no_folder" / "a.pt")
    with pytest.raises(IsADirectoryError, match="not a folder"):
        read_record(tmp_path, KIND, 1)
    with pytest.raises(TypeError, match="string or os"):
        write_record(io.BytesIO(), KIND, 1, {})  # type: ignore[arg-type]
    remove_file(tmp_path / "nothing.pt")


def test_devices_and_pipes_are_neither_replaced_nor_read(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path(os.devnull)):
        before = os.stat(path)
        with pytest.raises(OSError, match="device or pipe"):
            write(path)
        with pytest.raises(OSError, match="device or pipe"):
            read_record(path, KIND, 1)
        after = os.stat(path)
        assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert [entry.name for entry in tmp_path.iterdir()] == ["pipe"]


def test_permissions_of_a_file_are_kept_and_a_new_one_follows_the_umask(tmp_path: Path) -> None:
    path, before = tmp_path / "a.pt", os.umask(0o027)
    try:
        write(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        for mode in (0o600, 0o664):
            path.chmod(mode)
            write(path)
            assert stat.S_IMODE(path.stat().st_mode) == mode
    finally:
        os.umask(before)
    path.chmod(0o444)
    content = path.read_bytes()
    with pytest.raises(PermissionError, match="read-only"):
        write(path)
    assert path.read_bytes() == content


def test_a_flipped_byte_anywhere_is_refused_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    write(path)
    whole, expected = path.read_bytes(), read_record(path, KIND, 1)
    for place in range(0, len(whole), 3):
        flipped = bytearray(whole)
        flipped[place] ^= 0xFF
        path.write_bytes(flipped)
        try:
            found = read_record(path, KIND, 1)
        except StoredFileError:
            continue
        assert found.keys() == expected.keys()
        assert torch.equal(found["value"], expected["value"])


NAMES = st.text(st.sampled_from("a~/[](){}0.\n"), max_size=4)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
TREES = st.dictionaries(
    NAMES,
    st.recursive(
        LEAVES,
        lambda inner: (
            st.dictionaries(NAMES, inner, max_size=3)
            | st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
        ),
        max_leaves=12,
    ),
)


def typed(tree: object) -> object:
    """A tree that tells 1 from 1.0 and True."""
    if isinstance(tree, dict):
        return {name: typed(entry) for name, entry in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map(typed, tree))
    return type(tree), tree


@settings(max_examples=200, deadline=None)
@given(TREES)
def test_a_flat_tree_holds_no_container_and_comes_back(tree: dict[str, object]) -> None:
    flat = flattened(tree)
    assert not any(isinstance(value, dict | list | tuple) for value in flat.values())
    assert typed(nested(flat)) == typed(tree)


def test_keys_are_ways_to_values() -> None:
    tree = {"a": {"x/[y]": [None, (1.5, "b")]}, "n": [3, 4], "t": (2.5,), "e": {}, "l": []}
    flat = flattened(tree)
    numbers = {key: flat.pop(key).tolist() for key in ("n[]", "t()", "l[]")}
    assert numbers == {"n[]": [3, 4], "t()": [2.5], "l[]": []}
    assert flat == {
        "a/x~1~2y][0]": None,
        "a/x~1~2y][1](0)": 1.5,
        "a/x~1~2y][1](1)": "b",
        "e{}": None,
    }


def test_containers_of_earlier_versions_pass() -> None:
    tree = {"a": {"b/c": [1, (2,)]}, "d": [], "e": {}}
    assert nested(tree) == tree


@pytest.mark.parametrize(
    "entries",
    [
        {"a[0]": 1, "a": None},
        {"a": None, "a[0]": 1},
        {"a/b": 1, "a[0]": 1},
        {"a[0]": 1, "a(1)": 1},
        {"a[0]": 1, "a[2]": 1},
        {"a[1]": 1},
        {"a[00]": 1},
        {"a[]": torch.zeros(1), "a[0]": 1},
        {"a[]": 3},
        {"a()": torch.tensor(3)},
        {"a{}": None, "a/b": 1},
        {"a{}/b": 1},
        {"a[]/b": 1},
        {"a[x]": 1},
        {"a[": 1},
        {"a": {"b": 1}, "a/c": 1},
        {3: 1},
    ],
)
def test_keys_that_are_none_or_contradict_each_other_are_refused(entries: dict) -> None:
    with pytest.raises(ValueError, match="damaged or was edited"):
        nested(entries)
