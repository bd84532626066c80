// Values of many adapters merged one by one, a value per thread; the same operations in the same order as
// cpu/adapters.rs, so that results are the same bits.
#include "device.cuh"

struct Merge {
    const u64 *adapters;     // [adapters] addresses of their values
    const double *weights;   // [adapters]; not read by a statistic
    const float *thresholds; // [adapters]; TIES only
    float *out;              // [count]
    u64 *bad;                // smallest index * adapters + adapter of a value that is not finite
    u64 *overflow;           // smallest index of a result that is not finite
    u64 count;
    u32 among; // adapters
    u32 rule;
    u32 dropped; // of a statistic: values at each end
    u32 padding;
};

constexpr u32 RULE_SUM = 0, RULE_ROBUST = 1, RULE_TIES = 2; // else SCE

// Negative zeros become positive.
template <class T> __device__ float value_of(const Merge &job, u32 adapter, u64 index) {
    return __fadd_rn(widen(((const T *)job.adapters[adapter])[index]), 0.0f);
}

template <class T> __device__ double sum(const Merge &job, u64 index) {
    double sum = 0;
    for (u32 i = 0; i < job.among; ++i) sum = __dadd_rn(sum, __dmul_rn(job.weights[i], (double)value_of<T>(job, i, index)));
    return sum;
}

// Sorts the thread's values in its column of shared memory.
template <class T> __device__ double statistic(const Merge &job, u64 index, float *column) {
    for (u32 i = 0; i < job.among; ++i) {
        float value = value_of<T>(job, i, index);
        u32 place = i;
        for (; place > 0 && column[(place - 1) * THREADS] > value; --place)
            column[place * THREADS] = column[(place - 1) * THREADS];
        column[place * THREADS] = value;
    }
    double sum = 0;
    for (u32 i = job.dropped; i < job.among - job.dropped; ++i) sum = __dadd_rn(sum, (double)column[i * THREADS]);
    return sum / (double)(job.among - 2 * job.dropped);
}

template <class T> __device__ double elect(const Merge &job, u64 index) {
    double plus = 0, minus = 0, up = 0, down = 0, up_weight = 0, down_weight = 0;
    for (u32 i = 0; i < job.among; ++i) {
        double value = value_of<T>(job, i, index), weight = job.weights[i], vote = 1;
        if (job.rule == RULE_TIES) {
            if (!(fabs(value) >= (double)job.thresholds[i])) value = 0;
            vote = weight;
        }
        if (value > 0) {
            plus = __dadd_rn(plus, __dmul_rn(vote, value));
            up = __dadd_rn(up, __dmul_rn(weight, value));
            up_weight = __dadd_rn(up_weight, weight);
        } else if (value < 0) {
            minus = __dadd_rn(minus, __dmul_rn(vote, value));
            down = __dadd_rn(down, __dmul_rn(weight, value));
            down_weight = __dadd_rn(down_weight, weight);
        }
    }
    double balance = __dadd_rn(plus, minus), weight = balance > 0 ? up_weight : down_weight;
    return balance == 0 || weight == 0 ? 0 : (balance > 0 ? up : down) / weight;
}

template <class T> __device__ void merge(const Merge &job) {
    DYNAMIC_SHARED(memory);
    u64 index = (u64)blockIdx.x * THREADS + threadIdx.x;
    if (index >= job.count) return;
    for (u32 i = 0; i < job.among; ++i) {
        if (fabsf(widen(((const T *)job.adapters[i])[index])) <= -LOWEST) continue;
        atomicMin(job.bad, index * job.among + i);
        return;
    }
    float result = (float)(job.rule == RULE_SUM      ? sum<T>(job, index)
                           : job.rule == RULE_ROBUST ? statistic<T>(job, index, (float *)memory + threadIdx.x)
                                                     : elect<T>(job, index));
    job.out[index] = result;
    if (!(fabsf(result) <= -LOWEST)) atomicMin(job.overflow, index);
}

extern "C" __global__ void __launch_bounds__(THREADS) merge_f32(Merge job) { merge<float>(job); }
extern "C" __global__ void __launch_bounds__(THREADS) merge_bf16(Merge job) { merge<Bf16>(job); }
extern "C" __global__ void __launch_bounds__(THREADS) merge_f16(Merge job) { merge<F16>(job); }
