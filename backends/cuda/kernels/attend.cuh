// Attention of N new positions over a cache, with the writes of their keys and values.
//
// Block (split, tile, pair): 16 query rows (row = i * group + query head of the group) of one key
// head of one batch row. Splits from 1 on divide the keys that were there before; split 0 has the
// new ones, which it takes from `qkv`, so that nobody reads what this launch writes. With EVA the
// old keys are ring rows and summaries, and one more split makes the new summaries.
// A warp takes 16 keys at a time.
#pragma once
#include "parts.cuh"
#include "summaries.cuh"

namespace pcc {

// Old keys: a warp's ring of STAGES blocks of 16 keys and values.
template <typename C> struct OldKeys : Heads<C> {
  PCC_HEADS(C)
  __device__ __forceinline__ OldKeys(const Base& base_) : Base(base_) {}

  struct Old {
    int from, positions, older, blocks, ring_blocks;
  };

  __device__ __forceinline__ Old old_keys() const {
    Old o;
    o.from = least(first);
    o.positions = start > o.from ? start - o.from : 0;
    o.older = 0;
    if (C::EVA) {
      o.older = min(min(past(last), start / C::CHUNK), C::OLDER);
    }
    o.ring_blocks = (o.positions + 15) / 16;
    o.blocks = o.ring_blocks + (o.older + 15) / 16;
    return o;
  }

  // Begin to fetch block t of the old keys: lanes take 16 bytes each, rows apart by STEP.
  __device__ __forceinline__ void fetch(const Old& o, int t, int stage) const {
    constexpr int GROUPS = D / 8;
    if (t < o.blocks) {
      const bool ring = t < o.ring_blocks;
      const size_t offset = cache(ring ? C::ROWS : C::OLDER, 0);
      const T* key = (ring ? a.key : a.summary_key) + offset;
      const T* value = (ring ? a.value : a.summary_value) + offset;
      const int first = (ring ? t : t - o.ring_blocks) * 16, rows = ring ? C::ROWS : C::OLDER;
      const int valid = (ring ? o.positions : o.older) - first;
      const int line0 = ring ? slot(o.from + first) : first;
      const u32 to = area + (warp * STAGES + stage) * 2 * BLOCK;
#pragma unroll
      for (int i = 0; i < (16 * GROUPS + 31) / 32; ++i) {
        const int e = lane + 32 * i, row = e / GROUPS, c = e % GROUPS;
        if (16 * GROUPS % 32 && row >= 16) break;
        int line = line0 + row;
        line = row >= valid ? 0 : line < rows ? line : C::ROWS < 16 ? line % rows : line - rows;
        const u32 size = row < valid ? 16 : 0, at = place<D>(row, c);
        copy_async(to + at, key + line * D + c * 8, size);
        copy_async(to + BLOCK + at, value + line * D + c * 8, size);
      }
    }
    commit_copies();
  }

  __device__ __forceinline__ void attend(Softmax<C>& s) const {
    const Old o = old_keys();
    const int step = C::SPLITS * WARPS;
    int t = (int(blockIdx.x) - 1) * WARPS + warp;
    for (int k = 0; k < STAGES; ++k) fetch(o, t + k * step, k);
    int from[2], past_[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      from[r] = least(query(r)) - o.from;
      past_[r] = min(o.older, past(query(r)));
    }
    wait_for_launches();
    let_next_start();
    this->template stage_queries<0, 32 * WARPS>();
    __syncthreads();
    for (int stage = 0; t < o.blocks; t += step, stage = stage + 1 < STAGES ? stage + 1 : 0) {
      wait_copies<STAGES - 1>();
      __syncwarp();
      const bool ring = t < o.ring_blocks;
      const int key0 = ring ? t * 16 : (t - o.ring_blocks) * 16;
      const int low[2] = {ring ? from[0] - key0 : 0, ring ? from[1] - key0 : 0};
      const int high[2] = {(ring ? o.positions : past_[0]) - key0,
                           (ring ? o.positions : past_[1]) - key0};
      u32 at = area + (warp * STAGES + stage) * 2 * BLOCK;
      s.add(base, at, at + BLOCK, lane, low, high);
      __syncwarp();
      fetch(o, t + STAGES * step, stage);
    }
    wait_copies<0>();
  }
};

template <typename C> __device__ __forceinline__ void attend(const attend_args<C>& a) {
  extern __shared__ __align__(128) char shared[];
  // Where the rows begin and what they held before is no result of the launch right before this.
  Heads<C> block(a, shared);
  Softmax<C> s;
  if (C::EVA && blockIdx.x > C::SPLITS)
    Summaries<C>(block).attend(s);
  else if (blockIdx.x)
    OldKeys<C>(block).attend(s);
  else
    NewKeys<C>(block).attend(s);
  Parts<C>(block).finish(s);
}

}  // namespace pcc
