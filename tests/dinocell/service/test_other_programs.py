"""The scripts for QuPath and Fiji: what they send is recorded and sent to the service."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from email.parser import BytesParser
from pathlib import Path

import numpy as np
import pytest
from service_doubles import upload

from dinocell.io import read_label_file, read_labels

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[3]
SCRIPTS = {
    "qupath": ROOT / "examples" / "qupath" / "dinocell_cells.groovy",
    "fiji": ROOT / "examples" / "fiji" / "dinocell_cells.py",
}
IMAGEJ = Path("/usr/share/java/ij.jar")


def recorded(program: str) -> dict:
    """What the script of a program sends; `test_..._sends_what_is_recorded` writes it with RECORD=1."""
    return json.loads((HERE / "recorded" / f"{program}.json").read_text())


def described(method: str, target: str, headers: dict[str, str], body: bytes) -> dict:
    """A request without what differs from run to run: boundary, temporary name, pixels."""
    kind = headers["content-type"]
    message = BytesParser().parsebytes(b"Content-Type: " + kind.encode() + b"\r\n\r\n" + body)
    parts = []
    for part in message.get_payload():
        name = part.get_param("name", header="content-disposition")
        file = part.get_filename()
        about = {"name": name}
        if file is None:
            about["value"] = part.get_payload()
        else:
            about |= {"file": re.sub(r"dinocell\d+", "dinocell0", file)}
            about |= {"content_type": part.get_content_type()}
        parts.append(about)
    return {
        "method": method,
        "target": target,
        "content_type": kind.partition(";")[0],
        "authorization": headers.get("authorization", ""),
        "parts": parts,
    }


@pytest.mark.parametrize("program", SCRIPTS)
def test_the_service_understands_what_is_recorded(program, client, picture, tmp_path):
    sent = recorded(program)
    files = [
        (part["name"], (part["file"], picture.read_bytes(), part["content_type"]))
        for part in sent["parts"]
        if "file" in part
    ]
    data = {part["name"]: part["value"] for part in sent["parts"] if "value" in part}
    answer = client.request(
        sent["method"],
        sent["target"],
        files=files,
        data=data if "channels" not in data else {},  # the picture has one channel
        headers={"Authorization": sent["authorization"]},
    )
    assert answer.status_code == 200, answer.text
    path = tmp_path / ("answer.geojson" if program == "qupath" else "answer.zip")
    path.write_bytes(answer.content)
    labels = read_labels(picture.parents[1] / "labels" / f"{picture.stem}.png")
    found = read_label_file(path, shape=labels.shape).pixels
    expected = upload(client, picture).json()["num_cells"]
    assert len(np.unique(found)) - 1 == expected > 5


@pytest.mark.parametrize("program", SCRIPTS)
def test_what_is_recorded_stands_in_the_script(program):
    sent, text = recorded(program), SCRIPTS[program].read_text(encoding="utf-8")
    pieces = [sent["target"], f'"{sent["method"]}"', f"{sent['content_type']}; boundary="]
    pieces += [part["content_type"] for part in sent["parts"] if "file" in part]
    pieces += ['name="image"; filename=', '"Bearer " + token', '"dinocell"']
    text = text.replace('\\"', '"')  # quotes within a string
    for piece in pieces:
        assert piece in text, piece


@pytest.fixture
def requests_seen(client):
    """What the service of `client` receives."""
    seen, app = [], client.app

    async def listen(scope, receive, send):
        body = b""

        async def heard():
            nonlocal body
            message = await receive()
            body += message.get("body", b"")
            return message

        try:
            await app(scope, heard, send)
        finally:
            if scope["type"] == "http":
                headers = {k.decode().lower(): v.decode() for k, v in scope["headers"]}
                target = f"{scope['path']}?{scope['query_string'].decode()}"
                seen.append(described(scope["method"], target, headers, body))

    client.app = listen
    yield seen
    client.app = app


def run(*command, **environment) -> subprocess.CompletedProcess:
    java = {} if os.environ.get("JAVA_HOME") else {"JAVA_HOME": str(_java_home())}
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, **java, **environment},
        timeout=300,
    )


def _java_home() -> Path:
    return Path(os.path.realpath(shutil.which("java") or "/usr/bin/java")).parents[1]


def check_record(program: str, seen: dict) -> None:
    if os.environ.get("RECORD"):
        (HERE / "recorded" / f"{program}.json").write_text(json.dumps(seen, indent=1) + "\n")
    assert seen == recorded(program)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("groovy"), reason="groovy is not installed")
def test_the_script_for_qupath_sends_what_is_recorded(requests_seen, address, picture, client):
    """In Groovy, with doubles of QuPath's classes; apt-get install groovy."""
    ended = run(
        *("groovy", "-cp", str(HERE / "qupath_doubles"), str(SCRIPTS["qupath"])),
        PICTURE=str(picture),
        DINOCELL_ADDRESS=address,
        DINOCELL_TOKEN="a token",
    )
    assert ended.returncode == 0, ended.stderr
    check_record("qupath", requests_seen[0])
    cells = re.findall(r"^cell ([\d.]+) ([\d.]+) ([\d.]+)$", ended.stdout, flags=re.M)
    assert f"{len(cells)} cells in Annotation" in ended.stdout
    found = client.get(f"/api/v1/jobs/{client.get('/api/v1/jobs').json()[0]['id']}/cells").json()
    inside = [
        x for x in found["columns"]["centroid_col"] if x > 12
    ]  # of x > 110 in an image from 100 on
    assert len(inside) - 3 <= len(cells) < len(found["numbers"])
    assert all(float(x) > 110 and 200 <= float(y) <= 264 for x, y, _ in cells)
    assert {float(area) for *_, area in cells} <= set(map(float, found["columns"]["area"]))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("groovy"), reason="groovy is not installed")
def test_the_script_for_qupath_says_what_is_wrong(address, tmp_path, picture):
    (tmp_path / "text.tif").write_text("no image")
    script = ("groovy", "-cp", str(HERE / "qupath_doubles"), str(SCRIPTS["qupath"]))
    ended = run(*script, PICTURE=str(tmp_path / "text.tif"), DINOCELL_ADDRESS=address)
    assert "The service answers 422" in ended.stderr
    ended = run(*script, NOTHING_SELECTED="1", PICTURE="", DINOCELL_ADDRESS=address)
    assert "must be selected" in ended.stderr


_IN_JYTHON = """
import sys
sys.path.append({jar!r})
from ij import IJ
image = IJ.openImage({picture!r})
address, token, channels = {address!r}, "a token", ""
__name__ = "driver"
execfile({script!r})
whole = find_cells(image, address, token, channels)
image.setRoi(30, 20, 40, 40)
for roi in find_cells(image, address, token, "1"):
    print("part", roi.getName(), roi.getBounds().x, roi.getBounds().y)
for roi in whole:
    print("cell", roi.getName(), roi.getBounds().x, roi.getBounds().y)
from ij import ImageStack, ImagePlus, CompositeImage
stack = ImageStack(image.getWidth(), image.getHeight())
for _ in range(2):
    stack.addSlice(image.getProcessor().duplicate())
both = ImagePlus("both", stack)
both.setDimensions(2, 1, 1)
image.killRoi()
print("both", len(find_cells(both, address, token, "1,2")), len(whole))
try:
    find_cells(image, address + "/nowhere", token, "")
except IOError as error:
    print("error", error)
address = "http://127.0.0.1:9"
main()
print("ended")
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not (shutil.which("jython") and IMAGEJ.exists()), reason="jython or imagej is not installed"
)
def test_the_script_for_fiji_sends_what_is_recorded(requests_seen, address, picture, tmp_path):
    """In Jython with ImageJ, without a screen; apt-get install jython imagej."""
    values = {"jar": str(IMAGEJ), "picture": str(picture), "address": address}
    driver = tmp_path / "driver.py"
    driver.write_text(_IN_JYTHON.format(**values, script=str(SCRIPTS["fiji"])))
    ended = run("jython", str(driver), JAVA_TOOL_OPTIONS="-Djava.awt.headless=true")
    assert ended.returncode == 0, ended.stderr
    check_record("fiji", requests_seen[0])
    answer = ended.stdout
    found = re.findall(r"'cell', u?'(\d+)', (\d+), (\d+)", answer)
    assert len(found) > 5
    part = re.findall(r"'part', u?'(\d+)', (\d+), (\d+)", answer)
    assert part
    assert all(30 <= int(x) < 70 and 20 <= int(y) < 60 for _, x, y in part)
    both, whole = map(int, re.search(r"'both', (\d+), (\d+)", answer).groups())
    assert whole == len(found)
    assert abs(both - whole) < 0.1 * whole  # two equal channels, averaged
    assert [part["value"] for part in requests_seen[2]["parts"][:2]] == ["0", "1"]
    assert "'error'" in answer
    # Where nobody answers, ImageJ says so (an exception of Java), and the script ends.
    assert "Connection refused" in answer.split("'error'")[1]
    assert answer.rstrip().endswith("ended")
