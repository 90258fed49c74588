"""The series for another commit, and from an edited checkout."""

from __future__ import annotations

import datetime

import pytest
from upstream_doubles import CORE, with_lines

from dinocell.errors import UsageError
from dinocell.upstream.overlay import apply_series, status_of
from dinocell.upstream.rebase import rebase, refresh
from dinocell.upstream.series import PatchError, read_series

MORE = CORE.replace("import os\n", "import os\nimport re\n")


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_merged_series_is_written_and_clean_there(upstream, folder):
    old = upstream.git("rev-parse", "HEAD")
    new = upstream.commit("more", **{"dinov3/core.py": MORE})
    state = upstream.state()
    merged, written = rebase(upstream.folder, "main", read_series(folder))
    assert [one.state for one in merged.outcomes] == ["offset", "offset"]
    assert written == ["UPSTREAM", "loading.patch", "loop.patch"]
    fresh = read_series(folder)
    assert (fresh.pin.commit, fresh.pin.oldest, fresh.pin.newest) == (new, old, new)
    assert fresh.patches[0].header["Updated"] == datetime.date.today().isoformat()
    assert {one.state for one in status_of(upstream.folder, fresh).outcomes} == {"clean"}
    assert upstream.state() == state
    _, tree = apply_series(upstream.folder, fresh)
    assert (tree / "dinov3/core.py").read_text() == with_lines(MORE)


def test_a_rebase_and_its_reverse_give_the_same_series(upstream, folder):
    old = upstream.git("rev-parse", "HEAD")
    before = contents(folder)
    upstream.commit("more", **{"dinov3/core.py": MORE})
    rebase(upstream.folder, "main", read_series(folder))
    rebase(upstream.folder, old, read_series(folder))
    after = contents(folder)
    assert after["loop.patch"] == before["loop.patch"]
    assert read_series(folder).pin.commit == old


def test_an_older_commit_makes_the_range_longer(upstream, folder):
    first = upstream.git("rev-parse", "HEAD")
    second = upstream.commit("more", **{"dinov3/core.py": MORE})
    text = (folder / "UPSTREAM").read_text().replace(first, second)
    (folder / "UPSTREAM").write_text(text)
    rebase(upstream.folder, first, read_series(folder))
    pin = read_series(folder).pin
    assert (pin.oldest, pin.newest) == (first, second)


def test_the_same_commit_changes_nothing(upstream, folder):
    before = contents(folder)
    merged, written = rebase(upstream.folder, "HEAD", read_series(folder))
    assert written == []
    assert merged.applies
    assert contents(folder) == before


def test_a_conflict_leaves_the_series(upstream, folder):
    before = contents(folder)
    upstream.commit("edit", **{"dinov3/core.py": CORE.replace("total += step", "total -= step")})
    merged, written = rebase(upstream.folder, "main", read_series(folder))
    assert not merged.applies
    assert written == []
    assert contents(folder) == before


def test_a_tree_that_fails_its_checks_leaves_the_series(upstream, folder):
    before = contents(folder)
    upstream.commit("more", **{"dinov3/core.py": MORE})
    seen = []

    def check(tree):
        seen.append((tree / "dinov3/core.py").read_text())
        assert (tree / "dinov3/ours.py").is_file()
        return False

    with pytest.raises(PatchError, match="must pass its verification"):
        rebase(upstream.folder, "main", read_series(folder), check=check)
    assert seen == [with_lines(MORE)]
    assert contents(folder) == before
    _, written = rebase(upstream.folder, "main", read_series(folder), dry_run=True)
    assert written == []
    assert contents(folder) == before


def test_a_commit_with_our_lines_is_no_base(upstream, folder):
    upstream.commit("ours", **{"dinov3/core.py": with_lines(CORE)})
    with pytest.raises(PatchError, match="must not have our lines yet, got loading, loop"):
        rebase(upstream.folder, "main", read_series(folder))


def test_an_unknown_commit(upstream, folder):
    with pytest.raises(UsageError, match="must know the commit, got nowhere"):
        rebase(upstream.folder, "nowhere", read_series(folder))


# --- from an edited checkout ---


def test_an_edited_line_becomes_the_patch(upstream, folder):
    apply_series(upstream.folder, read_series(folder))
    text = upstream.read("dinov3/core.py").replace("added(path)", "added(path, 2)")
    upstream.write("dinov3/core.py", text)
    assert refresh(upstream.folder, read_series(folder)) == ["loading.patch"]
    assert "added(path, 2)" in (folder / "loading.patch").read_text()
    assert refresh(upstream.folder, read_series(folder)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("    return checked\n", "    return checked or data\n"), "marked added lines alone"),
        (("    return checked\n", "    print(data)\n    return checked\n"), "marked added lines alone"),
        (("  # dinocell: loop", "  # dinocell: loops"), r"got loops: correct the mark"),
        (("            added(step, total)  # dinocell: loop\n", ""), "loop has 2 hooks"),
        (('    """Read a file."""\n', '    """Read a file."""\n    pass  # dinocell: loop\n'),
         "loop has 2 hooks"),
    ],
)  # fmt: skip
def test_other_edits_are_refused(upstream, folder, change, message):
    before = contents(folder)
    apply_series(upstream.folder, read_series(folder))
    text = upstream.read("dinov3/core.py")
    assert change[0] in text
    upstream.write("dinov3/core.py", text.replace(*change))
    with pytest.raises((UsageError, PatchError), match=message):
        refresh(upstream.folder, read_series(folder))
    assert contents(folder) == before


def test_lines_elsewhere_than_the_header_says(upstream, folder):
    apply_series(upstream.folder, read_series(folder))
    text = upstream.read("dinov3/core.py")
    lines = "    from dinov3.ours import added  # dinocell: loading\n    added(path)  # dinocell: loading\n"
    text = text.replace(lines, "").replace("    target = os", lines + "    target = os")
    upstream.write("dinov3/core.py", text)
    with pytest.raises(PatchError, match="must stand in load, got another place"):
        refresh(upstream.folder, read_series(folder))


def test_a_checkout_without_our_lines(upstream, folder):
    with pytest.raises(
        PatchError, match="must have lines in the checkout, got none of loading, loop"
    ):
        refresh(upstream.folder, read_series(folder))
