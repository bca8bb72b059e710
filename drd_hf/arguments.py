"""Command lines of the scripts: dataclass fields, a flat YAML file of defaults, overrides after it."""

import argparse
import json
import sys
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from drd_hf.errors import UserError, nearest


class _Parser(HfArgumentParser):
    def error(self, message):  # argparse prints the whole usage, hundreds of lines for TrainingArguments
        raise UserError(f"{message} (--help explains every option)")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults beside the options, and the commands of the description on lines of their own."""


def parse_arguments(*dataclass_types, description: str, argv: list[str] | None = None) -> tuple:
    """One instance of each dataclass from ``--config FILE --field value ...``.

    The YAML file is flat, its keys are the fields of the dataclasses; options on the command line win over it.

    Raises:
        UserError: unknown option or key (nearest names listed), wrong type, missing file, nested YAML.
    """
    parser = _Parser(
        dataclass_types,
        description=description,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="Flat YAML file with defaults for any of the options here.")
    argv = list(sys.argv[1:] if argv is None else argv)
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(argv)[0].config
    known = {option[2:] for action in parser._actions for option in action.option_strings if option.startswith("--")}
    from_file = _yaml_options(path, known) if path else []
    try:
        *parsed, namespace, unknown = parser.parse_args_into_dataclasses(
            [*from_file, *argv], return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError) as error:  # options that contradict each other, as TrainingArguments finds them
        raise UserError(" ".join(str(error).split())) from error
    if unknown:
        raise UserError(f"unknown option {unknown[0]}; nearest: {nearest(unknown[0].lstrip('-'), known)}")
    return tuple(parsed)


def require(**options) -> None:
    """Refuse options that were left empty: ``require(model=args.model)``."""
    for name, value in options.items():
        if not value:
            raise UserError(f"--{name} is missing: give it on the command line or in the --config file")


def _yaml_options(path: str, known: set[str]) -> list[str]:
    """A flat YAML file as command-line words, so that the parser gives every value its type."""
    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: must be a flat mapping of option: value")
    words = []
    for key, value in values.items():
        if key not in known or key == "config":
            raise UserError(f"--config {path}: unknown key {key!r}; nearest: {nearest(str(key), known)}")
        if value is None:
            continue
        words.append(f"--{key}")
        if isinstance(value, list):
            words += [str(item) for item in value]
        else:
            words.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return words
