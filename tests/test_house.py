"""Rules of the house: imports go one way, public names are exact, documents hold."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Room of every module; a module imports from its own room and those with a smaller number.
ROOMS = {
    "errors": 0, "config": 0, "progress": 0,
    "image_io": 1, "preprocess": 1, "tiles": 1, "distance_map": 1, "watershed": 1, "measure": 1,
    "exports": 1, "visualize": 1, "report": 1, "scenes": 1, "journal": 1,
    "backbone": 2, "decoder": 2, "model": 2, "inference": 2, "flops": 2, "model_info": 2, "weights": 2,
    "pipeline": 3, "batch": 3, "demo": 3, "evaluation": 3, "training": 3, "inspection": 3, "jump": 3,
    "upstream": 3, "cluster": 3,
    "cli": 4,
}  # fmt: skip
MODULES = sorted((ROOT / "dinocell").rglob("*.py"))
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


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_one_way(path):
    parts = path.relative_to(ROOT / "dinocell").with_suffix("").parts
    if parts == ("__init__",):
        return
    own = ROOMS[parts[0]]
    for module, _ in imports(path):
        assert not module.startswith("dinov3") or parts[0] == "backbone", "one door to dinov3"
        if module.startswith("dinocell."):
            assert ROOMS[module.split(".")[1]] <= own, f"{path.name} imports {module}"
        if own == 0:
            assert module.split(".")[0] not in HEAVY
        if own < 2:
            assert module.split(".")[0] != "torch"


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


def test_every_file_of_the_tree_is_mirrored_or_listed_as_ours():
    tree = ROOT / "dinov3_modified" / "dinov3"
    files = {p.relative_to(tree).with_suffix("").as_posix() for p in tree.rglob("*.py")} - {
        "__init__"
    }
    text = (ROOT / "dinov3_modified" / "README.md").read_text(encoding="utf-8")
    table = text[text.index("New files of ours") :]
    ours = {name.removesuffix(".py") for name in re.findall(r"`dinov3/([\w/]+\.py)`", table)}
    ours -= {"models/vision_transformer"}
    assert files == set(MIRRORED) | ours


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_all_is_exact(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    module = importlib.import_module(name)
    declared = getattr(module, "__all__", [])
    assert len(set(declared)) == len(declared)
    assert all(hasattr(module, item) for item in declared)
    if path.name != "__init__.py":
        public = {
            node.name
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
        }
        commands = {"demo", "segment", "train", "pretrain", "evaluate", "inspect"}
        commands |= {"weights_list", "weights_info", "weights_fetch", "weights_convert"}
        commands |= {"jump_index", "jump_stats", "jump_verify", "jump_pack", "jump_plan"}
        commands |= {"jump_masks"}
        commands |= {"upstream_status", "upstream_apply", "upstream_undo", "upstream_rebase"}
        commands |= {"upstream_refresh", "upstream_verify"}
        commands |= {"submit", "jobs", "supervise"}
        commands |= {"shards_plan", "shards_run", "shards_status", "shards_merge"}
        assert public - set(declared) - (commands if path.name == "cli.py" else set()) == set()


def documents() -> list[Path]:
    found = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "dinov3_modified" / "README.md"]
    return found + sorted((ROOT / "docs").rglob("*.md"))


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_named_files_exist(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), target
    for named in re.findall(r"`((?:benchmarks|configs|tests|docs|dinocell)/[\w./-]+\.\w+)`", text):
        assert (ROOT / named).exists(), named


def test_readme_commands_are_known():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    from typer.main import get_command

    from dinocell.cli.app import app

    known = set(get_command(app).commands)
    named = set(re.findall(r"^dinocell ([a-z]+)", text, flags=re.M))
    assert named
    assert named <= known
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert set(re.findall(r"^make ([a-z]+)", text, flags=re.M)) <= targets


def test_readme_python_runs(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    from dinocell.scenes import sample_paths

    image = next(path for path, _ in sample_paths() if path.stem == "nuclei")
    (tmp_path / "image.tif").write_bytes(image.read_bytes())
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert list((tmp_path / "results").glob("*_labels.tif"))


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
