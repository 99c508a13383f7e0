"""Params files, presets, tutorial's configurations, overrides and catalogs as nobody should write them.

Each is made by a random.Random that it is handed. PLACE stands for the address of a server that counts who comes, and
MARK for a file that code in an input would make.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import random
from pathlib import Path

from earthprior.chips.catalog import scan_catalog
from earthprior.chips.read import ChipSpec, inspect_chip
from earthprior.errors import EarthPriorError
from earthprior.params import Params, known_keys, load, unchecked

ROOT = Path(__file__).parents[1]
PLACE = "127.0.0.1:00000"
MARK = "hostile-mark"


SNIPPETS = (
    "", "~", "null", "true", "on", "010", "0o17", "1:30", "1_000", "1e-05", "1e999", "-.inf", ".nan", "0x" + "f" * 9000,
    "9" * 5000, "9" * 400, "-1", "0", "1", "2.5", "1e9", "9007199254740992", "'x'", '"\\ud800"', '"\\0"', '"\\e[2J"',
    "x" * 20_000, "'unfinished", '"unfinished', "[", "{", "[1, 2", "{a: 1", "[" * 300, "{a: " * 60, "- x", "? x", ": x",
    "&a [*a]", "&a {a: *a}", "*nowhere", "<<", "{<<: {a: 1}}", "{<<: [1]}", "!!binary aGk=", "!!binary ???",
    "!!set {a, b}",
    "!!omap [a: 1]", "!!pairs [a: 1]", "!!int x", "!!float x", "!!bool x", "!!null x", "!!timestamp x", "!foo bar",
    "2001-01-01", "2001-01-01T00:00:00Z", "2001-13-45", f"!!python/object/apply:os.system ['touch {MARK}']",
    f"!!python/object/new:os.system [touch {MARK}]", "!!python/name:os.system", f"$(touch {MARK})", f"`touch {MARK}`",
    f"'; touch {MARK}; #'", f"http://{PLACE}/x", f"/vsicurl/http://{PLACE}/x.tif", f"vrt:///vsicurl/http://{PLACE}/x",
    f"sqlite:///{MARK}", "../../../etc/passwd", "/etc/passwd", "/dev/zero", "{{ 7 * 7 }}", "${lr}", "<script>", "[]",
    "{}",
    "[[[[1]]]]", "{low: 1, high: 0}", "{low: 1}", "{choices: [1]}", "{choices: [1, [2]], when: {lr: 1}}",
    "[1, a, null]",
    "{a: 1, a: 2}", "{? [1] : 2}", "{1: 2}", "{null: 1}", "|\n  text", ">-\n  text", "%", "@x", "\t", "x: y: z", "#",
    "---", "...",
)  # fmt: skip


def yaml_value(draw: random.Random, depth: int = 0) -> str:
    """A value in YAML's flow style, or something like it."""
    kind = draw.random()
    if depth > 3 or kind < 0.5:
        return draw.choice(SNIPPETS)
    if kind < 0.6:
        return repr(draw.choice((draw.random(), draw.uniform(-1e9, 1e9), draw.randrange(-(10**18), 10**18))))
    if kind < 0.7:
        return json.dumps(
            "".join(chr(draw.choice((draw.randrange(32, 127), draw.randrange(0xD7FF)))) for _ in range(5))
        )
    count = draw.randrange(5)
    if kind < 0.85:
        return f"[{', '.join(yaml_value(draw, depth + 1) for _ in range(count))}]"
    keys = (
        draw.choice((draw.choice(known_keys()), "low", "high", "choices", "a", yaml_value(draw, 9)))
        for _ in range(count)
    )
    return f"{{{', '.join(f'{key}: {yaml_value(draw, depth + 1)}' for key in keys)}}}"


def bomb(draw: random.Random) -> str:
    """Anchors of anchors, or merges of merges."""
    levels, width, merges = draw.randrange(2, 12), draw.randrange(2, 12), draw.random() < 0.5
    lines = ["a0: &a0 {x: 1}" if merges else "a0: &a0 [x, y]"]
    for level in range(1, levels):
        many = ", ".join([f"*a{level - 1}"] * width)
        lines.append(f"a{level}: &a{level} {{<<: [{many}]}}" if merges else f"a{level}: &a{level} [{many}]")
    return "\n".join([*lines, f"data: *a{levels - 1}\n"])


def some_yaml(draw: random.Random) -> bytes:
    """A document: of random bytes, of odd values, of a bomb, of several documents, of directives."""
    kind = draw.random()
    if kind < 0.15:
        return draw.randbytes(draw.randrange(300))
    if kind < 0.3:
        return bomb(draw).encode()
    lines = []
    if kind < 0.4:
        lines += draw.choice(
            (["%YAML 1.1", "---"], ["%YAML 9.9", "---"], ["%TAG ! tag:x,2000:", "---"], ["---", "a: 1", "---"])
        )
    for _ in range(draw.randrange(8)):
        key = draw.choice((draw.choice(known_keys()), draw.choice(SNIPPETS), "tune", "data"))
        lines.append(f"{draw.choice(('', '  ', chr(9)))}{key}: {yaml_value(draw)}")
    return draw.choice(("\n", "\r\n", "\r", "\x85")).join(lines).encode("utf-8", "surrogatepass")


def changed_params(draw: random.Random) -> bytes:
    """The committed params.yaml with one to five changes."""
    lines = (ROOT / "params.yaml").read_text().splitlines()
    for _ in range(draw.randint(1, 5)):
        place, kind = draw.randrange(len(lines)), draw.random()
        key = lines[place].partition("#")[0].rpartition(":")[0] if kind < 0.7 else ""
        if key:
            lines[place] = f"{key}: {yaml_value(draw)}"
        elif kind < 0.78:
            del lines[place]
        elif kind < 0.84:
            lines.insert(draw.randrange(len(lines)), lines[place])
        elif kind < 0.9:
            lines[place] = draw.choice(("  ", "\t", "- ", "? ", "&x ", "!!set ", "")) + lines[place].strip()
        else:
            lines.insert(place, f"{draw.choice(('', '  ', '    '))}{draw.choice(known_keys())}: {yaml_value(draw)}")
    return "\n".join(lines).encode("utf-8", "surrogatepass")


@functools.cache
def params_of(folder: Path) -> Params:
    """Of the project, which no input changes."""
    return load(folder / "params.yaml")


def read_params(folder: Path, content: bytes) -> None:
    (folder / "hostile.yaml").write_bytes(content)
    load(folder / "hostile.yaml")


def some_overrides(draw: random.Random) -> bytes:
    """Lines of KEY VALUE, as `mlflow run -P` would hand them on."""
    if draw.random() < 0.2:
        return json.dumps([["lr", "3e-4"], ["data.bands", "[a, b, c, d]"]][: draw.randint(0, 2)]).encode()
    keys = [draw.choice((draw.choice(known_keys()), draw.choice(SNIPPETS))) for _ in range(draw.randint(1, 3))]
    return json.dumps([[key.replace("\n", " "), yaml_value(draw)] for key in keys]).encode()


def read_overrides(folder: Path, content: bytes) -> None:
    from earthprior.tools import experiment

    words = [word for key, value in json.loads(content) for word in (f"--{key}", value)]
    experiment._check(folder / "params.yaml", experiment._split(words)[1])


def some_preset(draw: random.Random) -> bytes:
    if draw.random() < 0.3:
        return some_yaml(draw)
    lines = [f"{draw.choice(known_keys())}: {yaml_value(draw)}" for _ in range(draw.randint(1, 3))]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def read_preset(folder: Path, content: bytes) -> None:
    from earthprior.tools import preset

    (folder / "presets").mkdir(exist_ok=True)
    (folder / "presets/hostile.yaml").write_bytes(content)
    preset.run("hostile", folder, folder / "laid.yaml")


def some_config(draw: random.Random) -> bytes:
    """A tutorial's ssl_train.yaml with odd values."""
    from earthprior.tools.tutorial_keys import KEYS

    if draw.random() < 0.1:
        return some_yaml(draw)
    lines = ["Train_Validate:", "  epochs: 3"]
    for key in draw.sample(sorted(KEYS), draw.randint(1, 8)):
        *sections, last = key.split(".")
        lines += [f"{'  ' * (depth + 1)}{section}:" for depth, section in enumerate(sections)]
        lines.append(f"{'  ' * (len(sections) + 1)}{last}: {yaml_value(draw)}")
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def read_config(folder: Path, content: bytes) -> None:
    from earthprior.tools import import_config

    (folder / "ssl_train.yaml").write_bytes(content)
    import_config.run(folder / "ssl_train.yaml", folder, folder / "laid.yaml", as_run=len(content) % 2 == 0)


PATHS = (
    "chips/a.tif", "", " ", ".", "..", "../a.tif", "a/../../b.tif", "/etc/passwd", "//x/a.tif", "C:a.tif", "C:\\a.tif",
    f"http://{PLACE}/a.tif", f"/vsicurl/http://{PLACE}/a.tif", f"vrt:///vsicurl/http://{PLACE}/a.tif",
    "/vsizip/a.zip/b.tif",
    f"GTIFF_DIR:1:/vsicurl/http://{PLACE}/a.tif", f"GTIFF_RAW:http://{PLACE}/a.tif", f"STACIT:http://{PLACE}/a",
    f"<VRTDataset rasterXSize=\"1\"><SourceFilename>/vsicurl/http://{PLACE}/a</SourceFilename></VRTDataset>",
    "a\0.tif", "a\x7f.tif", "a\x9b2J.tif", "a\u202eb.tif", "a" * 5000, "a/" * 3000, "=cmd|' /C calc'!A0", "-rf", "~",
    "$HOME/a",
    f"$(touch {MARK})", f"`touch {MARK}`", "{{ 7 * 7 }}", "<script>alert(1)</script>", "\ud7ff.tif", "chips",
    "vrt.tif", "wms.tif",
    "/dev/zero", "con", "%2e%2e/a.tif", "file:///etc/passwd", "s3://x/a.tif", "chips/a.tif/", "./chips/a.tif",
    "chips//a.tif",
)  # fmt: skip


def some_catalog(draw: random.Random, folder: Path) -> bytes:
    """A table in some dialect, with some faults."""
    if draw.random() < 0.1:
        return draw.randbytes(draw.randrange(500))
    good = (folder / "catalog.csv").read_bytes()
    if draw.random() < 0.2:
        return good if draw.random() < 0.3 else mutated(draw, good)
    chips = [line.split(",")[0] for line in good.decode().splitlines()[1:]]
    columns = draw.choice(
        (["image", "usage"], ["usage", "image", "label"], ["image"], ["image", "image", "usage"], ["Image", "use"])
    )
    text = io.StringIO()
    separator, quote = draw.choice(",,,,;\t|"), draw.choice('""""\'')
    writer = csv.writer(
        text, delimiter=separator, quotechar=quote, quoting=draw.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)),
        lineterminator=draw.choice(("\n", "\n", "\r\n", "\r", "\n\n")),
    )  # fmt: skip
    writer.writerow(columns)
    for _ in range(draw.randrange(8)):
        usage = draw.choice(
            ("train", "validate", "test", "train", "validate", "Train ", "", "val", "x" * 2000, "NA", "\x1b[2J")
        )
        cells = {
            "image": draw.choice((draw.choice(PATHS), draw.choice(chips))),
            "usage": usage,
            "label": draw.choice(PATHS),
        }
        row = [cells.get(column.lower(), "x") for column in columns]
        writer.writerow(row[: draw.choice((9, 9, 9, 1))] + ["x"] * draw.choice((0, 0, 0, 2)))
    content = text.getvalue().encode(
        draw.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1")), "replace"
    )
    return mutated(draw, content) if draw.random() < 0.3 else content


def read_catalog(folder: Path, content: bytes) -> None:
    """Read the catalog, and whatever chips it is led to."""
    (folder / "data/hostile.csv").write_bytes(content)
    params = unchecked(params_of(folder), {"data.catalog": "hostile.csv"})
    catalog, problems = scan_catalog(params.data, folder)
    for row in catalog.rows:
        for image in row.images:
            assert (folder / "data" / image).absolute().parts[: len(folder.parts)] == folder.absolute().parts, image
            assert ".." not in image.split("/"), image
        try:
            inspect_chip(catalog.dir, row, ChipSpec.from_params(params.data))
        except EarthPriorError as error:
            problems.append(error)
    for problem in problems:
        assert len(str(problem)) < 10_000
    if problems:
        raise EarthPriorError(str(problems[0]))


def mutated(draw: random.Random, content: bytes) -> bytes:
    """Bytes changed, cut, doubled, put in."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        kind, place = draw.random(), draw.randrange(len(changed) + 1)
        if kind < 0.5 and place < len(changed):
            changed[place] ^= 1 << draw.randrange(8)
        elif kind < 0.65:
            del changed[place:]
        elif kind < 0.8:
            changed[place:place] = draw.randbytes(draw.randrange(1, 20))
        elif kind < 0.9:
            changed[place:place] = changed[place : place + draw.randrange(200)]
        else:
            del changed[place : place + draw.randrange(200)]
    return bytes(changed)
