// See decode.cuh.
#include "decode.cuh"

FLOE_DECODE_ALL(fetch_attend, floe::Source::Fetch)
