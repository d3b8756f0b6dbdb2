"""A plug-in of JAX loaded without the libraries of its maker, to compile with it and no more.

The ROCm plug-in is linked to a dozen libraries that come with ROCm, not with the package. Compiling
for a GPU that is described to it calls next to none of their functions. Where they are missing,
stub libraries stand in for them, as those that CUDA ships for its driver: each function answers
with an error, "no device" of HIP, and the compiler takes it as a machine without a GPU.

The dynamic loader takes a library that is loaded already for one that is needed by the same name,
and looks a function up when it is first called. So one small ELF file a library is enough, which is
written here for x86-64, without a compiler of C.
"""

import ctypes
import re
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

# hipErrorNoDevice; an error to the other libraries too, which call 0 alone a success.
NO_DEVICE = 100
# mov eax, NO_DEVICE; ret
_ANSWER = b"\xb8" + struct.pack("<I", NO_DEVICE) + b"\xc3"
# What gives the text of an error gives a pointer to this one.
_SENTENCE = b"a stub stands in for this library\0"
_GIVES_TEXT = re.compile(r"(error|status).*(string|name)|(string|name).*(error|status)", re.I)

_DYNSYM, _DYNAMIC = 11, 6  # kinds of sections
_NEEDED, _HASH, _STRTAB, _SYMTAB, _STRSZ, _SYMENT, _SONAME = 1, 4, 5, 6, 10, 11, 14
_WEAK = 2
_PAGE = 0x1000


@dataclass(frozen=True)
class Wants:
    """What a library needs of others.

    Attributes:
        libraries: their names, as the loader looks for them.
        functions: the symbols that it does not define, apart from those that it can do without.
    """

    libraries: tuple[str, ...]
    functions: tuple[str, ...]


def load(library: Path) -> list[str]:
    """Loads a library, with stubs in place of the libraries that it needs and are not here.

    Args:
        library: a shared library of x86-64.

    Returns:
        The names of the libraries that stubs stand in for; none where all are here.

    Raises:
        OSError: it cannot be loaded even so.
    """
    try:
        ctypes.CDLL(str(library))
    except OSError:
        pass
    else:
        return []
    wants = wanted(library)
    missing = [name for name in wants.libraries if not _loads(name)]
    # Those of the libraries that are here, which are in the scope of all by now, are no stubs'.
    known = ctypes.CDLL(None)
    functions = [name for name in wants.functions if not hasattr(known, name)]
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(missing):
            path = Path(folder) / f"{number}.so"
            path.write_bytes(stub(name, functions if number == 0 else []))
            ctypes.CDLL(str(path))
        ctypes.CDLL(str(library))
    return missing


def _loads(name: str) -> bool:
    try:
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def wanted(library: Path) -> Wants:
    """What a shared library of x86-64 needs of others, read from its sections."""
    data = library.read_bytes()
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    # Of each section: its name, kind, flags, address, offset, size and linked section.
    sections = [struct.unpack_from("<IIQQQQI", data, table + i * size) for i in range(count)]

    def text(section: int, offset: int) -> str:
        start = sections[section][4] + offset
        return data[start : data.index(b"\0", start)].decode()

    libraries, functions = [], []
    for _, kind, _, _, start, length, linked in sections:
        if kind == _DYNAMIC:
            for at in range(start, start + length, 16):
                tag, value = struct.unpack_from("<QQ", data, at)
                if tag == _NEEDED:
                    libraries.append(text(linked, value))
        if kind == _DYNSYM:
            for at in range(start + 24, start + length, 24):
                name, info, _, defined_in = struct.unpack_from("<IBBH", data, at)
                if not defined_in and info >> 4 != _WEAK:
                    functions.append(text(linked, name))
    return Wants(tuple(libraries), tuple(functions))


def stub(name: str, functions: list[str]) -> bytes:
    """A shared library of x86-64, as the bytes of its file.

    Args:
        name: that the loader knows it by.
        functions: those that it has, which all answer with `NO_DEVICE`, or with a sentence where a
            text is asked for.
    """
    strings = bytearray(b"\0")

    def string(text: str) -> int:
        strings.extend(text.encode() + b"\0")
        return len(strings) - len(text.encode()) - 1

    called = string(name)
    names = [string(function) for function in functions]
    # In this order, the tables of a page or more and then a page of code:
    symbols_at = 64 + 3 * 56
    hash_at = symbols_at + 24 * (len(functions) + 1)
    strings_at = hash_at + 4 * (3 + len(functions) + 1)
    dynamic_at = -(-(strings_at + len(strings)) // 8) * 8
    tables = dynamic_at + 16 * 7
    code_at = -(-tables // _PAGE) * _PAGE
    # lea rax, [rip + 1]; ret, in front of the sentence
    gives_text = b"\x48\x8d\x05" + struct.pack("<i", 1) + b"\xc3"
    code = _ANSWER.ljust(16, b"\xcc") + gives_text + _SENTENCE
    symbols = [bytes(24)]
    for function, named in zip(functions, names, strict=True):
        at = code_at + (16 if _GIVES_TEXT.search(function) else 0)
        symbols.append(struct.pack("<IBBHQQ", named, 0x12, 0, 1, at, 0))
    count = len(symbols)
    # One bucket, whose chain holds all symbols.
    chain = [*range(2, count), 0] if count > 1 else []
    hashes = struct.pack(f"<II I {count}I", 1, count, 1 if count > 1 else 0, 0, *chain)
    entries = (
        (_SONAME, called),
        (_HASH, hash_at),
        (_STRTAB, strings_at),
        (_SYMTAB, symbols_at),
        (_STRSZ, len(strings)),
        (_SYMENT, 24),
        (0, 0),
    )
    dynamic = b"".join(struct.pack("<QQ", *entry) for entry in entries)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 3, 64, 0, 0
    )
    # To load and write (the loader notes where it put the tables), to load and run, the table of
    # the loader itself: kind, what may be done, offset, two addresses, two sizes, alignment.
    segments = (
        (1, 6, 0, 0, 0, tables, tables, _PAGE),
        (1, 5, code_at, code_at, code_at, len(code), len(code), _PAGE),
        (2, 6, dynamic_at, dynamic_at, dynamic_at, len(dynamic), len(dynamic), 8),
    )
    head = header + b"".join(struct.pack("<IIQQQQQQ", *segment) for segment in segments)
    before = head + b"".join(symbols) + hashes + bytes(strings)
    return (before.ljust(dynamic_at, b"\0") + dynamic).ljust(code_at, b"\0") + code
