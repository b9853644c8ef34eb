// See tail.cuh.
#include "tail.cuh"

TAIL_ALL(__half, f16, 1)
