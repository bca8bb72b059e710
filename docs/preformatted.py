"""Module docstrings hold tables that are laid out with spaces: paragraphs of that kind become blocks of code."""

import re

import griffe


def fence(docstring: str) -> str:
    paragraphs = docstring.split("\n\n")
    for i, paragraph in enumerate(paragraphs):
        if re.search(r"\S {3,}\S", paragraph):
            paragraphs[i] = f"```text\n{paragraph}\n```"
        elif paragraph.endswith("::"):  # what follows is indented, so it is code anyway
            paragraphs[i] = paragraph[:-1]
    return "\n\n".join(paragraphs)


class Preformatted(griffe.Extension):
    def on_module(self, *, mod: griffe.Module, **kwargs) -> None:
        if mod.docstring:
            mod.docstring.value = fence(mod.docstring.value)
