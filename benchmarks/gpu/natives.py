"""What the native libraries import of torch, without nm: only what torch 2.11 exports will load there."""

import re
import struct
from pathlib import Path

EXPORTED = Path(__file__).with_name("torch_symbols.txt")


def foreign(library: Path) -> list[str]:
    """Symbols of torch that a library imports, and that no stable ABI of torch 2.11 has."""
    text = EXPORTED.read_text(encoding="utf-8").partition("\n")[2]
    exported = set(text.split())
    return [name for name in undefined(library) if re.search(r"torch|c10|^_ZNK?2at", name) and name not in exported]


def undefined(library: Path) -> list[str]:
    """Names of the undefined dynamic symbols of a 64-bit little-endian ELF file."""
    data = library.read_bytes()
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"{library}: must be a 64-bit little-endian ELF file")
    (offset,), (size, count) = struct.unpack_from("<Q", data, 0x28), struct.unpack_from("<HH", data, 0x3A)
    # name, type, flags, address, offset, size, link, info, alignment, entry size
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, offset + n * size) for n in range(count)]
    (symbols,) = (section for section in sections if section[1] == 11)  # SHT_DYNSYM
    names = sections[symbols[6]]
    strings = data[names[4] : names[4] + names[5]]
    found = []
    for at in range(symbols[4], symbols[4] + symbols[5], symbols[9]):
        name, _, _, section = struct.unpack_from("<IBBH", data, at)
        if name and section == 0:
            found.append(strings[name : strings.index(b"\0", name)].decode())
    return found
