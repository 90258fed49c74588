package qupath.lib.gui.scripting

/** What the script needs of QuPath's functions; the test says which image there is. */
class QPEx {
    static annotation = new Annotation()

    static getCurrentServer() { [getPath: { -> "image" }] as Server }
    static getSelectedObjects() { System.getenv("NOTHING_SELECTED") ? [] : [annotation] }
    static void writeImageRegion(server, request, String path) {
        assert request.path == "image" && request.downsample == 1.0d
        new File(path).bytes = new File(System.getenv("PICTURE")).bytes
    }
    static void fireHierarchyUpdate() {
        annotation.children.each { println "cell ${it.ROI.centroidX} ${it.ROI.centroidY} ${it.measurements.area}" }
    }
}

interface Server { String getPath() }

class Annotation {
    def children = ["of an earlier run"]
    boolean isAnnotation() { true }
    def getROI() { new Region() }
    void clearChildObjects() { children = [] }
    void addChildObjects(cells) { children.addAll(cells) }
    String toString() { "Annotation" }
}

/** From (100, 200) on, everything right of x = 110. */
class Region {
    boolean isArea() { true }
    boolean contains(double x, double y) { x > 110 }
}
