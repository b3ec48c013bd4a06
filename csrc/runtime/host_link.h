#pragma once

#include <sys/types.h>

#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "runtime/link.h"

namespace dcext {

/** A link between two places in host memory: each stream is a thread, a copy is memcpy, nothing is captured. What runs
 *  on the CPU uses it, and tests of what runs on devices. */
class HostLink : public Link {
 public:
  /** A stream that has always run what it was given: functions run in the calling thread, `wait` blocks it. */
  static constexpr Stream kNow = nullptr;

  HostLink();
  /** Runs what streams were given. In a child of the process that made the link, where no stream runs, does nothing. */
  ~HostLink() override;
  HostLink(const HostLink&) = delete;
  HostLink& operator=(const HostLink&) = delete;

  /** A stream that lives as long as the link. */
  Stream create_stream();

  /** Has a stream run a function, after what it was given before. */
  virtual void enqueue(Stream stream, std::function<void()> function);

  /** Blocks until a stream has nothing left. */
  void synchronize(Stream stream);

  Stream copy_stream() const override { return copy_stream_; }
  Stream capture_stream() const override { return copy_stream_; }
  Failure create_event(Event* event) override;
  void destroy_event(Event event) override;
  Failure copy(void* dst, const void* src, int64_t nbytes, Stream stream) override;
  Failure record(Event event, Stream stream) override;
  Failure wait(Stream stream, Event event) override;
  Failure query(Event event, bool* happened) override;
  Failure wait_on_host(Event event) override;
  Failure drain() override;
  Failure pin(void* data, int64_t nbytes) override;
  void unpin(void* data) override;
  Failure capture_of(Stream stream, uint64_t* id) override;

 private:
  class Worker;

  std::mutex mutex_;  // guards workers_
  std::vector<std::unique_ptr<Worker>> workers_;
  const pid_t owner_;
  Stream copy_stream_;
};

}  // namespace dcext
