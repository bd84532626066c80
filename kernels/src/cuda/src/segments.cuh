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

// Tiles of one warp that are on their way to shared memory.
template <class T> struct Ring {
    static constexpr u32 BYTES = 4096;
    static constexpr u32 STAGES = BYTES / (TILE * sizeof(T));
    static constexpr u32 WORDS = Raw<T>::WORDS;
    Quad *words; // of this warp: [STAGES, WORDS * 32]
    const T *base;
    u32 end; // words that start here or later are not read

    __device__ Ring(u8 *memory, const T *base, u32 first, u32 end)
        : words((Quad *)(memory + threadIdx.x / 32 * BYTES)), base(base), end(end) {
        for (u32 i = 0; i < STAGES; ++i) ask(first / TILE + i);
    }

    // Place of a word in its stage. Lanes copy words side by side and read WORDS in a row: neither meets in a bank.
    __device__ static u32 place(u32 word) { return WORDS == 1 ? word : word ^ (word >> 3 & 1); }

    // Asks for a tile of the row, in the stage of the one that all lanes took last.
    __device__ void ask(u32 tile) {
        u32 lane = threadIdx.x % 32;
        if (WORDS > 1) __syncwarp();
#pragma unroll
        for (u32 i = 0; i < WORDS; ++i) {
            u32 word = i * 32 + lane, start = tile * TILE + word * Raw<T>::PER_WORD;
            bool real = start < end;
            copy_async(&words[tile % STAGES * WORDS * 32 + place(word)], base + (real ? start : 0), real);
        }
        copy_commit();
    }

    // Waits for a tile, the earliest that was asked for; the lane's elements of it.
    __device__ void take(u32 tile, float (&x)[8]) {
        copy_wait<STAGES - 1>();
        if (WORDS > 1) __syncwarp();
        Raw<T> raw;
#pragma unroll
        for (u32 i = 0; i < WORDS; ++i)
            raw.word[i] = words[tile % STAGES * WORDS * 32 + place(threadIdx.x % 32 * WORDS + i)];
        unpack(raw, x);
    }
};

// Shared memory that reading a row takes.
struct Reading {
    u8 *ring;   // Ring::BYTES per warp
    u8 *flags;  // TILE per warp
    u32 *start; // of the row's segments, then the end of the last and NONE

    // Returns what lies behind.
    __device__ u8 *lay(u8 *memory, const Rows &job) {
        ring = memory;
        flags = ring + WARPS * Ring<float>::BYTES;
        start = (u32 *)(flags + WARPS * TILE);
        return (u8 *)(start + (job.most_segments + 3) / 2 * 2);
    }
};

// Where segments start among the eight elements of a lane, a byte each that is 0 or 1; `before` is how many start in the
// lanes before, `all` how many in the tile. `open` is the segment that is open at the tile's start.
__device__ inline u64 starts_in_tile(u8 *flags, const u32 *start, u32 count, u32 open, u32 first, u32 &before, u32 &all) {
    u32 lane = threadIdx.x % 32;
    __syncwarp();
    ((u64 *)flags)[lane] = 0;
    __syncwarp();
    for (u32 i = open + 1 + lane; i <= count && start[i] < first + TILE; i += 32) flags[start[i] - first] = 1;
    __syncwarp();
    u64 own = ((const u64 *)flags)[lane];
    u32 sum = __popc((u32)own) + __popc((u32)(own >> 32)), mine = sum;
#pragma unroll
    for (u32 d = 1; d < 32; d *= 2) {
        u32 other = __shfl_up_sync(ALL, sum, d);
        sum += lane >= d ? other : 0;
    }
    before = sum - mine;
    all = __shfl_sync(ALL, sum, 31);
    return own;
}

// Sums of one warp over a span of consecutive elements.
struct SpanSums {
    Mass *edges;      // of this span
    Mass *segments;   // of this row
    const u32 *start; // of this row
    u8 *flags;        // TILE of this warp
    u32 count;        // segments of this row
    u32 current;      // open segment
    u32 next;         // where it ends
    bool is_first;
    bool seen = false;
    float shift, sum = 0;

    __device__ static float total(const float (&e)[8]) {
        return ((e[0] + e[1]) + (e[2] + e[3])) + ((e[4] + e[5]) + (e[6] + e[7]));
    }

    // A tile in which segments start, the lane's elements `e` at `at`.
    __device__ void cut(float (&e)[8], u32 at, u32 tile_end) {
        if (start[min(current + 2, count + 1)] >= tile_end) cut_once(e, at);
        else cut_often(e, tile_end);
        seen = true;
        next = start[current + 1];
    }

    __device__ void cut_once(float (&e)[8], u32 at) {
        float before = 0;
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
            bool is_before = at + i < next;
            before += is_before ? e[i] : 0;
            e[i] = is_before ? 0 : e[i];
        }
        float mass = warp_sum(sum + before);
        if (threadIdx.x % 32 == 0) *(seen || is_first ? &segments[current] : &edges[0]) = Mass{shift, mass};
        ++current;
        sum = total(e);
    }

    __device__ void cut_often(float (&e)[8], u32 tile_end) {
        u32 lane = threadIdx.x % 32, before, all;
        u64 starts = starts_in_tile(flags, start, count, current, tile_end - TILE, before, all);
        u32 closing = current + before;
        // Until the lane's first start, and since its last one; segments between are whole.
        float lead = 0, running = 0, carried = warp_sum(sum);
#pragma unroll
        for (u32 i = 0, open = closing; i < 8; ++i) {
            if (starts >> 8 * i & 1) {
                if (open == closing) lead = running;
                else segments[open] = Mass{shift, running};
                ++open;
                running = 0;
            }
            running += e[i];
        }
        sum = running;
        bool cuts = starts != 0;
        if (lane == 0) (cuts ? lead : running) += carried;
        u32 reset = cuts;
#pragma unroll
        for (u32 d = 1; d < 32; d *= 2) {
            float other = __shfl_up_sync(ALL, running, d);
            u32 other_reset = __shfl_up_sync(ALL, reset, d);
            if (lane < d) continue;
            if (!reset) running += other;
            reset |= other_reset;
        }
        float open = __shfl_up_sync(ALL, running, 1);
        if (cuts) {
            Mass mass{shift, (lane == 0 ? 0 : open) + lead};
            *(before > 0 || seen || is_first ? &segments[closing] : &edges[0]) = mass;
        }
        u32 last = 31 - __clz(__ballot_sync(ALL, cuts));
        if (lane < last) sum = 0;
        current += all;
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

// Leaves only the lane's elements in from..to.
__device__ inline void mask(float (&x)[8], u32 at, u32 from, u32 to) {
    u32 real = inside(at, from, to);
#pragma unroll
    for (u32 i = 0; i < 8; ++i) x[i] = real >> i & 1 ? x[i] : LOWEST;
}

// Reads one slice of a row and writes its pieces. The row's layout comes while the first tiles are on their way.
template <class T>
__device__ void sum_slice(const Rows &job, u32 row_index, Row &row, u32 slice, const Reading &memory) {
    u32 skew, warp = threadIdx.x / 32;
    const T *base = row_base<T>(job, row_index, skew);
    u32 span = span_elements(job), lane = threadIdx.x % 32, index = slice * WARPS + warp;
    u32 from = index * span, end = skew + job.live, stop = min(from + span, end);
    Ring<T> ring(memory.ring, base, from, stop);
    row = job.rows[row_index];
    load_layout(job, row_index, row, skew, memory.start);
    if (from >= end) return copy_wait<0>();
    SpanSums sums;
    sums.edges = job.edges + ((u64)row_index * job.slices * WARPS + index) * 2;
    sums.segments = job.segments + row.first_segment;
    sums.start = memory.start;
    sums.flags = memory.flags + warp * TILE;
    sums.count = row.segments;
    sums.current = open_segment(memory.start, row.segments, from);
    sums.next = memory.start[sums.current + 1];
    sums.is_first = index == 0;
    float poison = 0;
    for (u32 first = from; first < stop; first += TILE) {
        u32 tile = first / TILE, at = first + lane * 8;
        float x[8];
        ring.take(tile, x);
        if (first < skew || first + TILE > end) mask(x, at, skew, end);
        if (first == from) {
            float top = LOWEST;
#pragma unroll
            for (u32 i = 0; i < 8; ++i) top = fmaxf(top, x[i]);
            sums.shift = warp_max(top);
        }
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
            poison += x[i] * 0.0f;
            x[i] = exp_near_zero(x[i] - sums.shift);
        }
        ring.ask(tile + Ring<T>::STAGES);
        if (first + TILE <= sums.next) sums.sum += SpanSums::total(x);
        else sums.cut(x, at, first + TILE);
    }
    copy_wait<0>();
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
