// See decode.cuh.
#include "decode.cuh"

FLOE_DECODE_ALL(dense_decode, floe::Source::Range)
