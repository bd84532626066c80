// Robust statistics of records, one warp per position: the same bytes as cpu/fusion/robust.rs.
#include "fusion.cuh"

// Shares of the sources at a position besides those of listed symbols.
struct Rest {
    u32 *end;
    u32 *unlisted; // of a symbol that the source does not list; among tokens of all of them, the tail

    template <class S> __device__ Rest(const Fusion &job, u8 *memory, const Lists<S> &) {
        u64 lists = (u64)WARPS * job.most * 2 * (sizeof(u64) + sizeof(S));
        end = (u32 *)(memory + (lists + 3) / 4 * 4) + (u64)(threadIdx.x / 32) * job.count * 2;
        unlisted = end + job.count;
    }
};

// Mean of the values without the smallest and the largest, rounded down.
template <class F> __device__ u64 middle(const Fusion &job, F value) {
    u64 sum = 0;
    for (u32 i = 0; i < job.count; ++i) {
        u64 own = value(i);
        u32 rank = 0;
        for (u32 j = 0; j < job.count && job.dropped > 0; ++j) {
            u64 other = value(j);
            rank += other < own || (other == own && j < i);
        }
        if (rank >= job.dropped && (job.dropped == 0 || rank < job.count - job.dropped)) sum += own;
    }
    return sum / (job.count - 2 * job.dropped);
}

// (value << 48) / total for values up to 2^32 and totals below 2^46, by long division.
__device__ inline u64 wide_share(u64 value, u64 total) {
    u64 dividend = value << 31, upper = dividend / total;
    return (upper << 17) + ((dividend - upper * total) << 17) / total;
}

template <class S> __device__ void fuse_robust(const Fusion &job) {
    constexpr bool BYTES = sizeof(S) == 1;
    DYNAMIC_SHARED(memory);
    Lists<S> list(memory, job.most);
    Rest rest(job, memory, list);
    u32 lane = threadIdx.x % 32, position = blockIdx.x * WARPS + threadIdx.x / 32;
    if (position >= job.positions) return;

    u32 stretch = 0;
    for (u32 i = 0; i < job.count; ++i) {
        Source source = job.sources[i];
        const S *symbols = (const S *)source.symbols + (u64)position * source.slots;
        const u8 *codes = source.codes + (u64)position * source.slots;
        u64 total = total_mass<S>(job, source, position);
        u32 listed = 0;
        for (u32 slot = lane; slot < source.slots; slot += 32) {
            listed += slot == 0 || symbols[slot] != symbols[slot - 1];
            list.symbol[stretch + slot] = symbols[slot];
            list.mass[stretch + slot] = share_of(job, codes[slot], total);
        }
        listed = warp_sum(listed);
        if (lane == 0) {
            u32 tail = (u32)share_of(job, source.tail[position], total), others = 256 - min(listed, 256u);
            rest.unlisted[i] = !BYTES ? tail : others > 0 ? tail / others : 0;
            rest.end[i] = source.end ? (u32)share_of(job, source.end[position], total) : 0;
        }
        stretch += source.slots;
    }
    __syncwarp();

    // Every symbol at the first source that lists it.
    u32 count = 0;
    u64 sum = 0;
    stretch = 0;
    for (u32 i = 0; i < job.count; ++i) {
        u32 slots = job.sources[i].slots;
        for (u32 first = 0; first < slots; first += 32) {
            u32 slot = first + lane;
            bool is_leader = slot < slots && (slot == 0 || list.symbol[stretch + slot] != list.symbol[stretch + slot - 1]);
            S symbol = is_leader ? list.symbol[stretch + slot] : 0;
            u32 other = 0;
            for (u32 j = 0; j < i && is_leader; ++j) {
                is_leader = place_of(list.symbol + other, job.sources[j].slots, symbol) == NONE;
                other += job.sources[j].slots;
            }
            u32 leaders = __ballot_sync(ALL, is_leader);
            if (is_leader) {
                u32 place = count + __popc(leaders & ((1u << lane) - 1));
                list.sorted[place] = symbol;
            }
            count += __popc(leaders);
        }
        stretch += slots;
    }
    __syncwarp();
    for (u32 i = lane; i < count; i += 32) {
        S symbol = list.sorted[i];
        u64 mean = middle(job, [&](u32 source) -> u64 {
            u32 before = 0;
            for (u32 j = 0; j < source; ++j) before += job.sources[j].slots;
            u32 place = place_of(list.symbol + before, job.sources[source].slots, symbol);
            if (place != NONE) return list.mass[before + place];
            return BYTES ? rest.unlisted[source] : 0;
        });
        list.sorted_mass[i] = mean;
        sum += mean;
    }
    u64 end = middle(job, [&](u32 source) -> u64 { return rest.end[source]; });
    u64 nobody = middle(job, [&](u32 source) -> u64 { return rest.unlisted[source]; });
    u64 total = warp_sum(sum) + end + (BYTES ? (256 - count) * nobody : nobody);
    for (u32 i = lane; i < count; i += 32) list.sorted_mass[i] = wide_share(list.sorted_mass[i], total);
    __syncwarp();
    keep(job, position, list, count, wide_share(end, total));
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) fuse_robust_bytes(Fusion job) { fuse_robust<u8>(job); }
extern "C" __global__ void __launch_bounds__(THREADS, 4) fuse_robust_tokens(Fusion job) { fuse_robust<u32>(job); }
