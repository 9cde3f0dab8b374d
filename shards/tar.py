"""Plain ustar as shards use it: regular files, fixed metadata, names of a fixed pattern. Anything else is damage."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from shards.errors import REPAIR, Damaged, UserError
from shards.files import Buffer

BLOCK = 512  # bytes; every header and every payload begins on such a boundary
END = bytes(2 * BLOCK)  # two empty blocks end an archive
LARGEST = 8**11 - 1  # bytes; eleven octal digits
EXTENSIONS = ("json", "mp4", "traj.safetensors")  # of a sample, in this order
SAMPLE_NAME = re.compile(r"(i\d{6}-p\d{6}-s\d{2,3})\.(json|mp4|traj\.safetensors)")
GROUP_NAME = re.compile(r"__group__/(i\d{6}-p\d{6})\.text\.safetensors")


class Member(NamedTuple):
    """One file inside a tar."""

    name: str
    offset: int
    """Byte of the tar at which the payload begins."""
    size: int
    """Bytes of the payload, without padding."""


def group_name(group: str) -> str:
    """Member name of the tensors of a group. WebDataset readers skip names in `__…__` folders."""
    return f"__group__/{group}.text.safetensors"


def header(name: str, size: int) -> bytes:
    """The 512-byte ustar header of a regular file (POSIX.1-1988), with owner and time fixed to 0.

    Raises UserError for a name that shards do not use and for a payload over 8 GiB.
    """
    if not (SAMPLE_NAME.fullmatch(name) or GROUP_NAME.fullmatch(name)):
        raise UserError(f"{name!r} is not the name of a shard member", "keys look like i000003-p000017-s05")
    if size > LARGEST:
        raise UserError(f"{name} has {size} bytes; a member holds at most {LARGEST}", "store fewer or smaller latents")
    block = bytearray(BLOCK)
    block[0 : len(name)] = name.encode()
    block[100:108], block[108:116], block[116:124] = b"0000444\0", b"0000000\0", b"0000000\0"  # mode, user, group
    block[124:136], block[136:148] = b"%011o\0" % size, b"%011o\0" % 0  # size, time
    block[148:156], block[156:157], block[257:265] = b" " * 8, b"0", b"ustar\00000"
    block[148:156] = b"%06o\0 " % sum(block)  # the sum counts its own field as blanks
    return bytes(block)


def padding(size: int) -> bytes:
    """The zero bytes that fill the last block of a payload."""
    return bytes(-size % BLOCK)


def wrap(name: str, payload: list[Buffer]) -> list[Buffer]:
    """Header, payload and padding of one member, as buffers to write; the payload is not copied."""
    size = sum(len(part) for part in payload)
    return [header(name, size), *payload, padding(size)]


def members(buffer: memoryview, where: str) -> Iterator[Member]:
    """Walk a whole tar strictly. Raises Damaged, naming the byte, for anything the writer would not write."""
    offset = 0
    while (block := bytes(buffer[offset : offset + len(END)])) != END:
        if len(block) < BLOCK or not any(block):
            raise Damaged(f"{where}: the end of the archive is missing at byte {offset}", REPAIR)
        member = member_at(buffer, offset, where)
        yield member
        offset = member.offset + member.size + -member.size % BLOCK
    if len(buffer) != offset + len(END):
        raise Damaged(f"{where}: something follows the end of the archive at byte {offset}", REPAIR)


def member_at(buffer: memoryview, offset: int, where: str) -> Member:
    """The member whose header begins at `offset`. Raises Damaged unless it is exactly what `header` writes."""
    block = bytes(buffer[offset : offset + BLOCK])
    try:
        name = block[:100].rstrip(b"\0").decode("ascii")
        size = int(block[124:135], 8)
        genuine = header(name, size) == block
    except (ValueError, UserError):
        genuine = False
    if not genuine:
        raise Damaged(f"{where}: damaged or foreign tar header at byte {offset}", REPAIR)
    if offset + BLOCK + size + -size % BLOCK > len(buffer):
        raise Damaged(f"{where}: cut inside {name}", REPAIR)
    if any(buffer[offset + BLOCK + size : offset + BLOCK + size + -size % BLOCK]):
        raise Damaged(f"{where}: padding of {name} is not empty", REPAIR)
    return Member(name, offset + BLOCK, size)
