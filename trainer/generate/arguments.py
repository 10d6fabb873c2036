"""The options of `v4 generate`. Imports no torch."""

from __future__ import annotations

import argparse


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `v4 generate` to a parser that has the folder."""
    parser.add_argument("--prompt", action="append", default=[])
    parser.add_argument("--file", help="a prompt for each line; - is standard input")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--stop", action="append", default=[], help="a token that ends a text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-speculation", action="store_true")
    parser.add_argument("--packed", action="store_true", help="cache in FP8 and MXFP4")
    parser.add_argument("--json", action="store_true", help="a JSON object for each prompt")
