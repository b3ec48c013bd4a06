#pragma once

#include <sys/types.h>

#include <atomic>
#include <mutex>

#include "base/parallel.h"

namespace dcext {

/** CPUs that this process may run on (its affinity mask); at least 1. */
int available_cpus();

/** A fixed set of threads for independent tasks; the calling thread works too.
 *  One region runs at a time: concurrent callers queue. After fork() the child starts threads of its own at its first
 *  region. The pool of `default_pool()` lives until the process ends. */
class ThreadPool {
 public:
  /** @param num_threads   threads that work on a region, the caller included; at least 1. */
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }

  /** Changes the number of threads, between regions. */
  void resize(int num_threads);

  /** Runs a region on at most `max_workers` threads; see Executor::run. Starts threads as they are needed. */
  void run(int64_t num_tasks, int max_workers, FunctionRef<void(int64_t index, int worker)> task);

  /** Around fork(): no region runs while the process is copied. */
  void lock_for_fork() { region_mutex_.lock(); }
  void unlock_after_fork() { region_mutex_.unlock(); }

 private:
  struct Threads;

  std::mutex region_mutex_;
  std::atomic<int> num_threads_;
  Threads* threads_ = nullptr;  // guarded by region_mutex_
  pid_t owner_ = -1;            // process that started threads_
};

/** The library's pool, of `available_cpus()` threads unless resized. A fork() waits for its region to end. */
ThreadPool& default_pool();

/** A pool seen as an Executor with a bound of its own on the number of threads. */
class PoolExecutor final : public Executor {
 public:
  PoolExecutor(ThreadPool& pool, int max_workers) : pool_(pool), max_workers_(max_workers) {}
  int num_workers() const override { return max_workers_; }
  void run(int64_t num_tasks, FunctionRef<void(int64_t index, int worker)> task) override {
    pool_.run(num_tasks, max_workers_, task);
  }

 private:
  ThreadPool& pool_;
  int max_workers_;
};

}  // namespace dcext
