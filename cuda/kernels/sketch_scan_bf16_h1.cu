// See sketch_scan.cuh.
#include "sketch_scan.cuh"

SKETCH_SCAN_ALL(__nv_bfloat16, bf16, 1)
