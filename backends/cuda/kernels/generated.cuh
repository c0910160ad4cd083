// What generated kernels are made of: lanes of a warp hold a row, value j in lane j % 32, register
// j / 32. With PCC_HOST the same text is C++: fibers.cuh runs its threads one after another.
#pragma once

#ifdef PCC_HOST
#include "fibers.cuh"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define PCC_PAUSE() __nanosleep(20)
#endif
#include <math.h>

#define PCC_UNROLL _Pragma("unroll")
#define PCC_UNROLL_8 _Pragma("unroll 8")

namespace pcc_generated {

constexpr unsigned ALL = 0xffffffffu;
constexpr float LOWEST = -3.4e38f;  // stands in for -inf where a difference would make a NaN

__device__ inline float shift_of(float top) { return top == -INFINITY ? 0.0f : top; }

__device__ inline int clamp_index(long long i, int last) {
    return i < 0 ? 0 : (i > last ? last : (int)i);
}

// ---------------------------------------------------------------- stored halves

#ifdef PCC_HOST
inline float from_f16(unsigned short h) { return half_bits_to_float(h); }
inline unsigned short to_f16(float x) { return float_to_half_bits(x); }
inline float from_bf16(unsigned short h) { return bfloat_bits_to_float(h); }
inline unsigned short to_bf16(float x) { return float_to_bfloat_bits(x); }
#else
__device__ inline float from_f16(unsigned short h) { return __half2float(__ushort_as_half(h)); }
__device__ inline unsigned short to_f16(float x) { return __half_as_ushort(__float2half_rn(x)); }
__device__ inline float from_bf16(unsigned short h) {
    return __bfloat162float(__ushort_as_bfloat16(h));
}
__device__ inline unsigned short to_bf16(float x) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}
#endif

// Eight neighbours in memory, of which the first lies at a multiple of 16 bytes: one load of halves,
// two of floats. A warp then has 512 bytes of weights on the way at once instead of 64.
struct Eight { float x[8]; };

#ifdef PCC_HOST
inline Eight eight_f32(const float* p) {
    Eight y;
    for (int i = 0; i < 8; ++i) y.x[i] = p[i];
    return y;
}
template <float (*From)(unsigned short)> inline Eight eight_halves(const unsigned short* p) {
    Eight y;
    for (int i = 0; i < 8; ++i) y.x[i] = From(p[i]);
    return y;
}
#else
__device__ inline Eight eight_f32(const float* p) {
    const float4 a = ((const float4*)p)[0], b = ((const float4*)p)[1];
    return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}
template <float (*From)(unsigned short)>
__device__ inline Eight eight_halves(const unsigned short* p) {
    const uint4 q = *(const uint4*)p;
    const unsigned words[4] = {q.x, q.y, q.z, q.w};
    Eight y;
    PCC_UNROLL for (int i = 0; i < 8; ++i) {
        y.x[i] = From((unsigned short)(words[i / 2] >> 16 * (i % 2)));
    }
    return y;
}
#endif
__device__ inline Eight eight_f16(const unsigned short* p) { return eight_halves<from_f16>(p); }
__device__ inline Eight eight_bf16(const unsigned short* p) { return eight_halves<from_bf16>(p); }

__device__ inline float round_f16(float x) { return from_f16(to_f16(x)); }
__device__ inline float round_bf16(float x) { return from_bf16(to_bf16(x)); }

// ---------------------------------------------------------------- warps and the grid

template <class T> struct Sum { __device__ static T of(T a, T b) { return a + b; } };
template <class T> struct Product { __device__ static T of(T a, T b) { return a * b; } };
template <class T> struct Largest { __device__ static T of(T a, T b) { return a > b ? a : b; } };

template <template <class> class Op, class T> __device__ inline T warp_all(T x) {
    for (int d = 16; d > 0; d >>= 1) x = Op<T>::of(x, __shfl_xor_sync(ALL, x, d));
    return x;
}

__device__ inline int warp_least(int x) {
    for (int d = 16; d > 0; d >>= 1) {
        int y = __shfl_xor_sync(ALL, x, d);
        x = y < x ? y : x;
    }
    return x;
}

// Where a team begins with the next job: jobs of one phase go to different warps.
__device__ inline int turn(int warp, int warps, int taken) {
    int at = warp - taken % warps;
    return at < 0 ? at + warps : at;
}

// All blocks have arrived `round` times. What was written before is seen after.
__device__ inline void grid_barrier(unsigned* state, unsigned round) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(state, 1u);
        while (*(volatile unsigned*)state < round * gridDim.x) PCC_PAUSE();
        __threadfence();
    }
    __syncthreads();
}

// The last block to leave sets the counters to zero for the next launch.
__device__ inline void grid_leave(unsigned* state) {
    if (threadIdx.x == 0 && atomicAdd(state + 1, 1u) == gridDim.x - 1) {
        state[0] = 0;
        state[1] = 0;
        __threadfence();
    }
}

// ---------------------------------------------------------------- rows

// Long rows stay in loops: they do not fit into registers anyway.
#define PCC_REGISTERS(k) _Pragma("unroll (K <= 40 ? K : 1)") for (int k = 0; k < K; ++k)

template <template <class> class Op, class T, int K> __device__ inline T all_of(const T (&r)[K]) {
    T x = r[0];
    PCC_REGISTERS(k) if (k > 0) x = Op<T>::of(x, r[k]);
    return warp_all<Op, T>(x);
}

// log sum exp; -inf beyond the row.
template <int K> __device__ inline float row_lse(const float (&r)[K]) {
    float top = shift_of(all_of<Largest>(r)), s = 0.0f;
    PCC_REGISTERS(k) s += expf(r[k] - top);
    return logf(warp_all<Sum>(s)) + top;
}

// A row of -inf gives equal shares.
template <int K, int V> __device__ inline void row_softmax(float (&r)[K], int lane) {
    float top = fmaxf(all_of<Largest>(r), LOWEST), s = 0.0f;
    PCC_REGISTERS(k) {
        r[k] = lane + 32 * k < V ? expf(fmaxf(r[k], LOWEST) - top) : 0.0f;
        s += r[k];
    }
    s = warp_all<Sum>(s);
    PCC_REGISTERS(k) r[k] = r[k] / s;
}

template <int K> __device__ inline void row_log_softmax(float (&r)[K]) {
    float top = shift_of(all_of<Largest>(r)), s = 0.0f;
    PCC_REGISTERS(k) {
        r[k] -= top;
        s += expf(r[k]);
    }
    s = logf(warp_all<Sum>(s));
    PCC_REGISTERS(k) r[k] = s == -INFINITY ? s : r[k] - s;
}

// Running sums of one number a lane, inclusive.
template <class T> __device__ inline T warp_scan(T x, int lane) {
    for (int d = 1; d < 32; d <<= 1) {
        T y = __shfl_up_sync(ALL, x, d);
        if (lane >= d) x += y;
    }
    return x;
}

// Running sums, inclusive; returns the last one.
template <class T, int K> __device__ inline T row_scan(T (&r)[K], int lane) {
    T carry = 0;
    PCC_REGISTERS(k) {
        r[k] = warp_scan(r[k], lane) + carry;
        carry = __shfl_sync(ALL, r[k], 31);
    }
    return carry;
}

// Running sums without the own term.
template <class T, int K> __device__ inline void row_scan_before(T (&r)[K], int lane) {
    T carry = 0;
    PCC_REGISTERS(k) {
        T x = warp_scan(r[k], lane);
        T y = __shfl_up_sync(ALL, x, 1);
        r[k] = carry + (lane > 0 ? y : (T)0);
        carry += __shfl_sync(ALL, x, 31);
    }
}

// Index of the first largest; `least` lies beyond the row.
template <int V, class T, int K> __device__ inline int row_argmax(const T (&r)[K], int lane) {
    T top = all_of<Largest>(r);
    int at = V - 1;
    PCC_REGISTERS(k) {
        int j = lane + 32 * k;
        if (j < at && r[k] == top) at = j;
    }
    return warp_least(at);
}

// First j with mass_j > 0 and cumsum_j > u total, else the last j with mass_j > 0, else 0.
template <int V, int K>
__device__ inline int row_inverse_cdf(const float (&mass)[K], float u, int lane) {
    float r[K];
    PCC_REGISTERS(k) r[k] = mass[k];
    float total = row_scan(r, lane);
    int first = V, last = 0;
    PCC_REGISTERS(k) {
        int j = lane + 32 * k;
        if (j < V && mass[k] > 0.0f) {
            last = j;
            if (j < first && r[k] > u * total) first = j;
        }
    }
    first = warp_least(first);
    last = -warp_least(-last);
    return first < V ? first : last;
}

template <int K, int V>
__device__ inline void row_rms_norm(float (&r)[K], float eps) {
    float s = 0.0f;
    PCC_REGISTERS(k) s += r[k] * r[k];
    s = sqrtf(warp_all<Sum>(s) / (float)V + eps);
    PCC_REGISTERS(k) r[k] /= s;
}

template <int K, int V>
__device__ inline void row_layer_norm(float (&r)[K], float eps, int lane) {
    float mean = all_of<Sum>(r) / (float)V, s = 0.0f;
    PCC_REGISTERS(k) {
        r[k] = lane + 32 * k < V ? r[k] - mean : 0.0f;
        s += r[k] * r[k];
    }
    s = sqrtf(warp_all<Sum>(s) / (float)V + eps);
    PCC_REGISTERS(k) r[k] /= s;
}

// ---------------------------------------------------------------- transforms of a law

// (x - max x) / T; x where T = 1; where T <= 0: 0 at the first maximum, else -inf.
template <int K, int V>
__device__ inline void row_temper(float (&r)[K], float temperature, int lane) {
    if (temperature == 1.0f) return;
    if (temperature > 0.0f) {
        float top = shift_of(all_of<Largest>(r));
        PCC_REGISTERS(k) r[k] = (r[k] - top) / temperature;
        return;
    }
    int best = row_argmax<V>(r, lane);
    PCC_REGISTERS(k) r[k] = lane + 32 * k == best ? 0.0f : -INFINITY;
}

// How many of a row's values are equal to `x` before the lane's own, by index.
template <int K> struct Ties {
    int before[K];
    __device__ Ties(const float (&r)[K], float x, int lane) {
        PCC_REGISTERS(k) before[k] = r[k] == x;
        row_scan_before(before, lane);
    }
};

// Keep the largest entries, and renormalise. The order is by value, then by index; only its edge is
// looked for, by bisection over the bits of non-negative floats, which are in the order of values.
template <int K, int V>
__device__ inline void row_truncate(float (&r)[K], long long top_k, float top_p, int lane) {
    if (top_k <= 0 && top_p >= 1.0f) return;
    PCC_REGISTERS(k) if (lane + 32 * k >= V) r[k] = -1.0f;  // is never kept
    bool keep[K];
    PCC_REGISTERS(k) keep[k] = lane + 32 * k < V;
    if (top_k > 0 && top_k < V) {
        unsigned low = 0;  // the largest bits with at least top_k values of as many or more
        for (int bit = 30; bit >= 0; --bit) {
            float x = __uint_as_float(low | 1u << bit);
            int count = 0;
            PCC_REGISTERS(k) count += r[k] >= x;
            if (warp_all<Sum>(count) >= top_k) low |= 1u << bit;
        }
        float edge = __uint_as_float(low);
        int above = 0;
        PCC_REGISTERS(k) above += r[k] > edge;
        above = warp_all<Sum>(above);
        Ties<K> ties(r, edge, lane);
        PCC_REGISTERS(k) {
            keep[k] = r[k] > edge || (r[k] == edge && above + ties.before[k] < top_k);
        }
    }
    if (top_p < 1.0f) {
        float total = 0.0f;
        PCC_REGISTERS(k) total += keep[k] ? r[k] : 0.0f;
        float level = fmaxf(top_p, 0.0f) * warp_all<Sum>(total);
        unsigned high = 0;  // the largest bits with more than `level` in values of as many or more
        for (int bit = 30; bit >= 0; --bit) {
            float x = __uint_as_float(high | 1u << bit), s = 0.0f;
            PCC_REGISTERS(k) s += keep[k] && r[k] >= x ? r[k] : 0.0f;
            if (warp_all<Sum>(s) > level) high |= 1u << bit;
        }
        float edge = __uint_as_float(high), s = 0.0f;
        PCC_REGISTERS(k) s += keep[k] && r[k] > edge ? r[k] : 0.0f;
        s = warp_all<Sum>(s);
        Ties<K> ties(r, edge, lane);
        PCC_REGISTERS(k) {
            bool tie = r[k] == edge && s + (float)ties.before[k] * edge <= level;
            keep[k] = keep[k] && (r[k] > edge || tie);
        }
    }
    float total = 0.0f;
    PCC_REGISTERS(k) {
        r[k] = keep[k] ? r[k] : 0.0f;
        total += r[k];
    }
    total = warp_all<Sum>(total);
    PCC_REGISTERS(k) r[k] = total > 0.0f ? r[k] / total : r[k];
}

// ---------------------------------------------------------------- activations

__device__ inline float silu(float x) {
    float small = expf(-fabsf(x));  // never overflows
    return x * (x >= 0.0f ? 1.0f : small) / (1.0f + small);
}

__device__ inline float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f)); }

}  // namespace pcc_generated
