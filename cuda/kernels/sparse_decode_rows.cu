// See decode.cuh.
#include "decode.cuh"

FLOE_DECODE_ALL(sparse_decode_rows, floe::Source::Rows)
