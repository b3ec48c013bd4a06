#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <list>
#include <mutex>
#include <thread>
#include <vector>

namespace dcext {

/** A few threads that read for everyone. They take turns between those who have something to read, and sleep when
 *  nobody has. Reads block in the system: io_uring was measured beside them, at 1 to 16 reads of 0.5 to 4 MiB, and is
 *  neither faster nor, by more than 0.01 s of CPU a GB, cheaper. */
class ReadThreads {
 public:
  /** Someone who reads. */
  class Client {
   public:
    virtual ~Client() = default;

    /** Does one read, if there is one to do. Called by several threads at the same time.
     *  @return whether it did; false lets threads sleep until the next `wake`. */
    virtual bool read_one() = 0;
  };

  /** @param num_threads   reads at the same time; at least 1. */
  explicit ReadThreads(int num_threads);
  /** All clients must be gone. */
  ~ReadThreads();
  ReadThreads(const ReadThreads&) = delete;
  ReadThreads& operator=(const ReadThreads&) = delete;

  int num_threads() const { return static_cast<int>(threads_.size()); }

  void attach(Client* client);

  /** Has a thread call `read_one`; harmless where there is nothing to do. */
  void wake(Client* client);

  /** Names the processor of a thread that others wait for, such as the one that runs a model; -1: there is none. Reads
   *  keep off it where there is another: where all compute, each read costs who is interrupted tens of microseconds. */
  void keep_off(int cpu) { busy_cpu_.store(cpu, std::memory_order_relaxed); }

  /** Returns when no thread is in `read_one`, and none will be. */
  void detach(Client* client);

 private:
  struct Entry {
    Client* client;
    bool waiting = false;  // it may have something to read
    bool leaving = false;
    int running = 0;  // threads in read_one
  };

  Entry* find(Client* client);
  Entry* next_waiting();
  void loop();

  std::mutex mutex_;
  std::condition_variable work_ready_, left_;
  std::list<Entry> clients_;  // the front one's turn is next
  bool stopping_ = false;
  std::atomic<int> busy_cpu_{-1};
  std::vector<std::thread> threads_;
};

/** The library's, of kReadThreads threads, started when it is first asked for; they live until the process ends.
 *  A child after fork() starts its own; clients of the parent's must not be used there. */
ReadThreads& default_read_threads();
constexpr int kReadThreads = 4;

}  // namespace dcext
