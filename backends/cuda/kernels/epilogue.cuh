// What becomes of the sums of a product: scales, bias, residual or gate, and the sums of squares.
#pragma once
#include "common.cuh"

namespace pcc {

template <typename C> struct epilogue_args {
  const float *scales, *bias;
  typename C::Out* y;
  float* squares_out;
};

__device__ __forceinline__ float activated(float x, bool gelu) {
  if (gelu) return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
  return x / (1.0f + expf(-x));
}

// row[n..n+COUNT-1] = v, rounded, as far as there are columns; in one store where it is aligned.
template <int COUNT, int N, typename Out>
__device__ __forceinline__ void put(Out* row, int n, const float (&v)[COUNT]) {
  if constexpr (N % COUNT == 0) {
    struct alignas(COUNT * sizeof(Out)) Group { Out each[COUNT]; } group;
#pragma unroll
    for (int j = 0; j < COUNT; ++j) group.each[j] = Half<Out>::round(v[j]);
    if (n < N) *reinterpret_cast<Group*>(row + n) = group;
  } else {
#pragma unroll
    for (int j = 0; j < COUNT; ++j)
      if (n + j < N) row[n + j] = Half<Out>::round(v[j]);
  }
}

// Store columns n..n+3 of row m; the 8 lanes of equal lane % 4 hold the 32 columns of a strip.
// Called by whole warps; rows from M on and columns from N on are left out.
template <typename C>
__device__ __forceinline__ void store(const epilogue_args<C>& a, float4 z, int m, int n, int lane) {
  using Out = typename C::Out;
  float v[4] = {z.x, z.y, z.z, z.w};
  const bool inside = m < C::M;
  float square = 0;
  if (inside) {
    if constexpr (C::SCALED) {
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] *= n + j < C::N ? __ldg(a.scales + n + j) : 0.0f;
    }
    if constexpr (C::BIAS) {
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j] += n + j < C::N ? __ldg(a.bias + n + j) : 0.0f;
    }
    if constexpr (C::EPILOGUE == 2) {
      float gated[2] = {activated(v[0], C::GELU) * v[1], activated(v[2], C::GELU) * v[3]};
      put<2, C::N / 2>(a.y + size_t(m) * (C::N / 2), n / 2, gated);
    } else {
      Out* y = a.y + size_t(m) * C::N;
      if constexpr (C::EPILOGUE == 1) {
        if (C::N % 4 == 0) {
          float4 old = n < C::N ? __ldcg(reinterpret_cast<const float4*>(y + n)) : float4{};
          v[0] += old.x, v[1] += old.y, v[2] += old.z, v[3] += old.w;
        } else {
#pragma unroll
          for (int j = 0; j < 4; ++j)
            if (n + j < C::N) v[j] += __ldcg(y + n + j);
        }
      }
      put<4, C::N>(y, n, v);
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (n + j < C::N) square += v[j] * v[j];
    }
  }
  if constexpr (C::SQUARES) {
#pragma unroll
    for (int k = 4; k < 32; k <<= 1) square += __shfl_xor_sync(~0u, square, k);
    if (inside && lane < 4) a.squares_out[size_t(m) * ((C::N + 31) / 32) + n / 32] = square;
  }
}

}  // namespace pcc
