"""Hooks of mkdocs: files of the repository outside `docs/` that pages link to become part of the site.

A page links to them as GitHub shows them (`../configs/...`).  In the site they stand below `repository/`, and links
to and from them are rewritten.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
INSIDE = "repository"
ALWAYS = (  # in the navigation
    "CHANGELOG.md",
    "dinov3_modified/README.md",
    "patches/README.md",
    *sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("dinocell/models/*.md")),
)
_LINK = re.compile(r"(\]\()([^)#:\s]+)((?:#[^)]*)?\))")


def _place(path: str) -> str:
    """Where a file of the repository, named from its root, stands among the sources of the site."""
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{INSIDE}/{path}"


def _origin(place: str) -> str:
    """The opposite of `_place`."""
    return place.removeprefix(f"{INSIDE}/") if place.startswith(f"{INSIDE}/") else f"docs/{place}"


def _targets(origin: str) -> set[str]:
    """Files of the repository that a document of it links to."""
    text = (ROOT / origin).read_text(encoding="utf-8")
    folder = posixpath.dirname(origin)
    found = {posixpath.normpath(posixpath.join(folder, match[2])) for match in _LINK.finditer(text)}
    return {path for path in found if (ROOT / path).is_file()}


def on_files(files: Files, config: Any) -> Files:
    """Add what the pages, and the pages added by this, link to."""
    waiting = {*ALWAYS, *(_origin(file.src_uri) for file in files.documentation_pages())}
    seen: set[str] = set()
    while waiting:
        origin = waiting.pop()
        seen.add(origin)
        if _place(origin) not in files.src_uris:
            files.append(File.generated(config, _place(origin), abs_src_path=str(ROOT / origin)))
        if origin.endswith(".md"):
            waiting |= _targets(origin) - seen
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between documents of the repository into links between their places."""
    here = page.file.src_uri
    folder = posixpath.dirname(_origin(here))

    def rewritten(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[2]))
        if not (ROOT / path).is_file():
            return match[0]
        return match[1] + posixpath.relpath(_place(path), posixpath.dirname(here) or ".") + match[3]

    return _LINK.sub(rewritten, markdown)
