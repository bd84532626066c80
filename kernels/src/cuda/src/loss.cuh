// Losses and their gradients, in place; the formulas are those of the crate's module `loss`.
//
// Every segment has one coefficient, so that the gradient is exp(z - shift) * coefficient. One launch does all rows:
// blocks draw tickets in order. A row's slices are summed first; the last of them works out the coefficients; its
// gradient slices, a block of rows later, read the logits again, by then from the second-level cache. A ticket waits only
// for earlier tickets, which are running or done, so the launch needs no guarantee about how many blocks are resident.
//
// Where terms ask for single columns (LISTED), a launch before this one has taken them out of their rows. Their masses
// are added to those of their segments, and each has a gradient of its own, which is written over what the slice wrote.
#pragma once
#include "listed.cuh"

// Loss of a staged term, whose coefficients are added.
template <class In, bool LISTED>
__device__ double add_term(const Loss &job, u32 row_index, const LossRow &loss_row, const Row &row, const Term &term,
                           LossShared &shared, RowTables &tables) {
    if (term.kind == TERM_LABEL) return label_term(row, term, shared);
    if constexpr (LISTED) {
        Slots slots(job, loss_row);
        if (term.kind == TERM_GROUP) return group_term(job, slots, row, term, shared);
        if (term.kind == TERM_SORTED) return sorted_term<In>(job, row_index, slots, row, term, shared, tables);
        if (term.kind == TERM_STANDARDISED) return 0;
    }
    return trie_term(job, loss_row, row, term, shared, tables);
}

// Coefficients and loss of a row whose masses are in shared memory and whose first term is staged.
template <class In, bool LISTED>
__device__ void work_out(const Loss &job, u32 row_index, const LossRow &loss_row, const Row &row, LossShared &shared,
                         RowTables &tables) {
    if constexpr (LISTED) add_listed<In>(Slots(job, loss_row), row, shared);
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
        loss += add_term<In, LISTED>(job, row_index, loss_row, row, term, shared, tables);
    }
    loss = warp_sum(loss);
    if (threadIdx.x % 32 == 0) tables.losses[threadIdx.x / 32] = loss;
    if constexpr (LISTED) {
        __syncthreads();
        close_listed(job, Slots(job, loss_row), row, shared);
    } else {
        // A thread's own coefficients.
        for (u32 i = threadIdx.x; i < row.segments; i += THREADS)
            job.coefficients[row.first_segment + i] = Mass{shared.mass[i].x, shared.coefficient[i] * job.scale};
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        store_release(&job.ready[row_index], 1);
        loss = 0;
        for (u32 i = 0; i < WARPS; ++i) loss += tables.losses[i];
        job.losses[row_index] = LISTED ? job.losses[row_index] + loss : loss;
    }
}

// Writes one slice of a row's gradient.
template <class In, class Out, bool LISTED>
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
    if constexpr (LISTED) write_listed<Out>(Slots(job, job.loss_rows[row_index]), out, skew, from, stop);
}

template <class In, class Out, bool LISTED> __device__ void loss_rows(const Loss &job) {
    DYNAMIC_SHARED(memory);
    __shared__ u32 drawn;
    __shared__ RowTables tables;
    const Rows &rows = job.rows;
    LossShared shared(job, memory, LISTED);
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
            write_gradient<In, Out, LISTED>(job, row_index, slice, shared);
            continue;
        }
        Row row;
        sum_slice<In>(rows, row_index, row, slice, shared.reading);
        if (!is_last(rows, row_index)) continue;
        LossRow loss_row = job.loss_rows[row_index];
        if (loss_row.terms > 0) stage_term(job, row, job.terms[loss_row.first_term], shared, tables);
        stage_row(job, loss_row, row, shared, tables);
        finish_masses<In>(rows, row_index, row, shared.reading.start, shared.mass);
        work_out<In, LISTED>(job, row_index, loss_row, row, shared, tables);
    }
}
