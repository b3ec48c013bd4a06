#include "runtime/read_threads.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>

#include "base/fork_safe.h"

namespace dcext {
namespace {

// The processors that a thread may run on, less one. What is set from outside is kept to.
class Affinity {
 public:
  Affinity() { CPU_ZERO(&own_); }

  // -1: off none.
  void keep_off(int cpu) {
    cpu_set_t now;
    if (sched_getaffinity(0, sizeof now, &now) != 0) return;
    if (!CPU_EQUAL(&now, &own_)) allowed_ = now;
    cpu_set_t wanted = allowed_;
    if (cpu >= 0) CPU_CLR(cpu, &wanted);
    if (CPU_COUNT(&wanted) == 0) wanted = allowed_;
    if (CPU_EQUAL(&wanted, &now)) return;
    if (sched_setaffinity(0, sizeof wanted, &wanted) == 0) own_ = wanted;
  }

 private:
  cpu_set_t own_;      // what was set here
  cpu_set_t allowed_;  // what there was else
};

}  // namespace

ReadThreads::ReadThreads(int num_threads) {
  for (int i = 0; i < std::max(1, num_threads); ++i) threads_.emplace_back([this] { loop(); });
}

ReadThreads::~ReadThreads() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  work_ready_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void ReadThreads::attach(Client* client) {
  const std::lock_guard<std::mutex> lock(mutex_);
  clients_.push_back(Entry{client});
}

ReadThreads::Entry* ReadThreads::find(Client* client) {
  for (Entry& entry : clients_) {
    if (entry.client == client) return &entry;
  }
  return nullptr;
}

void ReadThreads::wake(Client* client) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    Entry* entry = find(client);
    if (entry == nullptr || entry->leaving) return;
    entry->waiting = true;
  }
  work_ready_.notify_one();
}

void ReadThreads::detach(Client* client) {
  std::unique_lock<std::mutex> lock(mutex_);
  Entry* entry = find(client);
  if (entry == nullptr) return;
  entry->waiting = false;
  entry->leaving = true;
  left_.wait(lock, [&] { return entry->running == 0; });
  clients_.remove_if([&](const Entry& other) { return &other == entry; });
}

// Whose turn it is; it goes to the end of the line.
ReadThreads::Entry* ReadThreads::next_waiting() {
  for (auto it = clients_.begin(); it != clients_.end(); ++it) {
    if (!it->waiting) continue;
    clients_.splice(clients_.end(), clients_, it);
    return &*it;
  }
  return nullptr;
}

void ReadThreads::loop() {
  Affinity affinity;
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    Entry* entry = nullptr;
    work_ready_.wait(lock, [&] { return stopping_ || (entry = next_waiting()) != nullptr; });
    if (stopping_) return;
    // Who wakes the client from here on sets `waiting` again, and nothing is missed.
    entry->waiting = false;
    ++entry->running;
    lock.unlock();
    affinity.keep_off(busy_cpu_.load(std::memory_order_relaxed));
    const bool did = entry->client->read_one();
    lock.lock();
    if (--entry->running == 0) left_.notify_all();
    if (did && !entry->leaving) entry->waiting = true;  // another read may follow
  }
}

ReadThreads& default_read_threads() {
  // Never destroyed. A forked child leaks the parent's: its threads do not exist there, and its locks may be held.
  static ReadThreads* threads = nullptr;
  static pid_t owner = -1;
  const std::lock_guard<std::mutex> lock(fork_safe_mutex<ReadThreads>());
  if (threads == nullptr || owner != getpid()) {
    threads = new ReadThreads(kReadThreads);
    owner = getpid();
  }
  return *threads;
}

}  // namespace dcext
