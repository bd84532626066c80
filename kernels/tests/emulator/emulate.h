// Lets a host compiler read the CUDA sources: every thread of a block is a fiber, blocks run one after the other, and
// each warp or block collective waits for its last participant. A collective that not all reach is reported.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define __device__
#define __global__
#define __shared__ thread_local
#define DYNAMIC_SHARED(name) u8 *name = emulator::dynamic_memory()
#define __launch_bounds__(...)

struct Dim3 {
    unsigned x, y, z;
};
extern thread_local Dim3 threadIdx, blockIdx, blockDim, gridDim;

struct float2 {
    float x, y;
};

struct alignas(16) Quad {
    u32 x, y, z, w;
};

namespace emulator {
void wait_for_warp();
void wait_for_block();
void yield();
u8 *dynamic_memory();
// Room for what the lanes of a warp show each other.
unsigned char *exchange(u32 lane);

template <class T> T from_lane(T value, u32 lane) {
    std::memcpy(exchange(threadIdx.x % 32), &value, sizeof value);
    wait_for_warp();
    std::memcpy(&value, exchange(lane), sizeof value);
    wait_for_warp();
    return value;
}

inline void check(bool holds, const char *what) {
    if (!holds) {
        std::fprintf(stderr, "emulator: %s, block (%u, %u) thread %u\n", what, blockIdx.x, blockIdx.y, threadIdx.x);
        std::abort();
    }
}

inline void check_aligned(const void *p) { check((uintptr_t)p % 16 == 0, "access of 16 bytes is not aligned"); }
} // namespace emulator

template <class T> T __shfl_sync(u32, T value, u32 lane) { return emulator::from_lane(value, lane); }
template <class T> T __shfl_xor_sync(u32, T value, u32 d) { return emulator::from_lane(value, (threadIdx.x % 32) ^ d); }
template <class T> T __shfl_up_sync(u32, T value, u32 d) {
    u32 lane = threadIdx.x % 32;
    return emulator::from_lane(value, lane >= d ? lane - d : lane);
}
inline u32 __ballot_sync(u32, bool vote) {
    u32 bits = vote ? 1u << (threadIdx.x % 32) : 0;
    for (u32 d = 16; d > 0; d /= 2) bits |= __shfl_xor_sync(0u, bits, d);
    return bits;
}
inline bool __any_sync(u32, bool vote) { return __ballot_sync(0u, vote) != 0; }
inline void __syncthreads() { emulator::wait_for_block(); }
inline int __syncthreads_or(int vote) {
    static thread_local int any;
    emulator::wait_for_block();
    if (threadIdx.x == 0) any = 0;
    emulator::wait_for_block();
    any |= vote;
    emulator::wait_for_block();
    return any;
}
inline void __syncwarp() { emulator::wait_for_warp(); }
inline void __threadfence() {}
inline u32 __popc(u32 x) { return (u32)__builtin_popcount(x); }
inline u32 __clz(u32 x) { return x ? (u32)__builtin_clz(x) : 32; }
inline u32 __clzll(u64 x) { return x ? (u32)__builtin_clzll(x) : 64; }
inline float __uint_as_float(u32 x) {
    float y;
    std::memcpy(&y, &x, 4);
    return y;
}
inline u32 __float_as_uint(float x) {
    u32 y;
    std::memcpy(&y, &x, 4);
    return y;
}
inline u32 atomicAdd(u32 *at, u32 value) {
    u32 old = *at;
    *at += value;
    return old;
}
inline void atomicOr(u32 *at, u32 value) { *at |= value; }
inline void atomicMin(u64 *at, u64 value) { *at = std::min(*at, value); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
using std::min;

inline Quad load16(const void *from) {
    emulator::check_aligned(from);
    return *(const Quad *)from;
}
inline void store16(void *to, Quad q) {
    emulator::check_aligned(to);
    *(Quad *)to = q;
}
inline float2 load_shared_result(const float2 *from) { return *from; }
inline Quad load_shared_result(const void *from) { return load16(from); }
inline u32 load_acquire(const u32 *from) { return *from; }
inline void store_release(u32 *to, u32 value) { *to = value; }
inline void pause() { emulator::yield(); }
inline float exp2_approximate(float x) { return std::exp2(x); }
inline float f16_to_f32(u16 bits) { return _cvtsh_ss(bits); }
inline u16 f32_to_f16(float value) { return _cvtss_sh(value, 0); }
inline u16 f32_to_bf16(float value) {
    u32 bits = __float_as_uint(value);
    return (u16)(value != value ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline u32 f32_to_f16_pair(float low, float high) { return f32_to_f16(low) | (u32)f32_to_f16(high) << 16; }
inline u32 f32_to_bf16_pair(float low, float high) { return f32_to_bf16(low) | (u32)f32_to_bf16(high) << 16; }

inline void copy_async(void *to, const void *from, bool real) {
    emulator::check_aligned(to);
    emulator::check_aligned(from);
    if (real) std::memcpy(to, from, 16);
    else std::memset(to, 0, 16);
}
inline void copy_commit() {}
template <int PENDING> void copy_wait() {}

inline void load_matrices(u32 (&r)[4], const void *row) {
    emulator::check_aligned(row);
    u32 lane = threadIdx.x % 32;
    for (u32 i = 0; i < 4; ++i)
        std::memcpy(&r[i], (const u8 *)emulator::from_lane(row, i * 8 + lane / 4) + lane % 4 * 4, 4);
}
inline void load_matrices_transposed(u32 (&r)[4], const void *row) {
    emulator::check_aligned(row);
    u32 lane = threadIdx.x % 32;
    for (u32 i = 0; i < 4; ++i) {
        const u16 *low = (const u16 *)emulator::from_lane(row, i * 8 + lane % 4 * 2);
        const u16 *high = (const u16 *)emulator::from_lane(row, i * 8 + lane % 4 * 2 + 1);
        r[i] = (u32)low[lane / 4] | (u32)high[lane / 4] << 16;
    }
}

struct Bf16;
struct F16;
template <class T> float widen_bits(u16 bits);
template <> inline float widen_bits<Bf16>(u16 bits) { return __uint_as_float((u32)bits << 16); }
template <> inline float widen_bits<F16>(u16 bits) { return f16_to_f32(bits); }

template <class T> void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    struct Operands {
        u32 a[4], b[2];
    };
    Operands own = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
    u32 lane = threadIdx.x % 32;
    std::memcpy(emulator::exchange(lane), &own, sizeof own);
    emulator::wait_for_warp();
    auto half = [](u32 word, u32 k) { return widen_bits<T>((u16)(word >> 16 * (k % 2))); };
    for (u32 e = 0; e < 4; ++e) {
        u32 row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
        for (u32 k = 0; k < 16; ++k) {
            const Operands &left = *(const Operands *)emulator::exchange(row % 8 * 4 + k % 8 / 2);
            const Operands &right = *(const Operands *)emulator::exchange(column * 4 + k % 8 / 2);
            c[e] += half(left.a[row / 8 + k / 8 * 2], k) * half(right.b[k / 8], k);
        }
    }
    emulator::wait_for_warp();
}

namespace emulator {
using Kernel = void (*)(void **arguments);

template <class... A, size_t... I>
void call(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) {
    kernel(*(A *)arguments[I]...);
}
template <auto KERNEL> struct Unpack;
template <class... A, void (*KERNEL)(A...)> struct Unpack<KERNEL> {
    static void run(void **arguments) { call(KERNEL, arguments, std::index_sequence_for<A...>()); }
};

struct Registered {
    Registered(const char *name, Kernel kernel);
};
} // namespace emulator
