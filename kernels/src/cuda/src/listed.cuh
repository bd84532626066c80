// Terms of single columns: groups of listed tokens, and the largest logits of a row.
//
// A row's listed and largest columns were taken out of it (listed.cu): they have slots, and what is left of a segment has
// one coefficient. The mass that a ghost or a remainder asks for is then a sum, and never a difference. Standardised
// terms need no mass, and are done where the columns are taken out.
#pragma once
#include "terms.cuh"

// Owner of a slot whose column another slot has.
constexpr u32 SAME = 1u << 31;

// Shares whose distance is smaller, relative to the target, are summed again in f64: the sign of their difference hangs
// on more than what f32 tells. A share of nearly nothing or nearly all moves no logit, whatever its sign.
constexpr double UNCLEAR = 1e-5;
constexpr double IMMATERIAL = 1e-6;

// As the crate's module `loss` has them.
constexpr double EQUAL = 1e-9;
constexpr double EPSILON = 1e-3;

// What a column that was taken out leaves behind: the lowest value of its type.
template <class T> __device__ T blank();
template <> __device__ inline float blank<float>() { return LOWEST; }
template <> __device__ inline Bf16 blank<Bf16>() { return Bf16{0xff7f}; }
template <> __device__ inline F16 blank<F16>() { return F16{0xfbff}; }

// Slots of a row.
struct Slots {
    Slot *all;
    u32 listed, count;

    __device__ Slots(const Loss &job, const LossRow &row)
        : all(job.slots + row.first_slot), listed(row.listed), count(row.listed + row.top) {}

    __device__ Slot &top(u32 place) const {
        Slot &slot = all[listed + place];
        return slot.owner & SAME ? all[slot.owner & ~SAME] : slot;
    }
    __device__ float top_logit(u32 place) const { return all[listed + place].logit; }

    // Whether a slot is among the `places` largest of the row.
    __device__ bool is_among(u32 places, const Slot &slot) const {
        if (places == 0) return false;
        const Slot &last = all[listed + places - 1];
        return slot.logit > last.logit || (slot.logit == last.logit && slot.column <= last.column);
    }
};

// e^(logit - log mass)
__device__ inline double share_of(float logit, double log_mass) { return exp((double)logit - log_mass); }
__device__ inline float relative(float shift, double log_mass) { return expf((float)((double)shift - log_mass)); }

// Adds the columns that were taken out to the masses of their segments, and leaves what those are without them.
template <class In> __device__ void add_listed(const Slots &slots, const Row &row, LossShared &shared) {
    u32 lane = threadIdx.x % 32;
    const u32 *start = shared.reading.start;
    for (u32 i = threadIdx.x; i < row.segments; i += THREADS) {
        shared.rest[i] = shared.mass[i];
        shared.pull[i] = 0;
    }
    __syncthreads();
    // A warp takes all slots of a segment, at the first of them.
    for (u32 first = threadIdx.x / 32; first < slots.count; first += WARPS) {
        u32 owner = slots.all[first].owner;
        if (owner & SAME) continue;
        float top = LOWEST;
        u32 taken = 0;
        bool is_first = true;
        for (u32 i = lane; i < slots.count; i += 32) {
            if (slots.all[i].owner != owner) continue;
            is_first &= i >= first;
            top = fmaxf(top, slots.all[i].logit);
            ++taken;
        }
        if (__any_sync(ALL, !is_first)) continue;
        top = warp_max(top);
        taken = warp_sum(taken);
        Mass rest = shared.rest[owner];
        // What the blanks added is anything but zero only where the whole segment is as low as they are.
        rest.y -= (float)taken * expf(widen(blank<In>()) - rest.x);
        if (taken == start[owner + 1] - start[owner]) rest = Mass{LOWEST, 0};
        float shift = fmaxf(top, rest.x);
        double sum = 0;
        for (u32 i = lane; i < slots.count; i += 32)
            if (slots.all[i].owner == owner) sum += expf(slots.all[i].logit - shift);
        sum = warp_sum(sum) + (double)rest.y * expf(rest.x - shift);
        if (lane == 0) {
            shared.rest[owner] = rest;
            shared.mass[owner] = normalise(Mass{shift, (float)sum});
        }
    }
    __syncthreads();
}

// Mass of the rest of all segments and of the slots that `is_in` names; every warp does the same.
template <class Predicate>
__device__ WideMass mass_besides(const Slots &slots, const Row &row, const LossShared &shared, Predicate is_in) {
    u32 lane = threadIdx.x % 32;
    WideMass rest = sum_segments(shared.rest, 0, row.segments);
    float top = rest.shift;
    for (u32 i = lane; i < slots.count; i += 32)
        if (is_in(i)) top = fmaxf(top, slots.all[i].logit);
    top = warp_max(top);
    double sum = 0;
    for (u32 i = lane; i < slots.count; i += 32)
        if (is_in(i)) sum += expf(slots.all[i].logit - top);
    return WideMass{warp_sum(sum) + rest.sum * expf(rest.shift - top), top};
}

// Adds `amount` e^z to all columns of the row, relative to a mass.
__device__ inline void add_to_all(const Row &row, LossShared &shared, double amount, double log_mass) {
    for (u32 i = threadIdx.x; i < row.segments; i += THREADS)
        shared.coefficient[i] += (float)(amount * relative(shared.mass[i].x, log_mass));
}

// Adds it to the rest of all segments and to the slots that `is_in` names.
template <class Predicate>
__device__ void add_besides(const Slots &slots, const Row &row, LossShared &shared, double amount, double log_mass,
                            Predicate is_in) {
    for (u32 i = threadIdx.x; i < row.segments; i += THREADS)
        if (shared.rest[i].y > 0) shared.pull[i] += (float)(amount * relative(shared.rest[i].x, log_mass));
    for (u32 i = threadIdx.x; i < slots.count; i += THREADS)
        if (is_in(i)) slots.all[i].gradient += (float)(amount * share_of(slots.all[i].logit, log_mass));
}

// A softmax over the row whose classes are slots, and perhaps all that is in none of them.
__device__ inline double group_term(const Loss &job, const Slots &slots, const Row &row, const Term &term,
                                    LossShared &shared) {
    const WideMass &all = shared.levels[0].mass;
    double log_all = log_mass(all.sum, all.shift), loss = 0;
    const double *shares = job.shares + term.shares;
    const Class *classes = job.classes + term.classes;
    add_to_all(row, shared, term.weight, log_all);
    for (u32 c = threadIdx.x; c < term.slots; c += THREADS) {
        Class own = classes[c];
        double share = term.weight * shares[c], sum = 0;
        if (share == 0) continue;
        float top = LOWEST;
        for (u32 i = own.from; i < own.to; ++i) top = fmaxf(top, slots.all[i].logit);
        for (u32 i = own.from; i < own.to; ++i) sum += expf(slots.all[i].logit - top);
        double log_own = log_mass(sum, top);
        loss += share * (log_all - log_own);
        for (u32 i = own.from; i < own.to; ++i)
            slots.all[i].gradient -= (float)(share * share_of(slots.all[i].logit, log_own));
    }
    double ghost = term.weight * shares[term.slots];
    if (ghost == 0) return loss;
    auto is_ghost = [&](u32 i) {
        if (slots.all[i].owner & SAME) return false;
        if (i >= slots.listed) return true;
        u32 low = 0, high = term.slots;
        while (low < high) {
            u32 middle = (low + high) / 2;
            if (classes[middle].to <= i) low = middle + 1;
            else high = middle;
        }
        return low == term.slots || i < classes[low].from;
    };
    WideMass ghosts = mass_besides(slots, row, shared, is_ghost);
    double log_ghosts = log_mass(ghosts.sum, ghosts.shift);
    add_besides(slots, row, shared, -ghost, log_ghosts, is_ghost);
    return threadIdx.x == 0 ? loss + ghost * (log_all - log_ghosts) : loss;
}

// Slope of the distance of a share from its target: a sign.
__device__ inline double slope(double share, double target) {
    if (fabs(share - target) <= EQUAL * target) return 0;
    return share > target ? 1 : -1;
}

__device__ inline bool is_unclear(double share, double target) {
    return fabs(share - target) <= UNCLEAR * target && share * (1 - share) > IMMATERIAL;
}

// Sums over a whole row of e^(z - largest), in f64, of all columns that were not taken out.
template <class In>
__device__ double exact_rest(const Rows &rows, u32 row_index, const Slots &slots, float largest, double *scratch) {
    u32 skew;
    const In *row = row_base<In>(rows, row_index, skew) + skew;
    double sum = 0, low = share_of(widen(blank<In>()), largest);
    for (u32 at = threadIdx.x; at < rows.live; at += THREADS) sum += share_of(widen(row[at]), largest);
    for (u32 i = threadIdx.x; i < slots.count; i += THREADS)
        if (!(slots.all[i].owner & SAME)) sum -= low;
    return block_sum(sum, scratch);
}

// Distance of the row's largest probabilities and of the remainder from a sorted target.
template <class In>
__device__ double sorted_term(const Loss &job, u32 row_index, const Slots &slots, const Row &row, const Term &term,
                              LossShared &shared, RowTables &tables) {
    const WideMass &all = shared.levels[0].mass;
    const double *target = job.shares + term.shares;
    u32 lane = threadIdx.x % 32, places = min(term.slots, job.rows.live);
    auto is_other = [&](u32 i) { return !(slots.all[i].owner & SAME) && !slots.is_among(places, slots.all[i]); };
    double log_all = log_mass(all.sum, all.shift), rest = target[term.slots], other = 0;
    WideMass others = mass_besides(slots, row, shared, is_other);
    if (others.sum > 0) other = exp(log_mass(others.sum, others.shift) - log_all);
    bool needs_more = is_unclear(other, rest);
    for (u32 i = threadIdx.x; i < places; i += THREADS)
        needs_more |= is_unclear(share_of(slots.top_logit(i), log_all), target[i]);
    if (__syncthreads_or(needs_more)) {
        float largest = places > 0 ? slots.top_logit(0) : all.shift;
        double sum = exact_rest<In>(job.rows, row_index, slots, largest, tables.losses), in_places = 0;
        for (u32 i = threadIdx.x; i < slots.count; i += THREADS)
            if (is_other(i)) in_places += share_of(slots.all[i].logit, largest);
        sum += block_sum(in_places, tables.losses);
        in_places = 0;
        for (u32 i = threadIdx.x; i < places; i += THREADS) in_places += share_of(slots.top_logit(i), largest);
        double total = sum + block_sum(in_places, tables.losses);
        log_all = log_mass(total, largest);
        other = sum / total;
    }
    double pull = 0, loss = threadIdx.x == 0 ? fabs(other - rest) : 0;
    for (u32 i = lane; i < places; i += 32) {
        double share = share_of(slots.top_logit(i), log_all);
        pull += share * slope(share, target[i]);
    }
    pull = warp_sum(pull) + other * slope(other, rest);
    for (u32 i = threadIdx.x; i < term.slots; i += THREADS) {
        double share = i < places ? share_of(slots.top_logit(i), log_all) : 0;
        loss += fabs(share - target[i]);
        if (i < places) slots.top(i).gradient += (float)(term.weight * share * slope(share, target[i]));
    }
    add_besides(slots, row, shared, term.weight * slope(other, rest), log_all, is_other);
    add_to_all(row, shared, -term.weight * pull, log_all);
    return term.weight * loss;
}

// Coefficients of what is left of the segments, and the gradient of every slot, once all terms are added.
__device__ inline void close_listed(const Loss &job, const Slots &slots, const Row &row, const LossShared &shared) {
    for (u32 i = threadIdx.x; i < row.segments; i += THREADS) {
        Mass rest = shared.rest[i];
        float own = rest.y > 0 ? shared.coefficient[i] * expf(rest.x - shared.mass[i].x) + shared.pull[i] : 0;
        job.coefficients[row.first_segment + i] = Mass{rest.x, own * job.scale};
    }
    for (u32 i = threadIdx.x; i < slots.count; i += THREADS) {
        Slot &slot = slots.all[i];
        if (slot.owner & SAME) continue;
        float shared_part = shared.coefficient[slot.owner] * expf(slot.logit - shared.mass[slot.owner].x);
        slot.gradient = (slot.gradient + shared_part) * job.scale;
    }
}

// Writes the gradients of slots over what this warp wrote at from..to of a row.
template <class Out>
__device__ void write_listed(const Slots &slots, Out *out, u32 skew, u32 from, u32 to) {
    __syncwarp();
    for (u32 i = threadIdx.x % 32; i < slots.count; i += 32) {
        Quad slot = load_shared_result(slots.all + i);
        u32 at = skew + slot.x;
        if (!(slot.y & SAME) && at >= from && at < to) out[at] = narrow<Out>(__uint_as_float(slot.w));
    }
}
