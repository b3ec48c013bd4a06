#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "base/parallel.h"

namespace dcext {

// Torch's intra-op threads. A pool of our own would share the cores with OpenMP threads that spin for milliseconds
// after each of torch's parallel regions.
class TorchExecutor final : public Executor {
 public:
  int num_workers() const override { return at::get_num_threads(); }

  void run(int64_t num_tasks, FunctionRef<void(int64_t, int)> task) override {
    const int64_t workers = std::min<int64_t>(num_workers(), num_tasks);
    std::atomic<int64_t> next{0};
    at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) {
        for (int64_t i = next.fetch_add(1); i < num_tasks; i = next.fetch_add(1)) {
          task(i, static_cast<int>(worker));
        }
      }
    });
  }
};

}  // namespace dcext
