"""`python -m moepad compile`: device images made ahead of time, for machines without a compiler."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from moepad import compiler
from moepad.cli.table import progress, table

NAME = "compile"
HELP = "compile the GPU kernels ahead of time"

MEBIBYTE = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch",
        type=_names_of(compiler.ARCHS),
        required=True,
        metavar="ARCH,...",
        help=f"architectures: {', '.join(compiler.ARCHS)}, or all",
    )
    parser.add_argument(
        "--part",
        type=_names_of(compiler.PARTS),
        default=list(compiler.PARTS),
        metavar="PART,...",
        help="parts of the kernels: an element type, and the bits of a quantised weight: "
        f"{', '.join(compiler.PARTS)} (default: all)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for the images, for MOEPAD_IMAGES (default: the cache, where they are found "
        "without it)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    folder = args.out or compiler.cache_folder()
    rows = _compile_all(list(itertools.product(args.arch, args.part)), folder)
    if args.json:
        print(json.dumps({"folder": str(folder), "images": rows}, indent=2))
        return 0
    cells = [
        (row["arch"], row["part"], row["file"], f"{row['nbytes'] / MEBIBYTE:.2f}",
         f"{row['seconds']:.1f}", row["compiler"])
        for row in rows
    ]  # fmt: skip
    print(table(cells, ("arch", "part", "image", "MiB", "seconds", "compiler")))
    if args.out:
        print(f"use them with MOEPAD_IMAGES={folder}")
    return 0


def _compile_all(images: list[tuple[str, str]], folder: Path) -> list[dict[str, Any]]:
    """Makes an image per architecture and part, as many at a time as there are processors."""
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        made = pool.map(lambda image: _compile(image[0], image[1], folder), images)
        return list(progress(made, "compiling", total=len(images), unit="image"))
    finally:
        pool.shutdown(cancel_futures=True)


def _compile(arch: str, part: str, folder: Path) -> dict[str, Any]:
    start = time.monotonic()
    path, made_by = compiler.keep_image(arch, part, folder)
    return {
        "arch": arch,
        "part": part,
        "file": str(path),
        "nbytes": path.stat().st_size,
        "seconds": time.monotonic() - start,
        "compiler": made_by.name,
        "compiler_path": made_by.path,
        "compiler_version": made_by.version,
    }


def _names_of(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    """What argparse reads a list of known names with."""

    def read(text: str) -> list[str]:
        if text == "all":
            return list(known)
        names = list(dict.fromkeys(filter(None, text.split(","))))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"no kernels for {name!r}; there are kernels for {', '.join(known)}"
                )
        if not names:
            raise argparse.ArgumentTypeError("expected at least one name")
        return names

    return read
