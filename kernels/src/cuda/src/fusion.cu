// Integer fusion of records by weights, one warp per position: the same bytes as cpu/fusion.
#include "fusion.cuh"

__device__ inline u32 weight_of(const Fusion &job, const Source &source, u32 position, u32 index) {
    return job.weights ? job.weights[(u64)position * job.count + index] : source.weight;
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
        u64 total = total_mass<S>(job, source, position);
        u32 weight = weight_of(job, source, position, i);
        for (u32 slot = lane; slot < source.slots; slot += 32) {
            list.symbol[stretch + slot] = symbols[slot];
            list.mass[stretch + slot] = weight * share_of(job, codes[slot], total);
        }
        if (source.end) end += weight * share_of(job, source.end[position], total);
        stretch += source.slots;
    }
    __syncwarp();

    // Adds equal symbols up at their first place; the list of sums has no order yet.
    u32 count = 0;
    stretch = 0;
    for (u32 i = 0; i < job.count; ++i) {
        u32 slots = job.sources[i].slots;
        // What weighs nothing is not listed either.
        u32 heard = weight_of(job, job.sources[i], position, i) > 0 ? slots : 0;
        for (u32 first = 0; first < heard; first += 32) {
            u32 slot = first + lane;
            bool is_leader = slot < heard && (slot == 0 || list.symbol[stretch + slot] != list.symbol[stretch + slot - 1]);
            u64 mass = 0;
            S symbol = 0;
            if (is_leader) {
                symbol = list.symbol[stretch + slot];
                u32 other = 0;
                for (u32 j = 0; j < job.count; ++j) {
                    u32 others = job.sources[j].slots;
                    u32 place = place_of(list.symbol + other, others, symbol);
                    if (place != NONE && weight_of(job, job.sources[j], position, j) > 0) {
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

    keep(job, position, list, count, end);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) fuse_bytes(Fusion job) { fuse<u8>(job); }
extern "C" __global__ void __launch_bounds__(THREADS, 4) fuse_tokens(Fusion job) { fuse<u32>(job); }
