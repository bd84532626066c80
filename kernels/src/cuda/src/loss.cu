// Losses whose classes are segments.
#include "loss.cuh"

#define LOSS(name, In, Out)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, 4) name(Loss job) { loss_rows<In, Out, false>(job); }

LOSS(loss_f32, float, float)
LOSS(loss_bf16, Bf16, Bf16)
LOSS(loss_f16, F16, F16)
LOSS(loss_f32_to_bf16, float, Bf16)
LOSS(loss_f32_to_f16, float, F16)
