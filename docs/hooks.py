"""The README is no page of the site; its relative links are checked before the site is built."""

import re
from pathlib import Path

LINK = re.compile(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)\s]+))?\)")
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)


def anchors(markdown: str) -> set[str]:
    """Anchors of the headings of a page, as GitHub and MkDocs both make them of plain words."""
    titles = re.findall(r"^#+ (.+)$", FENCED.sub("", markdown), re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


def broken_links(page: Path) -> list[str]:
    """Relative links of a Markdown page whose file or heading does not exist."""
    broken = []
    for target, anchor in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        path = page.parent / target if target else page
        if not path.is_file() or (anchor and anchor not in anchors(path.read_text(encoding="utf-8"))):
            broken.append(f"{target}#{anchor}" if anchor else target)
    return broken


def on_pre_build(config) -> None:
    from mkdocs.exceptions import PluginError  # the tests use the rest where mkdocs is not installed

    if broken := broken_links(Path(config.config_file_path).parent / "README.md"):
        raise PluginError(f"README.md: broken links: {', '.join(broken)}")
