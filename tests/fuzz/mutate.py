"""Damage to a file: bytes of it, tokens of its JSON, and whole shapes that JSON may take."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null')
PAIR = re.compile(rb'"(?:[^"\\]|\\.)*"\s*:\s*(?:"(?:[^"\\]|\\.)*"|-?\d+|\[[^][{}]*\]|\{[^{}]*\})')
NUMBERS = [
    -1,
    0,
    1,
    7,
    8,
    255,
    4095,
    4096,
    2**31 - 1,
    2**31,
    2**32,
    2**53 + 1,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
]
LENGTHS = [number % (1 << 64) for number in [*NUMBERS, -8, 100_000_000, 100_000_001]]
ODD = [b"-0", b"1e400", b"-1e400", b"1e3", b"0.0", b"8.0", b"NaN", b"Infinity", b"-Infinity"]
ODD += [
    b"9" * 30,
    b"9" * 4300,
    b"9" * 4301,
    b"true",
    b"false",
    b"null",
    b"{}",
    b"[]",
    b"[[]]",
    b"[null,null]",
]
ODD += [b'""', b'"."', b'".."', b'"/"', b'"a/../.."', b'"\\u0000"', b'"\\ud800"', b'"\\udc80"', b'"\\u202e"']
ODD += [b'"' + b"x" * 300 + b'"', b'"manifest.json/x"', b'"F32"', b'"F4"', b'"__metadata__"', b'"0"', b'"-1"']
TOKENS = [*(str(number).encode() for number in NUMBERS), *ODD]


@dataclass(frozen=True)
class Framing:
    """How JSON sits in a file: `split` gives it and what follows it, `join` makes a file of the two again."""

    split: Callable[[bytes], tuple[bytes, bytes]] = lambda data: (data, b"")
    join: Callable[[bytes, bytes], bytes] = lambda json, rest: json + rest


BARE = Framing()  # nothing but JSON


class Mutator:
    """Makes inputs out of `seeds`; the same `seed` makes the same ones in the same order."""

    def __init__(self, seeds: Sequence[bytes], framing: Framing, seed: int) -> None:
        self._seeds = list(seeds)
        self._framing = framing
        self._random = random.Random(seed)

    def next_input(self) -> bytes:
        data = self._random.choice(self._seeds)
        for _ in range(self._random.choice([1, 1, 1, 2, 3, 6])):
            if self._random.random() < 0.7:
                json, rest = self._framing.split(data)
                data = self._framing.join(self._damage_json(json), rest)
            else:
                data = self._damage_bytes(data)
        return data

    def _damage_json(self, json: bytes) -> bytes:
        pick = self._random.choice
        damage = pick(
            [self._replace_token] * 6
            + [
                self._swap_tokens,
                self._repeat_pair,
                self._nest,
                self._lengthen,
                self._widen,
                self._damage_bytes,
            ]
        )
        return damage(json)

    def _replace_token(self, json: bytes) -> bytes:
        found = list(TOKEN.finditer(json))
        if not found:
            return self._random.choice(TOKENS)
        token = self._random.choice(found)
        new = self._random.choice(TOKENS)
        if (
            token[0][:1].isdigit()
            and self._random.random() < 0.5
            and len(token[0]) < 20
            and token[0].isdigit()
        ):
            new = str(int(token[0]) + self._random.choice([-8, -4, -1, 1, 4, 8])).encode()
        return json[: token.start()] + new + json[token.end() :]

    def _swap_tokens(self, json: bytes) -> bytes:
        found = list(TOKEN.finditer(json))
        if len(found) < 2:
            return json
        first, second = sorted(self._random.sample(found, 2), key=re.Match.start)
        middle = json[first.end() : second.start()]
        return json[: first.start()] + second[0] + middle + first[0] + json[second.end() :]

    def _repeat_pair(self, json: bytes) -> bytes:
        """The same key twice, or the pair of another place."""
        found = list(PAIR.finditer(json))
        if not found:
            return json
        source, place = self._random.choice(found), self._random.choice(found)
        return json[: place.end()] + b"," + source[0] + json[place.end() :]

    def _nest(self, json: bytes) -> bytes:
        depth = self._random.choice([1, 50, 2000, 100_000])
        opening, closing = self._random.choice([(b"[", b"]"), (b'{"a":', b"}")])
        closed = self._random.random() < 0.7
        found = list(TOKEN.finditer(json))
        start, end = self._random.choice(found).span() if found else (0, len(json))
        return json[:start] + opening * depth + b"0" + closing * depth * closed + json[end:]

    def _lengthen(self, json: bytes) -> bytes:
        """A list of many numbers in place of a token."""
        found = list(TOKEN.finditer(json))
        start, end = self._random.choice(found).span() if found else (0, len(json))
        number = self._random.choice(TOKENS[: len(NUMBERS)])
        return (
            json[:start] + b"[" + b",".join([number] * self._random.choice([2, 70, 3000])) + b"]" + json[end:]
        )

    def _widen(self, json: bytes) -> bytes:
        """Another encoding of the same text."""
        text = json.decode("utf-8", errors="replace")
        return text.encode(self._random.choice(["utf-16", "utf-32-le", "utf-8-sig"]))

    def _damage_bytes(self, data: bytes) -> bytes:
        damages = [
            self._flip,
            self._cut,
            self._repeat,
            self._splice,
            self._truncate,
            self._insert,
            self._length,
        ]
        return self._random.choice(damages)(data) if data else self._random.randbytes(9)

    def _span(self, data: bytes) -> tuple[int, int]:
        start = self._random.randrange(len(data))
        return start, min(len(data), start + self._random.choice([1, 2, 8, 64, 1000]))

    def _flip(self, data: bytes) -> bytes:
        at = self._random.randrange(len(data))
        return data[:at] + bytes([data[at] ^ 1 << self._random.randrange(8)]) + data[at + 1 :]

    def _cut(self, data: bytes) -> bytes:
        start, end = self._span(data)
        return data[:start] + data[end:]

    def _repeat(self, data: bytes) -> bytes:
        start, end = self._span(data)
        return data[:end] + data[start:]

    def _splice(self, data: bytes) -> bytes:
        other = self._random.choice(self._seeds)
        return data[: self._random.randrange(len(data))] + other[self._random.randrange(len(other)) :]

    def _truncate(self, data: bytes) -> bytes:
        return data[: self._random.randrange(len(data))]

    def _insert(self, data: bytes) -> bytes:
        at = self._random.randrange(len(data))
        return data[:at] + self._random.randbytes(self._random.choice([1, 2, 8])) + data[at:]

    def _length(self, data: bytes) -> bytes:
        """A little-endian number of 8 bytes, at the front or anywhere; sometimes off by little."""
        at = 0 if self._random.random() < 0.7 else self._random.randrange(len(data))
        near = int.from_bytes(data[at : at + 8], "little") + self._random.choice([-8, -1, 1, 8])
        number = near % (1 << 64) if self._random.random() < 0.5 else self._random.choice(LENGTHS)
        return data[:at] + number.to_bytes(8, "little") + data[at + 8 :]
