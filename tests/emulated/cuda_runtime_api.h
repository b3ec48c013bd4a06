#pragma once

// CUDA's words, as far as our kernels use them, on threads of a CPU: each CUDA thread is a thread of its own, blocks run
// one after the other. It stands in for CUDA's header of this name, so that a kernel's file compiles unchanged.
//
// Under ThreadSanitizer a barrier that the kernel lacks is a data race: only __syncthreads and __syncwarp order memory.
// Shuffles exchange values and order nothing, as on a GPU, so they are kept from the sanitizer, and so are the barriers,
// which announce themselves.

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <memory>
#include <thread>
#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define EMULATED_UNSEEN __attribute__((noinline, no_sanitize("thread")))
#else
#define EMULATED_UNSEEN
#endif

#define __CUDA_ARCH__ 900  // the paths that a GPU takes
#define __global__
#define __device__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

using cudaError_t = int;
using cudaStream_t = void*;

namespace emulated {

constexpr int kWarpSize = 32;
constexpr int64_t kMaxWaitS = 60;  // no barrier takes as long, unless some thread never comes

struct Index {
  unsigned x;
};

/** What threads meet for. All must meet for the same: the values are such that sums over 128 threads tell. */
enum Meeting : uint32_t {
  kSyncThreads = 1,
  kSyncWarp = 1 << 8,
  kShuffle = 1 << 16,
  kEnd = 1 << 24
};

[[noreturn]] inline void stop(const char* why) {
  std::fprintf(stderr, "emulated: %s\n", why);
  std::_Exit(3);
}

/** A barrier that sleeps, as there are many more threads than cores. */
class Barrier {
 public:
  explicit Barrier(uint32_t num_threads) : num_threads_(num_threads) {}

  /** Returns in which of two alternating rounds the threads met. */
  EMULATED_UNSEEN uint32_t wait(Meeting meeting) {
    const uint32_t round = __atomic_load_n(&round_, __ATOMIC_ACQUIRE);
    __atomic_fetch_add(&meetings_, uint64_t{meeting}, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived_, 1u, __ATOMIC_ACQ_REL) == num_threads_) {
      if (meetings_ != uint64_t{meeting} * num_threads_) stop("threads wait at different barriers");
      meetings_ = 0;
      arrived_ = 0;
      __atomic_store_n(&round_, round + 1, __ATOMIC_RELEASE);
      syscall(SYS_futex, &round_, FUTEX_WAKE_PRIVATE, num_threads_, nullptr, nullptr, 0);
      return round % 2;
    }
    const timespec deadline{std::time(nullptr) + kMaxWaitS, 0};
    while (__atomic_load_n(&round_, __ATOMIC_ACQUIRE) == round) {
      syscall(SYS_futex, &round_, FUTEX_WAIT_BITSET_PRIVATE | FUTEX_CLOCK_REALTIME, round,
              &deadline, nullptr, FUTEX_BITSET_MATCH_ANY);
      if (std::time(nullptr) > deadline.tv_sec) stop("a barrier that not all threads reach");
    }
    return round % 2;
  }

  /** Waits, and what was written before is there for all afterwards. */
  void sync(Meeting meeting) {
#if defined(__SANITIZE_THREAD__)
    // A thread that is a round ahead announces itself elsewhere, so that those behind cannot profit from it.
    char* const order = &order_[syncs(meeting)];
    __tsan_release(order);
    wait(meeting);
    __tsan_acquire(order);
#else
    wait(meeting);
#endif
  }

 private:
  // Which of two places threads announce themselves at: alternating, by each thread's own count.
  static uint32_t syncs(Meeting meeting) {
    static thread_local uint32_t of_block = 0, of_warp = 0;
    return (meeting == kSyncWarp ? of_warp++ : of_block++) % 2;
  }

  const uint32_t num_threads_;
  uint64_t meetings_ = 0;
  uint32_t arrived_ = 0, round_ = 0;
  char order_[2] = {};
};

struct Warp {
  Barrier barrier{kWarpSize};
  uint32_t shuffled[2][kWarpSize];
};

inline thread_local Index thread_index, block_index;
inline thread_local Barrier* block_barrier;
inline thread_local Warp* warp;
inline thread_local uint32_t num_shuffles;

/** A shuffle's slots alternate: those of the one before may still be read. */
EMULATED_UNSEEN inline uint32_t shuffle(uint32_t value, unsigned source) {
  uint32_t* const slots = warp->shuffled[num_shuffles++ % 2];
  slots[thread_index.x % kWarpSize] = value;
  warp->barrier.wait(kShuffle);
  return slots[source];
}

/** Runs kernel() as `num_blocks` CUDA blocks, from the last to the first if `reversed`. */
template <typename Kernel>
void launch(int64_t num_blocks, int num_threads, bool reversed, const Kernel& kernel) {
  Barrier barrier(num_threads);
  const std::unique_ptr<Warp[]> warps(new Warp[num_threads / kWarpSize]);
  std::vector<std::thread> threads;
  for (int i = 0; i < num_threads; ++i) {
    threads.emplace_back([&, i] {
      thread_index.x = static_cast<unsigned>(i);
      block_barrier = &barrier;
      warp = &warps[i / kWarpSize];
      for (int64_t block = 0; block < num_blocks; ++block) {
        block_index.x = static_cast<unsigned>(reversed ? num_blocks - 1 - block : block);
        kernel();
        barrier.sync(kEnd);  // the next block uses the same shared memory
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace emulated

#define threadIdx emulated::thread_index
#define blockIdx emulated::block_index

inline void __syncthreads() { emulated::block_barrier->sync(emulated::kSyncThreads); }
inline void __syncwarp() { emulated::warp->barrier.sync(emulated::kSyncWarp); }

inline uint32_t __shfl_sync(unsigned mask, uint32_t value, int lane) {
  if (mask != ~0u) emulated::stop("a shuffle of a part of a warp");
  return emulated::shuffle(value, lane % emulated::kWarpSize);
}

inline uint32_t __shfl_up_sync(unsigned mask, uint32_t value, int distance) {
  if (mask != ~0u) emulated::stop("a shuffle of a part of a warp");
  const int lane = static_cast<int>(threadIdx.x) % emulated::kWarpSize;
  return emulated::shuffle(value, lane < distance ? lane : lane - distance);
}

inline int atomicOr(int* address, int value) {
  return __atomic_fetch_or(address, value, __ATOMIC_RELAXED);
}

inline unsigned __ldg(const unsigned* address) { return *address; }

template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}

template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}
