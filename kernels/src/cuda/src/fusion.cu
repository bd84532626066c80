// Integer fusion of records, one warp per position: the same bytes as cpu/fusion.rs.
#include "device.cuh"

struct Source {
    const void *symbols; // [positions, slots]
    const u8 *codes;
    const u8 *end; // or null
    const u8 *tail;
    u32 slots;
    u32 weight; // positive
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

template <class S> __device__ void fuse(const Fusion &job) {
    DYNAMIC_SHARED(memory);
    Lists<S> list(memory, job.most);
    u32 lane = threadIdx.x % 32, position = blockIdx.x * WARPS + threadIdx.x / 32;
    if (position >= job.positions) return;

    // Every source's shares, in its own stretch of the list; unused slots get no symbol of their own.
    u64 end = 0;
    u32 stretch = 0;
    for (u32 i = 0; i < job.count; ++i) {
        Source source = job.sources[i];
        const S *symbols = (const S *)source.symbols + (u64)position * source.slots;
        const u8 *codes = source.codes + (u64)position * source.slots;
        u64 total = 0;
        for (u32 slot = lane; slot < source.slots; slot += 32)
            if (slot == 0 || symbols[slot] != symbols[slot - 1]) total += job.masses[codes[slot]];
        total = warp_sum(total) + job.masses[source.tail[position]];
        if (source.end) total += job.masses[source.end[position]];
        for (u32 slot = lane; slot < source.slots; slot += 32) {
            list.symbol[stretch + slot] = symbols[slot];
            list.mass[stretch + slot] = source.weight * (((u64)job.masses[codes[slot]] << 32) / total);
        }
        if (source.end) end += source.weight * (((u64)job.masses[source.end[position]] << 32) / total);
        stretch += source.slots;
    }
    __syncwarp();

    // Adds equal symbols up at their first place; the list of sums has no order yet.
    u32 count = 0;
    stretch = 0;
    for (u32 i = 0; i < job.count; ++i) {
        u32 slots = job.sources[i].slots;
        for (u32 first = 0; first < slots; first += 32) {
            u32 slot = first + lane;
            bool is_leader = slot < slots && (slot == 0 || list.symbol[stretch + slot] != list.symbol[stretch + slot - 1]);
            u64 mass = 0;
            S symbol = 0;
            if (is_leader) {
                symbol = list.symbol[stretch + slot];
                u32 other = 0;
                for (u32 j = 0; j < job.count; ++j) {
                    u32 others = job.sources[j].slots;
                    u32 place = place_of(list.symbol + other, others, symbol);
                    if (place != NONE) {
                        is_leader &= j >= i;
                        mass += list.mass[other + place];
                    }
                    other += others;
                }
            }
            u32 leaders = __ballot_sync(ALL, is_leader);
            if (is_leader) {
                u32 place = count + __popc(leaders & ((1u << lane) - 1));
                list.sorted_mass[place] = mass;
                list.sorted[place] = symbol;
            }
            count += __popc(leaders);
        }
        stretch += slots;
    }
    __syncwarp();

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

extern "C" __global__ void __launch_bounds__(THREADS, 4) fuse_bytes(Fusion job) { fuse<u8>(job); }
extern "C" __global__ void __launch_bounds__(THREADS, 4) fuse_tokens(Fusion job) { fuse<u32>(job); }
