// See sketch_scan.cuh.
#include "sketch_scan.cuh"

SKETCH_SCAN_ALL(__half, f16, 1)
