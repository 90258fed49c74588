"""The series in a checkout: added, removed, interrupted, refused."""

from __future__ import annotations

import errno
import os
import subprocess

import pytest
from upstream_doubles import CORE, OURS, Repository, with_lines

from dinocell.errors import UsageError
from dinocell.upstream import git as git_module
from dinocell.upstream import overlay
from dinocell.upstream.git import Scratch, run_git
from dinocell.upstream.merge import merge_patch, merge_series
from dinocell.upstream.overlay import apply_series, status_of, undo
from dinocell.upstream.report import merged_text, status_text
from dinocell.upstream.series import PatchError, read_series


def states(repository: Repository, series) -> dict[str, str]:
    return {one.name: one.state for one in status_of(repository.folder, series).outcomes}


# --- what a patch becomes ---


def test_clean_and_nothing_in_place(upstream, series):
    status = status_of(upstream.folder, series)
    assert {one.state for one in status.outcomes} == {"clean"}
    assert status.in_place == ()
    assert set(status.files.values()) == {"missing"}
    assert status.relation == "the commit that the series was made on"
    assert "dinocell upstream apply puts them in" in status_text(status)


def test_lines_above_move_the_additions(upstream, series):
    upstream.commit(
        "more", **{"dinov3/core.py": CORE.replace("import os\n", "import os\nimport re\n")}
    )
    status = status_of(upstream.folder, series)
    assert [one.state for one in status.outcomes] == ["offset", "offset"]
    assert status.outcomes[0].offsets == {"dinov3/core.py load": 1}
    assert status.relation.startswith("newer than")
    assert "with offset   dinov3/core.py load +1" in status_text(status)
    _, tree = apply_series(upstream.folder, series)
    assert (tree / "dinov3/core.py").read_text() == with_lines(
        upstream.git("show", "HEAD:dinov3/core.py") + "\n"
    )


def test_a_moved_function_takes_its_addition_along(upstream, series):
    """Git moves what it can; the syntax tree says whether it is right."""
    start = CORE.index("class Trainer")
    moved = (
        CORE[: CORE.index("def load")]
        + CORE[start:]
        + "\n\n"
        + CORE[CORE.index("def load") : start].rstrip()
        + "\n"
    )
    upstream.commit("moved", **{"dinov3/core.py": moved})
    with Scratch(upstream.folder) as scratch:
        merged = merge_series(scratch, scratch.commit("HEAD"), series)
    for outcome in merged.outcomes:
        assert outcome.state in ("offset", "conflict")
    if merged.applies:
        assert merged.texts["dinov3/core.py"].decode() == with_lines(moved)


def test_an_edit_at_the_place_is_a_conflict_with_both_sides(upstream, series):
    edited = CORE.replace(
        "            total += step\n", "            total += 2 * step\n            total %= 7\n"
    )
    upstream.commit("edit", **{"dinov3/core.py": edited})
    status = status_of(upstream.folder, series)
    loading, loop = status.outcomes
    assert (loading.state, loop.state) == ("clean", "conflict")
    (side,) = loop.sides["dinov3/core.py"]
    assert any("total %= 7" in line for line in side.upstream)
    assert any("dinocell: loop" in line for line in side.ours)
    with Scratch(upstream.folder) as scratch:
        text = merged_text(merge_series(scratch, scratch.commit("HEAD"), series))
    assert "dinov3/core.py:23 in run" in text, text
    assert "upstream |             total %= 7" in text
    assert "ours     |             added(step, total)  # dinocell: loop" in text
    before = upstream.state()
    with pytest.raises(PatchError, match=r"All patches must apply .* got 1 that do not"):
        apply_series(upstream.folder, series)
    assert upstream.state() == before


def test_a_renamed_function_is_a_conflict(upstream, series):
    upstream.commit("renamed", **{"dinov3/core.py": CORE.replace("def load(", "def load_file(")})
    outcome = status_of(upstream.folder, series).outcomes[0]
    assert outcome.state == "conflict"
    assert "must stand in load, which does not exist" in outcome.reasons[0]


def test_a_renamed_file_is_found(upstream, series):
    upstream.git("mv", "dinov3/core.py", "dinov3/kernel.py")
    upstream.commit("renamed")
    outcome = status_of(upstream.folder, series).outcomes[0]
    assert outcome.state == "conflict"
    assert "it is dinov3/kernel.py now" in outcome.reasons[0]


def test_a_removed_file_is_a_conflict(upstream, series):
    upstream.git("rm", "-q", "dinov3/core.py")
    upstream.commit("removed")
    assert "it is gone" in status_of(upstream.folder, series).outcomes[0].reasons[0]


def test_a_commit_that_has_our_lines(upstream, series):
    upstream.commit(
        "ours",
        **{"dinov3/core.py": with_lines(CORE), "dinov3/ours.py": OURS, "dinov3/more/deep.py": OURS},
    )
    status = status_of(upstream.folder, series)
    assert {one.state for one in status.outcomes} == {"there"}
    assert status.applied
    merged, _ = apply_series(upstream.folder, series)
    assert "already there" in merged_text(merged)
    assert upstream.git("status", "--porcelain") == ""
    upstream.commit(
        "half",
        **{
            "dinov3/core.py": with_lines(CORE).replace(
                "            added(step, total)  # dinocell: loop\n", ""
            )
        },
    )
    assert states(upstream, series)["loop"] == "conflict"


def test_placing_by_line_numbers_alone_is_noticed(upstream, series, monkeypatch):
    """Plain `git apply` does that and reports success."""
    upstream.commit(
        "more",
        **{
            "dinov3/core.py": CORE.replace(
                "import os\n", "import os\nimport re\nimport sys\nimport ast\n"
            )
        },
    )

    def by_numbers(self, patch):
        return (
            self.run("apply", "--cached", "--unidiff-zero", "-", stdin=patch.encode()).returncode
            == 0
        )

    monkeypatch.setattr(Scratch, "apply", by_numbers)
    assert set(states(upstream, series).values()) == {"conflict"}


def test_without_the_base_only_the_same_file_will_do(upstream, series, tmp_path):
    changed = CORE.replace("import os\n", "import os\nimport re\n")
    upstream.commit("more", **{"dinov3/core.py": changed})
    shallow = Repository(tmp_path / "shallow")
    shallow.git("clone", "-q", "--depth", "1", f"file://{upstream.folder}", ".")
    outcome = status_of(shallow.folder, series).outcomes[0]
    assert outcome.state == "conflict"
    assert "git fetch origin" in outcome.reasons[0]
    upstream.commit("back", **{"dinov3/core.py": CORE})
    same = Repository(tmp_path / "same")
    same.git("clone", "-q", "--depth", "1", f"file://{upstream.folder}", ".")
    assert set(states(same, series).values()) == {"clean"}
    apply_series(same.folder, series)
    assert same.read("dinov3/core.py") == with_lines(CORE)


def test_patches_that_only_fit_alone(upstream, folder):
    """Two patches at one place: the second one is a conflict."""
    path = folder / "loading.patch"
    twin = path.read_text().replace("# dinocell: loading", "# dinocell: twin")
    (folder / "twin.patch").write_text(twin)
    (folder / "series").write_text("loading.patch\ntwin.patch\n")
    series = read_series(folder)
    found = {one.name: one for one in status_of(upstream.folder, series).outcomes}
    assert found["twin"].state == "conflict"
    assert "not after the patches before it" in found["twin"].reasons[0]


def test_settings_of_the_user_do_not_matter(upstream, series):
    for key, value in (
        ("apply.whitespace", "error"), ("core.autocrlf", "true"), ("merge.conflictstyle", "diff3"),
        ("diff.noprefix", "true"), ("apply.ignorewhitespace", "change"),
    ):  # fmt: skip
        upstream.git("config", key, value)
    upstream.commit(
        "more", **{"dinov3/core.py": CORE.replace("import os\n", "import os\nimport re\n")}
    )
    assert set(states(upstream, series).values()) == {"offset"}


def test_a_checkout_with_other_line_ends_is_refused(upstream, series):
    """As `core.autocrlf` of Windows makes one: git itself calls all files unchanged."""
    upstream.git("config", "core.autocrlf", "true")
    for path in upstream.folder.rglob("*.py"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    with pytest.raises(UsageError, match=r"line ends of its repository, got CRLF in \d+ files"):
        status_of(upstream.folder, series)


def test_an_old_git_is_refused(upstream, series, monkeypatch):
    def old(folder, *arguments, **how):
        if arguments == ("--version",):
            return subprocess.CompletedProcess([], 0, b"git version 2.30.2\n", b"")
        return run_git(folder, *arguments, **how)

    monkeypatch.setattr(git_module, "run_git", old)
    with pytest.raises(UsageError, match=r"Git must be 2\.32 or newer, got git version 2\.30\.2"):
        status_of(upstream.folder, series)


def test_no_git_at_all(upstream, series, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UsageError, match="Git must be installed"):
        status_of(upstream.folder, series)


# --- added and removed ---


def test_added_and_removed(upstream, series):
    before = upstream.state()
    _, top = apply_series(upstream.folder, series)
    assert upstream.read("dinov3/core.py") == with_lines(CORE)
    assert upstream.read("dinov3/more/deep.py") == OURS
    status = status_of(upstream.folder, series)
    assert status.applied
    assert status.in_place == ("loading", "loop")
    assert status.changed == ()
    assert "already there" in status_text(status)
    apply_series(top, series)  # again: nothing changes
    assert upstream.read("dinov3/core.py") == with_lines(CORE)
    assert set(undo(upstream.folder, series)) == {
        "dinov3/core.py", "dinov3/ours.py", "dinov3/more/deep.py",
    }  # fmt: skip
    assert upstream.state() == before
    assert not (upstream.folder / "dinov3/more").exists()
    assert undo(upstream.folder, series) == []
    assert upstream.git("status", "--porcelain") == ""


def test_a_newer_version_of_our_files_replaces_the_older(upstream, folder):
    apply_series(upstream.folder, read_series(folder))
    root = folder.parent / "dinov3_modified"
    (root / "dinov3/ours.py").write_text(OURS + "\n# newer\n")
    (folder / "files").write_text("dinov3/ours.py\n")
    newer = read_series(folder)
    assert status_of(upstream.folder, newer).files == {"dinov3/ours.py": "other"}
    apply_series(upstream.folder, newer)
    assert upstream.read("dinov3/ours.py").endswith("# newer\n")
    assert not (upstream.folder / "dinov3/more").exists(), "no longer ours"
    undo(upstream.folder, newer)
    assert upstream.git("status", "--porcelain") == ""


def test_a_file_of_ours_that_somebody_edited_is_kept(upstream, series):
    apply_series(upstream.folder, series)
    upstream.write("dinov3/ours.py", "# mine\n")
    with pytest.raises(UsageError, match="must be upstream's with our lines alone"):
        undo(upstream.folder, series)
    with pytest.raises(UsageError, match="must have no changes of its own"):
        apply_series(upstream.folder, series)
    assert upstream.read("dinov3/ours.py") == "# mine\n"


@pytest.mark.parametrize("where", ["patched", "other", "staged", "untracked"])
def test_a_tree_with_changes_is_left_alone(upstream, series, tmp_path, where):
    if where == "patched":
        upstream.write("dinov3/core.py", CORE + "\nX = 1\n")
    elif where == "untracked":
        upstream.write("dinov3/ours.py", "# somebody's\n")
    else:
        upstream.write("README.md", "changed\n")
        if where == "staged":
            upstream.git("add", "README.md")
    before = upstream.state()
    with pytest.raises(UsageError, match="must have no changes of its own, got 1"):
        apply_series(upstream.folder, series)
    assert upstream.state() == before
    assert len(status_of(upstream.folder, series).changed) == 1
    # A copy is of the commit, whatever lies in the work tree.
    _, tree = apply_series(upstream.folder, series, out=tmp_path / "copy")
    assert (tree / "dinov3/core.py").read_text() == with_lines(CORE)
    assert (tree / "dinov3/ours.py").read_text() == OURS
    assert (tree / "README.md").read_text() == "upstream\n"
    assert not (tree / "notes").exists()
    assert upstream.state() == before


def test_other_untracked_files_do_not_matter(upstream, series):
    upstream.write("mine.txt", "x")
    apply_series(upstream.folder, series)
    undo(upstream.folder, series)
    assert upstream.read("mine.txt") == "x"


def test_the_copy_must_be_new(upstream, series, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("mine")
    with pytest.raises(UsageError, match="`out` must be a new folder"):
        apply_series(upstream.folder, series, out=tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["x"]


def test_a_file_of_upstreams_with_our_name(upstream, series):
    upstream.commit("theirs", **{"dinov3/ours.py": "theirs = 1\n"})
    with pytest.raises(PatchError, match=r"must be new to upstream, got dinov3/ours\.py"):
        apply_series(upstream.folder, series)


def test_a_worktree_of_a_checkout(upstream, series, tmp_path):
    upstream.git("worktree", "add", "-q", str(tmp_path / "tree"), "HEAD")
    apply_series(tmp_path / "tree", series)
    assert (tmp_path / "tree/dinov3/core.py").read_text() == with_lines(CORE)
    assert upstream.git("status", "--porcelain") == ""
    undo(tmp_path / "tree", series)


# --- all or nothing ---


def test_a_full_disk_changes_nothing(upstream, series, monkeypatch):
    before = upstream.state()
    written = []

    def full(path, content):
        written.append(path)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_bytes(content)

    monkeypatch.setattr(overlay, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        apply_series(upstream.folder, series)
    assert upstream.state() == before
    assert not (upstream.folder / ".git/dinocell-upstream").exists()


@pytest.mark.parametrize("number", [2, 4])
def test_an_interruption_restores_everything(upstream, series, monkeypatch, number):
    before = upstream.state()
    replace, count = os.replace, []

    def interrupted(source, target):
        count.append(target)
        if len(count) == number:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(overlay.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply_series(upstream.folder, series)
    monkeypatch.undo()
    assert upstream.state() == before
    assert upstream.git("status", "--porcelain") == ""


def killed_at(number, function, *arguments) -> int:
    """Exit code of a process that ends without any clean-up at its `number`-th rename."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    replace, count = os.replace, []

    def killed(source, target):
        count.append(target)
        if len(count) == number:
            os._exit(9)
        replace(source, target)

    os.replace = killed
    try:
        function(*arguments)
    finally:
        os._exit(1)


@pytest.mark.parametrize(("what", "number"), [("apply", 1), ("apply", 3), ("undo", 2)])
def test_what_was_killed_is_restored_by_the_next_command(upstream, series, number, what):
    if what == "undo":
        apply_series(upstream.folder, series)
    before = upstream.state()
    assert (
        killed_at(number, {"apply": apply_series, "undo": undo}[what], upstream.folder, series) == 9
    )
    status_of(upstream.folder, series)
    assert upstream.state() == before
    assert not (upstream.folder / ".git/dinocell-upstream").exists()


def test_nothing_is_written_into_the_repository_by_looking(upstream, series):
    def contents():
        return {p: p.stat().st_size for p in (upstream.folder / ".git/objects").rglob("*")}

    index = (upstream.folder / ".git/index").read_bytes()
    before = contents()
    status_of(upstream.folder, series)
    with Scratch(upstream.folder) as scratch:
        merge_patch(scratch, scratch.commit("HEAD"), series.patches[0])
    assert contents() == before
    assert len((upstream.folder / ".git/index").read_bytes()) == len(index)
