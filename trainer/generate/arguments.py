"""The options of `v4 generate` and `v4 chat`. Imports no torch."""

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


def add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `v4 chat` to a parser that has the folder."""
    parser.add_argument("--think", choices=("none", "high", "max"), default="none")
    parser.add_argument("--system", help="text of the system message")
    parser.add_argument("--tools", help="JSON file with a list of tools")
    parser.add_argument("--prompts", help="the encoder of a released folder, for its prompts")
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, help="by default another one for every conversation")
