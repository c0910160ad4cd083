// New keys and values: turned, rounded, written, attended.
#pragma once
#include "heads.cuh"

namespace pcc {

template <typename C> struct NewKeys : Heads<C> {
  PCC_HEADS(C)
  __device__ __forceinline__ NewKeys(const Base& base_) : Base(base_) {}

  // By `COUNT` threads from FROM on; WRITES: into the caches too, which one block of a head does.
  template <int FROM, int COUNT, bool WRITES>
  __device__ __forceinline__ void stage_new() const {
#pragma unroll 4
    for (int e = threadIdx.x - FROM; e < NEW * 16 * UNITS; e += COUNT) {
      const int n = e / UNITS, u = e % UNITS, line = slot(start + n);
      const bool kept = WRITES && tile == 0 && n < N && line < C::ROWS;
      Unit key = {}, value = {};
      if (n < N) {
        key = load(input(n, C::H + h), n, u);
        read(value.low, input(n, C::H + C::HK + h) + (u < TURNS ? u : u + TURNS) * V);
        if (u < TURNS) read(value.high, input(n, C::H + C::HK + h) + (u + TURNS) * V);
      }
      turn(key, u, [&](int d, auto group) {
        write(held(n / 16 * 2, n % 16, d), group);
        if (kept) write(a.key + cache(C::ROWS, line) + d, group);
      });
#pragma unroll
      for (int j = 0; j < V; ++j) value.cos[j] = 1;  // values are not turned
      turn(value, u, [&](int d, auto group) {
        write(held(n / 16 * 2 + 1, n % 16, d), group);
        if (kept) write(a.value + cache(C::ROWS, line) + d, group);
      });
    }
  }

  __device__ __forceinline__ void attend(Softmax<C>& s) const {
    wait_for_launches();
    let_next_start();
    if (NEW > 1) {
      this->template stage_queries<0, 32 * WARPS>();
      stage_new<0, 32 * WARPS, true>();
    } else if (warp < WARPS / 2) {
      this->template stage_queries<0, 16 * WARPS>();
    } else {
      stage_new<16 * WARPS, 16 * WARPS, true>();
    }
    __syncthreads();
    for (int t = warp; t < NEW; t += WARPS) {
      const u32 at = area + t * 2 * BLOCK;
      int low[2], high[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int i = query(r);
        low[r] = least(i) - start - t * 16, high[r] = i + 1 - t * 16;
      }
      s.add(base, at, at + BLOCK, lane, low, high);
    }
  }
};

}  // namespace pcc
