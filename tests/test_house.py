"""Rules of the house: imports go one way, public names are exact, documents hold."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The rooms of `dinocell`, from the top floor down.  Each entry is a folder or a file; it imports from the
# entries below it and from nothing else.  `docs/architecture.md` prints the same order.
ROOMS = (
    "cli", "napari", "service", "demo", "doctor", "export", "model_zoo", "cluster", "upstream", "pretraining", "probing", "training", "evaluation", "batch",
    "pipeline", "results", "segmentation", "network", "datasets", "io", "download",
    "compilation", "tree", "settings", "pairs", "labels", "scratch", "files", "progress", "submitted", "errors",
)  # fmt: skip
# What stands below this room loads without torch; the ground loads without any heavy package.
LOWEST_WITH_TORCH = "network"
GROUND = (
    "tree",
    "settings",
    "pairs",
    "labels",
    "scratch",
    "files",
    "progress",
    "submitted",
    "errors",
)

MODULES = sorted((ROOT / "dinocell").rglob("*.py"))
TREE = ROOT / "dinov3_modified" / "dinov3"
OURS_IN_THE_TREE = sorted((TREE / "cells").rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 500, 80, 8
HEAVY = {
    "torch",
    "numba",
    "scipy",
    "skimage",
    "cv2",
    "PIL",
    "tifffile",
    "matplotlib",
    "safetensors",
}


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, at import time) of every import statement."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            inside |= set(ast.walk(node))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node not in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append((node.module, node not in inside))
    return found


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_name(path: Path, base: Path = ROOT) -> str:
    return ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "dinocell").with_suffix("").parts[0]


def test_every_room_stands_in_the_order():
    assert {room_of(path) for path in MODULES} - {"__init__", "__main__"} == set(ROOMS)
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [
        row for row in re.findall(r"^\| `([a-z_]+)(?:/|\.py)` \|", text, flags=re.M) if row in ROOMS
    ]
    assert rows == list(ROOMS)


def test_imports_go_down():
    wrong = []
    for path in MODULES:
        if room_of(path) in ("__init__", "__main__"):
            continue
        own = ROOMS.index(room_of(path))
        for module, when_loaded in imports(path):
            first, *rest = module.split(".")
            if first == "dinocell" and rest and rest[0] in ROOMS and ROOMS.index(rest[0]) < own:
                wrong.append(f"{named(path)} imports {module}")
            if when_loaded and first == "torch" and own > ROOMS.index(LOWEST_WITH_TORCH):
                wrong.append(f"{named(path)} loads torch")
            if when_loaded and first in HEAVY and ROOMS[own] in GROUND:
                wrong.append(f"{named(path)} loads {first}")
    assert wrong == []


@pytest.mark.parametrize("package", ["dinocell", "dinov3.cells"])
def test_imports_have_no_circle(package):
    """Imports at load time and inside functions together."""
    paths, base = (
        (MODULES, ROOT) if package == "dinocell" else (OURS_IN_THE_TREE, ROOT / "dinov3_modified")
    )
    names = {module_name(path, base): path for path in paths}
    needs = {name: imported_modules(path, set(names)) - {name} for name, path in names.items()}
    while needs:
        free = {name for name, needed in needs.items() if not needed & set(needs)}
        assert free, f"a circle is among {sorted(needs)}"
        needs = {name: needed for name, needed in needs.items() if name not in free}


def imported_modules(path: Path, known: set[str]) -> set[str]:
    """The modules of `known` that any import statement of the file names."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & known
            found |= inner or {node.module}
    return found & known


def test_files_functions_and_signatures_stay_short():
    """Signatures of upstream and of the original text, outside our folder, are given."""
    wrong = []
    for path in [*MODULES, *TREE.rglob("*.py")]:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            wrong.append(f"{named(path)} has {lines} lines")
        for function in ast.walk(parsed(path)):
            if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if path not in MODULES and path not in OURS_IN_THE_TREE:
                continue
            length = (function.end_lineno or 0) - function.lineno + 1
            if length > MAX_FUNCTION_LINES:
                wrong.append(f"{function.name} of {named(path)} has {length} lines")
            arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
            count = sum(argument.arg not in ("self", "cls") for argument in arguments)
            if count > MAX_PARAMETERS:
                wrong.append(f"{function.name} of {named(path)} takes {count} parameters")
    assert wrong == []


def test_numba_comes_from_compilation_py():
    """Its `njit` works where numba's own stops the program, because it finds no folder for its cache."""
    wrong = []
    for path in MODULES:
        if path != ROOT / "dinocell" / "compilation.py":
            wrong += [named(path) for module, _ in imports(path) if module.split(".")[0] == "numba"]
    assert wrong == []


def test_only_files_py_renames_files():
    """What is written gets its name there, after it was flushed to the disk.

    One exception: a process takes an abandoned claim by its rename, which succeeds for one process only.
    """
    homes = (ROOT / "dinocell" / "files.py", TREE / "cells" / "files.py")
    wrong = [
        named(path)
        for path in [*MODULES, *TREE.rglob("*.py")]
        if path not in homes
        for node in ast.walk(parsed(path))
        if _renames(node)
    ]
    assert set(wrong) == {"dinocell/batch/claims.py"}


def _renames(node: ast.AST) -> bool:
    """`os.replace` and kin under any use, `path.rename(...)`, and `replace` of one argument, as of paths."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        one = len(node.args) == 1 and not node.keywords
        if node.func.attr == "rename" or (node.func.attr == "replace" and one):
            return True
    return isinstance(node, ast.Attribute) and ast.unparse(node) in (
        "os.replace",
        "os.rename",
        "os.renames",
        "shutil.move",
    )


def test_the_search_for_renames_finds_methods():
    found = {
        text: any(map(_renames, ast.walk(ast.parse(text))))
        for text in (
            *(
                "os.replace(a, b)",
                "move = os.rename",
                "p.rename(q)",
                "p.replace(q)",
                "f(p).replace(q)",
            ),
            *("text.replace('a', 'b')", "signature.replace(parameters=p)", "replace(options, a=1)"),
        )
    }
    assert list(found.values()) == [True] * 5 + [False] * 3


def test_texts_below_the_command_line_name_no_option():
    """Sentences, not the arguments of programs that are called."""
    wrong = [
        f"{named(path)}: {text}"
        for path in MODULES
        if room_of(path) != "cli"
        for text in _texts(path)
        if re.search(r"\s", text.strip()) and re.search(r"(?:^|[\s`(])--[a-z]", text)
    ]
    assert wrong == []


def _texts(path: Path) -> Iterator[str]:
    """String constants of a file but its docstrings."""
    tree = parsed(path)
    documented = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            git = node.value.lstrip().startswith("diff --git")
            if id(node) not in documented and not git:
                yield node.value


MESSAGES = [*MODULES, *TREE.rglob("*.py")]
PRIVATE_WORDS = r"in work|in the hands of|wish(es)?|told|said|anew|mend(s|ed)?|looked for|goes on|is there|begins anew"
# Causes, which other messages quote in parentheses, and one sentence of Python itself.
CAUSES = {
    "some of its planes are in other files, which are missing",
    "its planes are in a file of another folder, …",
    "the 16-bit colour PNG cannot be decoded",
    "the end of the file is missing or a chunk is damaged",
    "its pixels should reach byte …, the file has …",
    "its tiles should have … pixels, more than the image",
    "no pixel in it",
    "this plane is missing in it",
    "it holds no image with rows and columns",
    "its pixels are of the kinds …",
    "it claims … channels",
    "its pages refer to each other in a circle",
    "the table of contents is no DCP metadata",
    "module 'dinocell' has no attribute …",
}


def messages(path: Path) -> list[str]:
    """First arguments of exceptions and of log lines, with … for every value in them."""
    found = []
    for node in ast.walk(parsed(path)):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        name = ast.unparse(node.func).rpartition(".")[2]
        logs = name in ("debug", "info", "warning", "error", "exception", "_note")
        notes = ast.unparse(node.func).endswith("notes.append")
        if not (logs or notes or re.search(r"(Error|Stopped|Lost|^_?require)$", name)):
            continue
        text = _text_of(node.args[-1 if name.endswith("require") else 0])
        if text and " " in text:
            found.append(text)
    return found


def _text_of(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text_of(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _text_of(node.left) + _text_of(node.right)
    return "…"


def test_messages_have_one_form():
    """A capital letter, a `name`, a 'file' or a value first; no full stop last."""
    wrong = [
        f"{named(path)}: {text}"
        for path in MESSAGES
        for text in messages(path)
        if (text[0].islower() and text not in CAUSES)
        or (text.endswith(".") and not text.endswith("..."))
    ]
    assert wrong == []


def test_texts_and_names_have_no_private_words():
    """Messages, documents, comments and the names of tests use the words of the field."""
    folders = [
        ROOT / name for name in ("dinocell", "dinov3_modified", "tests", "benchmarks", "patches")
    ]
    paths = [*folders, *(ROOT / name for name in ("docs", "configs", "slurm"))]
    files = [
        path for folder in paths for path in sorted(folder.rglob("*")) if path != Path(__file__)
    ]
    files += [*ROOT.glob("*.md"), *documents(), ROOT / "Makefile", ROOT / ".ci" / "run"]
    wrong = [
        f"{named(path)}:{number}: {line.strip()}"
        for path in files
        if path.suffix in ("", ".py", ".md", ".yaml", ".sh", ".j2", ".patch") and path.is_file()
        for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), start=1)
        if re.search(rf"\b({PRIVATE_WORDS})\b", line.replace("_", " "))
    ]
    assert wrong == []


@pytest.mark.parametrize("name", ["matching", "metrics", "ctc"])
def test_scores_need_numpy_and_scipy_only(name):
    allowed = {"numpy", "scipy", "dinocell", "__future__", *sys.stdlib_module_names}
    for module, _ in imports(ROOT / "dinocell" / "evaluation" / f"{name}.py"):
        assert module.split(".")[0] in allowed


def test_the_tree_never_imports_dinocell():
    for path in (ROOT / "dinov3_modified").rglob("*.py"):
        for module, _ in imports(path):
            assert not module.startswith("dinocell"), path


# Modules of upstream that the tree mirrors; all other files are ours and listed as such.
MIRRORED = """
checkpointer/__init__ checkpointer/checkpointer configs/__init__ configs/config data/__init__
data/adapters data/augmentations data/collate data/loaders data/masking data/meta_loaders data/samplers
data/transforms data/datasets/__init__ data/datasets/decoders data/datasets/extended
data/datasets/image_net distributed/__init__ distributed/torch_distributed_primitives
distributed/torch_distributed_wrapper fsdp/__init__ fsdp/ac_compile_parallelize hub/__init__
hub/backbones hub/utils layers/__init__ layers/attention layers/block layers/dino_head
layers/ffn_layers layers/layer_scale layers/patch_embed layers/rms_norm
layers/rope_position_encoding logging/__init__ logging/helpers loss/__init__ loss/dino_clstoken_loss
loss/gram_loss loss/ibot_patch_loss loss/koleo_loss models/__init__ models/vision_transformer
run/__init__ run/init run/submit train/__init__ train/cosine_lr_scheduler train/param_groups
train/ssl_meta_arch train/train utils/__init__ utils/cluster utils/custom_callable utils/utils
""".split()  # noqa: SIM905


# Ours, at the places that the original text names; everything else of ours stands in `cells/`.
OURS_OUTSIDE_CELLS = {
    "checkpointer/patch_size_adaptation",
    "data/augmentations_multiview",
    "data/datasets/jump_cellpainting",
    "data/datasets/jump_s3",
    "logging/wandb_logger",
}


def test_every_file_of_the_tree_is_mirrored_or_in_the_folder_of_ours():
    files = {p.relative_to(TREE).with_suffix("").as_posix() for p in TREE.rglob("*.py")}
    elsewhere = {name for name in files if not name.startswith("cells/")} - {"__init__"}
    assert elsewhere == set(MIRRORED) | OURS_OUTSIDE_CELLS
    listed = (ROOT / "patches" / "files").read_text(encoding="utf-8").split("\n")
    listed = {line for line in listed if line and not line.startswith("#")}
    assert listed == {"dinov3/cells/", *(f"dinov3/{name}.py" for name in OURS_OUTSIDE_CELLS)}


def test_all_is_exact():
    """A package lists what it offers; in a module, a name without an underscore is public."""
    wrong = []
    for path in MODULES:
        if path.name != "__init__.py":
            wrong += [f"{named(path)} has an __all__"] * ("\n__all__ =" in path.read_text("utf-8"))
            continue
        module = importlib.import_module(module_name(path))
        declared = getattr(module, "__all__", [])
        wrong += [f"{named(path)} repeats a name"] * (len(set(declared)) != len(declared))
        wrong += [f"{named(path)} lacks {name}" for name in declared if not hasattr(module, name)]
        public = {
            node.name
            for node in parsed(path).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
        }
        if room_of(path) != "cli":  # where a public function is a command
            wrong += [f"{named(path)} hides {name}" for name in public - set(declared)]
    assert wrong == []


def documents() -> list[Path]:
    found = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "dinov3_modified" / "README.md"]
    found.append(ROOT / "examples" / "browser" / "README.md")
    return found + sorted((ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("path", documents(), ids=named)
def test_links_and_named_files_exist(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), target
    for target in re.findall(r"`((?:benchmarks|configs|tests|docs|dinocell)/[\w./-]+\.\w+)`", text):
        assert (ROOT / target).exists(), target


OTHERS_OPTIONS = {
    *("--chan", "--chan2"),  # Cellpose
    *("--kill-on-bad-exit", "--config-file"),  # srun, python -m dinov3.train.train
    *("--network", "--parts", "--preset", "--seeds", "--start"),  # programs in benchmarks/
}


def options_of(command) -> set[str]:
    """The long options of a command and of those below it."""
    found = {name for one in command.params for name in (*one.opts, *one.secondary_opts)}
    return found.union(*map(options_of, getattr(command, "commands", {}).values()))


def test_options_that_pages_name_exist():
    """Those of `dinocell ...` and `--...` between backticks, of any command."""
    from typer.main import get_command

    from dinocell.cli.app import app

    known = options_of(get_command(app)) | OTHERS_OPTIONS | {"--help"}
    wrong = []
    for path in documents():
        if path.name == "CHANGELOG.md" or "decisions" in path.parts:
            continue
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        spans = re.findall(r"`((?:dinocell |--)[^`]+)`", text)
        named = [name for span in spans for name in re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", span)]
        wrong += [f"{path.name}: {name}" for name in named if name not in known]
    assert wrong == []


def test_documents_are_wrapped():
    """At 100 columns, but for tables and code, which a line break would change."""
    wrong = []
    for path in [*documents(), ROOT / "patches" / "README.md"]:
        in_code = False
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            in_code ^= line.lstrip().startswith("```")
            if len(line) > 100 and not in_code and not line.lstrip().startswith("|"):
                wrong.append(f"{named(path)}:{number}")
    assert wrong == []


def test_pictures_come_from_one_script_and_are_shown():
    made = re.findall(
        r'^    "(\S+\.(?:png|jpg))":', (ROOT / "benchmarks/pictures.py").read_text(), flags=re.M
    )
    models = ROOT / "dinocell" / "models"
    kept = [*(ROOT / "docs" / "images").iterdir(), *models.glob("*.jpg")]
    assert sorted(made) == sorted(path.name for path in kept)
    text = "\n".join(path.read_text(encoding="utf-8") for path in documents())
    cards = "\n".join(path.read_text(encoding="utf-8") for path in models.glob("*.md"))
    shown = re.findall(r"\((?:\S*images/)?([\w.-]+\.(?:png|jpg))\)", text + cards)
    assert [name for name in made if name not in shown] == []


def test_the_site_lists_every_page():
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    listed = {
        name for name in re.findall(r"(\S+\.md)$", nav, flags=re.M) if "repository/" not in name
    }
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert listed == pages


def test_readme_commands_are_known():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    from typer.main import get_command

    from dinocell.cli.app import app

    known = set(get_command(app).commands)
    commands = set(re.findall(r"^dinocell ([a-z]+)", text, flags=re.M))
    assert commands
    assert commands <= known
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert set(re.findall(r"^make ([a-z]+)", text, flags=re.M)) <= targets


def test_readme_python_runs(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    from dinocell.demo import sample_paths

    image = next(path for path, _ in sample_paths() if path.stem == "nuclei_16bit")
    (tmp_path / "image.tif").write_bytes(image.read_bytes())
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert list((tmp_path / "results").glob("*_labels.tif"))


def test_test_files_have_names_of_their_own():
    """pytest imports them by their names alone."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)


def test_no_text_installs_the_other_dinocell():
    """A package index has another project of that name, and none named dinocell-segmentation."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    texts = [ROOT / name for name in listed.splitlines()] or [*MODULES, *documents()]
    pattern = re.compile(
        r"pip install \S*\bdinocell(?![/\w])|\bdinocell(-segmentation)?\[[a-z0-9]+\]"
    )
    wrong = [
        named(path)
        for path in texts
        if path.suffix in (".py", ".md", ".yaml", ".sh", ".toml") and path != Path(__file__)
        if path.is_file() and pattern.search(path.read_text(encoding="utf-8"))
    ]
    assert wrong == []


def test_micrometres_have_one_spelling():
    """The micro sign (U+00B5), not the Greek letter that looks the same."""
    sources = [path for path in (ROOT / "dinocell").rglob("*") if path.suffix in (".py", ".j2")]
    texts = [*sources, *TREE.rglob("*.py"), *documents()]
    assert [named(path) for path in texts if "\u03bc" in path.read_text("utf-8")] == []


def test_constraints_pin_what_setup_asks_for():
    pinned = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    asked = {
        name.lower().replace("_", "-")
        for name in re.findall(r'"([A-Za-z][\w.-]*)>=', (ROOT / "setup.py").read_text())
    }
    assert len(asked) > 20
    assert asked - pinned == set()


def test_the_versions_of_napari_that_are_tested_are_those_that_are_named():
    (tested,) = re.findall(r"^NAPARI \?= (.+)$", (ROOT / "Makefile").read_text(), flags=re.M)
    (least,) = re.findall(r'"napari>=([\d.]+)"', (ROOT / "setup.py").read_text())
    assert tested.split()[0].startswith(least)
    page = (ROOT / "docs" / "napari.md").read_text(encoding="utf-8")
    assert f"is tested with napari {' and '.join(tested.split())} " in page
