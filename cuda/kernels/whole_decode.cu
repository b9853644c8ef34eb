#include "decode.cuh"

// Head sizes that keys are sketched for: without sketches nobody is in doubt.
FLOE_DECODE(whole_decode, __nv_bfloat16, bf16, 64, floe::Source::Whole)
FLOE_DECODE(whole_decode, __nv_bfloat16, bf16, 128, floe::Source::Whole)
FLOE_DECODE(whole_decode, __nv_bfloat16, bf16, 256, floe::Source::Whole)
FLOE_DECODE(whole_decode, __half, f16, 64, floe::Source::Whole)
FLOE_DECODE(whole_decode, __half, f16, 128, floe::Source::Whole)
FLOE_DECODE(whole_decode, __half, f16, 256, floe::Source::Whole)
