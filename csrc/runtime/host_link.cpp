#include "runtime/host_link.h"

#include <unistd.h>

#include <condition_variable>
#include <cstring>
#include <deque>
#include <thread>

namespace dcext {
namespace {

// One recording of an event.
class Flag {
 public:
  void set() {
    // Notifies inside the lock: whoever waits may destroy the flag as soon as it is set.
    const std::lock_guard<std::mutex> lock(mutex_);
    happened_ = true;
    changed_.notify_all();
  }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return happened_; });
  }
  bool happened() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return happened_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool happened_ = false;
};

// Stands for its last recording.
struct HostEvent {
  std::mutex mutex;
  std::shared_ptr<Flag> last;

  std::shared_ptr<Flag> get() {
    const std::lock_guard<std::mutex> lock(mutex);
    return last;
  }
};

HostEvent& as_event(Link::Event event) { return *static_cast<HostEvent*>(event); }

}  // namespace

// A thread that runs functions in order.
class HostLink::Worker {
 public:
  Worker() : thread_([this] { loop(); }) {}

  ~Worker() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }

  void enqueue(std::function<void()> function) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      functions_.push_back(std::move(function));
    }
    changed_.notify_all();
  }

  void synchronize() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [this] { return functions_.empty() && !running_; });
  }

 private:
  void loop() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return stopping_ || !functions_.empty(); });
      if (functions_.empty()) return;
      std::function<void()> function = std::move(functions_.front());
      functions_.pop_front();
      running_ = true;
      lock.unlock();
      function();
      function = nullptr;
      lock.lock();
      running_ = false;
      if (functions_.empty()) changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> functions_;
  bool running_ = false, stopping_ = false;
  std::thread thread_;  // last: it uses all above
};

HostLink::HostLink() : owner_(getpid()), copy_stream_(create_stream()) {}

HostLink::~HostLink() {
  if (getpid() == owner_) return;
  for (auto& worker : workers_) worker.release();  // NOLINT: its thread is not here to be joined
}

Link::Stream HostLink::create_stream() {
  const std::lock_guard<std::mutex> lock(mutex_);
  workers_.push_back(std::make_unique<Worker>());
  return workers_.back().get();
}

void HostLink::enqueue(Stream stream, std::function<void()> function) {
  if (stream == kNow) return function();
  static_cast<Worker*>(stream)->enqueue(std::move(function));
}

void HostLink::synchronize(Stream stream) {
  if (stream != kNow) static_cast<Worker*>(stream)->synchronize();
}

Failure HostLink::create_event(Event* event) {
  *event = new HostEvent;
  return {};
}

void HostLink::destroy_event(Event event) { delete &as_event(event); }

Failure HostLink::copy(void* dst, const void* src, int64_t nbytes, Stream stream) {
  enqueue(stream, [=] { std::memcpy(dst, src, static_cast<size_t>(nbytes)); });
  return {};
}

Failure HostLink::record(Event event, Stream stream) {
  auto flag = std::make_shared<Flag>();
  {
    HostEvent& recorded = as_event(event);
    const std::lock_guard<std::mutex> lock(recorded.mutex);
    recorded.last = flag;
  }
  enqueue(stream, [flag] { flag->set(); });
  return {};
}

Failure HostLink::wait(Stream stream, Event event) {
  if (const std::shared_ptr<Flag> flag = as_event(event).get()) {
    enqueue(stream, [flag] { flag->wait(); });
  }
  return {};
}

Failure HostLink::query(Event event, bool* happened) {
  const std::shared_ptr<Flag> flag = as_event(event).get();
  *happened = flag == nullptr || flag->happened();
  return {};
}

Failure HostLink::wait_on_host(Event event) {
  if (const std::shared_ptr<Flag> flag = as_event(event).get()) flag->wait();
  return {};
}

Failure HostLink::drain() {
  synchronize(copy_stream_);
  return {};
}

Failure HostLink::pin(void*, int64_t) { return {}; }

void HostLink::unpin(void*) {}

Failure HostLink::capture_of(Stream, uint64_t* id) {
  *id = 0;
  return {};
}

}  // namespace dcext
