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

// From sm_90 on one lane asks the copy engine for a piece and an mbarrier counts its bytes; before,
// each lane copies four times 16 bytes. `STAGES` pieces are in flight.
template <int STAGES> struct Ring {
  u32 data, full;  // shared addresses: pieces, barriers
  u64 policy;
  int lane, head, tail, phase;

  __device__ __forceinline__ void open(u32 data_, u32 full_, int lane_) {
    data = data_, full = full_, lane = lane_, head = tail = phase = 0;
    policy = read_once();
#if __CUDA_ARCH__ >= 900
    if (lane == 0) {
#pragma unroll
      for (int i = 0; i < STAGES; ++i)
        asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(full + 8 * i) : "memory");
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncwarp();
#endif
  }

  // Begin the copy of the next piece; `more` is false once there is none.
  __device__ __forceinline__ void issue(const char* from, bool more) {
    u32 to = data + head * PIECE;
#if __CUDA_ARCH__ >= 900
    if (more && lane == 0) {
      u32 bar = full + 8 * head;
      asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(bar), "n"(PIECE)
                   : "memory");
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
                   " [%0], [%1], %2, [%3], %4;"
                   ::"r"(to), "l"(from), "n"(PIECE), "r"(bar), "l"(policy) : "memory");
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
    u32 bar = full + 8 * tail, done = 0;
    do {
      asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared.b64 p, [%1], %2;\n"
                   "selp.u32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(bar), "r"(phase) : "memory");
    } while (!done);
#else
    wait_copies<STAGES - 1>();
    __syncwarp();
#endif
    u32 at = data + tail * PIECE + lane * 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = read_shared(at + i * 512);
    if (++tail == STAGES) tail = 0, phase ^= 1;
    __syncwarp();
  }
};

}  // namespace pcc
