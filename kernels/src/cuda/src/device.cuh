// What the kernels share: element types, 16-byte accesses, warp and block reductions. Everything that a host compiler
// cannot read is in ptx.cuh.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

#ifdef CONSILIUM_EMULATE
#include "emulate.h"
#else
#include "ptx.cuh"
#endif

constexpr u32 THREADS = 256;
constexpr u32 WARPS = THREADS / 32;
constexpr u32 ALL = 0xffffffffu;
constexpr u32 NONE = 0xffffffffu;
constexpr float LOWEST = -3.402823466e38f;
constexpr float LOG2_E = 1.44269504f;

struct Bf16 {
    u16 bits;
};

struct F16 {
    u16 bits;
};

__device__ inline float widen(float value) { return value; }
__device__ inline float widen(Bf16 value) { return __uint_as_float((u32)value.bits << 16); }
__device__ inline float widen(F16 value) { return f16_to_f32(value.bits); }

template <class T> __device__ T narrow(float value);
template <> __device__ inline float narrow<float>(float value) { return value; }
template <> __device__ inline Bf16 narrow<Bf16>(float value) { return Bf16{f32_to_bf16(value)}; }
template <> __device__ inline F16 narrow<F16>(float value) { return F16{f32_to_f16(value)}; }

// Eight consecutive elements as they lie in memory: one or two 16-byte words.
template <class T> struct Raw {
    static constexpr u32 WORDS = sizeof(T) * 8 / 16;
    static constexpr u32 PER_WORD = 16 / sizeof(T);
    Quad word[WORDS];
};

__device__ inline void unpack(const Raw<float> &raw, float (&x)[8]) {
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        x[4 * i] = __uint_as_float(raw.word[i].x);
        x[4 * i + 1] = __uint_as_float(raw.word[i].y);
        x[4 * i + 2] = __uint_as_float(raw.word[i].z);
        x[4 * i + 3] = __uint_as_float(raw.word[i].w);
    }
}

template <class T> __device__ inline void unpack_pair(u32 word, float &low, float &high) {
    low = widen(T{(u16)word});
    high = widen(T{(u16)(word >> 16)});
}

template <class T> __device__ inline void unpack(const Raw<T> &raw, float (&x)[8]) {
    unpack_pair<T>(raw.word[0].x, x[0], x[1]);
    unpack_pair<T>(raw.word[0].y, x[2], x[3]);
    unpack_pair<T>(raw.word[0].z, x[4], x[5]);
    unpack_pair<T>(raw.word[0].w, x[6], x[7]);
}

__device__ inline void store_vector(float *to, const float (&x)[8]) {
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        store16(to + 4 * i, Quad{__float_as_uint(x[4 * i]), __float_as_uint(x[4 * i + 1]),
                                 __float_as_uint(x[4 * i + 2]), __float_as_uint(x[4 * i + 3])});
    }
}

template <class T> __device__ u32 pack_pair(float low, float high);
template <> __device__ inline u32 pack_pair<Bf16>(float low, float high) { return f32_to_bf16_pair(low, high); }
template <> __device__ inline u32 pack_pair<F16>(float low, float high) { return f32_to_f16_pair(low, high); }

template <class T> __device__ inline void store_vector(T *to, const float (&x)[8]) {
    store16(to, Quad{pack_pair<T>(x[0], x[1]), pack_pair<T>(x[2], x[3]), pack_pair<T>(x[4], x[5]),
                     pack_pair<T>(x[6], x[7])});
}

// e^x for |x| <= 46 or a result that is as good as zero, as 2^(x log2 e). The product is rounded once (2^-24 of at most
// 66 where the result is between 1e-20 and 1e20) and ex2.approx is within 2^-22, so the relative error is below 3e-6
// there and below 6e-7 for results within 2^16 of one. A code is a step of 4.4 %: it can differ from the exact one only
// within 2e-5 steps of a rounding boundary.
__device__ inline float exp_near_zero(float x) { return exp2_approximate(x * LOG2_E); }

template <class T> __device__ inline T warp_sum(T value) {
#pragma unroll
    for (u32 d = 16; d > 0; d /= 2) value += __shfl_xor_sync(ALL, value, d);
    return value;
}

__device__ inline float warp_max(float value) {
#pragma unroll
    for (u32 d = 16; d > 0; d /= 2) value = fmaxf(value, __shfl_xor_sync(ALL, value, d));
    return value;
}

// Sum over the block in a fixed order; `scratch` holds WARPS values and is free again on return.
__device__ inline double block_sum(double value, double *scratch) {
    value = warp_sum(value);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    double sum = 0;
    for (u32 i = 0; i < WARPS; ++i) sum += scratch[i];
    __syncthreads();
    return sum;
}

__device__ inline float block_max(float value, double *scratch) {
    value = warp_max(value);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    float max = LOWEST;
    for (u32 i = 0; i < WARPS; ++i) max = fmaxf(max, (float)scratch[i]);
    __syncthreads();
    return max;
}
