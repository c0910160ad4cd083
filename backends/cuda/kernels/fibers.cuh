// Threads of a CUDA kernel as fibers of one thread of a CPU, for tests without a GPU: barriers and
// shuffles of warps are what they are on the device, and threads between two barriers run in an
// order of one's choice, so that a missing barrier shows. x86-64 or AArch64 with glibc.
#pragma once

#include <setjmp.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <deque>
#include <functional>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define PCC_PAUSE() pcc_host::pause()

struct pcc_dim { unsigned x, y, z; };
inline pcc_dim threadIdx, blockIdx, blockDim, gridDim;

namespace pcc_host {

constexpr size_t STACK = 256 * 1024;  // touched only where used

struct Fiber {
    ucontext_t begin;
    jmp_buf at;
    bool started = false;
    unsigned block = 0, thread = 0;
    char* stack = nullptr;
};

struct Barrier { unsigned arrived = 0; std::vector<Fiber*> waiting; };

inline std::vector<Fiber> fibers;
inline std::deque<Fiber*> ready;
inline std::vector<Barrier> blocks, warps;
inline std::vector<unsigned long long> slots;
inline Fiber* now = nullptr;
inline jmp_buf scheduler;
inline std::function<void()>* body = nullptr;
inline unsigned running = 0;
inline std::mt19937 order;

inline void leave() { if (!_setjmp(now->at)) _longjmp(scheduler, 1); }

inline void enter() {
    (*body)();
    --running;
    _longjmp(scheduler, 2);
}

inline void pause() { ready.push_back(now); leave(); }

inline void wait(Barrier& b, unsigned count) {
    if (++b.arrived < count) {
        b.waiting.push_back(now);
        leave();
        return;
    }
    b.arrived = 0;
    for (Fiber* f : b.waiting) ready.push_back(f);
    b.waiting.clear();
    pause();
}

inline unsigned warp_of(const Fiber* f) { return f->block * ((blockDim.x + 31) / 32) + f->thread / 32; }
inline void warp_wait() { wait(warps[warp_of(now)], 32); }

template <class T> T exchange(T x, unsigned from) {
    unsigned base = warp_of(now) * 32;
    memcpy(&slots[base + now->thread % 32], &x, sizeof x);
    warp_wait();
    T y;
    memcpy(&y, &slots[base + from], sizeof y);
    warp_wait();
    return y;
}

// 0 as they come, 1 the latest first, else shuffled by this seed. Returns false where threads wait
// for a barrier that others never reach.
inline bool run(unsigned grid, unsigned threads, unsigned seed, std::function<void()> f) {
    gridDim = {grid, 1, 1};
    blockDim = {threads, 1, 1};
    fibers.assign(grid * threads, Fiber());
    blocks.assign(grid, Barrier());
    warps.assign(grid * ((threads + 31) / 32), Barrier());
    slots.assign(warps.size() * 32, 0);
    ready.clear();
    order.seed(seed);
    body = &f;
    running = grid * threads;
    char* memory = (char*)malloc(fibers.size() * STACK);
    if (memory == nullptr) return false;
    for (unsigned i = 0; i < fibers.size(); ++i) {
        Fiber& one = fibers[i];
        one.block = i / threads;
        one.thread = i % threads;
        one.stack = memory + i * STACK;
        ready.push_back(&one);
    }
    while (!ready.empty()) {
        size_t pick = seed == 0 ? 0 : seed == 1 ? ready.size() - 1 : order() % ready.size();
        if (seed == 1 && order() % 8 == 0) pick = 0;  // who spins must not keep the others out
        now = ready[pick];
        ready.erase(ready.begin() + (long)pick);
        threadIdx = {now->thread, 0, 0};
        blockIdx = {now->block, 0, 0};
        if (_setjmp(scheduler)) continue;
        if (now->started) _longjmp(now->at, 1);
        now->started = true;
        getcontext(&now->begin);
        now->begin.uc_stack.ss_sp = now->stack;
        now->begin.uc_stack.ss_size = STACK;
        now->begin.uc_link = nullptr;
        makecontext(&now->begin, enter, 0);
        setcontext(&now->begin);
    }
    free(memory);
    return running == 0;
}

}  // namespace pcc_host

inline void __syncthreads() { pcc_host::wait(pcc_host::blocks[blockIdx.x], blockDim.x); }
inline void __syncwarp() { pcc_host::warp_wait(); }
inline void __threadfence() {}
template <class T> T atomicAdd(T* p, T x) { T old = *p; *p = old + x; return old; }
template <class T> T __shfl_sync(unsigned, T x, int from) {
    return pcc_host::exchange(x, (unsigned)from % 32);
}
template <class T> T __shfl_xor_sync(unsigned, T x, int mask) {
    return pcc_host::exchange(x, (pcc_host::now->thread % 32) ^ (unsigned)mask);
}
template <class T> T __shfl_up_sync(unsigned, T x, int d) {
    unsigned lane = pcc_host::now->thread % 32;
    return pcc_host::exchange(x, lane < (unsigned)d ? lane : lane - (unsigned)d);
}
inline float __uint_as_float(unsigned u) { float f; memcpy(&f, &u, 4); return f; }
inline unsigned __float_as_uint(float f) { unsigned u; memcpy(&u, &f, 4); return u; }

inline float half_bits_to_float(unsigned short h) {
    unsigned sign = (h & 0x8000u) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
    if (exponent == 0) {
        float x = (float)mantissa * 0x1p-24f;
        return sign ? -x : x;
    }
    return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}
inline unsigned short float_to_half_bits(float x) {
    unsigned u = __float_as_uint(x), sign = u >> 16 & 0x8000u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return (unsigned short)(sign | 0x7e00u);
    if (a >= 0x477ff000u) return (unsigned short)(sign | 0x7c00u);
    if (a < 0x38800000u) {  // subnormal: adding 0.5 rounds to multiples of 2^-24, ties to even
        unsigned r = __float_as_uint(__uint_as_float(a) + 0.5f) - 0x3f000000u;
        return (unsigned short)(sign | r);
    }
    a += 0xfffu + (a >> 13 & 1u);
    return (unsigned short)(sign | (a - 0x38000000u) >> 13);
}
inline float bfloat_bits_to_float(unsigned short h) { return __uint_as_float((unsigned)h << 16); }
inline unsigned short float_to_bfloat_bits(float x) {
    unsigned u = __float_as_uint(x);
    if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
    return (unsigned short)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}
