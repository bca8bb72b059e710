"""Text of users in Markdown, where it cannot leave its place, and without paths that tell about a machine."""

import os
import re
from typing import Any

# How a path begins that tells about somebody's machine: absolute, home, parent folder, drive or network share.
_LOCAL = (
    r"(?:file://)?(?:/(?=[\w.-]+/|[\w.][\w.-])|~(?:[A-Za-z_][\w.-]*)?[\\/]|\.\.[\\/]|[A-Za-z]:[\\/](?!/)|\\\\(?=\w))"
)
_LOCAL_PATH = re.compile(
    rf"""(?P<quote>["'])(?P<quoted>{_LOCAL}[^"'\n]*)(?P=quote)|(?<![\w.~/\\-]){_LOCAL}[^\s"'`,;|()<>]*"""
)
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff\ufffe\uffff\ud800-\udfff]")


def short_name(name: str | os.PathLike) -> str:
    """`name` as it is, or its last part where it is a path of a machine."""
    name = str(name).strip()
    return last_part(name) if re.match(_LOCAL, name) else without_paths(name)


def without_paths(text: str) -> str:
    """`text` with every path that tells about a machine cut to its last part. Links and relative paths stay."""

    def shorten(match: re.Match) -> str:
        if match["quote"]:
            return match["quote"] + last_part(match["quoted"]) + match["quote"]
        return last_part(match[0])

    return _LOCAL_PATH.sub(shorten, str(text))


def last_part(path: str | os.PathLike) -> str:
    return re.split(r"[\\/]", str(path).rstrip("\\/"))[-1]


def markdown_text(value: Any) -> str:
    """`value` as one line of plain text in Markdown, safe in a table cell as well."""
    line = re.sub(r"([\\`*\[\]<>|~$]|&(?=[#\w]+;))", r"\\\1", _one_line(value))
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", line)  # low_vegetation stays, _emphasis_ does not


def markdown_code(value: Any) -> str:
    """`value` as a code span, safe in a table cell as well."""
    line = _one_line(value)
    if "|" in line:  # tables are cut at bars before code spans are seen; the escape has escapes of its own
        return f"<code>{''.join(c if c.isalnum() or c in ' .,' else f'&#{ord(c)};' for c in line)}</code>"
    ticks = "`" * (1 + longest_run_of_backticks(line))
    pad = " " if len(ticks) > 1 else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def code_block(text: str, language: str) -> str:
    """`text` in a fence that is longer than any within it."""
    fence = "`" * max(3, 1 + longest_run_of_backticks(text))
    return f"{fence}{language}\n{_CONTROL.sub('', text)}\n{fence}"


def longest_run_of_backticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _one_line(value: Any) -> str:
    return " ".join(_CONTROL.sub("", str(value)).split()) or "–"
