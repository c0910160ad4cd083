// y = gain * x / sqrt(mean(x^2) + eps): one block of threads for each row.
#pragma once
#include "common.cuh"

namespace pcc {

template <typename C> struct rms_norm_args {
  const float *x, *gain;
  typename C::T* y;
  float* y32;
};

template <typename C> __device__ __forceinline__ void rms_norm(const rms_norm_args<C>& a) {
  using T = typename C::T;
  constexpr int THREADS = 512, V = C::D % 4 == 0 ? 4 : 1, EACH = (C::D / V + THREADS - 1) / THREADS;
  struct alignas(4 * V) Wide { float each[V]; };
  struct alignas(sizeof(T) * V) Narrow { T each[V]; };
  __shared__ float sums[THREADS / 32];
  const size_t row = size_t(blockIdx.x) * C::D;
  Wide gain[EACH], x[EACH];
  float sum = 0;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int d = (threadIdx.x + i * THREADS) * V;
    gain[i] = d < C::D ? *reinterpret_cast<const Wide*>(a.gain + d) : Wide{};
  }
  wait_for_launches();
  let_next_start();
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int d = (threadIdx.x + i * THREADS) * V;
    x[i] = Wide{};
    if (d >= C::D) continue;
    if constexpr (V == 4)
      *reinterpret_cast<float4*>(&x[i]) = __ldcg(reinterpret_cast<const float4*>(a.x + row + d));
    else
      x[i].each[0] = __ldcg(a.x + row + d);
#pragma unroll
    for (int j = 0; j < V; ++j) sum += x[i].each[j] * x[i].each[j];
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = warp_sum(threadIdx.x % 32 < THREADS / 32 ? sums[threadIdx.x % 32] : 0.0f);
  const float scale = rsqrtf(sum / C::D + C::EPS);
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int d = (threadIdx.x + i * THREADS) * V;
    if (d >= C::D) continue;
    Wide y;
    Narrow narrow;
#pragma unroll
    for (int j = 0; j < V; ++j) {
      y.each[j] = gain[i].each[j] * (x[i].each[j] * scale);
      narrow.each[j] = Half<T>::round(y.each[j]);
    }
    *reinterpret_cast<Narrow*>(a.y + row + d) = narrow;
    if constexpr (C::WIDE) *reinterpret_cast<Wide*>(a.y32 + row + d) = y;
  }
}

}  // namespace pcc
