// Records, branches and token bits from logits rows; the formulas are those of the crate's module `score`.
#include "segments.cuh"

struct SumShared {
    Reading reading;
    Mass *mass;

    __device__ SumShared(const Rows &job, u8 *memory) {
        u8 *rest = reading.lay(memory, job);
        mass = (Mass *)rest;
    }
};

// One block per row.
extern "C" __global__ void __launch_bounds__(THREADS) lay_out_rows(Rows job) {
    Row row = job.rows[blockIdx.x];
    lay_out(job, row, row_layout(job, blockIdx.x, row), job.owners + row.first_segment);
}

// One block per slice of a row.
template <class T> __device__ void sum_rows(const Rows &job) {
    DYNAMIC_SHARED(memory);
    SumShared shared(job, memory);
    u32 row_index = blockIdx.x / job.slices, slice = blockIdx.x % job.slices;
    Row row;
    sum_slice<T>(job, row_index, row, slice, shared.reading);
    if (!is_last(job, row_index)) return;
    finish_masses<T>(job, row_index, row, shared.reading.start, shared.mass);
    for (u32 i = threadIdx.x; i < row.segments; i += THREADS) job.segments[row.first_segment + i] = shared.mass[i];
}

extern "C" __global__ void __launch_bounds__(THREADS, 5) sum_rows_f32(Rows job) { sum_rows<float>(job); }
extern "C" __global__ void __launch_bounds__(THREADS, 5) sum_rows_bf16(Rows job) { sum_rows<Bf16>(job); }
extern "C" __global__ void __launch_bounds__(THREADS, 5) sum_rows_f16(Rows job) { sum_rows<F16>(job); }

struct ScoreRow {
    u32 position; // first of its output positions
    u32 bytes;    // of its token; 0 where the record ends
    u32 previous; // row of the token before, or NONE
    u32 padding;
};

struct Output {
    Rows rows;
    Rows branches;
    const ScoreRow *score;
    const u32 *branch;   // [positions] branch row, or NONE
    const u32 *observed; // [positions] observed byte, 256 at the end
    u32 slots;
    u32 fill_permille;
    u8 *symbols; // [positions, slots]
    u8 *codes;   // [positions, slots]
    u8 *end;     // [positions]
    u8 *tail;    // [positions]
    double *missed; // [positions] long share at a first byte, short share inside a token
};

__device__ inline u8 encode(double probability) {
    if (!(probability > 0)) return 255;
    double sixteenths = round(-16.0 * log2(probability));
    return (u8)fmin(fmax(sixteenths, 0.0), 255.0);
}

__device__ inline double relative(Mass mass, WideMass to) {
    return (double)mass.y * expf(mass.x - to.shift) / to.sum;
}

__device__ inline double share(double part, double whole) { return whole > 0 ? part / whole : 0; }

// Adds the children of a level to `byte_mass`, relative to `total`, by the whole block.
__device__ void spread(const Rows &job, u32 row_index, u32 depth, WideMass total, double *byte_mass) {
    Row row = job.rows[row_index];
    Level level = job.levels[row.first_level + depth];
    u32 stop;
    Node node = level_node(job, level, depth, stop);
    const Mass *mass = job.segments + row.first_segment;
    for (u32 child = threadIdx.x; child < node.children; child += THREADS)
        if (child != level.path)
            byte_mass[job.nodes[node.first_child + child].byte] = relative(mass[child_segment(level, stop, child)], total);
    if (level.path < node.children && threadIdx.x < 32) {
        u32 from, to, unused;
        level_range(job, row, depth + 1, from, to, unused);
        WideMass below = sum_segments(mass, from, to);
        if (threadIdx.x == 0)
            byte_mass[job.nodes[node.first_child + level.path].byte] =
                below.sum * expf(below.shift - total.shift) / total.sum;
    }
}

struct Selection {
    double mass[256]; // of every byte
    double listed_mass[256], sorted_mass[256], scratch[WARPS];
    u8 listed[256], sorted[256], keep[256];
    u32 counts[WARPS];
    u32 kept;
};

// Writes one position; thread b brings the mass of byte b. Symbols likeliest first until they and the end fill the
// position, as cpu/score.rs.
__device__ void write_position(const Output &out, u32 position, double own, double end, Selection &s) {
    u32 byte = threadIdx.x, lane = byte % 32, warp = byte / 32;
    double fill = out.fill_permille / 1000.0;
    double cutoff = fmax((1.0 - fill) / 256.0, 2.2250738585072014e-308);
    s.mass[byte] = own;
    s.keep[byte] = 0;
    u32 chosen = __ballot_sync(ALL, own >= cutoff);
    if (lane == 0) s.counts[warp] = __popc(chosen);
    __syncthreads();
    u32 count = 0, place = __popc(chosen & ((1u << lane) - 1));
    for (u32 i = 0; i < WARPS; ++i) {
        if (i < warp) place += s.counts[i];
        count += s.counts[i];
    }
    if (own >= cutoff) {
        s.listed_mass[place] = own;
        s.listed[place] = (u8)byte;
    }
    if (count == 0) {
        if (byte == 0) {
            u32 best = 0;
            for (u32 i = 1; i < 256; ++i)
                if (s.mass[i] > s.mass[best]) best = i;
            s.listed_mass[0] = s.mass[best];
            s.listed[0] = (u8)best;
        }
        count = 1;
    }
    __syncthreads();
    if (byte < count) {
        double mass = s.listed_mass[byte];
        u32 rank = 0;
        // Candidates are listed by byte, so a tie goes to the one that is listed first.
        for (u32 i = 0; i < count; ++i) {
            double other = s.listed_mass[i];
            rank += other > mass || (other == mass && i < byte);
        }
        s.sorted_mass[rank] = mass;
        s.sorted[rank] = s.listed[byte];
    }
    __syncthreads();
    if (byte == 0) {
        double filled = end;
        u32 kept = 0;
        while (kept < count && kept < out.slots && (kept == 0 || filled < fill)) {
            filled += s.sorted_mass[kept];
            s.keep[s.sorted[kept]] = 1;
            ++kept;
        }
        s.kept = kept;
    }
    __syncthreads();
    bool is_kept = s.keep[byte];
    u32 kept = __ballot_sync(ALL, is_kept);
    if (lane == 0) s.counts[warp] = __popc(kept);
    double tail = block_sum(is_kept ? 0 : own, s.scratch);
    u32 slot = __popc(kept & ((1u << lane) - 1));
    for (u32 i = 0; i < warp; ++i) slot += s.counts[i];
    u64 first = (u64)position * out.slots;
    if (is_kept) {
        out.symbols[first + slot] = (u8)byte;
        out.codes[first + slot] = encode(own);
        if (slot + 1 == s.kept)
            for (u32 i = s.kept; i < out.slots; ++i) {
                out.symbols[first + i] = (u8)byte;
                out.codes[first + i] = 255;
            }
    }
    if (byte == 0) {
        out.end[position] = encode(end);
        out.tail[position] = encode(tail);
    }
    __syncthreads();
}

// Mass of a level of a row, by the first warp, for the whole block.
__device__ WideMass level_mass(const Rows &job, u32 row_index, u32 depth, bool without_stop, Mass &stopped) {
    __shared__ WideMass result;
    __shared__ Mass stop_mass;
    Row row = job.rows[row_index];
    const Mass *mass = job.segments + row.first_segment;
    if (threadIdx.x < 32) {
        u32 from, to, stop;
        level_range(job, row, depth, from, to, stop);
        WideMass sum = sum_segments(mass, without_stop ? from + stop : from, to);
        if (threadIdx.x == 0) {
            result = sum;
            stop_mass = stop ? mass[from] : Mass{LOWEST, 0};
        }
    }
    __syncthreads();
    WideMass value = result;
    stopped = stop_mass;
    __syncthreads();
    return value;
}

// One block per row, one thread per byte.
extern "C" __global__ void __launch_bounds__(THREADS) write_records(Output out) {
    __shared__ double spreading[256], after[256];
    __shared__ Selection selection;
    u32 row_index = blockIdx.x, byte = threadIdx.x;
    ScoreRow score = out.score[row_index];
    Row row = out.rows.rows[row_index];
    const Mass *mass = out.rows.segments + row.first_segment;
    Mass stop;

    // Running on from the previous token, relative to its node.
    spreading[byte] = 0;
    __syncthreads();
    double stopped = 1, running = 0;
    if (score.previous != NONE) {
        Row previous = out.rows.rows[score.previous];
        u32 deepest = previous.levels - 1;
        if (out.rows.nodes[out.rows.levels[previous.first_level + deepest].node].children > 0) {
            WideMass all = level_mass(out.rows, score.previous, deepest, false, stop);
            stopped = relative(stop, all);
            spread(out.rows, score.previous, deepest, all, spreading);
            __syncthreads();
            running = spreading[byte];
        }
    }
    __syncthreads();
    spreading[byte] = 0;
    __syncthreads();
    WideMass total = level_mass(out.rows, row_index, 0, false, stop);
    spread(out.rows, row_index, 0, total, spreading);
    __syncthreads();
    double end = relative(mass[row.segments - 1], total) * stopped;
    double own = spreading[byte] * stopped + running;
    if (byte == out.observed[score.position]) out.missed[score.position] = share(running, own);
    write_position(out, score.position, own, end, selection);

    for (u32 depth = 1; depth < score.bytes; ++depth) {
        u32 position = score.position + depth, branch = out.branch[position];
        spreading[byte] = 0;
        after[byte] = 0;
        __syncthreads();
        WideMass all = level_mass(out.rows, row_index, depth, false, stop);
        double stopped = relative(stop, all);
        if (branch == NONE) {
            WideMass longer = level_mass(out.rows, row_index, depth, true, stop);
            spread(out.rows, row_index, depth, longer, spreading);
            __syncthreads();
            own = spreading[byte];
            end = 0;
            if (byte == 0) out.missed[position] = stopped;
        } else {
            spread(out.rows, row_index, depth, all, spreading);
            WideMass total = level_mass(out.branches, branch, 0, false, stop);
            spread(out.branches, branch, 0, total, after);
            __syncthreads();
            Row after_row = out.branches.rows[branch];
            double dropped = stopped * after[byte];
            own = spreading[byte] + dropped;
            end = stopped * relative(out.branches.segments[after_row.first_segment + after_row.segments - 1], total);
            if (byte == out.observed[position]) out.missed[position] = share(dropped, own);
        }
        write_position(out, position, own, end, selection);
    }
}

struct Branches {
    Rows rows;
    const ScoreRow *score;
    u32 *found; // [positions] rank of the likeliest token that spells an interior stop above the threshold, or NONE
    float threshold;
    u32 padding;
};

// One warp per row.
template <class T> __device__ void find_branches(const Branches &job) {
    u32 row_index = blockIdx.x * WARPS + threadIdx.x / 32;
    if (row_index >= job.rows.count) return;
    Row row = job.rows.rows[row_index];
    ScoreRow score = job.score[row_index];
    const Mass *mass = job.rows.segments + row.first_segment;
    u32 skew;
    const T *logits = row_base<T>(job.rows, row_index, skew) + skew;
    for (u32 depth = 1; depth < score.bytes; ++depth) {
        u32 from, to, stop;
        level_range(job.rows, row, depth, from, to, stop);
        WideMass all = sum_segments(mass, from, to);
        u32 rank = NONE;
        if (stop && relative(mass[from], all) > (double)job.threshold) {
            Node node = job.rows.nodes[job.rows.levels[row.first_level + depth].node];
            rank = node.start;
            for (u32 i = node.start + 1; i < node.stop; ++i)
                if (widen(logits[i]) > widen(logits[rank])) rank = i;
        }
        if (threadIdx.x % 32 == 0) job.found[score.position + depth] = rank;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) find_branches_f32(Branches job) { find_branches<float>(job); }
extern "C" __global__ void __launch_bounds__(THREADS) find_branches_bf16(Branches job) { find_branches<Bf16>(job); }
extern "C" __global__ void __launch_bounds__(THREADS) find_branches_f16(Branches job) { find_branches<F16>(job); }

struct TokenBits {
    Rows rows;
    double *bits; // [rows]
};

// Bits of every row's observed token, or of the end; one warp per row.
extern "C" __global__ void __launch_bounds__(THREADS) token_bits(TokenBits job) {
    u32 row_index = blockIdx.x * WARPS + threadIdx.x / 32;
    if (row_index >= job.rows.count) return;
    Row row = job.rows.rows[row_index];
    const Mass *mass = job.rows.segments + row.first_segment;
    WideMass all = sum_segments(mass, 0, row.segments);
    u32 deepest = row.first_level + row.levels - 1;
    Mass own = row.levels > 1 ? mass[job.rows.levels[deepest].left] : mass[row.segments - 1];
    if (threadIdx.x % 32 == 0)
        job.bits[row_index] = (log_mass(all.sum, all.shift) - log_mass(own.y, own.x)) / 0.6931471805599453;
}
