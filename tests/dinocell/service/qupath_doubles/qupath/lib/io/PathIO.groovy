package qupath.lib.io

import groovy.json.JsonSlurper
import java.nio.file.Path

class PathIO {
    static List readObjects(Path path) {
        assert path.toString().endsWith(".geojson")
        new JsonSlurper().parseText(path.toFile().text).features.collect { feature ->
            def ring = feature.geometry.type == "Polygon" ? feature.geometry.coordinates[0] : feature.geometry.coordinates[0][0]
            [ROI: [centroidX: ring.sum { it[0] } / ring.size(), centroidY: ring.sum { it[1] } / ring.size()],
             measurements: feature.properties.measurements]
        }.collect { new Found(it) }
    }
}

class Found {
    def values
    Found(values) { this.values = values }
    def getROI() { values.ROI as Place }
    def getMeasurements() { values.measurements }
}

class Place {
    double centroidX, centroidY
}
