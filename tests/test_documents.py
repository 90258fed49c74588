"""The commands and programs in README and docs/ run, on small files.

Every fenced block names its language.  Blocks of `sh` and `python` of a page run one after the other in one folder
(`document_folder.py`).  What needs more than the tests have is named in a comment before its block, with the reason:
`<!-- not run: REASON -->` for all of it, or for the commands that begin so: `<!-- not run, REASON: COMMAND | COMMAND -->`.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import document_folder
import pytest
from document_folder import RENAMED, ROOT
from ports import held_port

PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "dinocell" / "models").glob("*.md")),
    *(ROOT / folder / "README.md" for folder in ("patches", "dinov3_modified", "examples/browser")),
]
SHOWN = {"yaml", "text", "console"}  # files, and output as an example
BLOCK = re.compile(
    r"^(?: *<!-- not run(?P<some>, [^:]*)?:\s+(?P<why>[^>]*) -->\n)?(?P<indent> *)```(?P<language>\S*)\n"
    r"(?P<text>.*?)^ *```$",
    flags=re.M | re.S,
)


def blocks(path: Path) -> Iterator[tuple[int, re.Match[str]]]:
    """Line number and parts of each fenced block."""
    text = path.read_text(encoding="utf-8")
    assert len(re.findall(r"^ *```", text, flags=re.M)) == 2 * len(BLOCK.findall(text)), path
    found = list(BLOCK.finditer(text))
    assert text.count("<!-- not run") == sum(bool(match["why"]) for match in found), path
    for match in found:
        yield text[: match.start("indent")].count("\n") + 1, match


def commands(block: re.Match[str]) -> str:
    """The text of a block without the commands that a comment leaves out."""
    indent = block["indent"]
    text = "".join(line.removeprefix(indent) for line in block["text"].splitlines(keepends=True))
    for start in re.split(r"\s*\|\s*", block["why"]) if block["some"] else []:
        kept = re.sub(rf"^{re.escape(start)}(?:.*\\\n)*.*\n", "", text, flags=re.M)
        assert kept != text, f"the comment names `{start}`, which is not in the block"
        text = kept
    return text


def script(path: Path, folder: Path, port: int) -> str:
    """One shell program of all blocks of a page; Python is written beside it."""
    lines = ["set -euo pipefail"]
    for number, block in blocks(path):
        if block["language"] in SHOWN or (block["why"] and not block["some"]):
            continue
        text = commands(block)
        for old, new in {":8000": f":{port}", ":8001": f":{port + 1}", **RENAMED}.items():
            text = text.replace(old, new)
        place = f"{path.relative_to(ROOT)}:{number}"
        if block["language"] == "python":
            (folder / f"block_{number}.py").write_text(text, encoding="utf-8")
            text = f"python block_{number}.py\n"
        lines.append(f"echo '=== {place}' >&2\nset -x\n{text}{{ set +x; }} 2>/dev/null")
    return "\n".join(lines) + "\n"


@pytest.fixture
def port() -> Iterator[int]:
    """The first of two that nobody else is given."""
    for number in range(20000, 40000, 2):
        with ExitStack() as held, contextlib.suppress(OSError):
            held.enter_context(held_port(number))
            held.enter_context(held_port(number + 1))
            yield number
            return
    raise AssertionError("no port is free")


def runnable(path: Path) -> bool:
    return any(
        block["language"] not in SHOWN and (block["some"] or not block["why"])
        for _, block in blocks(path)
    )


def test_every_block_names_a_known_language():
    found = {block["language"] for path in PAGES for _, block in blocks(path)}
    assert found <= SHOWN | {"sh", "python"}


def test_commands_that_are_left_out_need_a_reason_and_a_place(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- not run, no net: a b -->\n```sh\na b \\\n  -c\nd\n```\n")
    ((_, block),) = blocks(page)
    assert commands(block) == "d\n"
    page.write_text("<!-- not run, no net: x -->\n```sh\na b\n```\n")
    ((_, block),) = blocks(page)
    with pytest.raises(AssertionError, match="names `x`"):
        commands(block)


def test_no_page_changes_what_is_installed():
    """Where blocks run, they must not install, clone or submit."""
    wrong = [
        f"{path.name}:{number}: {line}"
        for path in PAGES
        for number, block in blocks(path)
        if block["language"] == "sh" and (block["some"] or not block["why"])
        for line in commands(block).splitlines()
        if re.match(r"(pip|npm|conda|apt|git|docker|make|sbatch|srun|dinocell submit)\b", line)
    ]
    assert wrong == []


@pytest.fixture(scope="session")
def small_files(made_once) -> Path:
    return made_once("documents", document_folder.fill)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [path for path in PAGES if runnable(path)], ids=lambda p: p.relative_to(ROOT).as_posix()
)
def test_the_commands_of_a_page_run(path, small_files, tmp_path, port):
    folder = tmp_path / "work"
    shutil.copytree(small_files, folder, symlinks=True)
    programs = tmp_path / "programs"
    document_folder.write_programs(programs, port)
    text = script(path, folder, port)
    for program in ("curl", "jq"):
        if re.search(rf"\b{program} ", text) and not shutil.which(program):
            pytest.skip(f"{program} is not installed")
    try:
        done = subprocess.run(
            ["bash", "-c", text],
            cwd=folder,
            env=document_folder.environment(folder, programs),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
    finally:
        servers = folder / "servers"
        for pid in servers.read_text().split() if servers.exists() else ():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(pid), signal.SIGTERM)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_the_page_of_installation_lists_every_extra():
    setup = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (extras,) = (
        line.value
        for line in setup.body
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "EXTRAS"
    )
    assert isinstance(extras, ast.Dict)
    names = {ast.literal_eval(key) for key in extras.keys if key is not None}
    page = (ROOT / "docs/install.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == names | {"all"}
