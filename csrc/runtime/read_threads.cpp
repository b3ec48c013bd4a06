#include "runtime/read_threads.h"

#include <algorithm>

namespace dcext {

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
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    Entry* entry = nullptr;
    work_ready_.wait(lock, [&] { return stopping_ || (entry = next_waiting()) != nullptr; });
    if (stopping_) return;
    // Who wakes the client from here on sets `waiting` again, and nothing is missed.
    entry->waiting = false;
    ++entry->running;
    lock.unlock();
    const bool did = entry->client->read_one();
    lock.lock();
    if (--entry->running == 0) left_.notify_all();
    if (did && !entry->leaving) entry->waiting = true;  // another read may follow
  }
}

ReadThreads& default_read_threads() {
  static ReadThreads* const kThreads = new ReadThreads(kReadThreads);  // never destroyed
  return *kThreads;
}

}  // namespace dcext
