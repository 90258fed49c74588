"""The form of patches, and the series that is in the repository."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

from dinocell.errors import UsageError
from dinocell.upstream import series as series_module
from dinocell.upstream.placement import additions_in, find_function, misplaced, without_additions
from dinocell.upstream.series import (
    Hook,
    PatchError,
    blob_id,
    default_series_folder,
    marked_name,
    read_series,
)

ROOT = Path(__file__).resolve().parents[3]


def added_lines(patch) -> int:
    return sum(len(item.lines) for items in patch.additions.values() for item in items)


# --- the real one ---


@pytest.fixture(scope="module")
def real():
    return read_series(default_series_folder())


def test_every_file_of_our_folder_goes_with_the_patches(real):
    tree = ROOT / "dinov3_modified"
    cells = {
        path.relative_to(tree).as_posix()
        for path in (tree / "dinov3/cells").rglob("*")
        if path.suffix in (".py", ".yaml")
    }
    assert {path for path in real.files if path.startswith("dinov3/cells/")} == cells
    assert len(real.files) - len(cells) == 5


def test_an_installed_package_asks_for_a_clone(tmp_path, monkeypatch):
    monkeypatch.setattr(series_module, "__file__", str(tmp_path / "dinocell/upstream/series.py"))
    with pytest.raises(UsageError, match="needs a clone of DINOCell, because the patches are not"):
        default_series_folder()


def test_hooks_are_few_and_call_our_files_alone(real):
    assert sum(map(added_lines, real.patches)) <= 40
    for patch in real.patches:
        for additions in patch.additions.values():
            for item in additions:
                assert item.lines[0].strip().startswith("from dinov3.cells.hooks import "), (
                    item.lines
                )


def test_no_line_of_upstream_is_in_a_patch(real):
    for patch in real.patches:
        body = patch.text[patch.text.index("\ndiff --git ") + 1 :]
        for line in body.splitlines():
            assert re.match(r"diff |index |--- |\+\+\+ |@@ -\d+,0 \+\d+,\d+ @@$|\+", line), line
            if line.startswith("+") and not line.startswith("+++"):
                assert marked_name(line) == patch.name


def test_hooks_are_where_the_bundled_tree_has_the_same_functions(real):
    for patch in real.patches:
        for hook in patch.hooks:
            tree = ast.parse((ROOT / "dinov3_modified" / hook.path).read_text())
            assert find_function(tree, hook.function) is not None, hook


def test_every_hook_function_is_called_by_a_patch(real):
    source = (ROOT / "dinov3_modified/dinov3/cells/hooks.py").read_text()
    text = "".join(patch.text for patch in real.patches)
    public = [
        node.name
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]
    used = [name for name in public if f"import {name}  #" in text]
    assert sorted(set(public) - set(used)) == [
        "empty_teacher",
        "load_hook",
        "sections",
    ]  # used by others there


def test_listed_files_import_what_goes_with_them(real):
    """Or modules that upstream has too: those that the bundled tree mirrors, by its README."""
    ours = (ROOT / "dinov3_modified/README.md").read_text().split("## Ours")[1]
    only_ours = set(re.findall(r"`(dinov3/[\w/]+\.py)`", ours)) - {
        "dinov3/models/vision_transformer.py"
    }
    for path, source in real.files.items():
        if not path.endswith(".py"):
            continue
        for name in re.findall(r"(?:from|import) (dinov3[\w.]*)", source.read_text()):
            module = name.replace(".", "/") + ".py"
            assert module not in only_ours or module in real.files, f"{path} imports {name}"


# --- the form ---


def test_what_refresh_writes_is_read_again(series, folder):
    loading, loop = series.patches
    assert loading.additions["dinov3/core.py"][0].after == 7
    assert [item.after for item in loop.additions["dinov3/core.py"]] == [21, 23]
    assert (added_lines(loading), added_lines(loop)) == (2, 2)
    assert loop.hooks[1] == Hook("dinov3/core.py", "Trainer.run", "after", "step")
    assert "total = 0" not in (folder / "loop.patch").read_text()
    assert loading.header["Updated"] != "2026-01-02"


def test_blob_names_are_those_of_git(upstream):
    expected = upstream.git("rev-parse", "HEAD:dinov3/core.py")
    assert blob_id((upstream.folder / "dinov3/core.py").read_bytes()) == expected


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("loop.patch", ("+            added", "-            added"), "hold added lines alone"),
        ("loop.patch", ("# dinocell: loop", "# dinocell: other"), "must end with"),
        ("loop.patch", ("Why: it is needed\n", ""), "must have What, Why"),
        ("loop.patch", ("after step", "beside step"), "A hook must be FILE FUNCTION"),
        ("loop.patch", ("Hook: dinov3/core.py Trainer.run after step\n", ""), "hunks and 1 hooks"),
        ("loading.patch", ("load first", "load first x"), "A hook must be FILE FUNCTION"),
        ("series", ("loop.patch", "Loop.patch"), "small letters"),
        ("series", ("loop.patch", "loops.patch"), "must have the file loops.patch"),
        (
            "files",
            ("dinov3/ours.py", "dinov3/theirs.py"),
            "Entries of .* must exist in .*, got dinov3/theirs",
        ),
        ("UPSTREAM", ("address", "adress"), "must hold address, commit"),
        ("UPSTREAM", ("commit: ", "commit: abc"), "must have 40 digits"),
    ],
)
def test_wrong_files_are_refused(folder, name, change, message):
    path = folder / name
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change))
    with pytest.raises(PatchError, match=message):
        read_series(folder)


def test_a_missing_file_is_refused(folder):
    (folder / "UPSTREAM").unlink()
    with pytest.raises(PatchError, match="must have the file UPSTREAM"):
        read_series(folder)


def test_the_pin_is_yaml_with_comments(folder):
    content = yaml.safe_load((folder / "UPSTREAM").read_text())
    assert set(content) == {"address", "commit", "date", "oldest", "newest"}
    assert content["date"] == "2026-01-01"


# --- places ---

TEXT = """def one(x):
    from ours import a  # dinocell: p
    a(x)  # dinocell: p
    y = x
    return y
"""


def patch_at(series, place: str, landmark: str = "", function: str = "one"):
    from dataclasses import replace

    from dinocell.upstream.series import Addition

    lines = ("    from ours import a  # dinocell: p", "    a(x)  # dinocell: p")
    return replace(
        series.patches[0],
        name="p",
        hooks=(Hook("m.py", function, place, landmark),),
        additions={"m.py": (Addition(1, lines),)},
        bases={"m.py": "0" * 40},
    )


@pytest.mark.parametrize(
    ("text", "place", "landmark", "function", "trouble"),
    [
        (TEXT, "first", "", "one", ""),
        (TEXT, "before", "y", "one", ""),
        (TEXT, "before", "z", "one", "must stand before the statement with z"),
        (TEXT, "after", "x", "one", "must stand after the statement with x"),
        (TEXT, "first", "", "two", "which does not exist"),
        (TEXT + "\ndef two(x):\n    return x\n", "first", "", "two", "must stand in two, got another"),
        (TEXT.replace("def one(x):\n", 'def one(x):\n    """Doc."""\n'), "first", "", "one", ""),
        (TEXT.replace("def one(x):\n", "def one(x):\n    b = x\n"), "first", "", "one", "must be the first"),
        (TEXT.replace("def one(x):\n", "def one(x):\n    b = x\n"), "after", "b", "one", ""),
        (TEXT.replace("    y = x", "  y = x"), "first", "", "one", "does not compile"),
        (TEXT.replace("    a(x)  # dinocell: p\n", ""), "first", "", "one", "2 lines once and in order, got 1"),
        (TEXT + TEXT.replace("one", "two"), "first", "", "one", "got 4"),
        (TEXT.replace("one(x)", "one(z)"), "first", "", "one", "names that one has, got x"),
        ("x = 1\n\n" + TEXT.replace("one(x)", "one(z)"), "first", "", "one", ""),
    ],
)  # fmt: skip
def test_places(series, text, place, landmark, function, trouble):
    found = misplaced(text, "m.py", [patch_at(series, place, landmark, function)])
    if trouble:
        assert trouble in " ".join(found["p"])
    else:
        assert found == {}


def test_lines_are_found_and_removed():
    assert without_additions(TEXT) == "def one(x):\n    y = x\n    return y\n"
    (item,) = additions_in(TEXT)["p"]
    assert (item.after, len(item.lines)) == (1, 2)
    assert additions_in("a = 1\n") == {}
