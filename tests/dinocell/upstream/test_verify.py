"""The suite on a tree, as a table and an exit code; and the commands around it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner
from upstream_doubles import CORE

from dinocell.cli.app import app, main
from dinocell.errors import UsageError
from dinocell.upstream import verify
from dinocell.upstream.verify import Check, Verification, verify_tree

ROOT = Path(__file__).resolve().parents[3]
BUNDLED = ROOT / "dinov3_modified"


FAULTS = [
    ("dinov3/loss/koleo_loss.py", "-torch.log(", "-torch.log1p("),
    ("dinov3/layers/rope_position_encoding.py", "math.pi", "3.0"),
    ("dinov3/cells/registry.py", '"JUMPS3MultiView"', '"JUMPS3Views"'),
    ("dinov3/configs/ssl_default_config.yaml", "koleo_topk: 1", "koleo_topk: 2"),
    ("dinov3/configs/ssl_default_config.yaml", "  drop_path_rate: 0.3\n", ""),
]


@pytest.mark.slow
def test_a_tree_that_differs_fails(tmp_path):
    """Five faults in one tree: each fails the check of its subject and no other."""
    tree = tmp_path / "tree"
    shutil.copytree(BUNDLED, tree, ignore=shutil.ignore_patterns("__pycache__"))
    for path, old, new in FAULTS:
        text = (tree / path).read_text()
        assert old in text
        (tree / path).write_text(text.replace(old, new))
    result = verify_tree(tree, keyword="losses or forward or strings or configuration or networks")
    assert not result.passed
    failed = {check.name: check.reason for check in result.checks if check.state == "failed"}
    assert failed.keys() == {
        "losses", "forward and gradients", "dataset strings", "configuration has the keys",
        "configuration defaults",
    }  # fmt: skip
    assert "koleo must agree" in failed["losses"]
    assert "must agree to" in failed["forward and gradients"]
    assert "keys that configs/ssl sets" in failed["configuration has the keys"]
    assert "defaults must be" in failed["configuration defaults"]
    assert "1 passed, 5 failed, 0 skipped" in result.text()
    assert "failed: numbers losses" in result.text()


def test_a_skipped_check_is_not_a_verification():
    """Otherwise `rebase`, which asks `passed`, would write a series that nobody tested."""
    checks = [Check("additions", "views", "passed"), Check("additions", "program", "skipped", "x")]
    result = Verification(BUNDLED, tuple(checks), "")
    assert not result.passed
    assert "not verified: 1 checks did not run" in result.text()
    assert Verification(BUNDLED, tuple(checks[:1]), "").passed


def test_wrong_calls(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="`tree` must be the root of a checkout"):
        verify_tree(tmp_path)
    with pytest.raises(UsageError, match="`keyword` must match a test of the suite"):
        verify_tree(BUNDLED, keyword="no_such_test")
    monkeypatch.setattr(verify, "_SUITE", tmp_path / "none")
    with pytest.raises(
        UsageError, match="needs a clone of DINOCell, because the conformance suite"
    ):
        verify_tree(BUNDLED)


# --- the commands ---


def run(*arguments: object) -> tuple[int, str]:
    """Exit code and everything that was printed."""
    runner = CliRunner()

    def command() -> None:
        main([str(argument) for argument in arguments])

    import typer

    shell = typer.Typer()
    shell.command()(command)
    done = runner.invoke(shell, [])
    return done.exit_code, done.output


def test_commands_from_status_to_undo(upstream, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("dinocell.upstream.series.default_series_folder", lambda: folder)
    where = ["--checkout", upstream.folder, "--series", folder]
    code, text = run("upstream", "status", *where)
    assert (code, "clean" in text) == (0, True)
    code, text = run("upstream", "apply", *where)
    assert code == 0
    assert f"DINOCELL_DINOV3={upstream.folder}" in text
    code, text = run("upstream", "status", *where)
    assert "the tree has all our additions" in text
    code, text = run("upstream", "refresh", *where)
    assert (code, "nothing, the series is the same" in text) == (0, True)
    code, text = run("upstream", "undo", *where)
    assert (code, "3 files are upstream's again" in text) == (0, True)
    code, text = run("upstream", "undo", *where)
    assert (code, "nothing of ours" in text) == (0, True)
    upstream.commit(
        "more", **{"dinov3/core.py": CORE.replace("import os\n", "import os\nimport re\n")}
    )
    code, text = run("upstream", "rebase", *where, "--onto", "main", "--dry-run")
    assert (code, "merged" in text) == (0, True)
    code, text = run("upstream", "rebase", *where, "--onto", "main", "--no-verify")
    assert (code, "written: UPSTREAM, loading.patch, loop.patch" in text) == (0, True)
    upstream.commit("edit", **{"dinov3/core.py": CORE.replace("total += step", "total -= step")})
    code, text = run("upstream", "rebase", *where, "--onto", "main")
    assert (code, "CONFLICT" in text) == (1, True)
    assert "upstream |" in text
    code, text = run("upstream", "status", *where)
    assert (code, "see docs/upstream.md for conflicts" in text) == (1, True)


def test_wrong_commands_are_one_sentence(upstream, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("dinocell.upstream.series.default_series_folder", lambda: folder)
    for arguments, message in (
        (["status", "--checkout", tmp_path / "none"], "--checkout must be a folder"),
        (["status", "--checkout", tmp_path], "must be a git checkout of DINOv3"),
        (["rebase", "--checkout", upstream.folder, "--onto", "x"], "must know the commit, got x"),
        (["verify", "--tree", tmp_path], "--tree must be the root of a checkout"),
    ):
        code, text = run("upstream", *arguments)
        assert code == 2, text
        assert message in text
        assert "Traceback" not in text
    upstream.write("README.md", "changed\n")
    code, text = run("upstream", "apply", "--checkout", upstream.folder)
    assert (code, "must have no changes" in text) == (2, True)


@pytest.mark.slow
def test_the_command_prints_the_table():
    code, text = run("upstream", "verify", "--tree", BUNDLED, "-k", "losses")
    assert (code, "1 passed, 0 failed, 0 skipped" in text) == (0, True)


def test_every_command_shows_an_example():
    for name in ("status", "apply", "undo", "rebase", "refresh", "verify"):
        done = CliRunner().invoke(app, ["upstream", name, "--help"])
        assert done.exit_code == 0
        assert "Example" in done.output
