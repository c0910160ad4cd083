// y = round(x) W for few rows of x: streams W, packed as pack.py says, through tensor cores.
//
// Block (column, slab, part): rows 64 part.. of x, its slab of K in shared memory; each warp
// streams the slab of its strips of 32 columns of W. A strip is complete once all its slabs have written
// their sums to `partial`; the last one adds them in order of the slabs and stores the result.
#pragma once
#include "epilogue.cuh"
#include "pieces.cuh"
#include "stream.cuh"

namespace pcc {

template <typename C> struct linear_args : epilogue_args<C> {
  const void* x;
  const float *gain, *squares;
  const void* w;  // halves, or integers of 8 bits where SCALED
  float* partial;
  u32* count;
};

template <typename C> struct Linear {
  using T = typename C::T;
  static constexpr int DEPTH = C::SCALED ? 64 : 32;  // of K in a piece of W
  static constexpr int BLOCKS = (C::K + DEPTH - 1) / DEPTH, STRIPS = (C::N + 31) / 32;
  static constexpr int SUMS = (C::K + 31) / 32;  // of squares of a row of x
  static constexpr int ROWS = 8 * C::TILES, THREADS = 32 * C::WARPS;
  static constexpr int RING = C::WARPS * C::STAGES * PIECE;
  static constexpr bool WIDE = C::SOURCE != 1, NORM = C::SOURCE == 2;
  static constexpr int GROUPS = C::SLAB * DEPTH / 8, ROUNDS = (ROWS * GROUPS + THREADS - 1) / THREADS;
  static constexpr int LOADS = ROUNDS < 12 ? ROUNDS : 12;  // of a thread at once: one wait for all

#if __CUDA_ARCH__ >= 900
  static constexpr bool BULK = !WIDE && C::K % DEPTH == 0;
#else
  static constexpr bool BULK = false;
#endif

  const linear_args<C>& a;
  char* shared;
  float* scale;
  int warp, lane, first, length, row0;

  __device__ __forceinline__ Linear(const linear_args<C>& a_, char* shared_)
      : a(a_), shared(shared_), warp(threadIdx.x / 32), lane(threadIdx.x % 32) {
    first = BLOCKS * int(blockIdx.y) / C::SLABS;
    length = BLOCKS * (int(blockIdx.y) + 1) / C::SLABS - first;
    row0 = 64 * int(blockIdx.z);
    scale = reinterpret_cast<float*>(shared + RING + ROWS * C::PITCH);
  }

  // Strips of this warp: those that leave over are spread over all blocks, not in a few.
  __device__ __forceinline__ int strip(int i) const {
    return int(blockIdx.x) + C::COLUMNS * (warp + C::WARPS * i);
  }

  __device__ __forceinline__ const char* piece(int strip, int block) const {
    return reinterpret_cast<const char*>(a.w) + (size_t(strip) * BLOCKS + first + block) * PIECE;
  }

  // scale[m] = 1 / sqrt(sum_s squares[s,m] / K + eps), a warp for each row
  __device__ __forceinline__ void norms() const {
#pragma unroll 2
    for (int m = warp; m < ROWS; m += C::WARPS) {
      float sum = 0;
      if (row0 + m < C::M)
#pragma unroll 4
        for (int s = lane; s < SUMS; s += 32)
          sum += __ldcg(a.squares + size_t(row0 + m) * SUMS + s);
      sum = warp_sum(sum);
      if (lane == 0) scale[m] = rsqrtf(sum / C::K + C::EPS);
    }
    __syncthreads();
  }

  // 8 neighbours of a row of x as they lie in memory.
  struct Raw {
    float4 x[WIDE ? 2 : 1];
  };

  // Element i of the slab's 16-byte groups, row by row; zeros beyond M and K.
  __device__ __forceinline__ Raw load(int i) const {
    const int m = row0 + i / GROUPS, k = first * DEPTH + i % GROUPS * 8;
    Raw raw = {};
    if (i >= ROWS * GROUPS || m >= C::M || k >= C::K) return raw;
    const size_t at = size_t(m) * C::K + k;
    if constexpr (C::K % 8 == 0) {
#pragma unroll
      for (int j = 0; j < (WIDE ? 2 : 1); ++j)
        raw.x[j] = __ldcg(static_cast<const float4*>(a.x) + at / (WIDE ? 4 : 8) + j);
    } else {
      using Value = typename Select<WIDE, float, T>::type;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        bool inside = k + j < C::K;
        if (inside)
          reinterpret_cast<Value*>(raw.x)[j] = __ldcg(static_cast<const Value*>(a.x) + at + j);
      }
    }
    return raw;
  }

  __device__ __forceinline__ void put_group(int i, const Raw& raw) const {
    if (i >= ROWS * GROUPS) return;
    const int m = i / GROUPS, k = first * DEPTH + i % GROUPS * 8;
    uint4 v;
    if constexpr (WIDE) {
      float f[8], gain[8];
      if constexpr (NORM && C::K % 8 == 0) {
#pragma unroll
        for (int j = 0; j < 2; ++j)
          reinterpret_cast<float4*>(gain)[j] =
              k < C::K ? __ldg(reinterpret_cast<const float4*>(a.gain + k) + j) : float4{};
      } else if constexpr (NORM) {
#pragma unroll
        for (int j = 0; j < 8; ++j) gain[j] = k + j < C::K ? __ldg(a.gain + k + j) : 0.0f;
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        f[j] = reinterpret_cast<const float*>(raw.x)[j];
        if (NORM) f[j] = f[j] * scale[m] * gain[j];
      }
      v = make_uint4(pair<T>(f[0], f[1]), pair<T>(f[2], f[3]), pair<T>(f[4], f[5]),
                     pair<T>(f[6], f[7]));
    } else {
      v = *reinterpret_cast<const uint4*>(raw.x);
    }
    *reinterpret_cast<uint4*>(shared + RING + m * C::PITCH + i % GROUPS * 16) = v;
  }

  // Rows of x in this slab, rounded, into shared memory; several loads of a thread in flight.
  __device__ __forceinline__ void stage() const {
    Raw raw[LOADS];
    for (int from = 0; from < ROWS * GROUPS; from += THREADS * LOADS) {
      const int i = from + threadIdx.x;
#pragma unroll
      for (int j = 0; j < LOADS; ++j) raw[j] = load(i + j * THREADS);
      if (NORM && from == 0) norms();
#pragma unroll
      for (int j = 0; j < LOADS; ++j) put_group(i + j * THREADS, raw[j]);
    }
    __syncthreads();
  }

  // The same by the copy engine, where x is in halves already: a row's part lies in one piece.
  __device__ __forceinline__ void stage_rows(u32 barrier) const {
    const int count = min(ROWS, C::M - row0), bytes = length * DEPTH * 2;
    const u32 to = shared_address(shared) + RING;
    if (warp == 0) {
      if (lane == 0) expect_bytes(barrier, count * bytes);
      __syncwarp();
      const T* x = static_cast<const T*>(a.x) + size_t(row0) * C::K + first * DEPTH;
      for (int m = lane; m < count; m += 32)
        copy_bulk(to + m * C::PITCH, x + size_t(m) * C::K, bytes, barrier);
    }
    for (int i = count * GROUPS + threadIdx.x; i < ROWS * GROUPS; i += THREADS)
      *reinterpret_cast<uint4*>(shared + RING + i / GROUPS * C::PITCH + i % GROUPS * 16) = uint4{};
    __syncthreads();  // the barrier is there, and the zeros
    await(barrier, 0);
  }

  // One piece of W, all rows of x.
  __device__ __forceinline__ void multiply_piece(float (&sum)[2][C::TILES][4], const uint4 (&w)[4],
                                                 int block) const {
    each_half<T, C::SCALED>(w, [&](const uint4 (&half)[4], int b) {
      const u32 at = shared_address(shared) + RING + (lane / 4) * C::PITCH +
                     (DEPTH / 32 * block + b) * 64 + (lane % 4) * 16;
#pragma unroll
      for (int m = 0; m < C::TILES; ++m)
        multiply_tile<T>(sum, m, half, read_shared(at + m * 8 * C::PITCH));
    });
  }

  static constexpr int COUNT = 2 * C::TILES;

  __device__ __forceinline__ float4* sums(int strip) const {
    return reinterpret_cast<float4*>(a.partial) +
           (size_t(blockIdx.z) * STRIPS + strip) * C::SLABS * COUNT * 32 + lane;
  }
  __device__ __forceinline__ int row(int i) const {
    return row0 + i / 2 * 8 + lane % 4 * 2 + i % 2;
  }

  // Write this slab's sums of a strip; a thread holds columns 4 (lane / 4) + 0..3 of `row(i)`.
  __device__ __forceinline__ void leave(const float4 (&sum)[COUNT], int strip) const {
    float4* mine = sums(strip) + int(blockIdx.y) * COUNT * 32;
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      if (row(i) < C::M) __stcg(mine + i * 32, sum[i]);
  }

  // Add the slabs of a strip in order, as many loads in flight as there is room for.
  __device__ __forceinline__ void gather(float4 (&sum)[COUNT], int strip) const {
    constexpr int STEP = COUNT > 8 ? 1 : 32 / COUNT;
    const float4* all = sums(strip);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) sum[i] = make_float4(0, 0, 0, 0);
#pragma unroll 1
    for (int s = 0; s < C::SLABS; s += STEP) {
      float4 v[STEP][COUNT];
#pragma unroll
      for (int j = 0; j < STEP; ++j)
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
          v[j][i] = make_float4(0, 0, 0, 0);
          if (s + j < C::SLABS && row(i) < C::M) v[j][i] = __ldcg(all + ((s + j) * COUNT + i) * 32);
        }
#pragma unroll
      for (int j = 0; j < STEP; ++j)
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
          sum[i].x += v[j][i].x, sum[i].y += v[j][i].y;
          sum[i].z += v[j][i].z, sum[i].w += v[j][i].w;
        }
    }
  }

  // Strips begin..end-1 of this warp, at most 32, have been left: finish those that are complete.
  // One look at the counters serves them all, so that streaming is not held up strip by strip.
  __device__ __forceinline__ void settle(int begin, int end) const {
    __threadfence();
    __syncwarp();
    bool mine = false;
    if (begin + lane < end) {
      u32* counter = a.count + int(blockIdx.z) * STRIPS + strip(begin + lane);
      mine = atomicAdd(counter, 1u) == C::SLABS - 1;
      if (mine) *counter = 0;
    }
    __threadfence();
    for (u32 left = __ballot_sync(~0u, mine); left; left &= left - 1) {
      const int s = strip(begin + __ffs(left) - 1);
      float4 sum[COUNT];
      gather(sum, s);
      write(sum, s);
    }
  }

  __device__ __forceinline__ void write(const float4 (&sum)[COUNT], int strip) const {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) store<C>(a, sum[i], row(i), strip * 32 + lane / 4 * 4, lane);
  }

  __device__ __forceinline__ void run() const {
    Ring<C::STAGES> ring;
    u32 base = shared_address(shared), barriers = base + RING + ROWS * C::PITCH + ROWS * 4;
    const u32 rows = barriers + C::WARPS * C::STAGES * 8;
    if (threadIdx.x == 0) open_barriers(rows, 1);
    ring.open(base + warp * C::STAGES * PIECE, barriers + warp * C::STAGES * 8, lane);
    int next = 0, block = 0;  // the piece to ask for: of strip(next)
    auto ask = [&] {
      ring.issue(piece(strip(next), block), strip(next) < STRIPS);
      if (++block == length) block = 0, ++next;
    };
    for (int i = 0; i < C::STAGES; ++i) ask();
    wait_for_launches();
    let_next_start();  // what it reads before its own wait is older than the launch before this one
    if constexpr (BULK)
      stage_rows(rows);
    else
      stage();
    int done = 0, settled = 0;
    for (; strip(done) < STRIPS; ++done) {
      float sum[2][C::TILES][4] = {};
      for (int k = 0; k < length; ++k) {
        uint4 w[4];
        ring.take(w);
        ask();
        multiply_piece(sum, w, k);
      }
      float4 sums[COUNT];
#pragma unroll
      for (int i = 0; i < COUNT; ++i) sums[i] = columns(sum, i);
      if constexpr (C::SLABS > 1) {
        if (done - settled == 32) settle(settled, done), settled = done;
        leave(sums, strip(done));
      } else {
        write(sums, strip(done));
      }
    }
    if constexpr (C::SLABS > 1) settle(settled, done);
#if __CUDA_ARCH__ < 900
    wait_copies<0>();
#endif
  }
};

template <typename C> __device__ __forceinline__ void linear(const linear_args<C>& a) {
  extern __shared__ __align__(128) char shared[];
  Linear<C>(a, shared).run();
}

}  // namespace pcc
