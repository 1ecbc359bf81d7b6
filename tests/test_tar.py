"""The tar files: readable by others, the same bytes every time, and no damage passes for a complete archive."""

from __future__ import annotations

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.tar import TarError, read_tar, write_tar

names = st.from_regex(r"[a-z0-9_]{1,12}(/[a-z0-9_]{1,8})?\.(npy|jpg|json)", fullmatch=True)
members = st.dictionaries(names, st.binary(max_size=2000), max_size=8)


def packed(content: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    write_tar(stream, sorted(content.items()))
    return stream.getvalue()


@given(members)
def test_standard_library_reads_what_we_write(content: dict[str, bytes]) -> None:
    with tarfile.open(fileobj=io.BytesIO(packed(content)), mode="r:") as archive:
        found = {info.name: archive.extractfile(info).read() for info in archive.getmembers()}  # type: ignore[union-attr]
        assert found == content
        assert {(info.mtime, info.uid, info.gid, info.uname) for info in archive.getmembers()} <= {(0, 0, 0, "")}


@given(members)
def test_members_lie_where_the_record_says(content: dict[str, bytes]) -> None:
    stream = io.BytesIO()
    written = write_tar(stream, sorted(content.items()))
    data = stream.getvalue()
    assert written.bytes == len(data)
    assert {m.name: data[m.offset : m.offset + m.size] for m in written.members} == content
    assert {m.name: body for m, body in read_tar(io.BytesIO(data))} == content


@given(members.filter(bool), st.data())
def test_any_cut_is_noticed(content: dict[str, bytes], data: st.DataObject) -> None:
    whole = packed(content)
    # Every 512-byte boundary included: there an ordinary reader sees a shorter archive and says nothing.
    length = data.draw(
        st.one_of(st.integers(0, len(whole) - 1), st.integers(0, len(whole) // 512 - 1).map(lambda n: n * 512))
    )
    with pytest.raises(TarError):
        list(read_tar(io.BytesIO(whole[:length])))


def _with_header(**changes: object) -> bytes:
    info = tarfile.TarInfo("a.npy")
    for name, value in changes.items():
        setattr(info, name, value)
    return info.tobuf(tarfile.USTAR_FORMAT) + bytes(1024)


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../../etc/passwd"},
        {"name": "/etc/passwd"},
        {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
        {"type": tarfile.DIRTYPE},
        {"size": 1 << 32},
    ],
)
def test_hostile_members_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(TarError):
        list(read_tar(io.BytesIO(_with_header(**changes))))


def test_a_flipped_header_byte_is_noticed() -> None:
    data = bytearray(packed({"a.npy": b"x" * 600}))
    data[3] ^= 1
    with pytest.raises(TarError):
        list(read_tar(io.BytesIO(bytes(data))))
