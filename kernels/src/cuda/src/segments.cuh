// Masses of a row's leaf segments.
//
// Along an observed token the trie nodes root, t[..1], .., t are nested ranges of ranks. Their children cut the row into
// disjoint contiguous segments, none empty: a node's own stop, then its children by byte, with the child on the path
// replaced by its own stop and children; the ends of the record are the last. Host code gives, for every level, the index
// of its first segment (`left`), of its first child behind the path (`right`) and the path's place among its children.
//
// A row is read in spans of `tiles` * 256 elements, one warp each, against one shift: the largest logit of the span's
// first tile. A span writes (shift, sum) for every segment that starts and ends in it, and two more for the pieces at
// its edges. Whoever comes last adds the pieces up in the order of spans, so that the result does not depend on
// scheduling. A sum that lost members to underflow, or came near overflow, is taken again against the segment's own
// maximum. Indices into a row are counted from the 128-byte boundary at or before its start: column + `skew`.
#pragma once
#include "device.cuh"

constexpr u32 TILE = 256;
// Sums between these lost nothing against their shift.
constexpr float SCARCE = 1e-20f;
constexpr float ABUNDANT = 1e20f;
// Segments that start in a tile from which on lanes take a segment each.
constexpr u32 DENSE = 8;

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
    u32 *layout;    // [sum of segments + count] first columns of a row's segments and the end of the last
    u32 *owners;    // [sum of segments] level * 512 + class of every segment
    u32 *arrived;   // [count], zero
    u64 *bad;       // smallest index row * width + column of a logit that is not finite
};

constexpr u32 OWNER_STOP = 256;
constexpr u32 OWNER_END = 257;

__device__ inline u32 span_elements(const Rows &job) { return job.tiles * TILE; }

template <class T> __device__ inline const T *row_base(const Rows &job, u32 row, u32 &skew) {
    const T *first = (const T *)job.logits + (u64)row * job.stride;
    skew = (u32)((u64)first % 128 / sizeof(T));
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

// First columns of the segments of a row and the end of the last, and who owns them.
__device__ inline void lay_out(const Rows &job, const Row &row, u32 *start, u32 *owner) {
    auto place = [&](u32 depth, u32 first, u32 step) {
        Level level = job.levels[row.first_level + depth];
        u32 stop;
        Node node = level_node(job, level, depth, stop);
        if (stop && first == 0) {
            start[level.left] = node.start;
            owner[level.left] = depth * 512 + OWNER_STOP;
        }
        for (u32 child = first; child < node.children; child += step) {
            if (child == level.path) continue;
            u32 segment = child_segment(level, stop, child);
            start[segment] = job.starts[node.first_child + child];
            owner[segment] = depth * 512 + job.nodes[node.first_child + child].byte;
        }
    };
    // The root has up to 256 children, the others mostly few.
    place(0, threadIdx.x, THREADS);
    for (u32 depth = 1 + threadIdx.x / 32; depth < row.levels; depth += WARPS) place(depth, threadIdx.x % 32, 32);
    if (threadIdx.x == 0) {
        start[row.segments - 1] = job.ends;
        start[row.segments] = job.live;
        owner[row.segments - 1] = OWNER_END;
    }
}

__device__ inline u32 *row_layout(const Rows &job, u32 row_index, const Row &row) {
    return job.layout + row.first_segment + row_index;
}

// Starts of the segments of a row in shared memory, then the end of the last and NONE.
__device__ inline void load_layout(const Rows &job, u32 row_index, const Row &row, u32 skew, u32 *start) {
    const u32 *columns = row_layout(job, row_index, row);
    for (u32 i = threadIdx.x; i <= row.segments; i += THREADS) start[i] = skew + columns[i];
    if (threadIdx.x == 0) start[row.segments + 1] = NONE;
    __syncthreads();
}

// Segment that is open just before an element: how many segments but the first start before it.
__device__ inline u32 open_segment(const u32 *start, u32 count, u32 at) {
    u32 low = 1, high = count + 1;
    while (low < high) {
        u32 middle = (low + high) / 2;
        if (start[middle] < at) low = middle + 1;
        else high = middle;
    }
    return low - 1;
}

// Sums of one warp over a span of consecutive elements.
struct SpanSums {
    Mass *edges;      // of this span
    Mass *segments;   // of this row
    const u32 *start; // of this row
    float *values;    // TILE of this warp
    u32 count;        // segments of this row
    u32 current;      // open segment
    u32 next;         // where it ends
    bool is_first;
    bool seen = false;
    float shift, sum = 0;

    __device__ static float total(const float (&e)[8]) {
        return ((e[0] + e[1]) + (e[2] + e[3])) + ((e[4] + e[5]) + (e[6] + e[7]));
    }

    __device__ void close(float mass) {
        mass = warp_sum(mass);
        if (threadIdx.x % 32 == 0) *(seen || is_first ? &segments[current] : &edges[0]) = Mass{shift, mass};
        seen = true;
    }

    // A tile in which segments start, the lane's elements `e` at `at`.
    __device__ void cut(float (&e)[8], u32 at, u32 tile_end) {
        u32 lane = threadIdx.x % 32;
        bool is_dense = start[min(current + DENSE, count)] < tile_end;
        if (is_dense) {
#pragma unroll
            for (u32 i = 0; i < 8; ++i) values[lane * 8 + i] = e[i];
            __syncwarp();
        }
        do {
            float before = 0;
#pragma unroll
            for (u32 i = 0; i < 8; ++i) {
                bool is_before = at + i < next;
                before += is_before ? e[i] : 0;
                e[i] = is_before ? 0 : e[i];
            }
            close(sum + before);
            sum = 0;
            next = start[++current + 1];
        } while (next < tile_end && !is_dense);
        if (is_dense) {
            const float *tile = values - (tile_end - TILE);
            u32 last = open_segment(start, count, tile_end);
            for (u32 i = current + lane; i < last; i += 32) {
                float mass = 0;
                for (u32 j = start[i]; j < start[i + 1]; ++j) mass += tile[j];
                segments[i] = Mass{shift, mass};
            }
            current = last;
            next = start[current + 1];
#pragma unroll
            for (u32 i = 0; i < 8; ++i) e[i] = at + i < start[current] ? 0 : e[i];
            __syncwarp();
        }
        sum = total(e);
    }

    __device__ void end() {
        float mass = warp_sum(sum);
        if (threadIdx.x % 32 == 0) edges[seen || is_first] = Mass{shift, mass};
    }
};

// Lane's elements of a tile that lie in from..to, as bits.
__device__ inline u32 inside(u32 at, u32 from, u32 to) {
    u32 bits = 0xff;
    if (at < from) bits &= from - at < 8 ? 0xffu << (from - at) : 0;
    if (at + 8 > to) bits &= at < to ? 0xffu >> (at + 8 - to) : 0;
    return bits;
}

// Tiles that a warp asks for before it needs them: 64 bytes per lane.
template <class T> constexpr u32 BATCH = 8 / sizeof(T);

template <class T> struct Batch {
    Raw<T> tile[BATCH<T>];

    __device__ Batch(const T *base, u32 at, u32 end) {
#pragma unroll
        for (u32 i = 0; i < BATCH<T>; ++i) tile[i] = load_raw(base, at + i * TILE, end);
    }
};

// Reads one slice of a row and writes its pieces. The row's layout comes to `start` while the first tiles are on their way.
template <class T>
__device__ void sum_slice(const Rows &job, u32 row_index, Row &row, u32 slice, u32 *start, float *values) {
    u32 skew;
    const T *base = row_base<T>(job, row_index, skew);
    u32 span = span_elements(job), lane = threadIdx.x % 32, index = slice * WARPS + threadIdx.x / 32;
    u32 from = index * span, end = skew + job.live, stop = min(from + span, end);
    Batch<T> batch(base, from + lane * 8, stop);
    row = job.rows[row_index];
    load_layout(job, row_index, row, skew, start);
    if (from >= end) return;
    SpanSums sums;
    sums.edges = job.edges + ((u64)row_index * job.slices * WARPS + index) * 2;
    sums.segments = job.segments + row.first_segment;
    sums.start = start;
    sums.values = values + threadIdx.x / 32 * TILE;
    sums.count = row.segments;
    sums.current = open_segment(start, row.segments, from);
    sums.next = start[sums.current + 1];
    sums.is_first = index == 0;
    {
        float x[8], top = LOWEST;
        unpack(batch.tile[0], x);
        u32 real = inside(from + lane * 8, skew, end);
#pragma unroll
        for (u32 i = 0; i < 8; ++i) top = fmaxf(top, real >> i & 1 ? x[i] : LOWEST);
        sums.shift = warp_max(top);
    }
    float poison = 0;
    for (u32 tile = from; tile < stop; tile += BATCH<T> * TILE) {
#pragma unroll
        for (u32 b = 0; b < BATCH<T>; ++b) {
            u32 first = tile + b * TILE, at = first + lane * 8;
            if (first >= stop) break;
            float x[8];
            unpack(batch.tile[b], x);
            batch.tile[b] = load_raw(base, at + BATCH<T> * TILE, stop);
            if (first < skew || first + TILE > end) {
                u32 real = inside(at, skew, end);
#pragma unroll
                for (u32 i = 0; i < 8; ++i) x[i] = real >> i & 1 ? x[i] : LOWEST;
            }
#pragma unroll
            for (u32 i = 0; i < 8; ++i) {
                poison += x[i] * 0.0f;
                x[i] = exp_near_zero(x[i] - sums.shift);
            }
            if (first + TILE <= sums.next) sums.sum += SpanSums::total(x);
            else sums.cut(x, at, first + TILE);
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
    constexpr u32 AHEAD = 4;
    u32 span = span_elements(job), first = from / span, last = (to - 1) / span;
    if (to < (first + 1) * span) return load_shared_result(job.segments + row.first_segment + segment);
    const Mass *edges = job.edges + (u64)row_index * job.slices * WARPS * 2;
    Mass piece = load_shared_result(edges + first * 2 + 1);
    float shift = piece.x;
    double sum = piece.y;
    for (u32 i = first + 1; i <= last; i += AHEAD) {
        Mass pieces[AHEAD];
#pragma unroll
        for (u32 j = 0; j < AHEAD; ++j) pieces[j] = load_shared_result(edges + min(i + j, last) * 2);
#pragma unroll
        for (u32 j = 0; j < AHEAD; ++j) {
            if (i + j > last) break;
            piece = pieces[j];
            if (piece.x > shift) {
                sum = sum * expf(shift - piece.x) + piece.y;
                shift = piece.x;
            } else {
                sum += (double)piece.y * expf(piece.x - shift);
            }
        }
    }
    return Mass{shift, (float)sum};
}

// The same mass with a sum near one, so that shifts compare as masses do.
__device__ inline Mass normalise(Mass mass) {
    float shift = mass.x + rintf(logf(mass.y));
    return Mass{shift, mass.y * expf(mass.x - shift)};
}

// Whether this block is the last of a row's; its predecessors' pieces are then visible.
__device__ inline bool is_last(const Rows &job, u32 row_index) {
    __shared__ bool last;
    if (job.slices == 1) {
        __syncthreads();
        return true;
    }
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
    bool is_lacking = false;
    for (u32 i = threadIdx.x; i < row.segments; i += THREADS) {
        Mass own = merge(job, row_index, row, i, start[i], start[i + 1]);
        bool is_sound = own.y >= SCARCE && own.y <= ABUNDANT;
        mass[i] = is_sound ? normalise(own) : Mass{0, 0};
        is_lacking |= !is_sound;
    }
    if (!__syncthreads_or(is_lacking)) return;
    u32 lane = threadIdx.x % 32, skew;
    const T *base = row_base<T>(job, row_index, skew);
    for (u32 i = threadIdx.x / 32; i < row.segments; i += WARPS) {
        if (mass[i].y > 0) continue;
        float top = LOWEST, sum = 0;
        for (u32 at = start[i] + lane; at < start[i + 1]; at += 32) top = fmaxf(top, widen(base[at]));
        top = warp_max(top);
        for (u32 at = start[i] + lane; at < start[i + 1]; at += 32) sum += exp_near_zero(widen(base[at]) - top);
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
