package qupath.lib.regions

class RegionRequest {
    String path
    double downsample
    static createInstance(String path, double downsample, roi) { new RegionRequest(path: path, downsample: downsample) }
    int getX() { 100 }
    int getY() { 200 }
}
