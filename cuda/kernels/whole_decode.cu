// See decode.cuh.
#include "decode.cuh"

FLOE_DECODE_ALL(whole_decode, floe::Source::Whole)
