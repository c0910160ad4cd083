// y = x W in float32, for engines that must not round: lane n of a warp adds column n of a strip.
//
// Block (strip, part): 8 rows of x; its 8 warps divide K, and the first adds their sums in order.
#pragma once
#include "epilogue.cuh"

namespace pcc {

template <typename C> struct linear32_args : epilogue_args<C> {
  const float *x, *w;
};

template <typename C> __device__ __forceinline__ void linear32(const linear32_args<C>& a) {
  constexpr int WARPS = 8, ROWS = 8, BLOCKS = (C::K + 31) / 32;
  __shared__ float sums[WARPS][ROWS][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row0 = ROWS * int(blockIdx.y);
  const float* w = a.w + size_t(blockIdx.x) * BLOCKS * 1024 + lane;
  float sum[ROWS] = {};
  wait_for_launches();
  let_next_start();
  for (int block = warp; block < BLOCKS; block += WARPS) {
    float x[ROWS];
    const int k = block * 32 + lane;
#pragma unroll
    for (int m = 0; m < ROWS; ++m)
      x[m] = row0 + m < C::M && k < C::K ? __ldcg(a.x + size_t(row0 + m) * C::K + k) : 0.0f;
#pragma unroll 8
    for (int j = 0; j < 32; ++j) {
      float v = __ldg(w + (block * 32 + j) * 32);
#pragma unroll
      for (int m = 0; m < ROWS; ++m) sum[m] += __shfl_sync(~0u, x[m], j) * v;
    }
  }
#pragma unroll
  for (int m = 0; m < ROWS; ++m) sums[warp][m][lane] = sum[m];
  __syncthreads();
  if (warp) return;
  for (int i = 0; i < 2; ++i) {
    int m = i * 4 + lane % 4, n = lane / 4 * 4;
    float4 z = make_float4(0, 0, 0, 0);
    for (int k = 0; k < WARPS; ++k) {
      const float* s = sums[k][m] + n;
      z.x += s[0], z.y += s[1], z.z += s[2], z.w += s[3];
    }
    store<C>(a, z, row0 + m, int(blockIdx.x) * 32 + n, lane);
  }
}

}  // namespace pcc
