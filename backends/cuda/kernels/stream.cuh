// A warp's ring of copies of 2 KiB from global to shared memory, read in the order of issue.
#pragma once
#include "common.cuh"

namespace pcc {

constexpr int PIECE = 2048;

// Weights are read once in a pass: they should leave L2 before what is read again.
__device__ __forceinline__ u64 read_once() {
  u64 policy = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#endif
  return policy;
}

// ---- the copy engine, from sm_90 on

// Make `count` barriers of one arrival, and show them to the copy engine (once: it is slow).
__device__ __forceinline__ void open_barriers(u32 barrier, int count) {
#if __CUDA_ARCH__ >= 900
  for (int i = 0; i < count; ++i)
    asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(barrier + 8 * i) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void expect_bytes(u32 barrier, u32 bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
#endif
}

__device__ __forceinline__ void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
               " [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
#endif
}

__device__ __forceinline__ void copy_once(u32 to, const void* from, u32 bytes, u32 barrier,
                                          u64 policy) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
               " [%0], [%1], %2, [%3], %4;"
               ::"r"(to), "l"(from), "r"(bytes), "r"(barrier), "l"(policy) : "memory");
#endif
}

// Wait for the end of a phase: for copies of this block.
__device__ __forceinline__ void await(u32 barrier, u32 phase) {
#if __CUDA_ARCH__ >= 900
  u32 done = 0;
  do {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(barrier), "r"(phase) : "memory");
  } while (!done);
#endif
}

// The same for what other blocks of the cluster wrote by `send_cluster`.
__device__ __forceinline__ void await_cluster(u32 barrier, u32 phase) {
#if __CUDA_ARCH__ >= 900
  u32 done = 0;
  do {
    asm volatile("{\n.reg .pred p;\n"
                 "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(barrier), "r"(phase) : "memory");
  } while (!done);
#endif
}

// From sm_90 on one lane asks the copy engine for a piece and an mbarrier counts its bytes; before,
// each lane copies four times 16 bytes. `STAGES` pieces are in flight.
template <int STAGES> struct Ring {
  u32 data, full;  // shared addresses: pieces, barriers
  u64 policy;
  int lane, head, tail, phase;

  __device__ __forceinline__ void open(u32 data_, u32 full_, int lane_) {
    data = data_, full = full_, lane = lane_, head = tail = phase = 0;
    policy = read_once();
    if (lane == 0) open_barriers(full, STAGES);
    __syncwarp();
  }

  // Begin the copy of the next piece; `more` is false once there is none.
  __device__ __forceinline__ void issue(const char* from, bool more) {
    const u32 to = data + head * PIECE;
#if __CUDA_ARCH__ >= 900
    if (more && lane == 0) {
      expect_bytes(full + 8 * head, PIECE);
      copy_once(to, from, PIECE, full + 8 * head, policy);
    }
#else
    if (more) {
#pragma unroll
      for (int i = 0; i < 4; ++i) copy_async(to + i * 512 + lane * 16, from + i * 512 + lane * 16);
    }
    commit_copies();
#endif
    head = head + 1 == STAGES ? 0 : head + 1;
  }

  // Wait for the oldest piece and read this lane's four fragments; its place is free afterwards.
  __device__ __forceinline__ void take(uint4 (&a)[4]) {
#if __CUDA_ARCH__ >= 900
    await(full + 8 * tail, phase);
#else
    wait_copies<STAGES - 1>();
    __syncwarp();
#endif
    const u32 at = data + tail * PIECE + lane * 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = read_shared(at + i * 512);
    if (++tail == STAGES) tail = 0, phase ^= 1;
    __syncwarp();
  }
};

}  // namespace pcc
