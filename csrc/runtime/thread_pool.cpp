#include "runtime/thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <thread>
#include <vector>

namespace dcext {

int available_cpus() {
  cpu_set_t mask;
  if (sched_getaffinity(0, sizeof(mask), &mask) == 0) return std::max(1, CPU_COUNT(&mask));
  return std::max(1u, std::thread::hardware_concurrency());
}

// The threads and the region that they work on. Held by pointer, so that a forked child can drop the parent's without
// touching mutexes in an unknown state.
struct ThreadPool::Threads {
  std::mutex mutex;
  std::condition_variable work_ready, work_done;
  std::vector<std::thread> workers;
  uint64_t generation = 0;
  bool stopping = false;

  // The region; written under `mutex` while no worker is active.
  FunctionRef<void(int64_t, int)>* task = nullptr;
  int64_t num_tasks = 0;
  int num_helpers = 0;  // workers 1 .. num_helpers take part
  int active = 0;
  std::atomic<int64_t> next{0};

  void drain(int worker) {
    for (int64_t i = next.fetch_add(1); i < num_tasks; i = next.fetch_add(1)) (*task)(i, worker);
  }

  void loop(int worker, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex);
    for (;;) {
      work_ready.wait(lock, [&] { return stopping || generation != seen; });
      if (stopping) return;
      seen = generation;
      if (worker > num_helpers) continue;
      lock.unlock();
      drain(worker);
      lock.lock();
      if (--active == 0) work_done.notify_one();
    }
  }

  void grow(int helpers) {
    while (static_cast<int>(workers.size()) < helpers) {
      const int worker = static_cast<int>(workers.size()) + 1;
      workers.emplace_back([this, worker, seen = generation] { loop(worker, seen); });
    }
  }

  void stop() {
    {
      const std::lock_guard<std::mutex> lock(mutex);
      stopping = true;
    }
    work_ready.notify_all();
    for (std::thread& worker : workers) worker.join();
  }
};

ThreadPool::ThreadPool(int num_threads) : num_threads_(std::max(1, num_threads)) {}

ThreadPool::~ThreadPool() {
  if (threads_ == nullptr || owner_ != getpid()) return;
  threads_->stop();
  delete threads_;
}

void ThreadPool::resize(int num_threads) {
  const std::lock_guard<std::mutex> lock(region_mutex_);
  num_threads_ = std::max(1, num_threads);
}

void ThreadPool::run(int64_t num_tasks, int max_workers,
                     FunctionRef<void(int64_t index, int worker)> task) {
  const int64_t wanted = std::min<int64_t>({num_tasks, max_workers, num_threads_});
  if (wanted <= 1) {
    for (int64_t i = 0; i < num_tasks; ++i) task(i, 0);
    return;
  }
  const std::lock_guard<std::mutex> region(region_mutex_);
  if (threads_ == nullptr || owner_ != getpid()) {
    threads_ = new Threads;  // a forked child leaks the parent's: its threads do not exist here
    owner_ = getpid();
  }
  Threads& threads = *threads_;
  {
    const std::lock_guard<std::mutex> lock(threads.mutex);
    threads.num_helpers = static_cast<int>(wanted) - 1;
    threads.grow(threads.num_helpers);
    threads.task = &task;
    threads.num_tasks = num_tasks;
    threads.active = threads.num_helpers;
    threads.next = 0;
    ++threads.generation;
  }
  threads.work_ready.notify_all();
  threads.drain(0);
  std::unique_lock<std::mutex> lock(threads.mutex);
  threads.work_done.wait(lock, [&] { return threads.active == 0; });
}

ThreadPool& default_pool() {
  // Never destroyed: its threads may outlive the statics that they use.
  static ThreadPool* const kPool = [] {
    pthread_atfork([] { default_pool().lock_for_fork(); },
                   [] { default_pool().unlock_after_fork(); },
                   [] { default_pool().unlock_after_fork(); });
    return new ThreadPool(available_cpus());
  }();
  return *kPool;
}

}  // namespace dcext
