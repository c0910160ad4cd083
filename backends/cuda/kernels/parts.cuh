// The parts of attention meet: in shared memory across a cluster; before sm_90, in scratch.
#pragma once
#include "heads.cuh"

namespace pcc {

template <typename C> struct Parts : Heads<C> {
  PCC_HEADS(C)
  __device__ __forceinline__ Parts(const Base& base_) : Base(base_) {}

  __device__ __forceinline__ float* saved() const {  // [WARPS][16][LINE]
    return reinterpret_cast<float*>(shared + QUERY);
  }
  __device__ __forceinline__ float* heads() const {  // [WARPS][16][2]
    return reinterpret_cast<float*>(shared + QUERY + AREA);
  }

  __device__ __forceinline__ T* result(int row) const {
    const int at = tile * 16 + row;
    return a.y + ((size_t(b) * N + at / G) * C::H + h * G + at % G) * D;
  }

  // Add the parts of this block's warps: the first warp's rows become the sums.
  __device__ __forceinline__ void merge_warps(float2* merged) const {
    for (int e = threadIdx.x * 4; e < 16 * D; e += 128 * WARPS) {
      const int row = e / D, at = row * LINE + e % D;
      float2 head[WARPS];
      float most = -INFINITY, weight = 0;
#pragma unroll
      for (int k = 0; k < WARPS; ++k) {
        head[k] = *reinterpret_cast<const float2*>(heads() + (k * 16 + row) * 2);
        most = fmaxf(most, head[k].x);
      }
      float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
      for (int k = 0; k < WARPS; ++k) {
        const float f = most == -INFINITY ? 0.0f : exp2f(head[k].x - most);
        const float4 v = *reinterpret_cast<const float4*>(saved() + k * 16 * LINE + at);
        weight += f * head[k].y;
        sum.x += f * v.x, sum.y += f * v.y, sum.z += f * v.z, sum.w += f * v.w;
      }
      *reinterpret_cast<float4*>(saved() + at) = sum;
      if (e % D == 0) merged[row] = make_float2(most, weight);
    }
  }

  // Each block of the cluster adds the blocks' parts of some rows, a lane for each part's head.
  __device__ __forceinline__ void finish_cluster() const {
    constexpr int EACH = 16 / PARTS;
    __shared__ float2 merged[16];
    merge_warps(merged);
    const int rank = cluster_rank();
    meet_cluster();
    for (int row = rank * EACH + warp / 2; row < (rank + 1) * EACH; row += WARPS / 2) {
      float2 head = make_float2(-INFINITY, 0);
      if (lane < PARTS) head = read_cluster(&merged[row].x, lane);
      const float most = warp_max(head.x);
      const float factor = head.x == -INFINITY ? 0.0f : exp2f(head.x - most);
      const float scale = 1.0f / warp_sum(factor * head.y);
      for (int c0 = warp % 2 * 64; c0 < D; c0 += 128) {
        const int c = c0 + lane * 2;
        float2 v[PARTS], sum = make_float2(0, 0);
#pragma unroll
        for (int k = 0; k < PARTS; ++k)
          v[k] = read_cluster(saved() + row * LINE + (c < D ? c : 0), k);
#pragma unroll
        for (int k = 0; k < PARTS; ++k) {
          const float f = __shfl_sync(~0u, factor, k);
          sum.x += f * v[k].x, sum.y += f * v[k].y;
        }
        if (c < D && tile * 16 + row < N * G)
          *reinterpret_cast<u32*>(result(row) + c) = pair<T>(sum.x * scale, sum.y * scale);
      }
    }
    meet_cluster();  // nobody leaves while its memory is read
  }

  __device__ __forceinline__ float* part(int split) const {
    const size_t pair = size_t(blockIdx.z) * C::TILES + tile;
    return a.partial + (pair * PARTS + split) * 16 * (D + 2);
  }

  // Whether this block is the last of its pair to have written its part.
  __device__ __forceinline__ bool is_last() const {
    __shared__ bool is;
    u32* done = a.done + int(blockIdx.z) * C::TILES + tile;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      is = atomicAdd(done, 1u) == PARTS - 1;
      if (is) *done = 0;
    }
    __syncthreads();
    __threadfence();
    return is;
  }

  __device__ __forceinline__ void finish_scratch() const {
    __shared__ float factor[PARTS * 16 > WARPS * 16 ? PARTS * 16 : WARPS * 16], total[16][2];
    if (threadIdx.x < 16)
      factors<WARPS, false>(heads() + threadIdx.x * 2, 32, factor + threadIdx.x,
                            total[threadIdx.x]);
    __syncthreads();
    float* mine = part(blockIdx.x);
    for (int e = threadIdx.x * 4; e < 16 * D; e += 128 * WARPS)
      __stcg(reinterpret_cast<float4*>(mine + e),
             weighted<WARPS, false>(saved() + e / D * LINE + e % D, 16 * LINE, factor + e / D));
    if (threadIdx.x < 32)
      __stcg(mine + 16 * D + threadIdx.x, total[threadIdx.x / 2][threadIdx.x % 2]);
    if (!is_last()) return;
    if (threadIdx.x < 16)
      factors<PARTS, true>(part(0) + 16 * D + threadIdx.x * 2, 16 * (D + 2), factor + threadIdx.x,
                           total[threadIdx.x]);
    __syncthreads();
#pragma unroll 4
    for (int e = threadIdx.x * 4; e < 16 * D; e += 128 * WARPS) {
      float4 y = weighted<PARTS, true>(part(0) + e, 16 * (D + 2), factor + e / D);
      const float scale = 1.0f / total[e / D][1];
      uint2 two = make_uint2(pair<T>(y.x * scale, y.y * scale), pair<T>(y.z * scale, y.w * scale));
      if (tile * 16 + e / D < N * G) *reinterpret_cast<uint2*>(result(e / D) + e % D) = two;
    }
  }

  __device__ __forceinline__ void finish(const Softmax<C>& s) const {
    __syncthreads();
    s.save(saved() + warp * 16 * LINE, heads() + warp * 32, lane);
    __syncthreads();
#if __CUDA_ARCH__ >= 900
    finish_cluster();
#else
    finish_scratch();
#endif
  }
};

}  // namespace pcc
