// C = alpha A B, or C += alpha A B, with f32 accumulation: what the fused head uses where cuBLAS is absent.
//
// 16-bit elements: tiles of 128 x 256 by 8 warps of 64 x 64 each with mma.m16n8k16, fed by a ring of 4 stages of 32 along
// the summed index (cp.async). f32: tiles of 64 x 64 with plain multiply-adds. Rows must be 16-byte aligned; sizes are
// free, as long as memory reaches to the next multiple of 8 in the contiguous direction.
#include "device.cuh"

struct Gemm {
    const void *a; // [m, k], or [k, m] where transposed
    const void *b; // [n, k], or [k, n] where transposed
    float *c;      // [m, n]
    u64 a_stride, b_stride, c_stride;
    u32 m, n, k;
    float alpha;
    u32 add;
    u32 padding;
};

constexpr u32 TILE_M = 128, TILE_N = 256, TILE_K = 32, STAGES = 4;
constexpr u32 STAGE_BYTES = (TILE_M + TILE_N) * TILE_K * 2;

// A tile of `Rows` rows along m or n and TILE_K along k. Stored as it lies in memory, in chunks of 16 bytes, which are
// swizzled so that the eight rows of an ldmatrix fall into different banks.
template <u32 Rows, bool Transposed> struct Tile {
    static constexpr u32 CHUNKS = Transposed ? Rows / 8 : TILE_K / 8; // per line
    static constexpr u32 LINES = Transposed ? TILE_K : Rows;

    __device__ static u32 offset(u32 line, u32 chunk) {
        u32 swizzled = Transposed ? chunk ^ (line & 7) : chunk ^ (line >> 1 & 3);
        return (line * CHUNKS + swizzled) * 16;
    }

    // Starts copying; what lies outside of rows x k is zero.
    __device__ static void load(u8 *tile, const u16 *from, u64 stride, u32 row, u32 rows, u32 k, u32 ks) {
#pragma unroll
        for (u32 i = 0; i < LINES * CHUNKS / THREADS; ++i) {
            u32 index = threadIdx.x + i * THREADS, line = index / CHUNKS, chunk = index % CHUNKS;
            u32 outer = (Transposed ? k : row) + line, inner = (Transposed ? row : k) + chunk * 8;
            bool real = outer < (Transposed ? ks : rows) && inner < (Transposed ? rows : ks);
            const u16 *source = real ? from + outer * stride + inner : from;
            copy_async(tile + offset(line, chunk), source, real);
        }
    }

    // The four 8x8 matrices of rows row..row+16 and k..k+16: (low rows, low k), (high rows, low k), (low, high), (high,
    // high).
    __device__ static void fragment(u32 (&r)[4], const u8 *tile, u32 row, u32 k) {
        u32 lane = threadIdx.x % 32, high_row = lane >> 3 & 1, high_k = lane >> 4;
        if (Transposed) load_matrices_transposed(r, tile + offset(k + high_k * 8 + lane % 8, row / 8 + high_row));
        else load_matrices(r, tile + offset(row + high_row * 8 + lane % 8, k / 8 + high_k));
    }
};

template <class T, bool TransposedA, bool TransposedB> __device__ void gemm(const Gemm &job) {
    DYNAMIC_SHARED(memory);
    using TileA = Tile<TILE_M, TransposedA>;
    using TileB = Tile<TILE_N, TransposedB>;
    const u16 *a = (const u16 *)job.a, *b = (const u16 *)job.b;
    u32 row = blockIdx.x * TILE_M, column = blockIdx.y * TILE_N;
    u32 warp_row = threadIdx.x / 32 / 4 * 64, warp_column = threadIdx.x / 32 % 4 * 64, lane = threadIdx.x % 32;
    u32 steps = (job.k + TILE_K - 1) / TILE_K;
    auto load = [&](u32 step) {
        if (step < steps) {
            u8 *stage = memory + step % STAGES * STAGE_BYTES;
            TileA::load(stage, a, job.a_stride, row, job.m, step * TILE_K, job.k);
            TileB::load(stage + TILE_M * TILE_K * 2, b, job.b_stride, column, job.n, step * TILE_K, job.k);
        }
        copy_commit();
    };
    float c[4][8][4];
#pragma unroll
    for (u32 i = 0; i < 4; ++i)
#pragma unroll
        for (u32 j = 0; j < 8; ++j)
#pragma unroll
            for (u32 e = 0; e < 4; ++e) c[i][j][e] = 0;
    for (u32 step = 0; step + 1 < STAGES; ++step) load(step);
    copy_wait<STAGES - 2>();
    __syncthreads();
    // Fragments of the next 16 along k are under way while the current ones are multiplied.
    u32 fa[2][4][4], fb[2][4][4];
    auto fetch = [&](u32 to, u32 step, u32 k) {
        const u8 *tile_a = memory + step % STAGES * STAGE_BYTES, *tile_b = tile_a + TILE_M * TILE_K * 2;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) TileA::fragment(fa[to][i], tile_a, warp_row + i * 16, k);
#pragma unroll
        for (u32 j = 0; j < 4; ++j) TileB::fragment(fb[to][j], tile_b, warp_column + j * 16, k);
    };
    auto multiply = [&](u32 from) {
#pragma unroll
        for (u32 j = 0; j < 4; ++j)
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                multiply_add<T>(c[i][2 * j], fa[from][i], fb[from][j][0], fb[from][j][2]);
                multiply_add<T>(c[i][2 * j + 1], fa[from][i], fb[from][j][1], fb[from][j][3]);
            }
    };
    fetch(0, 0, 0);
    for (u32 step = 0; step < steps; ++step) {
        load(step + STAGES - 1);
        fetch(1, step, 16);
        multiply(0);
        copy_wait<STAGES - 2>();
        __syncthreads();
        fetch(0, step + 1, 0);
        multiply(1);
    }
#pragma unroll
    for (u32 i = 0; i < 4; ++i)
#pragma unroll
        for (u32 j = 0; j < 8; ++j)
#pragma unroll
            for (u32 e = 0; e < 4; ++e) {
                u32 r = row + warp_row + i * 16 + lane / 4 + e / 2 * 8;
                u32 n = column + warp_column + j * 8 + lane % 4 * 2 + e % 2;
                if (r < job.m && n < job.n) {
                    float *to = job.c + r * job.c_stride + n;
                    *to = job.alpha * c[i][j][e] + (job.add ? *to : 0);
                }
            }
}

template <bool TransposedA, bool TransposedB> __device__ void gemm_f32(const Gemm &job) {
    __shared__ float ta[16][64 + 4], tb[16][64 + 4];
    const float *a = (const float *)job.a, *b = (const float *)job.b;
    u32 row = blockIdx.x * 64, column = blockIdx.y * 64, x = threadIdx.x % 16, y = threadIdx.x / 16;
    float c[4][4] = {};
    for (u32 k0 = 0; k0 < job.k; k0 += 16) {
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            u32 index = threadIdx.x + i * THREADS;
            u32 ka = TransposedA ? index / 64 : index % 16, ra = TransposedA ? index % 64 : index / 16;
            u32 kb = TransposedB ? index / 64 : index % 16, rb = TransposedB ? index % 64 : index / 16;
            bool in_a = k0 + ka < job.k && row + ra < job.m, in_b = k0 + kb < job.k && column + rb < job.n;
            u64 at_a = TransposedA ? (k0 + ka) * job.a_stride + row + ra : (row + ra) * job.a_stride + k0 + ka;
            u64 at_b = TransposedB ? (k0 + kb) * job.b_stride + column + rb : (column + rb) * job.b_stride + k0 + kb;
            ta[ka][ra] = in_a ? a[at_a] : 0;
            tb[kb][rb] = in_b ? b[at_b] : 0;
        }
        __syncthreads();
#pragma unroll
        for (u32 k = 0; k < 16; ++k)
#pragma unroll
            for (u32 i = 0; i < 4; ++i)
#pragma unroll
                for (u32 j = 0; j < 4; ++j) c[i][j] += ta[k][y * 4 + i] * tb[k][x * 4 + j];
        __syncthreads();
    }
#pragma unroll
    for (u32 i = 0; i < 4; ++i)
#pragma unroll
        for (u32 j = 0; j < 4; ++j) {
            u32 r = row + y * 4 + i, n = column + x * 4 + j;
            if (r < job.m && n < job.n) {
                float *to = job.c + r * job.c_stride + n;
                *to = job.alpha * c[i][j] + (job.add ? *to : 0);
            }
        }
}

// `nt`: logits = hidden weights^T. `nn`: hidden gradient = gradient weights. `tn`: weight gradient = gradient^T hidden.
extern "C" __global__ void __launch_bounds__(THREADS, 1) gemm_bf16_nt(Gemm job) { gemm<Bf16, false, false>(job); }
extern "C" __global__ void __launch_bounds__(THREADS, 1) gemm_bf16_nn(Gemm job) { gemm<Bf16, false, true>(job); }
extern "C" __global__ void __launch_bounds__(THREADS, 1) gemm_bf16_tn(Gemm job) { gemm<Bf16, true, true>(job); }
extern "C" __global__ void __launch_bounds__(THREADS, 1) gemm_f16_nt(Gemm job) { gemm<F16, false, false>(job); }
extern "C" __global__ void __launch_bounds__(THREADS, 1) gemm_f16_nn(Gemm job) { gemm<F16, false, true>(job); }
extern "C" __global__ void __launch_bounds__(THREADS, 1) gemm_f16_tn(Gemm job) { gemm<F16, true, true>(job); }
extern "C" __global__ void __launch_bounds__(THREADS) gemm_f32_nt(Gemm job) { gemm_f32<false, false>(job); }
extern "C" __global__ void __launch_bounds__(THREADS) gemm_f32_nn(Gemm job) { gemm_f32<false, true>(job); }
extern "C" __global__ void __launch_bounds__(THREADS) gemm_f32_tn(Gemm job) { gemm_f32<true, true>(job); }
