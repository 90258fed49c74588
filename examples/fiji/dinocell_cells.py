#@ ImagePlus (label="Image") image
#@ String (label="Address of dinocell serve", value="http://127.0.0.1:8000") address
#@ String (label="Token, if the service asks for one", value="", required=false) token
#@ String (label="Channels, counted from 1, as 1,3", value="", required=false) channels

# Finds cells in the picture on the screen of Fiji with a running `dinocell serve`, and adds them to the ROI
# manager.  A selection limits it to the rectangle around it.  Without channels that of the screen is
# segmented; several are averaged.  This is Jython: Python 2.7 with the classes of Java.

import json
import traceback

from ij import IJ
from ij.io import RoiDecoder
from ij.plugin import Duplicator
from ij.plugin.frame import RoiManager
from java.io import BufferedInputStream, ByteArrayOutputStream, File
from java.lang import String, Throwable
from java.net import URL
from java.nio.file import Files
from java.util import UUID
from java.util.zip import ZipInputStream


def read_all(stream):
    """The bytes of a stream of Java."""
    found = ByteArrayOutputStream()
    byte = stream.read()
    while byte >= 0:
        found.write(byte)
        byte = stream.read()
    return found.toByteArray()


def post(address, token, picture, fields):
    """Post a file and fields, pairs of name and value, as a form; return the stream of the answer."""
    boundary = "dinocell" + str(UUID.randomUUID()).replace("-", "")
    connection = URL(address + "/api/v1/segment?format=roi").openConnection()
    connection.setRequestMethod("POST")
    connection.setDoOutput(True)
    connection.setConnectTimeout(5000)
    connection.setRequestProperty("Content-Type", "multipart/form-data; boundary=" + boundary)
    if token:
        connection.setRequestProperty("Authorization", "Bearer " + token)
    out = connection.getOutputStream()

    def write(text):
        out.write(String(text).getBytes("UTF-8"))

    for name, value in fields:
        write(
            '--%s\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
            % (boundary, name, value)
        )
    write(
        '--%s\r\nContent-Disposition: form-data; name="image"; filename="%s"\r\n'
        % (boundary, picture.getName())
    )
    write("Content-Type: image/tiff\r\n\r\n")
    Files.copy(picture.toPath(), out)
    write("\r\n--%s--\r\n" % boundary)
    out.close()
    if connection.getResponseCode() != 200:
        text = unicode(String(read_all(connection.getErrorStream()), "UTF-8"))
        try:
            text = json.loads(text)["detail"]
        except ValueError:  # a proxy has answered
            pass
        raise IOError(text)
    return BufferedInputStream(connection.getInputStream())


def cells_of(stream, left, top):
    """The ROIs of a zip, moved by the corner of what was sent."""
    archive = ZipInputStream(stream)
    found = []
    entry = archive.getNextEntry()
    while entry is not None:
        name = entry.getName()
        roi = RoiDecoder(read_all(archive), name).getRoi()
        bounds = roi.getBounds()
        roi.setLocation(bounds.x + left, bounds.y + top)
        roi.setName(name[:-4] if name.endswith(".roi") else name)
        found.append(roi)
        entry = archive.getNextEntry()
    return found


def find_cells(image, address, token, channels):
    """Send the plane on the screen; return its cells."""
    bounds = image.getRoi().getBounds() if image.getRoi() is not None else None
    z, t = image.getZ(), image.getT()
    plane = Duplicator().run(image, 1, image.getNChannels(), z, z, t, t)
    fields = []
    if image.getNChannels() > 1:
        chosen = [int(one) for one in channels.split(",") if one.strip()] or [image.getC()]
        fields = [("channels", str(one - 1)) for one in chosen]
    picture = File.createTempFile("dinocell", ".tif")
    try:
        IJ.saveAsTiff(plane, picture.getAbsolutePath())
        answer = post(address.rstrip("/"), token, picture, fields)
        return cells_of(answer, bounds.x if bounds else 0, bounds.y if bounds else 0)
    finally:
        picture.delete()


def main():
    try:
        cells = find_cells(image, address, token or "", channels or "")
    except (Exception, Throwable) as error:  # Jython does not count those of Java as the first
        IJ.log(traceback.format_exc())
        IJ.error("DINOCell", str(error) or repr(error))
        return
    manager = RoiManager.getInstance() or RoiManager()
    for cell in cells:
        manager.addRoi(cell)
    IJ.showStatus("%d cells" % len(cells))


if __name__ in ("__main__", "__builtin__"):  # the second in Fiji
    main()
