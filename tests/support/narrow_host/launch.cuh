// `main` of a program of kernels: runs one of them, under one schedule after another.
//
// Arguments: the kernel's number, blocks, blocks of a cluster, threads, bytes of shared memory, the
// first schedule and how many; then for each argument of the kernel "BYTES,EARLY,WRITTEN". Standard
// input has the bytes of all arguments, standard output gets those that are written, for each
// schedule. The status is 3 where the kernel did what no program may rest on.
#pragma once

#include <utility>

#include "device.cuh"

namespace pcc_host {

constexpr size_t GUARD = 256;  // bytes before and behind an array, that nobody may write

struct Given { size_t bytes; bool written; std::vector<char> data; char* at; };

template <typename... A, size_t... I>
void spread(void (*kernel)(A...), const std::vector<Given>& g, std::index_sequence<I...>) {
  kernel(reinterpret_cast<A>(g[I].at)...);
}
template <typename... A> void spread(void (*kernel)(A...), const std::vector<Given>& g) {
  if (g.size() != sizeof...(A)) fail("another number of arguments");
  spread(kernel, g, std::index_sequence_for<A...>{});
}

// NaN for halves and floats inside, guards around.
inline char* guarded(size_t bytes) {
  const size_t all = (bytes + 2 * GUARD + 255) / 256 * 256;
  char* at = static_cast<char*>(aligned_alloc(256, all));
  if (at == nullptr) fail("no memory");
  memset(at, 0x5c, all);
  memset(at + GUARD, 0xff, bytes);
  return at + GUARD;
}

inline void release(char* at, size_t bytes) {
  for (size_t i = 0; i < GUARD; ++i)
    if (at[i - GUARD] != 0x5c || at[bytes + i] != 0x5c) fail("written beside an array");
  free(at - GUARD);
}

using Call = void (*)(const std::vector<Given>&);

inline void launch(Call call, unsigned blocks, unsigned threads, unsigned schedule,
                   std::vector<Given>& given) {
  constexpr unsigned RATES[] = {1, 3, 20, 200};
  rate = RATES[schedule % 4], uneven = schedule > 1, idle = 0;
  mbarriers.clear(), copies.clear();
  clusters.assign(blocks / cluster_blocks, Cluster());
  members.assign(blocks * threads, Member());
  operands.assign(blocks * threads, Operands());
  lags.assign(blocks * threads / 32, 0);
  left.assign(blocks, threads);
  memories.resize(blocks);
  for (char*& m : memories) m = guarded(room);
  for (size_t i = 0; i < given.size(); ++i) {
    Given& g = given[i];
    g.at = guarded(g.bytes);
    memcpy(g.at, g.data.data(), g.bytes);
    arrays[i].data = g.at;
  }
  const bool ended = run(blocks, threads, schedule, [&] { call(given), --left[blockIdx.x]; });
  if (!ended) fail("a thread waits for others that do not come");
  if (!copies.empty()) fail("copies that nobody waited for");
  for (const Member& m : members)
    if (m.arrived) fail("ended without waiting at the cluster's barrier");
  for (char* m : memories) release(m, room);
  for (const Given& g : given) {
    if (g.written && fwrite(g.at, 1, g.bytes, stdout) != g.bytes) fail("no place for results");
    release(g.at, g.bytes);
  }
}

inline int launches(const std::vector<Call>& calls, int argc, char** argv) {
  std::vector<unsigned> n;
  for (int i = 1; i < 8 && i < argc; ++i) n.push_back(unsigned(atoi(argv[i])));
  if (n.size() < 7 || n[0] >= calls.size()) return 2;
  cluster_blocks = n[2], room = n[4];
  std::vector<Given> given;
  for (int i = 8; i < argc; ++i) {
    unsigned long bytes;
    int early, written;
    if (sscanf(argv[i], "%lu,%d,%d", &bytes, &early, &written) != 3) return 2;
    given.push_back({bytes, written != 0, std::vector<char>(bytes), nullptr});
    arrays.push_back({nullptr, bytes, early != 0});
    if (fread(given.back().data.data(), 1, bytes, stdin) != bytes) return 2;
  }
  for (unsigned i = 0; i < n[6]; ++i) launch(calls[n[0]], n[1], n[3], n[5] + i, given);
  return 0;
}

}  // namespace pcc_host
