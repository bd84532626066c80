// Masses of a row's leaf segments.
//
// Along an observed token the trie nodes root, t[..1], .., t are nested ranges of ranks. Their children cut the row into
// disjoint contiguous segments, none empty: a node's own stop, then its children by byte, with the child on the path
// replaced by its own stop and children; the ends of the record are the last. Host code gives, for every level, the index
// of its first segment (`left`), of its first child behind the path (`right`) and the path's place among its children.
//
// A row is read in spans of `tiles` * 256 elements, one warp each. A span writes (shift, sum) for every segment that
// starts and ends in it, and two more for the pieces at its edges. Whoever comes last adds the pieces up in the order of
// spans, so that the result does not depend on scheduling. Indices into a row are counted from the 16-byte boundary at
// or before its start: column + `skew`.
#pragma once
#include "device.cuh"

constexpr u32 TILE = 256;
// Below this a sum against a shared shift has lost members to underflow and is taken again against its own maximum.
constexpr float SCARCE = 1e-20f;

struct Node {
    u32 start, stop, end, first_child, children, byte;
};

struct Level {
    u32 node, path, left, right;
};

struct Row {
    u32 first_level, levels, first_segment, segments;
};

// Sum of exponentials, `sum` in units of e^shift.
using Mass = float2; // x: shift, y: sum

struct WideMass {
    double sum;
    float shift;
};

struct Rows {
    const Node *nodes;
    const u32 *starts; // of the nodes, side by side
    const Level *levels;
    const Row *rows;
    const void *logits;
    u64 stride; // elements from row to row
    u32 count;
    u32 live;   // columns that carry mass
    u32 ends;   // first column of the record's ends
    u32 width;  // columns
    u32 tiles;  // per span
    u32 slices; // blocks per row
    u32 most_segments;
    u32 most_levels;
    Mass *edges;    // [count, slices * WARPS, 2]
    Mass *segments; // [sum of segments]
    u32 *arrived;   // [count], zero
    u64 *bad;       // smallest index row * width + column of a logit that is not finite
};

constexpr u32 OWNER_STOP = 256;
constexpr u32 OWNER_END = 257;

__device__ inline u32 span_elements(const Rows &job) { return job.tiles * TILE; }

template <class T> __device__ inline const T *row_base(const Rows &job, u32 row, u32 &skew) {
    const T *first = (const T *)job.logits + (u64)row * job.stride;
    skew = (u32)((u64)first % 16 / sizeof(T));
    return first - skew;
}

// Number of the children of a level and whether it has a segment for its own stop.
__device__ inline Node level_node(const Rows &job, const Level &level, u32 depth, u32 &stop) {
    Node node = job.nodes[level.node];
    stop = depth > 0 && node.stop > node.start;
    return node;
}

__device__ inline u32 child_segment(const Level &level, u32 stop, u32 child) {
    return child < level.path ? level.left + stop + child : level.right + child - level.path - 1;
}

// Segments of the nested range of a level: its own, with everything below the path.
__device__ inline void level_range(const Rows &job, const Row &row, u32 depth, u32 &from, u32 &to, u32 &stop) {
    Level level = job.levels[row.first_level + depth];
    Node node = level_node(job, level, depth, stop);
    from = level.left;
    to = depth == 0                ? row.segments
         : depth + 1 == row.levels ? level.left + stop + node.children
                                   : level.right + node.children - level.path - 1;
}

// Starts of the segments of a row, and the end of the last, in shared memory; with `owner` also level * 512 + class.
__device__ inline void lay_out(const Rows &job, const Row &row, u32 skew, u32 *start, u32 *owner) {
    auto place = [&](u32 depth, u32 first, u32 step) {
        Level level = job.levels[row.first_level + depth];
        u32 stop;
        Node node = level_node(job, level, depth, stop);
        if (stop && first == 0) {
            start[level.left] = skew + node.start;
            if (owner) owner[level.left] = depth * 512 + OWNER_STOP;
        }
        for (u32 child = first; child < node.children; child += step) {
            if (child == level.path) continue;
            u32 segment = child_segment(level, stop, child);
            start[segment] = skew + job.starts[node.first_child + child];
            if (owner) owner[segment] = depth * 512 + job.nodes[node.first_child + child].byte;
        }
    };
    // The root has up to 256 children, the others mostly few.
    place(0, threadIdx.x, THREADS);
    for (u32 depth = 1 + threadIdx.x / 32; depth < row.levels; depth += WARPS) place(depth, threadIdx.x % 32, 32);
    if (threadIdx.x == 0) {
        start[row.segments - 1] = skew + job.ends;
        start[row.segments] = skew + job.live;
        if (owner) owner[row.segments - 1] = OWNER_END;
    }
    __syncthreads();
}

// One bit per element of a slice where a segment starts, but for the first segment.
__device__ inline void mark(const Row &row, const u32 *start, u32 *bits, u32 slice_start, u32 slice_elements) {
    for (u32 i = threadIdx.x; i < slice_elements / 32; i += THREADS) bits[i] = 0;
    __syncthreads();
    for (u32 i = 1 + threadIdx.x; i <= row.segments; i += THREADS) {
        u32 at = start[i] - slice_start;
        if (start[i] >= slice_start && at < slice_elements) atomicOr(&bits[at / 32], 1u << (at % 32));
    }
    __syncthreads();
}

// Segment that is open just before an element: how many segments but the first start before it.
__device__ inline u32 open_segment(const Row &row, const u32 *start, u32 at) {
    u32 low = 1, high = row.segments + 1;
    while (low < high) {
        u32 middle = (low + high) / 2;
        if (start[middle] < at) low = middle + 1;
        else high = middle;
    }
    return low - 1;
}

// Number of boundaries in lower lanes.
__device__ inline u32 boundaries_before(u32 own) {
    u32 lane = threadIdx.x % 32, sum = own;
#pragma unroll
    for (u32 d = 1; d < 32; d *= 2) {
        u32 left = __shfl_up_sync(ALL, sum, d);
        if (lane >= d) sum += left;
    }
    return sum - own;
}

// Sums of one warp over a span of consecutive elements.
struct SpanSums {
    Mass *edges;    // of this span
    Mass *segments; // of this row
    float shift = LOWEST, sum = 0;
    u32 current;
    bool is_first;
    bool seen = false;

    __device__ void whole(const float (&x)[8]) {
        float top = shift;
#pragma unroll
        for (u32 i = 0; i < 8; ++i) top = fmaxf(top, x[i]);
        float e[8];
#pragma unroll
        for (u32 i = 0; i < 8; ++i) e[i] = exp_of_nonpositive(x[i] - top);
        float part = ((e[0] + e[1]) + (e[2] + e[3])) + ((e[4] + e[5]) + (e[6] + e[7]));
        sum = sum * exp_of_nonpositive(shift - top) + part;
        shift = top;
    }

    // A tile in which segments start; `boundary` and `real` have a bit for each of the lane's elements.
    __device__ void cut(const float (&x)[8], u32 boundary, u32 real) {
        u32 lane = threadIdx.x % 32;
        float top = shift;
#pragma unroll
        for (u32 i = 0; i < 8; ++i) top = fmaxf(top, real >> i & 1 ? x[i] : LOWEST);
        top = warp_max(top);
        float carry = warp_sum(sum * exp_of_nonpositive(shift - top));
        u32 flags = __ballot_sync(ALL, boundary != 0);
        u32 own = __popc(boundary);
        u32 before = boundaries_before(own);
        float open = 0, head = 0;
        u32 closed = 0;
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
            if (boundary >> i & 1) {
                if (closed == 0) head = open;
                else segments[current + before + closed] = Mass{top, open};
                open = 0;
                ++closed;
            }
            if (real >> i & 1) open += exp_of_nonpositive(x[i] - top);
        }
        u32 up_to_here = flags & (ALL >> (31 - lane));
        u32 opener = up_to_here ? 31 - __clz(up_to_here) : 0;
        float run = open;
#pragma unroll
        for (u32 d = 1; d < 32; d *= 2) {
            float left = __shfl_up_sync(ALL, run, d);
            if (lane >= opener + d) run += left;
        }
        float left = __shfl_up_sync(ALL, run, 1);
        if (boundary) {
            bool leftmost = (flags & ((1u << lane) - 1)) == 0;
            float closing = head + (lane > 0 ? left : 0) + (leftmost ? carry : 0);
            Mass *slot = leftmost && !seen && !is_first ? &edges[0] : &segments[current + before];
            *slot = Mass{top, closing};
        }
        run = __shfl_sync(ALL, run, 31);
        shift = top;
        sum = lane == 0 ? run + (flags ? 0 : carry) : 0;
        current += __shfl_sync(ALL, before + own, 31);
        seen |= flags != 0;
    }

    __device__ void end() {
        float top = warp_max(shift);
        float total = warp_sum(sum * exp_of_nonpositive(shift - top));
        if (threadIdx.x % 32 == 0) edges[seen || is_first] = Mass{top, total};
    }
};

// Lane's elements of a tile that lie in from..to, as bits.
__device__ inline u32 inside(u32 at, u32 from, u32 to) {
    u32 bits = 0xff;
    if (at < from) bits &= from - at < 8 ? 0xffu << (from - at) : 0;
    if (at + 8 > to) bits &= at < to ? 0xffu >> (at + 8 - to) : 0;
    return bits;
}

// Reads one slice of a row and writes its pieces.
template <class T>
__device__ void sum_slice(const Rows &job, u32 row_index, const Row &row, u32 slice, const u32 *start, u32 *bits) {
    u32 skew;
    const T *base = row_base<T>(job, row_index, skew);
    u32 span = span_elements(job), slice_start = slice * WARPS * span;
    mark(row, start, bits, slice_start, WARPS * span);
    u32 lane = threadIdx.x % 32, index = slice * WARPS + threadIdx.x / 32;
    u32 from = index * span, end = skew + job.live;
    if (from >= end) return;
    SpanSums sums;
    sums.edges = job.edges + ((u64)row_index * job.slices * WARPS + index) * 2;
    sums.segments = job.segments + row.first_segment;
    sums.current = open_segment(row, start, from);
    sums.is_first = index == 0;
    const u8 *boundaries = (const u8 *)bits + (from - slice_start) / 8 + lane;
    float poison = 0;
    Raw<T> next = load_raw(base, from + lane * 8, end);
    for (u32 tile = 0; tile < job.tiles && from + tile * TILE < end; ++tile) {
        u32 at = from + tile * TILE + lane * 8;
        float x[8];
        unpack(next, x);
        if (tile + 1 < job.tiles) next = load_raw(base, at + TILE, end);
        u32 boundary = boundaries[tile * (TILE / 8)];
        u32 real = inside(at, skew, end);
        if (__any_sync(ALL, boundary != 0 || real != 0xff)) {
#pragma unroll
            for (u32 i = 0; i < 8; ++i) poison += real >> i & 1 ? x[i] * 0.0f : 0.0f;
            sums.cut(x, boundary, real);
        } else {
#pragma unroll
            for (u32 i = 0; i < 8; ++i) poison += x[i] * 0.0f;
            sums.whole(x);
        }
    }
    sums.end();
    if (__any_sync(ALL, poison != poison)) {
        u64 bad = ~0ull;
        for (u32 at = from + lane; at < from + span && at < end; at += 32)
            if (at >= skew && bad == ~0ull && !(fabsf(widen(base[at])) <= -LOWEST))
                bad = (u64)row_index * job.width + at - skew;
        if (bad != ~0ull) atomicMin(job.bad, bad);
    }
}

// Adds up the pieces of a segment in the order of spans.
__device__ inline Mass merge(const Rows &job, u32 row_index, const Row &row, u32 segment, u32 from, u32 to) {
    u32 span = span_elements(job), first = from / span, last = (to - 1) / span;
    if (to < (first + 1) * span) return load_shared_result(job.segments + row.first_segment + segment);
    const Mass *edges = job.edges + (u64)row_index * job.slices * WARPS * 2;
    Mass piece = load_shared_result(edges + first * 2 + 1);
    float shift = piece.x;
    double sum = piece.y;
    for (u32 i = first + 1; i <= last; ++i) {
        piece = load_shared_result(edges + i * 2);
        if (piece.x > shift) {
            sum = sum * expf(shift - piece.x) + piece.y;
            shift = piece.x;
        } else {
            sum += (double)piece.y * expf(piece.x - shift);
        }
    }
    return Mass{shift, (float)sum};
}

// Whether this block is the last of a row's; its predecessors' pieces are then visible.
__device__ inline bool is_last(const Rows &job, u32 row_index) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(&job.arrived[row_index], 1) + 1 == job.slices;
    __syncthreads();
    bool result = last;
    __syncthreads();
    return result;
}

// Final masses of all segments of a row, in shared memory.
template <class T>
__device__ void finish_masses(const Rows &job, u32 row_index, const Row &row, const u32 *start, Mass *mass) {
    for (u32 i = threadIdx.x; i < row.segments; i += THREADS)
        mass[i] = merge(job, row_index, row, i, start[i], start[i + 1]);
    __syncthreads();
    u32 lane = threadIdx.x % 32, skew;
    const T *base = row_base<T>(job, row_index, skew);
    for (u32 i = threadIdx.x / 32; i < row.segments; i += WARPS) {
        if (!(mass[i].y < SCARCE)) continue;
        float top = LOWEST, sum = 0;
        for (u32 at = start[i] + lane; at < start[i + 1]; at += 32) top = fmaxf(top, widen(base[at]));
        top = warp_max(top);
        for (u32 at = start[i] + lane; at < start[i + 1]; at += 32) sum += exp_of_nonpositive(widen(base[at]) - top);
        sum = warp_sum(sum);
        __syncwarp();
        if (lane == 0) mass[i] = Mass{top, sum};
    }
    __syncthreads();
}

// Mass of a run of segments, by one warp; every lane gets it.
__device__ inline WideMass sum_segments(const Mass *mass, u32 from, u32 to) {
    u32 lane = threadIdx.x % 32;
    float top = LOWEST;
    for (u32 i = from + lane; i < to; i += 32) top = fmaxf(top, mass[i].x);
    top = warp_max(top);
    double sum = 0;
    for (u32 i = from + lane; i < to; i += 32) sum += (double)mass[i].y * expf(mass[i].x - top);
    return WideMass{warp_sum(sum), top};
}

__device__ inline double log_mass(double sum, float shift) { return (double)shift + log(sum); }
