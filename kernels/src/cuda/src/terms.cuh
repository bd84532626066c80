// Terms whose classes are segments: the trie loss, and labels that a segment holds.
#pragma once
#include "segments.cuh"

constexpr u32 TERM_TRIE = 0;
constexpr u32 TERM_LABEL = 1;
// Terms of single columns, which are in listed.cuh.
constexpr u32 TERM_GROUP = 2;
constexpr u32 TERM_SORTED = 3;
constexpr u32 TERM_STANDARDISED = 4;

struct Term {
    u32 kind;
    float weight;
    u32 slots;                     // of a trie position, classes of a group, targets of a sorted term
    u32 symbols, codes, end, tail; // of a trie term: offsets into `columns` of the row's first position
    u32 segment;                   // of a label
    u32 shares;                    // of terms of single columns: offset into `shares`
    u32 classes;                   // of a group: offset into `classes`
};

struct LossRow {
    u32 first_term, terms;
    u32 previous;   // node of the token before, or NONE
    u32 first;      // first byte of the row's token, 256 where there is none
    u32 next;       // first byte of the next token, 256 where there is none
    u32 first_slot; // of the row's columns that are taken out
    u32 listed;     // columns that targets name, ascending
    u32 top;        // behind them, the row's largest, in descending order
};

// A column that was taken out of its row, so that all others of a segment have one coefficient.
struct alignas(16) Slot {
    u32 column;
    u32 owner; // its segment; of a largest column that is listed as well, SAME and the index of that slot
    float logit;
    float gradient;
};

// Slots of a class of a group.
struct Class {
    u32 from, to;
};

struct Loss {
    Rows rows;
    const LossRow *loss_rows;
    const Term *terms;
    const u8 *columns;
    const float *probability; // of every code; 0 for 255
    Slot *slots;
    const Class *classes;
    const double *shares; // of classes and of the ghost; of sorted targets and of the rest, or the temperature
    void *gradient;
    u64 gradient_stride;
    Mass *coefficients; // like rows.segments: shift and coefficient
    double *losses;     // [rows]
    u32 *ready;         // [rows], zero
    u32 *ticket;        // zero
    u32 lag;            // rows between a row's sums and its gradient
    float scale;        // of the gradient
    u32 most_listed;    // slots of a row's levels
    u32 candidates;     // among which the largest columns are found, a power of two
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
    Mass *rest; // of segments, without the columns that were taken out; only with such columns
    u32 *owner;
    float *coefficient;
    float *target; // of a term, by segment
    float *pull;   // what `coefficient` lacks for the rest, in its scale; only with columns taken out
    u8 *symbols;   // of a term, by level and slot
    u8 *codes;
    u8 *found;     // whether a symbol is a child of its node

    __device__ LossShared(const Loss &job, u8 *memory, bool is_listed) {
        const Rows &rows = job.rows;
        levels = (LevelState *)reading.lay(memory, rows);
        mass = (Mass *)(levels + rows.most_levels);
        rest = mass + rows.most_segments + 1;
        owner = (u32 *)(rest + (is_listed ? rows.most_segments : 0));
        coefficient = (float *)(owner + rows.most_segments);
        target = coefficient + rows.most_segments;
        pull = target + rows.most_segments;
        symbols = (u8 *)(pull + (is_listed ? rows.most_segments : 0));
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
__device__ inline void stage_term(const Loss &job, const Row &row, const Term &term, LossShared &shared, const RowTables &tables) {
    if (term.kind != TERM_TRIE) return;
    for (u32 i = threadIdx.x; i < row.levels * term.slots; i += THREADS) {
        shared.symbols[i] = job.columns[term.symbols + i];
        shared.codes[i] = job.columns[term.codes + i];
        shared.found[i] = 0;
    }
    for (u32 depth = threadIdx.x; depth < row.levels; depth += THREADS)
        shared.levels[depth].end = tables.probability[job.columns[term.end + depth]];
}

// Brings what the coefficients need that does not depend on the logits: all at once, so that the waits overlap.
__device__ inline void stage_row(const Loss &job, const LossRow &loss_row, const Row &row, LossShared &shared, RowTables &tables) {
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
__device__ inline float target_of(const LossRow &loss_row, const Row &row, const Term &term, u32 depth, u32 byte,
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
__device__ inline double trie_level(const Loss &job, const Row &row, const Term &term, u32 depth, LossShared &shared,
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
__device__ inline float trie_segment(u32 segment, const LossShared &shared) {
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
__device__ inline double trie_term(const Loss &job, const LossRow &loss_row, const Row &row, const Term &term, LossShared &shared,
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

__device__ inline double label_term(const Row &row, const Term &term, LossShared &shared) {
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
