// What all kernels share: half types, tensor core products, copies, order between launches.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace pcc {

typedef unsigned u32;
typedef unsigned long long u64;

// ---- half types

template <typename T> struct Half;

template <> struct Half<__half> {
  static __device__ __forceinline__ __half round(float x) { return __float2half_rn(x); }
  static __device__ __forceinline__ float wide(__half x) { return __half2float(x); }
  // d += a b for a 16 x 16 row-major, b 16 x 8, in the fragments of mma.m16n8k16
  static __device__ __forceinline__ void mma(float (&d)[4], uint4 a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  }
  // Bytes b0 b1 b2 b3 of `word` as (b0, b2) and (b1, b3), each less 128: 1024 + b is the half
  // 0x6400 | b, and 1152 is subtracted; both are exact.
  static __device__ __forceinline__ void integers(u32 word, u32& even, u32& odd) {
    const u32 one = __byte_perm(word, 0x64646464, 0x4240);
    const u32 two = __byte_perm(word, 0x64646464, 0x4341);
    asm("sub.f16x2 %0, %1, %2;" : "=r"(even) : "r"(one), "r"(0x64806480));
    asm("sub.f16x2 %0, %1, %2;" : "=r"(odd) : "r"(two), "r"(0x64806480));
  }
};

template <> struct Half<__nv_bfloat16> {
  static __device__ __forceinline__ __nv_bfloat16 round(float x) { return __float2bfloat16_rn(x); }
  static __device__ __forceinline__ float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __forceinline__ void mma(float (&d)[4], uint4 a, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
  }
  // The same. 0x4300 | m is 128 + m for the low 7 bits m of b; -128 is added where the high bit is
  // set, else -256, of which the high bit is the only difference.
  static __device__ __forceinline__ void integers(u32 word, u32& even, u32& odd) {
    even = less_128(word), odd = less_128(word >> 8);
  }
  static __device__ __forceinline__ u32 less_128(u32 bytes) {
    // One instruction each, which the compiler does not make of `&` and `|` with two constants.
    u32 low, high, y;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(low) : "r"(bytes), "r"(0x007f007f), "r"(0x43004300));
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(high) : "r"(bytes), "r"(0x00800080), "r"(0xc380c380));
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(y) : "r"(low), "r"(0x3f803f80), "r"(high));
    return y;
  }
};

template <> struct Half<float> {
  static __device__ __forceinline__ float round(float x) { return x; }
  static __device__ __forceinline__ float wide(float x) { return x; }
};

template <bool FIRST, typename A, typename B> struct Select { typedef A type; };
template <typename A, typename B> struct Select<false, A, B> { typedef B type; };

// Two values rounded to T in one register, the first in the low half.
template <typename T> __device__ __forceinline__ u32 pair(float low, float high) {
  T two[2] = {Half<T>::round(low), Half<T>::round(high)};
  return *reinterpret_cast<u32*>(two);
}

// ---- memory

__device__ __forceinline__ u32 shared_address(const void* p) {
  return static_cast<u32>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ uint4 read_shared(u32 at) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
  return v;
}

__device__ __forceinline__ void copy_async(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int LEFT> __device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

// ---- order between launches (nothing where the launch has no such attribute)

// All of what the launches before this one wrote is visible after this.
__device__ __forceinline__ void wait_for_launches() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next launch may start (it waits by itself before it reads what this one writes).
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- clusters of blocks, from sm_90 on

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define PCC_CLUSTER(n) __cluster_dims__(n, 1, 1)
#else
#define PCC_CLUSTER(n)
#endif

__device__ __forceinline__ int cluster_rank() {
  u32 rank = 0;
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return int(rank);
}

// All blocks of the cluster arrive; once one has waited, it sees what the others wrote before.
__device__ __forceinline__ void arrive_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void meet_cluster() { arrive_cluster(), wait_cluster(); }

// Write 16 bytes at this place of the memory of block `rank`, whose barrier counts them.
__device__ __forceinline__ void send_cluster(u32 to, float4 v, u32 barrier, int rank) {
#if __CUDA_ARCH__ >= 900
  u32 there, signal;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(to), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(signal) : "r"(barrier), "r"(rank));
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32"
               " [%0], {%1,%2,%3,%4}, [%5];"
               ::"r"(there), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(signal) : "memory");
#endif
}

// What block `rank` of the cluster has at this place of its shared memory.
__device__ __forceinline__ float2 read_cluster(const float* mine, int rank) {
  float2 v = make_float2(0, 0);
#if __CUDA_ARCH__ >= 900
  u32 there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(mine)), "r"(rank));
  asm volatile("ld.shared::cluster.v2.f32 {%0,%1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(there)
               : "memory");
#endif
  return v;
}

// ---- one warp

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int k = 16; k; k >>= 1) x += __shfl_xor_sync(~0u, x, k);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int k = 16; k; k >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, k));
  return x;
}

}  // namespace pcc
