#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>

namespace dcext::stress {

/** Says on stderr what is wrong and ends the process with status 1. */
[[noreturn]] void stop(const char* format, ...) __attribute__((format(printf, 1, 2)));

/** What a thread is about to do, until this goes out of scope: for the dump of a run that stands still. */
class Doing {
 public:
  /** @param what   a literal. */
  Doing(const char* what, const void* stream, int64_t unit, int64_t piece = -1);
  ~Doing();
  Doing(const Doing&) = delete;
  Doing& operator=(const Doing&) = delete;

  struct Place {
    const char* what = nullptr;
    const void* stream = nullptr;
    int64_t unit = -1, piece = -1;
  };

 private:
  Place before_;
};

/** Ends the process with status 3, and says what all threads wait for, when a count stands still. */
class Watchdog {
 public:
  Watchdog(const std::atomic<int64_t>& count, int patience_s);
  ~Watchdog();
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

 private:
  void watch();

  const std::atomic<int64_t>& count_;
  const int patience_s_;
  std::mutex mutex_;
  std::condition_variable ended_;
  bool end_ = false;
  std::thread thread_;
};

}  // namespace dcext::stress
