"""Zip files as plain containers: members are stored, read by name, never unpacked to a disk."""

import io
import zipfile
from collections.abc import Mapping

from coset.strict_json import corrupt

LOCAL_HEADER_BYTES = 30


def stored_members(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """Members of an uncompressed zip file of `size` bytes, after checking that they are plain.

    Names are never used as paths. Compression, encryption, doubled names, overlapping members and
    sizes that do not fit the file are refused: all are ways to say one thing and unpack another.
    """
    members: dict[str, zipfile.ZipInfo] = {}
    end = 0
    for member in sorted(archive.infolist(), key=lambda member: member.header_offset):
        name = member.filename
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise corrupt(f"zip member {name!r} is compressed; expected plainly stored members")
        if member.flag_bits & 0x1 or name in members:
            raise corrupt(f"zip member {name!r} is encrypted or there twice")
        if name.startswith("/") or "\\" in name or ".." in name.split("/"):
            raise corrupt(f"zip member {name!r} points outside the archive")
        if member.header_offset < end:
            raise corrupt(f"zip member {name!r} overlaps another one")
        end = member.header_offset + LOCAL_HEADER_BYTES + len(name.encode()) + member.file_size
        members[name] = member
    if end > size:
        raise corrupt(f"zip members end at byte {end:,} of a file of {size:,} bytes")
    return members


def read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """Content of one member, its checksum verified."""
    try:
        return archive.read(member)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise corrupt(f"zip member {member.filename!r} is damaged: {error}") from None


def zip_bytes(files: Mapping[str, bytes]) -> bytes:
    """A zip file that stores `files`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def open_zip(file: io.BufferedIOBase, what: str) -> zipfile.ZipFile:
    """The zip file in an open file; `what` names it in errors."""
    try:
        return zipfile.ZipFile(file)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError, OSError) as error:
        raise corrupt(f"{what} is not a readable zip file: {error}") from None
