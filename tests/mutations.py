"""Damage to files, from a generator: bits and bytes of any file, words of text, and texts inside of packed files."""

import io
import json
import re
import zipfile

import numpy as np
import pyarrow.parquet as pq

EXTREMES = [0, 1, -1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]
WORDS = [
    *("-1", "0", "1", "1e999", "-1e999", "NaN", "Infinity", ".nan", ".inf", "null", "~", "true", "[]", "{}", '""'),
    *('"x"', "'", '"', "{", "[", "]", "}", ",", ":", "\\", "\0", "\ud800", "0x_", "2001-99-99", "!!int abc", "&a [*a]"),
    *("9" * 41, "9" * 5000, "1e9", "9223372036854775808", "[[[[1]]]]", "-0.0", "1_0", "1:30", "../../x", "/dev/null"),
]
WHOLE = [
    b"",
    b"\0" * 64,
    b"[" * 100_000,
    b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    b"\xff\xd8\xff\xe0",
    b"PK\x03\x04",
    b"\x80\x02.",
]
_WORD = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?|[A-Za-z_][\w./-]*|\"[^\"]*\"")


def mutate_bytes(data: bytes, rng: np.random.Generator) -> bytes:
    """One to four changes of bits, bytes, numbers or length; rarely something else altogether."""
    if rng.random() < 0.05:
        return WHOLE[rng.integers(len(WHOLE))]
    for _ in range(rng.integers(1, 5)):
        data = _mutate_once(data, rng)
    return data


def _mutate_once(data: bytes, rng: np.random.Generator) -> bytes:
    if not data:
        return data
    # Headers are where most fields are: half of all changes are in the first 200 bytes.
    place = int(rng.integers(min(len(data), 200) if rng.random() < 0.5 else len(data)))
    kind = rng.integers(7)
    if kind == 0:
        return data[:place] + bytes([data[place] ^ (1 << int(rng.integers(8)))]) + data[place + 1 :]
    if kind == 1:
        return data[:place] + bytes([int(rng.choice([0, 1, 0x7F, 0x80, 0xFF]))]) + data[place + 1 :]
    if kind == 2:
        return data[:place]
    length = int(rng.integers(1, 64))
    if kind == 3:
        return data[:place] + data[place + length :]
    if kind == 4:
        return data[: place + length] + data[place:]
    if kind == 5:
        size = int(rng.choice([2, 4, 8]))
        value = EXTREMES[rng.integers(len(EXTREMES))] % 2 ** (8 * size)
        number = value.to_bytes(size, "little" if rng.random() < 0.5 else "big")
        return data[:place] + number + data[place + size :]
    return data[:place] + rng.integers(0, 256, length, dtype=np.uint8).tobytes() + data[place + length :]


def mutate_text(text: str, rng: np.random.Generator) -> str:
    """One to four changes of numbers, words or lines."""
    for _ in range(rng.integers(1, 5)):
        found = list(_WORD.finditer(text))
        lines = text.split("\n")
        kind = rng.random()
        if found and kind < 0.7:
            match = found[rng.integers(len(found))]
            word = WORDS[rng.integers(len(WORDS))]
            text = text[: match.start()] + word + text[match.end() :]
        elif kind < 0.85:
            del lines[rng.integers(len(lines))]
            text = "\n".join(lines)
        else:
            lines.insert(int(rng.integers(len(lines))), lines[rng.integers(len(lines))])
            text = "\n".join(lines)
    return text


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Damage that fits the file: half of the time inside of its structure, so that more than its first check is met."""
    if rng.random() < 0.5:
        return mutate_bytes(data, rng)
    if data[:4] == b"PK\x03\x04":
        return _mutate_zip(data, rng)
    if data[:4] == b"PAR1":
        return _mutate_parquet(data, rng)
    if data[8:9] == b"{":
        return _mutate_safetensors(data, rng)
    if b"\0" in data:
        return mutate_bytes(data, rng)
    return _encode(mutate_text(data.decode(), rng))


def _encode(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _mutate_zip(data: bytes, rng: np.random.Generator) -> bytes:
    """One member changed, with checksums that are right."""
    source, target = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    names = source.namelist()
    chosen = names[rng.integers(len(names))]
    with zipfile.ZipFile(target, "w") as file:
        for name in names:
            member = source.read(name)
            if name == chosen and member[:6] == b"\x93NUMPY":
                start = 10 + int.from_bytes(member[8:10], "little")
                header = _encode(mutate_text(member[10:start].decode(), rng))[: start - 11].ljust(start - 11) + b"\n"
                member = member[:10] + header + member[start:]
            elif name == chosen:
                member = mutate_bytes(member, rng)
            file.writestr(name, member)
    return target.getvalue()


def _mutate_parquet(data: bytes, rng: np.random.Generator) -> bytes:
    """The note in the metadata changed, or a column of another type, or without one of them."""
    table, sink = pq.read_table(io.BytesIO(data)), io.BytesIO()
    known = (table.schema.metadata or {}).get(b"smalti")
    if known is not None and rng.random() < 0.6:
        note = _encode(mutate_text(known.decode(), rng))
        table = table.replace_schema_metadata({b"smalti": note})
    else:
        place = int(rng.integers(table.num_columns))
        name, rows = table.column_names[place], table.num_rows
        wrong = [[None] * rows, ["x"] * rows, [-1] * rows, [float("inf")] * rows, [[0]] * rows, [[None, 1]] * rows]
        table = table.drop_columns([name])
        if rng.random() < 0.8:
            table = table.append_column(name, [wrong[rng.integers(len(wrong))]])
    pq.write_table(table, sink)
    return sink.getvalue()


def _mutate_safetensors(data: bytes, rng: np.random.Generator) -> bytes:
    """The header changed, with a length that is right; often a whole shape or type, so that the file still opens."""
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].decode()
    if rng.random() < 0.5:
        tree = json.loads(header)
        names = [name for name in tree if name != "__metadata__"]
        name = names[rng.integers(len(names))]
        shape = tree[name]["shape"]
        choice = rng.integers(4)
        if choice == 0:
            tree[name]["shape"] = [int(np.prod(shape))]
        elif choice == 1:
            tree[name]["shape"] = [1, *shape[::-1]]
        elif choice == 2:
            tree[f"{name}.{name}"] = tree.pop(name)
        else:
            tree[re.sub(r"\d+", "99", name)] = tree.pop(name)
        changed = json.dumps(tree).encode()
    else:
        changed = _encode(mutate_text(header, rng))
    return len(changed).to_bytes(8, "little") + changed + data[8 + length :]
