"""What the documentation consists of, and how Markdown is read: for mkdocs.yml, of which this is a hook, and the tests.

The site has the folders of the repository, README.md, kernels_cu/ and all, so that one relative link is right in both.
Links to files that are no pages lead to copies of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PATTERNS = ("*.md", "docs/**/*.md", "kernels_cu/**/*.md")

_FENCED = re.compile(r"^```(?P<language>[^\n`]*)\n(?P<text>.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)
_LINKS = (
    re.compile(r"\]\(<?([^)\s>]+)[^)]*\)"),
    re.compile(r"(?:src|href)=[\"']([^\"']+)[\"']"),
    re.compile(r"^\[[^\]]+\]:\s*(\S+)", re.MULTILINE),
)


class Block(NamedTuple):
    """A fenced block."""

    line: int  # of its first line in the file
    language: str
    text: str


def pages() -> list[str]:
    """The paths of all pages, from the root of the repository."""
    return sorted({path.relative_to(ROOT).as_posix() for pattern in PATTERNS for path in ROOT.glob(pattern)})


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page."""
    return [
        Block(text.count("\n", 0, found.start("text")) + 1, found["language"].strip(), found["text"])
        for found in _FENCED.finditer(text)
    ]


def links(text: str) -> Iterator[str]:
    """Where links and images point at, but for those with a scheme: "path", "path#anchor" or "#anchor"."""
    text = re.sub(r"`[^`\n]*`", "", _FENCED.sub("", text))
    for pattern in _LINKS:
        yield from (target for target in pattern.findall(text) if not re.match(r"[a-z][a-z0-9+.-]*:", target, re.I))


def slug(heading: str, separator: str = "-") -> str:
    """The anchor that repository hosts make of a heading: its letters, digits and hyphens."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def anchors(text: str) -> list[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ +(.+?)[ \t]*$", _FENCED.sub("", text), re.MULTILINE)
    return [slug(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)) for heading in headings]


def assets() -> list[str]:
    """The files that pages link to and that are no pages: pictures, sources."""
    found = set()
    for page in pages():
        for target in links((ROOT / page).read_text(encoding="utf-8")):
            path = (ROOT / page).parent / target.partition("#")[0]
            if path.is_file() and path.suffix != ".md":
                found.add(path.resolve().relative_to(ROOT).as_posix())
    return sorted(found)


# --- what MkDocs calls ---------------------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    """Anchors are those of `slug`."""
    config.mdx_configs["toc"] = {**config.mdx_configs.get("toc", {}), "slugify": slug}
    return config


def on_files(files: Any, config: Any) -> Any:
    """All pages by their paths from the root, in place of those that lie in docs/."""
    from mkdocs.structure.files import File

    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    for path in [*pages(), *assets(), *config.extra_css]:
        files.append(File(path, str(ROOT), config.site_dir, config.use_directory_urls))
    return files
