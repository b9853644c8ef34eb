// See decode.cuh.
#include "decode.cuh"

FLOE_DECODE_ALL(sparse_decode_pages, floe::Source::Pages)
