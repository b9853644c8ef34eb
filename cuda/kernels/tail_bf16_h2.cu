// See tail.cuh.
#include "tail.cuh"

TAIL_ALL(__nv_bfloat16, bf16, 2)
