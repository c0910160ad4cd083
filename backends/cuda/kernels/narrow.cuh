// y = round(x) W for up to 16 rows of x, from sm_90 on: W is streamed, x stays in registers.
//
// K is divided over all warps of a cluster of CLUSTER blocks, and each warp keeps its part of x as the
// tensor cores take it. A strip of 32 columns of W is streamed by all of them at once. The warps' sums
// meet in the block's shared memory, the blocks' sums in that of the strip's owner, which is each block
// of the cluster in turn, and which finishes a strip while the next one is streamed. Nothing goes
// through global memory, and all sums are added in a fixed order.
#pragma once
#include "epilogue.cuh"
#include "pieces.cuh"
#include "stream.cuh"

namespace pcc {

template <typename C> struct narrow_args : epilogue_args<C> {
  const void* x;
  const float *gain, *squares;
  const void* w;  // halves, or integers of 8 bits where SCALED
};

template <typename C> struct Narrow {
  using T = typename C::T;
  static constexpr int DEPTH = C::SCALED ? 64 : 32, HALVES = DEPTH / 32;  // of K in a piece of W
  static constexpr int BLOCKS = (C::K + DEPTH - 1) / DEPTH, STRIPS = (C::N + 31) / 32;
  static constexpr int ALL = C::WARPS * C::CLUSTER;            // warps that K is divided over
  static constexpr int PIECES = (BLOCKS + ALL - 1) / ALL;      // of a strip, of a warp at most
  static constexpr int SUMS = (C::K + 31) / 32;                // of squares of a row of x
  static constexpr int ROWS = 8 * C::TILES, COUNT = 2 * C::TILES;
  static constexpr bool WIDE = C::SOURCE != 1, NORM = C::SOURCE == 2;
  static_assert(BLOCKS >= ALL && COUNT <= C::WARPS && C::K % 8 == 0, "see narrow.py");
  static constexpr int PARTS = PIECES * HALVES, AT_ONCE = WIDE ? 128 / C::WARPS / C::TILES : PARTS;
  static constexpr int BATCH = PARTS < AT_ONCE ? PARTS : AT_ONCE;  // of x: loads in flight

  // Shared memory: rings, their barriers, two for what other blocks send; sums of the warps of two
  // strips, sums of the blocks of two strips of this block, scales of rows.
  static constexpr int RING = C::WARPS * C::STAGES * PIECE, BARRIERS = C::WARPS * C::STAGES * 8;
  static constexpr int LOCAL = (RING + BARRIERS + 16 + 127) / 128 * 128;
  static constexpr int STEP = COUNT * 512;  // bytes of the sums of a strip
  static constexpr int SENT = LOCAL + 2 * C::WARPS * STEP;
  static constexpr int SCALE = SENT + (C::CLUSTER > 1 ? 2 * C::CLUSTER * STEP : 0);
  static constexpr int GAIN = SCALE + ROWS * 4;  // of the part of K of each warp, where NORM

  const narrow_args<C>& a;
  char* shared;
  u32 base;
  int warp, lane, rank, group, first, length;
  uint4 x[PARTS][C::TILES];

  __device__ __forceinline__ Narrow(const narrow_args<C>& a_, char* shared_)
      : a(a_), shared(shared_), base(shared_address(shared_)), warp(threadIdx.x / 32),
        lane(threadIdx.x % 32), rank(C::CLUSTER > 1 ? cluster_rank() : 0),
        group(blockIdx.x / C::CLUSTER) {
    const int part = rank * C::WARPS + warp;
    first = BLOCKS * part / ALL;
    length = BLOCKS * (part + 1) / ALL - first;
  }

  __device__ __forceinline__ int strip(int i) const { return group + C::COLUMNS * i; }
  __device__ __forceinline__ const char* piece(int strip, int j) const {
    return static_cast<const char*>(a.w) + (size_t(strip) * BLOCKS + first + j) * PIECE;
  }
  __device__ __forceinline__ u32 received() const { return base + RING + BARRIERS; }

  // ---- x

  // scale[m] = 1 / sqrt(sum_s squares[s,m] / K + eps), a warp for each row
  __device__ __forceinline__ void norms() const {
    float* scale = reinterpret_cast<float*>(shared + SCALE);
#pragma unroll
    for (int m = warp; m < ROWS; m += C::WARPS) {
      float sum = 0;
      if (m < C::M)
#pragma unroll 8
        for (int s = lane; s < SUMS; s += 32) sum += __ldcg(a.squares + size_t(m) * SUMS + s);
      sum = warp_sum(sum);
      if (lane == 0) scale[m] = rsqrtf(sum / C::K + C::EPS);
    }
    __syncthreads();
  }

  __device__ __forceinline__ float4* gains() const {
    return reinterpret_cast<float4*>(shared + GAIN) + warp * PARTS * 8;
  }

  // Trained, so read before the launches before this one have ended.
  __device__ __forceinline__ void stage_gains() const {
    for (int e = lane; e < length * HALVES * 8; e += 32) {
      const int k = first * DEPTH + e * 4;
      gains()[e] = k < C::K ? __ldg(reinterpret_cast<const float4*>(a.gain + k)) : float4{};
    }
    __syncwarp();
  }

  struct Raw {
    float4 v[WIDE ? 2 : 1];
  };

  // 8 neighbours of row `lane / 4` of a tile: this thread's part of 32 rows of W.
  __device__ __forceinline__ int depth(int i) const {
    return (first * HALVES + i) * 32 + lane % 4 * 8;
  }
  __device__ __forceinline__ Raw load(int i, int tile) const {
    const int m = tile * 8 + lane / 4, k = depth(i);
    Raw raw = {};
    if (i >= length * HALVES || m >= C::M || k >= C::K) return raw;
    const float4* at = static_cast<const float4*>(a.x) + (size_t(m) * C::K + k) / (WIDE ? 4 : 8);
#pragma unroll
    for (int j = 0; j < (WIDE ? 2 : 1); ++j) raw.v[j] = __ldcg(at + j);
    return raw;
  }
  __device__ __forceinline__ uint4 rounded(const Raw& raw, int i, int tile) const {
    if constexpr (!WIDE) return *reinterpret_cast<const uint4*>(raw.v);
    float f[8], gain[8];
    const float* from = reinterpret_cast<const float*>(raw.v);
    if constexpr (NORM) {
      const float scale = reinterpret_cast<const float*>(shared + SCALE)[tile * 8 + lane / 4];
#pragma unroll
      for (int j = 0; j < 2; ++j)
        reinterpret_cast<float4*>(gain)[j] = gains()[i * 8 + lane % 4 * 2 + j];
#pragma unroll
      for (int j = 0; j < 8; ++j) f[j] = from[j] * scale * gain[j];
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) f[j] = from[j];
    }
    return make_uint4(pair<T>(f[0], f[1]), pair<T>(f[2], f[3]), pair<T>(f[4], f[5]),
                      pair<T>(f[6], f[7]));
  }

  __device__ __forceinline__ void stage() {
#pragma unroll
    for (int from = 0; from < PARTS; from += BATCH) {
      Raw raw[BATCH][C::TILES];
#pragma unroll
      for (int i = 0; i < BATCH; ++i)
#pragma unroll
        for (int m = 0; m < C::TILES; ++m) raw[i][m] = load(from + i, m);
      if (NORM && from == 0) norms();
#pragma unroll
      for (int i = 0; i < BATCH; ++i)
#pragma unroll
        for (int m = 0; m < C::TILES; ++m)
          if (from + i < PARTS) x[from + i][m] = rounded(raw[i][m], from + i, m);
      asm volatile("" ::: "memory");  // one batch after another, or registers run out
    }
  }

  // ---- products

  // One piece of W, all rows of x.
  __device__ __forceinline__ void multiply_piece(float (&sum)[2][C::TILES][4], const uint4 (&w)[4],
                                                 int j) const {
    each_half<T, C::SCALED>(w, [&](const uint4 (&half)[4], int b) {
#pragma unroll
      for (int m = 0; m < C::TILES; ++m) multiply_tile<T>(sum, m, half, x[HALVES * j + b][m]);
    });
  }

  // ---- sums

  __device__ __forceinline__ int row(int c) const { return c / 2 * 8 + lane % 4 * 2 + c % 2; }

  // Four columns of `row(c)` of this warp, into the block's memory.
  __device__ __forceinline__ void leave(const float (&sum)[2][C::TILES][4], int i) const {
    float4* to = reinterpret_cast<float4*>(shared + LOCAL + ((i & 1) * C::WARPS + warp) * STEP);
#pragma unroll
    for (int c = 0; c < COUNT; ++c) to[c * 32 + lane] = columns(sum, c);
  }

  // Which quarter or half of a strip's sums this warp adds; warps take turns.
  __device__ __forceinline__ int share(int i) const {
    return (warp + C::WARPS - i * COUNT % C::WARPS) % C::WARPS;
  }

  static __device__ __forceinline__ void add(float4& sum, const float4& v) {
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }

  template <int PARTS> __device__ __forceinline__ float4 total(int from, int c) const {
    const float4* each = reinterpret_cast<const float4*>(shared + from) + c * 32 + lane;
    float4 sum = each[0];
#pragma unroll
    for (int p = 1; p < PARTS; ++p) add(sum, each[p * COUNT * 32]);
    return sum;
  }

  // The sums of the warps of strip i are there: finish them, or send them to the strip's owner.
  __device__ __forceinline__ void gather(int i) const {
    const int c = share(i);
    if (c >= COUNT) return;
    const float4 sum = total<C::WARPS>(LOCAL + (i & 1) * C::WARPS * STEP, c);
    if constexpr (C::CLUSTER == 1) {
      store<C>(a, sum, row(c), strip(i) * 32 + lane / 4 * 4, lane);
    } else {
      const int owner = i % C::CLUSTER, slot = i / C::CLUSTER & 1;
      const u32 to = base + SENT + (slot * C::CLUSTER + rank) * STEP + (c * 32 + lane) * 16;
      send_cluster(to, sum, received() + slot * 8, owner);
    }
  }

  // All blocks' sums of the strip of round r that this block owns: wait for them, finish them.
  __device__ __forceinline__ void finish(int r) const {
    const int i = r * C::CLUSTER + rank, c = share(r), slot = r & 1;
    if (strip(i) >= STRIPS || c >= COUNT) return;
    await_cluster(received() + slot * 8, r / 2 & 1);
    const float4 sum = total<C::CLUSTER>(SENT + slot * C::CLUSTER * STEP, c);
    if (c == 0 && lane == 0) expect_bytes(received() + slot * 8, C::CLUSTER * STEP);
    store<C>(a, sum, row(c), strip(i) * 32 + lane / 4 * 4, lane);
  }

  __device__ __forceinline__ void run() {
    Ring<C::STAGES> ring;
    const u32 barriers = base + RING;
    if (C::CLUSTER > 1 && threadIdx.x == 0) {
      open_barriers(received(), 2);
      for (int slot = 0; slot < 2; ++slot) expect_bytes(received() + slot * 8, C::CLUSTER * STEP);
    }
    ring.open(base + warp * C::STAGES * PIECE, barriers + warp * C::STAGES * 8, lane);
    int next = 0, at = 0;  // the piece to ask for: of strip(next)
    auto ask = [&] {
      ring.issue(piece(strip(next), at), strip(next) < STRIPS);
      if (++at == length) at = 0, ++next;
    };
    for (int i = 0; i < C::STAGES; ++i) ask();
    if (C::CLUSTER > 1) arrive_cluster();
    if constexpr (NORM) stage_gains();
    wait_for_launches();
    let_next_start();  // what it reads before its own wait is older than the launch before this one
    stage();
    int i = 0;
    for (; strip(i) < STRIPS; ++i) {
      float sum[2][C::TILES][4] = {};
#pragma unroll
      for (int j = 0; j < PIECES; ++j)
        if (j < PIECES - 1 || j < length) {
          uint4 w[4];
          ring.take(w);
          ask();
          multiply_piece(sum, w, j);
        }
      leave(sum, i);
      __syncthreads();
      const bool begins = C::CLUSTER > 1 && i % C::CLUSTER == 0;
      if (begins) wait_cluster();  // the strip before the last of each owner is finished
      gather(i);
      if (begins) {
        if (i) finish(i / C::CLUSTER - 1);
        arrive_cluster();
      }
    }
    if constexpr (C::CLUSTER > 1) {
      if (i) finish((i - 1) / C::CLUSTER);
      wait_cluster();
    }
  }
};

template <typename C> __device__ __forceinline__ void narrow(const narrow_args<C>& a) {
  extern __shared__ __align__(128) char shared[];
  Narrow<C>(a, shared).run();
}

}  // namespace pcc
