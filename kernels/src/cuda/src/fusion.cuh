// What the fusion kernels share: shares of the sources at a position, and what of the fused masses is kept.
#pragma once
#include "device.cuh"

struct Source {
    const void *symbols; // [positions, slots]
    const u8 *codes;
    const u8 *end; // or null
    const u8 *tail;
    u32 slots;
    u32 weight; // positive; not read where positions have their own, or where there are none
};

struct Fusion {
    const Source *sources;
    const u32 *masses;     // of every code
    const u64 *half_steps; // [16] where a mantissa rounds up
    u32 count;
    u32 positions;
    u32 most;  // sum of all sources' slots
    u32 slots; // of the result
    u64 full;  // least filled mass, out of 2^48
    void *symbols;
    u8 *codes;
    u8 *end; // or null
    u8 *tail;
    const u32 *weights; // [positions, count], or null
    u32 dropped;        // of a statistic: values at each end
    u32 padding;
};

constexpr u32 MASS_BITS = 48;

__device__ inline u8 encode_mass(const u64 *half_steps, u64 mass) {
    if (mass == 0) return 255;
    u32 zeros = __clzll(mass), steps = 0;
    u64 mantissa = mass << zeros;
    while (steps < 16 && mantissa >= half_steps[steps]) ++steps;
    u32 sixteenths = 16 * (63 - zeros) + steps;
    return sixteenths >= 16 * MASS_BITS ? 0 : (u8)min(16 * MASS_BITS - sixteenths, 255u);
}

template <class S> struct Lists {
    u64 *mass;
    u64 *sorted_mass;
    S *symbol;
    S *sorted;

    __device__ Lists(u8 *memory, u32 most) {
        mass = (u64 *)memory + (u64)(threadIdx.x / 32) * most * 2;
        sorted_mass = mass + most;
        symbol = (S *)((u64 *)memory + (u64)WARPS * most * 2) + (u64)(threadIdx.x / 32) * most * 2;
        sorted = symbol + most;
    }
};

// First place of a symbol in an ascending list whose unused slots repeat the last symbol, or NONE.
template <class S> __device__ u32 place_of(const S *symbols, u32 slots, S symbol) {
    u32 low = 0, high = slots;
    while (low < high) {
        u32 middle = (low + high) / 2;
        if (symbols[middle] < symbol) low = middle + 1;
        else high = middle;
    }
    return low < slots && symbols[low] == symbol ? low : NONE;
}

// Sum of the masses of a source at a position, by one warp; every lane gets it.
template <class S> __device__ u64 total_mass(const Fusion &job, const Source &source, u32 position) {
    const S *symbols = (const S *)source.symbols + (u64)position * source.slots;
    const u8 *codes = source.codes + (u64)position * source.slots;
    u64 total = 0;
    for (u32 slot = threadIdx.x % 32; slot < source.slots; slot += 32)
        if (slot == 0 || symbols[slot] != symbols[slot - 1]) total += job.masses[codes[slot]];
    total = warp_sum(total) + job.masses[source.tail[position]];
    return source.end ? total + job.masses[source.end[position]] : total;
}

// Out of 2^32, below it: a tail is never without mass.
__device__ inline u64 share_of(const Fusion &job, u8 code, u64 total) { return ((u64)job.masses[code] << 32) / total; }

// Writes a position from `count` symbols with their masses in list.sorted_mass and list.sorted, in any order.
template <class S> __device__ void keep(const Fusion &job, u32 position, Lists<S> &list, u32 count, u64 end) {
    u32 lane = threadIdx.x % 32;
    // Ranks, largest first and the smaller symbol on a tie.
    for (u32 i = lane; i < count; i += 32) {
        u64 mass = list.sorted_mass[i];
        S symbol = list.sorted[i];
        u32 rank = 0;
        for (u32 j = 0; j < count; ++j) {
            u64 other = list.sorted_mass[j];
            rank += other > mass || (other == mass && list.sorted[j] < symbol);
        }
        list.mass[rank] = mass;
        list.symbol[rank] = symbol;
    }
    __syncwarp();
    u64 filled = end;
    u32 kept = 0;
    while (kept < count && kept < job.slots && (kept == 0 || filled < job.full)) filled += list.mass[kept++];

    u64 first = (u64)position * job.slots;
    S *symbols = (S *)job.symbols;
    for (u32 i = lane; i < kept; i += 32) {
        u32 slot = 0;
        for (u32 j = 0; j < kept; ++j) slot += list.symbol[j] < list.symbol[i];
        symbols[first + slot] = list.symbol[i];
        job.codes[first + slot] = encode_mass(job.half_steps, list.mass[i]);
        if (slot + 1 == kept)
            for (u32 j = kept; j < job.slots; ++j) {
                symbols[first + j] = list.symbol[i];
                job.codes[first + j] = 255;
            }
    }
    if (lane == 0) {
        if (job.end) job.end[position] = encode_mass(job.half_steps, end);
        job.tail[position] = encode_mass(job.half_steps, (1ull << MASS_BITS) - filled);
    }
}
