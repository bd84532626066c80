// Losses of single columns, and what takes those out of their rows.
#include "loss.cuh"

// A logit above the complement of its column, so that keys are ordered as logits are, the lower column first on a tie.
__device__ inline u64 key_of(float logit, u32 column) {
    // Adding zero makes the two zeros equal.
    u32 bits = __float_as_uint(logit + 0.0f);
    bits = bits >> 31 ? ~bits : bits | 1u << 31;
    return (u64)bits << 32 | ~column;
}

__device__ inline float logit_of(u64 key) {
    u32 bits = (u32)(key >> 32);
    return __uint_as_float(bits >> 31 ? bits & ~(1u << 31) : ~bits);
}

// Sorts keys, the largest first; those behind `held` become zero, up to a power of two.
__device__ inline void sort_keys(u64 *keys, u32 held) {
    u32 count = 2;
    while (count < held) count *= 2;
    for (u32 i = held + threadIdx.x; i < count; i += THREADS) keys[i] = 0;
    for (u32 run = 2; run <= count; run *= 2)
        for (u32 step = run / 2; step > 0; step /= 2) {
            __syncthreads();
            for (u32 pair = threadIdx.x; pair < count / 2; pair += THREADS) {
                u32 low = 2 * pair - (pair & (step - 1));
                u64 a = keys[low], b = keys[low + step];
                bool is_falling = (low & run) == 0;
                if (a < b == is_falling) {
                    keys[low] = b;
                    keys[low + step] = a;
                }
            }
        }
    __syncthreads();
}

// Leaves the keys of a row's largest columns in order. Candidates are collected until there is no room for as many as a
// block reads at a time; the best of them then say what later ones have to be above.
template <class T> __device__ void find_top(const Loss &job, u32 row_index, u32 wanted, u64 *keys) {
    constexpr u32 ROUND = THREADS * 8;
    __shared__ u32 held;
    u32 skew;
    const T *base = row_base<T>(job.rows, row_index, skew);
    u32 end = skew + job.rows.live, now = 0;
    u64 least = 0;
    if (threadIdx.x == 0) held = 0;
    __syncthreads();
    for (u32 first = 0; first < end; first += ROUND) {
        u32 at = first + threadIdx.x * 8;
        Raw<T> raw;
        float x[8];
#pragma unroll
        for (u32 i = 0; i < Raw<T>::WORDS; ++i)
            raw.word[i] = at + i * Raw<T>::PER_WORD < end ? load16(base + at + i * Raw<T>::PER_WORD) : Quad{0, 0, 0, 0};
        unpack(raw, x);
        u32 real = inside(at, skew, end);
#pragma unroll
        for (u32 i = 0; i < 8; ++i) {
            u64 key = key_of(x[i], at + i - skew);
            if ((real >> i & 1) && key > least) keys[atomicAdd(&held, 1)] = key;
        }
        __syncthreads();
        now = held;
        __syncthreads();
        if (now + ROUND <= job.candidates) continue;
        sort_keys(keys, now);
        now = min(now, wanted);
        if (now == wanted) least = keys[wanted - 1];
        if (threadIdx.x == 0) held = now;
        __syncthreads();
    }
    sort_keys(keys, now);
}

// Segment of a column.
__device__ inline u32 segment_of(const Rows &rows, u32 row_index, const Row &row, u32 column) {
    return open_segment(row_layout(rows, row_index, row), row.segments, column + 1);
}

// Distance of the softmax of the row's largest logits, standardised, from that of a target; by one warp.
__device__ inline double standardised_term(const Loss &job, const Slots &slots, const Term &term) {
    u32 lane = threadIdx.x, places = term.slots;
    if (places == 0) return 0;
    const double *target = job.shares + term.shares;
    auto over_places = [&](auto value) {
        double own = 0;
        for (u32 i = lane; i < places; i += 32) own += value(i);
        return warp_sum(own);
    };
    float largest = slots.top_logit(0);
    double each = 1.0 / places;
    auto below = [&](u32 i) { return (double)slots.top_logit(i) - largest; };
    double mean = over_places(below) * each;
    double squares = over_places([&](u32 i) { return (below(i) - mean) * (below(i) - mean); });
    double deviation = sqrt(squares * each), scale = 1 / (deviation + EPSILON), steep = scale / target[places];
    auto mass = [&](u32 i) { return exp(below(i) * steep); };
    double unit = 1 / over_places(mass);
    auto sign = [&](double share, u32 i) { return slope(share, target[i]); };
    double pull = over_places([&](u32 i) { return mass(i) * unit * sign(mass(i) * unit, i); });
    auto by_score = [&](u32 i) { return mass(i) * unit * (sign(mass(i) * unit, i) - pull); };
    double centre = over_places(by_score) * each;
    double spread = over_places([&](u32 i) { return by_score(i) * (below(i) - mean); }) * each * scale;
    spread = deviation > 0 ? spread / deviation : 0;
    double loss = 0;
    for (u32 i = lane; i < places; i += 32) {
        double own = by_score(i) - centre - (below(i) - mean) * spread;
        slots.top(i).gradient += (float)(term.weight * steep * own);
        loss += fabs(mass(i) * unit - target[i]);
    }
    return term.weight * loss;
}

// One block per row: finds its largest columns, takes these and the listed ones out, and does its standardised terms.
template <class T> __device__ void take_row(const Loss &job) {
    DYNAMIC_SHARED(memory);
    const Rows &rows = job.rows;
    u64 *keys = (u64 *)memory;
    u32 row_index = blockIdx.x, skew;
    LossRow loss_row = job.loss_rows[row_index];
    Slots slots(job, loss_row);
    if (threadIdx.x == 0) job.losses[row_index] = 0;
    if (slots.count == 0) return;
    Row row = rows.rows[row_index];
    T *logits = (T *)row_base<T>(rows, row_index, skew) + skew;
    if (loss_row.top > 0) find_top<T>(job, row_index, loss_row.top, keys);
    for (u32 i = threadIdx.x; i < slots.count; i += THREADS) {
        Slot slot{slots.all[i].column, 0, 0, 0};
        if (i < slots.listed) {
            slot.owner = segment_of(rows, row_index, row, slot.column);
            slot.logit = widen(logits[slot.column]);
        } else {
            u64 key = keys[i - slots.listed];
            slot.column = ~(u32)key;
            slot.logit = logit_of(key);
            u32 low = 0, high = slots.listed;
            while (low < high) {
                u32 middle = (low + high) / 2;
                if (slots.all[middle].column < slot.column) low = middle + 1;
                else high = middle;
            }
            bool is_same = low < slots.listed && slots.all[low].column == slot.column;
            slot.owner = is_same ? SAME | low : segment_of(rows, row_index, row, slot.column);
        }
        slots.all[i] = slot;
        if (slot.owner & SAME) continue;
        logits[slot.column] = blank<T>();
        if (!(fabsf(slot.logit) <= -LOWEST)) atomicMin(rows.bad, (u64)row_index * rows.width + slot.column);
    }
    __syncthreads();
    if (threadIdx.x >= 32) return;
    double loss = 0;
    for (u32 t = 0; t < loss_row.terms; ++t) {
        Term term = job.terms[loss_row.first_term + t];
        if (term.kind == TERM_STANDARDISED) loss += standardised_term(job, slots, term);
        __syncwarp();
    }
    loss = warp_sum(loss);
    if (threadIdx.x == 0) job.losses[row_index] = loss;
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) take_f32(Loss job) { take_row<float>(job); }
extern "C" __global__ void __launch_bounds__(THREADS, 4) take_bf16(Loss job) { take_row<Bf16>(job); }
extern "C" __global__ void __launch_bounds__(THREADS, 4) take_f16(Loss job) { take_row<F16>(job); }

#define LOSS(name, In, Out)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS, 3) name(Loss job) { loss_rows<In, Out, true>(job); }

LOSS(listed_f32, float, float)
LOSS(listed_bf16, Bf16, Bf16)
LOSS(listed_f16, F16, F16)
LOSS(listed_f32_to_bf16, float, Bf16)
LOSS(listed_f32_to_f16, float, F16)
