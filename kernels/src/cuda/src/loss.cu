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
    u32 most_listed;    // slots of a row's levels
    u32 padding;
};

struct LevelState {
    WideMass mass;
    double flat;       // weight / mass, zero where the node has no target
    double inverse;    // weight / sum of targets
    double stop;       // target of the stop
    double path_pull;  // of the path's child, in units of e^-pull_shift
    double ghost_pull; // of the root's children that share the tail, in units of e^-ghost_shift
    float pull_shift, ghost_shift;
    float end;         // listed for the end of the record
    float path_target; // of the path's child
    u32 path;          // byte of the path's child, 256 without one
    u32 from, to;      // segments of the nested range
    u32 has_stop, is_leaf;
    u32 padding;
};

// Target of a child of the root that is not listed and not removed: it shares the tail.
constexpr float GHOST = -1;

struct LossShared {
    Reading reading;
    LevelState *levels;
    Mass *mass;
    u32 *owner;
    float *coefficient;
    float *target; // of a term, by segment
    u8 *symbols;   // of a term, by level and slot
    u8 *codes;
    u8 *found;     // whether a symbol is a child of its node

    __device__ LossShared(const Loss &job, u8 *memory) {
        const Rows &rows = job.rows;
        levels = (LevelState *)reading.lay(memory, rows);
        mass = (Mass *)(levels + rows.most_levels);
        owner = (u32 *)(mass + rows.most_segments + 1);
        coefficient = (float *)(owner + rows.most_segments);
        target = coefficient + rows.most_segments;
        symbols = (u8 *)(target + rows.most_segments);
        codes = symbols + job.most_listed;
        found = codes + job.most_listed;
    }
};

// What the targets of a row depend on, besides its masses.
struct RowTables {
    float probability[256]; // of every code
    u32 removed[8];         // bytes that extend the previous token, as bits
    double losses[WARPS];
};

// Brings a term's columns for a row.
__device__ void stage_term(const Loss &job, const Row &row, const Term &term, LossShared &shared, const RowTables &tables) {
    if (term.kind == TERM_LABEL) return;
    for (u32 i = threadIdx.x; i < row.levels * term.slots; i += THREADS) {
        shared.symbols[i] = job.columns[term.symbols + i];
        shared.codes[i] = job.columns[term.codes + i];
        shared.found[i] = 0;
    }
    for (u32 depth = threadIdx.x; depth < row.levels; depth += THREADS)
        shared.levels[depth].end = tables.probability[job.columns[term.end + depth]];
}

// Brings what the coefficients need that does not depend on the logits: all at once, so that the waits overlap.
__device__ void stage_row(const Loss &job, const LossRow &loss_row, const Row &row, LossShared &shared, RowTables &tables) {
    const Rows &rows = job.rows;
    u32 lane = threadIdx.x % 32;
    for (u32 i = threadIdx.x; i < row.segments; i += THREADS) shared.owner[i] = rows.owners[row.first_segment + i];
    for (u32 depth = threadIdx.x; depth < row.levels; depth += THREADS) {
        LevelState &state = shared.levels[depth];
        Level level = rows.levels[row.first_level + depth];
        bool is_deepest = depth + 1 == row.levels;
        u32 below = is_deepest ? level.node : rows.levels[row.first_level + depth + 1].node;
        Node node = level_node(rows, level, depth, state.has_stop);
        state.path = is_deepest ? 256 : rows.nodes[below].byte;
        state.is_leaf = node.children == 0;
        state.from = level.left;
        state.to = depth == 0    ? row.segments
                   : is_deepest ? level.left + state.has_stop + node.children
                                : level.right + node.children - level.path - 1;
    }
    if (threadIdx.x / 32 < WARPS - 1) return;
    if (lane < 8) tables.removed[lane] = 0;
    __syncwarp();
    if (loss_row.previous == NONE) return;
    Node previous = rows.nodes[loss_row.previous];
    for (u32 i = lane; i < previous.children; i += 32) {
        u32 byte = rows.nodes[previous.first_child + i].byte;
        if (byte != loss_row.first) atomicOr(&tables.removed[byte / 32], 1u << byte % 32);
    }
}

// Target of a child at a depth; a slot that names one is marked.
__device__ float target_of(const LossRow &loss_row, const Row &row, const Term &term, u32 depth, u32 byte,
                           LossShared &shared, const RowTables &tables) {
    if (depth == 0 && tables.removed[byte / 32] >> byte % 32 & 1) return 0;
    // Below the deepest node the next token's first byte is where this token stops.
    if (depth + 1 == row.levels && byte == loss_row.next) return 0;
    u32 first = depth * term.slots, low = first, high = first + term.slots;
    while (low < high) {
        u32 middle = (low + high) / 2;
        if (shared.symbols[middle] < byte) low = middle + 1;
        else high = middle;
    }
    if (low == first + term.slots || shared.symbols[low] != byte) return depth == 0 ? GHOST : 0;
    shared.found[low] = 1;
    return tables.probability[shared.codes[low]];
}

// What a warp knows of a node: sums over its children.
struct Children {
    double targets = 0;  // of listed children
    double weighted = 0; // target * log mass
    float ghost_shift = LOWEST;
    double ghosts = 0; // mass, in units of e^ghost_shift

    __device__ void add(float target, double sum, float shift) {
        if (target > 0) {
            targets += target;
            weighted += target * log_mass(sum, shift);
        }
    }
};

// The loss of a trie term at one node, by one warp, and what the node's segments need to know.
__device__ double trie_level(const Loss &job, const Row &row, const Term &term, u32 depth, LossShared &shared,
                             const RowTables &tables) {
    u32 lane = threadIdx.x % 32;
    LevelState &state = shared.levels[depth];
    const WideMass &below = shared.levels[depth + 1 < row.levels ? depth + 1 : depth].mass;
    bool has_path = state.path < 256, is_root = depth == 0;
    Children children;
    auto is_child = [&](u32 i) { return shared.owner[i] / 512 == depth && shared.owner[i] % 512 < OWNER_STOP; };
    for (u32 i = state.from + lane; i < state.to; i += 32) {
        if (!is_child(i)) continue;
        Mass mass = shared.mass[i];
        float target = shared.target[i];
        children.add(target, mass.y, mass.x);
        if (target < 0) children.ghost_shift = fmaxf(children.ghost_shift, mass.x);
    }
    float path_target = has_path ? state.path_target : 0;
    if (lane == 0) children.add(path_target, below.sum, below.shift);
    if (is_root) {
        float shift = warp_max(path_target < 0 ? fmaxf(children.ghost_shift, below.shift) : children.ghost_shift);
        for (u32 i = lane; i < row.segments; i += 32)
            if (is_child(i) && shared.target[i] < 0)
                children.ghosts += (double)shared.mass[i].y * expf(shared.mass[i].x - shift);
        if (lane == 0 && path_target < 0) children.ghosts += below.sum * expf(below.shift - shift);
        children.ghosts = warp_sum(children.ghosts);
        children.ghost_shift = shift;
    }
    double rest = 0;
    for (u32 i = lane; i < term.slots && !is_root && state.has_stop; i += 32) {
        u32 slot = depth * term.slots + i;
        bool is_repeated = i > 0 && shared.symbols[slot] == shared.symbols[slot - 1];
        if (!is_repeated && !shared.found[slot]) rest += tables.probability[shared.codes[slot]];
    }
    children.targets = warp_sum(children.targets);
    children.weighted = warp_sum(children.weighted);
    rest = is_root || state.has_stop ? warp_sum(rest) + state.end : 0;
    double tail = is_root && children.ghosts > 0 ? tables.probability[job.columns[term.tail]] : 0;
    double targets = children.targets + rest + tail;
    if (lane != 0) return 0;
    state.flat = state.inverse = state.stop = state.path_pull = state.ghost_pull = 0;
    if (!(targets > 0) || (!is_root && state.is_leaf)) return 0;
    state.flat = term.weight / state.mass.sum;
    state.inverse = term.weight / targets;
    state.stop = rest;
    state.ghost_shift = children.ghost_shift;
    if (tail > 0) {
        state.ghost_pull = state.inverse * tail / children.ghosts;
        children.weighted += tail * log_mass(children.ghosts, children.ghost_shift);
    }
    if (has_path) {
        state.pull_shift = path_target < 0 ? children.ghost_shift : below.shift;
        state.path_pull = path_target < 0 ? state.ghost_pull : state.inverse * path_target / below.sum;
    }
    if (rest > 0) {
        Mass mass = shared.mass[is_root ? row.segments - 1 : state.from];
        children.weighted += rest * log_mass(mass.y, mass.x);
    }
    return term.weight * (log_mass(state.mass.sum, state.mass.shift) - children.weighted / targets);
}

// Coefficient of a segment: what its own node and every node above it ask.
__device__ float trie_segment(u32 segment, const LossShared &shared) {
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
    coefficient += state.flat * expf(mass.x - state.mass.shift);
    double target = symbol < OWNER_STOP ? (double)shared.target[segment] : state.stop;
    coefficient -= target < 0 ? state.ghost_pull * expf(mass.x - state.ghost_shift) : state.inverse * target / mass.y;
    return (float)coefficient;
}

// Adds a trie term's coefficients; the term is staged.
__device__ double trie_term(const Loss &job, const LossRow &loss_row, const Row &row, const Term &term, LossShared &shared,
                            const RowTables &tables) {
    double loss = 0;
    for (u32 i = threadIdx.x; i < row.segments; i += THREADS) {
        u32 depth = shared.owner[i] / 512, symbol = shared.owner[i] % 512;
        if (symbol < OWNER_STOP) shared.target[i] = target_of(loss_row, row, term, depth, symbol, shared, tables);
    }
    for (u32 depth = threadIdx.x; depth < row.levels; depth += THREADS) {
        LevelState &state = shared.levels[depth];
        if (state.path < 256) state.path_target = target_of(loss_row, row, term, depth, state.path, shared, tables);
    }
    __syncthreads();
    for (u32 depth = threadIdx.x / 32; depth < row.levels; depth += WARPS)
        loss += trie_level(job, row, term, depth, shared, tables);
    __syncthreads();
    for (u32 i = threadIdx.x; i < row.segments; i += THREADS) shared.coefficient[i] += trie_segment(i, shared);
    return loss;
}

__device__ double label_term(const Row &row, const Term &term, LossShared &shared) {
    const WideMass &all = shared.levels[0].mass;
    double loss = 0;
    for (u32 i = threadIdx.x; i < row.segments; i += THREADS) {
        Mass mass = shared.mass[i];
        double pull = i == term.segment ? 1.0 / mass.y : 0;
        shared.coefficient[i] += (float)(term.weight * (expf(mass.x - all.shift) / all.sum - pull));
        if (i == term.segment) loss += term.weight * (log_mass(all.sum, all.shift) - log_mass(mass.y, mass.x));
    }
    return loss;
}

// Coefficients and loss of a row whose masses are in shared memory and whose first term is staged.
__device__ void work_out(const Loss &job, u32 row_index, const LossRow &loss_row, const Row &row, LossShared &shared,
                         RowTables &tables) {
    for (u32 depth = threadIdx.x / 32; depth < row.levels; depth += WARPS) {
        LevelState &state = shared.levels[depth];
        WideMass mass = sum_segments(shared.mass, state.from, state.to);
        if (threadIdx.x % 32 == 0) state.mass = mass;
    }
    for (u32 i = threadIdx.x; i < row.segments; i += THREADS) shared.coefficient[i] = 0;
    __syncthreads();
    double loss = 0;
    for (u32 t = 0; t < loss_row.terms; ++t) {
        Term term = job.terms[loss_row.first_term + t];
        if (t > 0) {
            __syncthreads();
            stage_term(job, row, term, shared, tables);
            __syncthreads();
        }
        loss += term.kind == TERM_LABEL ? label_term(row, term, shared)
                                        : trie_term(job, loss_row, row, term, shared, tables);
    }
    loss = warp_sum(loss);
    if (threadIdx.x % 32 == 0) tables.losses[threadIdx.x / 32] = loss;
    // A thread's own coefficients.
    for (u32 i = threadIdx.x; i < row.segments; i += THREADS)
        job.coefficients[row.first_segment + i] = Mass{shared.mass[i].x, shared.coefficient[i] * job.scale};
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        store_release(&job.ready[row_index], 1);
        loss = 0;
        for (u32 i = 0; i < WARPS; ++i) loss += tables.losses[i];
        job.losses[row_index] = loss;
    }
}

// Writes one slice of a row's gradient.
template <class In, class Out>
__device__ void write_gradient(const Loss &job, u32 row_index, u32 slice, LossShared &shared) {
    const Rows &rows = job.rows;
    const u32 *start = shared.reading.start;
    u32 skew, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const In *base = row_base<In>(rows, row_index, skew);
    Out *out = (Out *)job.gradient + row_index * job.gradient_stride - skew;
    u32 span = span_elements(rows), from = (slice * WARPS + warp) * span;
    u32 end = skew + rows.live, width = skew + rows.width, stop = min(from + span, width);
    Ring<In> ring(shared.reading.ring, base, from, min(stop, end));
    Row row = rows.rows[row_index];
    load_layout(rows, row_index, row, skew, shared.reading.start);
    if (threadIdx.x == 0)
        while (load_acquire(&job.ready[row_index]) == 0) pause();
    __syncthreads();
    for (u32 i = threadIdx.x; i <= row.segments; i += THREADS)
        shared.mass[i] =
            i < row.segments ? load_shared_result(job.coefficients + row.first_segment + i) : Mass{0, 0};
    __syncthreads();
    if (from >= width) return copy_wait<0>();
    u32 current = open_segment(start, row.segments, from + 1), until = start[current + 1];
    Mass own = shared.mass[current];
    for (u32 first = from; first < stop; first += TILE) {
        u32 tile = first / TILE, at = first + lane * 8;
        float x[8];
        ring.take(tile, x);
        if (first + TILE <= until) {
#pragma unroll
            for (u32 i = 0; i < 8; ++i) x[i] = own.y * exp_near_zero(x[i] - own.x);
        } else {
            u32 before, all;
            u64 starts = starts_in_tile(shared.reading.flags + warp * TILE, start, row.segments, current, first, before, all);
            u32 segment = current + before;
#pragma unroll
            for (u32 i = 0; i < 8; ++i) {
                segment += (u32)(starts >> 8 * i) & 1;
                Mass mass = shared.mass[segment];
                // Behind the live columns the coefficient is zero and the logit anything.
                x[i] = segment < row.segments ? mass.y * exp_near_zero(x[i] - mass.x) : 0;
            }
            current += all;
            current += start[current + 1] <= first + TILE;
            own = shared.mass[current];
            until = start[current + 1];
        }
        ring.ask(tile + Ring<In>::STAGES);
        u32 written = inside(at, skew, width);
        if (written == 0xff) {
            store_vector(out + at, x);
        } else {
#pragma unroll
            for (u32 i = 0; i < 8; ++i)
                if (written >> i & 1) out[at + i] = narrow<Out>(x[i]);
        }
    }
    copy_wait<0>();
}

template <class In, class Out> __device__ void loss_rows(const Loss &job) {
    DYNAMIC_SHARED(memory);
    __shared__ u32 drawn;
    __shared__ RowTables tables;
    const Rows &rows = job.rows;
    LossShared shared(job, memory);
    tables.probability[threadIdx.x] = job.probability[threadIdx.x];
    // The next ticket is drawn while this one is worked on. It waits for no one that waits for it: the lowest ticket
    // that is not done is being worked on.
    u32 upcoming = threadIdx.x == 0 ? atomicAdd(job.ticket, 1) : 0;
    for (;;) {
        __syncthreads();
        if (threadIdx.x == 0) drawn = upcoming;
        __syncthreads();
        u32 ticket = drawn, block = job.lag * rows.slices, blocks = (rows.count + job.lag - 1) / job.lag;
        if (ticket >= block * (1 + 2 * blocks)) return;
        if (threadIdx.x == 0) upcoming = atomicAdd(job.ticket, 1);
        // The first block's sums, then in turn the next block's sums and a block's gradients.
        bool is_gradient = false;
        if (ticket >= block) {
            u32 rest = ticket - block;
            is_gradient = rest % 2 == 1;
            ticket = (is_gradient ? 0 : block) + rest / (2 * block) * block + rest % (2 * block) / 2;
        }
        u32 row_index = ticket / rows.slices, slice = ticket % rows.slices;
        if (row_index >= rows.count) continue;
        if (is_gradient) {
            write_gradient<In, Out>(job, row_index, slice, shared);
            continue;
        }
        Row row;
        sum_slice<In>(rows, row_index, row, slice, shared.reading);
        if (!is_last(rows, row_index)) continue;
        LossRow loss_row = job.loss_rows[row_index];
        if (loss_row.terms > 0) stage_term(job, row, job.terms[loss_row.first_term], shared, tables);
        stage_row(job, loss_row, row, shared, tables);
        finish_masses<In>(rows, row_index, row, shared.reading.start, shared.mass);
        work_out(job, row_index, loss_row, row, shared, tables);
    }
}

#define LOSS(name, In, Out)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, 4) name(Loss job) { loss_rows<In, Out>(job); }

LOSS(loss_f32, float, float)
LOSS(loss_bf16, Bf16, Bf16)
LOSS(loss_f16, F16, F16)
LOSS(loss_f32_to_bf16, float, Bf16)
LOSS(loss_f32_to_f16, float, F16)
