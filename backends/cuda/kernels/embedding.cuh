// y_m = table[ids_m] in float32, and the sums of squares of each 32 columns.
#pragma once
#include "common.cuh"

namespace pcc {

template <typename C> struct embedding_args {
  const long long* ids;
  const typename C::T* table;
  float *y, *squares_out;
};

template <typename C> __device__ __forceinline__ void embedding(const embedding_args<C>& a) {
  constexpr int STRIPS = (C::D + 31) / 32;
  const int lane = threadIdx.x % 32, strip = int(blockIdx.x) * 8 + threadIdx.x / 32;
  const int m = blockIdx.y, d = strip * 32 + lane;
  wait_for_launches();
  let_next_start();
  if (strip >= STRIPS) return;
  long long id = __ldcg(a.ids + m);
  id = id < 0 ? 0 : id < C::V ? id : C::V - 1;
  float x = d < C::D ? Half<typename C::T>::wide(a.table[id * C::D + d]) : 0.0f;
  if (d < C::D) a.y[size_t(m) * C::D + d] = x;
  if constexpr (C::SQUARES) {
    float sum = warp_sum(x * x);
    if (lane == 0) a.squares_out[size_t(m) * STRIPS + strip] = sum;
  }
}

}  // namespace pcc
