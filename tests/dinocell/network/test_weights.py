"""`dinocell weights`: conversion, description, fetching over a real connection that breaks."""

from __future__ import annotations

import hashlib
import http.server
import socket
import threading

import pytest
import torch

from dinocell.cli import main
from dinocell.errors import CheckpointError, DINOCellError, UsageError
from dinocell.network.backbone import DINOv3Backbone
from dinocell.network.model import bundled_models
from dinocell.network.weights import (
    RELEASED,
    convert_weights,
    describe_weights,
    fetch_weights,
    find_weights,
)
from dinocell.pretraining.run import _found
from dinocell.probing.inspection import load_backbone_of


def call(capsys, *arguments) -> tuple[int, str, str]:
    code = 0
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def backbone(tmp_path):
    path = tmp_path / "b16.pth"
    torch.manual_seed(0)
    torch.save(DINOv3Backbone("tiny", patch_size=16).vit.state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DINOCELL_WEIGHTS", str(tmp_path / "cache"))
    monkeypatch.delenv("DINOCELL_WEIGHTS_MIRROR", raising=False)
    monkeypatch.delenv("DINOCELL_OFFLINE", raising=False)


# --- convert and info ---


def test_convert_and_train_from_it(capsys, backbone, tmp_path):
    """patch 16 → 8, meta → hf → timm → dinocell → meta; each step is described."""
    steps = [
        ("hf", "folder"),
        ("timm", "t.safetensors"),
        ("dinocell", "d.safetensors"),
        ("meta", "m.pth"),
    ]
    source = backbone
    for number, (kind, name) in enumerate(steps):
        extra = ["--patch-size", "8"] if number == 0 else []
        target = tmp_path / name
        code, out, err = call(capsys, "weights", "convert", source, target, "--to", kind, *extra)
        assert code == 0, err
        assert f"({kind})" in out
        assert ("patch size 16 → 8 (nearest)" in out) == (number == 0)
        code, out, _ = call(capsys, "weights", "info", target)
        assert code == 0
        assert "ViT-Ti/8" in out
        source = target
    before = torch.load(backbone, weights_only=True)
    after = torch.load(source, weights_only=True)
    kernel = before["patch_embed.proj.weight"].unflatten(3, (8, 2)).unflatten(2, (8, 2)).sum((3, 5))
    torch.testing.assert_close(after["patch_embed.proj.weight"], kernel)
    assert torch.equal(after["blocks.3.attn.qkv.weight"], before["blocks.3.attn.qkv.weight"])


def test_format_follows_the_ending(backbone, tmp_path):
    assert "(dinocell)" in convert_weights(backbone, tmp_path / "x.safetensors")
    assert "(hf)" in convert_weights(backbone, tmp_path / "x")
    with pytest.raises(UsageError, match=r"must end in .pth or .safetensors"):
        convert_weights(backbone, tmp_path / "x.bin")


def test_options_change_the_result(backbone, tmp_path):
    kernels = {}
    for method in ("nearest", "bilinear", "bicubic"):
        path = tmp_path / f"{method}.pth"
        convert_weights(backbone, path, patch_size=8, patch_method=method)
        kernels[method] = torch.load(path, weights_only=True)["patch_embed.proj.weight"]
    assert not torch.allclose(kernels["nearest"], kernels["bilinear"])
    assert not torch.allclose(kernels["bilinear"], kernels["bicubic"])


def test_student_or_teacher(tmp_path):
    states = [DINOv3Backbone("tiny").vit.state_dict() for _ in range(2)]
    states[1]["cls_token"] = states[1]["cls_token"] + 1
    content = {
        name: {f"backbone.{k}": v for k, v in state.items()}
        for name, state in zip(("student", "teacher"), states, strict=True)
    }
    torch.save(content, tmp_path / "both.pth")
    for name, state in zip(("student", "teacher"), states, strict=True):
        convert_weights(tmp_path / "both.pth", tmp_path / f"{name}.pth", which=name)
        assert torch.equal(torch.load(tmp_path / f"{name}.pth")["cls_token"], state["cls_token"])


def test_a_model_gives_its_backbone(capsys, tmp_path):
    if not bundled_models():
        pytest.skip("no bundled model in this tree")
    from dinocell.network.model import _BUNDLED_FOLDER, load_model

    path = _BUNDLED_FOLDER / "dinocell-tiny.safetensors"
    assert "ViT-Ti/8" in describe_weights(path)
    convert_weights(path, tmp_path / "b.pth")
    state = torch.load(tmp_path / "b.pth", weights_only=True)
    expected = load_model("dinocell-tiny").backbone.vit.state_dict()
    assert torch.equal(state["blocks.5.mlp.fc1.weight"], expected["blocks.5.mlp.fc1.weight"])
    code, out, _ = call(capsys, "weights", "info", path)
    assert code == 0
    assert "thresholds" in out, "a whole model is described as one"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["weights", "convert", "none.pth", "o.pth"], 2, "must be a file or a folder"),
        (["weights", "convert", "IN", "IN"], 2, "OUT must not be IN"),
        (["weights", "convert", "IN", "o.pth", "--to", "onnx"], 2, "must be one of meta, hf"),
        (["weights", "convert", "IN", "o.pth", "--which", "aunt"], 2, "teacher or student"),
        (["weights", "convert", "IN", "o.pth", "--patch-size", "8", "--patch-method", "x"], 2,
         "method must be one of"),
        (["weights", "convert", "BAD", "o.pth"], 1, "a web page"),
        (["weights", "info", "BAD"], 1, "a web page"),
        (["weights", "fetch", "a/b"], 2, "NAME must be one of"),
        (["weights", "fetch", "mine.pth"], 2, "without --from"),
        (["weights", "fetch", "dinov3_vits16"], 2, "accept its licence"),
        (["weights", "fetch", "dinov3_vits16", "--from", "nowhere"], 2, "--from must hold"),
    ],
)  # fmt: skip
def test_wrong_calls(capsys, backbone, tmp_path, monkeypatch, arguments, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pth").write_bytes(b"<html>sign in</html>")
    places = {"IN": backbone, "BAD": tmp_path / "bad.pth"}
    found, _, err = call(capsys, *(places.get(a, a) for a in arguments))
    assert found == code
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "o.pth").exists()


def test_existing_output_is_kept(capsys, backbone, tmp_path):
    target = tmp_path / "o.pth"
    target.write_bytes(b"mine")
    code, _, err = call(capsys, "weights", "convert", backbone, target)
    assert (code, "--overwrite" in err) == (2, True)
    assert target.read_bytes() == b"mine"
    assert call(capsys, "weights", "convert", backbone, target, "--overwrite")[0] == 0


# --- fetch ---

CONTENT = bytes(range(256)) * 20_000


class Server(http.server.BaseHTTPRequestHandler):
    """Gives CONTENT, breaks off after `cut` bytes a request, and notes what was asked for."""

    content = CONTENT
    cut = len(CONTENT)
    ranges = True
    status = 0
    etag = ""
    asked: list[str | None]
    tokens: list[str | None]

    def do_GET(self):
        type(self).asked.append(self.headers.get("Range"))
        type(self).tokens.append(self.headers.get("Authorization"))
        if self.status:
            self.send_error(self.status)
            return
        begin = 0
        same = self.headers.get("If-Range", self.etag) == self.etag
        if self.ranges and same and self.headers.get("Range"):
            begin = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        if begin > len(self.content):
            self.send_error(416)
            return
        rest = self.content[begin:]
        self.send_response(206 if begin else 200)
        if self.etag:
            self.send_header("ETag", self.etag)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[: self.cut])
        self.wfile.flush()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("dinocell.network.weights.time.sleep", lambda _: None)

    class Own(Server):
        asked = []  # noqa: RUF012
        tokens = []  # noqa: RUF012

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Own)
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield Own, f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()
    thread.join()


SHA = hashlib.sha256(CONTENT).hexdigest()


def test_download_goes_on_after_breaks(server, tmp_path):
    handler, url = server
    handler.cut = 2_000_000
    path = fetch_weights("w.pth", source=url, sha256=SHA)
    assert path == tmp_path / "cache" / "w.pth"
    assert path.read_bytes() == CONTENT
    assert handler.asked == [None, "bytes=2000000-", "bytes=4000000-"]
    assert fetch_weights("w.pth", source=url, sha256=SHA) == path, "from the cache"
    assert len(handler.asked) == 3


def test_download_goes_on_in_another_call(server, tmp_path):
    handler, url = server
    handler.cut = 100_000
    with pytest.raises(DINOCellError, match="run the same command again"):
        fetch_weights("w.pth", source=url)
    part = tmp_path / "cache" / "w.pth.part"
    assert part.stat().st_size == 600_000
    handler.cut = len(CONTENT)
    assert fetch_weights("w.pth", source=url).read_bytes() == CONTENT
    assert handler.asked[-1] == "bytes=600000-"
    assert not part.exists()


def test_server_without_ranges_starts_anew(server):
    handler, url = server
    handler.cut, handler.ranges = 100_000, False
    with pytest.raises(DINOCellError):
        fetch_weights("w.pth", source=url)
    handler.cut = len(CONTENT)
    assert fetch_weights("w.pth", source=url).read_bytes() == CONTENT


@pytest.mark.parametrize("etag", ["", '"1"'])
@pytest.mark.parametrize("length", [300_000, len(CONTENT) + 5])
def test_another_file_at_the_source_is_not_joined_to_the_beginning(server, etag, length):
    """Told by its tag where the server gives one, else by its length."""
    handler, url = server
    handler.cut, handler.etag = 100_000, etag
    with pytest.raises(DINOCellError):
        fetch_weights("w.pth", source=url)
    other = bytes(255 - value % 256 for value in range(length))
    handler.content, handler.cut, handler.etag = other, length, etag.replace("1", "2")
    assert fetch_weights("w.pth", source=url).read_bytes() == other


@pytest.mark.parametrize("content", [b"<!DOCTYPE html><p>sign in", b""])
def test_a_page_in_place_of_a_file_is_refused(server, tmp_path, content):
    handler, url = server
    handler.content = content
    with pytest.raises(CheckpointError, match="must be a file of weights"):
        fetch_weights("w.pth", source=url)
    assert list((tmp_path / "cache").iterdir()) == []


def test_token_of_the_hub_goes_nowhere_else(server, monkeypatch, tmp_path):
    handler, url = server
    monkeypatch.setenv("HF_TOKEN", "secret")
    fetch_weights("w.pth", source=url)
    assert handler.tokens == [None]
    from dinocell.network import weights

    seen = []
    monkeypatch.setattr(
        weights.urllib.request.OpenerDirector,
        "open",
        lambda _self, request, **_: seen.append(dict(request.header_items())),
    )
    weights._open("https://huggingface.co/x/model.safetensors", tmp_path / "none.part")
    assert seen[0]["Authorization"] == "Bearer secret"


def test_a_name_stands_for_its_fetched_file(capsys, backbone, tmp_path):
    cached = tmp_path / "cache" / RELEASED["dinov3_vits16"]
    with pytest.raises(UsageError, match="must be fetched"):
        find_weights("dinov3_vits16")
    cached.parent.mkdir()
    cached.write_bytes(backbone.read_bytes())
    assert find_weights("dinov3_vits16") == cached
    assert find_weights(backbone) == backbone
    code, out, _ = call(capsys, "weights", "info", "dinov3_vits16")
    assert (code, "patch 16" in out) == (0, True)
    assert load_backbone_of("dinov3_vits16").facts["patch_size"] == 16
    assert _found("student.pretrained_weights=dinov3_vits16").endswith(str(cached))
    assert _found("student.patch_size=8") == "student.patch_size=8"


@pytest.mark.parametrize(
    ("status", "message"), [(403, "gated"), (404, "must exist"), (503, "interruption")]
)
def test_refusals(server, status, message):
    handler, url = server
    handler.status = status
    with pytest.raises(DINOCellError, match=message):
        fetch_weights("w.pth", source=url)
    assert len(handler.asked) == (6 if status == 503 else 1)


def test_wrong_checksum_is_not_kept(server, tmp_path):
    _, url = server
    with pytest.raises(CheckpointError, match="must have a SHA-256 that begins with 08c60483"):
        fetch_weights("dinov3_vits16", source=url)
    assert list((tmp_path / "cache").iterdir()) == []


def test_personal_url_of_a_released_file(server, tmp_path):
    """The e-mail's URL names the file itself and carries a signature."""
    handler, url = server
    file = RELEASED["dinov3_vits16"]
    fetch_weights("dinov3_vits16", source=f"{url}/{file}?Signature=a", sha256=SHA)
    assert (tmp_path / "cache" / file).is_file()
    assert handler.asked == [None]


def test_folder_and_mirror_variable(tmp_path, monkeypatch):
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    (mirror / "w.pth").write_bytes(CONTENT)
    assert fetch_weights("w.pth", source=str(mirror)).read_bytes() == CONTENT
    monkeypatch.setenv("DINOCELL_WEIGHTS_MIRROR", mirror.as_uri())
    out = fetch_weights("w.pth", out=tmp_path / "elsewhere")
    assert out == tmp_path / "elsewhere" / "w.pth"


@pytest.mark.parametrize("way", ["option", "variable"])
def test_offline_opens_no_connection(server, tmp_path, monkeypatch, way):
    _, url = server

    def refuse(*_, **__):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    if way == "variable":
        monkeypatch.setenv("DINOCELL_OFFLINE", "1")
    with pytest.raises(UsageError, match="when offline"):
        fetch_weights("w.pth", source=url, offline=way == "option")
    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache" / "w.pth").write_bytes(CONTENT)
    assert fetch_weights("w.pth", source=url, offline=way == "option").is_file()


def test_list_names_what_is_here(capsys, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / RELEASED["dinov3_vitb16"]).write_bytes(b"x")
    _, out, _ = call(capsys, "weights", "list")
    lines = {line.split()[0]: line for line in out.splitlines() if line}
    assert "not here" in lines["dinov3_vits16"]
    assert "not here" not in lines["dinov3_vitb16"]
