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
  constexpr int THREADS = 512, EACH = (C::D + THREADS - 1) / THREADS;
  __shared__ float sums[THREADS / 32];
  const size_t row = size_t(blockIdx.x) * C::D;
  float gain[EACH], x[EACH], sum = 0;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    int d = threadIdx.x + i * THREADS;
    gain[i] = d < C::D ? __ldg(a.gain + d) : 0.0f;
  }
  wait_for_launches();
  let_next_start();
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    int d = threadIdx.x + i * THREADS;
    x[i] = d < C::D ? __ldcg(a.x + row + d) : 0.0f;
    sum += x[i] * x[i];
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = warp_sum(threadIdx.x % 32 < THREADS / 32 ? sums[threadIdx.x % 32] : 0.0f);
  const float scale = rsqrtf(sum / C::D + C::EPS);
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    int d = threadIdx.x + i * THREADS;
    if (d >= C::D) continue;
    float y = gain[i] * (x[i] * scale);
    a.y[row + d] = Half<T>::round(y);
    if constexpr (C::WIDE) a.y32[row + d] = y;
  }
}

}  // namespace pcc
