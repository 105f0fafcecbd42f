"""Files as they become by accident: bytes changed, cut off and put in, and headers that lie."""

import hashlib
import json
import random

import numpy as np


def digest(tensors, text):
    """The digest of a file, from what the documentation of the format says."""
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def split(whole):
    """Header and data of a safetensors file."""
    size = int.from_bytes(whole[:8], "little")
    return json.loads(whole[8 : 8 + size]), whole[8 + size :]


def joined(header, data):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw + data


def retold(whole, key, change):
    """The file with other JSON under its key and a digest that is right for it."""
    import safetensors.torch

    header, data = split(whole)
    metadata = header["__metadata__"]
    text = json.dumps(change(json.loads(metadata[key])))
    metadata[key] = text
    if "sha256" in metadata:
        metadata["sha256"] = digest(safetensors.torch.load(whole), text)
    return joined(header, data)


OTHERS = [None, True, -1, 0, 3, 1.5, 2**70, 1e308, "", "x", [], {}, [[]], [None], {"a": 1}]


def mutated_json(draw, content):
    """The content with one value somewhere in it replaced, one key removed or one added."""
    content = json.loads(json.dumps(content))
    places = []

    def walk(part):
        keys = part.keys() if isinstance(part, dict) else range(len(part))
        for key in keys:
            places.append((part, key))
            if isinstance(part[key], dict | list):
                walk(part[key])

    walk(content)
    part, key = draw.choice(places)
    how = draw.randrange(4)
    if how == 0:
        del part[key]
    elif how == 1 and isinstance(part, dict):
        part[draw.choice(["x", "format", "shape"])] = draw.choice(OTHERS)
    elif how == 2 and isinstance(part[key], list):
        part[key] = part[key] * 2 + part[key][:1]
    else:
        part[key] = draw.choice(OTHERS)
    return content


def mutants(whole, key, n, seed, others=()):
    """Files that something has happened to.

    Args:
        whole: A good file.
        key: Of its JSON in the metadata.
        n: How many.
        seed: Of what happens.
        others: Good files of other kinds, which may take its place or lend their data.
    """
    draw = random.Random(seed)
    header, data = split(whole)
    metadata = header["__metadata__"]
    names = [name for name in header if name != "__metadata__"]
    start = len(whole) - len(data)

    def flipped():
        torn = bytearray(whole)
        for _ in range(draw.choice([1, 1, 1, 8])):
            at = draw.randrange(draw.choice([8, start, len(whole)]))
            torn[at] ^= 1 << draw.randrange(8)
        return bytes(torn)

    def cut():
        return whole[: draw.choice([0, 7, 8, start, start - 1, draw.randrange(len(whole))])]

    def put_in():
        at = draw.choice([0, 8, start, len(whole), draw.randrange(len(whole))])
        return whole[:at] + draw.randbytes(draw.choice([1, 8, 64])) + whole[at:]

    def taken_out():
        at = draw.randrange(len(whole))
        return whole[:at] + whole[at + draw.choice([1, 4, 8]) :]

    def zeroed():
        at, size = draw.randrange(len(whole)), draw.choice([4, 64, 4096])
        return whole[:at] + bytes(len(whole[at : at + size])) + whole[at + size :]

    def other_header():
        return joined(mutated_json(draw, header), data)

    def other_text():
        content = mutated_json(draw, json.loads(metadata[key]))
        return joined({**header, "__metadata__": {**metadata, key: json.dumps(content)}}, data)

    def other_tensor():
        name = draw.choice(names)
        entry = json.loads(json.dumps(header[name]))
        how = draw.randrange(5)
        if how == 0:
            entry["shape"] = (
                entry["shape"][::-1] if len(entry["shape"]) > 1 else [1, *entry["shape"]]
            )
        elif how == 1:
            entry["shape"] = [draw.choice([2**62, 10**30, -1, 10**9])] * draw.choice([1, 2, 4])
        elif how == 2:
            entry["dtype"] = draw.choice(["F32", "I32", "BF16", "F8_E4M3", "C64", "U8", "x"])
        elif how == 3:
            entry["data_offsets"] = draw.choice([[0, 10**18], [8, 0], [-8, 8], [0], [0, 1, 2], "x"])
        else:
            other = draw.choice(names)
            return joined({**header, name: header[other], other: header[name]}, data)
        return joined({**header, name: entry}, data)

    def nested():
        deep = b"[" * 100_000 + b"]" * 100_000
        text, raw = (json.dumps(part).encode() for part in (metadata[key], header))
        quoted = json.dumps(deep.decode()).encode()
        return joined(draw.choice([deep, raw.replace(text, deep), raw.replace(text, quoted)]), data)

    def lengthened():
        return draw.choice([2**63, 2**64 - 1, 10**9, len(whole)]).to_bytes(8, "little") + whole[8:]

    def swapped():
        other = draw.choice([*others, b"some text", b"{}", json.dumps(header).encode()])
        return draw.choice([other, joined(header, split(other)[1]) if other in others else other])

    hows = [flipped, flipped, flipped, cut, put_in, taken_out, zeroed]
    hows += [other_header, other_text, other_tensor, nested, lengthened, swapped]
    for number in range(n):
        yield hows[number % len(hows)].__name__, hows[number % len(hows)]()


def same(one, other):
    """Whether two tensors hold the same, bit for bit."""
    return one.dtype == other.dtype and np.array_equal(
        one.contiguous().numpy().view(np.uint8), other.contiguous().numpy().view(np.uint8)
    )
