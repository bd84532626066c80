// A libcuda.so.1 that runs the kernels on the host: the part of the driver interface that the crate uses.
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
#include "emulate.h"

#include <map>
#include <string>
#include <vector>

thread_local Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {
struct Barrier {
    u32 waiting = 0;
    u64 generation = 0;
};

struct Fiber {
    void *stack_pointer;
    bool done;
};

constexpr size_t STACK = 64 << 10;
constexpr size_t SHARED = 256 << 10;
thread_local std::vector<Fiber> fibers;
thread_local std::vector<u8> stacks;
thread_local std::vector<Quad> shared_memory;
thread_local std::vector<Barrier> warps;
thread_local Barrier block;
thread_local std::vector<u8> shown;
thread_local u32 alive, current;
thread_local u64 idle;
thread_local Kernel running;
thread_local void **running_arguments;
thread_local void *scheduler;

extern "C" void emulator_switch(void **from, void *to);
asm(R"(
.text
.globl emulator_switch
emulator_switch:
    pushq %rbx
    pushq %rbp
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbp
    popq %rbx
    ret
)");

void start_fiber() {
    running(running_arguments);
    fibers[current].done = true;
    --alive;
    idle = 0;
    if (alive > 0 && block.waiting == alive) {
        block.waiting = 0;
        ++block.generation;
    }
    for (;;) {
        void *unused;
        emulator_switch(&unused, scheduler);
    }
}

void wait(Barrier &barrier, u32 participants) {
    u64 generation = barrier.generation;
    if (++barrier.waiting == participants) {
        barrier.waiting = 0;
        ++barrier.generation;
        idle = 0;
        return;
    }
    while (barrier.generation == generation) {
        check(++idle < 4000000, "a collective that not every thread reaches");
        yield();
    }
}

void run_block(u32 threads) {
    fibers.assign(threads, {});
    stacks.resize(threads * STACK);
    warps.assign((threads + 31) / 32, {});
    shown.resize(threads * 64);
    block = {};
    alive = threads;
    idle = 0;
    for (u32 i = 0; i < threads; ++i) {
        auto *top = (void **)(((uintptr_t)&stacks[(i + 1) * STACK] & ~(uintptr_t)15) - 16);
        *top = (void *)start_fiber;
        fibers[i] = {top - 6, false};
    }
    for (u32 i = 0; alive > 0; i = (i + 1) % threads) {
        if (fibers[i].done) continue;
        current = i;
        threadIdx = {i, 0, 0};
        emulator_switch(&scheduler, fibers[i].stack_pointer);
    }
}

std::map<std::string, Kernel> &kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}
} // namespace

u8 *dynamic_memory() { return (u8 *)shared_memory.data(); }
void yield() {
    u32 own = current;
    emulator_switch(&fibers[own].stack_pointer, scheduler);
}
void wait_for_warp() { wait(warps[threadIdx.x / 32], 32); }
void wait_for_block() { wait(block, alive); }
u8 *exchange(u32 lane) { return &shown[(threadIdx.x / 32 * 32 + lane) * 64]; }
Registered::Registered(const char *name, Kernel kernel) { kernels()[name] = kernel; }
} // namespace emulator

using Status = int;
using Handle = void *;
extern "C" {
Status cuInit(u32) { return 0; }
Status cuDriverGetVersion(int *version) { return *version = 12040, 0; }
Status cuDeviceGetCount(int *count) { return *count = 1, 0; }
Status cuDeviceGet(int *device, int) { return *device = 0, 0; }
Status cuDeviceGetName(char *name, int size, int) { return std::snprintf(name, (size_t)size, "emulator"), 0; }
Status cuDeviceGetUuid(void *, int) { return 0; }
Status cuDeviceTotalMem_v2(size_t *bytes, int) { return *bytes = 1 << 30, 0; }
Status cuDeviceGetAttribute(int *value, int attribute, int) {
    switch (attribute) {
    case 16: *value = 3; break;           // multiprocessors
    case 75: *value = 8; break;           // compute capability, major
    case 76: *value = 0; break;           // minor
    case 81: *value = 228 << 10; break;   // shared memory per multiprocessor
    case 97: *value = 160 << 10; break;   // shared memory per block, opted into
    case 115: *value = 0; break;          // memory pools
    default: *value = 0;
    }
    return 0;
}
Status cuDevicePrimaryCtxRetain(Handle *context, int) { return *context = (Handle)1, 0; }
Status cuDevicePrimaryCtxRelease_v2(int) { return 0; }
thread_local Handle context = nullptr;
Status cuCtxSetCurrent(Handle to) { return context = to, 0; }
Status cuCtxGetCurrent(Handle *to) { return *to = context, 0; }
Status cuCtxGetDevice(int *device) { return *device = 0, 0; }
Status cuCtxSynchronize() { return 0; }
Status cuMemGetInfo_v2(size_t *free, size_t *total) { return *free = *total = 1 << 30, 0; }
Status cuModuleLoadData(Handle *module, const void *) { return *module = (Handle)1, 0; }
Status cuModuleLoadDataEx(Handle *module, const void *, u32, void *, void *) { return *module = (Handle)1, 0; }
Status cuModuleUnload(Handle) { return 0; }
Status cuModuleGetFunction(Handle *function, Handle, const char *name) {
    auto found = emulator::kernels().find(name);
    if (found == emulator::kernels().end()) return 500;
    return *function = (Handle)found->second, 0;
}
Status cuFuncSetAttribute(Handle, int, int) { return 0; }
Status cuFuncGetAttribute(int *value, int, Handle) { return *value = 0, 0; }
Status cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, Handle, int, size_t, u32) {
    return *blocks = 2, 0;
}
Status cuStreamCreate(Handle *stream, u32) { return *stream = (Handle)1, 0; }
Status cuStreamDestroy_v2(Handle) { return 0; }
Status cuStreamSynchronize(Handle) { return 0; }
Status cuStreamWaitEvent(Handle, Handle, u32) { return 0; }
Status cuEventCreate(Handle *event, u32) { return *event = (Handle)1, 0; }
Status cuEventRecord(Handle, Handle) { return 0; }
Status cuEventDestroy_v2(Handle) { return 0; }
Status cuEventSynchronize(Handle) { return 0; }
Status cuEventElapsedTime(float *ms, Handle, Handle) { return *ms = 1, 0; }
Status cuMemAlloc_v2(u64 *pointer, size_t bytes) {
    // Filled with a pattern, so that nothing reads zeros that nobody wrote.
    void *p = std::aligned_alloc(256, (bytes + 255) / 256 * 256 + 256);
    std::memset(p, 0xa5, bytes);
    return *pointer = (u64)p, 0;
}
Status cuMemAllocAsync(u64 *pointer, size_t bytes, Handle) { return cuMemAlloc_v2(pointer, bytes); }
Status cuMemFree_v2(u64 pointer) { return std::free((void *)pointer), 0; }
Status cuMemFreeAsync(u64 pointer, Handle) { return cuMemFree_v2(pointer); }
Status cuMemcpyHtoD_v2(u64 to, const void *from, size_t bytes) { return std::memcpy((void *)to, from, bytes), 0; }
Status cuMemcpyHtoDAsync_v2(u64 to, const void *from, size_t bytes, Handle) { return cuMemcpyHtoD_v2(to, from, bytes); }
Status cuMemcpyDtoH_v2(void *to, u64 from, size_t bytes) { return std::memcpy(to, (void *)from, bytes), 0; }
Status cuMemcpyDtoHAsync_v2(void *to, u64 from, size_t bytes, Handle) { return cuMemcpyDtoH_v2(to, from, bytes); }
Status cuMemcpyDtoDAsync_v2(u64 to, u64 from, size_t bytes, Handle) {
    return std::memcpy((void *)to, (void *)from, bytes), 0;
}
Status cuMemsetD8_v2(u64 to, u8 value, size_t bytes) { return std::memset((void *)to, value, bytes), 0; }
Status cuMemsetD8Async(u64 to, u8 value, size_t bytes, Handle) { return cuMemsetD8_v2(to, value, bytes); }
Status cuGetErrorName(int, const char **text) { return *text = "EMULATOR", 0; }
Status cuGetErrorString(int, const char **text) { return *text = "emulator error", 0; }

Status cuLaunchKernel(Handle function, u32 gx, u32 gy, u32 gz, u32 bx, u32, u32, u32 shared, Handle, void **arguments,
                      void **) {
    if (shared > emulator::SHARED) return 1;
    emulator::shared_memory.resize(emulator::SHARED / sizeof(Quad));
    gridDim = {gx, gy, gz};
    blockDim = {bx, 1, 1};
    emulator::running = (emulator::Kernel)function;
    emulator::running_arguments = arguments;
    for (u32 y = 0; y < gy; ++y)
        for (u32 x = 0; x < gx; ++x) {
            blockIdx = {x, y, 0};
            emulator::run_block(bx);
        }
    return 0;
}
}
