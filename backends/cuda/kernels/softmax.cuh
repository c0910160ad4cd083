// One warp's share of softmax(q k) v for 16 query rows, 16 keys at a time.
#pragma once
#include "fragments.cuh"

namespace pcc {

constexpr float LOG2E = 1.4426950408889634f;

template <bool GLOBAL, typename V> __device__ __forceinline__ V fetched(const V* p) {
  if constexpr (GLOBAL) return __ldcg(p);
  return *p;
}

// A part is a sum of weights times values and the sum of the weights, both relative to 2^most. For
// the heads (most, weight) of COUNT parts of a row: what each counts for, 16 apart, and the head of
// their sum.
template <int COUNT, bool GLOBAL>
__device__ __forceinline__ void factors(const float* head, int stride, float* factor,
                                        float* total) {
  float2 heads[COUNT];
  float most = -INFINITY, weight = 0;
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    heads[k] = fetched<GLOBAL>(reinterpret_cast<const float2*>(head + size_t(k) * stride));
    most = fmaxf(most, heads[k].x);
  }
#pragma unroll
  for (int k = 0; k < COUNT; ++k) {
    float f = most == -INFINITY ? 0.0f : exp2f(heads[k].x - most);
    factor[k * 16] = f;
    weight += f * heads[k].y;
  }
  total[0] = most, total[1] = weight;
}

// Four columns of COUNT parts, added in order.
template <int COUNT, bool GLOBAL>
__device__ __forceinline__ float4 weighted(const float* x, int stride, const float* factor) {
  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
  for (int k = 0; k < COUNT; ++k) {
    float4 v = fetched<GLOBAL>(reinterpret_cast<const float4*>(x + size_t(k) * stride));
    float f = factor[k * 16];
    sum.x += f * v.x, sum.y += f * v.y, sum.z += f * v.z, sum.w += f * v.w;
  }
  return sum;
}

// A lane has rows lane / 4 (+ 8) and columns lane % 4 * 2 (+ 1) of each 8: the layout of mma.
template <typename C> struct Softmax {
  using T = typename C::T;
  static constexpr int D = C::D, LINE = D + 8;  // floats between saved rows: no bank twice
  float sum[D / 8][4], most[2], weight[2];

  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int i = 0; i < D / 8; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] = 0;
    most[0] = most[1] = -INFINITY, weight[0] = weight[1] = 0;
  }

  // Queries, keys, values [16][D] in shared memory. Of the 16 keys, this lane's row r < 2, that is
  // row lane / 4 + 8 r, reads numbers low[r]..high[r]-1.
  __device__ __forceinline__ void add(u32 queries, u32 keys, u32 values, int lane,
                                      const int (&low)[2], const int (&high)[2]) {
    const int row8 = lane % 8, which = lane / 8;
    float score[2][4] = {};
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      uint4 q = load_matrices(queries + place<D>(which % 2 * 8 + row8, k * 2 + which / 2));
      uint4 x = load_matrices(keys + place<D>(which / 2 * 8 + row8, k * 2 + which % 2));
      Half<T>::mma(score[0], q, x.x, x.y);
      Half<T>::mma(score[1], q, x.z, x.w);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) weigh(score, r, lane, low[r], high[r]);
    uint4 p = make_uint4(pair<T>(score[0][0], score[0][1]), pair<T>(score[0][2], score[0][3]),
                         pair<T>(score[1][0], score[1][1]), pair<T>(score[1][2], score[1][3]));
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
      uint4 v = load_transposed(values + place<D>(which % 2 * 8 + row8, d * 2 + which / 2));
      Half<T>::mma(sum[2 * d], p, v.x, v.y);
      Half<T>::mma(sum[2 * d + 1], p, v.z, v.w);
    }
  }

  // Scores of row lane / 4 + 8 r become weights relative to the largest so far.
  __device__ __forceinline__ void weigh(float (&score)[2][4], int r, int lane, int low, int high) {
    float top = most[r];
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = score[t][2 * r + e];
        const int key = t * 8 + lane % 4 * 2 + e;
        x = key >= low && key < high ? x * (C::SCALE * LOG2E) : -INFINITY;
        top = fmaxf(top, x);
      }
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
    const float from = top == -INFINITY ? 0.0f : top, keep = exp2f(most[r] - from);
    most[r] = top;
    float total = 0;
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = score[t][2 * r + e];
        x = exp2f(x - from);
        total += x;
      }
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    weight[r] = weight[r] * keep + total;
#pragma unroll
    for (int d = 0; d < D / 8; ++d) sum[d][2 * r] *= keep, sum[d][2 * r + 1] *= keep;
  }

  // Write the sums to `rows [16][LINE]` and (most, weight) to `heads [16][2]`.
  __device__ __forceinline__ void save(float* rows, float* heads, int lane) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = lane / 4 + 8 * r, column = lane % 4 * 2;
#pragma unroll
      for (int d = 0; d < D / 8; ++d) {
        *reinterpret_cast<float2*>(rows + row * LINE + d * 8 + column) =
            make_float2(sum[d][2 * r], sum[d][2 * r + 1]);
      }
      if (column == 0) heads[row * 2] = most[r], heads[row * 2 + 1] = weight[r];
    }
  }
};

}  // namespace pcc
