"""TensorFlow's files of records, and the examples in them, as far as GLOW's copies of data sets need it.

A record is its length (8 bytes, little-endian), a checksum of that, the content, and a checksum of the content. The first
checksum is held against the length, so that a file that is cut or shifted is noticed; the second would take hours in Python.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

from runtime.errors import UserError

_POLYNOMIAL = 0x82F63B78  # CRC-32C (Castagnoli), reflected


def _table_entry(byte: int) -> int:
    for _ in range(8):
        byte = (byte >> 1) ^ (_POLYNOMIAL if byte & 1 else 0)
    return byte


_TABLE = [_table_entry(byte) for byte in range(256)]


def masked_checksum(content: bytes) -> int:
    """CRC-32C, rotated and shifted as these files keep it."""
    state = 0xFFFFFFFF
    for byte in content:
        state = (state >> 8) ^ _TABLE[(state ^ byte) & 0xFF]
    state ^= 0xFFFFFFFF
    return (((state >> 15) | (state << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def records(path: Path) -> list[tuple[int, int]]:
    """Where the contents of a file's records begin, and their lengths, bytes; they are not read.

    Raises:
        UserError: the file is not made of whole records.
    """
    found: list[tuple[int, int]] = []
    size = path.stat().st_size
    with open(path, "rb") as file:
        while (at := file.tell()) < size:
            head = file.read(12)
            length, checksum = struct.unpack("<QI", head) if len(head) == 12 else (size, 0)
            if masked_checksum(head[:8]) != checksum or at + 16 + length > size:
                raise UserError(f"{path} is truncated or corrupt at its record {len(found)}; replace it, and fetch again")
            found.append((at + 12, length))
            file.seek(length + 4, 1)
    return found


def features(content: bytes) -> dict[str, list[bytes | int]]:
    """The values of an example's features that are bytes or whole numbers.

    Raises:
        ValueError: it is not one.
    """
    found: dict[str, list[bytes | int]] = {}
    for _, group in _fields(content):
        for _, entry in _fields(_bytes(group)):
            pair = dict(_fields(_bytes(entry)))
            values: list[bytes | int] = []
            for kind, list_of in _fields(_bytes(pair[2])):
                for _, value in _fields(_bytes(list_of)):
                    packed = kind == 3 and isinstance(value, bytes)
                    values.extend(_numbers(_bytes(value)) if packed else [value])
            found[_bytes(pair[1]).decode()] = values
    return found


def _bytes(value: bytes | int) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where a message belongs")
    return value


def _fields(content: bytes) -> Iterator[tuple[int, bytes | int]]:
    """The fields of a protocol buffers message: their numbers, and their contents or values."""
    at = 0
    while at < len(content):
        key, at = _number(content, at)
        if key & 7 == 0:
            value, at = _number(content, at)
            yield key >> 3, value
            continue
        if key & 7 == 2:
            length, at = _number(content, at)
        elif key & 7 in (1, 5):
            length = 8 if key & 7 == 1 else 4
        else:
            raise ValueError("not a message of protocol buffers")
        if at + length > len(content):
            raise ValueError("a message that is cut")
        yield key >> 3, content[at : at + length]
        at += length


def _numbers(content: bytes) -> Iterator[int]:
    at = 0
    while at < len(content):
        value, at = _number(content, at)
        yield value


def _number(content: bytes, at: int) -> tuple[int, int]:
    """A variable-length number, and where it ends."""
    value = 0
    for place, byte in enumerate(content[at : at + 10]):
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    raise ValueError("a number that is cut")
