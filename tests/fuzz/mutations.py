"""Mutations that keep the structure of a file, so that a fuzzer gets past its parser.

Each function takes the bytes of a file and a source of randomness, and returns other bytes. Where
the bytes no longer have that structure, a few of them are changed instead.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Callable
from random import Random
from typing import Any

Mutation = Callable[[bytes, Random], bytes]

# Values as JSON text, because a JSON library would not write many of them.
_ODD = (
    *("null", "true", "false", "0", "-0.0", "-1", "1", "3", "0.5", "1e308", "-1e308", "1e999"),
    *("NaN", "Infinity", "-Infinity", "2147483648", "4294967296", "9223372036854775808"),
    *("18446744073709551616", "9" * 30, "9" * 5000, "1e-400", '{"__float__": "NaN"}'),
    *('""', '"x"', '"1"', '"NaN"', r'"\ud800"', r'"\u0000"', '"../x"', '"/etc/passwd"', '"a/./b"'),
    *(f'"{"a" * 70_000}"', '"\u202e\u0301\U0001f469\u200d"', '"["', '"(a+)+$"', '"<0x00>"'),
    *("[]", "{}", "[[]]", "[null]", "[1, 2, 3]", '{"a": 1}', '{"type": "X"}'),
    *("[" * depth + "]" * depth for depth in (50, 500, 1500, 100_000)),
    *('{"a":' * depth + "1" + "}" * depth for depth in (50, 500, 1500, 50_000)),
)
_PIECES = (
    *(b'"', b'""', b"\\", b"\0", b"\r", b"\n", b"\r\n", b"\xef\xbb\xbf", b"\xff", b"\xed\xa0\x80"),
    *(b",", b";", b"\t", b"|", b" ", b"{", b"}", b"[", b"]", b"'", b"text", b"label", b"labels"),
    *("\u2028".encode(), "\u0085".encode(), "\U0001f469".encode(), b"\x1c", b"\x1a"),
    *(b"," * 3000, b'"' * 3001, b"a" * 200_000, b"\n" * 3000, b"[" * 100_000),
)


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """Flip, replace, drop, repeat or insert a few bytes."""
    content = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4, 16))):
        at = random.randrange(len(content) + 1)
        to = min(len(content), at + random.choice((1, 1, 2, 4, 8, 100)))
        kind = random.randrange(5)
        if kind == 0 and to > at:
            content[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            content[at:to] = random.randbytes(to - at)
        elif kind == 2:
            del content[at:to]
        elif kind == 3:
            content[at:at] = content[at:to] * random.choice((1, 2, 100))
        else:
            content[at:at] = random.choice(_PIECES)
    return bytes(content)


def mutate_json(data: bytes, random: Random) -> bytes:
    """Change a few values or keys of a JSON document."""
    try:
        root = [json.loads(data)]
        odd: list[str] = []
        for _ in range(random.choice((1, 1, 1, 2, 4))):
            _change(root, odd, random)
        text = json.dumps(root[0])
    except (ValueError, RecursionError, OverflowError):
        return mutate_bytes(data, random)
    for number, value in enumerate(odd):
        text = text.replace(f'"@{number}@"', value)
    return text.encode("utf-8", "surrogatepass")


def _change(root: list[Any], odd: list[str], random: Random) -> None:
    """Change one value; an odd one is written as `@number@` first."""
    inner, key = _place(root, random)
    value = inner[key]
    kind = random.randrange(7)
    if kind == 0 and inner is not root:
        del inner[key]
    elif kind == 1:
        other, name = _place(root, random)
        inner[key] = json.loads(json.dumps(other[name]))
    elif kind == 2 and isinstance(inner, list) and inner is not root:
        inner.extend([value] * random.choice((1, 2, 2000)))
    elif kind == 3 and isinstance(inner, dict):
        inner[random.choice(("", "x", "type", f"{key}2", "a" * 1000))] = inner.pop(key)
    elif kind == 4 and isinstance(value, (int, float)):
        inner[key] = random.choice((-value, value + 1, value - 1, value * 2**20, value / 2))
    elif kind == 4 and isinstance(value, str):
        at = random.randrange(len(value) + 1)
        inner[key] = value[:at] + random.choice(("", "\0", "\ud800", "é", "/")) + value[at + 1 :]
    else:
        inner[key] = f"@{len(odd)}@"
        odd.append(random.choice(_ODD))
        if kind == 5 and isinstance(inner, dict):  # the same key twice
            odd[-1] += f", {json.dumps(key)}: {json.dumps(value)}"


def _place(root: Any, random: Random) -> tuple[Any, Any]:
    """A container and one of its keys: any depth is likely, however long the lists are."""
    inner = root
    key = 0
    while isinstance(inner[key], (dict, list)) and inner[key] and random.random() < 0.8:
        inner = inner[key]
        key = random.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
    return inner, key


def mutate_lines(data: bytes, random: Random) -> bytes:
    """Repeat, drop, swap or change lines; what is JSON stays JSON."""
    lines = data.split(b"\n")
    for _ in range(random.choice((1, 1, 2, 4))):
        at = random.randrange(len(lines))
        other = random.randrange(len(lines))
        kind = random.randrange(6)
        if kind == 0:
            lines.insert(at, lines[other])
        elif kind == 1 and len(lines) > 1:
            del lines[at]
        elif kind == 2:
            lines[at], lines[other] = lines[other], lines[at]
        elif kind == 3:
            lines[at] = b",".join(random.choices(_PIECES, k=3))
        else:
            lines[at] = mutate_json(lines[at], random)
    return b"\n".join(lines)


def mutate_archive(data: bytes, random: Random) -> bytes:
    """Change one file of an archive such as numpy's, or the bytes of the archive."""
    out = io.BytesIO()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
            chosen = random.choice([*old.namelist(), None])
            for name in old.namelist():
                content = old.read(name)
                if name == chosen:
                    head = random.choice((128, len(content)))
                    content = mutate_bytes(content[:head], random) + content[head:]
                new.writestr(zipfile.ZipInfo(name), content)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError, EOFError, zlib.error):
        return mutate_bytes(data, random)
    return mutate_bytes(data, random) if chosen is None else out.getvalue()
