// Losses and their gradients, in place; the formulas are those of the crate's module `loss`.
//
// Every segment has one coefficient, so that the gradient is exp(z - shift) * coefficient. One launch does all rows:
// blocks draw tickets in order. A row's slices are summed first; the last of them works out the coefficients; its
// gradient slices, a block of rows later, read the logits again, by then from the second-level cache. A ticket waits only
// for earlier tickets, which are running or done, so the launch needs no guarantee about how many blocks are resident.
#include "segments.cuh"

constexpr u32 TERM_LABEL = 1; // the others are trie terms

struct Term {
    u32 kind;
    float weight;
    u32 slots;
    u32 symbols, codes, end, tail; // offsets into `columns` of the row's first position
    u32 segment;                   // of a label
};

struct LossRow {
    u32 first_term, terms;
    u32 previous; // node of the token before, or NONE
    u32 first;    // first byte of the row's token, 256 where there is none
    u32 next;     // first byte of the next token, 256 where there is none
};

struct Loss {
    Rows rows;
    const LossRow *loss_rows;
    const Term *terms;
    const u8 *columns;
    const float *probability; // of every code; 0 for 255
    void *gradient;
    u64 gradient_stride;
    Mass *coefficients; // like rows.segments: shift and coefficient
    double *losses;     // [rows]
    u32 *ready;         // [rows], zero
    u32 *ticket;        // zero
    u32 lag;            // rows between a row's sums and its gradient
    float scale;        // of the gradient
};

struct LevelState {
    WideMass mass;
    double flat;       // weight / mass, zero where the node has no target
    double path_pull;  // weight * target of the path's child / its mass, in units of e^-pull_shift
    double inverse;    // 1 / sum of targets
    double stop;       // target of the stop, normalised
    float pull_shift;
    u32 padding;
};

struct LossShared {
    LevelState *levels;
    Mass *mass;
    float *values;
    u32 *start;
    u32 *owner;
    float *coefficient;

    __device__ LossShared(const Rows &job, u8 *memory) {
        levels = (LevelState *)memory;
        mass = (Mass *)(levels + job.most_levels);
        values = (float *)(mass + job.most_segments + 1);
        start = (u32 *)(values + WARPS * TILE);
        owner = start + job.most_segments + 2;
        coefficient = (float *)(owner + job.most_segments);
    }
};

// Slot of a byte at `depth` positions after the row's first, or NONE.
__device__ inline u32 slot_of(const Loss &job, const Term &term, u32 depth, u32 byte) {
    const u8 *symbols = job.columns + term.symbols + (u64)depth * term.slots;
    u32 low = 0, high = term.slots;
    while (low < high) {
        u32 middle = (low + high) / 2;
        if (symbols[middle] < byte) low = middle + 1;
        else high = middle;
    }
    return low < term.slots && symbols[low] == byte ? low : NONE;
}

__device__ inline double target_of(const Loss &job, const Term &term, u32 depth, u32 byte) {
    u32 slot = slot_of(job, term, depth, byte);
    return slot == NONE ? 0 : (double)job.probability[job.columns[term.codes + (u64)depth * term.slots + slot]];
}

__device__ inline u32 find_child(const Rows &job, const Node &node, u32 byte) {
    u32 low = 0, high = node.children;
    while (low < high) {
        u32 middle = (low + high) / 2;
        if (job.nodes[node.first_child + middle].byte < byte) low = middle + 1;
        else high = middle;
    }
    return low < node.children && job.nodes[node.first_child + low].byte == byte ? low : NONE;
}

// The block's work on the root of a trie term: coefficients of its own segments, and what it asks of the path.
__device__ double trie_root(const Loss &job, const LossRow &loss_row, const Row &row, const Term &term, LossShared &shared) {
    __shared__ u8 removed[256];
    __shared__ double scratch[WARPS];
    const Rows &rows = job.rows;
    Level level = rows.levels[row.first_level];
    Node root = rows.nodes[level.node];
    // What comes from memory is asked for before the first barrier, so that the waits overlap.
    u32 child = threadIdx.x, byte = 0, slot = NONE;
    bool is_child = child < root.children, is_ghost = false;
    double listed = 0, end = job.probability[job.columns[term.end]], spread = job.probability[job.columns[term.tail]];
    if (is_child) {
        byte = rows.nodes[root.first_child + child].byte;
        slot = slot_of(job, term, 0, byte);
        if (slot != NONE) listed = job.probability[job.columns[term.codes + slot]];
    }
    removed[threadIdx.x] = 0;
    __syncthreads();
    if (loss_row.previous != NONE) {
        Node previous = rows.nodes[loss_row.previous];
        for (u32 i = threadIdx.x; i < previous.children; i += THREADS) {
            u32 byte = rows.nodes[previous.first_child + i].byte;
            if (byte != loss_row.first) removed[byte] = 1;
        }
    }
    __syncthreads();

    double target = 0;
    float shift = LOWEST;
    double sum = 0;
    if (is_child) {
        is_ghost = slot == NONE && !removed[byte];
        if (!removed[byte]) target = listed;
        if (child == level.path) {
            shift = shared.levels[1].mass.shift;
            sum = shared.levels[1].mass.sum;
        } else {
            Mass mass = shared.mass[child_segment(level, 0, child)];
            shift = mass.x;
            sum = mass.y;
        }
    }
    float ghost_shift = block_max(is_ghost ? shift : LOWEST, scratch);
    double ghost_sum = block_sum(is_ghost ? sum * expf(shift - ghost_shift) : 0, scratch);
    double tail = ghost_sum > 0 ? spread : 0;
    double targets = block_sum(target, scratch) + end + tail;
    LevelState &state = shared.levels[0];
    if (targets <= 0) {
        if (threadIdx.x == 0) state.flat = state.path_pull = 0;
        return 0;
    }
    double weight = term.weight, log_all = log_mass(state.mass.sum, state.mass.shift), loss = 0;
    double flat = weight / state.mass.sum;
    if (is_child) {
        double pull = is_ghost ? weight * tail / targets / ghost_sum : weight * target / targets / sum;
        float pull_shift = is_ghost ? ghost_shift : shift;
        if (target > 0) loss += weight * target / targets * (log_all - log_mass(sum, shift));
        if (child == level.path) {
            state.path_pull = pull;
            state.pull_shift = pull_shift;
        } else {
            shared.coefficient[child_segment(level, 0, child)] +=
                (float)(flat * expf(shift - state.mass.shift) - pull * expf(shift - pull_shift));
        }
    }
    if (threadIdx.x == 0) {
        state.flat = flat;
        Mass mass = shared.mass[row.segments - 1];
        shared.coefficient[row.segments - 1] +=
            (float)(flat * expf(mass.x - state.mass.shift) - weight * end / targets / mass.y);
        if (end > 0) loss += weight * end / targets * (log_all - log_mass(mass.y, mass.x));
        if (tail > 0) loss += weight * tail / targets * (log_all - log_mass(ghost_sum, ghost_shift));
    }
    return loss;
}

// A warp's work on a node below the root: its loss, and what its segments need to know.
__device__ double trie_level(const Loss &job, const LossRow &loss_row, const Row &row, const Term &term, u32 depth,
                             LossShared &shared) {
    const Rows &rows = job.rows;
    u32 lane = threadIdx.x % 32, stop;
    Level level = rows.levels[row.first_level + depth];
    Node node = level_node(rows, level, depth, stop);
    bool is_deepest = depth + 1 == row.levels;
    u32 next = is_deepest ? loss_row.next : 256;
    const u8 *symbols = job.columns + term.symbols + (u64)depth * term.slots;
    const u8 *codes = job.columns + term.codes + (u64)depth * term.slots;
    LevelState &state = shared.levels[depth];
    double children = 0, rest = 0, weighted = 0;
    for (u32 i = lane; i < term.slots; i += 32) {
        if (i > 0 && symbols[i] == symbols[i - 1]) continue;
        double target = job.probability[codes[i]];
        u32 child = symbols[i] == next ? NONE : find_child(rows, node, symbols[i]);
        if (child == NONE) {
            rest += target;
        } else if (target > 0) {
            children += target;
            Mass mass = shared.mass[child_segment(level, stop, child)];
            const WideMass &below = shared.levels[child == level.path ? depth + 1 : depth].mass;
            weighted += target * (child == level.path ? log_mass(below.sum, below.shift) : log_mass(mass.y, mass.x));
        }
    }
    children = warp_sum(children);
    rest = stop ? warp_sum(rest) + (double)job.probability[job.columns[term.end + depth]] : 0;
    weighted = warp_sum(weighted);
    double targets = children + rest;
    bool active = targets > 0 && (!is_deepest || node.children > 0);
    if (lane != 0) return 0;
    if (!active) {
        state.flat = state.path_pull = state.inverse = state.stop = 0;
        return 0;
    }
    double weight = term.weight;
    state.flat = weight / state.mass.sum;
    state.inverse = 1 / targets;
    state.stop = rest / targets;
    state.path_pull = 0;
    if (!is_deepest) {
        const WideMass &below = shared.levels[depth + 1].mass;
        double target = target_of(job, term, depth, rows.nodes[node.first_child + level.path].byte);
        state.path_pull = weight * target / targets / below.sum;
        state.pull_shift = below.shift;
    }
    if (rest > 0) {
        Mass mass = shared.mass[level.left];
        weighted += rest * log_mass(mass.y, mass.x);
    }
    return weight * (log_mass(state.mass.sum, state.mass.shift) - weighted / targets);
}

// Coefficient of a segment below the root: what every node above it asks.
__device__ float trie_segment(const Loss &job, const LossRow &loss_row, const Row &row, const Term &term, u32 segment,
                              const LossShared &shared) {
    u32 depth = shared.owner[segment] / 512, symbol = shared.owner[segment] % 512;
    Mass mass = shared.mass[segment];
    double coefficient = 0;
    for (u32 i = 0; i < depth; ++i) {
        const LevelState &state = shared.levels[i];
        if (state.flat == 0) continue;
        coefficient += state.flat * expf(mass.x - state.mass.shift);
        if (state.path_pull > 0 || state.path_pull < 0) coefficient -= state.path_pull * expf(mass.x - state.pull_shift);
    }
    const LevelState &state = shared.levels[depth];
    if (state.flat == 0) return (float)coefficient;
    double target = 0;
    if (symbol == OWNER_STOP) target = state.stop;
    else if (depth + 1 < row.levels || symbol != loss_row.next)
        target = target_of(job, term, depth, symbol) * state.inverse;
    coefficient += state.flat * expf(mass.x - state.mass.shift) - term.weight * target / mass.y;
    return (float)coefficient;
}

// Coefficients and loss of a row whose masses are in shared memory.
__device__ void work_out(const Loss &job, u32 row_index, const Row &row, LossShared &shared) {
    __shared__ double scratch[WARPS];
    const Rows &rows = job.rows;
    LossRow loss_row = job.loss_rows[row_index];
    for (u32 depth = threadIdx.x / 32; depth < row.levels; depth += WARPS) {
        u32 from, to, stop;
        level_range(rows, row, depth, from, to, stop);
        WideMass mass = sum_segments(shared.mass, from, to);
        if (threadIdx.x % 32 == 0) shared.levels[depth].mass = mass;
    }
    for (u32 i = threadIdx.x; i < row.segments; i += THREADS) shared.coefficient[i] = 0;
    __syncthreads();
    WideMass all = shared.levels[0].mass;
    double loss = 0;
    for (u32 t = 0; t < loss_row.terms; ++t) {
        Term term = job.terms[loss_row.first_term + t];
        if (term.kind == TERM_LABEL) {
            for (u32 i = threadIdx.x; i < row.segments; i += THREADS) {
                Mass mass = shared.mass[i];
                double pull = i == term.segment ? 1.0 / mass.y : 0;
                shared.coefficient[i] += (float)(term.weight * (expf(mass.x - all.shift) / all.sum - pull));
                if (i == term.segment)
                    loss += term.weight * (log_mass(all.sum, all.shift) - log_mass(mass.y, mass.x));
            }
        } else {
            loss += trie_root(job, loss_row, row, term, shared);
            for (u32 depth = 1 + threadIdx.x / 32; depth < row.levels; depth += WARPS)
                loss += trie_level(job, loss_row, row, term, depth, shared);
            __syncthreads();
            for (u32 i = threadIdx.x; i < row.segments; i += THREADS)
                if (shared.owner[i] >= 512)
                    shared.coefficient[i] += trie_segment(job, loss_row, row, term, i, shared);
        }
        __syncthreads();
    }
    loss = block_sum(loss, scratch);
    for (u32 i = threadIdx.x; i < row.segments; i += THREADS)
        job.coefficients[row.first_segment + i] = Mass{shared.mass[i].x, shared.coefficient[i] * job.scale};
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        job.losses[row_index] = loss;
        store_release(&job.ready[row_index], 1);
    }
}

// Writes one slice of a row's gradient.
template <class In, class Out>
__device__ void write_gradient(const Loss &job, u32 row_index, const Row &row, u32 slice, LossShared &shared) {
    const Rows &rows = job.rows;
    u32 skew;
    const In *base = row_base<In>(rows, row_index, skew);
    Out *out = (Out *)job.gradient + row_index * job.gradient_stride - skew;
    u32 span = span_elements(rows), lane = threadIdx.x % 32;
    u32 from = (slice * WARPS + threadIdx.x / 32) * span, end = skew + rows.live, width = skew + rows.width;
    u32 stop = min(from + span, width), readable = min(stop, end);
    Batch<In> batch(base, from + lane * 8, readable);
    if (threadIdx.x == 0)
        while (load_acquire(&job.ready[row_index]) == 0) pause();
    __syncthreads();
    for (u32 i = threadIdx.x; i <= row.segments; i += THREADS)
        shared.mass[i] =
            i < row.segments ? load_shared_result(job.coefficients + row.first_segment + i) : Mass{0, 0};
    __syncthreads();
    if (from >= width) return;
    u32 current = open_segment(shared.start, row.segments, from + 1), until = shared.start[current + 1];
    Mass own = shared.mass[current];
    for (u32 tile = from; tile < stop; tile += BATCH<In> * TILE) {
#pragma unroll
        for (u32 b = 0; b < BATCH<In>; ++b) {
            u32 first = tile + b * TILE, at = first + lane * 8;
            if (first >= stop) break;
            float x[8];
            unpack(batch.tile[b], x);
            batch.tile[b] = load_raw(base, at + BATCH<In> * TILE, readable);
            if (first + TILE <= until && first >= skew) {
#pragma unroll
                for (u32 i = 0; i < 8; ++i) x[i] = own.y * exp_near_zero(x[i] - own.x);
                store_vector(out + at, x);
                continue;
            }
            u32 segment = open_segment(shared.start, row.segments, at + 1);
            own = shared.mass[segment];
            until = shared.start[segment + 1];
#pragma unroll
            for (u32 i = 0; i < 8; ++i) {
                if (until <= at + i) {
                    own = shared.mass[++segment];
                    until = shared.start[segment + 1];
                }
                // Behind the live columns, `own` is zero and the logit anything.
                x[i] = segment < row.segments ? own.y * exp_near_zero(x[i] - own.x) : 0;
            }
            current = __shfl_sync(ALL, segment, 31);
            current += shared.start[current + 1] <= first + TILE;
            own = shared.mass[current];
            until = shared.start[current + 1];
            u32 written = inside(at, skew, width);
            if (written == 0xff) {
                store_vector(out + at, x);
            } else {
#pragma unroll
                for (u32 i = 0; i < 8; ++i)
                    if (written >> i & 1) out[at + i] = narrow<Out>(x[i]);
            }
        }
    }
}

template <class In, class Out> __device__ void loss_rows(const Loss &job) {
    DYNAMIC_SHARED(memory);
    __shared__ u32 drawn;
    const Rows &rows = job.rows;
    LossShared shared(rows, memory);
    u32 block = job.lag * rows.slices, blocks = (rows.count + job.lag - 1) / job.lag;
    // The next ticket is drawn while this one is worked on. It waits for no one that waits for it: the lowest ticket
    // that is not done is being worked on.
    u32 upcoming = threadIdx.x == 0 ? atomicAdd(job.ticket, 1) : 0;
    for (;;) {
        __syncthreads();
        if (threadIdx.x == 0) drawn = upcoming;
        __syncthreads();
        u32 ticket = drawn;
        if (ticket >= block * (1 + 2 * blocks)) return;
        if (threadIdx.x == 0) upcoming = atomicAdd(job.ticket, 1);
        // The first block's sums, then in turn the next block's sums and a block's gradients.
        bool is_gradient = false;
        if (ticket >= block) {
            u32 rest = ticket - block;
            is_gradient = rest % 2 == 1;
            ticket = (is_gradient ? 0 : block) + rest / (2 * block) * block + rest % (2 * block) / 2;
        }
        u32 row_index = ticket / rows.slices, slice = ticket % rows.slices, skew;
        if (row_index >= rows.count) continue;
        Row row = rows.rows[row_index];
        row_base<In>(rows, row_index, skew);
        load_layout(rows, row_index, row, skew, shared.start);
        if (is_gradient) {
            write_gradient<In, Out>(job, row_index, row, slice, shared);
            continue;
        }
        sum_slice<In>(rows, row_index, row, slice, shared.start, shared.values);
        if (!is_last(rows, row_index)) continue;
        lay_out(rows, row, nullptr, shared.owner);
        finish_masses<In>(rows, row_index, row, shared.start, shared.mass);
        work_out(job, row_index, row, shared);
    }
}

#define LOSS(name, In, Out)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, 3) name(Loss job) { loss_rows<In, Out>(job); }

LOSS(loss_f32, float, float)
LOSS(loss_bf16, Bf16, Bf16)
LOSS(loss_f16, F16, F16)
LOSS(loss_f32_to_bf16, float, Bf16)
LOSS(loss_f32_to_f16, float, F16)
