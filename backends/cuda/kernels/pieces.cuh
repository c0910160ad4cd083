// A piece of packed W, 2 KiB, as a warp multiplies it: see pack.py.
#pragma once
#include "common.cuh"

namespace pcc {

// 32 columns of W, 32 of K, 8 rows of x: `x` has this lane's 8 neighbours of row lane / 4.
template <typename T, int TILES>
__device__ __forceinline__ void multiply_tile(float (&sum)[2][TILES][4], int m, const uint4 (&w)[4],
                                              const uint4& x) {
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    Half<T>::mma(sum[t][m], w[t], x.x, x.y);
    Half<T>::mma(sum[t][m], w[2 + t], x.z, x.w);
  }
}

// Hand each 32 of K of a piece to `times(fragments, which)`: of halves there is one, of integers,
// where 16 bytes of a thread are two of its fragments of halves, there are two.
template <typename T, bool SCALED, typename Times>
__device__ __forceinline__ void each_half(const uint4 (&w)[4], const Times& times) {
  if constexpr (SCALED) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      uint4 half[4];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint4 q = w[2 * b + j];
        uint4 &one = half[2 * j], &two = half[2 * j + 1];
        Half<T>::integers(q.x, one.x, one.y), Half<T>::integers(q.y, one.z, one.w);
        Half<T>::integers(q.z, two.x, two.y), Half<T>::integers(q.w, two.z, two.w);
      }
      times(half, b);
    }
  } else {
    times(w, 0);
  }
}

// Sum c of a strip: four columns 4 (lane / 4) + 0..3 of row 8 (c / 2) + 2 (lane % 4) + c % 2.
template <int TILES>
__device__ __forceinline__ float4 columns(const float (&sum)[2][TILES][4], int c) {
  const int m = c / 2, e = c % 2;
  return make_float4(sum[0][m][e], sum[0][m][2 + e], sum[1][m][e], sum[1][m][2 + e]);
}

}  // namespace pcc
