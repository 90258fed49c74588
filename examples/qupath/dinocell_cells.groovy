/*
 * Finds cells in the selected annotations of QuPath (0.4 or newer) with a running `dinocell serve`.
 *
 * Select one annotation or several and run this script: each is sent as a picture in full resolution, and
 * its cells, with their measurements, become objects below it.  Cells whose centre is outside of the
 * annotation are left out.  Cells of an earlier run are replaced.
 */

import static qupath.lib.gui.scripting.QPEx.*

import groovy.json.JsonSlurper
import java.awt.geom.AffineTransform
import java.nio.charset.StandardCharsets
import java.nio.file.Files
import qupath.lib.io.PathIO
import qupath.lib.objects.PathObjectTools
import qupath.lib.regions.RegionRequest

// --- what you may want to change ---
def address = System.getenv("DINOCELL_ADDRESS") ?: "http://127.0.0.1:8000"
def token = System.getenv("DINOCELL_TOKEN") ?: ""   // if the service asks for one
def fields = [:]   // such as [channels: ["DNA"], min_area_px: [30]]; docs/service.md lists them
// -----------------------------------

/** Posts a file and fields as a form; returns the bytes of the answer, or throws what the service says. */
def post(String address, String token, File image, Map fields) {
    def boundary = "dinocell" + UUID.randomUUID().toString().replace("-", "")
    def connection = new URL(address + "/api/v1/segment?format=geojson").openConnection()
    connection.requestMethod = "POST"
    connection.doOutput = true
    connection.connectTimeout = 5000
    connection.setRequestProperty("Content-Type", "multipart/form-data; boundary=" + boundary)
    if (token)
        connection.setRequestProperty("Authorization", "Bearer " + token)
    connection.outputStream.withStream { out ->
        def write = { String text -> out.write(text.getBytes(StandardCharsets.UTF_8)) }
        fields.each { name, values ->
            values.each { value ->
                write("--${boundary}\r\nContent-Disposition: form-data; name=\"${name}\"\r\n\r\n${value}\r\n")
            }
        }
        write("--${boundary}\r\nContent-Disposition: form-data; name=\"image\"; filename=\"${image.name}\"\r\n" +
            "Content-Type: image/tiff\r\n\r\n")
        Files.copy(image.toPath(), out)
        write("\r\n--${boundary}--\r\n")
    }
    if (connection.responseCode != 200) {
        def text = connection.errorStream?.getText("UTF-8") ?: ""
        def detail = text.startsWith("{") ? new JsonSlurper().parseText(text).detail : text
        throw new IOException("The service answers ${connection.responseCode}: ${detail}")
    }
    return connection.inputStream.bytes
}

def server = getCurrentServer()
def annotations = getSelectedObjects().findAll { it.isAnnotation() && it.getROI() != null && it.getROI().isArea() }
if (annotations.isEmpty())
    throw new IllegalStateException("One annotation or more must be selected, and none is: draw one around cells")
annotations.each { annotation ->
    def roi = annotation.getROI()
    def request = RegionRequest.createInstance(server.getPath(), 1.0, roi)
    def picture = File.createTempFile("dinocell", ".tif")
    def answer = File.createTempFile("dinocell", ".geojson")
    try {
        writeImageRegion(server, request, picture.getAbsolutePath())
        answer.bytes = post(address, token, picture, fields)
        def move = AffineTransform.getTranslateInstance(request.getX(), request.getY())
        def cells = PathIO.readObjects(answer.toPath())
            .collect { PathObjectTools.transformObject(it, move, true) }
            .findAll { roi.contains(it.getROI().getCentroidX(), it.getROI().getCentroidY()) }
        annotation.clearChildObjects()
        annotation.addChildObjects(cells)
        println "${cells.size()} cells in ${annotation}"
    } finally {
        picture.delete()
        answer.delete()
    }
}
fireHierarchyUpdate()
