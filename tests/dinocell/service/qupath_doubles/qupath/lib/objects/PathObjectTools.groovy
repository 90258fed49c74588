package qupath.lib.objects

import java.awt.geom.AffineTransform
import java.awt.geom.Point2D
import qupath.lib.io.Found

class PathObjectTools {
    static transformObject(found, AffineTransform move, boolean copyMeasurements) {
        def to = move.transform(new Point2D.Double(found.ROI.centroidX, found.ROI.centroidY), null)
        new Found([ROI: [centroidX: to.x, centroidY: to.y], measurements: copyMeasurements ? found.measurements : [:]])
    }
}
