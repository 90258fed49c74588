"""The suite on a tree, as a table and an exit code; and the commands around it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner
from upstream_doubles import CORE

from dinocell.cli.app import app, main
from dinocell.errors import UsageError
from dinocell.upstream.verify import verify_tree

ROOT = Path(__file__).resolve().parents[3]
BUNDLED = ROOT / "dinov3_modified"


@pytest.fixture
def changed(tmp_path):
    """A copy of the bundled tree in which one text was replaced."""

    def make(path: str, old: str, new: str) -> Path:
        tree = tmp_path / "tree"
        shutil.copytree(BUNDLED, tree, ignore=shutil.ignore_patterns("__pycache__"))
        text = (tree / path).read_text()
        assert old in text
        (tree / path).write_text(text.replace(old, new))
        return tree

    return make


@pytest.mark.parametrize(
    ("path", "old", "new", "keyword", "told"),
    [
        ("dinov3/loss/koleo_loss.py", "-torch.log(", "-torch.log1p(", "losses", "koleo must agree"),
        ("dinov3/layers/rope_position_encoding.py", "math.pi", "3.0", "forward", "must agree to"),
        ("dinov3/cells/registry.py", '"JUMPS3MultiView"', '"JUMPS3Views"', "strings", ""),
        ("dinov3/configs/ssl_default_config.yaml", "koleo_topk: 1", "koleo_topk: 2", "configuration", "defaults must be"),
        ("dinov3/configs/ssl_default_config.yaml", "  drop_path_rate: 0.3\n", "", "configuration", "keys that configs/ssl sets"),
    ],
)  # fmt: skip
def test_a_tree_that_differs_fails(changed, path, old, new, keyword, told):
    result = verify_tree(changed(path, old, new), keyword=keyword)
    assert not result.passed
    (failed,) = [check for check in result.checks if check.state == "failed"]
    assert told in failed.reason
    assert "1 failed" in result.text()
    assert f"failed: {failed.subject}" in result.text()


def test_the_bundled_tree_passes(capsys):
    result = verify_tree(BUNDLED, keyword="losses or networks")
    assert result.passed
    assert {check.state for check in result.checks} == {"passed"}
    assert "0 failed, 0 skipped" in result.text()
    with pytest.raises(SystemExit) as done:
        main(["upstream", "verify", "--tree", str(BUNDLED), "-k", "losses"])
    assert done.value.code == 0
    assert "1 passed, 0 failed" in capsys.readouterr().out


def test_wrong_calls(tmp_path):
    with pytest.raises(UsageError, match="--tree must be a folder that holds the package dinov3"):
        verify_tree(tmp_path)
    with pytest.raises(UsageError, match="must have tests to run, got none"):
        verify_tree(BUNDLED, keyword="no_such_test")


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
    for arguments, told in (
        (["status", "--checkout", tmp_path / "none"], "--checkout must be a folder"),
        (["status", "--checkout", tmp_path], "must be a git checkout of DINOv3"),
        (["rebase", "--checkout", upstream.folder, "--onto", "x"], "a commit must be known"),
        (["verify", "--tree", tmp_path], "--tree must be a folder"),
    ):
        code, text = run("upstream", *arguments)
        assert code == 2, text
        assert told in text
        assert "Traceback" not in text
    upstream.write("README.md", "changed\n")
    code, text = run("upstream", "apply", "--checkout", upstream.folder)
    assert (code, "must have no changes" in text) == (2, True)


def test_every_command_teaches():
    for name in ("status", "apply", "undo", "rebase", "refresh", "verify"):
        done = CliRunner().invoke(app, ["upstream", name, "--help"])
        assert done.exit_code == 0
        assert "Example" in done.output
