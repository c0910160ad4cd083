// EVA's summaries of the chunks that a pass touches: made, written, attended.
//
// A block of its own for each head makes them, beside the one that attends to the new keys: queries
// rarely read them in the pass that makes them, only where it crosses the border of a window.
#pragma once
#include "new_keys.cuh"

namespace pcc {

template <typename C> struct Summaries : NewKeys<C> {
  PCC_HEADS(C)
  __device__ __forceinline__ Summaries(const Base& base_) : NewKeys<C>(base_) {}

  // Which of the new rows the ring's row of `position` becomes; none from N on.
  __device__ __forceinline__ int renewed(int position) const {
    return (position - start + C::ROWS) % C::ROWS;
  }

  // mu and phi of this head, f32 [2][D], behind everything else.
  __device__ __forceinline__ const float* target(int which) const {
    return reinterpret_cast<const float*>(shared + QUERY + AREA + WARPS * 16 * 8) + which * D;
  }

  // Begin to fetch the rows of the chunks touched, but for those that are new, and mu and phi.
  __device__ __forceinline__ void fetch_chunks() const {
    for (int e = threadIdx.x; e < D / 2; e += 32 * WARPS) {
      const int which = e / (D / 4), d = e % (D / 4) * 4;
      copy_async(shared_address(target(which) + d), (which ? a.phi : a.mu) + h * D + d, 16);
    }
    const int from = start / C::CHUNK * C::CHUNK;
    for (int e = threadIdx.x; e < TOUCHED * (D / 8); e += 32 * WARPS) {
      const int row = e / (D / 8), c = e % (D / 8), block = (NEW + POOLS + row / 16) * 2;
      if (renewed(from + row) < N) continue;
      const size_t offset = cache(C::ROWS, slot(from + row)) + c * 8;
      const u32 to = area + block * BLOCK + place<D>(row % 16, c);
      copy_async(to, a.key + offset, 16);
      copy_async(to + BLOCK, a.value + offset, 16);
    }
    commit_copies();
  }

  // Where row m of touched chunk c lies: block of its keys (the values are in the next), line.
  __device__ __forceinline__ void find(int c, int m, int& block, int& line) const {
    const int n = renewed((start / C::CHUNK + c) * C::CHUNK + m), row = c * C::CHUNK + m;
    block = n < N ? n / 16 * 2 : (NEW + POOLS + row / 16) * 2;
    line = n < N ? n % 16 : row % 16;
  }

  // Lanes share the rows of a chunk: SHARE of them read one row, 16 bytes of it in turn.
  static constexpr int SHARE = C::CHUNK > 16 ? 1 : C::CHUNK > 8 ? 2 : C::CHUNK > 4 ? 4 : 8;

  // This lane's row's share of the chunk: softmax over its rows m of mu . k_m, or of
  // (phi - k_m / (2 sqrt hd)) . k_m.
  __device__ __forceinline__ float shares(int c, int which) const {
    const float half = 0.5f * rsqrtf(float(D));
    const int m = lane / SHARE;
    float score = 0;
    if (m < C::CHUNK) {
      int block, line;
      find(c, m, block, line);
#pragma unroll
      for (int g = lane % SHARE; g < D / 8; g += SHARE) {
        uint4 raw = *reinterpret_cast<const uint4*>(held(block, line, g * 8));
        float want[8];
        const float4* from = reinterpret_cast<const float4*>(target(which) + g * 8);
        *reinterpret_cast<float4*>(want) = from[0], *reinterpret_cast<float4*>(want + 4) = from[1];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float k = Half<T>::wide(reinterpret_cast<const T*>(&raw)[j]);
          score += which ? (want[j] - k * half) * k : want[j] * k;
        }
      }
    }
#pragma unroll
    for (int k = 1; k < SHARE; k <<= 1) score += __shfl_xor_sync(~0u, score, k);
    const float top = warp_max(m < C::CHUNK ? score : -INFINITY);
    const float weight = m < C::CHUNK ? expf(score - top) : 0.0f;
    return weight / (warp_sum(weight) / SHARE);
  }

  // Summary c of the chunks touched, its key (which = 0) or its value (1); by one warp.
  __device__ __forceinline__ void pool(int c, int which) const {
    constexpr int EACH = (D + 31) / 32;
    const float share = shares(c, which);
    int mine = 0, line = 0;
    if (lane < C::CHUNK) find(c, lane, mine, line);
    mine = mine * 16 + line;
    float sum[EACH] = {};
#pragma unroll
    for (int m = 0; m < C::CHUNK; ++m) {
      const float w = __shfl_sync(~0u, share, m * SHARE);
      const int at = __shfl_sync(~0u, mine, m);
#pragma unroll
      for (int j = 0; j < EACH; ++j)
        if (lane + 32 * j < D)
          sum[j] += w * Half<T>::wide(*held(at / 16 + which, at % 16, lane + 32 * j));
    }
    const int chunk = start / C::CHUNK + c;
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
      const int d = lane + 32 * j;
      if (d >= D) continue;
      const T v = Half<T>::round(sum[j]);
      *held((NEW + c / 16) * 2 + which, c % 16, d) = v;
      T* to = which ? a.summary_value : a.summary_key;
      if (tile == 0 && chunk < C::OLDER) to[cache(C::OLDER, chunk) + d] = v;
    }
  }

  __device__ __forceinline__ void attend(Softmax<C>& s) const {
    const bool read = past(last) > start / C::CHUNK;  // by a query of this tile
    fetch_chunks();
    for (int e = threadIdx.x; e < POOLS * 32 * D; e += 32 * WARPS)
      *held(NEW * 2 + e / (16 * D), e / D % 16, e % D) = Half<T>::round(0);
    wait_for_launches();
    let_next_start();
    if (read) this->template stage_queries<0, 32 * WARPS>();
    this->template stage_new<0, 32 * WARPS, false>();
    wait_copies<0>();
    __syncthreads();
    for (int task = warp; task < 2 * C::CHUNKS; task += WARPS) pool(task / 2, task % 2);
    if (!read) return;
    __syncthreads();
    for (int t = warp; t < POOLS; t += WARPS) {
      const u32 at = area + (NEW + t) * 2 * BLOCK;
      int low[2] = {0, 0}, high[2];
#pragma unroll
      for (int r = 0; r < 2; ++r)
        high[r] = min(C::CHUNKS, past(query(r)) - start / C::CHUNK) - t * 16;
      s.add(base, at, at + BLOCK, lane, low, high);
    }
  }
};

}  // namespace pcc
